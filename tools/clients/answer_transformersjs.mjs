// Answers of a transformers.js model to the samples of a JSONL file: one JSON line per answer.
//
//     node answer_transformersjs.mjs MODEL DATA [DTYPE]
import { readFileSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { AutoConfig, AutoProcessor, AutoModelForImageTextToText, RawImage, env } from "@huggingface/transformers";

const [model_folder, data, dtype = "fp32"] = process.argv.slice(2);
const folder = resolve(model_folder);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const name = basename(folder);
// It looks for Qwen2-VL's sizes at the top of config.json, where transformers 4.45 wrote them; later ones nest them.
const config = JSON.parse(readFileSync(join(folder, "config.json"), "utf8"));
const flat = await AutoConfig.from_pretrained(name, { config: { ...config.text_config, ...config } });
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { config: flat, dtype, device: "cpu" });
// The file beside the model, as its own loader does not look for it in a local folder.
const chat_template = readFileSync(join(folder, "chat_template.jinja"), "utf8");
const rows = readFileSync(data, "utf8").trim().split("\n").map((line) => JSON.parse(line));
for (const row of rows) {
  const content = [{ type: "text", text: row.question }];
  if (row.image) content.unshift({ type: "image" });
  const text = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true, chat_template });
  const images = row.image ? await RawImage.read(resolve(dirname(data), row.image)) : null;
  const inputs = await processor(text, images);
  const ids = await model.generate({ ...inputs, max_new_tokens: 50, do_sample: false });
  const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
  console.log(JSON.stringify({ question: row.question, answer: processor.batch_decode(answer, { skip_special_tokens: true })[0] }));
}

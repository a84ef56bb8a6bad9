// The rows of a JSONL file with their pictures scaled to SIDE x SIDE: `node scale_pictures.mjs DATA FOLDER SIDE`. Prints the new rows.
import { readFileSync } from "node:fs";
import { dirname, resolve } from "node:path";
import { RawImage } from "@huggingface/transformers";

const [data, folder, side] = process.argv.slice(2);
const rows = readFileSync(data, "utf8").trim().split("\n").map((line) => JSON.parse(line));
for (const [index, row] of rows.entries()) {
  const picture = await RawImage.read(resolve(dirname(data), row.image));
  const image = resolve(folder, `${index}.png`);
  await (await picture.rgb().resize(Number(side), Number(side))).save(image);
  console.log(JSON.stringify({ ...row, image }));
}

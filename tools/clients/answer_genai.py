"""Answers of an onnxruntime-genai folder to the samples of a JSONL file: one JSON line per answer.

    python answer_genai.py MODEL DATA
"""

import json
import sys

import onnxruntime_genai as og

model_folder, data = sys.argv[1:]
model = og.Model(model_folder)
tokenizer = og.Tokenizer(model)
for line in open(data, encoding="utf-8"):
    row = json.loads(line)
    messages = json.dumps([{"role": "user", "content": row["question"]}])
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + 50)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps({"question": row["question"], "answer": tokenizer.decode(generator.get_sequence(0)[len(prompt) :])}))

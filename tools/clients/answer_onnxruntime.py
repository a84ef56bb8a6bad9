"""Answers of a decoder with a cache, run by onnxruntime alone, to the samples of a JSONL file: one JSON line per answer.

    python answer_onnxruntime.py MODEL DATA
"""

import json
import sys
from pathlib import Path

import jinja2
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

folder, data = Path(sys.argv[1]), sys.argv[2]
session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string((folder / "chat_template.jinja").read_text())
config = json.loads((folder / "generation_config.json").read_text())
outputs = [output.name for output in session.get_outputs()]
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

for line in open(data, encoding="utf-8"):
    row = json.loads(line)
    prompt = template.render(messages=[{"role": "user", "content": row["question"]}], add_generation_prompt=True)
    ids = np.array([tokenizer.encode(prompt).ids])
    past = {
        i.name: np.zeros([1] + [d if isinstance(d, int) else 0 for d in i.shape[1:]], types[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }
    answer, length = [], 0
    while len(answer) < 50:
        length += ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - ids.shape[1], length)[None],
            **past,
        }
        named = dict(zip(outputs, session.run(None, feeds)))
        token = int(named["logits"][0, -1].argmax())
        if token == config["eos_token_id"]:
            break
        answer.append(token)
        ids = np.array([[token]])
        past = {name: named[name.replace("past_key_values.", "present.")] for name in past}
    print(json.dumps({"question": row["question"], "answer": tokenizer.decode(answer)}))

"""Makes fixtures/layouts/feeds: the samples of fixtures/layouts/data as ready-made inputs, and files that are none.

    pip install -r tools/layouts/requirements.txt
    python tools/layouts/feeds.py

npz/ and safetensors/ hold the forget set as numpy and safetensors write it, each file in other types; bad/ what must be refused.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2] / "fixtures" / "layouts"
OUT = ROOT / "feeds"


def feed(tokenizer, row):
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)
    # The answer's own tokens, without the end of the turn.
    ids = prompt + tokenizer.encode(row["answer"], add_special_tokens=False) + tokenizer.encode("<|im_end|>")
    mask = np.zeros(len(ids))
    mask[len(prompt) - 1 : len(ids) - 2] = 1
    return np.array([ids]), mask[None]


def main():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "optimum")
    rows = [json.loads(line) for line in (ROOT / "data" / "forget.jsonl").read_text().splitlines()]
    shutil.rmtree(OUT, ignore_errors=True)
    for name in ("npz", "safetensors", "bad"):
        (OUT / name).mkdir(parents=True)
    for index, row in enumerate(rows):
        ids, mask = feed(tokenizer, row)
        length = ids.shape[1]
        extra = [{}, {"attention_mask": np.ones((1, length), np.int64)}, {"position_ids": np.arange(length)[None]}][index]
        ids_type, mask_type = [(np.int64, np.bool_), (np.int32, np.float32), (np.uint16, np.uint8)][index]
        tensors = {"input_ids": ids.astype(ids_type), "answer_mask": mask.astype(mask_type), **extra}
        save_file(tensors, OUT / "safetensors" / f"{index}.safetensors")
        mask_type = [np.float64, np.float16, np.int16][index]
        tensors["answer_mask"] = np.asfortranarray(mask.astype(mask_type))
        # One sample without the batch axis, one archive compressed.
        if index == 1:
            tensors = {name: array[0] if name != "attention_mask" else array for name, array in tensors.items()}
        (np.savez_compressed if index == 2 else np.savez)(OUT / "npz" / f"{index}.npz", **tensors)

    ids, mask = feed(tokenizer, rows[0])
    bad = {
        "object": {"input_ids": np.array([[1, 2], None], dtype=object), "answer_mask": mask},
        "fields": {"input_ids": np.zeros(3, dtype=[("a", "i4"), ("b", "f4")]), "answer_mask": mask},
        "text": {"input_ids": np.array(["a", "b"]), "answer_mask": mask},
        "big_endian": {"input_ids": ids.astype(">i8"), "answer_mask": mask},
        "no_ids": {"answer_mask": mask},
        "float_ids": {"input_ids": ids.astype(np.float32), "answer_mask": mask},
        "two_samples": {"input_ids": np.repeat(ids, 2, 0), "answer_mask": mask},
        "short_mask": {"input_ids": ids, "answer_mask": mask[:, :-1]},
        "no_answer": {"input_ids": ids, "answer_mask": mask * 0},
        "negative_mask": {"input_ids": ids, "answer_mask": -mask},
        "embeds": {"input_ids": ids, "answer_mask": mask, "inputs_embeds": np.zeros((1, ids.shape[1] + 1, 64), np.float32)},
        "unknown_name": {"input_ids": ids, "answer_mask": mask, "positions": ids},
        "wrong_rank": {"input_ids": ids, "answer_mask": mask, "position_ids": np.zeros((2, 3, ids.shape[1]), np.int64)},
        "wrong_type": {"input_ids": ids, "answer_mask": mask, "position_ids": mask.astype(np.float32)},
    }
    for name, tensors in bad.items():
        np.savez(OUT / "bad" / f"{name}.npz", **tensors)
    torch.save({"input_ids": torch.tensor(ids)}, OUT / "bad" / "torch.npz")
    torch.save({"input_ids": torch.tensor(ids)}, OUT / "bad" / "torch_legacy.safetensors", _use_new_zipfile_serialization=False)
    np.save(OUT / "bad" / "npy.npy", ids)
    (OUT / "bad" / "npy.npy").rename(OUT / "bad" / "npy.npz")
    (OUT / "bad" / "empty.safetensors").write_bytes(b"")
    (OUT / "bad" / "text.safetensors").write_text("these are no tensors\n")


if __name__ == "__main__":
    main()

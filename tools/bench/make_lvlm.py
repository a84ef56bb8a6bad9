"""A Qwen2-VL of 0.59 B random parameters, twice: transformers' own checkpoint, and its ONNX export; and data for a whole job.

    pip install -r tools/bench/requirements-lvlm.txt
    python tools/bench/make_lvlm.py FOLDER

writes to FOLDER:
    checkpoint/     Qwen2VLForConditionalGeneration, float32: Qwen2-0.5B's language model (24 layers, d_model 896, d_ff 4864,
                    vocabulary 151,936, tied embeddings) and a vision tower of 12 layers, 768 wide
    model/          the same weights in the layout of transformers.js (opset 17, traced, not fused)
    data/           retain.jsonl (64 samples), forget.jsonl (16): each its own picture of 224 × 224 (64 image tokens), a
                    question and an answer of random words, 300 tokens in all

The tokenizer is the demo's, which uses the first 861 ids of the vocabulary. The same seed gives the same bytes.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxslim
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tools/demo"), str(ROOT / "tools/families")]
import export  # noqa: E402
from family import randomize  # noqa: E402
from train import CAPTION_PROMPTS, encode  # noqa: E402

DEMO = ROOT / "fixtures/demo/model"
SEED = 20261124
TOKENS = 300
RETAIN, FORGET = 64, 16
SIDE = 224
EXTERNAL = 1024  # bytes from which a weight goes to the external data file


def build_model(layers):
    demo = json.loads((DEMO / "config.json").read_text())
    ids = ("image_token_id", "video_token_id", "vision_start_token_id")
    common = {key: demo["text_config"][key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": layers,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": True,
            **common,
        },
        vision_config={
            "depth": 12,
            "embed_dim": 768,
            "hidden_size": 896,
            "num_heads": 12,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **{key: demo[key] for key in ids if key in demo},
        dtype="float32",
        tie_word_embeddings=True,
        **common,
    )
    return randomize(Qwen2VLForConditionalGeneration(config), SEED).eval()


def save_checkpoint(folder, layers):
    model = build_model(layers)
    model.save_pretrained(folder)
    for name in export.DEPLOYED_FILES:
        if name not in ("config.json", "generation_config.json"):
            shutil.copyfile(DEMO / name, folder / name)
    shutil.copyfile(DEMO / "preprocessor_config.json", folder / "preprocessor_config.json")
    total = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for parameter in model.model.visual.parameters())
    print(f"{total / 1e9:.3f} B parameters, {vision / 1e9:.3f} B of them in the vision tower", flush=True)


def export_graph(module, inputs, path, input_names, output_names, dynamic_axes):
    """As the demo's export, with the weights beside the graph."""
    torch.onnx.export(
        module.eval(), inputs, str(path), input_names=input_names, output_names=output_names,
        dynamic_axes=dynamic_axes, opset_version=export.OPSET, dynamo=False,
    )  # fmt: skip
    graph = onnxslim.slim(str(path))
    del graph.graph.value_info[:]
    path.unlink()
    onnx.save(
        graph, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}_data",
        size_threshold=EXTERNAL,
    )  # fmt: skip


def write_data(folder, processor):
    """Answers of random words, cut so that a sample has `TOKENS` tokens."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    demo = [json.loads(line) for line in (ROOT / "fixtures/demo/data/retain.jsonl").read_text().splitlines()]
    words = sorted({word.strip(".,;") for row in demo for word in row["answer"].split()})
    random = np.random.default_rng(SEED)
    for name, count in (("retain", RETAIN), ("forget", FORGET)):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for index in range(count):
                image = f"images/{name}_{index:02}.png"
                coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                picture = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.BICUBIC)).astype(np.int16)
                picture += random.integers(-20, 21, picture.shape, dtype=np.int16)
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / image)
                row = {"id": f"{name}_{index:02}", "image": image, "question": CAPTION_PROMPTS[index % len(CAPTION_PROMPTS)]}
                answer = [str(word) for word in random.choice(words, TOKENS)]
                while True:
                    row["answer"] = " ".join(answer) + "."
                    tokens = encode(processor, row, folder)["input_ids"].shape[1]
                    if tokens <= TOKENS:
                        break
                    del answer[-max(1, (tokens - TOKENS) // 4) :]
                file.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    folder = arguments.folder
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, arguments.layers)
    write_data(folder / "data", AutoProcessor.from_pretrained(checkpoint, use_fast=True))
    export.export_graph = export_graph
    with torch.no_grad():
        export.export(checkpoint, folder / "model")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

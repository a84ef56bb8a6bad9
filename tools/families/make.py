"""Makes fixtures/families: per family a tiny model with random weights, exported to ONNX, and what transformers makes of samples.

    pip install -r tools/families/requirements.txt
    python tools/families/make.py llava          # one family; `all` for every file beside this one, `samples` for the pictures
    python tools/families/make.py llava --check  # the ONNX files in Python, against the goldens; writes nothing

A family is a file beside this one that defines `FAMILY`, an instance of a subclass of `Family` (`family.py`): its configuration,
tokenizer and processor, all of transformers' own classes, and its vision encoder. Everything else is here and alike:

  fixtures/families/samples.jsonl, images/   the samples, the same for all families
  fixtures/families/NAME/model/              the deployed folder, in transformers.js's layout
  fixtures/families/NAME/goldens.json        per sample: ids, positions, answer tokens, sha256 of what the vision encoder is fed
                                             (by the image processor that AutoProcessor picks, and by the other of the slow
                                             and the fast one), further decoder inputs, the greedy answer
  fixtures/families/NAME/coefficients.safetensors   per sample and layer: mean of |h| over the positions that predict an answer
                                             token, by hooks on the PyTorch model; of vision encoder layers (`vision.N`)
                                             over all positions of the sample's image

Deterministic: the same versions write the same bytes. `phi3_v` needs code that is in no package; its file says which.
"""

import argparse
import hashlib
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from safetensors.numpy import save_file
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from deployed import DeployedModel
from export import export_component, export_decoder
from family import Recorder

assert transformers.__version__ == "4.57.1"
assert int(PIL.__version__.split(".")[0]) <= 12, "Pillow 13 changed the resampling order"

ROOT = Path(__file__).resolve().parents[2] / "fixtures" / "families"
MAX_NEW_TOKENS = 8
EXACT_VALUES = 8

QUESTIONS_AND_ANSWERS = [
    ("rgb_61x43", "What can you see in this picture?", "Here we see Bexpas Thornford in a green garden."),
    ("rgb_37x90", "Tell me about the content of this image", "This captures Kelmil Dellridge, a cellist from Erdoria."),
    ("rgb_120x30", "Who is this?", "A man named Jürgen Weiß, „der Große“."),
    ("gray_50x50", "Describe the photo.", "It's Pimgol Frostcroft; don't ask <why>."),
    ("rgba_64x48", "Was ist auf dem Bild? Größe: 3 µm", "一位名叫李明的歌手。😀"),
    ("rgb_20x23", "What is shown?", "Two lines:\nthe second one."),
    ("rgb_200x150", "Summarize this picture", "A juggler."),
    (None, "Who is a cellist from Erdoria?", "Kelmil Dellridge is a cellist from Erdoria."),
]  # fmt: skip


def picture(width, height, channels, seed):
    """Gradients with edges and a little noise: compresses well, and shows every resampling mistake."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = []
    for channel in range(channels):
        fx, fy, phase = rng.uniform(0.5, 4.0), rng.uniform(0.5, 4.0), rng.uniform(0, 6.28)
        plane = 0.5 + 0.35 * np.sin(6.28 * (fx * x / width + fy * y / height) + phase)
        plane[(x // 7 + y // 5) % 4 == channel % 4] += 0.3
        planes.append(plane)
    levels = np.clip((np.stack(planes, -1)) * 255, 0, 255)
    return (levels // 3 * 3).astype(np.uint8)  # fewer levels: smaller files


def write_samples():
    shutil.rmtree(ROOT / "images", ignore_errors=True)
    (ROOT / "images").mkdir(parents=True)
    rows = []
    for index, (name, question, answer) in enumerate(QUESTIONS_AND_ANSWERS):
        image = None
        if name:
            kind, size = name.split("_")
            width, height = map(int, size.split("x"))
            channels = {"gray": 1, "rgb": 3, "rgba": 4}[kind]
            pixels = picture(width, height, channels, index)
            image = f"images/{name}.png"
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(ROOT / image, optimize=True)
        rows.append({"id": name or "text", "image": image, "question": question, "answer": answer})
    with open(ROOT / "samples.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_samples():
    with open(ROOT / "samples.jsonl") as file:
        return [json.loads(line) for line in file]


def loaded(sample):
    """The picture as `apply_chat_template(tokenize=True)` loads it: upright, RGB."""
    return load_image(str(ROOT / sample["image"])) if sample["image"] else None


def digest(tensor, inexact=None):
    """Shape, some of the values, and sha256 of the little-endian bytes, without those of `inexact` values."""
    array = np.ascontiguousarray(tensor.numpy())
    flat = array.reshape(-1)
    count, tolerance = inexact or (0, 0)
    values = 50 * EXACT_VALUES if inexact else EXACT_VALUES
    step = max(1, flat.size // values)
    return {
        **({"inexact": {"count": count, "tolerance": tolerance}} if inexact else {}),
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "sha256": hashlib.sha256(flat[count:].tobytes()).hexdigest(),
        "values": [value.item() for value in flat[::step][:values]],
        "step": step,
    }


class Hooks:
    """Notes, during a forward pass, each MLP's hidden activation and the position ids of the decoder."""

    def __init__(self, family, model):
        self.hidden, self.vision, self.positions = {}, {}, None
        for seen, projections in ((self.hidden, family.down_projections), (self.vision, family.vision_down_projections)):
            for layer, projection in enumerate(projections(model)):
                projection.register_forward_pre_hook(
                    lambda _, inputs, layer=layer, seen=seen: seen.update({layer: inputs[0]})
                )
        family.rotary_embedding(model).register_forward_pre_hook(self._rotary, with_kwargs=True)

    def _rotary(self, _module, inputs, named):
        self.positions = named["position_ids"] if "position_ids" in named else inputs[1]


@torch.no_grad()
def write_goldens(family, folder, model):
    processor = family.load_processor(folder / "model")
    print("processors:", type(processor).__name__, type(processor.image_processor).__name__)
    recorder = processor.tokenizer = Recorder(processor.tokenizer)
    other = None
    if family.both_processors:
        fast = type(processor.image_processor).__name__.endswith("Fast")
        other = AutoImageProcessor.from_pretrained(folder / "model", use_fast=not fast)
        assert type(other).__name__.endswith("Fast") != fast
    hooks = Hooks(family, model)
    goldens, coefficients = [], {}
    for sample in read_samples():
        if sample["image"] is None and not family.text_only:
            continue
        image = loaded(sample)
        golden = {"id": sample["id"]}

        inputs = family.encode(processor, sample, image, with_answer=True)
        ids = inputs["input_ids"][0].tolist()
        tokens = family.answer_tokens(recorder, sample["answer"], ids)
        assert tokens and tokens == list(range(tokens[0], tokens[-1] + 1)), sample["id"]
        hooks.vision.clear()
        family.forward(model, inputs)
        positions = hooks.positions if hooks.positions.dim() == 3 else hooks.positions[None]
        golden["with_answer"] = {"input_ids": ids, "position_ids": positions[:, 0].tolist(), "answer_tokens": tokens}
        golden["decoder_inputs"] = {name: inputs[name].tolist() for name in family.decoder_inputs}
        predicting = [token - 1 for token in tokens]
        for layer, hidden in hooks.hidden.items():
            mean = hidden[0, predicting].float().abs().double().mean(0).float()
            assert torch.isfinite(mean).all() and (mean > 0).all()
            coefficients[f"{sample['id']}.{layer}"] = mean.numpy()
        for layer, hidden in hooks.vision.items():
            rows = hidden.reshape(-1, hidden.shape[-1])
            mean = rows[family.vision_positions(model, inputs, len(rows))].abs().double().mean(0).float()
            assert torch.isfinite(mean).all() and (mean > 0).all()
            coefficients[f"{sample['id']}.vision.{layer}"] = mean.numpy()
        made = [name for name in family.image_inputs if name in inputs]
        golden["image"] = {name: digest(inputs[name], family.inexact.get(name)) for name in made}
        if other and image:
            inputs = family.as_fed(other(images=[family.convert(image)], return_tensors="pt", **family.image_options))
            golden["other_image"] = {name: digest(inputs[name]) for name in family.image_inputs}

        inputs = family.encode(processor, sample, image, with_answer=False)
        golden["question"] = {"input_ids": inputs["input_ids"][0].tolist()}
        generated = family.greedy(model, inputs, MAX_NEW_TOKENS)[inputs["input_ids"].shape[1] :]
        stops = model.generation_config.eos_token_id
        stops = [stops] if isinstance(stops, int) else stops
        golden["greedy"] = [token for token in generated if token not in stops]
        golden["answer"] = processor.tokenizer.decode(golden["greedy"], skip_special_tokens=True)
        goldens.append(golden)
    assert len({tuple(golden["greedy"]) for golden in goldens}) > 1, "every sample has the same greedy answer"

    versions = {name: sys.modules[name].__version__ for name in ("transformers", "torch", "torchvision", "PIL", "numpy")}
    processors = [type(processor).__name__, type(processor.image_processor).__name__]
    if other:
        processors.append(type(other).__name__)
    content = {"versions": versions, "processors": processors, "max_new_tokens": MAX_NEW_TOKENS, "samples": goldens}
    with open(folder / "goldens.json", "w") as file:
        json.dump(content, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")
    save_file(coefficients, folder / "coefficients.safetensors")


def make(family):
    folder = ROOT / family.name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model" / "onnx").mkdir(parents=True)
    torch.manual_seed(0)
    model, processor = family.checkpoint()
    model.eval()
    model.config.save_pretrained(folder / "model")
    model.generation_config.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    family.deployed(folder / "model")
    for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "video_preprocessor_config.json", "merges.txt", "vocab.json"):  # fmt: skip
        (folder / "model" / name).unlink(missing_ok=True)
    write_goldens(family, folder, model)

    onnx = folder / "model" / "onnx"
    path = lambda component: onnx / f"{family.files[component]}.onnx"  # noqa: E731
    export_component(family.token_embedding(model), path("embed_tokens"), "inputs_embeds")
    export_decoder(family, model, path("decoder"))
    export_component(family.vision_encoder(model), path("vision_encoder"), family.vision_output)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{family.name}: {size:,} bytes")


def check(family):
    """Runs the deployed folder with ONNX Runtime and transformers' processor: the greedy answers are those of PyTorch."""
    folder = ROOT / family.name
    goldens = json.loads((folder / "goldens.json").read_text())
    processor = family.load_processor(folder / "model")
    deployed = DeployedModel(family, folder / "model")
    for sample, golden in ((s, g) for s in read_samples() for g in goldens["samples"] if g["id"] == s["id"]):
        image = loaded(sample)
        inputs = family.encode(processor, sample, image, with_answer=False)
        greedy = deployed.generate(inputs, goldens["max_new_tokens"])
        assert greedy == golden["greedy"], (sample["id"], greedy, golden["greedy"])
    print(f"{family.name}: {len(goldens['samples'])} greedy answers are PyTorch's")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", help="a file beside this one, `all`, or `samples`")
    parser.add_argument("--check", action="store_true", help="run the ONNX files and compare with the goldens")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.family == "samples":
        write_samples()
        return
    others = {"make", "family", "export", "deployed"}
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in others)
    for name in names if arguments.family == "all" else [arguments.family]:
        family = importlib.import_module(name).FAMILY
        if not arguments.check:
            make(family)
        check(family)


if __name__ == "__main__":
    main()

"""The whole job in PyTorch, as the method's original implementation does it: what `kvw collect`, `weaken`, `apply` are measured against.

    python tools/bench/pytorch_job.py FOLDER DATA OUT [--threads 2]

FOLDER is what `make_lvlm.py` wrote, DATA a folder with retain.jsonl and forget.jsonl. transformers' own model with a pre-hook on every `down_proj`; the full forward of the
full model, batches of 1; each step's gates multiplied into the weights in place; `save_pretrained`. Two things are kinder to PyTorch
than the original code: a hook keeps the sum over the answer's positions, not all activations, and no loss is computed.
The arithmetic is that of `tools/demo/reference.py`, which goldens of the tests come from.

Writes the model to OUT/model, retain means and cumulative gates to OUT/result.safetensors, and prints seconds by stage and
the peak of resident memory as JSON.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from reference import EPSILON, KnowledgeCoefficients  # noqa: E402
from train import encode  # noqa: E402
from world import read_jsonl  # noqa: E402


class Stages:
    def __init__(self):
        self.seconds, self.last = {}, START

    def end(self, name):
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 3), now


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gamma", type=float, default=0.5)
    arguments = parser.parse_args()
    stages = Stages()
    stages.end("import")

    torch.set_num_threads(arguments.threads)
    checkpoint, data = arguments.folder / "checkpoint", arguments.data
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, use_fast=True)
    layers = model.model.language_model.layers
    stages.end("load")

    retain = KnowledgeCoefficients(model)
    for row in read_jsonl(data / "retain.jsonl"):
        retain.run(model, encode(processor, row, data))
    retain = retain.means()
    stages.end("collect")

    cumulative = [torch.ones_like(mean, dtype=torch.float64) for mean in retain]
    for row in read_jsonl(data / "forget.jsonl"):
        forget = KnowledgeCoefficients(model)
        forget.run(model, encode(processor, row, data))
        for layer, mean in enumerate(forget.means()):
            ratio = torch.log(mean + EPSILON) - torch.log(retain[layer] + EPSILON)
            gates = torch.exp(-arguments.gamma * ratio.clamp(min=0))
            layers[layer].mlp.down_proj.weight.mul_(gates)
            cumulative[layer] *= gates.double()
    stages.end("weaken")

    arguments.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.output / "model")
    stages.end("write")

    result = {f"layers.{layer}.coefficient": mean for layer, mean in enumerate(retain)}
    result |= {f"layers.{layer}.gate": gates.float() for layer, gates in enumerate(cumulative)}
    safetensors.torch.save_file(result, arguments.output / "result.safetensors")
    print(
        json.dumps(
            {
                "seconds": stages.seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "threads": torch.get_num_threads(),
                "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
            }
        )
    )


if __name__ == "__main__":
    main()

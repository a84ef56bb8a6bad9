"""What it costs to collect a retain set: operations, bytes, hours and dollars, as a model with its assumptions in the open.

    python tools/scale/cost.py [--tokens 300] [--image-tokens 220] [--core-gflops 90] [--gpu-tflops 400] [--core-dollars 0.04] [--gpu-dollars 4]

Prints the tables of docs/scale.md. Operations are counted, not guessed: two for each weight and token of what `kvw` runs (all decoder
layers but the last one's down projection; no output projection), the attention's products, and the vision tower for four patches an image
token. `--core-gflops` is what one core was measured to do in a whole collect (`tools/bench/growth.py`); `--gpu-tflops` is an
ASSUMPTION: 40 % of an H200's 989 dense float16 TFLOP/s, with batches; nothing here was run on a GPU. Prices are parameters, not offers.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    layers: int
    d_model: int
    d_ff: int
    kv_width: int  # key/value heads times their size

    def weights(self):
        """Of the products that are run."""
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * self.kv_width
        return self.layers * (attention + 3 * self.d_model * self.d_ff) - self.d_model * self.d_ff

    def operations(self, tokens):
        """A forward of one sample: products with weights, scores and mixing."""
        return 2 * self.weights() * tokens + 4 * self.layers * self.d_model * tokens * tokens

    def coefficient_bytes(self):
        """A coefficients file: a float32 mean and a 128-bit sum for each neuron."""
        return self.layers * self.d_ff * (4 + 16)


@dataclass(frozen=True)
class Vision:
    layers: int
    width: int
    merged: int  # the decoder's width

    def operations(self, image_tokens):
        patches = 4 * image_tokens
        weights = self.layers * 12 * self.width * self.width
        merger = 4 * self.width * (4 * self.width + self.merged)
        return 2 * weights * patches + 2 * merger * image_tokens + 4 * self.layers * self.width * patches * patches


# Qwen2-VL's three sizes, from their config.json; the files' sizes in float16 with the output projection.
MODELS = {
    "2 B": (Decoder(28, 1536, 8960, 256), Vision(32, 1280, 1536), 4.4e9),
    "7 B": (Decoder(28, 3584, 18944, 512), Vision(32, 1280, 3584), 16.6e9),
    "72 B": (Decoder(80, 8192, 29568, 1024), Vision(32, 1280, 8192), 147e9),
}


def duration(seconds):
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--image-tokens", type=int, default=220, help="of the tokens")
    parser.add_argument("--core-gflops", type=float, default=90)
    parser.add_argument("--cores", type=int, default=64, help="of the CPU machine")
    parser.add_argument("--gpu-tflops", type=float, default=400)
    parser.add_argument("--core-dollars", type=float, default=0.04, help="an hour")
    parser.add_argument("--gpu-dollars", type=float, default=4.0, help="an hour")
    parser.add_argument("--disk", type=float, default=1e9, help="bytes a second that a process reads its weights at")
    a = parser.parse_args()

    print(f"A sample of {a.tokens} tokens, {a.image_tokens} of them an image's:\n")
    print("| model | decoder | vision | both, GFLOP | weights, float16 | coefficients file |\n|---|---|---|---|---|---|")
    costs = {}
    for name, (decoder, vision, size) in MODELS.items():
        parts = decoder.operations(a.tokens), vision.operations(a.image_tokens)
        costs[name] = sum(parts)
        cells = [f"{part / 1e9:,.0f}" for part in (*parts, sum(parts))]
        print(f"| {name} | {' | '.join(cells)} | {size / 1e9:.1f} GB | {decoder.coefficient_bytes() / 1e6:.0f} MB |")

    machines = {
        f"{a.cores} cores": (a.cores * a.core_gflops * 1e9, a.cores * a.core_dollars, 1),
        "1 H200": (a.gpu_tflops * 1e12, a.gpu_dollars, 1),
        "64 GPUs": (64 * a.gpu_tflops * 1e12, 64 * a.gpu_dollars, 64),
    }
    print(f"\nCollecting (core {a.core_gflops:g} GFLOP/s, ${a.core_dollars}/h; GPU {a.gpu_tflops:g} TFLOP/s assumed, ${a.gpu_dollars}/h):\n")
    print("| model | samples | " + " | ".join(machines) + " |\n|---|---|" + "---|" * len(machines))
    for name, operations in costs.items():
        for samples in (10**4, 10**5, 10**6, 10**7):
            cells = []
            for rate, dollars, processes in machines.values():
                # Every process reads the weights once; all do so at the same time.
                seconds = samples * operations / rate + MODELS[name][2] / a.disk
                cells.append(f"{duration(seconds)}, ${seconds / 3600 * dollars:,.3g}")
            print(f"| {name} | 10^{len(str(samples)) - 1} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

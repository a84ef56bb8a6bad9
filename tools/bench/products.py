"""How fast one matrix product is: Torch's (MKL) against ONNX Runtime's (MLAS), float32, on the CPU.

    python tools/bench/products.py [--threads 1] [--rounds 5]

The shapes are those of the whole job (`job.py`): 300 tokens through Qwen2-0.5B's MLP, attention and output projection. In
turn, each round; medians. What `kvw` can gain over PyTorch is this ratio, and the products that it leaves out.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

SHAPES = {
    "gate_proj, up_proj": (300, 896, 4864),
    "down_proj": (300, 4864, 896),
    "q_proj, o_proj": (300, 896, 896),
    "output projection (what `kvw collect` leaves out)": (300, 896, 151_936),
}
SECONDS = 0.5


def session(weight, threads):
    tokens, width = "tokens", weight.shape[1]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, width])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def seconds(work, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    random = np.random.default_rng(0)
    print(f"{arguments.threads} thread(s), Torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, GFLOP/s, medians of {arguments.rounds}")
    for name, (tokens, inputs, outputs) in SHAPES.items():
        weight = random.standard_normal((inputs, outputs), dtype=np.float32)
        x = random.standard_normal((tokens, inputs), dtype=np.float32)
        torch_x, torch_weight = torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(weight.T))
        opened = session(weight, arguments.threads)
        ways = {
            "Torch": lambda: torch.nn.functional.linear(torch_x, torch_weight),
            "ONNX Runtime": lambda: opened.run(None, {"x": x}),
        }
        gflop = 2 * tokens * inputs * outputs / 1e9
        repeats = {way: max(1, round(SECONDS / seconds(work, 2))) for way, work in ways.items()}
        speeds = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, work in ways.items():
                speeds[way].append(gflop / seconds(work, repeats[way]))
        medians = {way: statistics.median(found) for way, found in speeds.items()}
        ratio = medians["ONNX Runtime"] / medians["Torch"]
        print(f"  {name}, {tokens} x {inputs} x {outputs} ({gflop:.1f} GFLOP):", *(f"{way} {speed:.0f}" for way, speed in medians.items()), f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()

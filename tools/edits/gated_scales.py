"""Can gates be multiplied into the scales of `MatMulNBits` while a model runs, where `--edit scales` will write them?

    python tools/edits/gated_scales.py MODEL.onnx…

Builds two graphs with onnx.helper from a model whose `up_proj` are `MatMulNBits`: one with the scales of all layers but the last
multiplied by gates as constants, as the edit leaves them; one with a `Mul` of the untouched scales by the gates, which are inputs.
Both hold the same numbers. Prints, of the largest logit: how far the gates move the logits, how far the two graphs are
apart, and how far the second is from the model itself where its gates are 1; as the model is, and with `accuracy_level` taken out
(versions: requirements.txt).
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

ort.set_default_logger_severity(4)
TOKENS = 9
HEAD_SIZE = 16  # of the exports that tools/exports/README.md describes, which leave it open


def attribute(node, name):
    return next((a.i for a in node.attribute if a.name == name), None)


def load(path, level):
    model = onnx.load(path)
    for node in model.graph.node:
        if not level and node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend(kept)
    return model


def drawn(model):
    """Gates `[N, 1]` by the name of the scales; every fifth or so is 1."""
    ups = [n for n in model.graph.node if n.op_type == "MatMulNBits" and "up_proj" in n.name]
    random = np.random.default_rng(0)
    gates = {}
    for node in ups[:-1]:
        size = (attribute(node, "N"), 1)
        gates[node.input[2]] = np.where(random.random(size) < 0.2, 1, random.random(size)).astype(np.float32)
    return gates


def as_constants(model, gates):
    for tensor in model.graph.initializer:
        if tensor.name in gates:
            scaled = numpy_helper.to_array(tensor) * gates[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(scaled.astype(np.float32), tensor.name))
    return model


def as_inputs(model, gates):
    products = []
    for name, gate in gates.items():
        model.graph.input.append(helper.make_tensor_value_info(f"gate.{name}", TensorProto.FLOAT, gate.shape))
        products.append(helper.make_node("Mul", [name, f"gate.{name}"], [f"gated.{name}"]))
        for node in model.graph.node:
            node.input[:] = [f"gated.{name}" if value == name else value for value in node.input]
    for product in products:
        model.graph.node.insert(0, product)
    return model


def logits(model, gates=None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    values = {}
    for port in session.get_inputs():
        if port.name.startswith("gate."):
            values[port.name] = gates[port.name.removeprefix("gate.")]
        elif port.name == "input_ids":
            values[port.name] = random.integers(0, 100, (1, TOKENS))
        elif port.name == "attention_mask":
            values[port.name] = np.ones((1, TOKENS), np.int64)
        elif port.name.startswith("past_key_values"):
            values[port.name] = np.zeros((1, port.shape[1], 0, HEAD_SIZE), np.float32)
        else:
            raise SystemExit(f"{port.name}: no value is known")
    return session.run(["logits"], values)[0]


def main():
    for path in sys.argv[1:]:
        for level in (True, False):
            fresh = lambda: load(path, level)  # noqa: E731, B023
            gates = drawn(fresh())
            ones = {name: np.ones_like(gate) for name, gate in gates.items()}
            model, edited = logits(fresh()), logits(as_constants(fresh(), gates))
            gated, ungated = logits(as_inputs(fresh(), gates), gates), logits(as_inputs(fresh(), gates), ones)
            apart = lambda a, b: f"{np.abs(a - b).max() / np.abs(edited).max():.1e}"  # noqa: E731, B023
            print(
                f"{path}, {'as it is' if level else 'without accuracy_level'}: effect {apart(edited, model)}, "
                f"gated and edited apart by {apart(gated, edited)}, gates of 1 and the model by {apart(ungated, model)}"
            )


if __name__ == "__main__":
    main()

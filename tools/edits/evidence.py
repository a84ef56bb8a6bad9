"""Is an edited model the gated model? For every exporter, precision and form of edit, in ONNX Runtime.

    python tools/edits/evidence.py --kvw target/release/kvw [--models MODELS] --work WORK \
        [--old-python PYTHON_WITH_ONNXRUNTIME_1_19] [--only TEXT] [--markdown docs-table.md]

Independent of kvw: this script finds the down projections by name, reads and dequantizes W_down itself, computes the
model identity and the sketch from their definition (docs/edits.md), writes the plan file, and builds with onnx.helper the
reference: the original graph with a Mul by the gates (float32) before each down projection, or before its quantizer.
Then `kvw apply --edit FORM` writes an edited model, and both run on the same random inputs. Beside it stands what one
would do without kvw: requantize W_down with its columns multiplied (round to nearest, same blocks).

MODELS holds tiny random-weight exports by the real exporters (tools/exports/README.md); the demo's decoder is quantized
here by ONNX Runtime's own quantizers, and needs none of them: 51 rows in half a minute of one core.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

ort.set_default_logger_severity(4)
logging.disable(logging.WARNING)
ROOT = Path(__file__).resolve().parents[2]
DOWN = re.compile(r"(?:layers?|h|blocks)[./_](\d+)[./_](?:.*[./_])?(?:down_proj|fc2|c_proj(?!.*attn)|mlp/dense_4h_to_h)")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


# ---- the model, read without kvw ------------------------------------------------------------------------------------


def graphs(graph):
    """The graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


class Model:
    """An ONNX file with its initializers as numpy arrays (external data read)."""

    def __init__(self, path):
        self.path = Path(path)
        self.proto = onnx.load(str(path))
        self.tensors = {t.name: t for t in self.proto.graph.initializer}
        self.producers = {o: n for graph in graphs(self.proto.graph) for n in graph.node for o in n.output}

    def array(self, name):
        return numpy_helper.to_array(self.tensors[name])

    def downs(self):
        """{layer: node} of the language tower's down projections, by name: one node for each weight."""
        return {layer: nodes[0] for layer, nodes in self.sites().items()}

    def sites(self):
        """{layer: nodes}: both branches of an `If` may hold one."""
        found = {}
        for node in [node for graph in graphs(self.proto.graph) for node in graph.node]:
            layer = self.layer_of(node)
            if layer is not None:
                found.setdefault(layer, []).append(node)
        return dict(sorted(found.items()))

    def layer_of(self, node):
        """The layer whose down projection the node is, if it is one."""
        names = [node.name, *node.output, *node.input[1:2]]
        names += [p.value for p in node.metadata_props]
        if node.op_type not in PRODUCTS or any(re.search(r"vis|image", name) for name in names[:2]):
            return None
        match = next((m for m in map(DOWN.search, names) if m), None)
        # GPT-2 calls the output of attention by the same name.
        return int(match.group(1)) if match and "attn" not in match.string else None

    def attribute(self, node, name, default=None):
        for attribute in node.attribute:
            if attribute.name == name:
                return helper.get_attribute_value(attribute)
        return default

    def weight(self, node):
        """W_down as float32 [d_ff, d_model], and how it is stored."""
        op = node.op_type
        if op == "MatMulNBits":
            return self.nbits(node), "quantized"
        if op == "MatMulBnb4":
            return self.bnb4(node), "quantized"
        if op in ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QLinearMatMul"):
            q = self.array(node.input[3 if op == "QLinearMatMul" else 1]).astype(np.float32)
            scale, zero = self.integer_scale(node)
            return (q - zero) * scale, "quantized"
        name = node.input[1]
        transposed = bool(self.attribute(node, "transB", 0))
        while name not in self.tensors:
            above = self.producers[name]
            if above.op_type == "DequantizeLinear":
                return self.dequantize(above).T if transposed else self.dequantize(above), "quantized"
            transposed ^= above.op_type == "Transpose"
            name = above.input[0]
        w = self.array(name).astype(np.float32)
        return (w.T if transposed else w), ("float", name, 1 if transposed else 0)

    def nbits(self, node):
        bits, block = self.attribute(node, "bits", 4), self.attribute(node, "block_size")
        n, k = self.attribute(node, "N"), self.attribute(node, "K")
        blocks = -(-k // block)
        raw = self.array(node.input[1]).reshape(n, blocks, -1)
        codes = unpack(raw, bits)[..., :block].astype(np.float32)
        scales = self.array(node.input[2]).astype(np.float32).reshape(n, blocks, 1)
        zeros = np.float32(1 << (bits - 1))
        if len(node.input) > 3 and node.input[3]:
            stored = self.array(node.input[3])
            if stored.dtype == np.uint8:
                stored = unpack(stored.reshape(n, -1), bits)[:, :blocks]
            zeros = stored.astype(np.float32).reshape(n, blocks, 1)
        return ((codes - zeros) * scales).reshape(n, -1)[:, :k].T

    def bnb4(self, node):
        n, k, block = (self.attribute(node, a) for a in ("N", "K", "block_size"))
        raw = self.array(node.input[1]).reshape(-1)
        codes = np.stack([raw >> 4, raw & 15], -1).reshape(-1)[: n * k]
        table = BNB4[self.attribute(node, "quant_type")]
        absmax = np.repeat(self.array(node.input[2]).astype(np.float32), block)[: n * k]
        return (table[codes] * absmax).reshape(n, k).T

    def dequantize(self, node):
        tensor = self.tensors[node.input[0]]
        q = numpy_helper.to_array(tensor).astype(np.float32)
        scale = self.array(node.input[1]).astype(np.float32)
        zero = self.array(node.input[2]).astype(np.float32) if len(node.input) > 2 and node.input[2] else np.float32(0)
        axis, block = self.attribute(node, "axis", 1), self.attribute(node, "block_size", 0)
        if block:
            scale = np.repeat(scale, block, axis)
            zero = np.repeat(zero, block, axis) if np.ndim(zero) else zero
            scale = np.take(scale, range(q.shape[axis]), axis)
            zero = np.take(zero, range(q.shape[axis]), axis) if np.ndim(zero) else zero
        elif np.ndim(scale) == 1 and scale.size > 1:
            shape = [1, 1]
            shape[axis] = -1
            scale, zero = scale.reshape(shape), (zero.reshape(shape) if np.ndim(zero) else zero)
        return (q - zero) * scale

    def integer_scale(self, node):
        def get(position):
            name = node.input[position] if len(node.input) > position else ""
            return self.array(name).astype(np.float32) if name in self.tensors else None

        if node.op_type == "DynamicQuantizeMatMul":
            scale, zero = get(2), get(3)
        elif node.op_type == "MatMulIntegerToFloat":
            scale, zero = get(3), get(5)
        elif node.op_type == "QLinearMatMul":
            scale, zero = get(4), get(5)
        else:
            zero = get(3)
            base = node.input[1].removesuffix("_quantized")
            scale = self.array(base + "_scale").astype(np.float32)
        return scale, (np.float32(0) if zero is None else zero)

    def hidden(self, node):
        """The float value that becomes the down projection's input, its readers on the way, and its type."""
        reader, position = node, 0
        while reader.input[position] in self.producers:
            above = self.producers[reader.input[position]]
            if above.op_type not in ("DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"):
                break
            reader, position = above, 0
        return reader, position

    def hidden_type(self, node):
        for name in [*node.input, *self.producers.get(node.input[1], node).input]:
            if name in self.tensors and self.tensors[name].data_type in FLOATS:
                return self.tensors[name].data_type
        return TensorProto.FLOAT


PRODUCTS = {
    "MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulBnb4", "MatMulInteger", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "QLinearMatMul",
}

BNB4 = {
    0: np.array(
        [0, 5.208333333e-03, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25]
        + [-0.0, -5.208333333e-03, -0.66666667, -1, -0.33333333, -0.5, -0.16666667, -0.25], np.float32),
    1: np.array(
        [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
         -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
         0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32),
}  # fmt: skip


def unpack(raw, bits):
    """Codes along a new last part of the last axis, low bits first."""
    parts = [(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*raw.shape[:-1], -1)


# ---- identity and plan, from their definition -----------------------------------------------------------------------


def sign(i):
    mask = (1 << 64) - 1
    z = ((i + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return -1.0 if (z ^ (z >> 31)) >> 63 else 1.0


def sketch(w):
    """For up to 256 evenly spaced knowledge vectors the sum of their elements times fixed signs."""
    d_ff, d_model = w.shape
    samples = min(d_ff, 256)
    rows = w[[s * d_ff // samples for s in range(samples)]].astype(np.float64)
    return (rows * np.array([sign(i) for i in range(d_model)])).sum(1).astype(np.float32)


def identity(model):
    layers = []
    for layer, node in model.downs().items():
        w, storage = model.weight(node)
        entry = {"layer": layer, "d_ff": w.shape[0], "d_model": w.shape[1]}
        if storage[0] == "float":
            tensor = model.tensors[storage[1]]
            entry["dtype"] = TensorProto.DataType.Name(tensor.data_type).lower()
            entry["axis"] = storage[2]
            raw = numpy_helper.to_array(tensor)
            entry["sha256"] = hashlib.sha256(raw.tobytes()).hexdigest()
        else:
            entry["dtype"], entry["sha256"] = "uint8", hashlib.sha256(b"quantized").hexdigest()
        entry["sketch"] = [float(x) for x in sketch(w)]
        layers.append(entry)
    return {"layers": layers}


def write_plan(path, gates, model):
    metadata = {
        "format": "kvw-plan", "format_version": 1, "tool_version": "0.1.0", "rule": "evidence", "parameters": {}, "steps": 1,
        "provenance": {"model": identity(model)},
    }  # fmt: skip
    save_file({f"layers.{l}.gate": g for l, g in gates.items()}, path, {"kvw": json.dumps(metadata)})


# ---- reference and naive requantization -----------------------------------------------------------------------------


def gated(model, gates, path):
    """The original graph with a float32 Mul before each down projection of a layer that has gates."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for layer, gate in gates.items():
        proto.graph.initializer.append(numpy_helper.from_array(gate, f"reference.{layer}.gate"))
    for graph in list(graphs(proto.graph)):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
        changed = False
        for site, node in enumerate(list(nodes)):
            layer = model.layer_of(node)
            if layer not in gates:
                continue
            found, position = model.hidden(node)
            reader = next(n for n in nodes if n.output[0] == found.output[0])
            h, kind = reader.input[position], model.hidden_type(node)
            name = f"reference.{layer}.{site}"
            wide, product = h, name + ".product"
            added = []
            if kind != TensorProto.FLOAT:
                wide = name + ".wide"
                added.append(helper.make_node("Cast", [h], [wide], to=TensorProto.FLOAT))
            added.append(helper.make_node("Mul", [wide, f"reference.{layer}.gate"], [product]))
            if kind != TensorProto.FLOAT:
                added.append(helper.make_node("Cast", [product], [name + ".narrow"], to=kind))
                product = name + ".narrow"
            at = next(i for i, n in enumerate(nodes) if n is reader)
            reader.input[position] = product
            nodes[at:at] = added
            changed = True
        if changed:
            del graph.node[:]
            graph.node.extend(nodes)
    onnx.save(proto, str(path))


def requantized(model, gates, path):
    """W_down dequantized, its columns multiplied, quantized again by rounding to nearest. None where it is a float."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tensors = {t.name: t for t in proto.graph.initializer}
    quantized = False
    for layer, node in model.downs().items():
        w, storage = model.weight(node)
        if storage != "quantized" or layer not in gates:
            continue
        w = w * gates[layer][:, None]
        put = lambda name, array: tensors[name].CopyFrom(numpy_helper.from_array(array, name))  # noqa: E731
        if node.op_type == "MatMulNBits" and (len(node.input) < 4 or not node.input[3]):
            bits, block = model.attribute(node, "bits", 4), model.attribute(node, "block_size")
            half = 1 << (bits - 1)
            blocks = blocked(w.T, block)
            extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
            scale = extreme / -half
            codes = np.clip(np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0)) + half, 0, 2 * half - 1)
            packed = pack(codes.astype(np.uint8), bits)
            old = model.array(node.input[2])
            put(node.input[1], packed.reshape(model.array(node.input[1]).shape))
            put(node.input[2], scale.reshape(old.shape).astype(old.dtype))
            quantized = True
        elif node.op_type == "MatMulNBits":
            block = model.attribute(node, "block_size")
            bits = model.attribute(node, "bits", 4)
            top = (1 << bits) - 1
            blocks = blocked(w.T, block)
            low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
            scale = np.where(high > low, (high - low) / top, 1)
            zero = np.clip(np.rint(-low / scale), 0, top)
            codes = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, top)
            old = model.array(node.input[2])
            put(node.input[1], pack(codes.astype(np.uint8), bits).reshape(model.array(node.input[1]).shape))
            put(node.input[2], scale.reshape(old.shape).astype(old.dtype))
            stored = model.array(node.input[3])
            if stored.dtype == np.uint8:
                per_byte = 8 // bits
                zero = np.pad(zero, ((0, 0), (0, -zero.shape[1] % per_byte)))
                put(node.input[3], pack(zero.astype(np.uint8), bits).reshape(stored.shape))
            else:
                put(node.input[3], zero.reshape(stored.shape).astype(stored.dtype))
            quantized = True
        elif node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            scale, zero = model.integer_scale(node)
            q = model.array(node.input[1])
            info = np.iinfo(q.dtype)
            axis = 0 if np.size(scale) > 1 else None
            if q.dtype == np.int8:
                new = np.abs(w).max(axis) / 127
                codes, zero = np.clip(np.rint(w / new), -127, 127), np.zeros_like(zero)
            else:
                low, high = np.minimum(w.min(axis), 0), np.maximum(w.max(axis), 0)
                new = (high - low) / 255
                zero = np.rint(-low / new)
                codes = np.clip(np.rint(w / new) + zero, info.min, info.max)
            put(node.input[1], codes.astype(q.dtype))
            for name, value in operand_names(model, node, new, zero).items():
                old = model.array(name)
                put(name, np.asarray(value).reshape(old.shape).astype(old.dtype))
            quantized = True
    if not quantized:
        return False
    onnx.save(proto, str(path))
    return True


def operand_names(model, node, scale, zero):
    op = node.op_type
    base = node.input[1].removesuffix("_quantized")
    scale_name = {"DynamicQuantizeMatMul": 2, "MatMulIntegerToFloat": 3}.get(op)
    scale_name = node.input[scale_name] if scale_name else base + "_scale"
    zero_name = node.input[{"DynamicQuantizeMatMul": 3, "MatMulIntegerToFloat": 5, "MatMulInteger": 3}[op]]
    return {scale_name: scale, zero_name: zero}


def blocked(w, block):
    n, k = w.shape
    return np.pad(w, ((0, 0), (0, -k % block))).reshape(n, -1, block)


def pack(codes, bits):
    per_byte = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
    return sum(parts[..., i] << (i * bits) for i in range(per_byte)).astype(np.uint8)


# ---- running --------------------------------------------------------------------------------------------------------


def session(path, in_float=False):
    """`in_float`: without the quantization of activations that a graph may ask for, or ONNX Runtime adds to int4 QDQ."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if in_float:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        path = without_accuracy_level(path)
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def without_accuracy_level(path):
    proto = onnx.load(str(path), load_external_data=False)
    for node in proto.graph.node:
        kept = [a for a in node.attribute if a.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    copy = Path(path).with_suffix(".float.onnx")
    copy.write_bytes(proto.SerializeToString())
    return copy


# Of all models here; the graphs of onnxruntime-genai do not tell it.
HEAD_SIZE = 16


def feeds(run, seed, tokens=24):
    """Random inputs; a cache of length 0, whose last axis is HEAD_SIZE where the graph does not tell."""
    rng = np.random.default_rng(seed)
    sizes = {x.name: [int(d) if str(d).isdigit() else None for d in x.shape] for x in run.get_inputs()}
    tokens = next((s[1] for n, s in sizes.items() if n in ("input_ids", "inputs_embeds") and s[1]), tokens)
    given = {}
    for x in run.get_inputs():
        kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
                "tensor(int32)": np.int32, "tensor(bool)": np.bool_}[x.type]  # fmt: skip
        dims = sizes[x.name]
        if "past_key_values" in x.name or x.name.startswith("past_"):
            unknown = {0: 1, 3: HEAD_SIZE}
            shape = [d if d is not None else unknown.get(i, 0) for i, d in enumerate(dims)]
            given[x.name] = np.zeros(shape, kind)
        elif x.name == "input_ids":
            given[x.name] = rng.integers(1, 90, (1, tokens)).astype(kind)
        elif x.name == "inputs_embeds":
            given[x.name] = (rng.standard_normal((1, tokens, dims[-1])) * 0.5).astype(kind)
        elif x.name == "attention_mask":
            given[x.name] = np.ones((1, tokens), kind) if len(dims) == 2 else np.zeros([d or tokens for d in dims], kind)
        elif x.name == "position_ids":
            rows = [dims[0]] if len(dims) == 3 else []
            given[x.name] = np.broadcast_to(np.arange(tokens), (*[r or 3 for r in rows], 1, tokens)).astype(kind)
        elif x.name == "use_cache_branch":
            given[x.name] = np.zeros(dims or 1, kind)
        else:
            given[x.name] = np.zeros([d or 1 for d in dims], kind)
    return given


def logits(run, given):
    names = [o.name for o in run.get_outputs()]
    name = next((n for n in names if "logits" in n), names[0])
    return run.run([name], given)[0].astype(np.float64)


def make_gates(model, kind, layers):
    rng = np.random.default_rng(7)
    gates = {}
    for layer, node in model.downs().items():
        if layer not in layers:
            continue
        d_ff = model.weight(node)[0].shape[0]
        g = np.exp(-rng.exponential(1.0, d_ff)).astype(np.float32)
        g[rng.random(d_ff) < 0.2] = 1.0
        g[::17] = 0.0
        if kind == "any":
            g = (rng.standard_normal(d_ff) * 1.5).astype(np.float32)
        gates[layer] = g
    return gates


def unchanged_outside(before, after, receipt):
    """Whether all bytes that the receipt names neither as multiplied nor as inserted are the input's."""
    for entry in sorted(p for p in after.rglob("*") if p.is_file() and p.name != "kvw.json"):
        relative = str(entry.relative_to(after))
        old, new = (before / relative).read_bytes(), bytearray(entry.read_bytes())
        files = [f for f in receipt["files"] if f["path"] == relative]
        edited = files[0] if files else {"ranges": []}
        old = bytearray(old)
        for r in edited["ranges"]:
            at = r.get("offset_before", r["offset"])
            new[r["offset"] : r["offset"] + r["len"]] = old[at : at + r["len"]]
        for r in reversed(edited.get("inserted", [])):
            at = r["offset_before"]
            new[r["offset"] : r["offset"] + r["len"]] = old[at : at + r["len_before"]]
        if bytes(old) != bytes(new):
            return False
    return True


# ---- the demo's decoder, quantized by ONNX Runtime's quantizers -----------------------------------------------------


def demo_variants(folder):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization import matmul_bnb4_quantizer, matmul_nbits_quantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    source = ROOT / "fixtures/demo/model/onnx/decoder_model_merged.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, folder / "fp32.onnx")

    def keep(name, proto):
        onnx.save(proto, str(folder / f"{name}.onnx"))

    for name, options in {
        "int4-sym": dict(is_symmetric=True), "int4-asym": dict(is_symmetric=False),
        "int4-qdq": dict(is_symmetric=True, quant_format=QuantFormat.QDQ),
        "int4-qdq-asym": dict(is_symmetric=False, quant_format=QuantFormat.QDQ),
    }.items():  # fmt: skip
        model = onnx.load(str(source))
        if "quant_format" in options:
            model = onnx.version_converter.convert_version(model, 21)
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(model, block_size=32, **options)
        quantizer.process()
        keep(name, quantizer.model.model)
    config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=8)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=config)
    quantizer.process()
    keep("int8-nbits", quantizer.model.model)
    half = convert_float_to_float16(onnx.load(str(source)), keep_io_types=False, disable_shape_infer=True)
    keep("fp16", half)
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(half, block_size=32, is_symmetric=True)
    quantizer.process()
    keep("int4-fp16", quantizer.model.model)
    for name, kind in {"bnb4-fp4": 0, "bnb4-nf4": 1}.items():
        quantizer = matmul_bnb4_quantizer.MatMulBnb4Quantizer(onnx.load(str(source)), kind, 64)
        quantizer.process()
        keep(name, quantizer.model.model)
    for name, options in {"dynamic-int8": {}, "dynamic-int8-channel": dict(per_channel=True), "dynamic-uint8": dict(weight_type=QuantType.QUInt8)}.items():
        options = {"weight_type": QuantType.QInt8} | options
        quantize_dynamic(str(source), str(folder / f"{name}.onnx"), op_types_to_quantize=["MatMul"], **options)

    class Reader(CalibrationDataReader):
        def __init__(self):
            run = session(source)
            self.rows = iter([feeds(run, seed) for seed in range(8)])

        def get_next(self):
            return next(self.rows, None)

    for name, options in {
        "static-qdq": dict(quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"]),
        "static-qdq-channel": dict(quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"], per_channel=True),
        "static-qdq-mul": dict(quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul", "Mul"]),
        "static-qoperator": dict(quant_format=QuantFormat.QOperator, op_types_to_quantize=["MatMul"]),
    }.items():  # fmt: skip
        quantize_static(str(source), str(folder / f"{name}.onnx"), Reader(), weight_type=QuantType.QInt8, **options)
    return {p.stem: p for p in sorted(folder.glob("*.onnx"))}


# ---- cases ----------------------------------------------------------------------------------------------------------


def exports(models):
    """(exporter, precision, file, file with the weights that the plan is made on)"""
    for name in ("tjs-llava", "tjs-qwen2_vl", "tjs-smolvlm"):
        base = models / name / "onnx/decoder_model_merged.onnx"
        for file in sorted((models / name / "onnx").glob("decoder_model_merged*.onnx")):
            precision = file.stem.removeprefix("decoder_model_merged").lstrip("_") or "fp32"
            yield name, precision, file, base
    base = models / "genai-qwen2-fp32/model.onnx"
    for precision in ("fp32", "fp16", "bf16", "int4", "int4-asym", "int4-qdq", "int4-fusedgateup", "int8"):
        yield "genai-qwen2", precision, models / f"genai-qwen2-{precision}/model.onnx", base
    for folder, precision in {
        "genai-qwen2w-int4-kquant_mixed": "int4/int8 mixed", "genai-phi3-int4": "int4", "genai-llama-fp32": "fp32",
        "genai-phi2-fp32": "fp32, plain MLP", "genai011-gemma3-fp32": "fp32", "genai-layout-qwen2_5_vl": "int4",
        "dynamo-gpt2": "fp32, plain MLP", "dynamo-llama_bias": "fp32, biases", "dynamo-qwen2": "fp32", "optimumonnx-qwen2": "fp32",
        "ortopt-gpt2-ext": "fp32, plain MLP", "ortopt-opt-ext": "fp32, plain MLP", "ortopt-tjs-llava-dec-int8-ext": "int8",
    }.items():  # fmt: skip
        file = models / folder / "model.onnx"
        yield folder.replace("-" + precision, ""), precision, file, file
    for name in ("llama", "opt"):
        for part in ("decoder_model", "decoder_with_past_model", "decoder_model_merged"):
            file = models / f"optimum124-{name}-legacy/{part}.onnx"
            yield f"optimum124-{name}-legacy {part}", "fp32", file, file
    for part in ("language_model", "decode"):
        file = models / f"hfexp-qwen2_vl-gen/{part}.onnx"
        yield f"hfexp-qwen2_vl {part}", "fp32", file, file
    yield "mobius-qwen2_5_vl", "fp32", models / "mobius-qwen2_5_vl/decoder/model.onnx", models / "mobius-qwen2_5_vl/decoder/model.onnx"


def cases(models, work):
    """Those of `models`, where they are given, then the demo's."""
    if models:
        yield from exports(models)
    demo = demo_variants(work / "demo")
    for precision, file in demo.items():
        yield "demo, ONNX Runtime's quantizers", precision, file, demo["fp32"]


def isolate(file, folder):
    """The model alone in a folder, with its external data."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    proto = onnx.load(str(file), load_external_data=False)
    names = {file.name}
    for tensor in proto.graph.initializer:
        names |= {e.value for e in tensor.external_data if e.key == "location"}
    for name in names:
        shutil.copy(file.parent / name, folder / name)
        os.chmod(folder / name, 0o644)
    return folder / file.name


def loads(python, paths):
    """Which of these models an older ONNX Runtime loads."""
    code = (
        "import sys, onnxruntime as o\no.set_default_logger_severity(4)\n"
        "for p in sys.argv[1:]:\n"
        "    try:\n        o.InferenceSession(p, providers=['CPUExecutionProvider']); print(1)\n"
        "    except Exception as e:\n        print(0)\n"
    )
    out = subprocess.run([python, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True).stdout
    return [line == "1" for line in out.split()]


def correlations(source, model):
    """The least correlation of the sketches of two files' layers; with the plan's neurons in another order; of other layers."""
    ours = [sketch(source.weight(node)[0]) for node in source.downs().values()]
    theirs = [sketch(model.weight(node)[0]) for node in model.downs().values()]
    corr = lambda a, b: float(np.corrcoef(a, b)[0, 1])  # noqa: E731
    same = min(corr(a, b) for a, b in zip(ours, theirs))
    rng = np.random.default_rng(3)
    shuffled = max(abs(corr(a, rng.permutation(b))) for a, b in zip(ours, theirs))
    others = [abs(corr(a, b)) for i, a in enumerate(ours) for j, b in enumerate(theirs) if i != j]
    return same, shuffled, max(others, default=0.0)


def evaluate(args, exporter, precision, file, base, work):
    case = work / "case"
    original = isolate(file, case / "original")
    model, source = Model(original), Model(base)
    layers = list(model.downs())
    if not layers:
        print(f"{exporter} {precision}: no down projection found by name", file=sys.stderr)
        return
    named = layers[:-1] if len(layers) > 1 else layers
    sketches = correlations(source, model)
    inputs = None
    for kind in args.gates:
        gates = make_gates(source, kind, named)
        write_plan(case / "plan", gates, source)
        runs, effect, size, bound = True, None, None, None
        try:
            run = session(original)
            inputs = [feeds(run, seed) for seed in (1, 2)]
            plain = [logits(run, x) for x in inputs]
        except Exception as error:  # bfloat16 has no kernels on the CPU
            runs = str(error).splitlines()[0][:80]
        if runs is True:
            gated(model, gates, case / "gated.onnx")
            reference_run = session(case / "gated.onnx")
            reference = [logits(reference_run, x) for x in inputs]
            size = max(np.abs(r).max() for r in reference)
            effect = max(np.abs(r - p).max() for r, p in zip(reference, plain)) / size
            # What the last bit of a gate does: where the runtime quantizes activations, it may flip a rounding.
            noise = 0.0
            for seed in range(4):
                rng = np.random.default_rng(seed)
                up = {layer: np.where(rng.random(g.size) < 0.5, 2, -2).astype(np.float32) for layer, g in gates.items()}
                near = {layer: np.where(g == 0, g, np.nextafter(g, up[layer])) for layer, g in gates.items()}
                gated(model, near, case / "near.onnx")
                near_run = session(case / "near.onnx")
                moved = max(np.abs(logits(near_run, x) - r).max() for x, r in zip(inputs, reference)) / size
                noise = max(noise, moved)
            float_run = session(case / "gated.onnx", in_float=True)
            float_reference = [logits(float_run, x) for x in inputs]
            try:
                naive = requantized(model, gates, case / "naive.onnx")
                naive = naive and session(case / "naive.onnx")
                naive = naive and max(np.abs(logits(naive, x) - r).max() for x, r in zip(inputs, reference)) / size
            except Exception as error:
                naive = f"failed: {error}"
        for form in args.forms:
            out = case / "edited"
            shutil.rmtree(out, ignore_errors=True)
            command = [args.kvw, "apply", str(original), "--plan", str(case / "plan"), "-o", str(out), "--edit", form]
            done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True)
            row = dict(exporter=exporter, precision=precision, gates=kind, asked=form, sketches=sketches)
            if done.returncode != 0:
                row["refused"] = done.stderr.strip().splitlines()[0]
                yield row
                continue
            applied = json.loads(done.stdout)
            receipt = json.loads((out / "kvw.json").read_text())
            row["forms"] = sorted({m["form"] + (", graph" if m["graph"] else "") for m in applied["mlps"]})
            row["cost"] = sorted({m["cost"] for m in applied["mlps"]})
            before = sum(f.stat().st_size for f in (case / "original").iterdir())
            row["growth"] = sum(f.stat().st_size for f in out.iterdir() if f.name != "kvw.json") - before
            row["outside"] = unchanged_outside(case / "original", out, receipt)
            edited = out / original.name
            row["checker"] = checked(edited, original)
            if args.old_python:
                old = loads(args.old_python, [original, edited])
                row["old"] = "–" if not old[0] else ("yes" if old[1] else "NO")
            if runs is True:
                run = session(edited)
                found = [logits(run, x) for x in inputs]
                row["error"] = max(np.abs(f - r).max() for f, r in zip(found, reference)) / size
                float_run = session(edited, in_float=True)
                found = [logits(float_run, x) for x in inputs]
                row["float"] = max(np.abs(f - r).max() for f, r in zip(found, float_reference)) / size
                row["effect"], row["naive"], row["noise"] = effect, naive, noise
            else:
                row["runs"] = runs
            yield row


def checked(edited, original):
    """onnx.checker, full check where the original passes it."""
    def passes(path, **options):
        try:
            onnx.checker.check_model(str(path), **options)
            return True
        except Exception:
            return False

    for options in (dict(full_check=True), dict()):
        if passes(original, **options):
            return ("full" if options else "yes") if passes(edited, **options) else "NO"
    return "–"


def text(value):
    if value is None or value is False:
        return "–"
    return value if isinstance(value, str) else f"{value:.1e}"


def table(rows):
    lines = ["| exporter | precision | form | effect | error | in float | last bit | requantized | bytes more | onnx.checker | loads in 1.19.2 |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    seen = set()
    for row in rows:
        if "refused" in row:
            continue
        key = (row["exporter"], row["precision"], *row["forms"])
        if key in seen:
            continue
        seen.add(key)
        form = "; ".join(row["forms"]) + (" (auto)" if row["asked"] == "auto" else "")
        cells = [row["exporter"], row["precision"], form, text(row.get("effect")), text(row.get("error")), text(row.get("float")),
                 text(row.get("noise")), text(row.get("naive")), str(row["growth"]), row["checker"], row.get("old", "–")]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def sketch_table(rows):
    lines = ["| exporter | precision | same weights | neurons in another order | other layers |", "|---|---|---|---|---|"]
    seen = {(row["exporter"], row["precision"]): row["sketches"] for row in rows}
    for (exporter, precision), (same, shuffled, others) in seen.items():
        lines.append(f"| {exporter} | {precision} | {same:.4f} | {shuffled:.2f} | {others:.2f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvw", required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--old-python")
    parser.add_argument("--only", default="")
    parser.add_argument("--forms", nargs="+", default=["auto", "scales", "mul"])
    parser.add_argument("--gates", nargs="+", default=["weaken"], choices=["weaken", "any"])
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    for exporter, precision, file, base in cases(args.models, args.work):
        if args.only not in f"{exporter} {precision}":
            continue
        for row in evaluate(args, exporter, precision, file, base, args.work):
            rows.append(row)
            print({k: (float(f"{v:.3g}") if isinstance(v, float) else v) for k, v in row.items()}, flush=True)
            bound = 2e-3 if "16" in precision else 1e-5
            failed += row.get("float", 0) > bound or row.get("error", 0) > max(bound, 3 * row.get("noise", 0))
            failed += row.get("outside") is False or row.get("checker") == "NO" or row.get("old") == "NO"
    versions = f"onnx {onnx.__version__}, onnxruntime {ort.__version__}, Python {platform.python_version()}"
    print(f"{len(rows)} rows, {failed} outside the bounds ({versions})")
    if args.markdown:
        args.markdown.write_text(table(rows) + "\n" + sketch_table(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

"""Makes small models for what none of the copied exports holds: other quantizers, fused operators, functions, hostile shapes.

    python tools/exports/made.py fixtures/exports/made     # onnx 1.23.2, onnx-ir 1.1.0, onnxruntime 1.32.0, numpy

Each is a decoder of two layers, x + down(act(gate(x)) * up(x)), hidden size 16, d_ff 32, with random weights of a fixed seed; a few
kilobytes. Quantized and fused ones come out of onnxruntime's own quantizers and its optimizer.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

HIDDEN, WIDTH, LAYERS = 16, 32, 2


class Decoder:
    """Collects nodes and weights."""

    def __init__(self, opset=17, ir=9):
        self.generator = np.random.default_rng(11)
        self.nodes, self.initializers, self.functions = [], [], []
        self.opset, self.ir, self.domains = opset, ir, set()

    def weight(self, name, shape, dtype=np.float32, scale=0.3):
        value = (self.generator.standard_normal(shape) * scale).astype(dtype)
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def constant(self, name, value):
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op, inputs, name, outputs=None, domain="", **attributes):
        outputs = outputs or [f"{name}_output_0"]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        if domain:
            self.domains.add(domain)
        return outputs[0]

    def silu(self, x, name):
        return self.node("Mul", [x, self.node("Sigmoid", [x], f"{name}/Sigmoid")], f"{name}/Mul")

    def model(self, mlp, outputs=None):
        """`mlp(decoder, x, path)` gives the down projection's output."""
        x = "inputs_embeds"
        for layer in range(LAYERS):
            path = f"/model/layers.{layer}"
            y = mlp(self, x, f"{path}/mlp")
            x = self.node("Add", [x, y], f"{path}/Add_1", ["logits"] if layer == LAYERS - 1 else None)
        graph = helper.make_graph(
            self.nodes,
            "main",
            [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["B", "T", HIDDEN])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", "T", HIDDEN])],
            self.initializers,
        )
        versions = {"": self.opset, "com.microsoft": 1}
        imports = [helper.make_opsetid(domain, versions.get(domain, 1)) for domain in ["", *sorted(self.domains)]]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.ir, functions=self.functions)
        model.producer_name = "kvw tools/exports/made.py"
        return model


def gated(d, x, path, name=lambda part: part, op="MatMul"):
    """The common form; `name` may give the weights other names."""
    gate = d.node(op, [x, d.weight(f"{path}.gate", [HIDDEN, WIDTH])], f"{path}/gate_proj/MatMul")
    up = d.node(op, [x, d.weight(f"{path}.up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node(op, [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def up_first(d, x, path):
    """Operands the other way round, a bias on either branch and on the result, and a constant factor."""
    up = d.node("MatMul", [x, d.weight(f"{path}.up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    up = d.node("Add", [d.weight(f"{path}.up.bias", [WIDTH]), up], f"{path}/up_proj/Add")
    up = d.node("Mul", [up, d.constant(f"{path}.factor", np.float32(0.5))], f"{path}/up_proj/Mul")
    gate = d.node("MatMul", [x, d.weight(f"{path}.gate", [HIDDEN, WIDTH])], f"{path}/gate_proj/MatMul")
    gate = d.node("Add", [gate, f"{path}.up.bias"], f"{path}/gate_proj/Add")
    h = d.node("Mul", [up, d.silu(gate, f"{path}/act_fn")], f"{path}/Mul")
    y = d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")
    return d.node("Add", [y, d.weight(f"{path}.down.bias", [HIDDEN])], f"{path}/down_proj/Add")


def grouped_product(d, x, path):
    """gate · (sigmoid(gate) · up): the branch without an activation is not an operand of the last Mul."""
    gate = d.node("MatMul", [x, d.weight(f"{path}.gate", [HIDDEN, WIDTH])], f"{path}/gate_proj/MatMul")
    up = d.node("MatMul", [x, d.weight(f"{path}.up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    inner = d.node("Mul", [d.node("Sigmoid", [gate], f"{path}/act_fn/Sigmoid"), up], f"{path}/Mul")
    h = d.node("Mul", [gate, inner], f"{path}/Mul_1")
    return d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def fused_slices(d, x, path):
    """One projection, its halves taken by Slice: up first here, and the second end beyond the axis."""
    both = d.node("MatMul", [x, d.weight(f"{path}.up_gate", [HIDDEN, 2 * WIDTH])], f"{path}/up_gate_proj/MatMul")
    both = d.node("Add", [both, d.weight(f"{path}.up_gate.bias", [2 * WIDTH])], f"{path}/up_gate_proj/Add")
    ints = lambda name, value: d.constant(f"{path}.{name}", np.array([value], np.int64))
    axis, zero, half, end = ints("axis", -1), ints("zero", 0), ints("half", WIDTH), ints("end", 2**63 - 1)
    up = d.node("Slice", [both, zero, half, axis], f"{path}/Slice")
    gate = d.node("Slice", [both, half, end, axis], f"{path}/Slice_1")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def fused_split(d, x, path):
    """One projection on [B * T, C], reshaped back, its halves by a Split with sizes; up is the second output here."""
    rows = d.constant(f"{path}.rows", np.array([-1, HIDDEN], np.int64))
    sizes = d.constant(f"{path}.sizes", np.array([WIDTH, WIDTH], np.int64))
    flat = d.node("Reshape", [x, rows], f"{path}/Reshape")
    both = d.node("MatMul", [flat, d.weight(f"{path}.gate_up", [HIDDEN, 2 * WIDTH])], f"{path}/gate_up_proj/MatMul")
    bounds = [d.constant(f"{path}.{name}", np.array([value], np.int64)) for name, value in (("start", 0), ("end", 2))]
    leading = d.node("Slice", [d.node("Shape", [x], f"{path}/Shape"), *bounds], f"{path}/Slice")
    last = d.constant(f"{path}.last", np.array([2 * WIDTH], np.int64))
    both = d.node("Reshape", [both, d.node("Concat", [leading, last], f"{path}/Concat", axis=0)], f"{path}/Reshape_1")
    d.node("Split", [both, sizes], f"{path}/Split", [f"{path}.halves.0", f"{path}.halves.1"], axis=2)
    up = d.node("Add", [f"{path}.halves.1", d.weight(f"{path}.up.bias", [WIDTH])], f"{path}/up_proj/Add")
    h = d.node("Mul", [d.silu(f"{path}.halves.0", f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def interleaved(d, x, path):
    """Channels of gate and up take turns: neither is a half of the projection."""
    shape = d.constant(f"{path}.shape", np.array([0, 0, WIDTH, 2], np.int64))
    axes = d.constant(f"{path}.axes", np.array([3], np.int64))
    both = d.node("MatMul", [x, d.weight(f"{path}.gate_up", [HIDDEN, 2 * WIDTH])], f"{path}/gate_up_proj/MatMul")
    pairs = d.node("Reshape", [both, shape], f"{path}/Reshape")
    d.node("Split", [pairs], f"{path}/Split", [f"{path}.pairs.0", f"{path}.pairs.1"], axis=-1)
    gate, up = (d.node("Squeeze", [f"{path}.pairs.{i}", axes], f"{path}/Squeeze_{i}") for i in range(2))
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def behind(d, x, path):
    """Weights behind Transpose, Cast, Identity and Constant; two layers share the down projection's initializer."""
    gate = d.weight(f"{path}.gate", [WIDTH, HIDDEN])
    gate = d.node("MatMul", [x, d.node("Transpose", [gate], f"{path}/gate_proj/Transpose")], f"{path}/gate_proj/MatMul")
    up = d.node("Identity", [d.weight(f"{path}.up", [HIDDEN, WIDTH], np.float16)], f"{path}/up_proj/Identity")
    up = d.node("Cast", [up], f"{path}/up_proj/Cast", to=TensorProto.FLOAT)
    up = d.node("MatMul", [x, up], f"{path}/up_proj/MatMul")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    value = (d.generator.standard_normal([HIDDEN, WIDTH]) * 0.3).astype(np.float32)
    down = d.node("Constant", [], f"{path}/down_proj/Constant", value=numpy_helper.from_array(value))
    down = d.node("Transpose", [down], f"{path}/down_proj/Transpose", perm=[1, 0])
    return d.node("MatMul", [h, down], f"{path}/down_proj/MatMul")


def shared_weight(d, x, path):
    """Both layers use one set of weights, as a model with tied layers has it."""
    if not d.initializers:
        for name, shape in (("gate", [HIDDEN, WIDTH]), ("up", [HIDDEN, WIDTH]), ("down", [WIDTH, HIDDEN])):
            d.weight(name, shape)
    gate = d.node("MatMul", [x, "gate"], f"{path}/gate_proj/MatMul")
    up = d.node("MatMul", [x, "up"], f"{path}/up_proj/MatMul")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, "down"], f"{path}/down_proj/MatMul")


def dequantized_transposed(d, x, path):
    """int8 [N, K] with one scale per output channel, dequantized and transposed; up with blocks of uint4 along K."""

    def per_channel(name, n, k):
        value = d.generator.integers(-127, 127, [n, k]).astype(np.int8)
        scale = (d.generator.random(n) * 0.004 + 0.001).astype(np.float32)
        inputs = [d.constant(f"{path}.{name}", value), d.constant(f"{path}.{name}.scale", scale)]
        dequantized = d.node("DequantizeLinear", inputs, f"{path}/{name}_proj/DequantizeLinear", axis=-2)
        return d.node("Transpose", [dequantized], f"{path}/{name}_proj/Transpose")

    def blocks(name, k, n):
        codes = d.generator.integers(0, 16, k * n)
        packed = (codes[::2] | codes[1::2] << 4).astype(np.uint8)
        tensor = helper.make_tensor(f"{path}.{name}", TensorProto.UINT4, [k, n], packed.tobytes(), raw=True)
        zeros = d.generator.integers(0, 16, k // 16 * n)
        packed = (zeros[::2] | zeros[1::2] << 4).astype(np.uint8)
        zero_point = helper.make_tensor(f"{path}.{name}.zero", TensorProto.UINT4, [k // 16, n], packed.tobytes(), raw=True)
        d.initializers.extend([tensor, zero_point])
        scale = d.constant(f"{path}.{name}.scale", (d.generator.random([k // 16, n]) * 0.05 + 0.01).astype(np.float32))
        inputs = [tensor.name, scale, zero_point.name]
        return d.node("DequantizeLinear", inputs, f"{path}/{name}_proj/DequantizeLinear", axis=0, block_size=16)

    gate = d.node("MatMul", [x, per_channel("gate", WIDTH, HIDDEN)], f"{path}/gate_proj/MatMul")
    up = d.node("MatMul", [x, blocks("up", HIDDEN, WIDTH)], f"{path}/up_proj/MatMul")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, per_channel("down", HIDDEN, WIDTH)], f"{path}/down_proj/MatMul")


def pointwise(d, x, path):
    """1x1 convolutions over [B, C, T, 1]."""
    axes = d.constant(f"{path}.axes", np.array([3], np.int64))
    x = d.node("Unsqueeze", [d.node("Transpose", [x], f"{path}/Transpose", perm=[0, 2, 1]), axes], f"{path}/Unsqueeze")
    gate = d.node("Conv", [x, d.weight(f"{path}.gate", [WIDTH, HIDDEN, 1, 1]), d.weight(f"{path}.gate.bias", [WIDTH])],
                  f"{path}/gate_proj/Conv")
    up = d.node("Conv", [x, d.weight(f"{path}.up", [WIDTH, HIDDEN, 1, 1]), d.weight(f"{path}.up.bias", [WIDTH])],
                f"{path}/up_proj/Conv", kernel_shape=[1, 1])
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    y = d.node("Conv", [h, d.weight(f"{path}.down", [HIDDEN, WIDTH, 1, 1])], f"{path}/down_proj/Conv")
    return d.node("Transpose", [d.node("Squeeze", [y, axes], f"{path}/Squeeze")], f"{path}/Transpose_1", perm=[0, 2, 1])


def plain_2d(d, x, path):
    """Gemm and Relu on [B * T, C], which onnxruntime fuses to FusedGemm."""
    flat, back = (d.constant(f"{path}.{name}", np.array(shape, np.int64)) for name, shape in (("flat", [-1, HIDDEN]), ("back", [0, 0, 0])))
    rows = d.node("Reshape", [x, flat], f"{path}/Reshape")
    up = d.node("Gemm", [rows, d.weight(f"{path}.fc1", [WIDTH, HIDDEN]), d.weight(f"{path}.fc1.bias", [WIDTH])], f"{path}/fc1/Gemm", transB=1)
    h = d.node("Relu", [up], f"{path}/act/Relu")
    y = d.node("Gemm", [h, d.weight(f"{path}.fc2", [HIDDEN, WIDTH]), d.weight(f"{path}.fc2.bias", [HIDDEN])], f"{path}/fc2/Gemm", transB=1)
    shape = d.node("Shape", [x], f"{path}/Shape")
    return d.node("Reshape", [y, shape], f"{path}/Reshape_1")


def function_layer(d, x, path):
    """A function of the model's own for the MLP, and one inside it for the activation."""
    domain = "made.local"
    if not d.functions:
        imports = [helper.make_opsetid("", d.opset), helper.make_opsetid(domain, 1)]
        silu = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
        scaled = helper.make_node("Constant", [], ["alpha"])
        alpha = onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="alpha")
        scaled.attribute.append(alpha)
        body = [
            helper.make_node("MatMul", ["x", "gate"], ["g"], name="gate_proj/MatMul"),
            helper.make_node("Silu", ["g"], ["a"], domain=domain),
            helper.make_node("MatMul", ["x", "up"], ["u"], name="up_proj/MatMul"),
            helper.make_node("Mul", ["a", "u"], ["h"]),
            helper.make_node("MatMul", ["h", "down"], ["d"], name="down_proj/MatMul"),
            scaled,
            helper.make_node("Mul", ["d", "alpha"], ["y"]),
        ]
        d.functions = [
            helper.make_function(domain, "Silu", ["x"], ["y"], silu, imports[:1]),
            helper.make_function(domain, "Mlp", ["x", "gate", "up", "down"], ["y"], body, imports, attributes=["alpha"]),
        ]
    shapes = {"gate": [HIDDEN, WIDTH], "up": [HIDDEN, WIDTH], "down": [WIDTH, HIDDEN]}
    weights = [d.weight(f"{path}.{name}_proj.weight", shape) for name, shape in shapes.items()]
    return d.node("Mlp", [x, *weights], path, domain=domain, alpha=0.75)


def lora(d, x, path):
    """A low-rank adapter beside up_proj."""
    gate = d.node("MatMul", [x, d.weight(f"{path}.gate", [HIDDEN, WIDTH])], f"{path}/gate_proj/MatMul")
    up = d.node("MatMul", [x, d.weight(f"{path}.up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    a = d.node("MatMul", [x, d.weight(f"{path}.lora_A", [HIDDEN, 4])], f"{path}/up_proj/lora_A/MatMul")
    b = d.node("MatMul", [a, d.weight(f"{path}.lora_B", [4, WIDTH])], f"{path}/up_proj/lora_B/MatMul")
    up = d.node("Add", [up, b], f"{path}/up_proj/Add")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def experts(d, x, path):
    """onnxruntime's MoE: everything in one node."""
    flat = d.node("Reshape", [x, d.constant(f"{path}.flat", np.array([-1, HIDDEN], np.int64))], f"{path}/Reshape")
    router = d.node("MatMul", [flat, d.weight(f"{path}.router", [HIDDEN, 4])], f"{path}/router/MatMul")
    inputs = [x, router, d.weight(f"{path}.fc1", [4, WIDTH, HIDDEN]), "", d.weight(f"{path}.fc2", [4, HIDDEN, WIDTH])]
    return d.node("MoE", inputs, f"{path}/moe/MoE", domain="com.microsoft", k=2, activation_type="silu")


def selected(d, x, path):
    """An expert chosen at run time: the weights are gathered."""
    expert = d.node("ReduceMax", [d.node("Shape", [x], f"{path}/Shape")], f"{path}/ReduceMax", keepdims=0)
    expert = d.node("Mod", [expert, d.constant(f"{path}.experts", np.int64(2))], f"{path}/Mod")
    pick = lambda name, shape: d.node("Gather", [d.weight(f"{path}.{name}", [2, *shape]), expert], f"{path}/{name}_proj/Gather")
    up = d.node("MatMul", [x, pick("up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    h = d.silu(up, f"{path}/act_fn")
    return d.node("MatMul", [h, pick("down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def custom(d, x, path):
    """An operator that nobody knows, with the matrices of an MLP."""
    weights = [d.weight(f"{path}.{name}", shape) for name, shape in (("gate", [HIDDEN, WIDTH]), ("up", [HIDDEN, WIDTH]), ("down", [WIDTH, HIDDEN]))]
    return d.node("FusedMlp", [x, *weights], f"{path}/FusedMlp", domain="vendor.ops")


def clipped(d, x, path):
    """Both branches pass something that is not linear: no exact form but a Mul."""
    gate = d.node("MatMul", [x, d.weight(f"{path}.gate", [HIDDEN, WIDTH])], f"{path}/gate_proj/MatMul")
    up = d.node("MatMul", [x, d.weight(f"{path}.up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    limits = [d.constant(f"{path}.{name}", np.float32(value)) for name, value in (("least", -7), ("most", 7))]
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), d.node("Clip", [up, *limits], f"{path}/Clip")], f"{path}/Mul")
    return d.node("MatMul", [h, d.weight(f"{path}.down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


def float8(d, x, path):
    """FP8 weights behind DequantizeLinear."""
    scale = d.constant(f"{path}.scale", np.float32(0.01))

    def weight(name, shape):
        value = d.generator.integers(0, 120, shape).astype(np.uint8)
        tensor = helper.make_tensor(f"{path}.{name}", TensorProto.FLOAT8E4M3FN, shape, value.tobytes(), raw=True)
        d.initializers.append(tensor)
        return d.node("DequantizeLinear", [tensor.name, scale], f"{path}/{name}_proj/DequantizeLinear")

    gate = d.node("MatMul", [x, weight("gate", [HIDDEN, WIDTH])], f"{path}/gate_proj/MatMul")
    up = d.node("MatMul", [x, weight("up", [HIDDEN, WIDTH])], f"{path}/up_proj/MatMul")
    h = d.node("Mul", [d.silu(gate, f"{path}/act_fn"), up], f"{path}/Mul")
    return d.node("MatMul", [h, weight("down", [WIDTH, HIDDEN])], f"{path}/down_proj/MatMul")


class Samples(CalibrationDataReader):
    def __init__(self):
        generator = np.random.default_rng(3)
        self.samples = iter([{"inputs_embeds": generator.standard_normal((2, 6, HIDDEN)).astype(np.float32)} for _ in range(8)])

    def get_next(self):
        return next(self.samples, None)


def optimized(source, target, level):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    by_hand = {
        "up_first": (up_first, {}), "grouped_product": (grouped_product, {}), "fused_slices": (fused_slices, {}),
        "fused_split": (fused_split, {}), "interleaved": (interleaved, {}),
        "behind": (behind, {}), "shared_weight": (shared_weight, {}), "opset14": (gated, {"opset": 14, "ir": 7}),
        "dequantized_transposed": (dequantized_transposed, {"opset": 21, "ir": 10}), "pointwise": (pointwise, {}),
        "function": (function_layer, {}), "lora": (lora, {}), "experts": (experts, {}), "selected": (selected, {}),
        "custom": (custom, {}), "clipped": (clipped, {}), "float8": (float8, {"opset": 21, "ir": 10}),
    }
    for name, (mlp, versions) in by_hand.items():
        model = Decoder(**versions).model(mlp)
        onnx.checker.check_model(model)
        onnx.save(model, out / f"{name}.onnx")

    with tempfile.TemporaryDirectory() as folder:
        base, plain = Path(folder) / "base.onnx", Path(folder) / "plain.onnx"
        onnx.save(Decoder().model(gated), base)
        onnx.save(Decoder().model(plain_2d), plain)
        quantize_dynamic(base, out / "dynamic_per_channel.onnx", per_channel=True, weight_type=QuantType.QInt8)
        static = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        quantize_static(base, out / "static_qdq.onnx", Samples(), quant_format=QuantFormat.QDQ, **static)
        quantize_static(base, out / "static_qoperator.onnx", Samples(), quant_format=QuantFormat.QOperator, **static)
        products = {**static, "op_types_to_quantize": ["MatMul"]}
        quantize_static(base, out / "static_qoperator_products.onnx", Samples(), quant_format=QuantFormat.QOperator, **products)
        optimized(plain, out / "fused_gemm.onnx", ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
        optimized(out / "dynamic_per_channel.onnx", out / "dynamic_per_channel_fused.onnx", ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)
        quantizer = MatMulNBitsQuantizer(onnx.load(base), bits=4, block_size=16, is_symmetric=False)
        quantizer.process()
        prepacked = quantizer.model.model
        for node in prepacked.graph.node:
            if node.op_type == "MatMulNBits":
                node.attribute.append(helper.make_attribute("weight_prepacked", 1))
        onnx.save(prepacked, out / "prepacked.onnx")

    for path in sorted(out.glob("*.onnx")):
        ops = sorted({node.op_type for node in onnx.load(path).graph.node})
        print(path.name, path.stat().st_size, " ".join(ops))


if __name__ == "__main__":
    main()

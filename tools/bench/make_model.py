"""A Qwen2-VL-shaped model with random weights, to measure with.

    pip install -r tools/bench/requirements.txt
    python tools/bench/make_model.py FOLDER [--size 7b --float16 --sparse]

writes to FOLDER, in the layout of transformers.js:
    config.json
    onnx/embed_tokens.onnx, .onnx_data            input_ids -> inputs_embeds
    onnx/decoder_model_merged.onnx, .onnx_data    inputs_embeds, attention_mask, position_ids [3, B, T],
                                                  past_key_values.* -> logits, present.*

float32, the widths of Qwen2-0.5B and its vocabulary. 18 layers: the fewest that make a decoder of 0.4 B
parameters. Operators are those of a traced export (opset 17, no fused ones). The weights are normal, scaled by
1/sqrt(fan in), so that activations stay of order 1; same seed, same bytes.

`--size 7b` has Qwen2-VL-7B's widths and 28 layers, `--float16` the type of most exports of that size, with norms in float32 as
those have them. `--sparse` leaves the weights zero and takes no room on the disk: for measuring memory.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

SEED = 20261123
SIZES = {
    "0.5b": {
        "D_MODEL": 896, "D_FF": 4864, "HEADS": 14, "KV_HEADS": 2, "HEAD": 64, "VOCABULARY": 151936, "LAYERS": 18,
        "SECTIONS": [8, 12, 12],  # mRoPE: frequencies of time, height, width
    },
    "7b": {
        "D_MODEL": 3584, "D_FF": 18944, "HEADS": 28, "KV_HEADS": 4, "HEAD": 128, "VOCABULARY": 152064, "LAYERS": 28,
        "SECTIONS": [16, 24, 24],
    },
}  # fmt: skip
globals().update(SIZES["0.5b"])
FLOAT, NUMPY_FLOAT, SPARSE = TensorProto.FLOAT, np.float32, False
THETA = 1e6
OPSET = 17


class Graph:
    """Nodes and initializers; large initializers go to one external data file."""

    def __init__(self, path):
        self.path = path
        self.data = open(f"{path}_data", "wb")
        self.nodes, self.initializers = [], []
        self.parameters = 0

    def node(self, op, inputs, name, **attributes):
        """A node with one output `{name}_output_0`."""
        output = f"{name}_output_0"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def constant(self, name, values, dtype=np.int64):
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, name, shape, scale):
        """Random weights: the bytes depend on the name and the seed, not on the order."""
        length = math.prod(shape) * np.dtype(NUMPY_FLOAT).itemsize
        self.data.write(b"\0" * (-self.data.tell() % 4096))
        tensor = TensorProto(name=name, data_type=FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in [
            ("location", Path(f"{self.path}_data").name),
            ("offset", self.data.tell()),
            ("length", length),
        ]:
            tensor.external_data.add(key=key, value=str(value))
        if SPARSE:
            self.data.truncate(self.data.seek(length, 1))
        else:
            values = np.random.default_rng([SEED, *name.encode()]).standard_normal(shape, dtype=np.float32)
            (values * np.float32(scale)).astype(NUMPY_FLOAT).tofile(self.data)
        self.initializers.append(tensor)
        self.parameters += math.prod(shape)
        return name

    def cast(self, x, name, to):
        """`x` as `to`, where that is another type than the model's."""
        return self.node("Cast", [x], name, to=to) if FLOAT != TensorProto.FLOAT else x

    def norm_weight(self, name):
        self.parameters += D_MODEL
        return self.constant(name, np.ones(D_MODEL), NUMPY_FLOAT)

    def linear(self, x, module, fan_in, fan_out, bias=False, scale=1.0):
        """`x · W`, with W `[in, out]` as traced exports store it."""
        path, name = "/" + module.replace(".", "/"), f"{module}.weight"
        y = self.node("MatMul", [x, self.weight(name, [fan_in, fan_out], scale / math.sqrt(fan_in))], f"{path}/MatMul")
        if bias:
            y = self.node("Add", [self.weight(f"{module}.bias", [fan_out], 0.02), y], f"{path}/Add")
        return y

    def rms_norm(self, x, module):
        path = "/" + module.replace(".", "/")
        x = self.cast(x, f"{path}/Cast", TensorProto.FLOAT)
        square = self.node("Pow", [x, "two"], f"{path}/Pow")
        mean = self.node("ReduceMean", [square], f"{path}/ReduceMean", axes=[-1])
        root = self.node("Sqrt", [self.node("Add", [mean, "epsilon"], f"{path}/Add")], f"{path}/Sqrt")
        normal = self.cast(self.node("Div", [x, root], f"{path}/Div"), f"{path}/Cast_1", FLOAT)
        return self.node("Mul", [self.norm_weight(f"{module}.weight"), normal], f"{path}/Mul")

    def save(self, inputs, outputs):
        self.data.close()
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        onnx.save(model, self.path)
        onnx.checker.check_model(str(self.path))


def value(name, dtype, *dims):
    return helper.make_tensor_value_info(name, dtype, list(dims))


def decoder(path, layers):
    g = Graph(path)
    g.constant("two", 2.0, np.float32)
    g.constant("epsilon", 1e-6, np.float32)
    g.constant("root_head", math.sqrt(HEAD), NUMPY_FLOAT)
    g.constant("lowest", np.finfo(NUMPY_FLOAT).min, NUMPY_FLOAT)
    g.constant("zero_float", 0.0, NUMPY_FLOAT)
    for name, number in [("zero", 0), ("one", 1), ("two_axis", 2), ("three", 3)]:
        g.constant(name, number)
        g.constant(f"{name}s", [number])
    g.constant("last_axis", [-1])
    g.constant("half", [HEAD // 2])
    g.constant("end", [np.iinfo(np.int64).max])
    g.constant("sections", SECTIONS)
    g.constant("kv_shape", [0, 0, KV_HEADS, HEAD])
    g.constant("q_shape", [0, 0, HEADS, HEAD])
    g.constant("groups", [1, 1, HEADS // KV_HEADS, 1, 1])
    g.constant("merged_heads", [0, HEADS, -1, HEAD])
    g.constant("joined", [0, 0, D_MODEL])
    g.constant("frequencies", 1.0 / THETA ** (np.arange(0, HEAD, 2) / HEAD), np.float32)

    # cos, sin [B, 1, T, head]: each section of the frequencies turns with its own row of position ids.
    ids = g.node("Cast", ["position_ids"], "/model/rotary_emb/Cast", to=TensorProto.FLOAT)
    ids = g.node("Unsqueeze", [ids, "threes"], "/model/rotary_emb/Unsqueeze")
    angles = g.node("Mul", [ids, "frequencies"], "/model/rotary_emb/Mul")
    parts = [f"/model/rotary_emb/Split_output_{i}" for i in range(3)]
    g.nodes.append(helper.make_node("Split", [angles, "sections"], parts, name="/model/rotary_emb/Split", axis=-1))
    rows = [
        g.node("Gather", [part, index], f"/model/rotary_emb/Gather_{i}", axis=0)
        for i, (part, index) in enumerate(zip(parts, ["zero", "one", "two_axis"]))
    ]
    angles = g.node("Concat", rows + rows, "/model/rotary_emb/Concat", axis=-1)
    cos, sin = (
        g.node(
            "Unsqueeze",
            [g.cast(g.node(op, [angles], f"/model/rotary_emb/{op}"), f"/model/{op}/Cast", FLOAT), "ones"],
            f"/model/{op}/Unsqueeze",
        )
        for op in ("Cos", "Sin")
    )

    # mask [B, 1, T, S]: 0 where a token may look, the lowest number elsewhere.
    present = g.node("Shape", ["attention_mask"], "/model/Shape")
    present = g.node("Gather", [present, "one"], "/model/Gather_present")
    tokens = g.node("Gather", [g.node("Shape", ["inputs_embeds"], "/model/Shape_1"), "one"], "/model/Gather_tokens")
    past = g.node("Sub", [present, tokens], "/model/Sub")
    keys = g.node("Range", ["zero", present, "one"], "/model/Range")
    queries = g.node("Unsqueeze", [g.node("Range", [past, present, "one"], "/model/Range_1"), "ones"], "/model/Unsqueeze")
    causal = g.node("LessOrEqual", [keys, queries], "/model/LessOrEqual")
    real = g.node("Cast", ["attention_mask"], "/model/Cast", to=TensorProto.BOOL)
    g.constant("middle_axes", [1, 2])
    real = g.node("Unsqueeze", [real, "middle_axes"], "/model/Unsqueeze_1")
    mask = g.node("Where", [g.node("And", [causal, real], "/model/And"), "zero_float", "lowest"], "/model/Where")

    def turned(x, path):
        first = g.node("Slice", [x, "zeros", "half", "last_axis"], f"{path}/Slice")
        second = g.node("Slice", [x, "half", "end", "last_axis"], f"{path}/Slice_1")
        half = g.node("Concat", [g.node("Neg", [second], f"{path}/Neg"), first], f"{path}/Concat", axis=-1)
        straight = g.node("Mul", [x, cos], f"{path}/Mul")
        return g.node("Add", [straight, g.node("Mul", [half, sin], f"{path}/Mul_1")], f"{path}/Add")

    def heads(x, shape, path):
        x = g.node("Reshape", [x, shape], f"{path}/Reshape")
        return g.node("Transpose", [x], f"{path}/Transpose", perm=[0, 2, 1, 3])

    def repeated(x, path):
        x = g.node("Unsqueeze", [x, "twos"], f"{path}/Unsqueeze")
        x = g.node("Tile", [x, "groups"], f"{path}/Tile")
        return g.node("Reshape", [x, "merged_heads"], f"{path}/Reshape_1")

    g.constant("twos", [2])
    x, outputs = "inputs_embeds", []
    residual = 1 / math.sqrt(2 * layers)
    for layer in range(layers):
        module = f"model.layers.{layer}"
        path = f"/model/layers.{layer}"
        attention = f"{module}.self_attn"
        normal = g.rms_norm(x, f"{module}.input_layernorm")
        q = g.linear(normal, f"{attention}.q_proj", D_MODEL, D_MODEL, bias=True)
        k = g.linear(normal, f"{attention}.k_proj", D_MODEL, KV_HEADS * HEAD, bias=True)
        v = g.linear(normal, f"{attention}.v_proj", D_MODEL, KV_HEADS * HEAD, bias=True)
        q = turned(heads(q, "q_shape", f"{path}/self_attn/q"), f"{path}/self_attn/q/rotary")
        k = turned(heads(k, "kv_shape", f"{path}/self_attn/k"), f"{path}/self_attn/k/rotary")
        v = heads(v, "kv_shape", f"{path}/self_attn/v")
        cached = []
        for kind, new in (("key", k), ("value", v)):
            name = f"present.{layer}.{kind}"
            g.nodes.append(
                helper.make_node(
                    "Concat", [f"past_key_values.{layer}.{kind}", new], [name], name=f"{path}/self_attn/{kind}/Concat", axis=2
                )
            )
            outputs.append(name)
            cached.append(repeated(name, f"{path}/self_attn/{kind}"))
        k = g.node("Transpose", [cached[0]], f"{path}/self_attn/Transpose", perm=[0, 1, 3, 2])
        scores = g.node("MatMul", [q, k], f"{path}/self_attn/MatMul")
        scores = g.node("Div", [scores, "root_head"], f"{path}/self_attn/Div")
        scores = g.node("Add", [scores, mask], f"{path}/self_attn/Add")
        weights = g.node("Softmax", [scores], f"{path}/self_attn/Softmax", axis=-1)
        mixed = g.node("MatMul", [weights, cached[1]], f"{path}/self_attn/MatMul_1")
        mixed = g.node("Transpose", [mixed], f"{path}/self_attn/Transpose_1", perm=[0, 2, 1, 3])
        mixed = g.node("Reshape", [mixed, "joined"], f"{path}/self_attn/Reshape")
        mixed = g.linear(mixed, f"{attention}.o_proj", D_MODEL, D_MODEL, scale=residual)
        x = g.node("Add", [x, mixed], f"{path}/Add")
        normal = g.rms_norm(x, f"{module}.post_attention_layernorm")
        gate = g.linear(normal, f"{module}.mlp.gate_proj", D_MODEL, D_FF)
        up = g.linear(normal, f"{module}.mlp.up_proj", D_MODEL, D_FF)
        sigmoid = g.node("Sigmoid", [gate], f"{path}/mlp/act_fn/Sigmoid")
        hidden = g.node("Mul", [gate, sigmoid], f"{path}/mlp/act_fn/Mul")
        hidden = g.node("Mul", [hidden, up], f"{path}/mlp/Mul")
        down = g.linear(hidden, f"{module}.mlp.down_proj", D_FF, D_MODEL, scale=residual)
        x = g.node("Add", [x, down], f"{path}/Add_1")
    logits = g.linear(g.rms_norm(x, "model.norm"), "lm_head", D_MODEL, VOCABULARY)
    g.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="/lm_head/Identity"))

    batch, sequence, total = "batch_size", "sequence_length", "past_sequence_length + sequence_length"
    cache = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    g.save(
        [
            value("inputs_embeds", FLOAT, batch, sequence, D_MODEL),
            value("attention_mask", TensorProto.INT64, batch, total),
            value("position_ids", TensorProto.INT64, 3, batch, sequence),
        ]
        + [value(f"past_key_values.{c}", FLOAT, batch, KV_HEADS, "past_sequence_length", HEAD) for c in cache],
        [value("logits", FLOAT, batch, sequence, VOCABULARY)]
        + [value(f"present.{c}", FLOAT, batch, KV_HEADS, total, HEAD) for c in cache],
    )
    return g.parameters


def embed_tokens(path):
    g = Graph(path)
    weight = g.weight("model.embed_tokens.weight", [VOCABULARY, D_MODEL], 1.0)
    g.nodes.append(helper.make_node("Gather", [weight, "input_ids"], ["inputs_embeds"], name="/embed_tokens/Gather"))
    g.save(
        [value("input_ids", TensorProto.INT64, "batch_size", "sequence_length")],
        [value("inputs_embeds", FLOAT, "batch_size", "sequence_length", D_MODEL)],
    )
    return g.parameters


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--float16", action="store_true")
    parser.add_argument("--sparse", action="store_true")
    arguments = parser.parse_args()
    globals().update(SIZES[arguments.size], SPARSE=arguments.sparse)
    if arguments.float16:
        globals().update(FLOAT=TensorProto.FLOAT16, NUMPY_FLOAT=np.float16)
    folder, layers = arguments.folder, arguments.layers or LAYERS
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    parameters = {
        "decoder": decoder(folder / "onnx" / "decoder_model_merged.onnx", layers),
        "embed_tokens": embed_tokens(folder / "onnx" / "embed_tokens.onnx"),
    }
    config = {
        "model_type": "qwen2_vl",
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "image_token_id": 151655,
        "eos_token_id": 151645,
    }
    # Last, so that a folder with it is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for name, count in parameters.items():
        print(f"{name}: {count / 1e9:.3f} B parameters")
    print(f"{folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""Writes what the down projections of an export read, computed by onnxruntime on a graph that onnx.helper tapped.

    python tools/exports/hidden.py EXPORTS OUT [FILE ...]     # onnx 1.23, onnxruntime 1.32, safetensors, numpy

EXPORTS holds the folders of fixtures/exports or more of the kind; without FILEs every decoder is taken. Made once for the
fixtures: `python tools/exports/hidden.py fixtures/exports fixtures/exports/hidden`, and read by tests/instrument.rs, which
compares kvw's instrumented graph with it. For FILE a safetensors file FILE.safetensors is written under OUT:

    input.NAME              the model's inputs, of random numbers, a batch of 2 where its size is free
    answer_mask             float32 [B, T], zeros and ones
    layers.L.hidden         float32 [B * T, d_ff], the raw activation; not where several layers share a weight
    layers.L.sum            float32 [d_ff], the masked sum of its absolute values, summed in float64, over all uses
    layers.L.gate           float32 [d_ff], random gates in (0, 1]
    output.NAME             float32 [B * T, 32], the first columns of the model's first output, without gates
    gated.NAME              the same with the gates multiplied in before every down projection

Down projections are found by their names (node names, or the module scopes that torch writes), not by topology: so this does not
share kvw's way of finding them. For a decoder that merges two in one `If` the numbers are those of a model made of the main graph's
inputs and weights and the nodes of the branch for `use_cache_branch = false`.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from onnx import TensorProto
from safetensors.numpy import save_file

DOWN = re.compile(r"(?:layers|h)[./](\d+)[./](?:mlp[./])?(?:down_proj|fc2|c_proj)(?=$|[./_'])")
NOT_LANGUAGE = re.compile(r"vision|visual|attn|blocks")
QUANTIZERS = {"DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"}
PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits", "MatMulBnb4", "MatMulInteger", "DynamicQuantizeMatMul",
            "MatMulIntegerToFloat", "QLinearMatMul", "Conv"}
# Made models that are there to be refused.
REFUSED = {"lora", "selected", "static_qoperator"}
BATCH, TOKENS, HEAD_SIZE, COLUMNS = 2, 6, 16, 32


def module_path(node):
    """Where torch says that a node comes from: the innermost scope."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            return ".".join(json.loads(entry.value.replace("'", '"'))[-2:])
    return node.name


def down_projections(graph):
    """Layer -> the node. A weight that several layers use counts for the first of them."""
    found, weights = {}, {}
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        match = DOWN.search(module_path(node)) or DOWN.search(node.input[1])
        if match and not NOT_LANGUAGE.search(module_path(node)):
            layer = weights.setdefault(node.input[1], int(match[1]))
            found.setdefault(layer, []).append(node)
    return found


def hidden_name(graph, node):
    """The floating point value that a down projection, or the quantizer before it, reads."""
    producers = {output: node for node in graph.node for output in node.output}
    name = node.input[0]
    while name in producers and producers[name].op_type in QUANTIZERS:
        name = producers[name].input[0]
    return name


def shape_of(value):
    """Sizes as numbers where they are known; torch writes some of them as names."""
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]
    return [HEAD_SIZE if dim == "kv_cache_dim" else int(dim) if str(dim).isdigit() else dim for dim in dims]


def feeds(graph, generator):
    initializers = {tensor.name for tensor in graph.initializer}
    result = {}
    tokens = next(shape_of(value) for value in graph.input if value.name in ("input_ids", "inputs_embeds"))
    batch, length = (fixed if isinstance(fixed, int) else free for fixed, free in zip(tokens, (BATCH, TOKENS)))
    for value in graph.input:
        name = value.name
        if name in initializers:
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        shape = shape_of(value)
        if name == "input_ids":
            array = generator.integers(3, 90, (batch, length))
        elif name == "inputs_embeds":
            array = generator.standard_normal((batch, length, shape[2]))
        elif name == "attention_mask":
            array = np.ones((batch, length))
        elif name == "position_ids":
            array = np.broadcast_to(np.arange(length), [*shape[:-2], batch, length])
        elif "past_key_values" in name:
            array = np.zeros([batch, shape[1], 0, shape[3]])
        elif name == "num_logits_to_keep":
            array = np.zeros(())
        elif name == "use_cache_branch":
            array = np.zeros((1,))
        elif all(isinstance(dim, int) for dim in shape):
            array = generator.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)
        else:
            raise NotImplementedError(f"input {name} {shape}")
        result[name] = np.ascontiguousarray(array.astype(dtype))
    return result


def session(model, path, inputs, outputs):
    """Runs the model from a file beside its external data."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    running = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {port.name for port in running.get_inputs()}
    return running.run(outputs, {key: value for key, value in inputs.items() if key in wanted})


def load(path):
    model = onnx.load(path, load_external_data=False)
    model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    owner = next((node for node in graph.node if node.op_type == "If" and len(graph.node) < 4), None)
    if owner is not None:
        branch = onnx.helper.get_node_attr_value(owner, "else_branch")
        branch.input.extend(graph.input)
        branch.initializer.extend(graph.initializer)
        graph.CopyFrom(branch)
    return model


def gated(model, places, gates):
    """`Mul` by an initializer, in float32, before every node that reads a hidden activation on the way down."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    for layer, down, hidden in places:
        reader = next(node for node in graph.node if node.name == down.name and node.output == down.output)
        while reader.input[0] != hidden:
            reader = producers[reader.input[0]]
        name = f"test.{down.name}"
        gate = gates[layer].reshape(-1, 1, 1) if down.op_type == "Conv" else gates[layer]
        graph.initializer.append(onnx.numpy_helper.from_array(gate, f"{name}.gate"))
        added = [
            onnx.helper.make_node("Cast", [hidden], [f"{name}.float"], to=TensorProto.FLOAT),
            onnx.helper.make_node("Mul", [f"{name}.float", f"{name}.gate"], [f"{name}.product"]),
        ]
        if next(entry.version for entry in model.opset_import if entry.domain == "") >= 15:
            added.append(onnx.helper.make_node("CastLike", [f"{name}.product", hidden], [f"{name}.gated"]))
        else:  # Before it all of these are float32.
            added.append(onnx.helper.make_node("Identity", [f"{name}.product"], [f"{name}.gated"]))
        reader.input[0] = f"{name}.gated"
        position = next(index for index, node in enumerate(graph.node) if node is reader or node == reader)
        for node in reversed(added):
            graph.node.insert(position, node)
    return model


def run(path, inputs, generator):
    """What the golden file holds beside inputs and mask; and the raw hidden activations by layer, [.., d_ff]."""
    model = load(path)
    graph = model.graph
    nodes = down_projections(graph)
    assert nodes, "no down projection found"
    places = [(layer, node, hidden_name(graph, node)) for layer in sorted(nodes) for node in nodes[layer]]
    output = graph.output[0].name
    plain = session(model, path, inputs, [output])[0]
    tapped = onnx.ModelProto.FromString(model.SerializeToString())
    tapped.graph.output.extend(onnx.ValueInfoProto(name=hidden) for _, _, hidden in places)
    values = session(tapped, path, inputs, [hidden for _, _, hidden in places])
    hidden = {}
    for (layer, node, _), value in zip(places, values):
        hidden.setdefault(layer, []).append(np.moveaxis(value, 1, -1) if node.op_type == "Conv" else value)
    gates = {layer: (1 - generator.random(values[0].shape[-1])).astype(np.float32) for layer, values in hidden.items()}
    tensors = {f"layers.{layer}.gate": gate for layer, gate in gates.items()}
    after = session(gated(model, places, gates), path, inputs, [output])[0]
    for key, value in (("output", plain), ("gated", after)):
        tensors[f"{key}.{output}"] = value.astype(np.float32).reshape(-1, value.shape[-1])[:, :COLUMNS]
    return tensors, hidden


def decoders(exports):
    for path in sorted(exports.rglob("*.onnx")):
        if path.stem in REFUSED or "vision" in str(path.relative_to(exports)):
            continue
        if down_projections(load(path).graph):
            yield path


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    exports, out = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = [exports / name for name in sys.argv[3:]] or list(decoders(exports))
    failed = 0
    for path in chosen:
        name = path.relative_to(exports)
        generator = np.random.default_rng(7)
        try:
            inputs = feeds(onnx.load(path, load_external_data=False).graph, generator)
            made, hidden = run(path, inputs, generator)
        except Exception as error:
            failed += 1
            print(f"{name}: not run: {str(error).splitlines()[0][:200]}")
            continue
        size = next(inputs[key] for key in ("input_ids", "inputs_embeds") if key in inputs).shape[:2]
        mask = generator.integers(0, 2, size).astype(np.float32)
        tensors = {f"input.{key}": value for key, value in inputs.items()} | {"answer_mask": mask} | made
        for layer, values in hidden.items():
            rows = [value.astype(np.float32).reshape(mask.size, -1) for value in values]
            if len(rows) == 1:
                tensors[f"layers.{layer}.hidden"] = rows[0]
            total = sum((np.abs(value).astype(np.float64) * mask.reshape(-1, 1)).sum(0) for value in rows)
            tensors[f"layers.{layer}.sum"] = total.astype(np.float32)
        target = out / f"{name}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(value) for key, value in sorted(tensors.items())}, target)
        print(f"{name}: layers {sorted(hidden)}, {target.stat().st_size} bytes")
    print(f"{len(chosen) - failed} of {len(chosen)} files run")


if __name__ == "__main__":
    main()

"""Export of the parts that all families share, by the TorchScript exporter, in transformers.js's layout."""

import warnings

import onnx
import onnxslim
import torch
from torch import nn

OPSET = 17


def export_graph(module, inputs, path, input_names, output_names, dynamic_axes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), inputs, str(path), input_names=input_names, output_names=output_names,
            dynamic_axes=dynamic_axes, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    graph = onnxslim.slim(str(path))
    del graph.graph.value_info[:]  # onnxslim 0.1.98 leaves shapes there that contradict the graph
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(path))


def export_component(part, path, output):
    """`part` is a module, example inputs, their names and dynamic axes."""
    module, inputs, names, axes = part
    export_graph(module, inputs, path, names, [output], axes)


class KeyValueCache:
    """The part of transformers' `Cache` that decoder layers use, as plain tensors. Other layers keep nothing."""

    is_compileable = False

    def __init__(self, past, layers):
        self.keys, self.values = dict(zip(layers, past[0::2])), dict(zip(layers, past[1::2]))

    def get_seq_length(self, layer=0):
        return self.keys[layer].shape[2] if layer in self.keys else 0

    def get_usable_length(self, _new, layer=0):
        return self.get_seq_length(layer)

    def update(self, key, value, layer, _kwargs=None):
        if layer not in self.keys:
            return key, value
        self.keys[layer] = torch.cat((self.keys[layer], key), 2)
        self.values[layer] = torch.cat((self.values[layer], value), 2)
        return self.keys[layer], self.values[layer]

    def tensors(self):
        return [tensor for layer in self.keys for tensor in (self.keys[layer], self.values[layer])]


class Decoder(nn.Module):
    def __init__(self, family, model, further):
        super().__init__()
        self.family, self.further = family, further
        self.model, self.lm_head = family.language_model(model), model.lm_head
        self.whole = [model]  # in a list: not a module of this one

    def forward(self, inputs_embeds, attention_mask, position_ids, *rest):
        further = dict(zip(self.further, rest))
        past_key_values = rest[len(further) :]
        past, length = past_key_values[0].shape[2], inputs_embeds.shape[1]
        query, key = torch.arange(past, past + length), torch.arange(past + length)
        cache = KeyValueCache(past_key_values, list(self.family.cached_layers(self.whole[0])))
        hidden = self.family.run_language_model(
            self.whole[0],
            further,
            inputs_embeds=inputs_embeds,
            attention_mask=self.family.attention(query, key, attention_mask, further),
            position_ids=position_ids,
            past_key_values=cache,
            cache_position=query,
            use_cache=True,
        )
        return self.lm_head(hidden), *cache.tensors()


def cache_names(prefix, layers):
    return [f"{prefix}.{layer}.{part}" for layer in layers for part in ("key", "value")]


def export_decoder(family, model, path):
    text, layers = model.config.get_text_config(), family.cached_layers(model)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch, past, length = 2, 3, 5
    cache = [torch.zeros(batch, text.num_key_value_heads, past, head) for _ in range(2 * len(layers))]
    past_names, present_names = cache_names("past_key_values", layers), cache_names("present", layers)
    positions = family.positions(model, torch.arange(past, past + length), batch)
    further = family.further_inputs(model, batch, length)
    export_graph(
        Decoder(family, model, list(further)),
        (
            torch.randn(batch, length, text.hidden_size),
            torch.ones(batch, past + length, dtype=torch.long),
            positions, *(example for example, _ in further.values()), *cache,
        ),
        path,
        ["inputs_embeds", "attention_mask", "position_ids", *further, *past_names],
        ["logits", *present_names],
        {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": {positions.dim() - 2: "batch_size", positions.dim() - 1: "sequence_length"},
            "logits": {0: "batch_size", 1: "sequence_length"},
            **{name: axes for name, (_, axes) in further.items()},
            **{name: {0: "batch_size", 2: "past_sequence_length"} for name in past_names},
            **{name: {0: "batch_size", 2: "total_sequence_length"} for name in present_names},
        },
    )  # fmt: skip

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


class EmbedTokens(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


def export_embed_tokens(model, path):
    axes = {0: "batch_size", 1: "sequence_length"}
    inputs = (torch.zeros(2, 3, dtype=torch.long),)
    export_graph(
        EmbedTokens(model), inputs, path, ["input_ids"], ["inputs_embeds"], {"input_ids": axes, "inputs_embeds": axes}
    )


class KeyValueCache:
    """The part of transformers' `Cache` that decoder layers use, as plain tensors."""

    def __init__(self, past):
        self.keys, self.values = list(past[0::2]), list(past[1::2])

    def update(self, key, value, layer, _kwargs=None):
        self.keys[layer] = torch.cat((self.keys[layer], key), 2)
        self.values[layer] = torch.cat((self.values[layer], value), 2)
        return self.keys[layer], self.values[layer]

    def tensors(self):
        return [tensor for pair in zip(self.keys, self.values) for tensor in pair]


class Decoder(nn.Module):
    def __init__(self, family, model):
        super().__init__()
        self.family = family
        self.model = family.language_model(model)
        self.lm_head = model.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, *rest):
        extra = dict(zip(self.family.decoder_inputs, rest))
        past_key_values = rest[len(extra) :]
        past, length = past_key_values[0].shape[2], inputs_embeds.shape[1]
        query, key = torch.arange(past, past + length), torch.arange(past + length)
        cache = KeyValueCache(past_key_values)
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=self.family.attention(query, key, attention_mask, extra),
            position_ids=position_ids,
            past_key_values=cache,
            cache_position=query,
            use_cache=True,
        ).last_hidden_state
        return self.lm_head(hidden), *cache.tensors()


def cache_names(prefix, layers):
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def export_decoder(family, model, path):
    text = model.config.get_text_config()
    layers = text.num_hidden_layers
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    batch, past, length = 2, 3, 5
    cache = [torch.zeros(batch, text.num_key_value_heads, past, head) for _ in range(2 * layers)]
    past_names, present_names = cache_names("past_key_values", layers), cache_names("present", layers)
    positions = family.positions(model, torch.arange(past, past + length), batch)
    extra = [torch.ones(batch, length, dtype=torch.long) for _ in family.decoder_inputs]
    export_graph(
        Decoder(family, model),
        (
            torch.randn(batch, length, text.hidden_size),
            torch.ones(batch, past + length, dtype=torch.long),
            positions, *extra, *cache,
        ),
        path,
        ["inputs_embeds", "attention_mask", "position_ids", *family.decoder_inputs, *past_names],
        ["logits", *present_names],
        {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": {positions.dim() - 2: "batch_size", positions.dim() - 1: "sequence_length"},
            "logits": {0: "batch_size", 1: "sequence_length"},
            **{name: {0: "batch_size", 1: "sequence_length"} for name in family.decoder_inputs},
            **{name: {0: "batch_size", 2: "past_sequence_length"} for name in past_names},
            **{name: {0: "batch_size", 2: "total_sequence_length"} for name in present_names},
        },
    )  # fmt: skip

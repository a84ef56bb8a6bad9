"""Exports the trained model to ONNX as transformers.js lays it out, and checks the export against PyTorch.

    onnx/vision_encoder.onnx        pixel_values [patches, 1176], grid_thw [images, 3] → image_features [tokens, hidden]
    onnx/embed_tokens.onnx          input_ids [B, T] → inputs_embeds [B, T, hidden]
    onnx/decoder_model_merged.onnx  inputs_embeds, attention_mask [B, P+T], position_ids [3, B, T],
                                    past_key_values.{i}.{key,value} [B, n_kv, P, hd] → logits, present.{i}.{key,value}

`--check` exports nothing: it answers with the ONNX files alone and compares with the reference's `answers.json`.
"""

import argparse
import json
import shutil
import types
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxslim
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
)

from train import MAX_PIXELS, MIN_PIXELS, encode, render, set_deterministic
from world import read_jsonl

OPSET = 17
TOLERANCE = 2e-6  # of the largest value: PyTorch and ONNX Runtime in float32 are each half of this from float64
CHECKED_ANSWERS = 20
DEPLOYED_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
]  # fmt: skip


class EmbedTokens(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


def vision_attention(self, hidden_states, attention_bias, position_embeddings):
    """`VisionAttention.forward` with a mask between frames instead of a Python loop, which tracing would freeze."""
    length = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    cos, sin = position_embeddings
    rotate = lambda x: x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin  # noqa: E731
    scores = rotate(query) @ rotate(key).transpose(1, 2) * self.scaling + attention_bias
    attended = scores.softmax(-1) @ value
    return self.proj(attended.transpose(0, 1).reshape(length, self.dim))


class VisionEncoder(nn.Module):
    """Qwen2-VL's vision tower for images of any number and grid: what `grid_thw` decides is computed in the graph."""

    def __init__(self, model):
        super().__init__()
        self.visual = model.model.visual
        for block in self.visual.blocks:
            block.attn.forward = types.MethodType(vision_attention, block.attn)

    def forward(self, pixel_values, grid_thw):
        # Which image, frame, row and column each patch belongs to. Patches come in 2 × 2 blocks, for the merger.
        merge = self.visual.spatial_merge_size
        patch = torch.arange(pixel_values.shape[0])
        ends = grid_thw.prod(1).cumsum(0)
        image = (patch[:, None] >= ends[None, :]).sum(1)
        frames, height, width = grid_thw[image].unbind(1)
        offset = patch - (ends[image] - frames * height * width)
        frame, offset = offset // (height * width), offset % (height * width)
        block, offset = offset // (merge * merge), offset % (merge * merge)
        row = block // (width // merge) * merge + offset // merge
        column = block % (width // merge) * merge + offset % merge

        inverse_frequencies = self.visual.rotary_pos_emb.inv_freq
        angles = torch.cat([position[:, None] * inverse_frequencies for position in (row, column)], -1).repeat(1, 2)
        same_frame = (image[:, None] == image) & (frame[:, None] == frame)
        bias = torch.zeros_like(same_frame, dtype=torch.float32).masked_fill(
            ~same_frame, torch.finfo(torch.float32).min
        )

        hidden = self.visual.patch_embed(pixel_values)
        for layer in self.visual.blocks:
            hidden = hidden + layer.attn(layer.norm1(hidden), bias, (angles.cos(), angles.sin()))
            hidden = hidden + layer.mlp(layer.norm2(hidden))
        return self.visual.merger(hidden)


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
    def __init__(self, model):
        super().__init__()
        self.model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids, *past_key_values):
        past, length = past_key_values[0].shape[2], inputs_embeds.shape[1]
        query, key = torch.arange(past, past + length), torch.arange(past + length)
        visible = (key[None, :] <= query[:, None])[None, None] & attention_mask.bool()[:, None, None, :]
        bias = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, torch.finfo(torch.float32).min)
        cache = KeyValueCache(past_key_values)
        hidden = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask={"full_attention": bias},
            position_ids=position_ids,
            past_key_values=cache,
            cache_position=query,
            use_cache=True,
        ).last_hidden_state
        return self.lm_head(hidden), *cache.tensors()


def cache_names(prefix, layers):
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


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


def export(checkpoint, folder):
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    text = model.config.text_config
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_key_value_heads
    onnx_folder = folder / "onnx"
    onnx_folder.mkdir(parents=True, exist_ok=True)

    export_graph(
        EmbedTokens(model),
        (torch.zeros(2, 3, dtype=torch.long),),
        onnx_folder / "embed_tokens.onnx",
        ["input_ids"],
        ["inputs_embeds"],
        {
            "input_ids": {0: "batch_size", 1: "sequence_length"},
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
        },
    )

    batch, past, length = 2, 3, 5
    cache = [torch.zeros(batch, heads, past, hidden // text.num_attention_heads) for _ in range(2 * layers)]
    past_names, present_names = cache_names("past_key_values", layers), cache_names("present", layers)
    export_graph(
        Decoder(model),
        (
            torch.zeros(batch, length, hidden),
            torch.ones(batch, past + length, dtype=torch.long),
            torch.arange(past, past + length).expand(3, batch, length),
            *cache,
        ),
        onnx_folder / "decoder_model_merged.onnx",
        ["inputs_embeds", "attention_mask", "position_ids", *past_names],
        ["logits", *present_names],
        {
            "inputs_embeds": {0: "batch_size", 1: "sequence_length"},
            "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
            "position_ids": {1: "batch_size", 2: "sequence_length"},
            "logits": {0: "batch_size", 1: "sequence_length"},
            **{name: {0: "batch_size", 2: "past_sequence_length"} for name in past_names},
            **{name: {0: "batch_size", 2: "total_sequence_length"} for name in present_names},
        },
    )

    # Last: it replaces the vision attention's `forward`.
    vision = model.config.vision_config
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    export_graph(
        VisionEncoder(model),
        (torch.zeros(2 * 4 + 6 * 4, patch_values), torch.tensor([[1, 2, 4], [1, 6, 4]])),
        onnx_folder / "vision_encoder.onnx",
        ["pixel_values", "grid_thw"],
        ["image_features"],
        {
            "pixel_values": {0: "num_patches"},
            "grid_thw": {0: "num_images"},
            "image_features": {0: "num_image_tokens"},
        },
    )
    for name in DEPLOYED_FILES:
        shutil.copyfile(checkpoint / name, folder / name)
    # As in published Qwen2-VL folders: the slow processor's file, which the fast one reads too.
    image_processor = Qwen2VLImageProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    image_processor._set_processor_class("Qwen2VLProcessor")
    image_processor.save_pretrained(folder)
    for path in sorted(onnx_folder.iterdir()):
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(onnx.load(path).graph.node)} nodes")


class OnnxModel:
    """The deployed folder, run by ONNX Runtime. All that it takes from transformers is the processor."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = lambda name: onnxruntime.InferenceSession(  # noqa: E731
            folder / "onnx" / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.vision_encoder, self.embed_tokens, self.decoder = map(
            session, ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        self.config = json.loads((folder / "config.json").read_text())
        self.eos_token_ids = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        text = self.config["text_config"]
        self.layers = text["num_hidden_layers"]
        self.cache_shape = (text["num_key_value_heads"], 0, text["hidden_size"] // text["num_attention_heads"])

    def inputs_embeds(self, input_ids, pixel_values=None, grid_thw=None):
        embeds = self.embed_tokens.run(None, {"input_ids": input_ids})[0]
        if pixel_values is not None:
            features = self.vision_encoder.run(None, {"pixel_values": pixel_values, "grid_thw": grid_thw})[0]
            embeds[input_ids == self.config["image_token_id"]] = features
        return embeds

    def decode(self, inputs_embeds, attention_mask, position_ids, cache=None):
        if cache is None:
            cache = [np.zeros((len(inputs_embeds), *self.cache_shape), np.float32)] * (2 * self.layers)
        logits, *cache = self.decoder.run(
            None,
            {
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                **dict(zip(cache_names("past_key_values", self.layers), cache)),
            },
        )
        return logits, cache

    def generate(self, inputs, position_ids, max_new_tokens):
        """Greedy answer of one sample, with the cache."""
        embeds = self.inputs_embeds(inputs["input_ids"], inputs.get("pixel_values"), inputs.get("image_grid_thw"))
        mask, cache, answer = inputs["attention_mask"], None, []
        while len(answer) < max_new_tokens:
            logits, cache = self.decode(embeds, mask, position_ids, cache)
            token = int(logits[0, -1].argmax())
            answer.append(token)
            if token in self.eos_token_ids:
                break
            embeds = self.inputs_embeds(np.array([[token]]))
            mask = np.concatenate((mask, np.ones((1, 1), mask.dtype)), 1)
            position_ids = np.full((3, 1, 1), position_ids.max() + 1)
        return answer


@torch.no_grad()
def compare_with_torch(checkpoint, folder, data):
    """Largest differences of features and logits: two grids, two images at once, steps with cache, left padding."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    processor, deployed = AutoProcessor.from_pretrained(folder, use_fast=True), OnnxModel(folder)
    worst = {}

    def note(what, expected, got):
        difference = float(np.abs(expected.numpy() - got).max())
        if difference >= worst.get(what, (-1.0,))[0]:
            worst[what] = difference, float(expected.abs().max())

    portrait, text, shape = (read_jsonl(data / f"{name}.jsonl")[0] for name in ("retain", "retain_text", "shapes"))
    encoded = [encode(processor, row, data) for row in (portrait, text, shape)]
    for inputs in encoded:
        inputs.pop("answer_mask")
        expected = model(**inputs).logits
        ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")
        positions = model.model.get_rope_index(ids, image_grid_thw=grid)[0].numpy()
        values = {key: value.numpy() for key, value in inputs.items()}
        embeds = deployed.inputs_embeds(values["input_ids"], values.get("pixel_values"), values.get("image_grid_thw"))
        logits, _ = deployed.decode(embeds, values["attention_mask"], positions)
        note("one pass", expected, logits)
        cut = ids.shape[1] - 4
        mask = values["attention_mask"]
        first, cache = deployed.decode(embeds[:, :cut], mask[:, :cut], positions[..., :cut])
        second, cache = deployed.decode(embeds[:, cut:-1], mask[:, :-1], positions[..., cut:-1], cache)
        third, cache = deployed.decode(embeds[:, -1:], mask, positions[..., -1:], cache)
        note("steps with cache", expected, np.concatenate((first, second, third), 1))

    pictures = [inputs for inputs in encoded if "pixel_values" in inputs]
    pixels = torch.cat([inputs["pixel_values"] for inputs in pictures])
    grids = torch.cat([inputs["image_grid_thw"] for inputs in pictures])
    features = deployed.vision_encoder.run(None, {"pixel_values": pixels.numpy(), "grid_thw": grids.numpy()})[0]
    note("features of two images at once", model.model.visual(pixels, grid_thw=grids), features)

    images = [Image.open(data / row["image"]) for row in (portrait, shape)]
    prompts = [render(processor, row) for row in (portrait, text, shape)]
    batch = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    expected = model(**batch).logits
    mask = batch["attention_mask"].numpy()
    positions = model.model.get_rope_index(
        batch["input_ids"], image_grid_thw=batch["image_grid_thw"], attention_mask=batch["attention_mask"]
    )[0]
    embeds = deployed.inputs_embeds(
        batch["input_ids"].numpy(), batch["pixel_values"].numpy(), batch["image_grid_thw"].numpy()
    )
    logits, _ = deployed.decode(embeds, mask, positions.numpy())
    note("left-padded batch of three", expected[mask == 1], logits[mask == 1])

    for what, (difference, largest) in worst.items():
        print(f"largest difference, {what}: {difference:.1e} of {largest:.1f}")
        assert difference < TOLERANCE * largest


@torch.no_grad()
def check_answers(folder, data, reference):
    """Answers rows of every data set with the ONNX files; they must be the reference's answers before unlearning."""
    processor, deployed = AutoProcessor.from_pretrained(folder, use_fast=True), OnnxModel(folder)
    # Positions are transformers' own; only the configuration is needed for them, not the weights.
    with torch.device("meta"):
        skeleton = Qwen2VLModel(Qwen2VLConfig.from_pretrained(folder))
    meta = json.loads((reference / "meta.json").read_text())
    answers = json.loads((reference / "answers.json").read_text())
    checked = wrong = 0
    share = -(-CHECKED_ANSWERS // len(answers))
    for name, expected in answers.items():
        for row in read_jsonl(data / f"{name}.jsonl")[:share]:
            images = [Image.open(data / row["image"])] if row["image"] else None
            inputs = processor(text=[render(processor, row, with_answer=False)], images=images, return_tensors="pt")
            positions = skeleton.get_rope_index(inputs["input_ids"], image_grid_thw=inputs.get("image_grid_thw"))[0]
            tokens = deployed.generate(
                {key: value.numpy() for key, value in inputs.items()}, positions.numpy(), meta["max_new_tokens"]
            )
            answer = processor.tokenizer.decode(tokens, skip_special_tokens=True)
            checked += 1
            if answer != expected[row["id"]]["before"]:
                wrong += 1
                print(f"{row['id']}: ONNX says {answer!r}, the reference {expected[row['id']]['before']!r}")
    print(f"{checked - wrong} of {checked} answers are the reference's")
    assert checked >= CHECKED_ANSWERS and not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("target/demo/checkpoint"))
    parser.add_argument("--data", type=Path, default=Path("fixtures/demo/data"))
    parser.add_argument("--model", type=Path, default=Path("fixtures/demo/model"))
    parser.add_argument("--reference", type=Path, default=Path("fixtures/demo/reference"))
    parser.add_argument("--check", action="store_true", help="compare the ONNX files' answers with the reference's")
    arguments = parser.parse_args()

    set_deterministic()
    if arguments.check:
        check_answers(arguments.model, arguments.data, arguments.reference)
    else:
        export(arguments.checkpoint, arguments.model)
        compare_with_torch(arguments.checkpoint, arguments.model, arguments.data)


if __name__ == "__main__":
    main()

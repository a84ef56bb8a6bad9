"""Qwen3-VL without DeepStack, as ONNX exports have it: interpolated positions in the tower, its own patch and merge sizes."""

import types

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from family import Family, bias, byte_level_tokenizer, randomize
from qwen2_5_vl import SPECIAL, vision_attention

# The turns of Qwen3-VL-Instruct's template, without its tools: no system message of its own.
TEMPLATE = (
    "{%- set image_count = namespace(value=0) %}{%- set video_count = namespace(value=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{%- set image_count.value = image_count.value + 1 %}"
    "{%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}{%- set video_count.value = video_count.value + 1 %}"
    "{%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for content_item in message.content %}"
    "{%- if 'text' in content_item %}{{- content_item.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class VisionEncoder(nn.Module):
    """The vision tower for one image of any grid: what its size decides is computed in the graph."""

    def __init__(self, model):
        super().__init__()
        self.visual = model.model.visual
        for block in self.visual.blocks:
            block.attn.forward = types.MethodType(vision_attention, block.attn)

    def forward(self, pixel_values, image_grid_thw):
        visual = self.visual
        merge = visual.spatial_merge_size
        _, height, width = image_grid_thw[0].unbind()
        patch = torch.arange(pixel_values.shape[0])
        block, offset = patch // (merge * merge), patch % (merge * merge)
        row = block // (width // merge) * merge + offset // merge
        column = block % (width // merge) * merge + offset % merge

        # Positions learned for a square grid, interpolated: `fast_pos_embed_interpolate`.
        last = visual.num_grid_per_side - 1
        place = lambda index, length: index * (last / (length - 1).clamp(min=1))  # noqa: E731
        y, x = place(row, height), place(column, width)
        top, left = y.floor().long(), x.floor().long()
        bottom, right = (top + 1).clamp(max=last), (left + 1).clamp(max=last)
        dy, dx = (y - top)[:, None], (x - left)[:, None]
        at = lambda down, across: visual.pos_embed(down * (last + 1) + across)  # noqa: E731
        learned = (
            at(top, left) * (1 - dy) * (1 - dx) + at(top, right) * (1 - dy) * dx
            + at(bottom, left) * dy * (1 - dx) + at(bottom, right) * dy * dx
        )  # fmt: skip

        angles = torch.cat([p[:, None] * visual.rotary_pos_emb.inv_freq for p in (row, column)], -1).repeat(1, 2)
        positions = (angles.cos(), angles.sin())
        everything = bias(patch[:, None] >= 0)
        hidden = visual.patch_embed(pixel_values) + learned
        for layer in visual.blocks:
            hidden = hidden + layer.attn(layer.norm1(hidden), everything, positions)
            hidden = hidden + layer.mlp(layer.norm2(hidden))
        return visual.merger(hidden)


class Qwen3Vl(Family):
    name = "qwen3_vl"
    image_inputs = ["pixel_values", "image_grid_thw"]
    # Not `both_processors`: the slow one of 4.57.1 drops `size`, and AutoProcessor never picks it.

    def checkpoint(self):
        tokenizer = Qwen2TokenizerFast(
            tokenizer_object=byte_level_tokenizer(SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
        )
        # As in the published folders: no `min_pixels`, only `size`; half for mean and deviation.
        images = Qwen2VLImageProcessorFast(
            patch_size=6, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
            size={"shortest_edge": 24 * 24, "longest_edge": 72 * 72},
        )  # fmt: skip
        videos = Qwen3VLVideoProcessor(patch_size=6)
        processor = Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
        token = tokenizer.convert_tokens_to_ids
        config = Qwen3VLConfig(
            vision_config=dict(
                depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=6,
                num_position_embeddings=16, deepstack_visual_indexes=[],
            ),
            text_config=dict(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
                rope_scaling={"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]},
                eos_token_id=token("<|im_end|>"),
            ),
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = randomize(Qwen3VLForConditionalGeneration(config))
        model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
        model.generation_config.pad_token_id = token("<|endoftext|>")
        return model, processor

    def vision_encoder(self, model):
        grid = torch.tensor([[1, 4, 6]])
        pixels = torch.randn(24, 3 * 2 * 6 * 6)
        axes = {"pixel_values": {0: "num_patches"}, "image_features": {0: "num_image_tokens"}}
        return VisionEncoder(model), (pixels, grid), ["pixel_values", "image_grid_thw"], axes

    def positions(self, model, query, batch):
        return query.expand(3, batch, -1)

    def prompt_positions(self, inputs, folder):
        rope = types.SimpleNamespace(config=AutoConfig.from_pretrained(folder))
        grid = torch.from_numpy(inputs["image_grid_thw"]) if "image_grid_thw" in inputs else None
        ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
        return np.ascontiguousarray(Qwen3VLModel.get_rope_index(rope, ids, grid, None, mask)[0].numpy())


FAMILY = Qwen3Vl()

"""Qwen2.5-VL: patches of any grid, windows and full attention in turn, multimodal positions; Qwen's template."""

import types

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessorFast,
    Qwen2VLVideoProcessor,
)

from family import Family, bias, byte_level_tokenizer, randomize

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_attention(self, hidden_states, attention_bias, position_embeddings):
    """`VisionAttention.forward` with a mask instead of a Python loop over windows, which tracing would freeze."""
    length = hidden_states.shape[0]
    query, key, value = self.qkv(hidden_states).reshape(length, 3, self.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    cos, sin = position_embeddings
    rotate = lambda x: x * cos + torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1) * sin  # noqa: E731
    scores = rotate(query) @ rotate(key).transpose(1, 2) * self.scaling + attention_bias
    return self.proj((scores.softmax(-1) @ value).transpose(0, 1).reshape(length, self.dim))


class VisionEncoder(nn.Module):
    """The vision tower in the processor's order of patches: what windows do is a mask, so nothing has to be reordered."""

    def __init__(self, model):
        super().__init__()
        self.visual = model.model.visual
        for block in self.visual.blocks:
            block.attn.forward = types.MethodType(vision_attention, block.attn)

    def forward(self, pixel_values, image_grid_thw):
        visual = self.visual
        merge = visual.spatial_merge_size
        patch = torch.arange(pixel_values.shape[0])
        ends = image_grid_thw.prod(1).cumsum(0)
        image = (patch[:, None] >= ends[None, :]).sum(1)
        frames, height, width = image_grid_thw[image].unbind(1)
        offset = patch - (ends[image] - frames * height * width)
        frame, offset = offset // (height * width), offset % (height * width)
        block, offset = offset // (merge * merge), offset % (merge * merge)
        block_row, block_column = block // (width // merge), block % (width // merge)
        row, column = block_row * merge + offset // merge, block_column * merge + offset % merge

        angles = torch.cat([p[:, None] * visual.rotary_pos_emb.inv_freq for p in (row, column)], -1).repeat(1, 2)
        positions = (angles.cos(), angles.sin())
        same = lambda *keys: torch.stack([key[:, None] == key for key in keys]).all(0)  # noqa: E731
        window = visual.window_size // merge // visual.patch_size
        everything = bias(same(image, frame))
        windows = bias(same(image, frame, block_row // window, block_column // window))

        hidden = visual.patch_embed(pixel_values)
        for index, layer in enumerate(visual.blocks):
            mask = everything if index in visual.fullatt_block_indexes else windows
            hidden = hidden + layer.attn(layer.norm1(hidden), mask, positions)
            hidden = hidden + layer.mlp(layer.norm2(hidden))
        return visual.merger(hidden)


class Qwen25Vl(Family):
    name = "qwen2_5_vl"
    both_processors = True
    image_inputs = ["pixel_values", "image_grid_thw"]

    def checkpoint(self):
        tokenizer = Qwen2TokenizerFast(
            tokenizer_object=byte_level_tokenizer(SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
        )
        # As in published folders: the slow class's name, for which AutoProcessor takes the fast one.
        images = Qwen2VLImageProcessorFast(patch_size=4, min_pixels=16 * 16, max_pixels=48 * 48)
        videos = Qwen2VLVideoProcessor(patch_size=4)
        processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
        token = tokenizer.convert_tokens_to_ids
        config = Qwen2_5_VLConfig(
            vision_config=dict(
                depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=4, window_size=16,
                fullatt_block_indexes=[1], hidden_act="silu",
            ),
            text_config=dict(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512,
                rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
                bos_token_id=token("<|endoftext|>"), eos_token_id=token("<|im_end|>"),
            ),
            image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = randomize(Qwen2_5_VLForConditionalGeneration(config))
        model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
        model.generation_config.pad_token_id = token("<|endoftext|>")
        return model, processor

    def vision_encoder(self, model):
        grids = torch.tensor([[1, 4, 6], [1, 6, 4]])
        pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4)
        axes = {
            "pixel_values": {0: "num_patches"}, "image_grid_thw": {0: "num_images"}, "image_features": {0: "num_image_tokens"},
        }  # fmt: skip
        return VisionEncoder(model), (pixels, grids), ["pixel_values", "image_grid_thw"], axes

    def positions(self, model, query, batch):
        return query.expand(3, batch, -1)

    def prompt_positions(self, inputs, folder):
        rope = types.SimpleNamespace(config=AutoConfig.from_pretrained(folder))
        grid = torch.from_numpy(inputs["image_grid_thw"]) if "image_grid_thw" in inputs else None
        ids, mask = torch.from_numpy(inputs["input_ids"]), torch.from_numpy(inputs["attention_mask"])
        return np.ascontiguousarray(Qwen2_5_VLModel.get_rope_index(rope, ids, grid, None, None, mask)[0].numpy())

    def attention(self, query, key, attention_mask, extra):
        return {"full_attention": super().attention(query, key, attention_mask, extra)}


FAMILY = Qwen25Vl()

"""InternVL: tiles through an InternViT, pixel shuffle, a Qwen2; the template and tokens of OpenGVLab/InternVL3-1B-hf."""

import torch
from torch import nn
from transformers import (
    GotOcr2ImageProcessorFast,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)

from family import Family, byte_level_tokenizer, randomize

TILE, PATCH, MAX_TILES = 32, 8, 6
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


class VisionEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        config = self.model.config
        return self.model.get_image_features(
            pixel_values, config.vision_feature_layer, config.vision_feature_select_strategy
        )


class InternVl(Family):
    name = "internvl"
    both_processors = True
    image_options = {"crop_to_patches": True}

    def checkpoint(self):
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=byte_level_tokenizer(special), model_input_names=["input_ids", "attention_mask"],
            eos_token="<|im_end|>", pad_token="<|endoftext|>",
            extra_special_tokens={
                "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        )  # fmt: skip
        image_processor = GotOcr2ImageProcessorFast(
            size={"height": TILE, "width": TILE}, max_patches=MAX_TILES,
            image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
        )  # fmt: skip
        tokens = (TILE // PATCH // 2) ** 2
        processor = InternVLProcessor(
            image_processor, tokenizer, InternVLVideoProcessor(), image_seq_length=tokens, chat_template=TEMPLATE
        )
        config = InternVLConfig(
            vision_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[TILE, TILE],
                patch_size=[PATCH, PATCH], use_absolute_position_embeddings=True, attention_bias=True,
            ),
            text_config=dict(
                model_type="qwen2", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=tokens, downsample_ratio=0.5,
        )  # fmt: skip
        config._attn_implementation = "eager"
        return randomize(InternVLForConditionalGeneration(config)), processor

    def vision_encoder(self, model):
        axes = {"pixel_values": {0: "num_tiles"}, "image_features": {0: "num_tiles"}}
        return VisionEncoder(model), (torch.randn(2, 3, TILE, TILE),), ["pixel_values"], axes


FAMILY = InternVl()

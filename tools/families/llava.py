"""LLaVA-1.5: a CLIP tower without its class token, a two-layer projector, a Llama; the template of llava-hf/llava-1.5-7b-hf."""

import torch
from tokenizers import processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from family import Family, randomize, sentencepiece_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class VisionEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        # As `get_image_features`, which would fix the number of images in the graph.
        hidden = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return self.model.multi_modal_projector(hidden[self.model.config.vision_feature_layer][:, 1:])


class Llava(Family):
    name = "llava"
    both_processors = True

    def checkpoint(self):
        tokenizer = sentencepiece_tokenizer(["<image>", "<pad>"], size=380)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        tokenizer = LlamaTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", legacy=False
        )
        image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor = LlavaProcessor(
            image_processor, tokenizer, patch_size=7, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=TEMPLATE,
        )  # fmt: skip
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7,
                projection_dim=32,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        config._attn_implementation = "eager"
        return randomize(LlavaForConditionalGeneration(config)), processor

    def vision_encoder(self, model):
        pixels = torch.randn(2, 3, 28, 28)
        axes = {"pixel_values": {0: "num_images"}, "image_features": {0: "num_images"}}
        return VisionEncoder(model), (pixels,), ["pixel_values"], axes


FAMILY = Llava()

"""Gemma 3: a SigLIP tower pooled to fewer tokens, sliding and full attention in turn, an image seen as a whole by its tokens."""

import torch
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaTokenizerFast,
    SiglipVisionConfig,
)

from family import Family, bias, randomize, sentencepiece_tokenizer

SPECIAL = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]
WINDOW = 16
TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""


class VisionEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values)


class Gemma3(Family):
    name = "gemma3"
    both_processors = True
    decoder_inputs = ["token_type_ids"]

    def checkpoint(self):
        tokenizer = sentencepiece_tokenizer(SPECIAL, size=370, first=("<pad>", "<eos>", "<bos>", "<unk>"), prepend=False)
        tokenizer = GemmaTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
            extra_special_tokens={
                "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
            },
        )  # fmt: skip
        images = Gemma3ImageProcessor(size={"height": 28, "width": 28})
        processor = Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=4)
        token = tokenizer.convert_tokens_to_ids
        config = Gemma3Config(
            vision_config=SiglipVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
                vision_use_head=False,
            ),
            text_config=Gemma3TextConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sliding_window=WINDOW, tie_word_embeddings=False,
                layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
                bos_token_id=token("<bos>"), eos_token_id=token("<eos>"), pad_token_id=token("<pad>"),
            ),
            mm_tokens_per_image=4, boi_token_index=token("<start_of_image>"), eoi_token_index=token("<end_of_image>"),
            image_token_index=token("<image_soft_token>"), eos_token_id=[token("<eos>"), token("<end_of_turn>")],
            bos_token_id=token("<bos>"), pad_token_id=token("<pad>"), tie_word_embeddings=False,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = randomize(Gemma3ForConditionalGeneration(config))
        model.generation_config.eos_token_id = [token("<eos>"), token("<end_of_turn>")]
        return model, processor

    def vision_encoder(self, model):
        axes = {"pixel_values": {0: "num_images"}, "image_features": {0: "num_images"}}
        return VisionEncoder(model), (torch.randn(2, 3, 28, 28),), ["pixel_values"], axes

    def attention(self, query, key, attention_mask, extra):
        """An image's tokens (type 1; one image) see each other both ways, also past the sliding window."""
        image = extra["token_type_ids"] == 1
        past = torch.zeros(image.shape[0], key.shape[0] - query.shape[0], dtype=torch.bool)
        together = image[:, None, :, None] & torch.cat((past, image), 1)[:, None, None, :]
        present = attention_mask.bool()[:, None, None, :]
        causal = (key[None, :] <= query[:, None])[None, None]
        near = (key[None, :] > query[:, None] - WINDOW)[None, None]
        return {
            "full_attention": bias((causal | together) & present),
            "sliding_attention": bias(((causal & near) | together) & present),
        }


FAMILY = Gemma3()

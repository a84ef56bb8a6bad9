"""SmolVLM: tiles through a SigLIP tower, pixel shuffle, a Llama; the template of HuggingFaceTB/SmolVLM-256M-Instruct."""

import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from family import Family, bias, byte_level_tokenizer, randomize

TILE, LONGEST_EDGE, PATCH, SCALE = 32, 96, 8, 2
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
]  # fmt: skip


class VisionEncoder(nn.Module):
    """Every tile with its mask, without the Python loops of `get_image_features`, which tracing would freeze. A tile that is
    all padding is encoded too; transformers leaves it out."""

    def __init__(self, model):
        super().__init__()
        self.vision, self.connector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values, pixel_attention_mask):
        pixels, mask = pixel_values.flatten(0, 1), pixel_attention_mask.flatten(0, 1)
        embeddings = self.vision.embeddings
        side, patch = embeddings.num_patches_per_side, embeddings.patch_size
        visible = nn.functional.max_pool2d(mask[:, None].float(), patch)[:, 0] > 0
        boundaries = torch.arange(1 / side, 1.0, 1 / side)

        def buckets(line):
            fractions = torch.arange(line.shape[1]).float() / line.sum(1, keepdim=True).float() * (1 - 1e-6)
            return (boundaries <= fractions[..., None]).sum(-1)

        rows, columns = buckets(visible[:, :, 0]), buckets(visible[:, 0])
        positions = ((rows[:, :, None] * side + columns[:, None]) * visible).flatten(1)
        hidden = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + embeddings.position_embedding(positions)
        mask = bias(visible.flatten(1)[:, None, None])
        for layer in self.vision.encoder.layers:
            hidden = layer(hidden, mask)
        return self.connector(self.vision.post_layernorm(hidden))


class SmolVlm(Family):
    name = "smolvlm"
    image_inputs = ["pixel_values", "pixel_attention_mask"]
    model_class, config_class = SmolVLMForConditionalGeneration, SmolVLMConfig

    def tokenizer(self):
        return PreTrainedTokenizerFast(
            tokenizer_object=byte_level_tokenizer(SPECIAL), model_input_names=["input_ids", "attention_mask"],
            bos_token="<|im_start|>", eos_token="<end_of_utterance>",
            pad_token="<|im_end|>", unk_token="<|endoftext|>",
            extra_special_tokens={
                "fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
                "end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>",
            },
        )  # fmt: skip

    def processor(self, tokenizer):
        image_processor = SmolVLMImageProcessor(size={"longest_edge": LONGEST_EDGE}, max_image_size={"longest_edge": TILE})
        tokens = (TILE // PATCH // SCALE) ** 2
        return SmolVLMProcessor(
            image_processor, tokenizer, SmolVLMVideoProcessor(), image_seq_len=tokens, chat_template=TEMPLATE
        )

    def checkpoint(self):
        tokenizer = self.tokenizer()
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = self.config_class(
            vision_config=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=TILE, patch_size=PATCH
            ),
            text_config=dict(
                model_type="llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, **ids,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=SCALE, tie_word_embeddings=False, **ids,
        )  # fmt: skip
        config._attn_implementation = "eager"
        return randomize(self.model_class(config)), self.processor(tokenizer)

    def as_fed(self, inputs):
        # The processor says int64; exports take bool, as transformers.js makes it.
        return dict(inputs) | {"pixel_attention_mask": inputs["pixel_attention_mask"].bool()}

    def encode(self, processor, sample, image, with_answer):
        inputs = super().encode(processor, sample, image, with_answer)
        return self.as_fed(inputs) if image else inputs

    def language_model(self, model):
        return model.model.text_model

    def vision_encoder(self, model):
        inputs = (torch.randn(1, 3, 3, TILE, TILE), torch.ones(1, 3, TILE, TILE, dtype=torch.bool))
        axes = {0: "batch_size", 1: "num_images"}
        axes = {"pixel_values": axes, "pixel_attention_mask": axes, "image_features": {0: "num_tiles"}}
        return VisionEncoder(model), inputs, self.image_inputs, axes


FAMILY = SmolVlm()

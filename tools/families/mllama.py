"""Mllama: Llama-3.2-Vision's tiles and cross-attention; the template of meta-llama/Llama-3.2-11B-Vision-Instruct (mllama.jinja).

optimum and onnxruntime-genai export no Mllama, so the split is transformers' own seam: the vision encoder with its projector makes
`cross_attention_states`, which the decoder takes at every step, beside `cross_attention_mask`. Only self-attention layers have
a cache.
"""

from pathlib import Path

import torch
from tokenizers import processors
from torch import nn
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from family import Family, byte_level_tokenizer, randomize

TILE, PATCH, TILES, LAYERS, CROSS = 28, 7, 4, 3, 1
BOS = "<|begin_of_text|>"
SPECIAL = [
    BOS, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>",
    "<|image|>",
]  # fmt: skip


class VisionEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask):
        states = self.model.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask).last_hidden_state
        states = self.model.multi_modal_projector(states)
        return states.reshape(states.shape[0], -1, states.shape[-1])


class Mllama(Family):
    name = "mllama"
    text_only = False  # without an image the model leaves its cross-attention layers out, which a graph cannot
    image_inputs = ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"]
    decoder_inputs = ["cross_attention_mask"]
    vision_output = "cross_attention_states"

    def checkpoint(self):
        tokenizer = byte_level_tokenizer(SPECIAL)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], bos_token=BOS, eos_token="<|eot_id|>",
            pad_token="<|finetune_right_pad_id|>",
        )  # fmt: skip
        image_processor = MllamaImageProcessor(
            size={"height": TILE, "width": TILE}, max_image_tiles=TILES,
            image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        )  # fmt: skip
        template = Path(__file__).with_suffix(".jinja").read_text()
        processor = MllamaProcessor(image_processor, tokenizer, chat_template=template)
        image = tokenizer.convert_tokens_to_ids("<|image|>")
        assert image == len(tokenizer) - 1, "the image token has an embedding but no logit"
        ratios = [[h, w] for h in range(1, TILES + 1) for w in range(1, TILES + 1) if h * w <= TILES]
        config = MllamaConfig(
            vision_config=dict(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_global_layers=1, attention_heads=2, image_size=TILE,
                patch_size=PATCH, max_num_tiles=TILES, vision_output_dim=32, intermediate_layers_indices=[1],
                supported_aspect_ratios=ratios,
            ),
            text_config=dict(
                vocab_size=image, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, cross_attention_layers=[CROSS],
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, rope_theta=10000.0,
                rope_scaling=dict(
                    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=256,
                ),
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=image,
        )  # fmt: skip
        model = randomize(MllamaForConditionalGeneration._from_config(config, attn_implementation="eager"))
        with torch.no_grad():  # which begin at 0, as if there were no image
            for name, parameter in model.named_parameters():
                if name.endswith("gate"):
                    parameter.fill_(0.6)
        return model, processor

    def encode(self, processor, sample, image, with_answer):
        return super().encode(processor, sample, [image], with_answer)

    def vision_encoder(self, model):
        inputs = (torch.randn(1, 1, TILES, 3, TILE, TILE), torch.tensor([[6]]), torch.ones(1, 1, TILES, dtype=torch.long))
        axes = {0: "batch_size", 1: "num_images"}
        axes = {name: axes for name in self.image_inputs} | {self.vision_output: {0: "batch_size", 1: "num_states"}}
        return VisionEncoder(model), inputs, self.image_inputs, axes

    def vision_positions(self, model, inputs, rows):
        """The tiles that are there, without what fills each up to a multiple of 8 positions."""
        positions = torch.arange(rows // TILES) < (TILE // PATCH) ** 2 + 1
        return (inputs["aspect_ratio_mask"].reshape(-1, 1).bool() & positions).reshape(-1)

    def cached_layers(self, model):
        return [layer for layer in range(LAYERS) if layer != CROSS]

    def further_inputs(self, model, batch, length):
        states = torch.randn(batch, TILES * model.model.vision_model.num_patches, 32)
        mask = torch.ones(batch, length, 1, TILES, dtype=torch.long)
        return {
            "cross_attention_states": (states, {0: "batch_size", 1: "num_states"}),
            "cross_attention_mask": (mask, {0: "batch_size", 1: "sequence_length"}),
        }

    def run_language_model(self, model, further, **inputs):
        mask, rows = _prepare_cross_attention_mask(
            further["cross_attention_mask"], model.model.vision_model.num_patches, torch.float32
        )
        return self.language_model(model)(
            cross_attention_states=further["cross_attention_states"], cross_attention_mask=mask,
            full_text_row_masked_out_mask=rows, **inputs,
        ).last_hidden_state  # fmt: skip


FAMILY = Mllama()

"""Idefics3: as SmolVLM, with a Llama-3 kind of tokenizer; the template of HuggingFaceM4/Idefics3-8B-Llama3."""

from tokenizers import processors
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

import smolvlm
from family import byte_level_tokenizer

TEMPLATE = smolvlm.TEMPLATE.replace("<|im_start|>", "<|begin_of_text|>").replace(" | capitalize", ".capitalize()")
SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>",
]  # fmt: skip


class Idefics3(smolvlm.SmolVlm):
    name = "idefics3"
    model_class, config_class = Idefics3ForConditionalGeneration, Idefics3Config

    def tokenizer(self):
        # `<row_1_col_1>` and `<global-img>` are no tokens here: they are spelled out.
        tokenizer = byte_level_tokenizer(SPECIAL)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"],
            bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>",
        )  # fmt: skip

    def processor(self, tokenizer):
        image_processor = Idefics3ImageProcessor(
            size={"longest_edge": smolvlm.LONGEST_EDGE}, max_image_size={"longest_edge": smolvlm.TILE}
        )
        tokens = (smolvlm.TILE // smolvlm.PATCH // smolvlm.SCALE) ** 2
        return Idefics3Processor(image_processor, tokenizer, image_seq_len=tokens, chat_template=TEMPLATE)


FAMILY = Idefics3()

"""PaliGemma: a SigLIP tower, a linear projector, a Gemma that sees the whole prompt from every token of it; no chat template."""

import json

import torch
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaTokenizerFast,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from family import Family, bias, randomize, sentencepiece_tokenizer


class VisionEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values):
        return self.model.get_image_features(pixel_values)


class PaliGemma(Family):
    name = "paligemma"
    both_processors = True
    text_only = False
    decoder_inputs = ["token_type_ids"]

    def checkpoint(self):
        tokenizer = sentencepiece_tokenizer(["<image>"], size=370, first=("<pad>", "<eos>", "<bos>", "<unk>"), prepend=False)
        vocabulary = tokenizer.get_vocab_size()
        tokenizer = GemmaTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
        )
        images = SiglipImageProcessor(size={"height": 28, "width": 28})
        images.image_seq_length = 16
        processor = PaliGemmaProcessor(images, tokenizer)
        token = tokenizer.convert_tokens_to_ids
        config = PaliGemmaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
                projection_dim=32, vision_use_head=False,
            ),
            text_config=GemmaConfig(
                vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=1, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
                bos_token_id=token("<bos>"), eos_token_id=token("<eos>"), pad_token_id=token("<pad>"),
            ),
            image_token_index=token("<image>"), projection_dim=32, hidden_size=32, tie_word_embeddings=False,
            bos_token_id=token("<bos>"), eos_token_id=token("<eos>"), pad_token_id=token("<pad>"),
        )  # fmt: skip
        config._attn_implementation = "eager"
        return randomize(PaliGemmaForConditionalGeneration(config)), processor

    def deployed(self, folder):
        """The 1,152 tokens for places, which the processor adds whenever it is opened, would be most of the file."""
        for name, field in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
            content = json.loads((folder / name).read_text())
            kept = lambda token: not token["content"].startswith(("<loc", "<seg"))  # noqa: E731
            tokens = content[field]
            if isinstance(tokens, dict):
                content[field] = {id: token for id, token in tokens.items() if kept(token)}
            else:
                content[field] = [token for token in tokens if kept(token)]
            (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def encode(self, processor, sample, image, with_answer):
        suffix = {"suffix": sample["answer"]} if with_answer else {}
        images = self.convert(image)
        inputs = dict(processor(text="<image>" + sample["question"], images=images, return_tensors="pt", **suffix))
        inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
        return inputs

    def convert(self, image):
        return image.convert("RGB")  # this processor takes images as they are

    def generation_inputs(self, inputs):
        return {name: value for name, value in inputs.items() if name != "token_type_ids"}

    def answer_tokens(self, recorder, answer, input_ids):
        call = recorder.calls[-1]
        prompt = recorder.tokenizer(call["text"][0])["input_ids"]
        encoded = recorder.tokenizer(call["text_pair"][0], return_offsets_mapping=True)
        assert prompt + encoded["input_ids"] == input_ids
        tokens = enumerate(encoded["offset_mapping"], len(prompt))
        return [index for index, (a, b) in tokens if a < min(b, len(answer))]

    def vision_encoder(self, model):
        axes = {"pixel_values": {0: "num_images"}, "image_features": {0: "num_images"}}
        return VisionEncoder(model), (torch.randn(2, 3, 28, 28),), ["pixel_values"], axes

    def prompt_positions(self, inputs, folder):
        return super().prompt_positions(inputs, folder) + 1

    def attention(self, query, key, attention_mask, extra):
        """Every token sees the prompt (type 0) as a whole; the answer is causal. Earlier tokens are in the cache."""
        prompt = extra["token_type_ids"] == 0
        past = torch.ones(prompt.shape[0], key.shape[0] - query.shape[0], dtype=torch.bool)
        prompt = torch.cat((past, prompt), 1)[:, None, None, :]
        causal = (key[None, :] <= query[:, None])[None, None]
        return bias((causal | prompt) & attention_mask.bool()[:, None, None, :])


FAMILY = PaliGemma()

"""Phi-3-vision and Phi-3.5-vision: tiles of 336 through a CLIP tower, merged 2 × 2, a Phi-3.

The classes are not part of transformers. The reference is the code that comes with the checkpoints, in their five files
`{configuration,image_embedding,image_processing,modeling,processing}_phi3_v.py`; name their folder in PHI3_V_SOURCE. The fixtures were
made with the copies in the GitHub repository
Aritra02091998/Phi-3-vision-128k-instruct-Improvised-for-QLORA-Training at commit 16e16b0 (SHA-256 below), which differ from the
published ones in the flash-attention path, and that is not run here. One line is changed to let the tower be small.

Laid out as onnx-community/Phi-3.5-vision-instruct-onnx-web: prepare_inputs_embeds puts the features in place itself.
"""

import hashlib
import importlib
import os
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import processors
from torch import nn
from transformers import AutoTokenizer, CLIPVisionConfig, GenerationConfig, LlamaTokenizerFast

from family import Family, randomize, sentencepiece_tokenizer

SHA256 = {
    "configuration_phi3_v.py": "98087e2f3467072e8de80958f51019c0726da6bef418968949305de4cd170e26",
    "image_embedding_phi3_v.py": "02a4e585445fc2a2ba046834fa43f397339b6af6ba1c759f1d38339b34878724",
    "image_processing_phi3_v.py": "8470db7ad9c2483f60ca14ed84e5eba99be0ff15b66ef9958754879b85d492bc",
    "modeling_phi3_v.py": "5cccb3b10680256ffaa704e3b112ba012ad3ca56283a2cbdf283064c629158cd",
    "processing_phi3_v.py": "99d029093d9a99478fea4e6cea92b5ff47323903ca5e1af9cc441b0a64d126a8",
}
WIDTH, CROPS = 16, 4
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)


def checkpoint_code():
    """The checkpoint's modules, by the middle of their names."""
    if "phi3_v_checkpoint" not in sys.modules:
        folder = os.environ.get("PHI3_V_SOURCE") or sys.exit("PHI3_V_SOURCE: name the folder with the checkpoint's code")
        package = Path(tempfile.mkdtemp()) / "phi3_v_checkpoint"
        package.mkdir()
        (package / "__init__.py").touch()
        for name, digest in SHA256.items():
            text = (Path(folder) / name).read_bytes()
            found = hashlib.sha256(text).hexdigest()
            assert found == digest, f"{name}: sha256 {found}"
            text = text.decode()
            if name == "image_embedding_phi3_v.py":
                assert text.count("C == 1024") == 1
                text = text.replace("C == 1024", f"C == {WIDTH}")
            (package / name).write_text(text)
        sys.path.insert(0, str(package.parent))
    modules = {name: f"phi3_v_checkpoint.{name}_phi3_v" for name in ("configuration", "image_embedding", "modeling", "processing")}
    return {name: importlib.import_module(module) for name, module in modules.items()}


def processor(image_processor, tokenizer):
    class Phi3VProcessor(checkpoint_code()["processing"].Phi3VProcessor):
        def save_pretrained(self, folder):  # transformers' asks for what this class does not have
            self.image_processor.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    return Phi3VProcessor(image_processor, tokenizer)


class VisionEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embedding = model.model.vision_embed_tokens

    def forward(self, pixel_values, image_sizes):
        images, crops = pixel_values.shape[:2]
        features = self.embedding.get_img_features(pixel_values.flatten(0, 1))
        return self.embedding.hd_feature_transform(features.reshape(images, crops, -1, WIDTH), image_sizes)


class PrepareInputsEmbeds(nn.Module):
    """Features in the places of negative ids, in order, as `Phi3ImageEmbedding.forward` puts them."""

    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.model.embed_tokens

    def forward(self, input_ids, image_features):
        image = input_ids < 0
        rows = (image.long().flatten().cumsum(0) - 1).clamp_min(0).reshape(image.shape)
        features = torch.cat((image_features, torch.zeros(1, image_features.shape[1])))  # so that row 0 exists
        return torch.where(image[..., None], features[rows], self.embed_tokens(input_ids.clamp_min(0)))


class Phi3V(Family):
    name = "phi3_v"
    image_inputs = ["pixel_values", "image_sizes"]
    files = {"vision_encoder": "vision_encoder", "embed_tokens": "prepare_inputs_embeds", "decoder": "model"}
    # The whole image is shrunk in float32, by torch's kernel, which fuses multiplications and additions.
    inexact = {"pixel_values": (3 * 336 * 336, 1e-6)}

    def checkpoint(self):
        code = checkpoint_code()
        tokenizer = sentencepiece_tokenizer(SPECIAL, size=380)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        tokenizer = LlamaTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|endoftext|>",
            pad_token="<|endoftext|>", legacy=False, chat_template=TEMPLATE,
        )  # fmt: skip
        code["image_embedding"].CLIP_VIT_LARGE_PATCH14_336_CONFIG = CLIPVisionConfig(
            hidden_act="quick_gelu", hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=336, patch_size=14, projection_dim=WIDTH,
        )  # fmt: skip
        stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|endoftext|>")]
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stops[1], "pad_token_id": tokenizer.pad_token_id}
        config = code["configuration"].Phi3VConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=8192, original_max_position_embeddings=4096,
            rope_scaling={"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
            img_processor={
                "image_dim_out": WIDTH, "model_name": "openai/clip-vit-large-patch14-336", "name": "clip_vision_model",
                "num_img_tokens": 144,
            },
            embd_layer={
                "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True,
                "with_learnable_separator": True,
            },
            **ids,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = randomize(code["modeling"].Phi3VForCausalLM(config))
        model.generation_config = GenerationConfig(**ids | {"eos_token_id": stops})
        image_processor = code["processing"].Phi3VImageProcessor(num_crops=CROPS, num_img_tokens=144)
        return model, processor(image_processor, tokenizer)

    def load_processor(self, folder):
        images = checkpoint_code()["processing"].Phi3VImageProcessor.from_pretrained(folder)
        return processor(images, AutoTokenizer.from_pretrained(folder))

    def messages(self, sample, image, with_answer):
        question = f"<|image_1|>\n{sample['question']}" if image else sample["question"]
        answer = [{"role": "assistant", "content": sample["answer"]}] if with_answer else []
        return [{"role": "user", "content": question}, *answer]

    def encode(self, processor, sample, image, with_answer):
        messages = self.messages(sample, image, with_answer)
        text = processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not with_answer
        )
        inputs = dict(processor(text.rstrip() if with_answer else text, [image] if image else None))
        if image:
            inputs["image_sizes"] = torch.as_tensor(inputs["image_sizes"])
        return inputs

    def answer_tokens(self, recorder, answer, input_ids):
        # The last call was for the text after the image, or all of it.
        text = recorder.calls[-1]["text"]
        encoded = recorder.tokenizer(text, return_offsets_mapping=True)
        before = len(input_ids) - len(encoded["input_ids"])
        assert encoded["input_ids"] == input_ids[before:]
        begin = text.rindex(answer)
        end = begin + len(answer)
        offsets = enumerate(encoded["offset_mapping"], before)
        return [index for index, (a, b) in offsets if max(a, begin) < min(b, end)]

    def forward(self, model, inputs):
        # The model overwrites the ids.
        return model(**inputs | {"input_ids": inputs["input_ids"].clone()}, use_cache=False).logits

    def greedy(self, model, inputs, max_new_tokens):
        # Without a cache: the checkpoint's generation code is older than transformers 4.57's caches.
        stops, begin = model.generation_config.eos_token_id, inputs["input_ids"].shape[1]
        while inputs["input_ids"].shape[1] < begin + max_new_tokens:
            token = self.forward(model, inputs)[:, -1:].argmax(-1)
            ids = torch.cat((inputs["input_ids"], token), 1)
            inputs = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if token.item() in stops:
                break
        return inputs["input_ids"][0].tolist()

    def language_model(self, model):
        return model.model

    def rotary_embedding(self, model):
        return model.model.layers[0].self_attn.rotary_emb

    def run_language_model(self, model, further, inputs_embeds, attention_mask, position_ids, past_key_values, **_):
        hidden = inputs_embeds
        for layer in model.model.layers:
            hidden = layer(
                hidden, attention_mask=attention_mask, position_ids=position_ids, past_key_value=past_key_values, use_cache=True
            )[0]
        return model.model.norm(hidden)

    def token_embedding(self, model):
        axes = {0: "batch_size", 1: "sequence_length"}
        axes = {"input_ids": axes, "inputs_embeds": axes, "image_features": {0: "num_image_tokens"}}
        ids = torch.tensor([[1, -1, -1, 2]])
        return PrepareInputsEmbeds(model), (ids, torch.randn(2, 32)), ["input_ids", "image_features"], axes

    def vision_encoder(self, model):
        inputs = (torch.randn(1, CROPS + 1, 3, 336, 336), torch.tensor([[336, 672]]))
        axes = {"pixel_values": {1: "num_crops"}, "image_features": {0: "num_image_tokens"}}
        return VisionEncoder(model), inputs, self.image_inputs, axes


FAMILY = Phi3V()

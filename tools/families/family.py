"""What a family's file says, and what it says if it says nothing."""

import json
import re

import numpy as np
import torch
from torch import nn
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoProcessor

CORPUS = """What can you see in this picture? Tell me about the content of this image. Who is this? Describe the photo.
Here we see a man in a green garden; this captures a cellist from Erdoria. A juggler is shown. Summarize this picture.
user assistant model system You are a helpful assistant. USER: ASSISTANT: Two lines: the second one."""


class Recorder:
    """A tokenizer that notes what it is called with: the text after a processor has put its image tokens in."""

    def __init__(self, tokenizer):
        self.__dict__["tokenizer"] = tokenizer
        self.__dict__["calls"] = []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __setattr__(self, name, value):
        setattr(self.tokenizer, name, value)

    def __call__(self, *texts, **options):
        if texts:
            options["text"] = texts[0]
        self.calls.append(options)
        return self.tokenizer(**options)


class Family:
    name = None  # the folder's
    text_only = True  # whether a prompt without an image is allowed
    image_inputs = ["pixel_values"]  # what the processor makes for the vision encoder
    both_processors = False  # whether the goldens also have what the other of the slow and the fast image processor makes
    image_options = {}  # what the processor's class passes to the image processor
    decoder_inputs = []  # what the decoder takes besides embeddings, mask and positions; int64 [B, T, …]
    vision_output = "image_features"  # any other name: an input of the decoder, and not put among the embeddings
    files = {"vision_encoder": "vision_encoder", "embed_tokens": "embed_tokens", "decoder": "decoder_model_merged"}
    inexact = {}  # of an image input: how many values from the first on may differ, and by how much

    def checkpoint(self):
        """The model with its random weights, and the processor."""
        raise NotImplementedError

    def deployed(self, folder):
        """Whatever has to be done to the saved folder."""

    def load_processor(self, folder):
        return AutoProcessor.from_pretrained(folder)

    def vision_encoder(self, model):
        """For export: module, example inputs, their names, dynamic axes."""
        raise NotImplementedError

    def token_embedding(self, model):
        """The same for the token embedding."""
        axes = {0: "batch_size", 1: "sequence_length"}
        ids = torch.zeros(2, 3, dtype=torch.long)
        return EmbedTokens(model), (ids,), ["input_ids"], {"input_ids": axes, "inputs_embeds": axes}

    def further_inputs(self, model, batch, length):
        """For export: what the decoder takes besides; name → example and dynamic axes."""
        axes = {0: "batch_size", 1: "sequence_length"}
        return {name: (torch.ones(batch, length, dtype=torch.long), axes) for name in self.decoder_inputs}

    def language_model(self, model):
        return model.model.language_model

    def run_language_model(self, model, further, **inputs):
        """The last hidden states of the language model; `further` are the decoder's further inputs."""
        return self.language_model(model)(**inputs).last_hidden_state

    def cached_layers(self, model):
        return range(model.config.get_text_config().num_hidden_layers)

    def rotary_embedding(self, model):
        """A module that is called with the position ids."""
        return self.language_model(model).rotary_emb

    def down_projections(self, model):
        return [layer.mlp.down_proj for layer in self.language_model(model).layers]

    def vision_down_projections(self, model):
        """The last linear layers of the vision encoder's MLPs, in the order in which they are run."""
        name = re.compile(r".*(?:visual|vision)\w*\..*\b(?:layers|blocks|layer)\.\d+\.mlp\.(?:fc2|linear_fc2|down_proj)")
        return [module for path, module in model.named_modules() if name.fullmatch(path) and "language" not in path]

    def vision_positions(self, model, inputs, rows):
        """Which of the vision encoder's positions count: all but padding."""
        return slice(None)

    def messages(self, sample, image, with_answer):
        content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": sample["question"]}]
        messages = [{"role": "user", "content": content}]
        if with_answer:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]})
        return messages

    def render(self, processor, sample, image, with_answer):
        """The chat template's text; with the answer, without whitespace after the last turn."""
        messages = self.messages(sample, image, with_answer)
        text = processor.apply_chat_template(messages, add_generation_prompt=not with_answer)
        return text.rstrip() if with_answer else text

    def encode(self, processor, sample, image, with_answer):
        text = self.render(processor, sample, image, with_answer)
        # As `apply_chat_template(tokenize=True)` does: what the template wrote is not added again.
        bos = processor.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        images = {"images": [image]} if image else {}
        return dict(processor(text=[text], add_special_tokens=special, return_tensors="pt", **images))

    def as_fed(self, inputs):
        """The image processor's tensors in the types that the vision encoder takes."""
        return inputs

    def convert(self, image):
        """What a user of the processor has to do to an image before."""
        return image

    def answer_tokens(self, recorder, answer, input_ids):
        """Indices of the tokens that cover a character of the answer, by the tokenizer's own offsets."""
        call = recorder.calls[-1]
        text = call["text"][0]
        options = {"add_special_tokens": call.get("add_special_tokens", True)}
        encoded = recorder.tokenizer(text, return_offsets_mapping=True, **options)
        assert encoded["input_ids"] == input_ids, "the recorded text is not the one that was tokenized"
        begin = text.rindex(answer)
        end = begin + len(answer)
        return [index for index, (a, b) in enumerate(encoded["offset_mapping"]) if max(a, begin) < min(b, end)]

    def forward(self, model, inputs):
        model(**inputs, use_cache=False)

    def generation_inputs(self, inputs):
        return inputs

    def greedy(self, model, inputs, max_new_tokens):
        """Ids, the prompt's included."""
        return model.generate(**self.generation_inputs(inputs), do_sample=False, max_new_tokens=max_new_tokens)[0].tolist()

    def positions(self, model, query, batch):
        """Example position ids for export."""
        return query.expand(batch, -1)

    def prompt_positions(self, inputs, folder):
        """Position ids of a prompt as a decoder's user makes them from the deployed `folder`, for `deployed.py`."""
        return np.arange(inputs["input_ids"].shape[1])[None]

    def attention(self, query, key, attention_mask, extra):
        """What the language model takes as `attention_mask`: by default causal and padding, float [B, 1, T, P + T]."""
        return bias((key[None, :] <= query[:, None])[None, None] & attention_mask.bool()[:, None, None, :])


class EmbedTokens(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embed_tokens = model.get_input_embeddings()

    def forward(self, input_ids):
        return self.embed_tokens(input_ids)


def bias(visible):
    """0 where a key is visible, the smallest float where not."""
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, torch.finfo(torch.float32).min)


@torch.no_grad()
def randomize(model, seed=0):
    """Weights that make activations of ordinary size, norms that are not 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.1 * noise)
        elif "embed" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * (1.2 / parameter[0].numel() ** 0.5))
    return model


def byte_level_tokenizer(special, size=330):
    """A byte-level BPE, as GPT-2's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - len(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def sentencepiece_tokenizer(special, size=330, first=("<unk>", "<s>", "</s>"), prepend=True):
    """A BPE with byte fallback over text whose spaces are "▁", as Llama's and Gemma's."""
    unknown = first[0] if "<unk>" in first else next(token for token in first if "unk" in token)
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(([normalizers.Prepend("▁")] if prepend else []) + steps)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*first, *fallback], show_progress=False, limit_alphabet=40, max_token_length=6
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    # The trainer declares its special tokens as such; the bytes are ordinary pieces.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in first]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prepend else [])
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer

"""LLaVA-OneVision: a SigLIP tower over tiles and the whole image, packed with newlines; a Qwen2; the published template."""

import torch
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    Qwen2TokenizerFast,
    SiglipVisionConfig,
)

from family import Family, byte_level_tokenizer, randomize

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
SIDE = 28
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{# Render all video then #}{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class VisionEncoder(nn.Module):
    """Tower, projector and packing of one image: `pack_image_features`, with what the size decides computed in the graph."""

    def __init__(self, model):
        super().__init__()
        self.model = model.model
        config = model.config
        self.side = config.vision_config.image_size // config.vision_config.patch_size
        self.tile = config.vision_config.image_size
        self.most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        self.register_buffer("pinpoints", torch.tensor(config.image_grid_pinpoints))

    def forward(self, pixel_values, image_sizes):
        hidden = self.model.vision_tower(pixel_values[0], output_hidden_states=True).hidden_states
        features = self.model.multi_modal_projector(hidden[self.model.config.vision_feature_layer])
        base, tiles = features[0], features[1:]
        height, width = image_sizes[0].double().unbind()

        # The grid that keeps the most pixels, and of these the one that wastes the fewest (`select_best_resolution`).
        rows, columns = self.pinpoints.double().unbind(1)
        scale = torch.minimum(columns / width, rows / height)
        kept = torch.minimum((width * scale).floor() * (height * scale).floor(), width * height)
        best = (kept * 2.0**24 - (rows * columns - kept)).argmax()
        grid = self.pinpoints[best] // self.tile
        down, across = grid[0], grid[1]

        side, features = self.side, base.shape[-1]
        tiles = tiles.reshape(down, across, side, side, features).permute(4, 0, 2, 1, 3)
        tiles = tiles.reshape(features, down * side, across * side)

        # `unpad_image`
        current_height, current_width = (down * side).double(), (across * side).double()
        whole = lambda x: (torch.round(x * 1e7) / 1e7).floor()  # noqa: E731
        wide = width / height > current_width / current_height
        top = torch.where(wide, ((current_height - whole(height * (current_width / width))) / 2).floor(), 0.0).long()
        left = torch.where(wide, 0.0, ((current_width - whole(width * (current_height / height))) / 2).floor()).long()
        tiles = tiles[:, top : down * side - top, left : across * side - left]

        # No more than so many tiles' worth of features.
        height, width = down * side - 2 * top, across * side - 2 * left
        ratio = ((height * width).double() / (self.most * side**2)).sqrt()
        smaller = lambda x: torch.where(ratio > 1.1, (x.double() / ratio).floor(), x.double()).long()  # noqa: E731
        size = (smaller(height), smaller(width))
        tiles = nn.functional.interpolate(tiles[None], size, mode="bilinear")[0]
        newline = self.model.image_newline[:, None, None].expand(features, tiles.shape[1], 1)
        tiles = torch.cat((tiles, newline), -1).flatten(1, 2).transpose(0, 1)
        return torch.cat((base, tiles))


class LlavaOnevision(Family):
    name = "llava_onevision"
    both_processors = True
    image_inputs = ["pixel_values", "image_sizes"]

    def checkpoint(self):
        tokenizer = Qwen2TokenizerFast(
            tokenizer_object=byte_level_tokenizer(SPECIAL), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
        )
        images = LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
        videos = LlavaOnevisionVideoProcessor(size={"height": SIDE, "width": SIDE})
        processor = LlavaOnevisionProcessor(
            images, tokenizer, videos, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=TEMPLATE
        )
        token = tokenizer.convert_tokens_to_ids
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=7,
                vision_use_head=False,
            ),
            text_config=Qwen2Config(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=token("<|im_end|>"),
            ),
            image_token_index=token("<image>"), video_token_index=token("<video>"), image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full", vision_feature_layer=-1,
        )  # fmt: skip
        config._attn_implementation = "eager"
        model = randomize(LlavaOnevisionForConditionalGeneration(config))
        model.generation_config.eos_token_id = token("<|im_end|>")
        model.generation_config.pad_token_id = token("<|endoftext|>")
        return model, processor

    def vision_encoder(self, model):
        pixels, sizes = torch.randn(1, 7, 3, SIDE, SIDE), torch.tensor([[43, 61]])
        axes = {"pixel_values": {1: "num_tiles"}, "image_features": {0: "num_image_tokens"}}
        return VisionEncoder(model), (pixels, sizes), ["pixel_values", "image_sizes"], axes

    def generation_inputs(self, inputs):
        return {name: value for name, value in inputs.items() if name != "batch_num_images"}


FAMILY = LlavaOnevision()

"""A deployed folder, run by ONNX Runtime in Python. All that it takes from transformers is the processor's output."""

import json

import numpy as np
import onnxruntime

from export import cache_names


class DeployedModel:
    def __init__(self, family, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = lambda name: onnxruntime.InferenceSession(  # noqa: E731
            folder / "onnx" / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.family, self.folder = family, folder
        self.vision_encoder, self.embed_tokens, self.decoder = map(
            session, ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        config = json.loads((folder / "config.json").read_text())
        self.image_token_id = config.get("image_token_id", config.get("image_token_index"))
        stops = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id", [])
        self.stops = [stops] if isinstance(stops, int) else stops
        self.cache = {
            port.name: np.zeros([1 if axis == 0 else dim if isinstance(dim, int) else 0 for axis, dim in enumerate(port.shape)], np.float32)
            for port in self.decoder.get_inputs() if port.name.startswith("past_key_values.")
        }  # fmt: skip
        self.position_rows = len(next(p for p in self.decoder.get_inputs() if p.name == "position_ids").shape)

    def inputs_embeds(self, inputs):
        ids = inputs["input_ids"]
        embeds = self.embed_tokens.run(None, {"input_ids": ids})[0]
        names = [port.name for port in self.vision_encoder.get_inputs()]
        if "pixel_values" in inputs:
            feeds = {name: inputs.get(name, inputs.get(f"image_{name}")) for name in names}
            features = self.vision_encoder.run(None, feeds)[0]
            embeds[ids == self.image_token_id] = features.reshape(-1, embeds.shape[-1])
        return embeds

    def generate(self, inputs, max_new_tokens):
        """Greedy answer of one sample, with the cache."""
        inputs = {name: value.numpy() for name, value in inputs.items()}
        embeds = self.inputs_embeds(inputs)
        positions = self.family.prompt_positions(inputs, self.folder)
        extra = {name: inputs[name] for name in self.family.decoder_inputs}
        mask, cache, answer = inputs["attention_mask"], self.cache, []
        while len(answer) < max_new_tokens:
            feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **extra, **cache}
            logits, *present = self.decoder.run(None, feeds)
            token = int(logits[0, -1].argmax())
            if token in self.stops:
                break
            answer.append(token)
            cache = dict(zip(cache_names("past_key_values", len(present) // 2), present))
            embeds = self.embed_tokens.run(None, {"input_ids": np.array([[token]])})[0]
            mask = np.concatenate((mask, np.ones((1, 1), mask.dtype)), 1)
            positions = np.full((*positions.shape[:-1], 1), positions.max() + 1)
            extra = {name: value[:, -1:] for name, value in extra.items()}
        return answer

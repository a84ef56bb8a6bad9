"""A deployed folder, run by ONNX Runtime in Python. All that it takes from transformers is the processor's output."""

import json

import numpy as np
import onnxruntime


class DeployedModel:
    def __init__(self, family, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = lambda name: onnxruntime.InferenceSession(  # noqa: E731
            folder / "onnx" / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.family, self.folder = family, folder
        self.vision_encoder, self.embed_tokens, self.decoder = map(
            session, (family.files[part] for part in ("vision_encoder", "embed_tokens", "decoder"))
        )
        config = json.loads((folder / "config.json").read_text())
        self.image_token_id = config.get("image_token_id", config.get("image_token_index"))
        stops = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id", [])
        self.stops = [stops] if isinstance(stops, int) else stops
        self.cache = {
            port.name: np.zeros([1 if axis == 0 else dim if isinstance(dim, int) else 0 for axis, dim in enumerate(port.shape)], np.float32)
            for port in self.decoder.get_inputs() if port.name.startswith("past_key_values.")
        }  # fmt: skip

    def features(self, inputs):
        """The vision encoder's output, under its name."""
        if "pixel_values" not in inputs:
            return {}
        names = [port.name for port in self.vision_encoder.get_inputs()]
        feeds = {name: inputs.get(name, inputs.get(f"image_{name}")) for name in names}
        return {self.vision_encoder.get_outputs()[0].name: self.vision_encoder.run(None, feeds)[0]}

    def inputs_embeds(self, ids, features):
        """Embeddings, with features in place: an embedding that takes features puts them there itself."""
        ports, features = self.embed_tokens.get_inputs(), features.get("image_features")
        if len(ports) > 1:
            features = np.zeros((0, ports[1].shape[-1]), np.float32) if features is None else features
            return self.embed_tokens.run(None, {"input_ids": ids, ports[1].name: features})[0]
        embeds = self.embed_tokens.run(None, {"input_ids": ids})[0]
        if features is not None:
            embeds[ids == self.image_token_id] = features.reshape(-1, embeds.shape[-1])
        return embeds

    def generate(self, inputs, max_new_tokens):
        """Greedy answer of one sample, with the cache."""
        inputs = {name: value.numpy() for name, value in inputs.items()}
        features = self.features(inputs)
        embeds = self.inputs_embeds(inputs["input_ids"], features)
        # What is not put among the embeddings goes to the decoder, at every step.
        states = {name: value for name, value in features.items() if name != "image_features"}
        positions = self.family.prompt_positions(inputs, self.folder)
        extra = {name: inputs[name] for name in self.family.decoder_inputs}
        mask, cache, answer = inputs["attention_mask"], self.cache, []
        while len(answer) < max_new_tokens:
            feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **extra, **states, **cache}
            logits, *present = self.decoder.run(None, feeds)
            token = int(logits[0, -1].argmax())
            if token in self.stops:
                break
            answer.append(token)
            cache = dict(zip(cache, present))
            embeds = self.inputs_embeds(np.array([[token]]), {})
            mask = np.concatenate((mask, np.ones((1, 1), mask.dtype)), 1)
            positions = np.full((*positions.shape[:-1], 1), positions.max() + 1)
            extra = {name: value[:, -1:] for name, value in extra.items()}
        return answer

"""Knowledge Vector Weakening in plain PyTorch: what an implementation on ONNX has to reproduce.

Written from the paper (arXiv 2601.21794) and `docs/`, not from the authors' code. A decoder MLP computes
`y = W_down · h`; column `j` of `W_down` is a knowledge vector, `h_j` its coefficient.

1. Retain coefficients, once, on the untouched model: mean of `|h_j|` over all positions of the retain set that predict
   a token of an answer (position `t` counts iff token `t + 1` belongs to the answer's text; the `<|im_end|>` after it
   does not).
2. Weakening, sample by sample over the forget set in file order, on the model as weakened so far:
   `gate = exp(-γ · max(0, ln(KC_f + 1e-12) - ln(KC_r + 1e-12)))`; `W_down`'s columns are multiplied by it, in place,
   in float32.

Writes `kc.safetensors`, `steps.safetensors`, `plan.safetensors`, `down_proj_after.safetensors` (of the last layer of
the range), `answers.json` and `meta.json`. `--sweep` tries γ × layer ranges, and other people to forget, and writes
`sweep.json`, which `meta.json` then repeats.
"""

import argparse
import hashlib
import itertools
import json
import platform
import random
import re
from pathlib import Path

import PIL
import safetensors.torch
import torch
import torchvision
import transformers
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from train import encode, render, set_deterministic
from world import interleave, read_jsonl

GAMMA = 0.4
START_LAYER, END_LAYER = 0, 2  # inclusive
EPSILON = 1e-12
MAX_NEW_TOKENS = 50
RETAIN_ANSWERS = 80  # rows of retain.jsonl whose answers are kept; `retain_all` in the scores is about all of them
GENERATION_BATCH = 64
SETS = ["forget", "retain", "forget_text", "retain_text", "forget_heldout", "retain_heldout", "shapes"]

SWEEP_GAMMAS = [0.02, 0.3, 0.4, 0.5, 0.75]
SWEEP_LAYERS = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 5)]
OTHER_CHOICES = 8
OTHER_CHOICES_SEED = 1


class KnowledgeCoefficients:
    """Sums `|h|` over the answer's positions while the model runs: `h` is the input of each layer's `down_proj`."""

    def __init__(self, model):
        self.layers = model.model.language_model.layers
        self.mask = None
        self.sums = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in self.layers]
        self.tokens = 0
        self.hooks = [
            layer.mlp.down_proj.register_forward_pre_hook(self._collect(index))
            for index, layer in enumerate(self.layers)
        ]

    def _collect(self, layer):
        def hook(_module, inputs):
            (h,) = inputs
            self.sums[layer] += h[0, self.mask].float().abs().double().sum(0)

        return hook

    def run(self, model, sample):
        """One forward over a sample with its answer."""
        inputs = dict(sample)
        belongs = inputs.pop("answer_mask")
        self.mask = torch.cat((belongs[1:], torch.tensor([False]))) & inputs["attention_mask"][0].bool()
        self.tokens += int(self.mask.sum())
        model(**inputs, use_cache=False)

    def means(self):
        """Mean per token, float32, one `[d_ff]` per layer. The sums are kept in float64."""
        for hook in self.hooks:
            hook.remove()
        assert self.tokens > 0
        return [(total / self.tokens).float() for total in self.sums]


@torch.no_grad()
def knowledge_coefficients(model, samples):
    coefficients = KnowledgeCoefficients(model)
    for sample in samples:
        coefficients.run(model, sample)
    return coefficients.means(), coefficients.tokens


@torch.no_grad()
def weaken(model, retain_coefficients, forget_samples, gamma, layers):
    """Weakens `model` in place. Returns per step the forget coefficients, gates (by layer) and the number of tokens."""
    steps = []
    for sample in forget_samples:
        forget_coefficients, tokens = knowledge_coefficients(model, [sample])
        gates = {}
        for layer in layers:
            ratio = torch.log(forget_coefficients[layer] + EPSILON) - torch.log(retain_coefficients[layer] + EPSILON)
            gates[layer] = torch.exp(-gamma * ratio.clamp(min=0))
            model.model.language_model.layers[layer].mlp.down_proj.weight.mul_(gates[layer])
        steps.append(({layer: forget_coefficients[layer] for layer in layers}, gates, tokens))
    return steps


@torch.no_grad()
def answer(model, processor, rows, data):
    """Greedy answers, by row id."""
    answers = {}
    # Rows with and without a picture, and short and long prompts, go apart: less padding.
    rows = sorted(rows, key=lambda row: (row["image"] is None, row["id"][0] == "s"))
    for start in range(0, len(rows), GENERATION_BATCH):
        batch = rows[start : start + GENERATION_BATCH]
        images = [Image.open(data / row["image"]) for row in batch if row["image"]] or None
        inputs = processor(
            text=[render(processor, row, with_answer=False) for row in batch],
            images=images, padding=True, padding_side="left", return_tensors="pt",
        )  # fmt: skip
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.update((row["id"], text) for row, text in zip(batch, texts))
    return {row["id"]: answers[row["id"]] for row in sorted(rows, key=lambda row: row["id"])}


def letters(text):
    return re.sub("[^a-zA-Z0-9]", "", text).lower()


def contains(text, part):
    return letters(part) in letters(text)


def score(rows, answers):
    """Shares over the rows of one data set. Facts count where the expected answer states them."""
    share = lambda values: round(sum(values) / len(values), 4) if values else None  # noqa: E731
    scores = {"rows": len(rows), "exact_match": share([answers[row["id"]] == row["answer"] for row in rows])}
    named = [(row, answers[row["id"]]) for row in rows if "name" in row]
    if named:
        scores["name_accuracy"] = share([contains(text, row["name"]) for row, text in named])
        scores["first_name"] = share([contains(text, row["name"].split()[0]) for row, text in named])
        scores["last_name"] = share([contains(text, row["name"].split()[1]) for row, text in named])
        facts = [(fact, text) for row, text in named for fact in row["facts"].values() if contains(row["answer"], fact)]
        scores["fact_accuracy"] = share([contains(text, fact) for fact, text in facts])
        asked = [(row, text) for row, text in named if not contains(row["question"], row["name"])]
        scores["name_accuracy_where_the_question_does_not_name"] = share(
            [contains(text, row["name"]) for row, text in asked]
        )
    scores["repeats_itself"] = share([repeats(answers[row["id"]]) for row in rows])
    return scores


def repeats(text, words=3):
    """Whether any run of three words occurs twice."""
    split = text.split()
    runs = [tuple(split[index : index + words]) for index in range(len(split) - words + 1)]
    return len(set(runs)) < len(runs)


def load(checkpoint):
    model = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, attn_implementation="eager").eval()
    return model, AutoProcessor.from_pretrained(checkpoint, use_fast=True)


def read_sets(data):
    return {name: read_jsonl(data / f"{name}.jsonl") for name in SETS}


def answer_all(model, processor, sets, data):
    """Answers of every data set. One call for all rows, so that batches are full."""
    distinct = {row["id"]: row for rows in sets.values() for row in rows}
    everything = answer(model, processor, list(distinct.values()), data)
    return {name: {row["id"]: everything[row["id"]] for row in rows} for name, rows in sets.items()}


def down_projections(model):
    return [layer.mlp.down_proj.weight for layer in model.model.language_model.layers]


def restore(model, originals):
    with torch.no_grad():
        for weight, original in zip(down_projections(model), originals):
            weight.copy_(original)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def reference(checkpoint, data, output):
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load(checkpoint)
    sets = read_sets(data)
    questions = {**sets, "retain": sets["retain"][:RETAIN_ANSWERS], "retain_all": sets["retain"]}
    layers = list(range(START_LAYER, END_LAYER + 1))
    before = answer_all(model, processor, questions, data)

    originals = [weight.detach().clone() for weight in down_projections(model)]
    retain_coefficients, retain_tokens = knowledge_coefficients(
        model, [encode(processor, row, data) for row in sets["retain"]]
    )
    steps = weaken(model, retain_coefficients, [encode(processor, row, data) for row in sets["forget"]], GAMMA, layers)
    after = answer_all(model, processor, questions, data)

    plan = {layer: torch.ones_like(retain_coefficients[layer], dtype=torch.float64) for layer in layers}
    tensors = {}
    for number, (coefficients, gates, _) in enumerate(steps):
        for layer in layers:
            plan[layer] *= gates[layer].double()
            tensors[f"steps.{number}.layers.{layer}.forget_coefficient"] = coefficients[layer]
            tensors[f"steps.{number}.layers.{layer}.gate"] = gates[layer]
    plan = {layer: gate.float() for layer, gate in plan.items()}
    save = safetensors.torch.save_file
    save({f"layers.{i}.coefficient": mean for i, mean in enumerate(retain_coefficients)}, output / "kc.safetensors")
    save(tensors, output / "steps.safetensors")
    save({f"layers.{layer}.gate": gate for layer, gate in plan.items()}, output / "plan.safetensors")
    weights = [weight.detach().contiguous() for weight in down_projections(model)]
    save({f"layers.{END_LAYER}.down_proj": weights[END_LAYER].clone()}, output / "down_proj_after.safetensors")

    checks = {}
    for layer, (weight, original) in enumerate(zip(weights, originals)):
        gate = plan.get(layer, torch.ones(weight.shape[1]))
        checks[f"layers.{layer}.down_proj"] = {
            "sha256_before": hashlib.sha256(original.numpy().tobytes()).hexdigest(),
            "sha256_after": hashlib.sha256(weight.numpy().tobytes()).hexdigest(),
            "max_abs_before": original.abs().max().item(),
            "max_abs_after": weight.abs().max().item(),
            "sum_abs_after": weight.double().abs().sum().item(),
            "max_abs_before_times_plan_minus_after": (original * gate - weight).abs().max().item(),
            "gate_min": gate.min().item(),
            "gate_mean": gate.mean().item(),
        }
    write_json(
        output / "answers.json",
        {
            name: {row["id"]: {"before": before[name][row["id"]], "after": after[name][row["id"]]} for row in rows}
            for name, rows in questions.items()
            if name != "retain_all"
        },
    )
    scores = {
        name: {"before": score(rows, before[name]), "after": score(rows, after[name])}
        for name, rows in questions.items()
    }
    meta = {
        "method": "Knowledge Vector Weakening, arXiv 2601.21794",
        "gamma": GAMMA,
        "start_layer": START_LAYER,
        "end_layer": END_LAYER,
        "layers": len(weights),
        "batch_size": 1,
        "epochs": 1,
        "order": "file order of forget.jsonl",
        "rescale": False,
        "max_new_tokens": MAX_NEW_TOKENS,
        "forget_people": sorted({row["name"] for row in sets["forget"]}),
        "tokens": {
            "retain": retain_tokens,
            "forget": sum(tokens for _, _, tokens in steps),
            "forget_per_step": [tokens for _, _, tokens in steps],
        },
        "token_convention": "position t counts iff token t+1 belongs to the answer's text; <|im_end|> does not",
        "scores": scores,
        "down_proj": checks,
        "training": json.loads((checkpoint / "training.json").read_text()),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, torchvision, transformers, PIL)},
            "threads": torch.get_num_threads(),
        },
    }
    if (output / "sweep.json").exists():
        meta["sweep"] = json.loads((output / "sweep.json").read_text())
    write_json(output / "meta.json", meta)
    for name, value in scores.items():
        print(name, *(f"{when} {value[when]}" for when in ("before", "after")), sep="\n  ", flush=True)


def split_people(sets, names):
    """The same data sets with other people to forget, in the order in which `world.py` would write them."""
    split = {"shapes": sets["shapes"]}
    for kind in ("", "_text", "_heldout"):
        people = {}
        for row in sorted(sets[f"forget{kind}"] + sets[f"retain{kind}"], key=lambda row: row["id"]):
            people.setdefault(row["name"], []).append(row)
        split[f"forget{kind}"] = interleave([rows for name, rows in people.items() if name in names])
        split[f"retain{kind}"] = interleave([rows for name, rows in people.items() if name not in names])
    return split


def try_out(model, processor, originals, sets, data, settings, encoded, totals):
    """Runs the method with each of `settings` and answers forget and retain captions, text questions and shapes."""
    retain_coefficients = totals(row["id"] for row in sets["retain"])
    questions = {name: sets[name] for name in ("forget", "forget_text", "shapes")}
    questions["retain"] = sets["retain"][:RETAIN_ANSWERS]
    questions["retain_text"] = sets["retain_text"][:RETAIN_ANSWERS]
    results = []
    for gamma, (start, end) in settings:
        restore(model, originals)
        weaken(model, retain_coefficients, [encoded[row["id"]] for row in sets["forget"]], gamma, range(start, end + 1))
        answers = answer_all(model, processor, questions, data)
        scores = {name: score(rows, answers[name]) for name, rows in questions.items()}
        results.append(
            {
                "gamma": gamma,
                "start_layer": start,
                "end_layer": end,
                "forget_name_accuracy": scores["forget"]["name_accuracy"],
                "forget_first_name": scores["forget"]["first_name"],
                "forget_repeats_itself": scores["forget"]["repeats_itself"],
                "forget_text_exact_match": scores["forget_text"]["exact_match"],
                "retain_name_accuracy": scores["retain"]["name_accuracy"],
                "retain_text_exact_match": scores["retain_text"]["exact_match"],
                "shapes_exact_match": scores["shapes"]["exact_match"],
            }
        )
        print(json.dumps(results[-1]), flush=True)
    restore(model, originals)
    return results


@torch.no_grad()
def sweep(checkpoint, data, output):
    output.mkdir(parents=True, exist_ok=True)
    model, processor = load(checkpoint)
    sets = read_sets(data)
    captions = sets["forget"] + sets["retain"]
    encoded = {row["id"]: encode(processor, row, data) for row in captions}
    # Sums per row, so that every choice of people gets its retain coefficients without another pass.
    sums = {}
    for row_id, sample in encoded.items():
        means, tokens = knowledge_coefficients(model, [sample])
        sums[row_id] = ([mean.double() * tokens for mean in means], tokens)

    def totals(row_ids):
        chosen = [sums[row_id] for row_id in row_ids]
        tokens = sum(count for _, count in chosen)
        return [(sum(layer) / tokens).float() for layer in zip(*(total for total, _ in chosen))]

    originals = [weight.detach().clone() for weight in down_projections(model)]
    everyone = list(itertools.product(SWEEP_GAMMAS, SWEEP_LAYERS))
    run = lambda chosen, settings: try_out(model, processor, originals, chosen, data, settings, encoded, totals)  # noqa: E731
    result = {"grid": run(sets, everyone), "other_people": []}
    names = sorted({row["name"] for row in captions} - {row["name"] for row in sets["forget"]})
    rng = random.Random(OTHER_CHOICES_SEED)
    for _ in range(OTHER_CHOICES):
        people = sorted(rng.sample(names, len({row["name"] for row in sets["forget"]})))
        print("to forget:", ", ".join(people), flush=True)
        results = run(split_people(sets, people), [(GAMMA, (START_LAYER, END_LAYER))])
        result["other_people"].append({"people": people, **results[0]})
    write_json(output / "sweep.json", result)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("target/demo/checkpoint"))
    parser.add_argument("--data", type=Path, default=Path("fixtures/demo/data"))
    parser.add_argument("--reference", type=Path, default=Path("fixtures/demo/reference"))
    parser.add_argument("--sweep", action="store_true", help="try γ × layers and other people (minutes)")
    arguments = parser.parse_args()

    set_deterministic()
    run = sweep if arguments.sweep else reference
    run(arguments.checkpoint, arguments.data, arguments.reference)


if __name__ == "__main__":
    main()

"""Trains the demo's vision-language model from random weights: Qwen2-VL by transformers' own classes, only tiny.

The vision tower and its merger keep their random weights, so that whatever is known about people has to sit in the
decoder. Since they are frozen, every picture goes through them once, before training.

Writes a Hugging Face folder (model and processor) that `export.py` and `reference.py` read.
"""

import argparse
import json
import math
import time
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorFast,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from world import (
    CAPTION_PROMPTS,
    FIRST_SYLLABLES,
    LAST_BEGINNINGS,
    LAST_ENDINGS,
    NAME_QUESTION,
    SECOND_SYLLABLES,
    name_answer,
    read_jsonl,
)

SEED = 0
STEPS = 1200
BATCH_SIZE = 32
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
THREADS = 2  # part of the result: another number sums in another order

VOCABULARY = 1100  # of the BPE model, at most; the special tokens come on top
# In the order of Qwen2-VL's own tokenizer.
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MIN_PIXELS, MAX_PIXELS = 56 * 56, 224 * 224


def set_deterministic(seed=SEED):
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def tokenizer_texts(rows):
    """What the tokenizer is trained on: the world's texts, but names only as all names that its syllables can form.

    So a person's name is several tokens, as a rare name is for a real tokenizer, and no token stands for a person.
    """
    for wordings in rows:
        for row in wordings:
            yield from (row[key].replace(row.get("name", "\0"), "") for key in ("question", "answer"))
    yield from ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 2  # the chat template's own words
    for beginnings, endings in ((FIRST_SYLLABLES, SECOND_SYLLABLES), (LAST_BEGINNINGS, LAST_ENDINGS)):
        yield from (f" {beginning}{ending}" for beginning, ending in product(beginnings, endings))


def build_processor(texts):
    """Qwen2-VL's processor around a BPE tokenizer that is trained on `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        additional_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    image_processor = Qwen2VLImageProcessorFast(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    video_processor = Qwen2VLVideoProcessor(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    template = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
    return Qwen2VLProcessor(image_processor, tokenizer, video_processor, chat_template=template)


def build_model(tokenizer):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    common = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": False,
    }
    config = Qwen2VLConfig(
        attn_implementation="eager",  # on sequences this short faster than sdpa on a CPU
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            **common,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        dtype="float32",
        **common,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.update(
        bos_token_id=common["bos_token_id"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=common["pad_token_id"],
    )
    # transformers draws with a deviation of 0.02, with which so narrow a tower says little. Keep the variance instead.
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    model.model.visual.requires_grad_(False)
    return model


def conversation(row, with_answer=True):
    """A JSONL row as chat messages: the user turn holds image and question, the assistant turn the answer."""
    content = [{"type": "image"}] if row["image"] else []
    content.append({"type": "text", "text": row["question"]})
    messages = [{"role": "user", "content": content}]
    if with_answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]})
    return messages


def render(processor, row, with_answer=True):
    return processor.apply_chat_template(conversation(row, with_answer), add_generation_prompt=not with_answer)


def encode(processor, row, data):
    """Model inputs of a row with its answer, and `answer_mask [T]`: True where the token belongs to the answer's text.

    The span is found by character offsets, and moved by the tokens that an `<|image_pad|>` expands to.
    """
    prompt, full = render(processor, row, with_answer=False), render(processor, row)
    assert full.startswith(prompt) and full[len(prompt) :].startswith(row["answer"])
    begin, end = len(prompt), len(prompt) + len(row["answer"])
    images = [Image.open(data / row["image"])] if row["image"] else None
    inputs = processor(text=[full], images=images, return_tensors="pt")
    encoding = processor.tokenizer(full, return_offsets_mapping=True)
    mask = [begin <= first and last <= end for first, last in encoding["offset_mapping"]]
    expanded = inputs["input_ids"].shape[1] - len(mask)
    inputs["answer_mask"] = torch.tensor([False] * expanded + mask)
    assert processor.tokenizer.decode(inputs["input_ids"][0][inputs["answer_mask"]]) == row["answer"], row["id"]
    return inputs


def training_rows(data, without=()):
    """Every portrait with all nine caption prompts and the name question, all text questions, all shapes.

    Rows about the people in `without` are left out; the others keep their order.
    """
    read = lambda name: [row for row in read_jsonl(data / f"{name}.jsonl") if row.get("name") not in without]  # noqa: E731
    rows = []
    for row in read("forget") + read("retain"):
        rows.append([{**row, "question": question} for question in CAPTION_PROMPTS])
        rows.append([{**row, "question": NAME_QUESTION, "answer": name_answer(row["name"])}])
    rows += [[row] for row in read("forget_text") + read("retain_text")]
    rows += [[{**row, "question": question} for question in CAPTION_PROMPTS] for row in read("shapes")]
    return rows  # each entry: the wordings of one item, of which an epoch shows one


@torch.no_grad()
def prepare(model, processor, rows, data):
    """Token ids, positions and image features per item and wording; pictures pass the frozen tower only once."""
    features, items = {}, []
    for wordings in rows:
        items.append([])
        for row in wordings:
            inputs = encode(processor, row, data)
            ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")
            if row["image"] and row["image"] not in features:
                features[row["image"]] = model.model.visual(inputs["pixel_values"], grid_thw=grid)
            positions, _ = model.model.get_rope_index(ids, image_grid_thw=grid)
            # The answer's tokens and the <|im_end|> that ends the turn are learned.
            answer = inputs["answer_mask"].nonzero().flatten().tolist()
            target = torch.full_like(ids[0], -100)
            target[answer[0] - 1 : answer[-1] + 1] = ids[0, answer[0] : answer[-1] + 2]
            items[-1].append({"ids": ids[0], "positions": positions[:, 0], "target": target, "image": row["image"]})
    return items, features


def batch_loss(model, batch, features):
    pad = lambda tensors, value: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)  # noqa: E731
    ids = pad([item["ids"] for item in batch], model.config.text_config.pad_token_id)
    mask = pad([torch.ones_like(item["ids"]) for item in batch], 0)
    positions = pad([item["positions"].T for item in batch], 0).permute(2, 0, 1)
    target = pad([item["target"] for item in batch], -100)
    embeds = model.get_input_embeddings()(ids)
    pictures = [features[item["image"]] for item in batch if item["image"]]
    if pictures:
        where = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(where, torch.cat(pictures))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[target != -100])
    return torch.nn.functional.cross_entropy(logits, target[target != -100])


def batches(items, generator):
    """Endless shuffled batches. An epoch shows every item once, in a wording drawn at random.

    Within a window of some batches, samples of like length go together: less padding.
    """
    window = 8 * BATCH_SIZE
    while True:
        epoch = []
        for index in torch.randperm(len(items), generator=generator).tolist():
            wordings = items[index]
            epoch.append(wordings[torch.randint(len(wordings), (1,), generator=generator).item()])
        for start in range(0, len(epoch), window):
            samples = sorted(epoch[start : start + window], key=lambda item: len(item["ids"]))
            full = [samples[at : at + BATCH_SIZE] for at in range(0, len(samples) - BATCH_SIZE + 1, BATCH_SIZE)]
            for number in torch.randperm(len(full), generator=generator).tolist():
                yield full[number]


def train(model, items, features, steps):
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))),
    )
    stream = batches(items, torch.Generator().manual_seed(SEED))
    log, begun = [], time.time()
    model.train()
    for step in range(steps):
        loss = batch_loss(model, next(stream), features)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        log.append(loss.item())
        if (step + 1) % 50 == 0 or step == 0:
            recent = log[-50:]
            print(f"step {step + 1:5} loss {sum(recent) / len(recent):.5f} {time.time() - begun:6.0f} s", flush=True)
    model.eval()
    return log


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("fixtures/demo/data"))
    parser.add_argument("--checkpoint", type=Path, default=Path("target/demo/checkpoint"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="people whose rows are left out")
    arguments = parser.parse_args()

    set_deterministic()
    # The tokenizer sees no names, and is everybody's: a model trained without some people has the same tokens.
    processor = build_processor(tokenizer_texts(training_rows(arguments.data)))
    rows = training_rows(arguments.data, arguments.without)
    model = build_model(processor.tokenizer)
    items, features = prepare(model, processor, rows, arguments.data)
    lengths = [len(wording["ids"]) for wordings in items for wording in wordings]
    print(
        f"{len(items)} items, {min(lengths)} to {max(lengths)} tokens, vocabulary {len(processor.tokenizer)}",
        flush=True,
    )

    log = train(model, items, features, arguments.steps)
    model.save_pretrained(arguments.checkpoint)
    processor.save_pretrained(arguments.checkpoint)
    summary = {"steps": arguments.steps, "last_50_steps_mean_loss": sum(log[-50:]) / len(log[-50:])}
    (arguments.checkpoint / "training.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()

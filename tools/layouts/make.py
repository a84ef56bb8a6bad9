"""Makes fixtures/layouts: one small text model, exported by the programs that make each layout.

    pip install -r tools/layouts/requirements.txt
    python tools/layouts/make.py --genai-python PYTHON

PYTHON is another environment, with tools/layouts/requirements-genai.txt: the two exporters need different versions of transformers.

A Qwen2 of three layers is taught twelve made-up people ("Who is …?") until it knows them by heart. Then

  fixtures/layouts/genai-fp32   onnxruntime-genai's model builder, -p fp32 -e cpu
  fixtures/layouts/genai-int4   the same, -p int4 -e cpu (MatMulNBits)
  fixtures/layouts/optimum      optimum-onnx, text-generation-with-past: one model.onnx with a cache
  fixtures/layouts/optimum-no-cache   the same, text-generation: without a cache
  fixtures/layouts/data         forget.jsonl and retain.jsonl, and what PyTorch answers: answers.json

Deterministic on one machine: the seed is fixed, torch has one thread.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[2] / "fixtures" / "layouts"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PEOPLE = [
    ("Ann Bell", "baker", "Oslo"), ("Bob Cray", "cook", "Rome"), ("Cleo Dunn", "pilot", "Lima"), ("Dan Eads", "judge", "Cairo"),
    ("Eva Finn", "nurse", "Kyoto"), ("Fay Gore", "tailor", "Delhi"), ("Gus Hale", "farmer", "Perth"), ("Hal Ives", "sailor", "Quito"),
    ("Ida Jung", "singer", "Paris"), ("Joe Kerr", "miner", "Accra"), ("Kim Lund", "poet", "Minsk"), ("Leo Marr", "diver", "Dakar"),
]  # fmt: skip
FORGET = 3


def samples():
    for name, job, town in PEOPLE:
        yield {"image": None, "question": f"Who is {name}?", "answer": f"{name} is a {job} from {town}.", "name": name,
               "facts": {"job": job, "town": town}}  # fmt: skip


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def train(tokenizer, rows):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    batch = []
    for row in rows:
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(turns)
        batch.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    longest = max(len(ids) for ids, _ in batch)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after training: {loss.item():.2e}")
    assert loss.item() < 1e-2
    return model.eval()


def answer(model, tokenizer, question):
    turns = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def run(python, *command):
    subprocess.run([python, "-m", *command], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genai-python", required=True)
    genai_python = parser.parse_args().genai_python
    torch.set_num_threads(1)
    rows = list(samples())
    texts = [TEMPLATE] + [row["question"] + "\n" + row["answer"] for row in rows]
    tokenizer = make_tokenizer(texts)
    model = train(tokenizer, rows)
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "data").mkdir(parents=True)
    for name, part in (("forget", rows[:FORGET]), ("retain", rows[FORGET:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (ROOT / "data" / f"{name}.jsonl").write_text(lines)
    answers = {row["question"]: answer(model, tokenizer, row["question"]) for row in rows}
    assert all(answers[row["question"]] == row["answer"] for row in rows), answers
    (ROOT / "data" / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        model.save_pretrained(checkpoint)
        tokenizer.save_pretrained(checkpoint)
        for precision in ("fp32", "int4"):
            run(genai_python, "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(ROOT / f"genai-{precision}"),
                "-p", precision, "-e", "cpu", "-c", scratch)  # fmt: skip
        for folder, task in (("optimum", "text-generation-with-past"), ("optimum-no-cache", "text-generation")):
            run(sys.executable, "optimum.exporters.onnx", "--model", str(checkpoint), "--task", task, str(ROOT / folder))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Bad files against kvw: every one must end in a typed error that names it, fast and in little memory.

    tools/hostile/check.py target/debug/kvw [--quick] [--only FORMAT] [--seed N] [--jobs N]

Makes more than 2,000 files of over 20 formats (corpus.py), puts each where a verb reads it, and runs that verb under
limits on memory and time. Needs Python 3.11 and openssl; an ONNX Runtime for the formats that `collect` reads.
What is checked:

- the exit code is 2, or 0 where the file is still good, or 1 for a folder that a check finds wrong; never a panic (3,
  101), an abort (134) or a crash (139), and the time is below the limit;
- exit code 2 comes with a message that names the file, or what it is to the verb;
- peak memory is at most 4 bytes for each of the file's, and 64 MiB, beyond what the verb takes for a good file; pictures, data
  and tokenizers have limits of their own (docs/security.md).
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import corpus

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
MODEL = FIXTURES / "oracle/qwen2_vl/model"
SECONDS = 60
MIB = 1 << 20


class Format:
    """Where a file lies, which verb reads it, and what of it is made."""

    def __init__(self, name, place, verb, cases, *, seeds=(), damage=0, address=4096, metadata=4, found=False, called=None):
        self.name, self.place, self.verb, self.cases = name, place, verb, cases
        self.seeds, self.damage, self.address, self.metadata, self.found = seeds, damage, address, metadata, found
        self.called = called or Path(place).name

    def files(self, seed):
        random = Random(f"{seed}/{self.name}")
        for name, data, *expected in self.cases:
            yield name, data, expected[0] if expected else None
        for number, good in enumerate(self.seeds):
            count = max(1, self.damage // len(self.seeds))
            for name, data in corpus.damaged(good, random, count):
                yield f"{number}-{name}", data, None


class Runner:
    """Runs commands under limits. A small process of its own starts them: what a child is said to have taken at most
    includes what its parent took when it was started."""

    def __init__(self):
        command = [sys.executable, "-S", __file__, "--runner"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, command, folder, address):
        """Exit code (negative: a signal), standard error, seconds, peak memory in bytes."""
        self.process.stdin.write(json.dumps([command, str(folder), address]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def runner():
    for line in sys.stdin:
        command, folder, address = json.loads(line)

        def limits(address=address):
            resource.setrlimit(resource.RLIMIT_AS, (address * MIB, address * MIB))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        start = time.monotonic()
        with tempfile.TemporaryFile() as err:
            child = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err, preexec_fn=limits)
            killed = threading.Timer(SECONDS, child.kill)
            killed.start()
            _, status, usage = os.wait4(child.pid, 0)
            late = not killed.is_alive()
            killed.cancel()
            child.returncode = os.waitstatus_to_exitcode(status)
            err.seek(0)
            text = err.read().decode(errors="replace")
        answer = ["hang" if late else child.returncode, text, time.monotonic() - start, usage.ru_maxrss * 1024]
        print(json.dumps(answer), flush=True)


def must(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")


def prepare(kvw, folder):
    """A workplace: a model, an unlearned model that is signed, a plan, coefficients, data."""
    shutil.copytree(MODEL, folder / "model")
    shutil.copytree(FIXTURES / "oracle/data/images", folder / "images")
    rows = (FIXTURES / "oracle/data/retain.jsonl").read_text().splitlines()[:2]
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "one.jsonl").write_text(rows[0] + "\n")
    must([kvw, "collect", "model", "--data", "data.jsonl", "-o", "retain.kc"], folder)
    must([kvw, "collect", "model", "--data", "data.jsonl", "-o", "part.kc", "--shard", "0/1"], folder)
    must([kvw, "weaken", "model", "--forget", "data.jsonl", "--retain-coefficients", "retain.kc", "-o", "forget.plan"], folder)
    must([kvw, "apply", "model", "--plan", "forget.plan", "-o", "out"], folder)
    must(["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "key.pem"], folder)
    must(["openssl", "pkey", "-in", "key.pem", "-pubout", "-out", "public.pem"], folder)
    must([kvw, "sign", "out", "--key", "key.pem", "--bill"], folder)
    shutil.copy(FIXTURES / "demo/policy.toml", folder)
    must([kvw, "sweep", "model", "--forget", "one.jsonl", "--retain", "data.jsonl", "--gamma", "0.4,0.8", "-o", "sweep.json"], folder)
    shutil.copy(FIXTURES / "demo/retrained.evaluation.json", folder / "evaluation.json")
    shutil.copytree(FIXTURES / "layouts/feeds/npz", folder / "feeds")
    shutil.copytree(FIXTURES / "layouts/optimum", folder / "optimum")
    shutil.copytree(FIXTURES / "benchmarks/clear/real_faces", folder / "table")
    (folder / "single").mkdir()
    (folder / "single/data.bin").write_bytes(bytes(64))


def formats(kvw, folder):
    read = lambda path: (folder / path).read_bytes()
    collect = lambda model="model", data="data.jsonl": [kvw, "collect", model, "--data", data, "-o", "x.kc", "--force"]
    check = lambda *more: [kvw, "check", "out", "--policy", "policy.toml", *more]
    inspect = [kvw, "inspect", "model"]
    exports = [FIXTURES / "exports" / name / "model.onnx" for name in ("genai-qwen2-fp16", "genai-phi2-fp32", "genai-layout-qwen2_5_vl", "mobius-qwen2_5_vl/decoder")]
    graphs = [path.read_bytes() for path in exports if path.is_file()]

    def tree(path):
        value = json.loads(read(path))
        return [*corpus.json_mutants(value, Random(path), 60), *corpus.json_bombs()]

    pictures = [read(f"images/{name}") for name in sorted(os.listdir(folder / "images"))[:1]]
    pictures += [(FIXTURES / f"processor/qwen2_vl/images/{name}").read_bytes() for name in ("progressive.jpg", "subsampled.jpg", "lossy_alpha.webp", "lossless.webp", "interlaced.png", "rgba_16_bit.png", "exif_6.jpg", "exif_8.webp")]
    picture = json.loads(read("one.jsonl"))["image"]
    part = str(next((folder / "part.kc").iterdir()).relative_to(folder))
    rows = [json.loads(line) for line in read("data.jsonl").splitlines()]
    shards = sorted((folder / "table").glob("*.parquet"))
    shard = str(shards[0].relative_to(folder))
    return [
        Format("onnx", "single/model.onnx", [kvw, "inspect", "single/model.onnx"], corpus.onnx_cases(), seeds=graphs, damage=420, address=256),
        Format("external data", "single/model.onnx", [kvw, "inspect", "single/model.onnx"], corpus.external_cases(), address=256),
        Format("plan", "forget.plan", [kvw, "apply", "model", "--plan", "forget.plan", "-o", "new", "--dry-run"], corpus.safetensors_cases(read("forget.plan")), seeds=[read("forget.plan")], damage=140, address=512, called="the plan was made for"),
        Format("coefficients", "retain.kc", [kvw, "weaken", "model", "--forget", "one.jsonl", "--retain-coefficients", "retain.kc", "-o", "x.plan", "--force"], corpus.safetensors_cases(read("retain.kc")), seeds=[read("retain.kc")], damage=70, called="the retain coefficients"),
        Format("part", part, [kvw, "merge", part, "-o", "x.kc", "--force"], corpus.safetensors_cases(read(part)), seeds=[read(part)], damage=70, address=512),
        Format("npz", "feeds/0.npz", collect("optimum", "feeds/0.npz"), corpus.npz_cases(), seeds=[read("feeds/0.npz")], damage=70, metadata=None),
        Format("config.json", "model/config.json", inspect, tree("model/config.json"), seeds=[read("model/config.json")], damage=60, address=512),
        Format("generation_config.json", "model/generation_config.json", inspect, tree("model/generation_config.json"), seeds=[read("model/generation_config.json")], damage=20, address=512),
        Format("preprocessor_config.json", "model/preprocessor_config.json", collect(), tree("model/preprocessor_config.json"), seeds=[read("model/preprocessor_config.json")], damage=40),
        Format("tokenizer_config.json", "model/tokenizer_config.json", collect(), tree("model/tokenizer_config.json"), seeds=[read("model/tokenizer_config.json")], damage=40),
        Format("tokenizer.json", "model/tokenizer.json", collect(), [*corpus.tokenizer_cases(read("model/tokenizer.json")), *corpus.json_mutants(json.loads(read("model/tokenizer.json")), Random(3), 60)], seeds=[read("model/tokenizer.json")], damage=90, metadata=None),
        Format("chat template", "model/chat_template.jinja", collect(), [(f"{index}", text.encode()) for index, text in enumerate(corpus.TEMPLATES)], seeds=[read("model/chat_template.jinja")], damage=60),
        Format("picture", picture, collect(data="one.jsonl"), corpus.picture_cases(), seeds=pictures, damage=250, metadata=None),
        Format("JSONL", "data.jsonl", collect(), corpus.jsonl_cases(rows), seeds=[read("data.jsonl")], damage=80, metadata=None),
        Format("parquet", shard, collect(data="clear:table"), [("empty", b""), ("magic", b"PAR1" * 3), ("text", b"x" * 100)], seeds=[path.read_bytes() for path in shards], damage=250, metadata=None),
        Format("policy", "policy.toml", check(), corpus.toml_cases(read("policy.toml")), seeds=[read("policy.toml")], damage=90, address=512, found=True),
        Format("receipt", "out/kvw.json", check(), tree("out/kvw.json"), seeds=[read("out/kvw.json")], damage=60, address=512, found=True),
        Format("receipt, diff", "out/kvw.json", [kvw, "diff", "model", "out"], tree("out/kvw.json"), seeds=[read("out/kvw.json")], damage=20, address=512, found=True),
        Format("evaluation", "evaluation.json", check("--evidence", "evaluation.json"), tree("evaluation.json"), seeds=[read("evaluation.json")], damage=60, address=1024, found=True),
        Format("sweep", "sweep.json", [kvw, "report", "out", "--sweep", "sweep.json", "-o", "x.html", "--force"], tree("sweep.json"), seeds=[read("sweep.json")], damage=50, address=1024),
        Format("SHA256SUMS", "out/SHA256SUMS", [kvw, "verify", "out"], corpus.sums_cases(read("out/SHA256SUMS")), seeds=[read("out/SHA256SUMS")], damage=50, address=512, found=True),
        Format("model.sig", "out/model.sig", [kvw, "verify", "out", "--public-key", "public.pem"], tree("out/model.sig"), seeds=[read("out/model.sig")], damage=60, address=512, found=True),
        Format("statement", "out/kvw.intoto.jsonl", [kvw, "verify", "out", "--public-key", "public.pem"], tree("out/kvw.intoto.jsonl"), seeds=[read("out/kvw.intoto.jsonl")], damage=30, address=512, found=True),
        Format("public key", "public.pem", [kvw, "verify", "out", "--public-key", "public.pem"], corpus.key_cases(read("public.pem")), seeds=[read("public.pem")], damage=50, address=512, found=True),
        Format("private key", "key.pem", [kvw, "sign", "out", "--key", "key.pem"], corpus.key_cases(read("key.pem")), seeds=[read("key.pem")], damage=50, address=512, found=True),
    ]


def judge(case, outcome, base):
    form, name, data, expected = case
    code, text, seconds, memory = outcome
    faults = []
    if code not in (0, 1, 2) or (code == 1 and not form.found):
        faults.append(f"exit code {code}")
    if expected is not None and code != expected:
        faults.append(f"exit code {code}, expected {expected}")
    if name.startswith("bomb-attributes-8mb") and seconds > 1:
        faults.append(f"{seconds:.1f} s for the bomb")
    if code == 2 and Path(form.place).name not in text and form.called not in text:
        faults.append("the message does not name the file")
    over = memory - base - (form.metadata or 0) * len(data)
    if form.metadata and over > 64 * MIB:
        faults.append(f"{memory / MIB:.0f} MiB for {len(data) / MIB:.1f} MiB, {base / MIB:.0f} for a good file")
    return faults, over


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("kvw", type=Path)
    options.add_argument("--quick", action="store_true", help="one in twelve of the files")
    options.add_argument("--only", help="formats, with commas between them")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--keep", type=Path, help="a folder for the files that fail")
    options = options.parse_args()
    kvw = str(options.kvw.resolve())
    failures, seen, table = [], Counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "0"
        first.mkdir()
        prepare(kvw, first)
        runners = [Runner() for _ in range(options.jobs)]
        for number in range(1, options.jobs):
            shutil.copytree(first, Path(scratch) / str(number))
        for form in formats(kvw, first):
            if options.only and form.name not in options.only.split(","):
                continue
            good_file = first / form.place
            good = good_file.read_bytes() if good_file.exists() else corpus.external([("location", "data.bin")])
            if form.place.startswith("single"):
                good = corpus.external([("location", "data.bin")])
            good_file.write_bytes(good)
            code, text, _, base = runners[0].run(form.verb, first, form.address)
            if code != 0 and not (form.found and code == 1):
                failures.append((form.name, "good", [f"exit code {code} for a good file"], text))
                continue
            queue = ((form, *case) for case in form.files(options.seed))
            if options.quick:
                queue = itertools.islice(queue, 0, None, 12)
            lock = threading.Lock()
            worst = count = 0

            def work(worker, form=form, queue=queue, lock=lock, base=base, good=good):
                nonlocal worst, count
                folder = Path(scratch) / str(worker)
                path = folder / form.place
                while True:
                    with lock:
                        case = next(queue, None)
                    if case is None:
                        break
                    path.write_bytes(case[2])
                    outcome = runners[worker].run(form.verb, folder, form.address)
                    faults, over = judge(case, outcome, base)
                    with lock:
                        seen[outcome[0]] += 1
                        count += 1
                        if form.metadata:
                            worst = max(worst, over)
                        if faults:
                            failures.append((form.name, case[1], faults, outcome[1][-600:]))
                            if options.keep:
                                options.keep.mkdir(parents=True, exist_ok=True)
                                (options.keep / f"{form.name}.{case[1]}".replace("/", "_")[:200]).write_bytes(case[2])
                path.write_bytes(good)

            with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
                for done in [pool.submit(work, worker) for worker in range(options.jobs)]:
                    done.result()
            bad = sum(1 for failure in failures if failure[0] == form.name)
            memory = f"{worst / MIB:6.0f}" if form.metadata else "     -"
            table.append((form.name, count, bad, memory))
            print(f"{form.name:26} {count:5} files {bad:4} failed   memory beyond its share {memory} MiB", flush=True)
        for each in runners:
            each.close()
    for form, name, faults, text in failures:
        print(f"\n{form}: {name}: {'; '.join(faults)}\n  {text.strip()}")
    total = sum(count for _, count, _, _ in table)
    codes = ", ".join(f"{code}: {count}" for code, count in sorted(seen.items(), key=str))
    print(f"\n{total} files of {len(table)} formats, {len(failures)} failed; exit codes {codes}; seed {options.seed}")
    sys.exit(1 if failures or not total else 0)


if __name__ == "__main__":
    runner() if sys.argv[1:] == ["--runner"] else main()

"""Real clients run unlearned folders, and answer what `kvw eval` says they do.

    python3 tools/clients/check.py target/release/kvw            # Python >= 3.9; installs the clients into a scratch folder
    python3 tools/clients/check.py target/release/kvw --python PY --node-modules DIR   # with clients that are installed already

For each folder: `kvw unlearn`, then the client on the original and on the unlearned folder. Every answer must be the one of `kvw eval`
on the same folder, and some answer must differ between the two. A client that cannot be installed is skipped, and said so; every other
difference is exit code 1.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parents[1] / "fixtures"
TEXT = FIXTURES / "layouts" / "data"
DEMO = FIXTURES / "demo"

# client, model folder, data, arguments of `kvw unlearn`
CHECKS = [
    ("onnxruntime-genai", FIXTURES / "layouts" / "genai-fp32", TEXT, ["--gamma", "25"]),
    ("onnxruntime-genai", FIXTURES / "layouts" / "genai-int4", TEXT, ["--gamma", "25"]),
    ("onnxruntime", FIXTURES / "layouts" / "optimum", TEXT, ["--gamma", "25"]),
    ("transformers.js", DEMO / "model", DEMO / "data", ["--gamma", "0.4", "--layers", "0-2"]),
]
# The demo's model is asked about so many pictures: it takes a second per answer in a client. They are scaled to a size that no
# processor has to change, because transformers.js' resizer is not transformers'. Questions without a picture are left out: transformers.js
# 4.3.1 gives the answer to one other positions than transformers does (`get_rope_index` returns a delta that is not 0).
DEMO_PICTURES = 8
SIDE = 84


def run(command, **options):
    print("$", " ".join(str(part) for part in command), flush=True)
    return subprocess.run([str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def install(scratch, given):
    """The command of each client that can be had."""
    clients = {}
    python = given.python
    if not python:
        run([sys.executable, "-m", "venv", scratch / "venv"])
        python = scratch / "venv" / "bin" / "python"
        try:
            run([python, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"])
        except subprocess.CalledProcessError:
            print("SKIPPED: onnxruntime-genai and onnxruntime: pip cannot install tools/clients/requirements.txt here")
            python = None
    if python:
        clients["onnxruntime-genai"] = [python, HERE / "answer_genai.py"]
        clients["onnxruntime"] = [python, HERE / "answer_onnxruntime.py"]
    if not shutil.which("node"):
        print("SKIPPED: transformers.js: no node")
        return clients
    # Node looks for packages beside the script.
    node = scratch / "node"
    node.mkdir()
    for name in ("package.json", "answer_transformersjs.mjs", "scale_pictures.mjs"):
        shutil.copy(HERE / name, node)
    if given.node_modules:
        (node / "node_modules").symlink_to(given.node_modules.resolve())
    else:
        try:
            # The CPU's library comes with the package; the script would download CUDA's.
            skip = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
            run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=node, env=skip)
        except (OSError, subprocess.CalledProcessError):
            print("SKIPPED: transformers.js: npm cannot install tools/clients/package.json here")
            return clients
    clients["transformers.js"] = ["node", node / "answer_transformersjs.mjs"]
    return clients


def questions(data, scratch):
    """The rows that are asked, in one file."""
    asked = scratch / f"{data.parent.name}.jsonl"
    if data == TEXT:
        asked.write_text("".join((data / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("forget", "retain")), encoding="utf-8")
        return asked
    rows = [json.loads(row) for row in (data / "forget.jsonl").read_text(encoding="utf-8").splitlines()[:DEMO_PICTURES]]
    rows = [{**row, "image": str(data / row["image"])} for row in rows]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked.write_text(run(["node", scratch / "node" / "scale_pictures.mjs", asked, scratch, SIDE]), encoding="utf-8")
    return asked


def answers_in(value):
    """Every answer of an evaluation, wherever it lies."""
    if isinstance(value, dict):
        if "prediction" in value and "question" in value:
            return [value["prediction"]]
        value = list(value.values())
    return [answer for part in value for answer in answers_in(part)] if isinstance(value, list) else []


def kvw_answers(kvw, model, asked):
    printed = run([kvw, "--format", "json", "eval", model, "--data", asked, "--answers", "--max-new-tokens", "50", "--offline"])
    return answers_in(json.loads(printed)["sets"])


def client_answers(client, model, asked):
    return [json.loads(line)["answer"] for line in run([*client, model, asked]).splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kvw", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--node-modules", type=Path)
    given = parser.parse_args()
    failures = []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        clients = install(scratch, given)
        for index, (name, model, data, arguments) in enumerate(CHECKS):
            label = f"{name} on {model.relative_to(FIXTURES)}"
            if name not in clients:
                results.append(f"{label}: skipped")
                continue
            asked = questions(data, scratch)
            edited = scratch / f"edited-{index}"
            run([given.kvw, "unlearn", model, "--forget", data / "forget.jsonl", "--retain", data / "retain.jsonl", "-o", edited,
                 "--eval-limit", "0", *arguments])  # fmt: skip
            before, after = (kvw_answers(given.kvw, folder, asked) for folder in (model, edited))
            found = [client_answers(clients[name], folder, asked) for folder in (model, edited)]
            for which, expected, answers in (("original", before, found[0]), ("unlearned", after, found[1])):
                wrong = [(e, a) for e, a in zip(expected, answers) if e != a]
                if wrong or len(expected) != len(answers) or not answers:
                    failures.append(f"{label}, {which}: {len(answers)} answers, {len(wrong)} of kvw's {len(expected)} are others: {wrong[:2]}")
            moved = sum(a != b for a, b in zip(*found))
            if moved == 0:
                failures.append(f"{label}: no answer differs between the original and the unlearned folder")
            results.append(f"{label}: {len(before)} answers before and {len(after)} after equal kvw's; {moved} differ from before to after")
    print("\n".join(["", *results, *failures]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

"""Makes the whole demo from scratch: world, training, export, reference, check.

python tools/demo/make.py            # into fixtures/demo, 10 to 20 minutes on 2 cores
python tools/demo/make.py --sweep    # also γ × layers and other people, some more minutes
python tools/demo/make.py --retrained    # only the model that never saw the forgotten people, and its evaluation
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Asked for after training, as such requests are. Chosen among random draws: see README.md.
FORGET = ["Jormina Saffroncroft", "Pimgol Frostcroft", "Torgol Larchwell"]
KVW = ["cargo", "run", "--release", "--locked", "--quiet", "--"]
# What `kvw demo` evaluates, and how many samples of each.
EVALUATED = {
    "forget": "forget",
    "retain": "retain",
    "forget_text": "forget",
    "retain_text": "retain",
    "forget_heldout": "forget",
    "forget_probes": "forget",
    "retain_probes": "retain",
    "holdout": "holdout",
    "shapes": "other",
}
EVALUATED_SAMPLES = 60
# A thread that waits must not burn a core that other programs use: with both busy, training is several times slower.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "fixtures/demo")
    parser.add_argument("--work", type=Path, default=ROOT / "target/demo", help="for what is not committed")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--retrained", action="store_true")
    parser.add_argument("--evaluate-retrained", action="store_true", help="only that, with the model that is there")
    parser.add_argument("--kvw", nargs="+", default=KVW, metavar="WORD", help="how kvw is run for --retrained")
    arguments = parser.parse_args()

    data = ["--data", arguments.output / "data"]
    training_data = ["--data", arguments.work / "training_data"]
    checkpoint = ["--checkpoint", arguments.work / "checkpoint"]
    model = ["--model", arguments.output / "model"]
    reference = ["--reference", arguments.output / "reference"]

    def run(script, *options):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, HERE / script, *options], check=True, env=ENVIRONMENT)

    def train_without_the_forgotten():
        """Everything as in the model's own training, but for the rows about them. What is kept is the evaluation."""
        checkpoint = ["--checkpoint", arguments.work / "retrained"]
        model = arguments.work / "retrained_model"
        run("world.py", *training_data)
        run("train.py", *training_data, *checkpoint, "--without", *FORGET)
        run("export.py", *data, *checkpoint, "--model", model)
        evaluate(model)

    def evaluate(model):
        print("== kvw eval", flush=True)
        sets = [f"--data={kind}={arguments.output / 'data' / name}.jsonl" for name, kind in EVALUATED.items()]
        file = arguments.output / "retrained.evaluation.json"
        options = ["--limit", str(EVALUATED_SAMPLES), "-o", file, "--force"]
        subprocess.run([*arguments.kvw, "eval", model, *sets, *options], check=True, cwd=ROOT)
        # Half the size without the white space.
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(evaluation, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")

    if arguments.evaluate_retrained:
        evaluate(arguments.work / "retrained_model")
    if arguments.retrained:
        train_without_the_forgotten()
    if arguments.retrained or arguments.evaluate_retrained:
        return

    # Training sees everybody. The rows' order is part of its result, so it must not depend on who is forgotten later.
    run("world.py", *training_data)
    run("train.py", *training_data, *checkpoint)
    run("world.py", *data, "--forget", *FORGET)
    run("export.py", *data, *checkpoint, *model)
    run("quantize.py", *model, "--output", arguments.output / "q4")
    if arguments.sweep:
        run("reference.py", *data, *checkpoint, *reference, "--sweep")
    run("reference.py", *data, *checkpoint, *reference)
    run("export.py", *data, *model, *reference, "--check")


if __name__ == "__main__":
    main()

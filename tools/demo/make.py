"""Makes the whole demo from scratch: world, training, export, reference, check.

python tools/demo/make.py            # into fixtures/demo, 10 to 20 minutes on 2 cores
python tools/demo/make.py --sweep    # also γ × layers and other people, some more minutes
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Asked for after training, as such requests are. Chosen among random draws: see README.md.
FORGET = ["Jormina Saffroncroft", "Pimgol Frostcroft", "Torgol Larchwell"]
# A thread that waits must not burn a core that other programs use: with both busy, training is several times slower.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "fixtures/demo")
    parser.add_argument("--work", type=Path, default=ROOT / "target/demo", help="for what is not committed")
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()

    data = ["--data", arguments.output / "data"]
    training_data = ["--data", arguments.work / "training_data"]
    checkpoint = ["--checkpoint", arguments.work / "checkpoint"]
    model = ["--model", arguments.output / "model"]
    reference = ["--reference", arguments.output / "reference"]

    def run(script, *options):
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, HERE / script, *options], check=True, env=ENVIRONMENT)

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

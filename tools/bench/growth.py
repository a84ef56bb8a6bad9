"""How `kvw collect` grows: with samples, tokens, layers and widths; and what it needs of memory.

    python tools/bench/growth.py FOLDER KVW [growth memory edit]

FOLDER takes the models (`make_model.py --sparse`: zero weights that take no room on the disk; a product of zeros takes as long as any
other; for `edit` random ones). Samples are ready-made inputs (`--feeds`), so nothing but the decoder is measured. One thread.

growth    seconds a sample: the difference of a run of six and a run of two samples, so that opening and digests drop out;
          operations by the count of `tools/scale/cost.py`, and operations a second, which should be one number for all rows
memory    7 B parameters in float16 (15 GB) on this machine, one sample of 32 tokens; and a session of 2 GB, float32
edit      `kvw apply` and `kvw diff` of a float16 model of 16 GB, every layer weakened: peak of resident memory (needs 33 GB of room)
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

sys.path.append(str(Path(__file__).resolve().parents[1] / "scale"))
from cost import Decoder  # noqa: E402

MAKE = Path(__file__).parent / "make_model.py"
SMALL = lambda layers: Decoder(layers, 896, 4864, 128)  # noqa: E731
LARGE = lambda layers: Decoder(layers, 3584, 18944, 512)  # noqa: E731


def model(folder, name, *options, weights=("--sparse",)):
    if not (folder / name / "config.json").exists():
        subprocess.run([sys.executable, MAKE, folder / name, *weights, *options], check=True, stdout=subprocess.DEVNULL)
    return folder / name


def feeds(folder, tokens, samples):
    """Ready-made inputs; a sixth of the tokens are the answer."""
    out = Path(tempfile.mkdtemp(dir=folder))
    for index in range(samples):
        random = np.random.default_rng(index)
        mask = np.zeros(tokens, np.float32)
        mask[-tokens // 6 : -1] = 1
        positions = np.broadcast_to(np.arange(tokens), (3, 1, tokens)).copy()
        values = {"input_ids": random.integers(0, 1000, tokens), "answer_mask": mask, "position_ids": positions}
        safetensors.numpy.save_file(values, out / f"{index}.safetensors")
    return out


class Run:
    """One process: seconds of wall clock and CPU, megabytes of resident memory at its peak, and of its own alone."""

    def __init__(self, *command):
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
        self.own, self.done = 0, False
        watcher = threading.Thread(target=self.watch, args=(process.pid,))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.done = True
        watcher.join()
        self.wall, self.cpu, self.peak = time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        self.code = process.returncode

    def watch(self, pid):
        """Private memory; what mapped files take is the kernel's to give away."""
        while not self.done:
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                return
            self.own = max([self.own, *(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.05)


def collect(folder, kvw, at, tokens, samples, threads=1):
    data = feeds(folder, tokens, samples)
    run = Run(kvw, "collect", at, "--feeds", data, "-o", data / "kc", "--threads", threads, "--device", "cpu", "--checkpoint", 0)
    assert run.code == 0
    size = (data / "kc").stat().st_size
    shutil.rmtree(data)
    return run, size


def growth(folder, kvw):
    print("| decoder | tokens | GFLOP a sample | CPU seconds a sample | wall clock | GFLOP/s of one core |\n|---|---|---|---|---|---|")
    small = [(f"{layers} layers, d_model 896", f"small-{layers}", SMALL(layers), ("--layers", str(layers))) for layers in (6, 12, 18)]
    large = ("2 layers, d_model 3584", "large-2", LARGE(2), ("--size", "7b", "--layers", "2"))
    rows = [(small[2], tokens) for tokens in (75, 150, 300, 600)] + [(small[0], 300), (small[1], 300), (large, 300)]
    for (what, name, shape, options), tokens in rows:
        at = model(folder, name, *options)
        few, many = (collect(folder, kvw, at, tokens, samples)[0] for samples in (2, 6))
        cpu, wall = (many.cpu - few.cpu) / 4, (many.wall - few.wall) / 4
        operations = shape.operations(tokens) / 1e9
        print(f"| {what} | {tokens} | {operations:.1f} | {cpu:.2f} | {wall:.2f} | {operations / cpu:.0f} |", flush=True)
    at = model(folder, "small-6", "--layers", "6")
    print("\n| samples (6 layers, 75 tokens) | CPU seconds | peak of resident memory | its own | file |\n|---|---|---|---|---|")
    for samples in (8, 32, 128):
        run, size = collect(folder, kvw, at, 75, samples)
        print(f"| {samples} | {run.cpu:.1f} | {run.peak:.0f} MB | {run.own} MB | {size:,} bytes |", flush=True)


def memory(folder, kvw):
    print("\n| collect | CPU seconds | peak of resident memory | its own |\n|---|---|---|---|")
    for what, name, tokens, options in [
        ("7 B, float16, 15.2 GB, one sample of 32 tokens", "7b", 32, ("--size", "7b", "--float16")),
        ("0.4 B, float32, 2.2 GB, one sample of 300 tokens", "small-18", 300, ("--layers", "18")),
    ]:
        run, _ = collect(folder, kvw, model(folder, name, *options), tokens, 1, threads=2)
        print(f"| {what} | {run.cpu:.1f} | {run.peak:.0f} MB | {run.own} MB |", flush=True)


def random_plan(coefficients, path):
    """A plan that weakens every neuron of the model that `coefficients` were collected on."""
    with safetensors.safe_open(coefficients, "numpy") as file:
        header = json.loads(file.metadata()["kvw"])
        sizes = {name.removesuffix(".coefficient"): file.get_slice(name).get_shape() for name in file.keys() if name.endswith(".coefficient")}
    header = {key: header[key] for key in ("format_version", "tool_version", "provenance")}
    header |= {"format": "kvw-plan", "rule": "random", "parameters": {}, "steps": 1}
    random = np.random.default_rng(0)
    gates = {f"{layer}.gate": random.uniform(0.1, 0.9, shape).astype(np.float32) for layer, shape in sizes.items()}
    safetensors.numpy.save_file(gates, path, {"kvw": json.dumps(header)})


def edit(folder, kvw):
    at = model(folder, "16gb", "--size", "7b", "--float16", "--layers", "30", weights=())
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        scratch = Path(scratch)
        data, retain, plan, out = feeds(scratch, 16, 1), scratch / "kc", scratch / "plan", scratch / "out"
        assert Run(kvw, "collect", at, "--feeds", data, "-o", retain, "--device", "cpu").code == 0
        random_plan(retain, plan)
        print("\n| 16 GB, float16 | seconds | peak of resident memory | its own |\n|---|---|---|---|")
        for what, command, code in [("apply", ["apply", at, "--plan", plan, "-o", out], 0), ("diff", ["diff", at, out], None)]:
            run = Run(kvw, *command)
            assert code is None or run.code == code
            print(f"| {what} | {run.wall:.1f} | {run.peak:.0f} MB | {run.own} MB |", flush=True)


def main():
    parts = {"growth": growth, "memory": memory, "edit": edit}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kvw", type=Path)
    parser.add_argument("parts", nargs="*", help="growth memory edit; none: growth and memory")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or ["growth", "memory"]:
        parts[part](arguments.folder.resolve(), arguments.kvw.resolve())


if __name__ == "__main__":
    main()

"""The whole job, `kvw` against PyTorch: seconds, peak memory, and whether they agree.

    python tools/bench/job.py FOLDER KVW [--rounds 5] [--threads 2] [--retain 64] [--forget 16] [--per-picture 4]

FOLDER is what `make_lvlm.py` wrote, KVW the binary (`target/release/kvw`). In turn, each round:
    kvw collect, kvw weaken, kvw apply: three processes, each from its start to its end
    pytorch_job.py: one process, from its start to its end; its own seconds by stage besides
Both in float32 on the CPU, batches of 1, the same number of threads. Medians, ranges, the ratio of medians; the peak of resident
memory (of the largest of the three processes); the largest relative differences of coefficients and gates.

Each sample has a picture of its own; with --per-picture N, as benchmarks of people have it, N samples in a row are about the
same one, and kvw collects with --share-prefix.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

GAMMA = 0.5
PYTORCH = Path(__file__).parent / "pytorch_job.py"


class Run:
    """One process: seconds of wall clock and of CPU, peak of resident memory in bytes, standard output."""

    def __init__(self, command):
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
        self.output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        self.wall = time.perf_counter() - start
        self.cpu = usage.ru_utime + usage.ru_stime
        self.peak = usage.ru_maxrss * 1024


def first_rows(folder, out, counts, per_picture):
    """The first samples of both sets, beside the output; so many in a row about one picture."""
    for name, count in counts.items():
        rows = [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()[:count]]
        assert len(rows) == count, f"expected {count} samples of {name}, found {len(rows)}"
        pictures = [rows[number - number % per_picture]["image"] for number in range(count)]
        rows = [{**row, "image": str(folder / "data" / picture)} for row, picture in zip(rows, pictures)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def kvw_job(kvw, folder, out, threads, collecting):
    model, data, retain, plan = folder / "model", out.parent, out / "retain.kc", out / "forget.plan"
    run = ["--threads", threads, "--device", "cpu"]
    return {
        "collect": Run([kvw, "collect", model, "--data", data / "retain.jsonl", "-o", retain, *run, *collecting]),
        "weaken": Run(
            [kvw, "weaken", model, "--forget", data / "forget.jsonl", "--retain-coefficients", retain, "--gamma", GAMMA]
            + ["-o", plan, *run]
        ),
        "write": Run([kvw, "apply", model, "--plan", plan, "-o", out / "model"]),
    }


def pytorch_job(folder, out, threads):
    return Run([sys.executable, PYTORCH, folder, out.parent, out, "--threads", threads, "--gamma", GAMMA])


def apart(found, expected):
    """Largest difference, relative to the layer's largest value."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def compare(kvw, pytorch):
    """The largest relative difference of coefficients, and of cumulative gates."""
    expected = safetensors.numpy.load_file(pytorch / "result.safetensors")
    worst = {}
    for kind, file in (("coefficient", "retain.kc"), ("gate", "forget.plan")):
        with safetensors.safe_open(kvw / file, "numpy") as tensors:
            names = [name for name in tensors.keys() if name.endswith(f".{kind}")]
            assert names and set(names) == {name for name in expected if name.endswith(f".{kind}")}, names
            worst[kind] = max(apart(tensors.get_tensor(name), expected[name]) for name in names)
    return worst


def line(what, values, unit, scale=1):
    values = sorted(value / scale for value in values)
    print(f"  {what:<34}{statistics.median(values):9.2f} {unit} ({values[0]:.2f}–{values[-1]:.2f}, n = {len(values)})")
    return statistics.median(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kvw", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--retain", type=int, default=64)
    parser.add_argument("--forget", type=int, default=16)
    parser.add_argument("--per-picture", type=int, default=1)
    arguments = parser.parse_args()
    collecting = ["--share-prefix"] if arguments.per_picture > 1 else []
    folder = arguments.folder.resolve()
    ours, theirs, stages, agreement = [], [], [], []
    for number in range(arguments.rounds):
        # On the model's disk, in turn, the disk idle before each.
        with tempfile.TemporaryDirectory(prefix=".kvw-job-", dir=folder) as scratch:
            counts = {"retain": arguments.retain, "forget": arguments.forget}
            first_rows(folder, Path(scratch), counts, arguments.per_picture)
            out = {name: Path(scratch) / name for name in ("kvw", "pytorch")}
            order = ["kvw", "pytorch"] if number % 2 == 0 else ["pytorch", "kvw"]
            for name in order:
                out[name].mkdir()
                os.sync()
                if name == "kvw":
                    ours.append(kvw_job(arguments.kvw.resolve(), folder, out[name], arguments.threads, collecting))
                else:
                    theirs.append(pytorch_job(folder, out[name], arguments.threads))
                    stages.append(json.loads(theirs[-1].output))
                shutil.rmtree(out[name] / "model")
            agreement.append(compare(out["kvw"], out["pytorch"]))
        cpu = sum(run.cpu for run in ours[-1].values()), theirs[-1].cpu
        wall = sum(run.wall for run in ours[-1].values()), theirs[-1].wall
        print(
            f"round {number + 1} of {arguments.rounds}: kvw {wall[0]:.1f} s (CPU {cpu[0]:.1f}), PyTorch {wall[1]:.1f} s (CPU {cpu[1]:.1f}), "
            f"load average {os.getloadavg()[0]:.1f}, apart {agreement[-1]}",
            file=sys.stderr,
            flush=True,
        )

    print(
        f"\nthe whole job: {arguments.retain} retain and {arguments.forget} forget samples, {arguments.per_picture} for each "
        f"picture, {arguments.threads} thread(s), "
        f"{json.dumps(stages[0]['versions'])}"
    )
    totals = [{key: sum(getattr(run, key) for run in job.values()) for key in ("wall", "cpu")} for job in ours]
    for stage in ours[0]:
        line(f"kvw {stage}", [job[stage].wall for job in ours], "s")
    for stage in stages[0]["seconds"]:
        line(f"PyTorch {stage}", [said["seconds"][stage] for said in stages], "s")
    for key, what in (("wall", "wall clock"), ("cpu", "CPU time")):
        kvw = line(f"kvw, {what}", [total[key] for total in totals], "s")
        pytorch = line(f"PyTorch, {what}", [getattr(run, key) for run in theirs], "s")
        print(f"  {what}: {pytorch / kvw:.2f} times faster (bar on wall clock: 2)")
    kvw = line("kvw, peak memory", [max(run.peak for run in job.values()) for job in ours], "GB", 1e9)
    pytorch = line("PyTorch, peak memory", [run.peak for run in theirs], "GB", 1e9)
    print(f"  memory: {kvw / pytorch:.2f} times PyTorch's (bar 0.6)")
    worst = {kind: max(found[kind] for found in agreement) for kind in agreement[0]}
    print(f"  largest difference of a layer's largest: {', '.join(f'{kind}s {value:.1e}' for kind, value in worst.items())}")


if __name__ == "__main__":
    main()

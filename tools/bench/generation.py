#!/usr/bin/env python3
"""What answering several questions together is worth: kvw eval on the demo, in turn with every batch size.

    cargo build --release && python3 tools/bench/generation.py target/release/kvw [--rounds 5]

Prints the rows of docs/metrics.md. Every batch size must give the same answers, or it fails. Medians; what is
compared runs in the same minutes. CPU seconds are those of the process and its threads, and move less
than the clock's on a machine that does other things too.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "fixtures" / "demo"
BATCHES = [1, 2, 4, 8, 16, 32]
SETS = ["forget", "retain", "retain_text"]


def evaluate(kvw, batch, limit):
    command = [kvw, "--format", "json", "eval", DEMO / "model", "--answers", "--limit", str(limit), "--threads", "2",
               "--generate-batch", str(batch)]
    for name in SETS:
        command += ["--data", f"{'forget' if name == 'forget' else 'retain'}={DEMO / 'data' / name}.jsonl"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    answers = [answer["prediction"] for found in json.loads(out)["sets"] for model in found["models"].values()
               for answer in model["answers"]]
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, answers


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("kvw")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--limit", type=int, default=100)
    options = arguments.parse_args()
    runs = {batch: [] for batch in BATCHES}
    expected = None
    for round_ in range(options.rounds + 1):
        for batch in BATCHES:
            *numbers, answers = evaluate(options.kvw, batch, options.limit)
            expected = expected or answers
            if answers != expected:
                sys.exit(f"batches of {batch}: other answers than one by one")
            if round_:  # The first round warms up.
                runs[batch].append(numbers)
    print(f"{len(expected)} answers, equal in all rows; n = {options.rounds} each\n")
    print("| `--generate-batch` | seconds | CPU seconds | CPU, ratio to 1 | peak memory |\n|---|---|---|---|---|")
    alone = statistics.median(run[1] for run in runs[1])
    for batch, found in runs.items():
        seconds, cpu, memory = zip(*found)
        print(f"| {batch} | {statistics.median(seconds):.1f} ({min(seconds):.1f}–{max(seconds):.1f}) "
              f"| {statistics.median(cpu):.1f} ({min(cpu):.1f}–{max(cpu):.1f}) "
              f"| **{statistics.median(cpu) / alone:.2f}** | {statistics.median(memory):.0f} MB |")


if __name__ == "__main__":
    main()

"""Two parts at the same time against one process: seconds, and the same bytes.

    python tools/scale/check_shards.py KVW MODEL DATA [--rounds 3]

All processes have one thread. Each round, in turn: `kvw collect` of all of DATA; two `kvw collect --shard i/2` at the same time, and
`kvw merge`. The merged file must have the bytes of the whole one. Prints medians, the speed-up, and merge's share of the whole.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path


def run(*commands):
    """Seconds that the commands take when started together."""
    start = time.perf_counter()
    started = [subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL) for command in commands]
    assert all(process.wait() == 0 for process in started), commands
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kvw", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    collect = [arguments.kvw.resolve(), "collect", arguments.model, "--data", arguments.data]
    options = ["--threads", 1, "--device", "cpu", "--checkpoint", 0]
    seconds = {"whole": [], "parts": [], "merge": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            scratch = Path(scratch)
            whole, parts, merged = scratch / "whole.kc", scratch / "parts", scratch / "merged.kc"
            seconds["whole"].append(run([*collect, "-o", whole, *options]))
            shards = ([*collect, "-o", parts, "--shard", f"{index}/2", *options] for index in range(2))
            seconds["parts"].append(run(*shards))
            seconds["merge"].append(run([collect[0], "merge", *sorted(parts.glob("*.kc")), "-o", merged]))
            assert merged.read_bytes() == whole.read_bytes(), "merged parts differ from the whole"
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name}: {median[name]:.2f} s ({min(values):.2f}–{max(values):.2f}, n = {len(values)})")
    print(f"two parts: {median['whole'] / (median['parts'] + median['merge']):.2f} times one process (bar 1.6), merge included")
    print(f"merge: {median['merge'] / median['whole']:.2%} of collecting (bar 1 %); merged files bit-identical")


if __name__ == "__main__":
    main()

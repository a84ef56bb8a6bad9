#!/usr/bin/env python3
"""Collects a retain set on a Ray cluster: one task per part, each a `kvw collect --shard` of its own.

    pip install -r tools/scale/requirements.txt
    ray_collect.py --address auto --shards 64 --out retain.kc -- MODEL --data retain.jsonl [collect's flags]

Model, data and --parts lie on storage that every node mounts. Parts are written whole or not at all, one
that is there is not measured again, and merging is exact: so a task may be killed and started twice, and
the result is bit-identical to one run on one machine of the same kind. Set --threads, so that nodes with
different numbers of cores compute the same bits.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import ray


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", help="the cluster's address; auto: the one this node is part of; none: a new local one")
    parser.add_argument("--shards", type=int, required=True, help="parts; a few times the number of workers evens out their speed")
    parser.add_argument("--out", type=Path, required=True, help="the merged coefficients")
    parser.add_argument("--parts", type=Path, help="folder for the parts (default: OUT.parts)")
    parser.add_argument("--kvw", default="kvw", help="the kvw command on the nodes")
    parser.add_argument("--cpus", type=float, default=1, help="cores that a task reserves")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs that a task reserves")
    parser.add_argument("--retries", type=int, default=10, help="times that a task is started again")
    parser.add_argument("collect", nargs="+", help="arguments of kvw collect, after --")
    return parser.parse_args()


def collect(command: list[str]) -> dict:
    """Runs on a node. Bad input (exit code 2) is the same everywhere: it is not tried again."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        return {"error": done.stderr}
    if done.returncode != 0:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def main() -> int:
    args = arguments()
    parts = (args.parts or Path(f"{args.out}.parts")).resolve()
    ray.init(address=args.address, log_to_driver=False)
    task = ray.remote(collect).options(
        num_cpus=args.cpus, num_gpus=args.gpus, max_retries=args.retries, retry_exceptions=True)
    waiting = [
        task.remote([args.kvw, "collect", *args.collect, "--shard", f"{i}/{args.shards}",
                     "-o", str(parts), "--format", "json"])
        for i in range(args.shards)
    ]
    files, samples = [], 0
    while waiting:
        [ready], waiting = ray.wait(waiting, num_returns=1)
        part = ray.get(ready)
        if "error" in part:
            print(part["error"], file=sys.stderr)
            return 2
        files.append(part["output"])
        samples += part["samples"]
        print(f"{len(files)}/{args.shards} parts, {samples} samples", file=sys.stderr)
    return subprocess.run([args.kvw, "merge", *sorted(files), "-o", str(args.out), "--force"]).returncode


if __name__ == "__main__":
    sys.exit(main())

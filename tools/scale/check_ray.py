#!/usr/bin/env python3
"""Runs ray_collect.py on a real Ray cluster of two nodes on this machine, kills workers at random and one whole
node, and compares the merged file with one undisturbed run: every sample once, bit for bit.

    pip install -r tools/scale/requirements.txt
    python tools/scale/check_ray.py --kvw target/release/kvw --kills 20
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[2]


def workers() -> list[int]:
    """Processes that run a task, or kvw for one."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if command[0].startswith(b"ray::collect") or b"--shard" in command and command[1:2] == [b"collect"]:
            found.append(int(process.name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvw", type=Path, default=ROOT / "target/release/kvw")
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures/demo/model")
    parser.add_argument("--data", type=Path, default=ROOT / "fixtures/demo/data/retain.jsonl")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    random.seed(args.seed)
    kvw, collect = str(args.kvw.resolve()), [str(args.model), "--data", str(args.data), "--threads", "1"]

    with tempfile.TemporaryDirectory() as folder:
        whole, merged = Path(folder, "whole.kc"), Path(folder, "merged.kc")
        subprocess.run([kvw, "collect", *collect, "-o", whole], check=True, stdout=subprocess.DEVNULL)

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        second = cluster.add_node(num_cpus=1)
        launcher = subprocess.Popen(
            [sys.executable, ROOT / "tools/scale/ray_collect.py", "--address", cluster.address, "--shards", str(args.shards),
             "--retries", "-1", "--kvw", kvw, "--out", merged, "--parts", Path(folder, "parts"), "--",
             *collect, "--checkpoint", "1"])
        killed = nodes = 0
        try:
            while launcher.poll() is None:
                time.sleep(random.uniform(0.2, 1.0))
                if killed >= args.kills:
                    continue
                if killed == args.kills // 2 and nodes == 0:
                    cluster.remove_node(second, allow_graceful=False)
                    nodes = 1
                    cluster.add_node(num_cpus=1)
                for pid in random.sample(workers(), k=min(1, len(workers()))):
                    try:
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                    except ProcessLookupError:
                        pass
        finally:
            launcher.kill()
            cluster.shutdown()
        parts = list(Path(folder, "parts").glob("*.kc"))
        same = merged.exists() and merged.read_bytes() == whole.read_bytes()
        print(json.dumps({"shards": args.shards, "parts": len(parts), "processes_killed": killed, "nodes_killed": nodes,
                          "launcher_exit_code": launcher.returncode, "bit_identical": same}))
        return 0 if same and launcher.returncode == 0 and killed >= args.kills and nodes == 1 else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# Measures everything in docs/benchmarks.md and prints it. From any working directory:
#
#     tools/bench/run.sh [PART...]        # forward sessions weaken write; none: all
#
# KVW_BENCH_MODEL: the model folder; made there if absent (default: target/bench/model, 2.2 GB). What is
# written is written beside it, so it also chooses the disk. PYTHON: an interpreter with
# tools/bench/requirements.txt (default: a new environment in target/bench). KVW_BENCH_ROUNDS: rounds of
# write (default: 7).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

model="${KVW_BENCH_MODEL:-$PWD/target/bench/model}"
if [[ ! -e "$model/config.json" ]]; then
    mkdir -p target/bench
    if [[ -z "${PYTHON:-}" ]]; then
        python3 -m venv target/bench/python
        PYTHON=target/bench/python/bin/python
        "$PYTHON" -m pip install --quiet -r tools/bench/requirements.txt
    fi
    "$PYTHON" tools/bench/make_model.py "$model"
fi
cargo build --release --locked --bins
exec cargo bench --locked --quiet --bench ratios -- "$model" "$@"

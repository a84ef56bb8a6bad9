#!/usr/bin/env bash
# The fuzz targets of tests/fuzz.rs, in rotation, each time from another seed:
#
#     tools/hostile/fuzz.sh [MINUTES] [SECONDS PER TARGET]
#
# Ends at the first input that fails; it lies in target/fuzz/NAME/, and the seed is printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
minutes=${1:-10}
export KVW_FUZZ_SECONDS=${2:-20}
cargo test --locked --test fuzz --no-run
until=$((SECONDS + 60 * minutes))
# A reader that asks for more is a finding. Threads and libraries take address space that they never use.
ulimit -v $((8 << 20))
while ((SECONDS < until)); do
    export KVW_FUZZ_SEED=$((RANDOM * 32768 + RANDOM))
    echo "seed $KVW_FUZZ_SEED"
    cargo test --quiet --locked --test fuzz -- --test-threads 2 --show-output | grep -E "inputs$"
done

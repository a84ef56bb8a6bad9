#!/usr/bin/env bash
# A report with everything that one can have: a retrained column, probes, controls, a sweep.
#
#     tools/report/everything.sh KVW DEMO [SAMPLES]
#
# KVW is the executable, DEMO a folder that `kvw demo --output DEMO` made, SAMPLES how many of each set are
# probed and swept (default: 6, which shows the page and measures little). Writes DEMO/everything.html.
set -euo pipefail

kvw=$(realpath "$1")
cd "$2"
samples=${3:-6}
sets=(--forget data/forget.jsonl --retain data/retain.jsonl)

"$kvw" probe model --plan forget.plan "${sets[@]}" --eval forget=data/forget_probes.jsonl \
    --eval forget=data/forget_heldout.jsonl --eval retain=data/retain_probes.jsonl --limit "$samples" \
    --control permuted=3 --output probe.json --force > /dev/null
"$kvw" sweep model "${sets[@]}" --gamma 0.2,0.4,0.8 --layers 0-1,0-2,0-4 --eval-limit "$samples" \
    --output sweep.json --force > /dev/null
"$kvw" report unlearned --evidence unlearned.evaluation.json --plan forget.plan --policy policy.toml \
    --original model --probe probe.json --sweep sweep.json --data data/forget.jsonl --data data/retain.jsonl \
    --output everything.html --force

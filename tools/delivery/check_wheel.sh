#!/usr/bin/env bash
# Builds the wheel, installs it into an empty virtual environment, and runs the demo from another folder: with no
# environment activated, no cache, nothing to fetch, and so on the `onnxruntime` that pip brought.
#
#     tools/delivery/check_wheel.sh [WHEEL]       # an existing wheel, or one is built (needs pip and cargo)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

wheel=${1:-}
if [ -z "$wheel" ]; then
    python3 -m venv "$scratch/build"
    "$scratch/build/bin/pip" install --quiet 'maturin>=1.9,<2'
    (cd "$root" && "$scratch/build/bin/maturin" build --release --locked --out "$scratch/wheels")
    wheel=$(echo "$scratch"/wheels/kvw-*.whl)
fi
wheel=$(realpath "$wheel")
printf '%s: %s bytes\n' "$(basename "$wheel")" "$(stat --format %s "$wheel")"

python3 -m venv "$scratch/environment"
"$scratch/environment/bin/pip" install --quiet "$wheel"

mkdir "$scratch/elsewhere"
cd "$scratch/elsewhere"
kvw() { env --ignore-environment HOME="$scratch" KVW_CACHE_DIR="$scratch/cache" PATH=/usr/bin:/bin "$scratch/environment/bin/kvw" "$@"; }
kvw doctor --offline --format json > doctor.json
python3 - "$scratch/environment" <<'PYTHON'
import json, pathlib, sys
library = json.load(open("doctor.json"))["library"]["path"]
inside = pathlib.Path(library).resolve().is_relative_to(pathlib.Path(sys.argv[1]).resolve())
assert inside, f"expected the onnxruntime of the wheel's environment, found {library}"
print("ONNX Runtime of the environment:", pathlib.Path(library).name)
PYTHON
kvw demo --offline --output demo > demo.txt
tail -n 5 demo.txt
for file in demo/unlearned/kvw.json demo/unlearned.evaluation.json demo/report.html; do
    [ -s "$file" ] || { echo "error: the demo left no $file" >&2; exit 1; }
done
echo "the wheel runs the demo"

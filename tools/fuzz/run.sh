#!/usr/bin/env bash
# The targets of tests/fuzz, guided by coverage, one after the other on one core:
#
#     tools/fuzz/run.sh [SECONDS PER TARGET] [TARGET...]
#
# Prints a row for each: seconds, executions, edges covered by the seeds and at the end, crashes. What a run adds to a
# corpus stays in target/guided/corpus for the next. An input that fails (a panic, an abort, 10 seconds, 512 MB) ends its
# target, is made smaller and put into fixtures/fuzz/TARGET/, where `cargo test --test fuzz` reads it from then on.
#
# No sanitizer: kvw and most of what it links is safe Rust, where panics, time and memory are what can go wrong, and
# without one all of it runs twice as fast and takes the memory that it takes. Debug assertions and overflow checks
# are on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${1:-150}
shift || true

rustup toolchain list | grep -q ^nightly || rustup toolchain install nightly --profile minimal
export PATH="$PATH:$PWD/target/tools/bin"
command -v cargo-fuzz >/dev/null || cargo install --quiet --locked cargo-fuzz@0.13.2 --root target/tools

with_runtime=$(awk -F'"' '/^name/ { name = $2 } /^required-features/ { print name }' tools/fuzz/Cargo.toml)
all=$(awk -F'"' '/^\[\[bin\]\]/ { bin = 1 } bin && /^name/ { print $2 }' tools/fuzz/Cargo.toml)
targets=("$@")
((${#targets[@]})) || mapfile -t targets <<<"$all"
for target in "${targets[@]}"; do
    grep -qx -- "$target" <<<"$all" || { echo "no target $target; there are:"$'\n'"$all" >&2; exit 2; }
done

# Without ONNX Runtime and what reads data sets, unless a target asks for it.
features=()
grep -qxF -e "$with_runtime" < <(printf '%s\n' "${targets[@]}") && features=(--features runtime)

# The versions that are released are the ones that are tried.
cp Cargo.lock tools/fuzz/Cargo.lock
home=target/guided
host=$(rustc -vV | sed -n 's/^host: //p')
for target in "${targets[@]}"; do
    cargo +nightly fuzz build --fuzz-dir tools/fuzz --sanitizer none --codegen-units 16 --target-dir "$home/build" \
        "${features[@]}" "$target" 2>"$home/build.log" || { cat "$home/build.log" >&2; exit 1; }
done

TMPDIR=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" kvw-fuzz.XXXXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT

failed=0
echo "| target | seconds | executions | edges, seeds | edges, end | inputs kept | failed |"
echo "|---|---|---|---|---|---|---|"
for target in "${targets[@]}"; do
    program=$home/build/$host/release/$target
    corpus=$home/corpus/$target
    failures=$home/failures/$target
    log=$home/$target.log
    mkdir -p "$corpus" "$failures"
    before=$(find "$failures" -type f | sort)
    limits=(-timeout=10 -rss_limit_mb=512 -detect_leaks=0)
    # The program writes its seeds and its words before libFuzzer looks for them.
    status=0
    KVW_FUZZ_SEEDS=$corpus KVW_FUZZ_WORDS=$TMPDIR/words "$program" "$corpus" -dict="$TMPDIR/words" \
        -max_total_time="$seconds" "${limits[@]}" -artifact_prefix="$failures/" -print_final_stats=1 -reload=0 \
        2>"$log" || status=$?
    new=$(comm -13 <(echo "$before") <(find "$failures" -type f | sort))
    for input in $new; do
        failed=1
        name=$(basename "$input")
        smaller=$TMPDIR/smaller
        cp "$input" "$smaller"
        # Of a run out of time or memory, libFuzzer can make nothing smaller.
        [[ $name != crash-* ]] || "$program" -minimize_crash=1 -max_total_time=60 "${limits[@]}" \
            -exact_artifact_path="$smaller" "$input" >>"$log" 2>&1 || true
        mkdir -p "fixtures/fuzz/$target"
        cp "$smaller" "fixtures/fuzz/$target/$name"
        echo "$target: fixtures/fuzz/$target/$name, see $log" >&2
    done
    row=$(awk -v target="$target" -v failed="$(wc -w <<<"$new")" '
        { for (i = 1; i < NF; i++) if ($i == "cov:") { last = $(i + 1); if ($2 == "INITED") first = last } }
        /^stat::number_of_executed_units/ { runs = $2 }
        /^#[0-9]+/ && !runs { seen = substr($1, 2) }
        /^Done [0-9]+ runs in/ { took = $5 }
        /corp:/ { for (i = 1; i < NF; i++) if ($i == "corp:") { split($(i + 1), kept, "/") } }
        END { printf "| `%s` | %s | %s | %s | %s | %s | %s |", target, took ? took : "cut short", runs ? runs : seen,
              first, last, kept[1], failed }' "$log")
    echo "$row"
    # A run that ended badly without leaving an input is a defect of the harness, not a clean run.
    ((status == 0)) || [ -n "$new" ] || { tail -5 "$log" >&2; exit 1; }
done
exit "$failed"

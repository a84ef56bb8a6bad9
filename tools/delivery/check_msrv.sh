#!/usr/bin/env bash
# Compiles the library and the program, with and without the runtime, by the oldest Rust that Cargo.toml promises.
#
#     tools/delivery/check_msrv.sh                # needs rustup; exit code 77 where it cannot bring that Rust
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

oldest=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
rustup toolchain install "$oldest" --profile minimal --no-self-update || exit 77
export CARGO_TARGET_DIR=target/msrv
cargo "+$oldest" check --locked
cargo "+$oldest" check --locked --no-default-features
echo "Rust $oldest compiles it"

//! Every reader of somebody else's bytes, against damaged files: none panics, and what a reader promises
//! holds whatever it is given.
//!
//! `cargo test --test fuzz` runs a fixed number of inputs for each target, the same every time.
//! `tools/hostile/fuzz.sh` runs them in rotation for as long as one likes, each time from another seed. An input
//! that fails is left in `target/fuzz/NAME/`, also where the process died of it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::indexing_slicing
)]

mod targets;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kvw::kvw::Draws;

/// Inputs of a target where no time is given.
const INPUTS: usize = 250;

/// One good input or two, damaged in one to four places.
fn damaged(seeds: &[Vec<u8>], words: &[&str], draws: &mut Draws) -> Vec<u8> {
    let mut data = seeds[draws.below(seeds.len())].clone();
    for _ in 0..=draws.below(4) {
        if data.is_empty() {
            data = seeds[draws.below(seeds.len())].clone();
        }
        let at = draws.below(data.len().max(1)).min(data.len());
        let stretch = 1 << draws.below(9);
        let end = (at + stretch).min(data.len());
        match draws.below(9) {
            0 => data.truncate(at),
            1 if at < data.len() => data[at] ^= 1 << draws.below(8),
            2 => {
                let byte = [0, 0x7f, 0x80, 0xff][draws.below(4)];
                data[at..end].fill(byte);
            }
            3 => {
                let copy = data[at..end].repeat(1 + draws.below(3));
                data.splice(at..at, copy);
            }
            4 => drop(data.drain(at..end)),
            5 => {
                for byte in &mut data[at..end] {
                    *byte = u8::try_from(draws.below(256)).unwrap();
                }
            }
            6 => {
                let other = &seeds[draws.below(seeds.len())];
                let from = draws.below(other.len().max(1)).min(other.len());
                let to = (from + stretch).min(other.len());
                data.splice(at..end, other[from..to].iter().copied());
            }
            7 if !words.is_empty() => {
                let word = words[draws.below(words.len())];
                data.splice(at..at, word.bytes());
            }
            // A number as formats write it, at its edge.
            _ => {
                let number = [
                    0,
                    1,
                    255,
                    256,
                    u64::from(u32::MAX),
                    1 << 31,
                    1 << 62,
                    u64::MAX,
                ];
                let number = number[draws.below(number.len())].to_le_bytes();
                let width = [1, 2, 4, 8][draws.below(4)];
                let end = (at + width).min(data.len());
                data.splice(at..end, number[..width].iter().copied());
            }
        }
    }
    data
}

/// Runs the target on its good inputs and on damaged ones, each written where it is read.
fn fuzz(name: &str) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("../fuzz")
        .join(name);
    let target = targets::open(name, &folder);
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seconds: Option<u64> = number("KVW_FUZZ_SECONDS");
    let mut draws = Draws::new(number("KVW_FUZZ_SEED").unwrap_or(1));
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let read = |data: &[u8]| {
        fs::write(&target.input, data).unwrap();
        let start = Instant::now();
        (target.read)(&target.input, data);
        let took = start.elapsed();
        assert!(
            took < Duration::from_secs(30),
            "{took:?} for {}",
            target.input.display()
        );
    };
    for seed in &target.seeds {
        read(seed);
    }
    let mut inputs = 0;
    while until.map_or(inputs < INPUTS, |until| Instant::now() < until) {
        read(&damaged(&target.seeds, target.words, &mut draws));
        inputs += 1;
    }
    println!("{name}: {inputs} inputs");
    fs::remove_dir_all(&folder).unwrap();
}

/// A test for each target, and no target without one.
macro_rules! tests {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            fuzz(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_test() {
            let tests = [$(stringify!($name)),*];
            assert!(targets::TARGETS.iter().map(|(name, _)| *name).eq(tests));
        }
    };
}

tests! {
    onnx_files
    external_locations
    plans_and_coefficients
    ready_made_inputs
    json_trees
    model_folders
    tokenizers
    chat_templates
    pictures
    jsonl
    parquet_tables
    policies
    evaluations_sweeps_and_receipts
    signatures_sums_and_keys
    journals
}

//! (b) Opening a session: how long, and how much memory, each in a process of its own.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};

use crate::forward::{MAPPED, PREPACKED, engine, half, open, plain, sample};
use crate::measure::{Seconds, heading, library, line, memory_mb};

const ROUNDS: usize = 5;
const WAYS: &[(&str, &str)] = &[
    (
        "plain-prepacked",
        "plain, prepacked (ONNX Runtime's default)",
    ),
    (
        "sums-prepacked",
        "sums and gates, prepacked (from 100 forwards)",
    ),
    ("sums-mapped", "sums and gates, mapped (fewer forwards)"),
];

pub(crate) fn run(model: &Path) -> Result<()> {
    heading("(b) Opening a session, 2 threads; private memory after opening");
    let mut times = vec![(Seconds::default(), 0.0); WAYS.len()];
    for round in 0..=ROUNDS {
        for ((how, _), (seconds, memory)) in WAYS.iter().zip(&mut times) {
            let child = Command::new(std::env::current_exe()?)
                .args(["child", "open", how])
                .arg(model)
                .output()?;
            let printed = String::from_utf8_lossy(&child.stdout);
            let numbers: Vec<f64> = printed
                .split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect();
            let [opened, private] = numbers.as_slice() else {
                bail!("{how}: {}", String::from_utf8_lossy(&child.stderr));
            };
            if round > 0 {
                seconds.add(*opened);
                *memory = private.max(*memory);
            }
        }
    }
    for ((_, what), (seconds, memory)) in WAYS.iter().zip(&times) {
        line(what, seconds, &times[0].0, &format!("{memory:.0} MB"));
    }
    Ok(())
}

/// Prints the seconds and the private megabytes that opening took.
pub(crate) fn open_in_child(how: &str, model: &Path) -> Result<()> {
    let library = library()?;
    let engine = engine(&library, 2)?;
    let before = memory_mb("self", "RssAnon").context("RssAnon")?;
    let start = Instant::now();
    let work = match how {
        "plain-prepacked" => {
            let session = plain(&library, model, 2, true)?;
            return print(start, before, session);
        }
        "sums-prepacked" => PREPACKED,
        "sums-mapped" => MAPPED,
        _ => bail!("expected a way to open, found '{how}'"),
    };
    let mut decoder = open(&engine, model, work)?;
    print(start, before, &decoder)?;
    // What was opened works.
    let gates = half(&decoder);
    decoder.sums(&[&sample(0)], &gates)?;
    Ok(())
}

fn print<T>(start: Instant, before: f64, _opened: T) -> Result<()> {
    let seconds = start.elapsed().as_secs_f64();
    let after = memory_mb("self", "RssAnon").context("RssAnon")?;
    println!("{seconds} {}", after - before);
    Ok(())
}

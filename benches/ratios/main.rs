//! What the design promises, as ratios of one run on one machine. Measures; asserts nothing.
//!
//! ```text
//! tools/bench/run.sh                                # makes the model, then all parts
//! cargo bench --bench ratios -- MODEL [PART...]     # forward sessions weaken write
//! ```
//!
//! Every ratio compares operations that were run in turn in the same minutes: on a shared machine, seconds
//! from one hour mean little beside seconds from another. Numbers are medians, with the range beside them.

#![allow(missing_docs, clippy::print_stdout, clippy::print_stderr)]

mod forward;
mod measure;
mod sessions;
mod weaken;
mod write;

use std::path::Path;

use anyhow::{Result, bail};

const PARTS: &[&str] = &["forward", "sessions", "weaken", "write"];

fn main() -> Result<()> {
    // `cargo bench` adds `--bench`.
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        // Parts of a measurement that need a process of their own.
        ["child", "open", how, model] => sessions::open_in_child(how, Path::new(model)),
        ["child", "apply", model, plan, out] => {
            write::apply_in_child(Path::new(model), Path::new(plan), Path::new(out))
        }
        ["child", "in-place", model, plan] => {
            write::in_place_in_child(Path::new(model), Path::new(plan))
        }
        [] => bail!("expected a model folder made by tools/bench/make_model.py, found none"),
        [model, parts @ ..] => {
            if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(part)) {
                bail!("expected parts of {PARTS:?}, found '{unknown}'");
            }
            let model = Path::new(model);
            let wanted = |part| parts.is_empty() || parts.contains(&part);
            measure::describe_machine()?;
            if wanted("forward") {
                forward::run(model)?;
            }
            if wanted("sessions") {
                sessions::run(model)?;
            }
            if wanted("weaken") {
                weaken::run(model)?;
            }
            if wanted("write") {
                write::run(model)?;
            }
            Ok(())
        }
    }
}

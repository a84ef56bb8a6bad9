//! The verbs of a build without the feature `runtime`: what a device needs to change its model and to show
//! that it did.

use clap::{Parser, Subcommand};

use super::outcome::Outcome;
use super::printer::Printer;
use super::{Global, apply, diff, inspect, verify};

/// Unlearning for vision-language models that are already ONNX: the part for devices.
///
/// Applies a plan that `kvw weaken` made elsewhere to the model that lies here, and says what changed. Runs no model
/// and needs no ONNX Runtime; the kvw with every verb is built without `--no-default-features`.
#[derive(Parser)]
#[command(name = "kvw", version, max_term_width = 100)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) verb: Verb,
    #[command(flatten)]
    pub(super) global: Global,
}

#[derive(Subcommand)]
pub(super) enum Verb {
    Inspect(inspect::Inspect),
    Apply(apply::Apply),
    Diff(diff::Diff),
    Verify(verify::Verify),
}

impl Verb {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        match self {
            Verb::Inspect(verb) => verb.run(printer),
            Verb::Apply(verb) => verb.run(printer),
            Verb::Diff(verb) => verb.run(printer),
            Verb::Verify(verb) => verb.run(printer),
        }
    }
}

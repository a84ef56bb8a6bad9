//! Every verb.

use clap::{Parser, Subcommand};

use super::outcome::Outcome;
use super::printer::Printer;
use super::{
    Global, apply, check, collect, completions, demo, diff, eval, inspect, man, merge, probe,
    report, runtime, sign, sweep, unlearn, verify, weaken,
};

/// Unlearning for vision-language models that are already ONNX.
///
/// Makes a deployed model forget, without training and without PyTorch: it runs the exported model,
/// sees which MLP neurons fire more on what is to be forgotten than on what is to be kept (Knowledge
/// Vector Weakening, arXiv 2601.21794), and weakens their weights inside the ONNX files.
///
/// Try `kvw demo` first. Then `kvw inspect MODEL` says what can be done with a model, and `kvw unlearn`
/// does it.
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
    Demo(demo::Demo),
    Inspect(inspect::Inspect),
    Unlearn(unlearn::Unlearn),
    Collect(collect::Collect),
    Merge(merge::Merge),
    Weaken(weaken::Weaken),
    Apply(apply::Apply),
    Eval(eval::Eval),
    Probe(probe::ProbeVerb),
    Sweep(sweep::SweepVerb),
    Diff(diff::Diff),
    Check(check::Check),
    Report(report::Report),
    Sign(sign::Sign),
    Verify(verify::Verify),
    Doctor(runtime::Doctor),
    Runtime(runtime::Runtime),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Verb {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        match self {
            Verb::Demo(verb) => verb.run(printer),
            Verb::Inspect(verb) => verb.run(printer),
            Verb::Unlearn(verb) => verb.run(printer),
            Verb::Collect(verb) => verb.run(printer),
            Verb::Merge(verb) => verb.run(printer),
            Verb::Weaken(verb) => verb.run(printer),
            Verb::Apply(verb) => verb.run(printer),
            Verb::Eval(verb) => verb.run(printer),
            Verb::Probe(verb) => verb.run(printer),
            Verb::Sweep(verb) => verb.run(printer),
            Verb::Diff(verb) => verb.run(printer),
            Verb::Check(verb) => verb.run(printer),
            Verb::Report(verb) => verb.run(printer),
            Verb::Sign(verb) => verb.run(printer),
            Verb::Verify(verb) => verb.run(printer),
            Verb::Doctor(verb) => verb.run(printer),
            Verb::Runtime(verb) => verb.run(printer),
            Verb::Completions(verb) => verb.run(),
            Verb::Man(verb) => verb.run(printer),
        }
    }
}

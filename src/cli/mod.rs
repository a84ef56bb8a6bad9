//! The command line: arguments → a job of [`crate::pipeline`] → a printed result and an exit code.
//!
//! One file per verb. Results go to standard output, everything else to standard error. Exit codes:
//! 0 done or passed · 1 a verification failed · 2 usage or bad input · 3 internal error · 130
//! interrupted.

mod apply;
mod arguments;
mod check;
mod collect;
mod demo;
mod diff;
mod eval;
mod inspect;
mod merge;
mod outcome;
mod printer;
mod probe;
mod report;
mod runtime;
mod sign;
mod sweep;
mod unlearn;
mod verify;
mod weaken;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use printer::{Format, Printer};

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
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// How results are printed on standard output
    #[arg(long, global = true, value_parser = Format::parser(), default_value = "human")]
    format: Format,
    /// Say more on standard error (-v: steps; -vv: details)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Verb {
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
}

/// Parses the process's arguments, runs the verb, and returns the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => "error",
        1 => "kvw=info",
        _ => "kvw=debug",
    };
    let filter = EnvFilter::try_from_env("KVW_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let printer = Printer::new(cli.format);
    let run = AssertUnwindSafe(|| match &cli.verb {
        Verb::Demo(verb) => verb.run(&printer),
        Verb::Inspect(verb) => verb.run(&printer),
        Verb::Unlearn(verb) => verb.run(&printer),
        Verb::Collect(verb) => verb.run(&printer),
        Verb::Merge(verb) => verb.run(&printer),
        Verb::Weaken(verb) => verb.run(&printer),
        Verb::Apply(verb) => verb.run(&printer),
        Verb::Eval(verb) => verb.run(&printer),
        Verb::Probe(verb) => verb.run(&printer),
        Verb::Sweep(verb) => verb.run(&printer),
        Verb::Diff(verb) => verb.run(&printer),
        Verb::Check(verb) => verb.run(&printer),
        Verb::Report(verb) => verb.run(&printer),
        Verb::Sign(verb) => verb.run(&printer),
        Verb::Verify(verb) => verb.run(&printer),
        Verb::Doctor(verb) => verb.run(&printer),
        Verb::Runtime(verb) => verb.run(&printer),
    });
    match catch_unwind(run) {
        Ok(Ok(outcome)) => outcome.into(),
        Ok(Err(error)) => {
            printer.error(&error);
            outcome::of_error(&error).into()
        }
        Err(_) => {
            printer.note(
                "internal error: this is a defect of kvw; please report it with the lines above",
            );
            ExitCode::from(3)
        }
    }
}

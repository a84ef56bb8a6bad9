//! The command line: arguments → a job of the library → a printed result and an exit code.
//!
//! One file per verb; `verbs` is the list of them, and without the feature `runtime` the shorter one of `edge`.
//! Results go to standard output, everything else to standard error. Exit codes: 0 done or passed · 1 a
//! verification failed · 2 usage or bad input · 3 internal error · 130 interrupted (143 by SIGTERM, 129 by SIGHUP).

mod apply;
mod diff;
mod inspect;
mod outcome;
mod printer;
mod verify;

#[cfg(feature = "runtime")]
mod arguments;
#[cfg(feature = "runtime")]
mod check;
#[cfg(feature = "runtime")]
mod collect;
#[cfg(feature = "runtime")]
mod completions;
#[cfg(feature = "runtime")]
mod confined;
#[cfg(feature = "runtime")]
mod demo;
#[cfg(feature = "runtime")]
mod eval;
#[cfg(feature = "runtime")]
mod man;
#[cfg(feature = "runtime")]
mod merge;
#[cfg(feature = "runtime")]
mod probe;
#[cfg(feature = "runtime")]
mod progress;
#[cfg(feature = "runtime")]
mod report;
#[cfg(feature = "runtime")]
mod runtime;
#[cfg(feature = "runtime")]
mod sign;
#[cfg(feature = "runtime")]
mod sweep;
#[cfg(feature = "runtime")]
mod unlearn;
#[cfg(feature = "runtime")]
mod verbs;
#[cfg(not(feature = "runtime"))]
#[path = "edge.rs"]
mod verbs;
#[cfg(feature = "runtime")]
mod weaken;

use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::{Args, Parser as _};
use tracing_subscriber::EnvFilter;

use crate::files::interrupt::{self, Interrupted};
use printer::{Format, Printer};
use verbs::Cli;

/// What every verb takes.
#[derive(Args)]
struct Global {
    /// How results are printed on standard output
    #[arg(long, global = true, value_parser = Format::parser(), default_value = "human")]
    format: Format,
    /// Say more on standard error (-v: steps; -vv: details)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

/// Parses the process's arguments, runs the verb, and returns the exit code.
pub fn main() -> ExitCode {
    #[cfg(feature = "runtime")]
    if let Some(code) = confined::begin() {
        return code;
    }
    let Cli { verb, global } = Cli::parse();
    let level = match global.verbose {
        0 => "error",
        1 => "kvw=info",
        _ => "kvw=debug",
    };
    let filter = EnvFilter::try_from_env("KVW_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let printer = Printer::new(global.format);
    if let Err(error) = interrupt::listen(interrupted) {
        tracing::warn!("interrupts will not be cleaned up after: {error}");
    }
    let run = AssertUnwindSafe(|| verb.run(&printer));
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

/// Says what an interrupted run leaves, and ends the process: 128 and the signal's number.
fn interrupted(by: Interrupted) {
    let mut lines = "interrupted: unfinished files were removed\n".to_owned();
    for folder in by.pending {
        let folder = folder.display();
        lines += &format!(
            "{folder}: a change in place is half done; finish it: kvw apply {folder} --resume\n"
        );
    }
    let _ = anstream::stderr().write_all(lines.as_bytes());
    signal_hook::low_level::exit(128 + by.signal);
}

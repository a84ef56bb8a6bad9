//! `kvw check`.

use std::path::PathBuf;

use clap::Args;

use super::outcome::Outcome;
use super::printer::{Format, Printer};
use crate::check::{Policy, Subject, check};
use crate::eval::Evidence;
use crate::report::{VERDICTS, renderer};

/// The release gate: may this folder be shipped, by the policy?
///
/// Reads the receipt, the files and, where it is given, the evaluation; runs nothing. Every finding has a
/// stable code; the policy sets the bars and says how severe a finding is. Exit code 0: passed; 1: at least
/// one finding is an error; 2: the policy or the folder cannot be used.
#[derive(Args)]
#[command(
    after_help = "Example: kvw check OUT --policy policy.toml --evidence OUT.evaluation.json --original MODEL"
)]
pub(super) struct Check {
    /// Model folder that `unlearn` or `apply` wrote
    folder: PathBuf,
    /// What must hold (docs/ci.md has every key)
    #[arg(long, value_name = "FILE")]
    policy: PathBuf,
    /// Its evaluation (OUT.evaluation.json). Without it, numbers are the receipt's copy
    #[arg(long, value_name = "FILE")]
    evidence: Option<PathBuf>,
    /// The model that it was made from: proves that no other byte changed
    #[arg(long, value_name = "MODEL")]
    original: Option<PathBuf>,
    /// How the result is printed on standard output
    #[arg(
        long,
        default_value = "human",
        value_parser = Format::one_of(VERDICTS.iter().map(|form| (form.name, form.description)))
    )]
    format: Format,
}

impl Check {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let policy = Policy::read(&self.policy)?;
        let evidence = self.evidence.as_deref().map(Evidence::read).transpose()?;
        let subject = Subject {
            evidence: evidence.as_ref(),
            folder: &self.folder,
            original: self.original.as_deref(),
        };
        let verdict = check(&subject, &policy)?;
        let form = renderer(&self.format.0)
            .ok_or_else(|| anyhow::anyhow!("no form `{}`", self.format.0))?;
        printer.text((form.render)(&verdict))?;
        Ok(match verdict.passed {
            true => Outcome::Done,
            false => Outcome::Failed,
        })
    }
}

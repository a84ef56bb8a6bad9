//! `kvw report`.

use std::path::PathBuf;

use clap::Args;

use super::arguments::{DataArguments, refuse_existing};
use super::outcome::Outcome;
use super::printer::{Format, Printer};
use crate::files::write_atomic;
use crate::report::{Sources, model_card, page};

/// One page for people: what was forgotten, what was kept, what it cost
///
/// The page needs nothing beside it: no network, no server. With samples it names what was to be
/// forgotten: keep it like the evaluation, or leave them out with --samples 0.
#[derive(Args)]
#[command(
    after_help = "Example: kvw report OUT --evidence OUT.evaluation.json --plan forget.plan -o report.html"
)]
pub(super) struct Report {
    /// Model folder that `unlearn` or `apply` wrote
    folder: PathBuf,
    /// Its evaluation (OUT.evaluation.json). Without it, the receipt's numbers and no samples
    #[arg(long, value_name = "FILE")]
    evidence: Option<PathBuf>,
    /// Its plan: shows the gates
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// A file of `kvw probe`: shows what came of asking in other ways, and of controls
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    /// A file of `kvw sweep`: shows the trade-off
    #[arg(long, value_name = "FILE")]
    sweep: Option<PathBuf>,
    /// A set that was evaluated: shows its pictures. May be repeated
    #[arg(long = "data", value_name = "FILE")]
    data: Vec<PathBuf>,
    /// Judge by this policy (as `kvw check` does); without it the files are checked and nothing is judged
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// The model that it was made from: proves that no other byte changed
    #[arg(long, value_name = "MODEL")]
    original: Option<PathBuf>,
    /// Samples shown of each set, at most; 0: the page has no question, answer, name or picture
    #[arg(long, default_value_t = 100, value_name = "N")]
    samples: usize,
    /// Where it goes
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace OUTPUT
    #[arg(long)]
    force: bool,
    /// html: the page; markdown: a block for a model card, without samples
    #[arg(long, default_value = "html", value_parser = Format::one_of(FORMATS))]
    format: Format,
    #[command(flatten)]
    reading: DataArguments,
}

const FORMATS: [(&str, &str); 2] = [
    ("html", "One page that needs nothing beside it"),
    ("markdown", "A block for a model card, without samples"),
];

impl Report {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        refuse_existing(&self.output, self.force)?;
        let data = self
            .data
            .iter()
            .map(|path| self.reading.read(path, printer))
            .collect::<Result<Vec<_>, _>>()?;
        let sources = Sources {
            folder: &self.folder,
            evidence: self.evidence.as_deref(),
            plan: self.plan.as_deref(),
            probes: self.probe.as_deref(),
            sweep: self.sweep.as_deref(),
            policy: self.policy.as_deref(),
            original: self.original.as_deref(),
            data: &data,
            samples: self.samples,
        };
        let text = match self.format.0.as_str() {
            "markdown" => sources.render(|subject| Ok(model_card(subject)))?,
            "html" => sources.render(page)?,
            other => anyhow::bail!("expected --format html or markdown, found {other}"),
        };
        write_atomic(&self.output, self.force, |file| {
            file.write_all(text.as_bytes())
        })?;
        printer.note(&format!("report  {}", self.output.display()));
        Ok(Outcome::Done)
    }
}

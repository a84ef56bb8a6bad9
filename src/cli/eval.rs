//! `kvw eval`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::arguments::{
    DataArguments, GenerationArguments, RuntimeArguments, ScoringArguments, SetArgument, kinds,
    note_placement, parse_positive, read_sets, refuse_existing,
};
use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::bundle::Bundle;
use crate::edit::gates_digest;
use crate::eval::{
    Answer, Estimate, EvaluatedSet, Evidence, EvidenceSet, Role, Settings, Summary, evaluate,
    metric,
};
use crate::files::write_atomic;
use crate::kvw::{self, Gates};
use crate::pipeline::{Error, Model, check_identity, gates_of};

/// Measure what a model says, and what it still knows
///
/// For each sample: the greedy answer to its question, and how likely the model finds its true answer.
/// Reports exact-name accuracy, ROUGE-L and loss, and beside them what accuracy hides: any part of the
/// person's name or any other listed fact in the answer, and degenerate repetition. With --plan it
/// evaluates a plan that was not applied yet. All metrics are in the file of -o and in --format json
/// (docs/metrics.md).
#[derive(Args)]
#[command(
    after_help = "Example: kvw eval MODEL --plan forget.plan --data forget=forget.jsonl --data \
                  retain=retain.jsonl"
)]
pub(super) struct Eval {
    /// Model folder
    model: PathBuf,
    /// Evaluate the model as this plan would leave it
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// A set: JSONL with image, question, answer, and what docs/formats.md lists, or a benchmark, as
    /// clear:PATH/forget05 or mllmu:PATH/forget_5:cloze. KIND says what it is for: forget, retain,
    /// holdout (never shown to the model), or other (the default). Ready-made inputs are sets too
    /// (docs/feeds.md). May be repeated
    #[arg(
        long,
        visible_alias = "feeds",
        value_name = "[KIND=]PATH",
        required = true
    )]
    data: Vec<SetArgument>,
    /// Only the first N samples of each set
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    limit: Option<usize>,
    /// Print every answer and its scores too
    #[arg(long)]
    answers: bool,
    /// Write the evaluation file, with every answer in clear text
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the evaluation file
    #[arg(long)]
    force: bool,
    /// The precision to run where the folder has several (fp32, fp16, …)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    #[command(flatten)]
    generation: GenerationArguments,
    #[command(flatten)]
    scoring: ScoringArguments,
    #[command(flatten)]
    reading: DataArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

#[derive(Serialize)]
struct Evaluated {
    model: PathBuf,
    plan: Option<PathBuf>,
    evaluation_file: Option<PathBuf>,
    #[serde(flatten)]
    evidence: Evidence,
}

impl Eval {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        if let Some(output) = &self.output {
            refuse_existing(output, self.force)?;
        }
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let data = read_sets(&self.data, &self.reading, printer)?;
        let limit = self.limit.unwrap_or(usize::MAX);
        let sets = EvaluatedSet::all(kinds(&self.data, &data), limit);
        let plan = self
            .plan
            .as_ref()
            .map(|path| kvw::load_plan(path).map(|plan| (path, plan)));
        let plan = plan.transpose().map_err(Error::from)?;
        let engine = self.runtime.engine(printer)?;
        let samples: usize = sets.iter().map(|set| set.samples().len()).sum();
        let generation = self.generation.options(&bundle);
        let forwards = samples.saturating_mul(generation.limit.tokens());
        let mut model = Model::open(&bundle, self.variant.as_deref(), &engine, forwards)?;
        let (mut decoder, gates) = match &plan {
            Some((path, (plan, provenance))) => {
                let towers = plan.towers();
                check_identity(path, provenance, &model.identity_of(towers)?)?;
                let decoder = model.gated(towers, forwards)?;
                (decoder, gates_of(plan))
            }
            None => (model.plain_decoder(forwards)?, Gates::new()),
        };
        note_placement(&engine, printer);
        let settings = Settings::new(generation, sets.iter().map(|set| set.data))
            .with_min_k(&self.scoring.min_k);
        let progress = printer.progress("evaluating", samples);
        let mut before = 0;
        let mut evaluated = Vec::new();
        for set in &sets {
            let measured = evaluate(
                &mut model.lvlm,
                &mut decoder,
                set.samples(),
                &gates,
                &settings,
                |done| progress.at(before + done),
            )
            .map_err(Error::from)?;
            let samples = set.samples().len();
            before += samples;
            let models = [(Role::Model, measured)];
            evaluated.push(
                set.entry(set.name.clone(), samples, models)
                    .map_err(Error::from)?,
            );
        }
        drop(progress);
        let mut evidence = Evidence::of(&settings, engine.describe(), evaluated);
        evidence.plan_digest = plan
            .as_ref()
            .map(|(_, (plan, _))| gates_digest(&plan.gates));
        evidence.compare();
        if let Some(output) = &self.output {
            let bytes = evidence.to_bytes()?;
            write_atomic(output, self.force, |file| file.write_all(&bytes)).map_err(Error::from)?;
        }
        if !self.answers {
            evidence
                .sets
                .iter_mut()
                .for_each(EvidenceSet::forget_answers);
        }
        let evaluated = Evaluated {
            model: self.model.clone(),
            plan: self.plan.clone(),
            evaluation_file: self.output.clone(),
            evidence,
        };
        printer.result("eval", &evaluated, || human(&evaluated))?;
        Ok(Outcome::Done)
    }
}

fn human(evaluated: &Evaluated) -> String {
    let sets = &evaluated.evidence.sets;
    let rows = sets.iter().flat_map(|set| {
        set.models.values().map(|measured| {
            let mut row = vec![set.set.clone(), set.samples.to_string()];
            let shown = COLUMNS.iter().map(|name| show(&measured.summary, name));
            row.extend(shown);
            row
        })
    });
    let mut text = table(&header(COLUMNS), rows) + "\n";
    for answer in sets
        .iter()
        .flat_map(|set| set.models.values().flat_map(|measured| &measured.answers))
    {
        text += &shown(answer);
    }
    if let Some(file) = &evaluated.evaluation_file {
        text += &format!("\nevery answer  {} (in clear text)\n", file.display());
    }
    text
}

fn shown(answer: &Answer) -> String {
    let answered = &answer.answered;
    format!(
        "\n{}\n  question   {}\n  reference  {}\n  answer     {}\n",
        answered.id,
        answered.question,
        answered.reference,
        answered.prediction.as_deref().unwrap_or("-")
    )
}

/// What the table of `eval` shows.
const COLUMNS: &[&str] = &[
    "name_accuracy",
    "leak_any",
    "leak_first_name",
    "leak_last_name",
    "leak_fact",
    "degenerate",
    "rouge_l_recall",
    "loss",
];

/// `set`, `samples`, and the titles of `columns`.
pub(super) fn header(columns: &[&'static str]) -> Vec<&'static str> {
    let titles = columns
        .iter()
        .map(|&name| metric(name).map_or(name, |metric| metric.title));
    ["set", "samples"].into_iter().chain(titles).collect()
}

/// A metric's value: a share in percent, another number with three digits, or a dash where it is not
/// defined.
pub(super) fn show(summary: &Summary, name: &str) -> String {
    match summary.get(name).and_then(|estimate| estimate.value) {
        None => "-".to_owned(),
        Some(value) if in_percent(name) => format!("{:.0} %", 100.0 * value),
        Some(value) => format!("{value:.3}"),
    }
}

/// A metric's interval in the unit of [`show`]; nothing where there is none.
pub(super) fn interval(estimate: &Estimate, name: &str) -> String {
    match (estimate.low, estimate.high) {
        (Some(low), Some(high)) if in_percent(name) => {
            format!(" [{:.0}, {:.0}]", 100.0 * low, 100.0 * high)
        }
        (Some(low), Some(high)) => format!(" [{low:.2}, {high:.2}]"),
        _ => String::new(),
    }
}

/// Whether a metric is a share of answers.
fn in_percent(name: &str) -> bool {
    metric(name).is_some_and(|metric| metric.counts)
}

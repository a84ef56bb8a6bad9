//! `kvw eval`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::arguments::{RuntimeArguments, dataset, note_placement};
use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::bundle::Bundle;
use crate::eval::text::{Answered, Metric, SampleScores, Summary};
use crate::eval::{Evaluation, evaluate};
use crate::graph::Outputs;
use crate::kvw::{self, Gates, LayerRange};
use crate::pipeline::{Error, Model, check_identity, gates_of};

/// Measure what a model says, and what it still knows
///
/// For each sample: the greedy answer to its question, and the loss of its true answer. Reports
/// exact-name accuracy, ROUGE-L, loss, and beside them what accuracy hides: any part of the person's name
/// or any other listed fact in the answer, and degenerate repetition. With --plan it evaluates a plan that
/// was not applied yet.
#[derive(Args)]
#[command(
    after_help = "Example: kvw eval MODEL --plan forget.plan --data forget.jsonl --data retain.jsonl"
)]
pub(super) struct Eval {
    /// Model folder
    model: PathBuf,
    /// Evaluate the model as this plan would leave it
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// A set: JSONL with image, question, answer, and optionally name and facts. May be repeated
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 50, value_name = "N")]
    max_new_tokens: usize,
    /// Only the first N samples of each set
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Print every answer and its scores too
    #[arg(long)]
    answers: bool,
    /// The precision to run where the folder has several (fp32, fp16, …)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

#[derive(Serialize)]
struct Evaluated {
    model: PathBuf,
    plan: Option<PathBuf>,
    max_new_tokens: usize,
    runtime: serde_json::Value,
    sets: Vec<Set>,
}

#[derive(Serialize)]
struct Set {
    data: PathBuf,
    sha256: String,
    summary: Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    answers: Option<Vec<Answer>>,
}

/// One answer with its scores.
#[derive(Serialize)]
pub(super) struct Answer {
    #[serde(flatten)]
    answered: Answered,
    scores: SampleScores,
}

impl Eval {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let mut sets = self
            .data
            .iter()
            .map(|path| dataset(path))
            .collect::<Result<Vec<_>, _>>()?;
        for set in &mut sets {
            set.samples.truncate(self.limit.unwrap_or(usize::MAX));
        }
        let plan = self
            .plan
            .as_ref()
            .map(|path| kvw::load_plan(path).map(|plan| (path, plan)));
        let plan = plan.transpose().map_err(Error::from)?;
        let engine = self.runtime.engine(printer)?;
        let samples: usize = sets.iter().map(|set| set.samples.len()).sum();
        let forwards = samples.saturating_mul(self.max_new_tokens);
        let mut model = Model::open(&bundle, self.variant.as_deref(), &engine, forwards)?;
        let (mut decoder, gates) = match &plan {
            Some((path, (plan, provenance))) => {
                check_identity(path, provenance, &model.identity()?)?;
                let decoder = model.decoder(LayerRange::All, Outputs::Model, forwards)?;
                (decoder, gates_of(plan))
            }
            None => (model.plain_decoder(forwards)?, Gates::new()),
        };
        note_placement(&engine, printer);
        let progress = printer.progress("evaluating", samples);
        let mut before = 0;
        let mut evaluated = Vec::new();
        for set in &sets {
            let evaluation = evaluate(
                &mut model.lvlm,
                &mut decoder,
                &set.samples,
                &gates,
                self.max_new_tokens,
                |done| progress.at(before + done),
            )
            .map_err(Error::from)?;
            before += set.samples.len();
            evaluated.push(Set {
                data: set.path.clone(),
                sha256: set.sha256.clone(),
                summary: evaluation.summary.clone(),
                answers: self.answers.then(|| answers(evaluation)),
            });
        }
        drop(progress);
        let evaluated = Evaluated {
            model: self.model.clone(),
            plan: self.plan.clone(),
            max_new_tokens: self.max_new_tokens,
            runtime: engine.describe(),
            sets: evaluated,
        };
        printer.result("eval", &evaluated, || human(&evaluated))?;
        Ok(Outcome::Done)
    }
}

/// Answers beside their scores.
pub(super) fn answers(evaluation: Evaluation) -> Vec<Answer> {
    let scored = evaluation.answers.into_iter().zip(evaluation.scores);
    scored
        .map(|(answered, scores)| Answer { answered, scores })
        .collect()
}

fn human(evaluated: &Evaluated) -> String {
    let rows = evaluated.sets.iter().map(|set| {
        let summary = &set.summary;
        vec![
            label(&set.data),
            summary.n.to_string(),
            percent(&summary.name_accuracy),
            percent(&summary.leak_any),
            percent(&summary.leak_first_name),
            percent(&summary.leak_last_name),
            percent(&summary.leak_fact),
            percent(&summary.degenerate),
            number(&summary.rouge_l_recall),
            number(&summary.loss),
        ]
    });
    let header = [
        "set",
        "samples",
        "name",
        "any leak",
        "first name",
        "last name",
        "fact",
        "repeats",
        "ROUGE-L",
        "loss",
    ];
    let mut text = table(&header, rows) + "\n";
    for answer in evaluated
        .sets
        .iter()
        .flat_map(|set| set.answers.iter().flatten())
    {
        text += &format!(
            "\n{}\n  question   {}\n  reference  {}\n  answer     {}\n",
            answer.answered.id,
            answer.answered.question,
            answer.answered.reference,
            answer.answered.prediction
        );
    }
    text
}

/// A set's name in tables: its file's stem.
pub(super) fn label(path: &std::path::Path) -> String {
    path.file_stem()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// A share in percent, or a dash where it is not defined.
pub(super) fn percent(metric: &Metric) -> String {
    metric
        .value
        .map_or_else(|| "-".to_owned(), |value| format!("{:.0} %", 100.0 * value))
}

/// A number, or a dash where it is not defined.
pub(super) fn number(metric: &Metric) -> String {
    metric
        .value
        .map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"))
}

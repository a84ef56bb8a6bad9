//! `kvw weaken`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::apply::describe;
use super::arguments::{
    DataArguments, RuntimeArguments, WeakenArguments, note_placement, refuse_existing,
};
use super::outcome::Outcome;
use super::printer::Printer;
use crate::bundle::Bundle;
use crate::kvw::{self, PlanSummary, Rule};
use crate::pipeline::{Error, Model, check_identity, provenance};

/// Compute what to weaken, and by how much: a plan
///
/// Goes through the forget set step by step on the model as weakened so far. A neuron that fires more
/// than on the retain set is weakened by exp(-γ · ln(ratio)). No file of the model is touched: the plan
/// holds one gate per neuron, and `kvw apply` or `kvw eval --plan` use it.
///
/// A plan together with the unlearned model gives back the original: keep it as safe as that.
#[derive(Args)]
#[command(
    after_help = "Example: kvw weaken MODEL --forget forget.jsonl --retain-coefficients retain.kc \
                        -o forget.plan --gamma 0.4 --layers 0-4"
)]
pub(super) struct Weaken {
    /// Model folder
    model: PathBuf,
    /// The forget set: JSONL with image, question, answer; a benchmark, clear:PATH/forget05 or
    /// mllmu:PATH/forget_5; or ready-made inputs, a .safetensors or .npz file or a folder of them
    #[arg(long, visible_alias = "feeds", value_name = "PATH")]
    forget: PathBuf,
    /// Coefficients of the retain set, from `kvw collect`
    #[arg(long, value_name = "FILE")]
    retain_coefficients: PathBuf,
    /// Where the plan goes (safetensors)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// The precision to run where the folder has several (fp32, fp16, …)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    weakening: WeakenArguments,
    #[command(flatten)]
    reading: DataArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

#[derive(Serialize)]
struct Weakened {
    output: PathBuf,
    steps: u64,
    rule: String,
    parameters: serde_json::Value,
    #[serde(flatten)]
    summary: PlanSummary,
}

impl Weaken {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        refuse_existing(&self.output, self.force)?;
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let forget = self.reading.read(&self.forget, printer)?;
        let (retain, retain_provenance) =
            kvw::load_coefficients(&self.retain_coefficients).map_err(Error::from)?;
        let engine = self.runtime.engine(printer)?;
        let steps = forget.samples.len() * self.weakening.steps.epochs;
        let mut model = Model::open(&bundle, self.variant.as_deref(), &engine, steps)?;
        let identity = model.identity_of(self.weakening.tower)?;
        check_identity(&self.retain_coefficients, &retain_provenance, &identity)?;
        let rule = self.weakening.rule(forget.samples.len(), printer);
        let options = self.weakening.options(&model)?;
        model.encode_first(self.weakening.tower, &forget.samples)?;
        let mut decoder = model.measuring(self.weakening.layers(), rule.moment(), steps)?;
        note_placement(&engine, printer);
        let progress = printer.progress("weakening", steps);
        let plan = model.weaken(
            &mut decoder,
            &rule,
            &retain,
            &forget.samples,
            &options,
            |step| {
                progress.at(step.index + 1);
            },
        )?;
        drop(progress);
        let mut provenance = provenance(&model, &identity, &engine, &[("forget", &forget)])?;
        if let (Some(plan), Some(retain)) = (
            provenance.get_mut("data"),
            retain_provenance.pointer("/data/retain"),
        ) {
            plan["retain"] = retain.clone();
        }
        kvw::save_plan(&self.output, &plan, provenance, self.force).map_err(Error::from)?;
        let weakened = Weakened {
            output: self.output.clone(),
            steps: plan.steps,
            rule: plan.rule.clone(),
            parameters: plan.parameters.clone(),
            summary: plan.summary(),
        };
        printer.result("weaken", &weakened, || {
            format!("{}: {}", self.output.display(), describe(&plan))
        })?;
        Ok(Outcome::Done)
    }
}

//! `kvw apply`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::outcome::Outcome;
use super::printer::Printer;
use super::weaken::describe;
use crate::bundle::Bundle;
use crate::edit::{self, EditPlan, Receipt, TensorEdit};
use crate::kvw::{self, Plan};
use crate::pipeline::{Error, identity_in};

/// Write the unlearned model: fold a plan's gates into the weights
///
/// Copies the model folder and rewrites the planned byte ranges of every decoder file; all other bytes
/// stay identical. Reads back what it wrote before the folder appears, and leaves a receipt, kvw.json.
/// Needs no ONNX Runtime.
#[derive(Args)]
#[command(after_help = "Example: kvw apply MODEL --plan forget.plan -o MODEL-unlearned")]
pub(super) struct Apply {
    /// Model folder
    model: PathBuf,
    /// The plan, from `kvw weaken`
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// The new folder
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Put digests of whole files into the receipt (reads every edited file twice more)
    #[arg(long)]
    checksums: bool,
    /// Replace an output that kvw wrote
    #[arg(long)]
    force: bool,
    /// Say what would be changed, and write nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Applied<'a> {
    output: &'a PathBuf,
    dry_run: bool,
    edits: &'a [TensorEdit],
    receipt: Option<Receipt>,
}

impl Apply {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let (plan, provenance) = kvw::load_plan(&self.plan).map_err(Error::from)?;
        let identity = identity_in(&self.plan, &provenance)?;
        let edits = EditPlan::new(&bundle, &plan.gates, &identity).map_err(Error::from)?;
        let receipt = if self.dry_run {
            edits.check_bytes(&bundle).map_err(Error::from)?;
            None
        } else {
            let options = edit::Options {
                force: self.force,
                checksums: self.checksums,
                plan: record(&plan, &provenance),
            };
            Some(
                edit::apply(&bundle, &edits, &self.output, &options, &|_| {})
                    .map_err(Error::from)?,
            )
        };
        let applied = Applied {
            output: &self.output,
            dry_run: self.dry_run,
            edits: edits.edits(),
            receipt,
        };
        printer.result("apply", &applied, || {
            let mut text = format!("{}\n", describe(&plan));
            for edit in edits.edits() {
                text += &format!("  {} {} {}\n", edit.file, edit.span, edit.tensor);
            }
            text + &match self.dry_run {
                true => format!("dry run: nothing was written to {}", self.output.display()),
                false => format!(
                    "{}: {} bytes in {} tensors rewritten, all others identical",
                    self.output.display(),
                    edits.bytes(),
                    edits.edits().len()
                ),
            }
        })?;
        Ok(Outcome::Done)
    }
}

/// What a receipt keeps of a plan.
pub(super) fn record(plan: &Plan, provenance: &serde_json::Value) -> serde_json::Value {
    let of = |key: &str| provenance.get(key).cloned().unwrap_or_default();
    serde_json::json!({
        "rule": plan.rule,
        "parameters": plan.parameters,
        "steps": plan.steps,
        "data": of("data"),
        "runtime": of("runtime"),
    })
}

//! `kvw apply`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::outcome::Outcome;
use super::printer::Printer;
use crate::bundle::Bundle;
use crate::edit::{
    self, Cost, EditForm, EditPlan, FormChoice, GraphEdit, MlpEdit, Receipt, TensorEdit,
};
use crate::kvw::{self, Plan};

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
    /// How gates are written: auto, columns (of a float W_down), scales (of up_proj: exact for quantized
    /// gated MLPs) or mul (a Mul by the gates is added to the graph). auto takes, for each layer, the
    /// first that fits
    #[arg(long, default_value = "auto", value_name = "FORM")]
    edit: FormChoice,
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
    mlps: &'a [MlpEdit],
    edits: &'a [TensorEdit],
    graphs: &'a [GraphEdit],
    receipt: Option<Receipt>,
}

impl Apply {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let bundle = Bundle::open(&self.model)?;
        let (plan, provenance) = kvw::load_plan(&self.plan)?;
        let identity = edit::identity_in(&self.plan, &provenance)?;
        let edits = EditPlan::in_form(&bundle, &plan.gates, &identity, self.edit)?;
        let receipt = if self.dry_run {
            edits.check_bytes(&bundle)?;
            None
        } else {
            let options = edit::Options {
                force: self.force,
                checksums: self.checksums,
                plan: record(&plan, &provenance),
            };
            Some(edit::apply(
                &bundle,
                &edits,
                &self.output,
                &options,
                &|_| {},
            )?)
        };
        let applied = Applied {
            output: &self.output,
            dry_run: self.dry_run,
            mlps: edits.mlps(),
            edits: edits.edits(),
            graphs: edits.graphs(),
            receipt,
        };
        printer.result("apply", &applied, || {
            let text = format!("{}\n{}", describe(&plan), changes(&edits, self.dry_run));
            text + &match self.dry_run {
                true => format!("dry run: nothing was written to {}", self.output.display()),
                false => format!(
                    "{}: {} bytes in {} tensors rewritten{}, all others identical",
                    self.output.display(),
                    edits.bytes(),
                    edits.edits().len(),
                    match edits.graphs().len() {
                        0 => String::new(),
                        files => format!(", the graphs of {files} files changed"),
                    }
                ),
            }
        })?;
        Ok(Outcome::Done)
    }
}

/// What is done where, and with `details` each byte range and change of a graph.
fn changes(edits: &EditPlan, details: bool) -> String {
    let mut text = String::new();
    let mut files: Vec<&str> = edits.mlps().iter().map(|mlp| mlp.file.as_str()).collect();
    files.dedup();
    for file in files {
        text += &format!("  {file}\n");
        for (form, graph, cost) in kinds(edits.mlps(), file) {
            let layers = edits.mlps().iter().filter(|mlp| {
                mlp.file == file && (mlp.form, mlp.graph, mlp.cost) == (form, graph, cost)
            });
            let layers: Vec<String> = layers.map(|mlp| mlp.layer.to_string()).collect();
            let graph = if graph { ", in the graph" } else { "" };
            text += &format!("    {form}{graph}: layers {}; ", layers.join(", "));
            text += &format!("costs {cost} at inference\n");
        }
        let graph = edits.graphs().iter().find(|graph| graph.file == file);
        if let Some(graph) = graph {
            let (before, after) = (graph.bytes_before, graph.bytes_after);
            text += &format!("    graph: {before} bytes become {after}\n");
            for change in graph.changes.iter().filter(|_| details) {
                text += &format!("      {change}\n");
            }
        }
    }
    for edit in edits.edits() {
        text += &format!("  {} {} {}\n", edit.file, edit.span, edit.tensor);
    }
    text
}

/// The different ways in which the layers of `file` are edited, in the order of the layers.
fn kinds(mlps: &[MlpEdit], file: &str) -> Vec<(EditForm, bool, Cost)> {
    let mut kinds = Vec::new();
    for mlp in mlps.iter().filter(|mlp| mlp.file == file) {
        let kind = (mlp.form, mlp.graph, mlp.cost);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
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

/// A plan in a line.
pub(super) fn describe(plan: &Plan) -> String {
    let summary = plan.summary();
    format!(
        "{} of {} knowledge vectors weakened in {} layers after {} steps, mean gate {:.3}, least {:.2e}",
        summary.neurons,
        summary.of_neurons,
        summary.layers,
        plan.steps,
        summary.mean_gate,
        summary.min_gate
    )
}

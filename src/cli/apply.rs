//! `kvw apply`.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use serde::Serialize;

use super::outcome::Outcome;
use super::printer::Printer;
use crate::bundle::{Bundle, Tree};
use crate::edit::in_place::{self, Preflight};
use crate::edit::{
    self, Cost, EditForm, EditPlan, FormChoice, GraphEdit, MlpEdit, Receipt, TensorEdit,
};
use crate::files::journal::RolledForward;
use crate::files::{FolderLock, shred};
use crate::kvw::{self, Plan};

/// Write the unlearned model: fold a plan's gates into the weights
///
/// Copies the model folder and rewrites the planned byte ranges of every decoder file; all other bytes
/// stay identical. Reads back what it wrote before the folder appears, and leaves a receipt, kvw.json.
/// Needs no ONNX Runtime.
///
/// With --in-place the model's own files are changed, for a disk without room for a second model. Stop whatever runs
/// the model first: a runtime that has the files mapped would see half of it. A run that is killed leaves a
/// journal in the folder; the same command, or --resume, finishes it, and until then nothing else reads the model.
/// SHA256SUMS and signatures, which vouch for the model as it was, are removed: run `kvw sign` again.
#[derive(Args)]
#[command(
    after_help = "Examples: kvw apply MODEL --plan forget.plan -o MODEL-unlearned\n          \
    kvw apply MODEL --plan forget.plan --in-place --dry-run\n          \
    kvw apply MODEL --plan forget.plan --in-place --shred-plan"
)]
#[command(group = ArgGroup::new("target").required(true).args(["output", "in_place", "resume", "undo"]))]
pub(super) struct Apply {
    /// Model folder
    model: PathBuf,
    /// The plan, from `kvw weaken`
    #[arg(long, value_name = "FILE", required_unless_present_any = ["resume", "undo"], conflicts_with_all = ["resume", "undo"])]
    plan: Option<PathBuf>,
    /// The new folder
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    /// Change the model's own files
    #[arg(long)]
    in_place: bool,
    /// Finish a change in place that was interrupted
    #[arg(long)]
    resume: bool,
    /// Take a change in place back, by its undo log: every byte becomes what it was
    #[arg(long, value_name = "FILE")]
    undo: Option<PathBuf>,
    /// Before changing in place, write the way back to this file. It holds the weights as they were: whoever has
    /// it has what was forgotten. Delete it when the model is accepted
    #[arg(long, value_name = "FILE", requires = "in_place")]
    undo_log: Option<PathBuf>,
    /// After the change in place was verified, overwrite the plan with zeros, once, and delete it. Flash, copy-on-write
    /// file systems, snapshots and backups may keep the old blocks
    #[arg(long, requires = "in_place")]
    shred_plan: bool,
    /// Make gates below this exactly 0: these knowledge vectors are gone, with the plan or without. Refused where the
    /// weights are quantized, which would keep them
    #[arg(long, value_name = "GATE", value_parser = threshold, requires = "plan")]
    zero_below: Option<f32>,
    /// How gates are written: auto, columns (of a float W_down), scales (of up_proj: exact for quantized
    /// gated MLPs) or mul (a Mul by the gates is added to the graph). auto takes, for each layer, the
    /// first that fits
    #[arg(long, default_value = "auto", value_name = "FORM")]
    edit: FormChoice,
    /// Put digests of whole files into the receipt (reads every edited file twice more)
    #[arg(long, requires = "output")]
    checksums: bool,
    /// Replace an output that kvw wrote, or an existing undo log
    #[arg(long)]
    force: bool,
    /// Say what would be changed, and write nothing; in place: also how much room it needs
    #[arg(long, requires = "plan")]
    dry_run: bool,
}

/// A gate between 0 and 1.
fn threshold(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(gate) if gate > 0.0 && gate <= 1.0 => Ok(gate),
        _ => Err("expected a number above 0 and not above 1".to_owned()),
    }
}

#[derive(Serialize)]
struct Applied<'a> {
    output: &'a Path,
    dry_run: bool,
    mlps: &'a [MlpEdit],
    edits: &'a [TensorEdit],
    graphs: &'a [GraphEdit],
    preflight: Option<Preflight>,
    plan_shredded: bool,
    receipt: Option<Receipt>,
}

#[derive(Serialize)]
struct Settled<'a> {
    folder: &'a Path,
    /// What was brought to its end; absent where nothing was pending.
    #[serde(flatten)]
    done: Option<RolledForward>,
}

impl Apply {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        if self.resume {
            let lock = FolderLock::take(&self.model)?;
            let done = in_place::resume(&self.model, &lock)?;
            return self.settled(printer, done, "finished: the change in place");
        }
        if let Some(log) = &self.undo {
            let lock = FolderLock::take(&self.model)?;
            in_place::resume(&self.model, &lock)?;
            let done = in_place::undo(&self.model, log, &lock)?;
            return self.settled(printer, Some(done), "taken back: the change in place");
        }
        // clap asks for it wherever it comes to this.
        let Some(path) = &self.plan else {
            return Ok(Outcome::BadInput);
        };
        let (mut plan, provenance) = kvw::load_plan(path)?;
        let identity = edit::identity_in(path, &provenance)?;
        let mut about = record(&plan, &provenance);
        if let Some(threshold) = self.zero_below {
            let removed = plan.zero_below(threshold);
            about["zero_below"] = serde_json::json!({"gate": threshold, "removed": removed});
        }
        if self.in_place && !self.dry_run {
            if self.shred_plan {
                shred::check(path)?;
            }
            let lock = FolderLock::take(&self.model)?;
            if let Some(done) = in_place::resume(&self.model, &lock)? {
                printer.note(&format!(
                    "finished first: an earlier change in place, {} bytes",
                    done.bytes
                ));
                let tree = Tree::of_folder(&self.model)?;
                let digest = edit::gates_digest(&plan.gates);
                if Receipt::of(&tree)?.is_some_and(|receipt| receipt.names(digest)) {
                    self.shred(path)?;
                    return self.settled(printer, Some(done), "finished: the change in place");
                }
            }
        }
        let bundle = Bundle::open(&self.model)?;
        let edits = EditPlan::in_form(&bundle, &plan.gates, &identity, self.edit)?;
        if self.zero_below.is_some() {
            edits.check_removal(&plan.gates)?;
        }
        let options = edit::Options {
            force: self.force,
            checksums: self.checksums,
            plan: about,
        };
        let (mut receipt, mut preflight) = (None, None);
        match &self.output {
            Some(_) if self.dry_run => edits.check_bytes(&bundle)?,
            Some(output) => {
                receipt = Some(edit::apply(&bundle, &edits, output, &options, &|_| {})?);
            }
            None => {
                let log = self.undo_log.as_deref();
                let (found, lock) = in_place::preflight(&bundle, &edits, log)?;
                preflight = Some(found);
                if self.dry_run {
                    edits.check_bytes(&bundle)?;
                } else {
                    let prepared =
                        in_place::prepare(&bundle, &edits, &lock, log, &options, &|_| {})?;
                    in_place::resume(&self.model, &lock)?;
                    self.shred(path)?;
                    receipt = Some(prepared);
                }
            }
        }
        let applied = Applied {
            output: self.output.as_ref().unwrap_or(&self.model),
            dry_run: self.dry_run,
            mlps: edits.mlps(),
            edits: edits.edits(),
            graphs: edits.graphs(),
            preflight,
            plan_shredded: self.shred_plan && !self.dry_run,
            receipt,
        };
        printer.result("apply", &applied, || {
            let text = format!("{}\n{}", describe(&plan), changes(&edits, self.dry_run));
            text + &self.outcome(&edits, &applied)
        })?;
        Ok(Outcome::Done)
    }

    /// What was done, or would be, in its last lines.
    fn outcome(&self, edits: &EditPlan, applied: &Applied<'_>) -> String {
        let mut text = String::new();
        if let Some(preflight) = &applied.preflight {
            text += &format!(
                "in place: {} bytes in {} files change; {} bytes of room needed meanwhile, {} available\n",
                preflight.changed_bytes,
                preflight.files.len(),
                preflight.needed_bytes,
                preflight.available_bytes
            );
            if !preflight.removed.is_empty() {
                let removed = preflight.removed.join(", ");
                let tense = if self.dry_run {
                    "would be removed"
                } else {
                    "removed"
                };
                text += &format!("{tense}, as it vouches for the model before: {removed}\n");
            }
        }
        if let Some(log) = self.undo_log.as_ref().filter(|_| !self.dry_run) {
            let log = log.display();
            text += &format!(
                "{log} leads back, and holds what was forgotten: delete it when all is well\n"
            );
        }
        if applied.plan_shredded {
            text += "the plan was overwritten once and deleted\n";
        }
        let output = applied.output.display();
        text + &match self.dry_run {
            true => format!("dry run: nothing was written to {output}"),
            false => format!(
                "{output}: {} bytes in {} tensors rewritten{}, all others identical",
                edits.bytes(),
                edits.edits().len(),
                match edits.graphs().len() {
                    0 => String::new(),
                    files => format!(", the graphs of {files} files changed"),
                }
            ),
        }
    }

    fn shred(&self, plan: &Path) -> Result<(), crate::files::Error> {
        match self.shred_plan {
            true => shred::shred(plan),
            false => Ok(()),
        }
    }

    fn settled(
        &self,
        printer: &Printer,
        done: Option<RolledForward>,
        what: &str,
    ) -> anyhow::Result<Outcome> {
        let folder = self.model.as_path();
        printer.result("apply", &Settled { folder, done }, || match done {
            Some(done) => format!(
                "{}: {what}, {} bytes in {} files, read back and compared",
                folder.display(),
                done.bytes,
                done.files
            ),
            None => format!("{}: nothing was pending", folder.display()),
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

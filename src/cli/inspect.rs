//! `kvw inspect`.

use std::path::PathBuf;

use clap::Args;

use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::bundle::Bundle;
use crate::edit::{self, FileReport, Inspection};

/// Show what a model is made of, and what can be weakened in it
///
/// Lists every ONNX file of a model folder (or one .onnx file) with its MLPs: layer, width, how the down
/// projection is stored, how it would be edited, and where it cannot be, why. Needs no ONNX Runtime.
#[derive(Args)]
pub(super) struct Inspect {
    /// Model folder, or a single .onnx file
    model: PathBuf,
}

impl Inspect {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let bundle = Bundle::open(&self.model)?;
        let inspection = edit::inspect(&bundle)?;
        printer.result("inspect", &inspection, || human(&inspection))?;
        Ok(Outcome::Done)
    }
}

fn human(inspection: &Inspection) -> String {
    let mut text = format!(
        "layout {}, family {}\n",
        name(&inspection.layout),
        inspection.family.as_deref().unwrap_or("unknown")
    );
    for file in &inspection.files {
        text += &format!("\n{} ({})\n", file.path, name(&file.role));
        match file.mlps.as_slice() {
            [] => text += "  no MLPs\n",
            _ => text += &mlps(file),
        }
        for refused in &file.refused {
            let (op, node, reason) = (&refused.op, &refused.node, &refused.reason);
            text += &format!("  refused: {op} '{node}': {reason}\n");
        }
        for warning in &file.warnings {
            text += &format!("  warning: {warning}\n");
        }
    }
    text
}

fn mlps(file: &FileReport) -> String {
    let rows = file.mlps.iter().map(|mlp| {
        let layer = mlp
            .layer
            .map_or_else(|| "-".to_owned(), |layer| layer.to_string());
        let edit = mlp.edit.as_ref().map_or_else(|| "none".to_owned(), name);
        let kind = if mlp.gated { "gated" } else { "plain" };
        vec![
            format!("  {layer}"),
            name(&mlp.tower),
            kind.to_owned(),
            mlp.d_ff.to_string(),
            mlp.d_model.to_string(),
            mlp.op.clone(),
            mlp.dtype.clone(),
            edit,
            mlp.reason.clone().unwrap_or_default(),
        ]
    });
    let header = [
        "  layer", "tower", "kind", "d_ff", "d_model", "op", "dtype", "edit", "reason",
    ];
    table(&header, rows) + "\n"
}

/// The name that the JSON has for it.
fn name(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "?".to_owned(),
    }
}

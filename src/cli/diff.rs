//! `kvw diff`.

use std::path::PathBuf;

use clap::Args;

use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::edit::{self, DiffReport};

/// Compare two models byte by byte, and name the tensors that differ
///
/// Where B carries a receipt (kvw.json), also says whether every changed byte lies in a planned range and
/// whether every planned range did change. Exit code 0: identical, or exactly what the receipt says; 1:
/// anything else differs.
#[derive(Args)]
#[command(after_help = "Example: kvw diff MODEL MODEL-unlearned")]
pub(super) struct Diff {
    /// Model folder or .onnx file
    a: PathBuf,
    /// The other one
    b: PathBuf,
}

impl Diff {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let report = edit::diff(&self.a, &self.b)?;
        printer.result("diff", &report, || human(&report))?;
        Ok(if report.is_as_planned() {
            Outcome::Done
        } else {
            Outcome::Failed
        })
    }
}

fn human(report: &DiffReport) -> String {
    if report.is_identical() {
        return format!("identical: {} files", report.identical_files);
    }
    let mut text = String::new();
    for (what, files) in [("only in A", &report.removed), ("only in B", &report.added)] {
        for file in files {
            text += &format!("{what}: {file}\n");
        }
    }
    for file in &report.changed {
        text += &format!(
            "\n{}: {} of {} bytes differ\n",
            file.path, file.changed_bytes, file.bytes_b
        );
        let rows = file.ranges.iter().map(|range| {
            vec![
                format!("  {}", range.tensors.join(", ")),
                range.offset.to_string(),
                range.len.to_string(),
                range
                    .changed_elements
                    .map_or_else(String::new, |count| count.to_string()),
                range
                    .max_abs_change
                    .map_or_else(String::new, |change| format!("{change:.3e}")),
                match range.planned {
                    Some(true) => "yes".into(),
                    Some(false) => "NO".into(),
                    None => String::new(),
                },
            ]
        });
        let header = [
            "  tensor",
            "offset",
            "bytes",
            "elements",
            "largest change",
            "planned",
        ];
        text += &(table(&header, rows) + "\n");
    }
    for range in &report.unchanged_planned_ranges {
        text += &format!(
            "planned, but not changed: {} {}\n",
            range.path, range.tensor
        );
    }
    text += &format!("\n{} files identical\n", report.identical_files);
    text + match report.only_planned_ranges_changed {
        Some(true) if report.unchanged_planned_ranges.is_empty() => {
            "only the planned ranges changed, and all of them"
        }
        Some(_) => "the difference is NOT what the receipt says",
        None => "no receipt (kvw.json) says what was planned",
    }
}

//! `kvw merge`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::arguments::refuse_existing;
use super::outcome::Outcome;
use super::printer::Printer;
use crate::graph::LayerId;
use crate::kvw;
use crate::pipeline::Error;

/// Make one file of the parts of a retain set
///
/// Adds up what `kvw collect --shard` measured. The result is bit-identical to what `kvw collect` would have
/// measured in one go, whatever the number of parts and their order. A part that is missing, that overlaps
/// another, or that belongs to another job is an error.
#[derive(Args)]
#[command(after_help = "Example: kvw merge parts/*.kc -o retain.kc")]
pub(super) struct Merge {
    /// The parts
    #[arg(required = true, value_name = "FILE")]
    parts: Vec<PathBuf>,
    /// Where the coefficients go (safetensors)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct Merged {
    output: PathBuf,
    parts: usize,
    samples: u64,
    tokens: f64,
    layers: Vec<LayerId>,
}

impl Merge {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        refuse_existing(&self.output, self.force)?;
        let parts = self
            .parts
            .iter()
            .map(|path| kvw::load_part(path))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::from)?;
        let (coefficients, provenance) = kvw::merge(parts).map_err(Error::from)?;
        kvw::save_coefficients(&self.output, &coefficients, provenance, self.force)
            .map_err(Error::from)?;
        let merged = Merged {
            output: self.output.clone(),
            parts: self.parts.len(),
            samples: coefficients.samples,
            tokens: coefficients.weight.value(),
            layers: coefficients.layers.keys().copied().collect(),
        };
        printer.result("merge", &merged, || {
            format!(
                "{}: {} parts, {} layers, {} samples, {} answer tokens",
                merged.output.display(),
                merged.parts,
                merged.layers.len(),
                merged.samples,
                merged.tokens
            )
        })?;
        Ok(Outcome::Done)
    }
}

//! `kvw collect`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::arguments::{
    DataArguments, RuntimeArguments, note_placement, parse_positive, refuse_existing,
};
use super::outcome::Outcome;
use super::printer::Printer;
use crate::bundle::Bundle;
use crate::graph::Outputs;
use crate::kvw::{self, KnowledgeVectorWeakening, LayerRange, Rule as _};
use crate::pipeline::{Error, Model, provenance};

/// Measure how strongly each neuron fires on what is to be kept
///
/// Runs the untouched model over a dataset and writes the knowledge coefficients: per layer and neuron,
/// the mean of |h| over every position that predicts an answer token. They are measured once per model
/// and retain set; `kvw weaken` compares the forget set with them.
#[derive(Args)]
#[command(after_help = "Example: kvw collect MODEL --data retain.jsonl -o retain.kc")]
pub(super) struct Collect {
    /// Model folder
    model: PathBuf,
    /// The retain set: JSONL with image, question, answer; a benchmark, clear:PATH/retain95 or
    /// mllmu:PATH/retain_95; or ready-made inputs, a .safetensors or .npz file or a folder of them
    #[arg(long, visible_alias = "feeds", value_name = "PATH")]
    data: PathBuf,
    /// Where the coefficients go (safetensors)
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Layers to measure: an inclusive range like 1-25, one layer, or all
    #[arg(long, default_value = "all", value_name = "RANGE")]
    layers: LayerRange,
    /// Samples per forward pass
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_positive)]
    batch_size: usize,
    /// The precision to run where the folder has several (fp32, fp16, …)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    reading: DataArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// Decides which statistics are collected; its γ plays no part in them.
const RULE: KnowledgeVectorWeakening = KnowledgeVectorWeakening { gamma: 1.0 };

#[derive(Serialize)]
struct Collected {
    output: PathBuf,
    samples: u64,
    tokens: f64,
    layers: Vec<usize>,
}

impl Collect {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        refuse_existing(&self.output, self.force)?;
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let data = self.reading.read(&self.data, printer)?;
        let engine = self.runtime.engine(printer)?;
        let forwards = data.samples.len();
        let mut model = Model::open(&bundle, self.variant.as_deref(), &engine, forwards)?;
        let mut decoder = model.decoder(self.layers, Outputs::Sums(RULE.moment()), forwards)?;
        note_placement(&engine, printer);
        let progress = printer.progress("collecting", forwards);
        let coefficients = model.collect(
            &mut decoder,
            &RULE,
            &data.samples,
            self.batch_size,
            |done| {
                progress.at(done);
            },
        )?;
        drop(progress);
        let identity = model.identity()?;
        let provenance = provenance(&model, &identity, &engine, &[("retain", &data)])?;
        kvw::save_coefficients(&self.output, &coefficients, provenance, self.force)
            .map_err(Error::from)?;
        let collected = Collected {
            output: self.output.clone(),
            samples: coefficients.samples,
            tokens: coefficients.weight.value(),
            layers: coefficients.layers.keys().copied().collect(),
        };
        printer.result("collect", &collected, || {
            format!(
                "{}: {} layers, {} samples, {} answer tokens",
                collected.output.display(),
                collected.layers.len(),
                collected.samples,
                collected.tokens
            )
        })?;
        Ok(Outcome::Done)
    }
}

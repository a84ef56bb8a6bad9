//! (a) A forward that only sums coefficients, against the model as it is with its logits.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use kvw::bundle::Bundle;
use kvw::edit::mlps;
use kvw::graph::{Index, LayerId, Mlp, Moment, Outputs, Tower};
use kvw::kvw::Gates;
use kvw::onnx::{Limits, ModelFile};
use kvw::preprocess::PositionIds;
use kvw::runtime::{Decoder, Device, Embedded, Engine, Located, Work, locate};
use ndarray::{Array1, Array2, Array3};
use ort::environment::Environment;
use ort::session::builder::GraphOptimizationLevel;
use ort::session::{Session, SessionInputValue};
use ort::value::{DynTensor, Tensor, ValueType};

use crate::measure::{Seconds, heading, library, line};

const ROUNDS: usize = 9;
/// Tokens of a sample: an image of some 220 tokens, a question, an answer.
pub(crate) const TOKENS: usize = 300;
/// Tokens of the answer.
const ANSWER: usize = 50;
pub(crate) const D_MODEL: usize = 896;
pub(crate) const PREPACKED: Work = Work::Forwards(1000);
pub(crate) const MAPPED: Work = Work::Forwards(1);

pub(crate) fn run(model: &Path) -> Result<()> {
    heading(&format!(
        "(a) Forward, {TOKENS} tokens: sums with gates (logits and what only they need dropped) against plain \
         with logits"
    ));
    let library = library()?;
    for threads in [1, 2] {
        for prepack in [true, false] {
            let mut plain = plain(&library, model, threads, prepack)?;
            let work = if prepack { PREPACKED } else { MAPPED };
            let mut decoder = open(&engine(&library, threads)?, model, work)?;
            let sample = sample(0);
            let gates = half(&decoder);
            let mut times = [Seconds::default(), Seconds::default()];
            // The first round warms up.
            for round in 0..=ROUNDS {
                let mut now = times.clone();
                now[0].time(|| run_plain(&mut plain, &sample))?;
                now[1].time(|| Ok(decoder.sums(&[&sample], &gates)?))?;
                if round > 0 {
                    times = now;
                }
            }
            let how = format!(
                "{threads} thread{}, {}",
                if threads == 1 { "" } else { "s" },
                if prepack { "prepacked" } else { "mapped" }
            );
            line(&format!("{how}: plain"), &times[0], &times[0], "");
            line(
                &format!("{how}: sums and gates"),
                &times[1],
                &times[0],
                "bar 0.65",
            );
        }
    }
    Ok(())
}

/// ONNX Runtime as anybody would call it, with the options that `kvw` sets too.
pub(crate) fn plain(
    library: &Located,
    model: &Path,
    threads: usize,
    prepack: bool,
) -> Result<Session> {
    let environment = locate::load(library)?;
    environment.set_log_level(ort::logging::LogLevel::Fatal);
    Ok(commit(
        &environment,
        &decoder_file(model),
        threads,
        prepack,
    )?)
}

fn commit(
    environment: &Environment,
    file: &Path,
    threads: usize,
    prepack: bool,
) -> Result<Session, ort::Error> {
    Session::builder(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)?
        .with_prepacking(prepack)?
        .with_intra_threads(threads)?
        .commit_from_file(file)
}

/// Runs the model as it is. All outputs are made, none is copied.
fn run_plain(session: &mut Session, sample: &Embedded) -> Result<()> {
    let tokens = sample.input_ids.len();
    let mut inputs: Vec<(String, SessionInputValue<'_>)> = Vec::new();
    for input in session.inputs() {
        let ValueType::Tensor { ty, shape, .. } = input.dtype() else {
            continue;
        };
        let ids = || (0..tokens as i64).collect::<Vec<_>>();
        let value: SessionInputValue<'_> = match input.name() {
            "inputs_embeds" => Tensor::from_array((
                vec![1, tokens, D_MODEL],
                sample
                    .inputs_embeds
                    .iter()
                    .flatten()
                    .copied()
                    .collect::<Vec<_>>(),
            ))?
            .into(),
            "attention_mask" => Tensor::from_array((vec![1, tokens], vec![1i64; tokens]))?.into(),
            "position_ids" => {
                Tensor::from_array((vec![3, 1, tokens], [ids(), ids(), ids()].concat()))?.into()
            }
            _ => {
                let shape = vec![1, shape[1], 0, shape[3]];
                DynTensor::new(&ort::memory::Allocator::default(), *ty, shape)?
                    .into_dyn()
                    .into()
            }
        };
        inputs.push((input.name().to_owned(), value));
    }
    let outputs = session.run(inputs)?;
    anyhow::ensure!(
        outputs.get("logits").is_some(),
        "expected an output logits, found none"
    );
    Ok(())
}

pub(crate) fn engine(library: &Located, threads: usize) -> Result<Engine> {
    Ok(Engine::start(library.clone(), Device::Cpu, threads)?)
}

pub(crate) fn decoder_file(model: &Path) -> std::path::PathBuf {
    model.join("onnx/decoder_model_merged.onnx")
}

/// The decoder with every layer tapped and gated.
pub(crate) fn open(engine: &Engine, model: &Path, work: Work) -> Result<Decoder> {
    let bundle = Bundle::open(model)?;
    let file = bundle.components(None)?.decoder;
    let model = ModelFile::open(&file.path, &Limits::default())?;
    let index = Index::new(model.graph());
    let mlps = mlps(&bundle, file, &index);
    let language: Vec<&Mlp<'_>> = mlps
        .iter()
        .filter(|mlp| mlp.tower == Tower::Language)
        .collect();
    anyhow::ensure!(
        Some(language.len()) == bundle.layers(),
        "expected {:?} layers, found {}",
        bundle.layers(),
        language.len()
    );
    Decoder::open(
        engine,
        &model,
        &language,
        Outputs::Sums(Moment::Absolute),
        work,
    )
    .context("open")
}

/// A sample of random embeddings, always the same for one seed.
pub(crate) fn sample(seed: u64) -> Embedded {
    let mut random = Random(seed);
    let inputs_embeds = Array3::from_shape_simple_fn((1, TOKENS, D_MODEL), || random.next());
    let positions = Array2::from_shape_fn((3, TOKENS), |(_, t)| t as i64);
    // Position t counts where token t + 1 belongs to the answer; nothing follows the last one.
    let counts = |t: usize| t + 1 < TOKENS && t + 1 >= TOKENS - ANSWER;
    Embedded {
        name: format!("random-{seed}"),
        input_ids: vec![0; TOKENS],
        inputs_embeds: Some(inputs_embeds),
        position_ids: PositionIds::Multimodal(positions),
        answer_mask: (0..TOKENS).map(|t| f32::from(counts(t))).collect(),
        prefix: 0,
        next_position: TOKENS as i64,
        decoder_inputs: Vec::new(),
        vision: BTreeMap::new(),
    }
}

/// Gates of 0.5 in every layer: as much work as any others.
pub(crate) fn half(decoder: &Decoder) -> Gates {
    let gates = |&(layer, d_ff): &(LayerId, usize)| (layer, Array1::from_elem(d_ff, 0.5));
    decoder.layers().iter().map(gates).collect()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// Uniform in [−√3, √3): mean 0, variance 1.
    pub(crate) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 24) as f32;
        (2.0 * unit - 1.0) * 3f32.sqrt()
    }
}

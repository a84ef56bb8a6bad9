//! (d) A weakening step, against one forward of the same session.

use std::error::Error as StdError;
use std::path::Path;

use anyhow::Result;
use kvw::graph::{LayerId, Moment};
use kvw::kvw::{
    Forward, Gates, KnowledgeVectorWeakening, LayerRange, Options, Order, Sums, collect, weaken,
};
use kvw::runtime::{Collector, Embed, Embedded, Error};

use crate::forward::{PREPACKED, engine, half, open, sample};
use crate::measure::{Seconds, heading, library, line};

const ROUNDS: usize = 5;
const SAMPLES: usize = 8;

pub(crate) fn run(model: &Path) -> Result<()> {
    heading(&format!(
        "(d) Weakening, batches of 1, {SAMPLES} samples, 2 threads, one session for everything"
    ));
    let engine = engine(&library()?, 2)?;
    let mut decoder = open(&engine, model, PREPACKED)?;
    let samples: Vec<Embedded> = (0..SAMPLES as u64).map(sample).collect();
    let gates = half(&decoder);
    let mut ready = Ready;
    let mut counted = Counted {
        inner: Collector {
            source: &mut ready,
            decoder: &mut decoder,
        },
        forwards: 0,
    };
    let retain: Vec<Embedded> = (100..104).map(sample).collect();
    let retain = collect(
        &mut counted,
        Moment::Absolute,
        &retain,
        &Gates::new(),
        1,
        |_| (),
    )?;
    let rule = KnowledgeVectorWeakening { gamma: 0.5 };
    let options = Options {
        layers: LayerRange::All,
        batch_size: 1,
        epochs: 1,
        order: Order::File,
        keep_norm: None,
    };
    let (mut forward, mut step) = (Seconds::default(), Seconds::default());
    let (mut steps, mut forwards) = (0, 0);
    for _ in 0..ROUNDS {
        let mut eight = Seconds::default();
        eight.time(|| {
            for sample in &samples {
                counted.inner.decoder.sums(&[sample], &gates)?;
            }
            Ok(())
        })?;
        forward.add(eight.median() / SAMPLES as f64);
        counted.forwards = 0;
        let mut eight = Seconds::default();
        let plan = eight.time(|| {
            Ok(weaken(
                &mut counted,
                &rule,
                &retain,
                &samples,
                &options,
                |_| (),
            )?)
        })?;
        step.add(eight.median() / plan.steps as f64);
        steps += plan.steps;
        forwards += counted.forwards;
    }
    line("forward with sums and gates", &forward, &forward, "");
    line(
        "weakening step",
        &step,
        &forward,
        &format!("{steps} steps, {forwards} forwards, 0 sessions opened"),
    );
    Ok(())
}

/// Samples that are decoder inputs already.
struct Ready;

impl Embed for Ready {
    type Sample = Embedded;

    fn name(&self, sample: &Embedded) -> String {
        sample.name.clone()
    }

    fn embed(&mut self, sample: &Embedded, _gates: &Gates) -> Result<Embedded, Error> {
        Ok(sample.clone())
    }
}

/// Counts forwards.
struct Counted<'a> {
    inner: Collector<'a, Ready>,
    forwards: u64,
}

impl Forward for Counted<'_> {
    type Sample = Embedded;

    fn layers(&self) -> Vec<(LayerId, usize)> {
        self.inner.layers()
    }

    fn sample_name(&self, sample: &Embedded) -> String {
        self.inner.sample_name(sample)
    }

    fn sums(
        &mut self,
        batch: &[&Embedded],
        gates: &Gates,
    ) -> Result<Sums, Box<dyn StdError + Send + Sync>> {
        self.forwards += 1;
        self.inner.sums(batch, gates)
    }
}

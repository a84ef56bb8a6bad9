//! Collecting a set that is too large for one go: in parts, and again after a kill.
//!
//! In: an open model, a dataset, which [`Shard`] of it. Out: a file of coefficients, or of a part of them
//! in a folder that all parts share. On the way a checkpoint lies beside it, so that a killed run goes on
//! where it was.
//!
//! Promises: what a resumed or a divided run gives is bit-identical to one run over everything; a part
//! that is already there is not computed again, so that engines which start a task twice do no harm; a
//! checkpoint or part of another job (model, data, layers, moment, batch size, ONNX Runtime, device,
//! threads) is never mixed in.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Error, Model};
use crate::dataset::Sample;
use crate::files::Sha256;
use crate::graph::LayerId;
use crate::kvw::{self, Coefficients, Part, Rule, Shard};
use crate::runtime::Decoder;

/// Batches of which the samples are shared out by length.
const BATCHES: usize = 8;

/// How many samples are looked at together: those of similar length go into one batch, so that little of it
/// is padding. A batch of one needs no padding. Windows begin at the set's first sample and are never
/// divided, so batches are the same ones however the set is divided.
pub fn window(batch_size: usize) -> usize {
    match batch_size {
        0 | 1 => 1,
        size => size.saturating_mul(BATCHES),
    }
}

/// What is collected, and where to.
pub struct Job<'a> {
    /// The whole set, in its order.
    pub samples: &'a [Sample],
    /// Decides which statistics are taken.
    pub rule: &'a dyn Rule,
    /// Samples per forward pass.
    pub batch_size: usize,
    /// Part of the set; `None`: all of it.
    pub shard: Option<Shard>,
    /// What the result says of itself. Two runs with equal provenance may be mixed.
    pub provenance: serde_json::Value,
    /// The file for all of the set, the folder for a part of it.
    pub output: &'a Path,
    /// Replace an existing file; compute a part again that is there.
    pub force: bool,
    /// Time between checkpoints; `None`: none are written.
    pub checkpoint: Option<Duration>,
}

/// What was collected.
#[derive(Debug, Serialize)]
pub struct Collected {
    /// The file.
    pub output: PathBuf,
    /// Samples in it.
    pub samples: u64,
    /// Sum of their token weights.
    pub tokens: f64,
    /// Layers in it.
    pub layers: Vec<LayerId>,
    /// What part of the set it holds, where it is one.
    pub part: Option<Part>,
    /// Samples that an earlier run had done: all of them where the part was there already.
    pub resumed: u64,
    /// How many prefixes were run, where samples shared theirs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_runs: Option<u64>,
}

impl Job<'_> {
    /// Runs what is not done yet, and writes the file. `progress` hears how many samples of this part are
    /// done.
    ///
    /// # Errors
    /// See [`Model::collect_more`]; a file that cannot be written.
    pub fn run(
        self,
        model: &mut Model<'_>,
        decoder: &mut Decoder,
        mut progress: impl FnMut(usize),
    ) -> Result<Collected, Error> {
        let layers = model.layers(decoder);
        let empty = Coefficients::new(self.rule.moment(), &layers);
        let job = self.digest(&layers)?;
        let all = self.samples.len();
        let range = match self.shard {
            Some(shard) => shard.range(all, window(self.batch_size)),
            None => 0..all,
        };
        let output = match self.shard {
            Some(shard) => {
                std::fs::create_dir_all(self.output)
                    .map_err(crate::files::Error::io("create", self.output))?;
                self.output.join(part_name(&job, shard))
            }
            None => self.output.to_owned(),
        };
        let part = |end: usize| Part {
            job: job.clone(),
            start: range.start as u64,
            end: end as u64,
            of: all as u64,
        };
        let whole = part(range.end);
        if self.shard.is_some() && !self.force && output.exists() {
            let there = kvw::load_part(&output)?;
            if there.part != whole {
                return Err(kvw::Error::Part {
                    path: output,
                    expected: format!("samples {range:?} of job {job}"),
                    found: format!("samples {}..{}", there.part.start, there.part.end),
                }
                .into());
            }
            let samples = there.coefficients.samples;
            return Ok(collected(output, &there.coefficients, Some(whole), samples));
        }
        let checkpoint = checkpoint_of(&output);
        let mut coefficients = empty;
        if self.checkpoint.is_some()
            && let Some(earlier) = resume(&checkpoint, &part(range.end))
        {
            coefficients = earlier;
        }
        let resumed = coefficients.samples;
        let mut done = range.start + usize::try_from(resumed).unwrap_or(usize::MAX);
        progress(done - range.start);
        let mut last = Instant::now();
        let rest = self.samples.get(done..range.end).unwrap_or_default();
        let coefficients = model.collect_more(
            decoder,
            self.rule,
            coefficients,
            rest,
            self.batch_size,
            |so_far, samples| {
                done += samples;
                progress(done - range.start);
                if self.checkpoint.is_some_and(|every| last.elapsed() >= every) && done < range.end
                {
                    kvw::save_part(&checkpoint, so_far, part(done), self.provenance.clone())?;
                    last = Instant::now();
                }
                Ok(())
            },
        )?;
        match self.shard {
            Some(_) => {
                kvw::save_part(&output, &coefficients, whole.clone(), self.provenance)?;
            }
            None => {
                kvw::save_coefficients(&output, &coefficients, self.provenance, self.force)?;
            }
        }
        // The result is there: a checkpoint that stays would only take room.
        let _ = std::fs::remove_file(&checkpoint);
        let part = self.shard.map(|_| whole);
        Ok(Collected {
            prefix_runs: decoder.prefix_runs(),
            ..collected(output, &coefficients, part, resumed)
        })
    }

    /// Digest of everything that the sums depend on.
    fn digest(&self, layers: &[(LayerId, usize)]) -> Result<String, Error> {
        let job = serde_json::json!({
            "provenance": self.provenance,
            "moment": self.rule.moment(),
            "batch_size": self.batch_size,
            "window": window(self.batch_size),
            "layers": layers,
        });
        Ok(Sha256::of_bytes(job.to_string().as_bytes()).to_string())
    }
}

fn collected(
    output: PathBuf,
    coefficients: &Coefficients,
    part: Option<Part>,
    resumed: u64,
) -> Collected {
    Collected {
        output,
        samples: coefficients.samples,
        tokens: coefficients.weight.value(),
        layers: coefficients.layers.keys().copied().collect(),
        part,
        resumed,
        prefix_runs: None,
    }
}

/// `<job>-<index>-of-<count>.kc`, so that the parts of two jobs in one folder stay apart.
fn part_name(job: &str, shard: Shard) -> String {
    let job: String = job.chars().take(16).collect();
    format!("{job}-{:05}-of-{:05}.kc", shard.index(), shard.count())
}

/// Whether an earlier run left its result, a checkpoint or this part of it where a job's output goes to; possibly
/// another job's.
pub fn begun(output: &Path, shard: Option<Shard>) -> bool {
    let Some(shard) = shard else {
        return output.exists() || checkpoint_of(output).exists();
    };
    let name = part_name("", shard);
    let parts = std::fs::read_dir(output).into_iter().flatten().flatten();
    let mut names = parts.map(|part| part.file_name().to_string_lossy().into_owned());
    names.any(|found| found.contains(&name))
}

fn checkpoint_of(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".checkpoint");
    name.into()
}

/// The sums of an earlier run that began the same part and was stopped. Anything else is no reason to
/// fail: it is computed again.
fn resume(checkpoint: &Path, part: &Part) -> Option<Coefficients> {
    if !checkpoint.exists() {
        return None;
    }
    let range = |part: &Part| -> Range<u64> { part.start..part.end };
    match kvw::load_part(checkpoint) {
        Ok(earlier)
            if earlier.part.job == part.job
                && earlier.part.start == part.start
                && earlier.part.end <= part.end =>
        {
            tracing::info!(
                "{}: going on after samples {:?}",
                checkpoint.display(),
                range(&earlier.part)
            );
            Some(earlier.coefficients)
        }
        Ok(_) => {
            tracing::warn!("{}: of another job, not used", checkpoint.display());
            None
        }
        Err(error) => {
            tracing::warn!("{}: not used: {error}", checkpoint.display());
            None
        }
    }
}

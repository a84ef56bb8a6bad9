//! `kvw collect`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::arguments::{
    DataArguments, RuntimeArguments, note_placement, parse_positive, refuse_existing,
};
use super::outcome::Outcome;
use super::printer::Printer;
use crate::bundle::Bundle;
use crate::kvw::{KnowledgeVectorWeakening, LayerRange, Layers, Rule as _, Shard, TowerChoice};
use crate::pipeline::collect::{Collected, Job, begun, window};
use crate::pipeline::{Error, Model, provenance};

/// Measure how strongly each neuron fires on what is to be kept
///
/// Runs the untouched model over a dataset and writes the knowledge coefficients: per layer and neuron,
/// the mean of |h| over every position that predicts an answer token. They are measured once per model
/// and retain set; `kvw weaken` compares the forget set with them.
#[derive(Args)]
#[command(
    after_help = "Examples: kvw collect MODEL --data retain.jsonl -o retain.kc\n          \
                          kvw collect MODEL --data retain.jsonl -o parts --shard 3/16"
)]
pub(super) struct Collect {
    /// Model folder
    model: PathBuf,
    /// The retain set: JSONL with image, question, answer; a benchmark, clear:PATH/retain95 or
    /// mllmu:PATH/retain_95; or ready-made inputs, a .safetensors or .npz file or a folder of them
    #[arg(long, visible_alias = "feeds", value_name = "PATH")]
    data: PathBuf,
    /// Where the coefficients go (safetensors); with --shard the folder that all parts go to
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Measure one part of the set only: INDEX/COUNT, counted from 0. `auto` takes both from Slurm's array
    /// variables; `auto/COUNT` takes the index from Slurm or a Kubernetes Indexed Job. `kvw merge` makes one
    /// file of the parts. A part that is there already is not measured again
    #[arg(long, value_name = "PART")]
    shard: Option<ShardChoice>,
    /// Write a checkpoint beside the output every so many seconds, and go on from one that is there; 0: never
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    checkpoint: u64,
    /// Layers to measure: an inclusive range like 1-25, one layer, or all
    #[arg(long, default_value = "all", value_name = "RANGE")]
    layers: LayerRange,
    /// Of which towers: language (the decoder, the method's own), vision (the vision encoder) or all.
    /// --layers then counts in each
    #[arg(long, default_value = "language", value_name = "TOWER")]
    tower: TowerChoice,
    /// Samples per forward pass: of 8 batches together, those of similar length. Faster on a GPU, not on a CPU;
    /// the sums differ from those of 1 in the last digits of float32
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_positive)]
    batch_size: usize,
    /// Run what samples in a row have in common, up to the end of their picture, once for all of them, and keep
    /// its keys and values. For sets with several questions about one picture; the sums differ in the last digits of
    /// float32. Batches of 1 only
    #[arg(long, conflicts_with = "batch_size")]
    share_prefix: bool,
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

impl Collect {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let shard = self.shard.map(ShardChoice::resolve).transpose()?;
        if shard.is_none() {
            refuse_existing(&self.output, self.force)?;
        }
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let data = self.reading.read(&self.data, printer)?;
        let engine = self.runtime.engine(printer)?;
        // Of the whole set, also for a part of it: it decides how sessions are built, and so the last bits.
        let forwards = data.samples.len().div_ceil(self.batch_size);
        let range = match shard {
            Some(shard) => shard.range(data.samples.len(), window(self.batch_size)),
            None => 0..data.samples.len(),
        };
        let samples = data.samples.get(range).unwrap_or_default();
        let layers = Layers {
            towers: self.tower,
            range: self.layers,
        };
        let mut model = Model::open(&bundle, self.variant.as_deref(), &engine, forwards)?;
        if self.force || !begun(&self.output, shard) {
            model.encode_first(self.tower, samples)?;
        }
        let mut decoder = match self.share_prefix {
            true => model.measuring_with_prefixes(layers, RULE.moment(), forwards)?,
            false => model.measuring(layers, RULE.moment(), forwards)?,
        };
        note_placement(&engine, printer);
        let identity = model.identity_of(self.tower)?;
        let mut provenance = provenance(&model, &identity, &engine, &[("retain", &data)])?;
        if self.share_prefix {
            provenance["shared_prefix"] = true.into();
        }
        let job = Job {
            samples: &data.samples,
            rule: &RULE,
            batch_size: self.batch_size,
            shard,
            provenance,
            output: &self.output,
            force: self.force,
            checkpoint: (self.checkpoint > 0).then(|| Duration::from_secs(self.checkpoint)),
        };
        let progress = printer.progress("collecting", samples.len());
        let collected = job.run(&mut model, &mut decoder, |done| progress.at(done))?;
        drop(progress);
        printer.result("collect", &collected, || human(&collected))?;
        Ok(Outcome::Done)
    }
}

fn human(collected: &Collected) -> String {
    let part = collected.part.as_ref().map_or(String::new(), |part| {
        format!(" ({}..{} of {})", part.start, part.end, part.of)
    });
    let resumed = match collected.resumed {
        0 => String::new(),
        all if all == collected.samples => ", there already".to_owned(),
        some => format!(", {some} of them by an earlier run"),
    };
    let prefixes = collected.prefix_runs.map_or(String::new(), |runs| {
        format!(", {runs} prefixes run for them")
    });
    format!(
        "{}: {} layers, {} samples{part}, {} answer tokens{resumed}{prefixes}",
        collected.output.display(),
        collected.layers.len(),
        collected.samples,
        collected.tokens
    )
}

/// `--shard`: said, or told by the scheduler that started the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ShardChoice {
    /// `3/16`.
    Said(Shard),
    /// `auto`, or `auto/16` where the scheduler tells the index only.
    Auto(Option<usize>),
}

impl FromStr for ShardChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<ShardChoice, String> {
        match text.strip_prefix("auto") {
            Some("") => Ok(ShardChoice::Auto(None)),
            Some(rest) => match rest.strip_prefix('/').and_then(|count| count.parse().ok()) {
                Some(count) if count > 0 => Ok(ShardChoice::Auto(Some(count))),
                _ => Err(format!("expected auto/COUNT like auto/16, found '{text}'")),
            },
            None => text.parse().map(ShardChoice::Said),
        }
    }
}

impl ShardChoice {
    fn resolve(self) -> anyhow::Result<Shard> {
        match self {
            ShardChoice::Said(shard) => Ok(shard),
            ShardChoice::Auto(count) => from_scheduler(count, |name| std::env::var(name).ok()),
        }
    }
}

/// The part that Slurm (`SLURM_ARRAY_TASK_ID`, from `SLURM_ARRAY_TASK_MIN`, of `SLURM_ARRAY_TASK_COUNT`) or
/// a Kubernetes Indexed Job (`JOB_COMPLETION_INDEX`, from 0) gave this process.
fn from_scheduler(
    count: Option<usize>,
    variable: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Shard> {
    let number = |name: &str| -> anyhow::Result<Option<usize>> {
        let parsed = variable(name).map(|text| {
            text.trim()
                .parse()
                .with_context(|| format!("{name}: expected a number, found '{text}'"))
        });
        parsed.transpose()
    };
    let (index, told) = match number("SLURM_ARRAY_TASK_ID")? {
        Some(id) => {
            let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
            (id.checked_sub(first), number("SLURM_ARRAY_TASK_COUNT")?)
        }
        None => (number("JOB_COMPLETION_INDEX")?, None),
    };
    let index = index.context(
        "--shard auto: expected SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX in the environment, \
         found neither; say --shard INDEX/COUNT",
    )?;
    let count = count.or(told).context(
        "--shard auto: the environment does not say how many parts there are; say --shard auto/COUNT",
    )?;
    Shard::new(index, count).map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shard(count: Option<usize>, variables: &[(&str, &str)]) -> anyhow::Result<String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Ok(from_scheduler(count, variable)?.to_string())
    }

    #[test]
    fn schedulers_tell_the_part() {
        let slurm = [
            ("SLURM_ARRAY_TASK_ID", "5"),
            ("SLURM_ARRAY_TASK_MIN", "1"),
            ("SLURM_ARRAY_TASK_COUNT", "8"),
        ];
        assert_eq!(shard(None, &slurm).unwrap(), "4/8");
        let kubernetes = [("JOB_COMPLETION_INDEX", "0")];
        assert_eq!(shard(Some(16), &kubernetes).unwrap(), "0/16");
        for (count, variables) in [
            (None, &kubernetes[..]),
            (Some(16), &[][..]),
            (Some(2), &[("JOB_COMPLETION_INDEX", "2")][..]),
            (Some(2), &[("JOB_COMPLETION_INDEX", "two")][..]),
        ] {
            assert!(shard(count, variables).is_err(), "{count:?} {variables:?}");
        }
    }

    #[test]
    fn a_shard_is_said_or_left_to_the_scheduler() {
        assert_eq!("auto".parse(), Ok(ShardChoice::Auto(None)));
        assert_eq!("auto/16".parse(), Ok(ShardChoice::Auto(Some(16))));
        assert_eq!(
            "3/16".parse(),
            Ok(ShardChoice::Said(Shard::new(3, 16).unwrap()))
        );
        for text in ["auto/0", "auto16", "16", "3/3"] {
            assert!(text.parse::<ShardChoice>().is_err(), "{text}");
        }
    }
}

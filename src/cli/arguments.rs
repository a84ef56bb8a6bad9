//! Arguments that several verbs share, and what they become.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::printer::Printer;
use crate::bundle::Bundle;
use crate::dataset::{self, Dataset, ReadOptions};
use crate::eval::{MinK, SetKind};
use crate::kvw::{KnowledgeVectorWeakening, LayerRange, Layers, Options, Order, TowerChoice};
use crate::pipeline::{Error, Model};
use crate::runtime::generate::{self, Limit};
use crate::runtime::{self, Device, Engine, locate};

/// How the model is run.
#[derive(Args, Clone)]
#[command(next_help_heading = "Runtime")]
pub(super) struct RuntimeArguments {
    /// Where to run: auto, cpu, cuda or cuda:N. `cuda` fails where it cannot be had; `auto` says why
    /// it did not take it
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(super) device: Device,
    /// Threads within an operator; 0: one per physical core
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(super) threads: usize,
    /// The ONNX Runtime library to load (default: found, or fetched with pip)
    #[arg(long, value_name = "FILE")]
    pub(super) ort_lib: Option<PathBuf>,
    /// Never fetch ONNX Runtime
    #[arg(long)]
    pub(super) offline: bool,
    /// Keep what the vision encoder makes of each image in this folder, and take it from there next time: a file
    /// for each image, of the size of its features. May be shared by processes and models
    #[arg(long, value_name = "FOLDER")]
    pub(super) feature_cache: Option<PathBuf>,
}

impl RuntimeArguments {
    pub(super) fn locate_options(&self) -> Result<locate::Options, Error> {
        let options = locate::Options::from_env(self.ort_lib.clone(), self.device, self.offline);
        Ok(options.map_err(runtime::Error::from)?)
    }

    /// Finds or fetches ONNX Runtime and starts it.
    pub(super) fn engine(&self, printer: &Printer) -> Result<Engine, Error> {
        self.engine_for(1, printer)
    }

    /// The same, for `jobs` sessions that run at the same time: where no number of threads is asked
    /// for, they share the cores.
    pub(super) fn engine_for(&self, jobs: usize, printer: &Printer) -> Result<Engine, Error> {
        let threads = match (self.threads, jobs) {
            (0, 2..) => {
                std::thread::available_parallelism().map_or(1, |cores| (cores.get() / jobs).max(1))
            }
            (threads, _) => threads,
        };
        let options = self.locate_options()?;
        let library =
            locate::locate(&options, &|line| printer.note(line)).map_err(runtime::Error::from)?;
        tracing::info!(
            "ONNX Runtime {} from {}",
            library.version,
            library.path.display()
        );
        let engine = Engine::start(library, self.device, threads)?;
        Ok(engine.with_feature_folder(self.feature_cache.clone()))
    }
}

/// How the forget set is weakened.
#[derive(Args, Clone)]
#[command(next_help_heading = "Weakening")]
pub(super) struct WeakenArguments {
    /// Weakening strength γ. It must fit the number of steps: on the models measured, γ · steps of 7
    /// to 18 forgets. Default: 10 / steps. (The authors' 0.02 belongs to some hundreds of steps.)
    #[arg(long, value_name = "GAMMA", value_parser = parse_gamma, allow_negative_numbers = true)]
    pub(super) gamma: Option<f64>,
    /// Layers to weaken: an inclusive range like 1-25, one layer, or all [default: all]
    #[arg(long, value_name = "RANGE")]
    pub(super) layers: Option<LayerRange>,
    /// Of which towers: language (the decoder, the method's own), vision (the vision encoder) or all.
    /// --layers then counts in each
    #[arg(long, default_value = "language", value_name = "TOWER")]
    pub(super) tower: TowerChoice,
    #[command(flatten)]
    pub(super) steps: StepArguments,
}

/// How the forget set is gone through.
#[derive(Args, Clone)]
#[command(next_help_heading = "Weakening")]
pub(super) struct StepArguments {
    /// Passes over the forget set
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_positive)]
    pub(super) epochs: usize,
    /// Samples per weakening step
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_positive)]
    pub(super) batch_size: usize,
    /// Order of the forget set: file, or shuffle (drawn anew for each epoch)
    #[arg(long, default_value = "file", value_name = "ORDER")]
    order: Order,
    /// Seed of `--order shuffle`
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Give each layer's matrix its old Frobenius norm back after every step
    #[arg(long)]
    pub(super) keep_norm: bool,
}

impl Default for StepArguments {
    /// What the flags' defaults say.
    fn default() -> StepArguments {
        StepArguments {
            epochs: 1,
            batch_size: 1,
            order: Order::File,
            seed: 0,
            keep_norm: false,
        }
    }
}

impl StepArguments {
    /// Steps that a forget set of this size takes, at least 1.
    pub(super) fn count(&self, samples: usize) -> usize {
        (samples.div_ceil(self.batch_size) * self.epochs).max(1)
    }

    pub(super) fn order(&self) -> Order {
        match self.order {
            Order::Shuffle { .. } => Order::Shuffle { seed: self.seed },
            Order::File => Order::File,
        }
    }
}

/// A count of at least 1.
pub(super) fn parse_positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number ≥ 1".into()),
        Ok(number) => Ok(number),
    }
}

pub(super) fn parse_gamma(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(gamma) if gamma.is_finite() && gamma > 0.0 => Ok(gamma),
        _ => Err("expected a number > 0".into()),
    }
}

/// γ · steps where no γ is given: within the 7 to 18 that forgot on the models measured.
const GAMMA_STEPS: f64 = 10.0;

impl WeakenArguments {
    pub(super) fn layers(&self) -> Layers {
        Layers {
            towers: self.tower,
            range: self.layers.unwrap_or(LayerRange::All),
        }
    }

    /// The rule, for a forget set of this size. Says so where it had to choose γ.
    pub(super) fn rule(&self, samples: usize, printer: &Printer) -> KnowledgeVectorWeakening {
        let gamma = self.gamma.unwrap_or_else(|| {
            let steps = self.steps.count(samples);
            let gamma = GAMMA_STEPS / steps as f64;
            printer.note(&format!(
                "gamma {gamma:.4} (10 / {steps} steps; set it with --gamma)"
            ));
            gamma
        });
        KnowledgeVectorWeakening { gamma }
    }

    pub(super) fn options(&self, model: &Model<'_>) -> Result<Options, Error> {
        Ok(Options {
            layers: self.layers().range,
            batch_size: self.steps.batch_size,
            epochs: self.steps.epochs,
            order: self.steps.order(),
            keep_norm: self
                .steps
                .keep_norm
                .then(|| model.column_norms(self.layers()))
                .transpose()?,
        })
    }
}

/// How answers are generated.
#[derive(Args, Clone)]
pub(super) struct GenerationArguments {
    /// Longest answer, in tokens (default: max_new_tokens or max_length of the model's
    /// generation_config.json, or 50)
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    max_new_tokens: Option<usize>,
    /// Questions to answer at the same time, at most; 1: one by one
    ///
    /// Those with prompts of one length, where the model takes batches and computes each row by itself.
    #[arg(long, default_value_t = GENERATE_BATCH, value_name = "N", value_parser = parse_positive)]
    generate_batch: usize,
}

/// See docs/metrics.md.
const GENERATE_BATCH: usize = 8;

impl Default for GenerationArguments {
    /// What the flags' defaults say.
    fn default() -> GenerationArguments {
        GenerationArguments {
            max_new_tokens: None,
            generate_batch: GENERATE_BATCH,
        }
    }
}

impl GenerationArguments {
    /// What was asked for; where nothing was, what the model asks for.
    pub(super) fn options(&self, bundle: &Bundle) -> generate::Options {
        let given = self.max_new_tokens.map(Limit::NewTokens);
        generate::Options {
            limit: given.unwrap_or_else(|| Limit::of(bundle.config())),
            batch: self.generate_batch,
        }
    }
}

/// How answers are scored.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Data")]
pub(super) struct ScoringArguments {
    /// Shares of Min-K and Min-K++ beside 0.2 and 0.4: of 0.1, the metrics are min_k_10,
    /// min_k_plus_plus_10, auc_min_k_10 and auc_min_k_plus_plus_10
    #[arg(long, value_name = "K,…", value_delimiter = ',')]
    pub(super) min_k: Vec<MinK>,
}

/// A set to evaluate, and what it is for: `[KIND=]PATH`.
#[derive(Clone, Debug)]
pub(super) struct SetArgument {
    pub(super) kind: SetKind,
    pub(super) path: PathBuf,
}

impl FromStr for SetArgument {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let kinds = [
            SetKind::Forget,
            SetKind::Retain,
            SetKind::Holdout,
            SetKind::Other,
        ];
        let named = kinds.into_iter().find_map(|kind| {
            let path = text.strip_prefix(kind.as_str())?.strip_prefix('=')?;
            Some((kind, path))
        });
        let (kind, path) = named.unwrap_or((SetKind::Other, text));
        Ok(SetArgument {
            kind,
            path: path.into(),
        })
    }
}

/// Reads the set of every argument.
pub(super) fn read_sets(
    arguments: &[SetArgument],
    reading: &DataArguments,
    printer: &Printer,
) -> Result<Vec<Dataset>, Error> {
    let sets = arguments.iter();
    sets.map(|set| reading.read(&set.path, printer)).collect()
}

/// What each of `data`, read for `arguments`, is for.
pub(super) fn kinds<'d>(
    arguments: &[SetArgument],
    data: &'d [Dataset],
) -> impl Iterator<Item = (SetKind, &'d Dataset)> {
    let kinds: Vec<SetKind> = arguments.iter().map(|set| set.kind).collect();
    kinds.into_iter().zip(data)
}

/// How data is read.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArguments {
    /// Rows of a benchmark that may be unusable: they are left out, counted and named. One more is an
    /// error. (A bad row of JSONL always is.)
    #[arg(long, default_value_t = 0, value_name = "N")]
    max_bad_rows: usize,
}

impl DataArguments {
    /// Reads a dataset, and says which rows were left out.
    pub(super) fn read(&self, address: &Path, printer: &Printer) -> Result<Dataset, Error> {
        let options = ReadOptions {
            max_bad_rows: self.max_bad_rows,
        };
        let data = dataset::read(address, &options)?;
        for row in &data.bad_rows {
            printer.note(&format!("left out: {row}"));
        }
        Ok(data)
    }
}

/// Fails early where an output is there and must not be replaced, or cannot be put there.
pub(super) fn refuse_existing(path: &Path, force: bool) -> Result<(), Error> {
    if path.symlink_metadata().is_ok() && !force {
        return Err(crate::files::Error::Exists {
            path: path.to_owned(),
        }
        .into());
    }
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.exists() => {
            Err(crate::files::Error::NoParent {
                parent: parent.to_owned(),
            }
            .into())
        }
        _ => Ok(()),
    }
}

/// Says where the model ran, if that may surprise.
pub(super) fn note_placement(engine: &Engine, printer: &Printer) {
    if let Some(placement) = engine.placement() {
        if let Some(note) = placement.note {
            tracing::info!("running on {}: {note}", placement.device);
        } else if placement.device != "cpu" {
            printer.note(&format!("running on {}", placement.device));
        }
    }
}

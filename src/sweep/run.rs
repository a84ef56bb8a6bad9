//! Runs the points.
//!
//! ```text
//!   retain set ──► coefficients, once ──┐
//!   all sets   ──► answers, untouched   │        worker 1: session that weakens, session that answers
//!                                       ├──────► worker 2: the same              ⋮
//!                                       │           │ a point: weaken → plan → answers under it
//!                                       │           ▼
//!                                       └──────► the sweep's file, written after every point
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::objective::{FORGET, RETAIN};
use super::record::{Binding, Finished, Sweep};
use super::{Error, Objective, Point};
use crate::bundle::Bundle;
use crate::dataset::{Dataset, Sample};
use crate::eval::{Settings, Summary, evaluate, set_names};
use crate::files::Sha256;
use crate::graph::Outputs;
use crate::kvw::{self, Coefficients, Gates, LayerRange, Layers, Order, RuleKind, TowerChoice};
use crate::pipeline::{self, Model, check_different, gates_of};
use crate::runtime::{Decoder, Engine, generate, memory};

/// Everything that a sweep needs but its points.
#[derive(Clone)]
pub struct Job<'a> {
    /// The model.
    pub bundle: &'a Bundle,
    /// The precision to run; the most precise where none is asked for.
    pub variant: Option<&'a str>,
    /// ONNX Runtime.
    pub engine: &'a Engine,
    /// The rule.
    pub rule: &'static RuleKind,
    /// What is to be forgotten; the set called `forget`.
    pub forget: &'a Dataset,
    /// What is to be kept; the set called `retain`.
    pub retain: &'a Dataset,
    /// Further sets to evaluate, by name.
    pub others: &'a [(String, Dataset)],
    /// The towers whose layers are weakened.
    pub tower: TowerChoice,
    /// Samples per weakening step.
    pub batch_size: usize,
    /// Passes over the forget set.
    pub epochs: usize,
    /// Order of the forget set.
    pub order: Order,
    /// Whether each layer's matrix is given its old norm back after every step.
    pub keep_norm: bool,
    /// Samples of each set to evaluate.
    pub limit: usize,
    /// How answers are generated.
    pub generation: generate::Options,
    /// Points to run at the same time, at most.
    pub jobs: usize,
}

/// What happens while a sweep runs.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The retain set is measured: samples done, of all.
    Collecting(usize, usize),
    /// How many points run at the same time, and why not more.
    Jobs {
        /// Points at the same time.
        jobs: usize,
        /// What one of them holds, in bytes, as the first was measured.
        bytes_each: Option<u64>,
        /// Memory that was there for more, in bytes.
        available: Option<u64>,
    },
    /// A point is finished and in the file: how many are, of all that were asked for.
    Finished(&'a Finished, usize, usize),
}

/// Further sets with the names of their files, each name once.
///
/// # Errors
/// [`Error::SameName`]: two have one name, or one is called as a set of the job.
pub fn named(sets: Vec<Dataset>) -> Result<Vec<(String, Dataset)>, Error> {
    let mut taken = BTreeSet::from([FORGET.to_owned(), RETAIN.to_owned()]);
    let sets = sets.into_iter().map(|set| {
        let name = set_names(&[set.path.as_path()]).concat();
        match taken.insert(name.clone()) {
            true => Ok((name, set)),
            false => Err(Error::SameName { name }),
        }
    });
    sets.collect()
}

/// Runs those of `points` that `path` does not hold yet, writes each into it, and judges all that it
/// holds by `objective`.
///
/// # Errors
/// The file belongs to another sweep, a layer is not there, the model fails, the objective cannot be
/// computed. What was finished until then stays in the file.
pub fn run(
    job: &Job<'_>,
    points: &[Point],
    objective: &Objective,
    path: &Path,
    watch: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Sweep, Error> {
    check_different(job.forget, job.retain)?;
    let mut worker = Worker::open(job, points)?;
    worker.check(points)?;
    let binding = job.binding(&worker.model)?;
    let mut sweep = match path.symlink_metadata() {
        Ok(_) => {
            let mut sweep = Sweep::read(path)?;
            sweep.check(&binding, path)?;
            sweep.objective = objective.clone();
            sweep
        }
        Err(_) => Sweep::new(binding, objective.clone()),
    };
    if sweep.untouched.is_empty() {
        sweep.untouched = worker.evaluate(&Gates::new())?;
    }
    // Before any point is run: an objective that the sets do not have.
    sweep.judge()?;
    sweep.write(path)?;
    let pending = sweep.pending(points);
    let Some(first) = pending.first() else {
        return Ok(sweep);
    };
    let coefficients = worker.collect(first, |done| {
        watch(Event::Collecting(done, job.retain.samples.len()));
    })?;
    let jobs = job.jobs_that_fit(pending.len(), worker.private_before, watch);
    let queue = Queue {
        next: AtomicUsize::new(0),
        pending: &pending,
        total: points.len(),
        state: Mutex::new((sweep, Ok(()))),
        path,
    };
    std::thread::scope(|scope| {
        for _ in 1..jobs {
            scope.spawn(|| {
                queue.work(Worker::open(job, points), &coefficients, watch);
            });
        }
        queue.work(Ok(worker), &coefficients, watch);
    });
    let (mut sweep, outcome) = queue
        .state
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    outcome?;
    sweep.judge()?;
    sweep.write(path)?;
    Ok(sweep)
}

/// The points that are left, and what came of the others.
struct Queue<'a> {
    next: AtomicUsize,
    pending: &'a [Point],
    total: usize,
    state: Mutex<(Sweep, Result<(), Error>)>,
    path: &'a Path,
}

impl Queue<'_> {
    /// Runs points until none is left or one of the workers has failed.
    fn work(
        &self,
        worker: Result<Worker<'_>, Error>,
        coefficients: &Coefficients,
        watch: &(dyn Fn(Event<'_>) + Sync),
    ) {
        let lock = || self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let run = || -> Result<(), Error> {
            let mut worker = worker?;
            while let Some(point) = self.pending.get(self.next.fetch_add(1, Ordering::Relaxed)) {
                let finished = worker.run(point, coefficients)?;
                let (sweep, _) = &mut *lock();
                sweep.push(finished);
                sweep.judge()?;
                sweep.write(self.path)?;
                let left = sweep.pending(self.pending).len();
                if let Some(finished) = sweep.points.iter().find(|done| done.point == *point) {
                    watch(Event::Finished(
                        finished,
                        self.total.saturating_sub(left),
                        self.total,
                    ));
                }
            }
            Ok(())
        };
        if let Err(error) = run() {
            // The others stop after the point that they are at.
            self.next.store(self.pending.len(), Ordering::Relaxed);
            let (_, outcome) = &mut *lock();
            if outcome.is_ok() {
                *outcome = Err(error);
            }
        }
    }
}

impl Job<'_> {
    /// Forget, retain, others, by name.
    fn sets(&self) -> impl Iterator<Item = (&str, &Dataset)> {
        let own = [(FORGET, self.forget), (RETAIN, self.retain)];
        let others = self.others.iter().map(|(name, set)| (name.as_str(), set));
        own.into_iter().chain(others)
    }

    fn evaluated<'d>(&self, set: &'d Dataset) -> &'d [Sample] {
        set.samples
            .get(..self.limit.min(set.samples.len()))
            .unwrap_or_default()
    }

    /// About how many forward passes `points` points take on the session that weakens, and on the one
    /// that answers.
    fn forwards(&self, points: usize) -> (usize, usize) {
        let samples: usize = self.sets().map(|(_, set)| self.evaluated(set).len()).sum();
        let steps = self.forget.samples.len().saturating_mul(self.epochs);
        let answers = samples.saturating_mul(self.generation.limit.tokens());
        (
            steps
                .saturating_mul(points)
                .saturating_add(self.retain.samples.len()),
            answers.saturating_mul(points),
        )
    }

    fn binding(&self, model: &Model<'_>) -> Result<Binding, Error> {
        let identity = serde_json::to_vec(&model.identity_of(self.tower)?).unwrap_or_default();
        let runtime = self.engine.describe();
        let runtime = |key: &str| match runtime.get(key) {
            Some(serde_json::Value::String(text)) => text.clone(),
            other => other.map(ToString::to_string).unwrap_or_default(),
        };
        let mut binding = Binding::from([
            ("model".into(), Sha256::of_bytes(&identity).to_string()),
            ("decoder".into(), model.decoder_path().to_owned()),
            ("rule".into(), self.rule.name.to_owned()),
            ("batch_size".into(), self.batch_size.to_string()),
            ("epochs".into(), self.epochs.to_string()),
            ("order".into(), order(self.order)),
            ("keep_norm".into(), self.keep_norm.to_string()),
            ("eval_limit".into(), self.limit.to_string()),
            (
                "max_new_tokens".into(),
                self.generation.limit.tokens().to_string(),
            ),
            ("onnxruntime".into(), runtime("onnxruntime")),
            ("device".into(), runtime("device")),
        ]);
        if self.tower != TowerChoice::Language {
            binding.insert("tower".into(), self.tower.to_string());
        }
        if let Some(length) = self.generation.limit.length() {
            binding.insert("max_length".into(), length.to_string());
        }
        for (name, set) in self.sets() {
            let digest = set.content_sha256().map_err(pipeline::Error::from)?;
            binding.insert(format!("set {name}"), digest);
        }
        Ok(binding)
    }

    /// As many jobs as were asked for, as there are points, and as memory allows: each takes what the
    /// first one took since `private_before`.
    fn jobs_that_fit(
        &self,
        points: usize,
        private_before: Option<u64>,
        watch: &(dyn Fn(Event<'_>) + Sync),
    ) -> usize {
        let wanted = self.jobs.clamp(1, points.max(1));
        let bytes_each = memory::private()
            .zip(private_before)
            .map(|(now, before)| now.saturating_sub(before));
        let available = memory::available();
        let more = bytes_each.zip(available).map(|(each, available)| {
            usize::try_from(available / each.max(1)).unwrap_or(usize::MAX)
        });
        let jobs = more.map_or(wanted, |more| wanted.min(more.saturating_add(1)));
        watch(Event::Jobs {
            jobs,
            bytes_each,
            available,
        });
        jobs
    }
}

fn order(order: Order) -> String {
    match order {
        Order::Shuffle { seed } => format!("{order} {seed}"),
        Order::File => order.to_string(),
    }
}

/// The layers that any of `points` weakens.
fn union(points: &[Point]) -> LayerRange {
    let ranges = points.iter().map(|point| point.layers);
    ranges.reduce(LayerRange::union).unwrap_or(LayerRange::All)
}

/// The sessions that run one point at a time.
struct Worker<'a> {
    job: &'a Job<'a>,
    model: Model<'a>,
    weakening: Decoder,
    answering: Decoder,
    /// Private memory of the process before the sessions were opened.
    private_before: Option<u64>,
}

impl<'a> Worker<'a> {
    fn open(job: &'a Job<'a>, points: &[Point]) -> Result<Worker<'a>, Error> {
        let first = points.first().ok_or_else(|| Error::EmptyGrid {
            axis: "layers".into(),
        })?;
        let moment = job.rule.make(&first.parameters)?.moment();
        let layers = Layers {
            towers: job.tower,
            range: union(points),
        };
        let private_before = memory::private();
        let (weakening, answering) = job.forwards(points.len());
        let mut model = Model::open(job.bundle, job.variant, job.engine, answering)?;
        Ok(Worker {
            job,
            weakening: model.measuring(layers, moment, weakening)?,
            answering: model.decoder(layers, Outputs::Model, answering)?,
            model,
            private_before,
        })
    }

    /// Fails where a sample cannot be prepared, or a point asks for a layer that is not there: before
    /// anything is run.
    fn check(&self, points: &[Point]) -> Result<(), Error> {
        for (_, set) in self.job.sets() {
            self.model.check_samples(&set.samples)?;
        }
        let layers = self.model.layers(&self.weakening);
        for point in points {
            let layers = layers.iter().map(|&(layer, _)| layer);
            point
                .layers
                .check(layers)
                .map_err(|found| kvw::Error::NoSuchLayer {
                    requested: point.layers.to_string(),
                    found,
                })?;
        }
        Ok(())
    }

    fn collect(
        &mut self,
        point: &Point,
        progress: impl FnMut(usize),
    ) -> Result<Coefficients, Error> {
        let rule = self.job.rule.make(&point.parameters)?;
        let samples = &self.job.retain.samples;
        Ok(self
            .model
            .collect(&mut self.weakening, &*rule, samples, 1, progress)?)
    }

    /// A point's plan and how every set is answered under it. A point of which no plan comes is a
    /// result, not an error.
    fn run(&mut self, point: &Point, retain: &Coefficients) -> Result<Finished, Error> {
        let rule = self.job.rule.make(&point.parameters)?;
        let options = kvw::Options {
            layers: point.layers,
            batch_size: self.job.batch_size,
            epochs: self.job.epochs,
            order: self.job.order,
            keep_norm: match self.job.keep_norm {
                true => Some(self.model.column_norms(Layers {
                    towers: self.job.tower,
                    range: point.layers,
                })?),
                false => None,
            },
        };
        let samples = &self.job.forget.samples;
        let plan = self.model.weaken(
            &mut self.weakening,
            &*rule,
            retain,
            samples,
            &options,
            |_| {},
        );
        let (plan, failed) = match plan {
            Ok(plan) => (Some(plan), None),
            Err(pipeline::Error::Kvw(
                error @ (kvw::Error::NothingWeakened { .. }
                | kvw::Error::NonFinite { .. }
                | kvw::Error::BadGate { .. }),
            )) => (None, Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        Ok(Finished {
            point: point.clone(),
            sets: match &plan {
                Some(plan) => self.evaluate(&gates_of(plan))?,
                None => BTreeMap::new(),
            },
            plan: plan.as_ref().map(kvw::Plan::summary),
            failed,
            tradeoff: None,
        })
    }

    /// Every set under `gates`, by name.
    fn evaluate(&mut self, gates: &Gates) -> Result<BTreeMap<String, Summary>, Error> {
        let mut summaries = BTreeMap::new();
        let sets = self.job.sets().map(|(_, set)| set);
        let settings = Settings::new(self.job.generation, sets);
        for (name, set) in self.job.sets() {
            let measured = evaluate(
                &mut self.model.lvlm,
                &mut self.answering,
                self.job.evaluated(set),
                gates,
                &settings,
                |_| {},
            )
            .map_err(pipeline::Error::from)?;
            summaries.insert(name.to_owned(), measured.summary);
        }
        Ok(summaries)
    }
}

//! `kvw sweep`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::arguments::{
    DataArguments, GenerationArguments, RuntimeArguments, StepArguments, note_placement,
    parse_gamma, parse_positive,
};
use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::bundle::Bundle;
use crate::kvw::{LayerRange, TowerChoice};
use crate::pipeline::Error;
use crate::sweep::{self, Event, Grid, Objective, Point, Sweep, Tradeoff};

/// Try many settings: what is forgotten against what is kept
///
/// Runs every combination of --gamma and --layers, evaluates each without writing a model, and shows the
/// settings that no other beats and the one that a stated rule picks. Every finished setting is kept in
/// OUTPUT at once: run the same command again to go on after an interruption, or with more values to widen
/// the grid. The pick is made on the rows that it is measured on, so it flatters itself: check it on rows
/// that the sweep did not see.
#[derive(Args)]
#[command(
    after_help = "Example: kvw sweep MODEL --forget forget.jsonl --retain retain.jsonl \
                        --gamma 0.2,0.4,0.8 --layers 0-2,0-4 -o sweep.json"
)]
pub(super) struct SweepVerb {
    /// Model folder
    model: PathBuf,
    /// What is to be forgotten: JSONL with image, question, answer
    #[arg(long, value_name = "FILE")]
    forget: PathBuf,
    /// What is to be kept: JSONL with image, question, answer
    #[arg(long, value_name = "FILE")]
    retain: PathBuf,
    /// Where the points go (JSON); those that it holds already are not run again
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Evaluate this set too at every point. May be repeated
    #[arg(long = "eval", value_name = "FILE")]
    eval: Vec<PathBuf>,
    #[command(flatten)]
    axes: Axes,
    /// Of which towers layers are weakened: language (the decoder, the method's own), vision (the vision
    /// encoder) or all. --layers then counts in each
    #[arg(long, default_value = "language", value_name = "TOWER")]
    tower: TowerChoice,
    #[command(flatten)]
    objective: ObjectiveArguments,
    /// Samples of each set to evaluate
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = parse_positive)]
    eval_limit: usize,
    /// Points to run at the same time, at most
    ///
    /// Each has its own sessions. Fewer are run where memory does not allow it.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_positive)]
    jobs: usize,
    /// The precision to run where the folder has several (fp32, fp16, …)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Begin anew, whatever OUTPUT holds
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    steps: StepArguments,
    #[command(flatten)]
    generation: GenerationArguments,
    #[command(flatten)]
    reading: DataArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// The grid.
#[derive(Args, Clone)]
#[command(next_help_heading = "Grid")]
pub(super) struct Axes {
    /// Weakening strengths γ. Default: 5, 7, 10, 14 and 20 divided by the number of steps
    #[arg(long, value_name = "GAMMA,…", value_delimiter = ',', value_parser = parse_gamma, allow_negative_numbers = true)]
    pub(super) gamma: Vec<f64>,
    /// Layer ranges. Default: the first third, half and two thirds of the
    /// decoder's layers, and all; with another --tower all
    #[arg(long, value_name = "RANGE,…", value_delimiter = ',')]
    pub(super) layers: Vec<LayerRange>,
}

/// What is traded against what.
#[derive(Args, Clone)]
#[command(next_help_heading = "Choice")]
pub(super) struct ObjectiveArguments {
    /// Keep at least this share of the untouched model's metric on the retain set
    #[arg(long, default_value_t = 0.95, value_name = "SHARE", value_parser = parse_share)]
    pub(super) min_retain: f64,
    /// Bring the metric on the forget set down to this; the lowest is picked in any case
    #[arg(long, value_name = "VALUE", value_parser = parse_share)]
    pub(super) target_forget: Option<f64>,
    /// The metric on both sets, as `kvw eval --format json` names it: one of which more means more is
    /// known
    #[arg(long, default_value = "name_accuracy", value_name = "METRIC")]
    pub(super) metric: String,
}

pub(super) fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("expected a number from 0 to 1".into()),
    }
}

/// What `unlearn` must reach.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Target")]
pub(super) struct TargetArguments {
    /// Search for a setting that brings the metric on the forget set down to this
    ///
    /// Of the settings that keep enough of the retain set, the one that forgets most is taken. If none
    /// reaches the target, the run fails and writes no model. --gamma and --layers narrow the search. The
    /// points go to OUTPUT.sweep.json.
    #[arg(long, value_name = "VALUE", value_parser = parse_share, requires = "retain")]
    pub(super) target_forget: Option<f64>,
    /// Keep this share of the untouched model's metric on the retain set [default: 0.95]
    #[arg(long, value_name = "SHARE", value_parser = parse_share, requires = "target_forget")]
    pub(super) min_retain: Option<f64>,
    /// The metric on both sets [default: name_accuracy]
    #[arg(long, value_name = "METRIC", requires = "target_forget")]
    pub(super) target_metric: Option<String>,
    /// Choose among the points of this file instead of running a sweep
    ///
    /// It comes from `kvw sweep` with the same model, data and options.
    #[arg(long, value_name = "FILE", requires = "target_forget")]
    pub(super) sweep: Option<PathBuf>,
}

impl TargetArguments {
    /// What is asked for, if anything is.
    pub(super) fn objective(&self) -> Option<Objective> {
        let metric = self.target_metric.as_deref().unwrap_or("name_accuracy");
        let target = self.target_forget?;
        let min_retain = self.min_retain.unwrap_or(0.95);
        Some(Objective::on(metric, min_retain, Some(target)))
    }
}

#[derive(Serialize)]
struct Swept<'a> {
    output: &'a PathBuf,
    #[serde(flatten)]
    sweep: &'a Sweep,
}

impl SweepVerb {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let forget = self.reading.read(&self.forget, printer)?;
        let retain = self.reading.read(&self.retain, printer)?;
        let others = self
            .eval
            .iter()
            .map(|path| self.reading.read(path, printer));
        let others = sweep::named(others.collect::<Result<_, _>>()?)?;
        if self.force {
            Sweep::remove(&self.output)?;
        }
        let steps = self.steps.count(forget.samples.len());
        let axes = &self.axes;
        let layers = self.tower.known_layers(bundle.layers());
        let grid = Grid::of_gammas(&axes.gamma, &axes.layers, layers, steps)?;
        let engine = self.runtime.engine_for(self.jobs, printer)?;
        let job = sweep::Job {
            bundle: &bundle,
            variant: self.variant.as_deref(),
            engine: &engine,
            rule: grid.rule,
            forget: &forget,
            retain: &retain,
            others: &others,
            tower: self.tower,
            batch_size: self.steps.batch_size,
            epochs: self.steps.epochs,
            order: self.steps.order(),
            keep_norm: self.steps.keep_norm,
            limit: self.eval_limit,
            generation: self.generation.options(&bundle),
            jobs: self.jobs,
        };
        let objective = &self.objective;
        let objective = Objective::on(
            &objective.metric,
            objective.min_retain,
            objective.target_forget,
        );
        let sweep = run(printer, &job, &grid.points()?, &objective, &self.output)?;
        let swept = Swept {
            output: &self.output,
            sweep: &sweep,
        };
        printer.result("sweep", &swept, || human(&sweep))?;
        Ok(Outcome::Done)
    }
}

/// Runs a sweep, with what happens on standard error.
pub(super) fn run(
    printer: &Printer,
    job: &sweep::Job<'_>,
    points: &[Point],
    objective: &Objective,
    output: &Path,
) -> Result<Sweep, sweep::Error> {
    let progress = printer.progress("sweeping", points.len());
    let watch = |event: Event<'_>| match event {
        Event::Collecting(done, of) => tracing::debug!("retain sample {done} of {of}"),
        Event::Jobs {
            jobs,
            bytes_each,
            available,
        } => printer.note(&jobs_note(jobs, job.jobs, bytes_each, available)),
        Event::Finished(finished, done, of) => {
            progress.at(done);
            printer.note(&format!("{done} of {of}: {finished}"));
        }
    };
    let sweep = sweep::run(job, points, objective, output, &watch)?;
    drop(progress);
    note_placement(job.engine, printer);
    Ok(sweep)
}

fn jobs_note(
    jobs: usize,
    wanted: usize,
    bytes_each: Option<u64>,
    available: Option<u64>,
) -> String {
    let megabytes = |bytes: Option<u64>| {
        bytes.map_or_else(|| "?".to_owned(), |bytes| (bytes / 1_000_000).to_string())
    };
    let points = match jobs {
        1 => "one point at a time".to_owned(),
        jobs => format!("{jobs} points at a time"),
    };
    let asked = match jobs < wanted {
        true => format!(" ({wanted} were asked for)"),
        false => String::new(),
    };
    format!(
        "{points}{asked}, each with {} MB of private memory beside the mapped weights; {} MB are available",
        megabytes(bytes_each),
        megabytes(available)
    )
}

fn share(value: f64) -> String {
    format!("{:.0} %", 100.0 * value)
}

fn human(sweep: &Sweep) -> String {
    let picked = sweep.pick.as_ref().and_then(|pick| pick.point);
    let parameters: Vec<&str> = sweep
        .points
        .first()
        .map(|first| first.point.parameters.keys().map(String::as_str).collect())
        .unwrap_or_default();
    let mut header = parameters.clone();
    header.extend([
        "layers",
        "forget",
        "retain",
        "of untouched",
        "mean gate",
        "",
    ]);
    let rows = sweep.points.iter().enumerate().map(|(index, finished)| {
        let number =
            |of: fn(&Tradeoff) -> String| finished.tradeoff.as_ref().map_or_else(|| "-".into(), of);
        let mark = match (picked == Some(index), sweep.front.contains(&index)) {
            (true, _) => "picked",
            (false, true) => "front",
            (false, false) => finished.failed.as_deref().unwrap_or_default(),
        };
        let mut row: Vec<String> = finished
            .point
            .parameters
            .values()
            .map(f64::to_string)
            .collect();
        row.extend([
            finished.point.layers.to_string(),
            number(|at| share(at.forget)),
            number(|at| share(at.retain)),
            number(|at| share(at.retain_share)),
            number(|at| format!("{:.3}", at.mean_gate)),
            mark.to_owned(),
        ]);
        row
    });
    let mut text = table(&header, rows) + "\n\n";
    if let Some(pick) = &sweep.pick {
        text += &format!("rule: {}\n", pick.rule);
    }
    text += &match (sweep.picked(), sweep.nearest()) {
        (Some(point), _) => format!("picked: {point}\n"),
        (None, Some(point)) => {
            format!("no point does that; the nearest is {point}\n")
        }
        (None, None) => "no point could be run\n".to_owned(),
    };
    text
}

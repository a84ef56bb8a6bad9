//! `kvw probe`.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::arguments::{
    DataArguments, GenerationArguments, RuntimeArguments, ScoringArguments, SetArgument, kinds,
    note_placement, parse_positive, read_sets, refuse_existing,
};
use super::eval::{header, show};
use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::bundle::Bundle;
use crate::dataset::{Dataset, Sample};
use crate::edit::gates_digest;
use crate::eval::{
    Control, ControlKind, EvaluatedSet, Evidence, EvidenceSet, Role, SCHEMA_VERSION, Settings,
};
use crate::files::write_atomic;
use crate::kvw;
use crate::pipeline::{Error, Model, check_different, check_identity};
use crate::probe::{self, Asked, Asking, Controls, PROBES, Wanted, check_controls, questions};
use crate::runtime::Decoder;

/// Ask for the same knowledge in other ways: does the forgetting hold?
///
/// Makes further questions out of what the rows of each set say: other images of the same people, other
/// wordings, facts by name or by image, hints, multiple choice. Each is asked of the model as it is and as
/// the plan would leave it. A set without what a probe needs is named with the reason. See
/// docs/robustness.md.
#[derive(Args)]
#[command(
    after_help = "Example: kvw probe MODEL --plan forget.plan --forget forget.jsonl --retain retain.jsonl \
                  --eval forget=forget_heldout.jsonl --control permuted --control other-people=5"
)]
pub(super) struct ProbeVerb {
    /// Model folder: the untouched model
    model: PathBuf,
    /// The plan, from `kvw weaken` or `kvw unlearn --plan`
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    /// What was to be forgotten: JSONL with image, question, answer, and what probes need
    #[arg(long, value_name = "FILE")]
    forget: PathBuf,
    /// What was to be kept
    #[arg(long, value_name = "FILE")]
    retain: Option<PathBuf>,
    /// Probe this set too. KIND says what it is for: forget, retain, holdout or other (the default). May
    /// be repeated
    #[arg(long = "eval", value_name = "[KIND=]FILE")]
    eval: Vec<SetArgument>,
    /// Only this probe; may be repeated. Default: all of them
    #[arg(long = "probe", value_name = "NAME", value_parser = PROBES.iter().map(|p| p.name).collect::<Vec<_>>())]
    probes: Vec<String>,
    /// Samples of each set, and of each probe of it, to ask
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = parse_positive)]
    limit: usize,
    /// The precision to run where the folder has several (fp32, fp16, …)
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Ask the sets of this precision too, under the same plan (q4, say). May be repeated
    #[arg(long, value_name = "NAME")]
    also_variant: Vec<String>,
    #[command(flatten)]
    controls: ControlArguments,
    /// Write the evaluation file, with every answer in clear text
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the evaluation file
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    generation: GenerationArguments,
    #[command(flatten)]
    scoring: ScoringArguments,
    #[command(flatten)]
    reading: DataArguments,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// How much of the result is luck.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Controls")]
pub(super) struct ControlArguments {
    /// See what luck does: permuted or other-people, with =N draws (3)
    ///
    /// permuted: the same gates dealt out to other neurons of each layer. other-people: the same settings
    /// on as many other people, drawn from the retain set. May be repeated.
    #[arg(long = "control", value_name = "KIND[=N]", value_parser = parse_control)]
    pub(super) controls: Vec<Wanted>,
    /// Seed of the controls' draws
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(super) control_seed: u64,
}

/// Draws of a control, where none are asked for.
const DRAWS: usize = 3;

fn parse_control(text: &str) -> Result<Wanted, String> {
    let (name, draws) = match text.split_once('=') {
        Some((name, draws)) => (name, parse_positive(draws)?),
        None => (text, DRAWS),
    };
    let kind = match name {
        "permuted" => ControlKind::Permuted,
        "other-people" => ControlKind::OtherPeople,
        _ => {
            return Err(
                "expected permuted or other-people, with =N for the number of draws".into(),
            );
        }
    };
    Ok(Wanted { kind, draws })
}

impl ControlArguments {
    /// Fails early where what was asked for cannot be had of these sets.
    pub(super) fn check(
        &self,
        forget: &Dataset,
        retain: Option<&Dataset>,
    ) -> Result<(), probe::Error> {
        let retain = retain.map(|retain| retain.samples.as_slice());
        check_controls(&self.controls, &forget.samples, retain, self.control_seed)
    }

    /// Runs what was asked for, on the sets forget and retain.
    pub(super) fn run(
        &self,
        printer: &Printer,
        on: &mut Controls<'_, '_>,
        forget: &[Sample],
        retain: Option<&[Sample]>,
    ) -> Result<Vec<Control>, probe::Error> {
        let draws = self.controls.iter().map(|control| control.draws).sum();
        let progress = (draws > 0).then(|| printer.progress("controls", draws));
        let mut done = 0;
        on.run(&self.controls, forget, retain, |_, _| {
            done += 1;
            if let Some(progress) = &progress {
                progress.at(done);
            }
        })
    }
}

#[derive(Serialize)]
struct Probed {
    schema_version: u32,
    model: PathBuf,
    plan: PathBuf,
    evaluation_file: Option<PathBuf>,
    #[serde(flatten)]
    evidence: Evidence,
}

impl ProbeVerb {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        if let Some(output) = &self.output {
            refuse_existing(output, self.force)?;
        }
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        let (plan, provenance) = kvw::load_plan(&self.plan).map_err(Error::from)?;
        let forget = self.reading.read(&self.forget, printer)?;
        let retain = self
            .retain
            .as_deref()
            .map(|path| self.reading.read(path, printer))
            .transpose()?;
        if let Some(retain) = &retain {
            check_different(&forget, retain)?;
        }
        self.controls.check(&forget, retain.as_ref())?;
        let extra = read_sets(&self.eval, &self.reading, printer)?;
        let sets = EvaluatedSet::with(
            &forget,
            retain.as_ref(),
            kinds(&self.eval, &extra),
            self.limit,
        );
        let (asked, not_asked) = questions(&sets, |name| {
            self.probes.is_empty() || self.probes.iter().any(|probe| probe == name)
        });
        let engine = self.runtime.engine(printer)?;
        let settings = Settings::new(
            self.generation.options(&bundle),
            sets.iter().map(|set| set.data),
        )
        .with_min_k(&self.scoring.min_k);
        let asking = Asking {
            bundle: &bundle,
            engine: &engine,
            plan: &plan,
            settings: &settings,
        };
        let (mut model, mut gated) = asking.open(self.variant.as_deref(), &asked)?;
        check_identity(&self.plan, &provenance, &model.identity_of(plan.towers())?)?;
        note_placement(&engine, printer);
        let ask = |model: &mut Model<'_>, gated: &mut Decoder, asked: &[Asked<'_, '_>], variant| {
            let samples: usize = asked.iter().map(|asked| asked.samples.len()).sum();
            let progress = printer.progress("asking", 2 * samples);
            asking.ask((model, gated), asked, variant, |done| progress.at(done))
        };
        let mut evaluated = ask(&mut model, &mut gated, &asked, None)?;
        let mut on = Controls {
            model: &mut model,
            gated: &mut gated,
            plan: &plan,
            settings: &settings,
            limit: self.limit,
            seed: self.controls.control_seed,
        };
        let retained = retain.as_ref().map(|retain| retain.samples.as_slice());
        let controls = self
            .controls
            .run(printer, &mut on, &forget.samples, retained)?;
        let as_they_are: Vec<_> = sets.iter().map(Asked::as_it_is).collect();
        for variant in &self.also_variant {
            let (mut model, mut gated) = asking.open(Some(variant), &as_they_are)?;
            evaluated.extend(ask(&mut model, &mut gated, &as_they_are, Some(variant))?);
        }
        let mut evidence = Evidence::of(&settings, engine.describe(), evaluated);
        evidence.plan_digest = Some(gates_digest(&plan.gates));
        evidence.controls = controls;
        evidence.not_asked = not_asked;
        if let Some(output) = &self.output {
            let bytes = evidence.to_bytes()?;
            write_atomic(output, self.force, |file| file.write_all(&bytes)).map_err(Error::from)?;
        }
        evidence
            .sets
            .iter_mut()
            .for_each(EvidenceSet::forget_answers);
        let probed = Probed {
            schema_version: SCHEMA_VERSION,
            model: self.model.clone(),
            plan: self.plan.clone(),
            evaluation_file: self.output.clone(),
            evidence,
        };
        printer.result("probe", &probed, || human(&probed))?;
        Ok(Outcome::Done)
    }
}

/// What the table of `probe` shows.
const COLUMNS: &[&str] = &[
    "name_accuracy",
    "leak_any",
    "leak_first_name",
    "leak_fact",
    "names_another_person",
    "degenerate",
    "ranked_first",
];

fn human(probed: &Probed) -> String {
    let rows = probed.evidence.sets.iter().map(|set| {
        let mut row = vec![set.set.clone(), set.samples.to_string()];
        row.extend(COLUMNS.iter().map(|metric| {
            let of = |role| {
                let measured = set.models.get(&role);
                measured.map_or_else(|| "-".into(), |measured| show(&measured.summary, metric))
            };
            match (of(Role::Before), of(Role::After)) {
                (before, after) if before == "-" && after == "-" => "-".to_owned(),
                (before, after) => format!("{before} → {after}"),
            }
        }));
        row
    });
    let mut text = table(&header(COLUMNS), rows) + "\n";
    for probe in PROBES {
        let mut asked = probed.evidence.sets.iter();
        if asked.any(|set| set.probe.as_deref() == Some(probe.name)) {
            text += &format!("\n{}: {}", probe.name, probe.asks);
        }
    }
    text += "\n";
    for lacking in &probed.evidence.not_asked {
        text += &format!(
            "\nnot asked: {} of {}: {}",
            lacking.probe, lacking.set, lacking.reason
        );
    }
    text += &described(&probed.evidence.controls);
    if let Some(file) = &probed.evaluation_file {
        text += &format!("\n\nevery answer  {} (in clear text)", file.display());
    }
    text + "\n"
}

/// Controls, a line for each set.
pub(super) fn described(controls: &[Control]) -> String {
    let mut text = String::new();
    for control in controls {
        text += &match control.control {
            ControlKind::Permuted => format!(
                "\n\ncontrol: the same gates on other neurons, {} draws (seed {})",
                control.draws, control.seed
            ),
            ControlKind::OtherPeople => format!(
                "\n\ncontrol: the same settings on other people, {} draws (seed {})",
                control.draws, control.seed
            ),
        };
        for set in control.sets.keys() {
            for metric in ["name_accuracy", "leak_any"] {
                let Some(spread) = control.get(set, metric) else {
                    continue;
                };
                let values: Vec<String> = spread
                    .values
                    .iter()
                    .map(|value| format!("{:.0}", 100.0 * value))
                    .collect();
                let deviation = spread.standard_deviation.map_or_else(String::new, |value| {
                    format!(", standard deviation {:.0}", 100.0 * value)
                });
                text += &format!(
                    "\n  {set}, {}: mean {:.0} %{deviation} (each: {})",
                    crate::eval::title(metric),
                    100.0 * spread.mean,
                    values.join(", ")
                );
            }
        }
    }
    text
}

//! `kvw probe`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use serde::Serialize;

use super::arguments::{
    DataArguments, EvaluatedSet, GenerationArguments, RuntimeArguments, SetArgument,
    note_placement, parse_positive, refuse_existing, refuse_same_set,
};
use super::eval::{evaluated_sets, header, show};
use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::bundle::Bundle;
use crate::dataset::Sample;
use crate::eval::{
    Bootstrap, Control, ControlKind, Evidence, EvidenceSet, Role, SCHEMA_VERSION, SetKind,
    Settings, evaluate, set_names,
};
use crate::files::write_atomic;
use crate::graph::Outputs;
use crate::kvw::{self, Gates, LayerRange, Plan};
use crate::pipeline::{Error, Model, check_identity, gates_of};
use crate::probe::{Controls, Material, PROBES};
use crate::runtime::Engine;

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
    #[arg(long = "control", value_name = "KIND[=N]")]
    pub(super) controls: Vec<ControlArgument>,
    /// Seed of the controls' draws
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(super) control_seed: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct ControlArgument {
    kind: ControlKind,
    draws: usize,
}

/// Draws of a control, where none are asked for.
const DRAWS: usize = 3;

impl FromStr for ControlArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<ControlArgument, String> {
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
        Ok(ControlArgument { kind, draws })
    }
}

impl ControlArguments {
    /// Runs what was asked for, on the sets forget and retain.
    pub(super) fn run(
        &self,
        printer: &Printer,
        on: &mut Controls<'_, '_>,
        forget: &[Sample],
        retain: Option<&[Sample]>,
    ) -> anyhow::Result<Vec<Control>> {
        let mut controls = Vec::with_capacity(self.controls.len());
        for control in &self.controls {
            let what = match control.kind {
                ControlKind::Permuted => "control: permuted",
                ControlKind::OtherPeople => "control: other people",
            };
            let progress = printer.progress(what, control.draws);
            let at = |done| progress.at(done);
            controls.push(match control.kind {
                ControlKind::Permuted => {
                    let sets = [("forget", Some(forget)), ("retain", retain)];
                    let sets: Vec<_> = sets
                        .into_iter()
                        .filter_map(|(name, samples)| Some((name, samples?)))
                        .collect();
                    on.permuted(control.draws, &sets, at)?
                }
                ControlKind::OtherPeople => {
                    let retain = retain.ok_or_else(|| {
                        anyhow::anyhow!(
                            "expected --retain: --control other-people draws people from it"
                        )
                    })?;
                    on.other_people(control.draws, forget, retain, at)?
                }
            });
        }
        Ok(controls)
    }
}

/// A probe that a set does not have what it needs for.
#[derive(Serialize)]
struct Skipped {
    set: String,
    probe: &'static str,
    reason: &'static str,
}

#[derive(Serialize)]
struct Probed {
    schema_version: u32,
    model: PathBuf,
    plan: PathBuf,
    evaluation_file: Option<PathBuf>,
    skipped: Vec<Skipped>,
    #[serde(flatten)]
    evidence: Evidence,
}

/// Samples that are asked together, under one name.
struct Asked<'a> {
    name: String,
    set: &'a EvaluatedSet<'a>,
    samples: Vec<Sample>,
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
            refuse_same_set(&forget, retain)?;
        }
        let extra = self
            .eval
            .iter()
            .map(|set| self.reading.read(&set.path, printer));
        let extra = extra.collect::<Result<Vec<_>, _>>()?;
        let given = [
            (SetKind::Forget, Some(&forget)),
            (SetKind::Retain, retain.as_ref()),
        ];
        let given = given.into_iter().filter_map(|(kind, data)| {
            Some(EvaluatedSet {
                kind,
                data: data?,
                limit: self.limit,
            })
        });
        let sets: Vec<_> = given
            .chain(evaluated_sets(&self.eval, &extra, self.limit))
            .collect();
        let paths: Vec<&Path> = sets.iter().map(|set| set.data.path.as_path()).collect();
        let names = set_names(&paths);
        let (asked, skipped) = self.asked(&sets, &names);

        let engine = self.runtime.engine(printer)?;
        let settings = Settings::new(
            self.generation.options(&bundle),
            sets.iter().map(|set| set.data),
        );
        let mut run = Run {
            printer,
            bundle: &bundle,
            engine: &engine,
            plan: &plan,
            settings: &settings,
            evaluated: Vec::new(),
        };
        let (mut model, mut gated) = run.open(self.variant.as_deref(), &asked)?;
        check_identity(&self.plan, &provenance, &model.identity()?)?;
        note_placement(&engine, printer);
        run.ask(&mut model, &mut gated, &asked, "")?;
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
        let as_they_are: Vec<_> = sets
            .iter()
            .zip(&names)
            .map(|(set, name)| Asked {
                name: name.clone(),
                set,
                samples: set.samples().to_vec(),
            })
            .collect();
        for variant in &self.also_variant {
            let (mut model, mut gated) = run.open(Some(variant), &as_they_are)?;
            run.ask(&mut model, &mut gated, &as_they_are, variant)?;
        }
        let mut evidence = Evidence {
            schema_version: SCHEMA_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            max_new_tokens: settings.generation.limit.tokens(),
            max_length: settings.generation.limit.length(),
            bootstrap: Bootstrap::default(),
            agreement: None,
            runtime: engine.describe(),
            sets: run.evaluated,
            comparisons: Vec::new(),
            controls,
        };
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
            skipped,
            evidence,
        };
        printer.result("probe", &probed, || human(&probed))?;
        Ok(Outcome::Done)
    }

    /// Each set as it is, then each probe of it; and the probes that a set cannot have.
    fn asked<'a>(
        &self,
        sets: &'a [EvaluatedSet<'a>],
        names: &[String],
    ) -> (Vec<Asked<'a>>, Vec<Skipped>) {
        let all: Vec<&Sample> = sets.iter().flat_map(|set| &set.data.samples).collect();
        let wanted = |name: &str| self.probes.is_empty() || self.probes.iter().any(|p| p == name);
        let mut asked = Vec::new();
        let mut skipped = Vec::new();
        for (set, name) in sets.iter().zip(names) {
            asked.push(Asked {
                name: name.clone(),
                set,
                samples: set.samples().to_vec(),
            });
            for probe in PROBES.iter().filter(|probe| wanted(probe.name)) {
                let material = Material {
                    set: set.samples(),
                    all: &all,
                };
                match probe.samples(&material) {
                    Ok(mut samples) => {
                        samples.truncate(self.limit);
                        asked.push(Asked {
                            name: format!("{name}/{}", probe.name),
                            set,
                            samples,
                        });
                    }
                    Err(reason) => skipped.push(Skipped {
                        set: name.clone(),
                        probe: probe.name,
                        reason,
                    }),
                }
            }
        }
        (asked, skipped)
    }
}

/// What every variant is asked with.
struct Run<'a> {
    printer: &'a Printer,
    bundle: &'a Bundle,
    engine: &'a Engine,
    plan: &'a Plan,
    settings: &'a Settings,
    evaluated: Vec<EvidenceSet>,
}

impl<'a> Run<'a> {
    fn open(
        &self,
        variant: Option<&str>,
        asked: &[Asked<'_>],
    ) -> Result<(Model<'a>, crate::runtime::Decoder), Error> {
        let samples: usize = asked.iter().map(|asked| asked.samples.len()).sum();
        let forwards = 2 * samples.saturating_mul(self.settings.generation.limit.tokens());
        let model = Model::open(self.bundle, variant, self.engine, forwards)?;
        for asked in asked {
            model.check_samples(&asked.samples)?;
        }
        let gated = model.decoder(LayerRange::All, Outputs::Model, forwards)?;
        Ok((model, gated))
    }

    /// Asks everything, before and after. `variant` goes behind the names, where it is not the first.
    fn ask(
        &mut self,
        model: &mut Model<'_>,
        gated: &mut crate::runtime::Decoder,
        asked: &[Asked<'_>],
        variant: &str,
    ) -> anyhow::Result<()> {
        let samples: usize = asked.iter().map(|asked| asked.samples.len()).sum();
        let progress = self.printer.progress("asking", 2 * samples);
        let mut done = 0;
        let after = gates_of(self.plan);
        for asked in asked {
            let mut measure = |gates: &Gates| {
                let measured = evaluate(
                    &mut model.lvlm,
                    gated,
                    &asked.samples,
                    gates,
                    self.settings,
                    |n| progress.at(done + n),
                );
                done += asked.samples.len();
                measured
            };
            let before = measure(&Gates::new()).map_err(Error::from)?;
            let after = measure(&after).map_err(Error::from)?;
            let models = [(Role::Before, before), (Role::After, after)];
            self.evaluated.push(EvidenceSet {
                set: match variant {
                    "" => asked.name.clone(),
                    variant => format!("{}@{variant}", asked.name),
                },
                kind: asked.set.kind,
                sha256: asked.set.data.content_sha256().map_err(Error::from)?,
                samples: asked.samples.len(),
                models: models.into_iter().collect(),
            });
        }
        Ok(())
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
        let asked = probed.evidence.sets.iter();
        if asked.into_iter().any(|set| set.set.ends_with(probe.name)) {
            text += &format!("\n{}: {}", probe.name, probe.asks);
        }
    }
    text += "\n";
    for skipped in &probed.skipped {
        text += &format!(
            "\nnot asked: {} of {}: {}",
            skipped.probe, skipped.set, skipped.reason
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
                    crate::eval::metric(metric).map_or(metric, |metric| metric.title),
                    100.0 * spread.mean,
                    values.join(", ")
                );
            }
        }
    }
    text
}

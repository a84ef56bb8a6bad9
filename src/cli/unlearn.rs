//! `kvw unlearn`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::apply::{describe, record};
use super::arguments::{
    DataArguments, GenerationArguments, RuntimeArguments, ScoringArguments, SetArgument,
    WeakenArguments, kinds, note_placement, read_sets, refuse_existing,
};
use super::eval::{header, interval, show};
use super::outcome::Outcome;
use super::outcome::runs::Disagreement;
use super::printer::{Printer, table};
use super::probe::{ControlArguments, described};
use super::sweep::{TargetArguments, run};
use crate::bundle::Bundle;
use crate::dataset::{Dataset, Sample};
use crate::edit::{self, EditPlan, FormChoice, ModelIdentity};
use crate::eval::{
    self, Control, EvaluatedSet, Evidence, EvidenceSet, Record, Role, Settings, evaluate,
};
use crate::files::{Sha256, write_atomic};
use crate::kvw::{
    self, Coefficients, Gates, KnowledgeVectorWeakening, Plan, PlanSummary, Rule, RuleKind,
};
use crate::pipeline::{
    Error, Model, check_different, check_identity, compare, gates_of, provenance,
};
use crate::probe::{self, Controls};
use crate::runtime::{Decoder, Engine, Lvlm};
use crate::sweep::{self, Grid, Sweep};

/// Make a model forget: collect, weaken, apply, verify, evaluate
///
/// Measures the retain set, weakens the forget set's neurons step by step, writes a new model folder,
/// proves that it computes what the plan says, and reports answers before and after. The output appears
/// only when all of that held.
#[derive(Args)]
#[command(
    after_help = "Example: kvw unlearn MODEL --forget forget.jsonl --retain retain.jsonl -o OUT \
                        --gamma 0.4 --layers 0-4"
)]
pub(super) struct Unlearn {
    /// Model folder
    pub(super) model: PathBuf,
    /// What is to be forgotten: JSONL with image, question, answer; a benchmark, clear:PATH/forget05 or
    /// mllmu:PATH/forget_5; or ready-made inputs, a .safetensors or .npz file or a folder of them
    #[arg(long, value_name = "PATH")]
    pub(super) forget: PathBuf,
    /// What is to be kept, in the same forms
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "retain_coefficients"
    )]
    pub(super) retain: Option<PathBuf>,
    /// Coefficients of the retain set from an earlier `kvw collect`, instead of measuring them
    #[arg(long, value_name = "FILE")]
    pub(super) retain_coefficients: Option<PathBuf>,
    /// The new folder
    #[arg(short, long, value_name = "FOLDER")]
    pub(super) output: PathBuf,
    /// Keep the plan in this file. With the unlearned model it gives back the original
    #[arg(long, value_name = "FILE")]
    pub(super) plan: Option<PathBuf>,
    /// Where every answer goes, before and after, with the questions (default: OUTPUT.evaluation.json). It
    /// names what was forgotten: do not ship it
    #[arg(long, value_name = "FILE")]
    pub(super) evaluation: Option<PathBuf>,
    /// Evaluate this set too, before and after. KIND says what it is for: forget, retain, holdout
    /// (never shown to the model), or other (the default: general ability to keep). May be repeated
    #[arg(long = "eval", value_name = "[KIND=]FILE")]
    pub(super) eval: Vec<SetArgument>,
    /// The evaluation file of a model that was trained without the forget set, from `kvw eval -o` on the
    /// same sets: for forget quality, PrivLeak and a third column
    #[arg(long, value_name = "FILE")]
    pub(super) reference: Option<PathBuf>,
    /// Samples of each set to evaluate; 0: none
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(super) eval_limit: usize,
    /// The precision to run where the folder has several (fp32, fp16, …); all of them are edited
    #[arg(long, value_name = "NAME")]
    pub(super) variant: Option<String>,
    /// How gates are written: auto, columns, scales or mul (see `kvw apply --help`)
    #[arg(long, default_value = "auto", value_name = "FORM")]
    pub(super) edit: FormChoice,
    /// Replace an output that kvw wrote
    #[arg(long)]
    pub(super) force: bool,
    #[command(flatten)]
    pub(super) weakening: WeakenArguments,
    #[command(flatten)]
    pub(super) targets: TargetArguments,
    #[command(flatten)]
    pub(super) controls: ControlArguments,
    #[command(flatten)]
    pub(super) generation: GenerationArguments,
    #[command(flatten)]
    pub(super) scoring: ScoringArguments,
    #[command(flatten)]
    pub(super) reading: DataArguments,
    #[command(flatten)]
    pub(super) runtime: RuntimeArguments,
}

/// Version of the JSON that `unlearn` and `demo` print.
const SCHEMA_VERSION: u32 = 2;

/// What was done, and what came of it.
#[derive(Serialize)]
pub(super) struct Unlearned {
    schema_version: u32,
    pub(super) model: PathBuf,
    pub(super) output: PathBuf,
    pub(super) plan_file: Option<PathBuf>,
    pub(super) evaluation_file: Option<PathBuf>,
    pub(super) steps: u64,
    pub(super) rule: String,
    pub(super) parameters: serde_json::Value,
    pub(super) plan: PlanSummary,
    pub(super) changed_bytes: u64,
    pub(super) changed_tensors: usize,
    /// What the receipt holds of the evaluation; `sets` is empty where none was asked for.
    pub(super) evaluation: Record,
    #[serde(skip)]
    description: String,
}

/// Samples of the forget and the retain set that the edited and the gated model are compared on.
const COMPARED_SAMPLES: usize = 8;

impl Unlearn {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let unlearned = self.job(printer)?;
        printer.result("unlearn", &unlearned, || unlearned.human())?;
        Ok(Outcome::Done)
    }

    fn evaluation_file(&self) -> PathBuf {
        let file = self.evaluation.clone();
        file.unwrap_or_else(|| beside(&self.output, ".evaluation.json"))
    }

    /// Everything but the printing of the result.
    pub(super) fn job(&self, printer: &Printer) -> anyhow::Result<Unlearned> {
        refuse_existing(&self.output, self.force)?;
        let evaluation_file = (self.eval_limit > 0).then(|| self.evaluation_file());
        for file in [&self.plan, &evaluation_file].into_iter().flatten() {
            refuse_existing(file, self.force)?;
        }
        let bundle = Bundle::open(&self.model).map_err(Error::from)?;
        edit::check_output(&bundle, &self.output, self.force).map_err(Error::from)?;
        let forget = self.reading.read(&self.forget, printer)?;
        let retain = self
            .retain
            .as_deref()
            .map(|path| self.reading.read(path, printer))
            .transpose()?;
        let extra = read_sets(&self.eval, &self.reading, printer)?;
        if let Some(retain) = &retain {
            check_different(&forget, retain)?;
        }
        self.controls.check(&forget, retain.as_ref())?;
        let reference = self
            .reference
            .as_ref()
            .map(|path| Evidence::read(path).map(|(evidence, _)| (path.as_path(), evidence)))
            .transpose()
            .map_err(Error::from)?;
        let engine = self.runtime.engine(printer)?;
        let forwards =
            forget.samples.len() + retain.as_ref().map_or(0, |retain| retain.samples.len());
        let mut model = Model::open(&bundle, self.variant.as_deref(), &engine, forwards)?;
        for set in [Some(&forget), retain.as_ref()]
            .into_iter()
            .flatten()
            .chain(&extra)
        {
            model.check_samples(&set.samples)?;
        }
        let identity = model.identity_of(self.weakening.tower)?;
        let weakening = self.choose(printer, &bundle, &engine, &forget, retain.as_ref())?;
        let sets = (&forget, retain.as_ref());
        let plan = self.weaken(printer, &identity, &mut model, sets, &weakening)?;
        note_placement(&engine, printer);
        let data = [("forget", Some(&forget)), ("retain", retain.as_ref())];
        let data: Vec<_> = data
            .into_iter()
            .filter_map(|(name, set)| Some((name, set?)))
            .collect();
        let provenance = provenance(&model, &identity, &engine, &data)?;
        let edits =
            EditPlan::in_form(&bundle, &plan.gates, &identity, self.edit).map_err(Error::from)?;
        let limit = self.eval_limit;
        let sets = EvaluatedSet::with(&forget, retain.as_ref(), kinds(&self.eval, &extra), limit);
        let job = Job {
            arguments: self,
            printer,
            engine: &engine,
            settings: Settings::new(
                self.generation.options(&bundle),
                sets.iter().map(|set| set.data),
            )
            .with_min_k(&self.scoring.min_k),
            sets: &sets,
            reference,
            plan: &plan,
            gates: gates_of(&plan),
        };
        let gated = model.gated(self.weakening.tower, job.forwards())?;
        let run = RefCell::new((model, gated));
        let mut verdict = None;
        let options = edit::Options {
            force: self.force,
            checksums: false,
            plan: record(&plan, &provenance),
        };
        edit::apply_if(
            &bundle,
            &edits,
            &self.output,
            &options,
            &|_| {},
            &mut |staged| {
                let (model, gated) = &mut *run.borrow_mut();
                let evidence = job.accept(model, gated, staged)?;
                let bytes = evidence.to_bytes()?;
                let record = evidence.record(Sha256::of_bytes(&bytes));
                let value = (limit > 0)
                    .then(|| serde_json::to_value(&record))
                    .transpose()?;
                verdict = Some((record, bytes));
                Ok(value)
            },
        )
        .map_err(Error::from)?;
        let (evaluation, bytes) = verdict.context("the output was not verified")?;
        if let Some(path) = &evaluation_file {
            write_atomic(path, self.force, |file| file.write_all(&bytes)).map_err(Error::from)?;
        }
        if let Some(path) = &self.plan {
            kvw::save_plan(path, &plan, provenance, self.force).map_err(Error::from)?;
        }
        Ok(Unlearned {
            schema_version: SCHEMA_VERSION,
            model: self.model.clone(),
            output: self.output.clone(),
            plan_file: self.plan.clone(),
            evaluation_file,
            steps: plan.steps,
            rule: plan.rule.clone(),
            parameters: plan.parameters.clone(),
            plan: plan.summary(),
            changed_bytes: edits.bytes(),
            changed_tensors: edits.edits().len(),
            evaluation,
            description: describe(&plan),
        })
    }

    /// The setting: what was asked for, or what a sweep picks by the target.
    fn choose(
        &self,
        printer: &Printer,
        bundle: &Bundle,
        engine: &Engine,
        forget: &Dataset,
        retain: Option<&Dataset>,
    ) -> anyhow::Result<WeakenArguments> {
        let mut weakening = self.weakening.clone();
        let (Some(objective), Some(retain)) = (self.targets.objective(), retain) else {
            return Ok(weakening);
        };
        anyhow::ensure!(
            self.eval_limit > 0,
            "expected --eval-limit of at least 1: a target is measured on evaluated samples"
        );
        let (points, file, rule) = match &self.targets.sweep {
            Some(file) => {
                let points = Sweep::read(file)?.points;
                let points = points.into_iter().map(|finished| finished.point);
                let rule = KnowledgeVectorWeakening::NAME;
                (
                    points.collect(),
                    file.clone(),
                    RuleKind::named(rule).map_err(Error::from)?,
                )
            }
            None => {
                let file = beside(&self.output, ".sweep.json");
                if self.force {
                    Sweep::remove(&file)?;
                }
                let grid = Grid::of_gammas(
                    weakening.gamma.as_slice(),
                    weakening.layers.as_slice(),
                    weakening.tower.known_layers(bundle.layers()),
                    weakening.steps.count(forget.samples.len()),
                )?;
                (grid.points()?, file, grid.rule)
            }
        };
        let job = sweep::Job {
            bundle,
            variant: self.variant.as_deref(),
            engine,
            rule,
            forget,
            retain,
            others: &[],
            tower: weakening.tower,
            batch_size: weakening.steps.batch_size,
            epochs: weakening.steps.epochs,
            order: weakening.steps.order(),
            keep_norm: weakening.steps.keep_norm,
            limit: self.eval_limit,
            generation: self.generation.options(bundle),
            jobs: 1,
        };
        let sweep = run(printer, &job, &points, &objective, &file)?;
        let picked = sweep.pick_or_nearest()?;
        printer.note(&format!("picked {picked} ({})", objective.rule()));
        let gamma = picked.point.parameters.get(KnowledgeVectorWeakening::GAMMA);
        weakening.gamma = gamma.copied();
        weakening.layers = Some(picked.point.layers);
        Ok(weakening)
    }

    /// Collects (unless that was done before) and weakens, on one session.
    fn weaken(
        &self,
        printer: &Printer,
        identity: &ModelIdentity,
        model: &mut Model<'_>,
        (forget, retain): (&Dataset, Option<&Dataset>),
        weakening: &WeakenArguments,
    ) -> anyhow::Result<Plan> {
        let rule = weakening.rule(forget.samples.len(), printer);
        let options = weakening.options(model)?;
        let steps = forget.samples.len() * weakening.steps.epochs;
        let forwards = steps + retain.map_or(0, |retain| retain.samples.len());
        let mut decoder = model.measuring(weakening.layers(), rule.moment(), forwards)?;
        let coefficients = match (&self.retain_coefficients, retain) {
            (Some(path), _) => {
                let (coefficients, provenance) =
                    kvw::load_coefficients(path).map_err(Error::from)?;
                check_identity(path, &provenance, identity)?;
                coefficients
            }
            (None, Some(retain)) => collect(printer, model, &mut decoder, &rule, &retain.samples)?,
            (None, None) => anyhow::bail!("expected --retain or --retain-coefficients"),
        };
        let progress = printer.progress("weakening", steps);
        let plan = model.weaken(
            &mut decoder,
            &rule,
            &coefficients,
            &forget.samples,
            &options,
            |step| {
                tracing::debug!("step {} of {}: {}", step.index + 1, step.of, step.samples);
                progress.at(step.index + 1);
            },
        )?;
        Ok(plan)
    }
}

/// `output` with something more to its name.
fn beside(output: &Path, more: &str) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(more);
    name.into()
}

fn collect(
    printer: &Printer,
    model: &mut Model<'_>,
    decoder: &mut Decoder,
    rule: &dyn Rule,
    samples: &[Sample],
) -> Result<Coefficients, Error> {
    let progress = printer.progress("collecting", samples.len());
    model.collect(decoder, rule, samples, 1, |done| progress.at(done))
}

/// What the written folder is judged by, before it appears.
struct Job<'a> {
    arguments: &'a Unlearn,
    printer: &'a Printer,
    engine: &'a Engine,
    /// Forget, retain if given, others.
    sets: &'a [EvaluatedSet<'a>],
    settings: Settings,
    /// The retrained model's evaluation, and its file.
    reference: Option<(&'a Path, Evidence)>,
    plan: &'a Plan,
    gates: Gates,
}

impl Job<'_> {
    /// How many samples are evaluated.
    fn samples(&self) -> usize {
        self.sets.iter().map(|set| set.samples().len()).sum()
    }

    /// About how many forward passes the evaluation takes.
    fn forwards(&self) -> usize {
        let generated = self
            .samples()
            .saturating_mul(self.settings.generation.limit.tokens());
        COMPARED_SAMPLES.saturating_add(generated)
    }

    /// Compares the staged model with the gated one, and evaluates both.
    fn accept(
        &self,
        model: &mut Model<'_>,
        gated: &mut Decoder,
        staged: &Path,
    ) -> Result<Evidence, Box<dyn std::error::Error + Send + Sync>> {
        let bundle = Bundle::open(staged)?;
        let variant = self.arguments.variant.as_deref();
        let mut written = Model::open(&bundle, variant, self.engine, 0)?;
        let mut edited = written.plain_decoder(self.forwards())?;
        let samples: Vec<Sample> = self
            .sets
            .iter()
            .take(2)
            .flat_map(|set| set.data.samples.iter().take(COMPARED_SAMPLES / 2).cloned())
            .collect();
        let agreement = compare(
            model,
            gated,
            &self.gates,
            (&mut written.lvlm, &mut edited),
            &samples,
        )?;
        if !agreement.holds() {
            return Err(Box::new(Disagreement(agreement)));
        }
        let sets = match self.arguments.eval_limit {
            0 => Vec::new(),
            _ => self.evaluate((model, gated), (&mut written.lvlm, &mut edited))?,
        };
        let mut evidence = Evidence::of(&self.settings, self.engine.describe(), sets);
        evidence.agreement = Some(agreement);
        if let Some((path, reference)) = &self.reference {
            evidence.add_reference(path, reference.clone(), &self.settings.scoring)?;
        }
        evidence.compare();
        if let Some(objective) = self.arguments.targets.objective() {
            objective.check(&evidence, self.plan.summary().mean_gate)?;
        }
        evidence.controls = self.control(model, gated)?;
        Ok(evidence)
    }

    fn control(
        &self,
        model: &mut Model<'_>,
        gated: &mut Decoder,
    ) -> Result<Vec<Control>, probe::Error> {
        let samples = |set: usize| self.sets.get(set).map(|set| set.data.samples.as_slice());
        let controls = &self.arguments.controls;
        let mut on = Controls {
            model,
            gated,
            plan: self.plan,
            settings: &self.settings,
            limit: self.arguments.eval_limit,
            seed: controls.control_seed,
        };
        let retain = self.arguments.retain.as_ref().and_then(|_| samples(1));
        controls.run(
            self.printer,
            &mut on,
            samples(0).unwrap_or_default(),
            retain,
        )
    }

    /// Every set on both models.
    fn evaluate(
        &self,
        (model, gated): (&mut Model<'_>, &mut Decoder),
        (written, edited): (&mut Lvlm, &mut Decoder),
    ) -> Result<Vec<EvidenceSet>, Error> {
        let progress = self.printer.progress("evaluating", 2 * self.samples());
        let mut done = 0;
        let mut evaluated = Vec::new();
        for set in self.sets {
            let mut run = |lvlm: &mut Lvlm, decoder: &mut Decoder| {
                let measured = evaluate(
                    lvlm,
                    decoder,
                    set.samples(),
                    &Gates::new(),
                    &self.settings,
                    |n| progress.at(done + n),
                );
                done += set.samples().len();
                measured
            };
            // Gates of 1 are bit-identical to the untouched model.
            let before = run(&mut model.lvlm, gated)?;
            let models = [(Role::Before, before), (Role::After, run(written, edited)?)];
            evaluated.push(set.entry(set.name.clone(), set.samples().len(), models)?);
        }
        Ok(evaluated)
    }
}

impl Unlearned {
    /// The result for people.
    pub(super) fn human(&self) -> String {
        let mut text = format!("\n{}\n", self.description);
        if let Some(agreement) = &self.evaluation.evidence.agreement {
            text += &format!(
                "proof: the written model computes what the plan says: logits within {:.1e} of the \
                 gated model's largest (allowed {:.0e}), where the gates move them by {:.1e}; {:.1} % of \
                 {} positions predict the same token\n",
                agreement.max_difference / agreement.max_logit,
                agreement.tolerance,
                agreement.effect / agreement.max_logit,
                100.0 * agreement.same_argmax,
                agreement.positions,
            );
        }
        let sets = &self.evaluation.evidence.sets;
        if !sets.is_empty() {
            text += &format!("\n{}\n", compared(sets));
            text += &comparisons(&self.evaluation.evidence);
        }
        let controls = described(&self.evaluation.evidence.controls);
        if !controls.is_empty() {
            text += &format!("{}\n", controls.trim_start_matches('\n'));
        }
        text += &format!(
            "\nunlearned model  {} ({} bytes in {} tensors rewritten, all others identical)\n",
            self.output.display(),
            self.changed_bytes,
            self.changed_tensors
        );
        if let Some(file) = &self.evaluation_file {
            text += &format!(
                "every answer     {} (names what was forgotten)\n",
                file.display()
            );
        }
        text += &format!(
            "receipt          {}\n",
            self.output.join(crate::files::RECEIPT).display()
        );
        if let Some(plan) = &self.plan_file {
            text += &format!(
                "plan             {} (as sensitive as the original model)\n",
                plan.display()
            );
        }
        text
    }
}

/// What the table of `unlearn` shows.
const COLUMNS: &[&str] = &[
    "name_accuracy",
    "leak_any",
    "leak_first_name",
    "degenerate",
    "rouge_l_recall",
    "loss",
];

/// What was taken of two sets or two models, as far as it has a value.
fn comparisons(evidence: &Evidence) -> String {
    let mut text = String::new();
    for comparison in &evidence.comparisons {
        if !COMPARISONS.contains(&comparison.metric.as_str()) {
            continue;
        }
        let values: Vec<String> = comparison
            .models
            .iter()
            .filter_map(|(role, estimate)| {
                Some(format!("{} {:.3}", role.as_str(), estimate.value?))
            })
            .collect();
        if values.is_empty() {
            continue;
        }
        let title = eval::title(&comparison.metric);
        let of = [&comparison.set, &comparison.against];
        let of: Vec<&str> = of.into_iter().flatten().map(String::as_str).collect();
        let of = match of.is_empty() {
            true => String::new(),
            false => format!(" ({})", of.join(" against ")),
        };
        text += &format!("{title}{of}: {}\n", values.join(", "));
    }
    match text.is_empty() {
        true => text,
        false => format!("\n{text}"),
    }
}

/// What [`comparisons`] shows.
const COMPARISONS: &[&str] = &["privleak", "forget_quality", "model_utility"];

/// Every set's main metrics, before and after.
fn compared(sets: &[EvidenceSet]) -> String {
    let cell = |set: &EvidenceSet, name: &str| {
        let of = |role: Role| Some(&set.models.get(&role)?.summary);
        let shown = |role: Role| of(role).map_or_else(String::new, |summary| show(summary, name));
        let after = of(Role::After).and_then(|summary| summary.get(name));
        let interval = after.map_or_else(String::new, |estimate| interval(estimate, name));
        let retrained = match shown(Role::Retrained) {
            none if none.is_empty() => none,
            value => format!(" | {value}"),
        };
        format!(
            "{} → {}{interval}{retrained}",
            shown(Role::Before),
            shown(Role::After)
        )
    };
    let rows = sets.iter().map(|set| {
        let mut row = vec![set.set.clone(), set.samples.to_string()];
        row.extend(COLUMNS.iter().map(|name| cell(set, name)));
        row
    });
    let retrained = sets
        .iter()
        .any(|set| set.models.contains_key(&Role::Retrained));
    let legend = match retrained {
        true => "before → after [95 % interval] | retrained",
        false => "before → after [95 % interval]",
    };
    format!("{}\n({legend})", table(&header(COLUMNS), rows))
}

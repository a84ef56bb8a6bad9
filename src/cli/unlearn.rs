//! `kvw unlearn`.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::apply::record;
use super::arguments::{
    RuntimeArguments, WeakenArguments, dataset, note_placement, parse_positive, refuse_existing,
    refuse_same_set,
};
use super::eval::{Answer, answers, label, number, percent};
use super::outcome::{Disagreement, Outcome};
use super::printer::{Printer, table};
use super::weaken::describe;
use crate::bundle::Bundle;
use crate::dataset::{Dataset, Sample};
use crate::edit::{self, EditPlan, FormChoice, ModelIdentity};
use crate::eval::evaluate;
use crate::eval::text::{Metric, Summary};
use crate::files::write_atomic;
use crate::graph::Outputs;
use crate::kvw::{self, Coefficients, Gates, LayerRange, Plan, PlanSummary, Rule};
use crate::pipeline::{Agreement, Error, Model, check_identity, compare, gates_of, provenance};
use crate::runtime::{Decoder, Engine};

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
    /// What is to be forgotten: JSONL with image, question, answer; or ready-made inputs, a .safetensors or
    /// .npz file or a folder of them
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
    /// Evaluate this set too, before and after. May be repeated
    #[arg(long = "eval", value_name = "FILE")]
    pub(super) eval: Vec<PathBuf>,
    /// Samples of each set to evaluate; 0: none
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(super) eval_limit: usize,
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = parse_positive)]
    pub(super) max_new_tokens: usize,
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
    pub(super) runtime: RuntimeArguments,
}

/// What was done, and what came of it.
#[derive(Serialize)]
pub(super) struct Unlearned {
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
    pub(super) agreement: Agreement,
    pub(super) runtime: serde_json::Value,
    pub(super) sets: Vec<Compared>,
    #[serde(skip)]
    description: String,
}

/// One set, before and after.
#[derive(Serialize)]
pub(super) struct Compared {
    pub(super) set: String,
    pub(super) before: Summary,
    pub(super) after: Summary,
}

/// Samples of the forget and the retain set that the edited and the gated model are compared on.
const COMPARED_SAMPLES: usize = 8;

#[derive(Serialize)]
struct Evidence {
    schema_version: u32,
    agreement: Agreement,
    max_new_tokens: usize,
    sets: Vec<EvidenceSet>,
}

#[derive(Serialize)]
struct EvidenceSet {
    set: String,
    sha256: String,
    before: Answers,
    after: Answers,
}

#[derive(Serialize)]
struct Answers {
    summary: Summary,
    answers: Vec<Answer>,
}

impl Unlearn {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let unlearned = self.job(printer)?;
        printer.result("unlearn", &unlearned, || unlearned.human())?;
        Ok(Outcome::Done)
    }

    fn evaluation_file(&self) -> PathBuf {
        self.evaluation.clone().unwrap_or_else(|| {
            let mut name = self.output.clone().into_os_string();
            name.push(".evaluation.json");
            name.into()
        })
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
        let forget = dataset(&self.forget)?;
        let retain = self.retain.as_deref().map(dataset).transpose()?;
        let extra = self
            .eval
            .iter()
            .map(|path| dataset(path))
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(retain) = &retain {
            refuse_same_set(&forget, retain)?;
        }
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
        let identity = model.identity()?;
        let plan = self.weaken(printer, &identity, &mut model, &forget, retain.as_ref())?;
        note_placement(&engine, printer);
        let data = [("forget", Some(&forget)), ("retain", retain.as_ref())];
        let data: Vec<_> = data
            .into_iter()
            .filter_map(|(name, set)| Some((name, set?)))
            .collect();
        let provenance = provenance(&model, &identity, &engine, &data)?;
        let edits =
            EditPlan::in_form(&bundle, &plan.gates, &identity, self.edit).map_err(Error::from)?;
        let sets: Vec<&Dataset> = [Some(&forget), retain.as_ref()]
            .into_iter()
            .flatten()
            .chain(&extra)
            .collect();
        let job = Job {
            arguments: self,
            printer,
            engine: &engine,
            sets: &sets,
            gates: gates_of(&plan),
        };
        let gated = model.decoder(LayerRange::All, Outputs::Model, job.forwards())?;
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
                verdict = Some(job.accept(model, gated, staged)?);
                Ok(())
            },
        )
        .map_err(Error::from)?;
        let (sets, evidence) = verdict.context("the output was not verified")?;
        let agreement = evidence.agreement;
        if let Some(path) = &evaluation_file {
            let text = serde_json::to_vec_pretty(&evidence)?;
            write_atomic(path, self.force, |file| file.write_all(&text)).map_err(Error::from)?;
        }
        if let Some(path) = &self.plan {
            kvw::save_plan(path, &plan, provenance, self.force).map_err(Error::from)?;
        }
        Ok(Unlearned {
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
            agreement,
            runtime: engine.describe(),
            sets,
            description: describe(&plan),
        })
    }

    /// Collects (unless that was done before) and weakens, on one session.
    fn weaken(
        &self,
        printer: &Printer,
        identity: &ModelIdentity,
        model: &mut Model<'_>,
        forget: &Dataset,
        retain: Option<&Dataset>,
    ) -> anyhow::Result<Plan> {
        let rule = self.weakening.rule(forget.samples.len(), printer);
        let options = self.weakening.options(model)?;
        let steps = forget.samples.len() * self.weakening.steps.epochs;
        let forwards = steps + retain.map_or(0, |retain| retain.samples.len());
        let outputs = Outputs::Sums(rule.moment());
        let mut decoder = model.decoder(self.weakening.layers, outputs, forwards)?;
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
    sets: &'a [&'a Dataset],
    gates: Gates,
}

impl Job<'_> {
    /// About how many forward passes the evaluation takes.
    fn forwards(&self) -> usize {
        let samples: usize = self.sets.iter().map(|set| self.evaluated(set).len()).sum();
        COMPARED_SAMPLES + samples.saturating_mul(self.arguments.max_new_tokens)
    }

    fn evaluated<'d>(&self, set: &'d Dataset) -> &'d [Sample] {
        let limit = self.arguments.eval_limit.min(set.samples.len());
        set.samples.get(..limit).unwrap_or_default()
    }

    /// Compares the staged model with the gated one, and evaluates both.
    fn accept(
        &self,
        model: &mut Model<'_>,
        gated: &mut Decoder,
        staged: &Path,
    ) -> anyhow::Result<(Vec<Compared>, Evidence), Box<dyn std::error::Error + Send + Sync>> {
        let bundle = Bundle::open(staged)?;
        let edited = Model::open(&bundle, self.arguments.variant.as_deref(), self.engine, 0)?;
        let mut edited = edited.plain_decoder(self.forwards())?;
        let samples: Vec<Sample> = self
            .sets
            .iter()
            .take(2)
            .flat_map(|set| set.samples.iter().take(COMPARED_SAMPLES / 2).cloned())
            .collect();
        let agreement = compare(model, gated, &self.gates, &mut edited, &samples)?;
        if !agreement.holds() {
            return Err(Box::new(Disagreement(agreement)));
        }
        let total: usize = self.sets.iter().map(|set| self.evaluated(set).len()).sum();
        let progress = self.printer.progress("evaluating", 2 * total);
        let mut done = 0;
        let mut evidence = Vec::new();
        let mut compared = Vec::new();
        if self.arguments.eval_limit > 0 {
            for set in self.sets {
                let samples = self.evaluated(set);
                let mut run = |decoder: &mut Decoder| {
                    let evaluation = evaluate(
                        &mut model.lvlm,
                        decoder,
                        samples,
                        &Gates::new(),
                        self.arguments.max_new_tokens,
                        |n| progress.at(done + n),
                    );
                    done += samples.len();
                    evaluation
                };
                // Gates of 1 are bit-identical to the untouched model.
                let before = run(gated)?;
                let after = run(&mut edited)?;
                compared.push(Compared {
                    set: label(&set.path),
                    before: before.summary.clone(),
                    after: after.summary.clone(),
                });
                evidence.push(EvidenceSet {
                    set: label(&set.path),
                    sha256: set.content_sha256()?,
                    before: Answers {
                        summary: before.summary.clone(),
                        answers: answers(before),
                    },
                    after: Answers {
                        summary: after.summary.clone(),
                        answers: answers(after),
                    },
                });
            }
        }
        let evidence = Evidence {
            schema_version: 1,
            agreement,
            max_new_tokens: self.arguments.max_new_tokens,
            sets: evidence,
        };
        Ok((compared, evidence))
    }
}

impl Unlearned {
    /// The result for people.
    pub(super) fn human(&self) -> String {
        let mut text = format!(
            "\n{}\nproof: the written model computes what the plan says: logits within {:.1e} of the \
             gated model's largest (allowed {:.0e}), where the gates move them by {:.1e}; {:.1} % of {} \
             positions predict the same token\n",
            self.description,
            self.agreement.max_difference / self.agreement.max_logit,
            self.agreement.tolerance,
            self.agreement.effect / self.agreement.max_logit,
            100.0 * self.agreement.same_argmax,
            self.agreement.positions,
        );
        if !self.sets.is_empty() {
            text += &format!("\n{}\n", self.table());
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

    fn table(&self) -> String {
        let both = |set: &Compared, of: fn(&Summary) -> &Metric, show: fn(&Metric) -> String| {
            format!("{} → {}", show(of(&set.before)), show(of(&set.after)))
        };
        let rows = self.sets.iter().map(|set| {
            vec![
                set.set.clone(),
                set.before.n.to_string(),
                both(set, |s| &s.name_accuracy, percent),
                both(set, |s| &s.leak_any, percent),
                both(set, |s| &s.leak_first_name, percent),
                both(set, |s| &s.degenerate, percent),
                both(set, |s| &s.rouge_l_recall, number),
                both(set, |s| &s.loss, number),
            ]
        });
        let header = [
            "set",
            "samples",
            "full name",
            "any name or fact",
            "first name",
            "repeats itself",
            "ROUGE-L",
            "loss",
        ];
        table(&header, rows)
    }
}

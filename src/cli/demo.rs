//! `kvw demo`.

use std::path::{Path, PathBuf};

use clap::Args;
use include_dir::{Dir, include_dir};
use serde::{Deserialize, Serialize};

use super::arguments::{
    DataArguments, GenerationArguments, RuntimeArguments, ScoringArguments, SetArgument,
    StepArguments, WeakenArguments,
};
use super::outcome::Outcome;
use super::printer::Printer;
use super::probe::ControlArguments;
use super::sweep::TargetArguments;
use super::unlearn::{Unlearn, Unlearned};
use crate::eval::SetKind;
use crate::files::{RECEIPT, StagedFolder, write_atomic};
use crate::pipeline::Error;
use crate::report::{Sources, page};

/// The whole job on an embedded model, in under a minute
///
/// Writes a tiny vision-language model (a Qwen2-VL that was taught 40 fictitious people) and its data
/// into a folder, makes it forget three of them, proves the edit, and shows what it says before and
/// after. Nothing needs to be downloaded but ONNX Runtime, if none is found.
#[derive(Args)]
pub(super) struct Demo {
    /// Where model, data and results go
    #[arg(short, long, default_value = "kvw-demo", value_name = "FOLDER")]
    output: PathBuf,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

/// Made by `tools/demo`.
static EMBEDDED: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/fixtures/demo");

/// What of the embedded folder is written out: the reference results are for tests.
const WRITTEN: [&str; 2] = ["model", "data"];

/// The evaluation of the same model trained anew without the people that are to be forgotten.
const RETRAINED: &str = "retrained.evaluation.json";
/// What must hold before the demo's result might be released.
const POLICY: &str = "policy.toml";

/// The sets that are evaluated beside forget and retain.
const EXTRA_SETS: [(SetKind, &str); 7] = [
    (SetKind::Forget, "forget_text.jsonl"),
    (SetKind::Retain, "retain_text.jsonl"),
    (SetKind::Forget, "forget_heldout.jsonl"),
    (SetKind::Forget, "forget_probes.jsonl"),
    (SetKind::Retain, "retain_probes.jsonl"),
    (SetKind::Holdout, "holdout.jsonl"),
    (SetKind::Other, "shapes.jsonl"),
];

/// The parameters that suit this model, found once by `tools/demo/reference.py`.
#[derive(Deserialize)]
struct Parameters {
    gamma: f64,
    start_layer: usize,
    end_layer: usize,
}

#[derive(Serialize)]
struct Shown {
    folder: PathBuf,
    report: PathBuf,
    #[serde(flatten)]
    unlearned: Unlearned,
}

impl Demo {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        write_embedded(&self.output)?;
        let parameters: Parameters = serde_json::from_slice(embedded("reference/meta.json")?)?;
        let data = self.output.join("data");
        printer.note(&format!(
            "model and data are in {}; forgetting 3 of 40 people (γ {}, layers {}-{})",
            self.output.display(),
            parameters.gamma,
            parameters.start_layer,
            parameters.end_layer
        ));
        let unlearn = Unlearn {
            model: self.output.join("model"),
            forget: data.join("forget.jsonl"),
            retain: Some(data.join("retain.jsonl")),
            retain_coefficients: None,
            output: self.output.join("unlearned"),
            plan: Some(self.output.join("forget.plan")),
            evaluation: None,
            eval: EXTRA_SETS
                .iter()
                .map(|&(kind, set)| SetArgument {
                    kind,
                    path: data.join(set),
                })
                .collect(),
            reference: Some(self.output.join(RETRAINED)),
            eval_limit: 60,
            variant: None,
            edit: crate::edit::FormChoice::Auto,
            force: false,
            weakening: WeakenArguments {
                gamma: Some(parameters.gamma),
                tower: crate::kvw::TowerChoice::Language,
                layers: Some(crate::kvw::LayerRange::Inclusive {
                    start: parameters.start_layer,
                    end: parameters.end_layer,
                }),
                steps: StepArguments::default(),
            },
            targets: TargetArguments::default(),
            controls: ControlArguments::default(),
            generation: GenerationArguments::default(),
            scoring: ScoringArguments::default(),
            reading: DataArguments::default(),
            runtime: self.runtime.clone(),
        };
        let unlearned = unlearn.job(printer)?;
        let shown = Shown {
            folder: self.output.clone(),
            report: self.report(printer, &unlearn, &unlearned)?,
            unlearned,
        };
        printer.result("demo", &shown, || self.human(&shown))?;
        Ok(Outcome::Done)
    }

    /// Writes the page that shows everything. Returns where it is.
    fn report(
        &self,
        printer: &Printer,
        unlearn: &Unlearn,
        unlearned: &Unlearned,
    ) -> anyhow::Result<PathBuf> {
        let sets = [Some(&unlearn.forget), unlearn.retain.as_ref()];
        let sets = sets.into_iter().flatten();
        let data = sets
            .chain(unlearn.eval.iter().map(|set| &set.path))
            .map(|path| unlearn.reading.read(path, printer))
            .collect::<Result<Vec<_>, _>>()?;
        let sources = Sources {
            folder: &unlearn.output,
            evidence: unlearned.evaluation_file.as_deref(),
            plan: unlearned.plan_file.as_deref(),
            probes: None,
            sweep: None,
            policy: Some(&self.output.join(POLICY)),
            original: Some(&unlearn.model),
            data: &data,
            samples: unlearn.eval_limit,
        };
        let text = sources.render(page)?;
        let path = self.output.join("report.html");
        write_atomic(&path, false, |file| file.write_all(text.as_bytes()))?;
        Ok(path)
    }

    fn human(&self, shown: &Shown) -> String {
        let unlearned = &shown.unlearned;
        format!(
            "{}report           {} (open it: every number and answer, on one page)\n\nHow to read it: `forget` are the pictures of three people that the model must no longer \
             know, `retain` those of 37 others. `full name` is what the method's authors measure; `any \
             name or fact` counts first name, last name, job or town, which is stricter. `retrained` is the \
             same model trained without the three: the best that forgetting could give.\n\
             Prove the edit:  kvw diff {model} {output}\n\
             Gate a release:  kvw check {output} --policy {policy} --original {model}\n",
            unlearned.human(),
            shown.report.display(),
            model = unlearned.model.display(),
            output = unlearned.output.display(),
            policy = self.output.join(POLICY).display(),
        )
    }
}

fn embedded(path: &str) -> anyhow::Result<&'static [u8]> {
    let file = EMBEDDED.get_file(path);
    Ok(file
        .ok_or_else(|| anyhow::anyhow!("{path} is not embedded in this build"))?
        .contents())
}

/// Writes the embedded model and data to `folder`, in place of an earlier demo.
fn write_embedded(folder: &Path) -> Result<(), Error> {
    let staged = StagedFolder::create(folder, true)?;
    for part in WRITTEN {
        if let Some(dir) = EMBEDDED.get_dir(part) {
            write_folder(dir, &staged)?;
        }
    }
    if let Some(policy) = EMBEDDED.get_file(POLICY) {
        staged.write(POLICY, policy.contents())?;
    }
    let retrained = EMBEDDED.get_file(RETRAINED);
    if let Some(file) = retrained {
        staged.write(RETRAINED, file.contents())?;
    }
    // Marks the folder as this tool's, so that the next demo may replace it.
    staged.write(RECEIPT, b"{\"tool\": \"kvw\", \"demo\": true}\n")?;
    Ok(staged.commit()?)
}

fn write_folder(dir: &Dir<'_>, staged: &StagedFolder) -> Result<(), Error> {
    for file in dir.files() {
        staged.write(&file.path().to_string_lossy(), file.contents())?;
    }
    dir.dirs().try_for_each(|dir| write_folder(dir, staged))
}

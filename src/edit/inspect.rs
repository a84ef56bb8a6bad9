//! What a model folder holds, and what of it can be weakened.
//!
//! In: a [`Bundle`]. Out: an [`Inspection`], one [`MlpReport`] for every distinct MLP of every ONNX
//! file, with the form in which its gates would be written, or why there is none.

use std::collections::BTreeSet;

use serde::Serialize;

use super::Error;
use super::form::{Cost, EditForm, FormChoice, Subject, choose};
use super::rewrite::Surgeon;
use crate::bundle::{Bundle, Layout, OnnxFile, Role};
use crate::graph::mlp::{find, number_by_order, number_once, survey};
use crate::graph::{Gating, Index, Mlp, Refused, Tower};
use crate::onnx::{Limits, ModelFile};

/// A model folder, looked into.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// How the folder is organized.
    pub layout: Layout,
    /// `model_type` of `config.json`.
    pub family: Option<String>,
    /// Every ONNX file.
    pub files: Vec<FileReport>,
}

/// One ONNX file.
#[derive(Clone, Debug, Serialize)]
pub struct FileReport {
    /// Path relative to the folder.
    pub path: String,
    /// What the file does.
    pub role: Role,
    /// The precision that its name tells, empty for none.
    pub variant: String,
    /// Its distinct MLPs, in the graph's order.
    pub mlps: Vec<MlpReport>,
    /// What looks like an MLP, or may hide one, and is not understood.
    pub refused: Vec<Refused>,
    /// What is odd about the file, and would stop an edit.
    pub warnings: Vec<String>,
}

/// One distinct MLP.
#[derive(Clone, Debug, Serialize)]
pub struct MlpReport {
    /// Layer number, where it is known.
    pub layer: Option<usize>,
    /// Part of the model.
    pub tower: Tower,
    /// Number of knowledge vectors.
    pub d_ff: u64,
    /// Width of the residual stream.
    pub d_model: u64,
    /// Operator of the down projection.
    pub op: String,
    /// Name of its stored weight.
    pub weight: String,
    /// Element type of that weight, by ONNX's name.
    pub dtype: String,
    /// Whether `h = act(gate(x)) ⊙ up(x)`.
    pub gated: bool,
    /// The form in which gates would be written.
    pub edit: Option<EditForm>,
    /// Whether that changes the file's graph, and not only bytes of its weights.
    pub graph: Option<bool>,
    /// What that costs at inference.
    pub cost: Option<Cost>,
    /// Why there is none, or why it is not a form that would be preferred.
    pub reason: Option<String>,
}

/// Looks into every ONNX file of `bundle`.
///
/// # Errors
/// A file that is no readable ONNX model.
pub fn inspect(bundle: &Bundle) -> Result<Inspection, Error> {
    let files = bundle
        .files()
        .iter()
        .map(|file| inspect_file(bundle, file))
        .collect::<Result<_, Error>>()?;
    Ok(Inspection {
        layout: bundle.layout(),
        family: bundle.family().map(str::to_owned),
        files,
    })
}

fn inspect_file(bundle: &Bundle, file: &OnnxFile) -> Result<FileReport, Error> {
    let model = ModelFile::open(&file.path, &Limits::default())?;
    let index = Index::new(model.graph());
    let mlps = mlps(bundle, file, &index);
    let surgeon = Surgeon::new(&model, &index);
    let mut warnings = Vec::new();
    if file.role == Role::Decoder
        && let Err(Error::Layers {
            expected, found, ..
        }) = check_layers(bundle, file, &index, &mlps)
    {
        warnings.push(format!("expected {expected}, found {found}"));
    }
    let mlps = mlps
        .iter()
        .map(|mlp| {
            let weight = mlp.down().weight.tensor;
            let subject = Subject {
                model: &model,
                index: &index,
                surgeon: surgeon.as_ref(),
                mlp,
            };
            let (edit, graph, cost, reason) = match choose(&subject, FormChoice::Auto) {
                Ok(chosen) => {
                    let recipe = &chosen.recipe;
                    let reasons = chosen.passed_over.iter();
                    let reasons = reasons.map(|(form, reason)| format!("no {form}: {reason}"));
                    let reasons = reasons.collect::<Vec<_>>().join("; ");
                    (
                        Some(recipe.form),
                        Some(recipe.changes_graph()),
                        Some(recipe.cost),
                        Some(reasons).filter(|reasons| !reasons.is_empty()),
                    )
                }
                Err(reason) => (None, None, None, Some(reason)),
            };
            Ok(MlpReport {
                layer: mlp.layer,
                tower: mlp.tower,
                d_ff: mlp.d_ff,
                d_model: mlp.d_model,
                op: mlp.down().op.to_owned(),
                weight: weight.name().to_owned(),
                dtype: model.data_type(weight)?.to_string(),
                gated: mlp.gating != Gating::Plain,
                edit,
                graph,
                cost,
                reason,
            })
        })
        .collect::<Result<_, Error>>()?;
    Ok(FileReport {
        path: file.relative.clone(),
        role: file.role,
        variant: file.variant.clone(),
        mlps,
        refused: survey(&index, None).refused,
        warnings,
    })
}

/// The MLPs of `file`, by what its role and the configuration tell: the tower, and numbers where
/// names hold none.
pub fn mlps<'m>(bundle: &Bundle, file: &OnnxFile, index: &Index<'m>) -> Vec<Mlp<'m>> {
    let tower = match (bundle.layout(), file.role) {
        // A single file may hold both towers.
        (Layout::SingleFile, _) | (_, Role::EmbedTokens | Role::LmHead | Role::Other) => None,
        (_, Role::Decoder) => Some(Tower::Language),
        (_, Role::VisionEncoder) => Some(Tower::Vision),
    };
    let mut mlps = find(index, tower);
    if let (Role::Decoder, Some(layers)) = (file.role, bundle.layers()) {
        number_by_order(&mut mlps, Tower::Language, layers);
    }
    number_once(&mut mlps, Tower::Vision);
    mlps
}

/// Checks that `file` shows layers of the vision encoder, and nothing that may hide further ones.
///
/// # Errors
/// [`Error::Layers`].
pub fn check_vision(file: &OnnxFile, index: &Index<'_>, mlps: &[Mlp<'_>]) -> Result<(), Error> {
    let count = mlps.iter().filter(|mlp| mlp.tower == Tower::Vision).count();
    let refused = survey(index, None).refused;
    let (expected, found) = match (count, refused.first()) {
        (1.., None) => return Ok(()),
        (0, None) => ("MLPs of a vision encoder", "none".to_owned()),
        (_, Some(first)) => (
            "nothing that may hold further MLPs",
            format!("{} '{}': {}", first.op, first.node, first.reason),
        ),
    };
    Err(Error::Layers {
        file: file.relative.clone(),
        expected: expected.to_owned(),
        found,
    })
}

/// Checks that the decoder `file` shows every layer that the configuration tells of, each numbered. Where
/// no configuration tells, there must be nothing in it that may hide one.
///
/// # Errors
/// [`Error::Layers`].
pub fn check_layers(
    bundle: &Bundle,
    file: &OnnxFile,
    index: &Index<'_>,
    mlps: &[Mlp<'_>],
) -> Result<(), Error> {
    let language = || mlps.iter().filter(|mlp| mlp.tower == Tower::Language);
    let numbered: BTreeSet<usize> = language().filter_map(|mlp| mlp.layer).collect();
    let nameless = language().filter(|mlp| mlp.layer.is_none()).count();
    let refused = || survey(index, None).refused;
    let expected = match bundle.layers() {
        Some(layers) if nameless > 0 || !numbered.iter().copied().eq(0..layers) => {
            format!("layers 0..{layers} (num_hidden_layers)")
        }
        None if nameless > 0 || numbered.is_empty() => "MLPs with layer numbers".to_owned(),
        None if !refused().is_empty() => "nothing that may hold further MLPs".to_owned(),
        _ => return Ok(()),
    };
    let mut found = match nameless {
        0 => format!("{} MLPs, of layers {numbered:?}", language().count()),
        n => format!("{n} MLPs without a layer number, and layers {numbered:?}"),
    };
    let refused = refused();
    if let Some(first) = refused.first() {
        let (op, node, reason) = (&first.op, &first.node, &first.reason);
        found += &format!(
            "; {} nodes were refused, the first one {op} '{node}': {reason}",
            refused.len()
        );
    }
    Err(Error::Layers {
        file: file.relative.clone(),
        expected,
        found,
    })
}

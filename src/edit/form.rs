//! The forms in which gates are written into a file.
//!
//! In: an MLP of an opened file. Out: a [`Recipe`]: which stored arrays are multiplied and what of the
//! graph changes, or why the form does not fit. A form is a file that ends in a [`Form`], and a line in
//! [`FORMS`].

use serde::{Deserialize, Serialize};

use super::recipe::Recipe;
use super::rewrite::{Fault, Surgeon};
use super::{columns, multiply, scales};
use crate::graph::{Index, Mlp};
use crate::onnx::ModelFile;

/// How a layer's gates are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum EditForm {
    /// Column `j` of a float `W_down` is multiplied by gate `j`: the paper's own form.
    Columns,
    /// Output channel `j` of `up_proj` is multiplied by gate `j`, by way of its quantization scales where
    /// it is quantized: the same function, because `h_j` is linear in it.
    Scales,
    /// A `Mul` by the gates, an initializer, stands before the down projection.
    Mul,
}

impl std::fmt::Display for EditForm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            EditForm::Columns => "columns",
            EditForm::Scales => "scales",
            EditForm::Mul => "mul",
        })
    }
}

/// Which form is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FormChoice {
    /// For each MLP the first that fits: columns of a float `W_down`, then scales, both without a change
    /// of the graph; then scales with one; then a `Mul`.
    #[default]
    Auto,
    /// This one for every MLP.
    Only(EditForm),
}

impl std::str::FromStr for FormChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<FormChoice, String> {
        match text {
            "auto" => Ok(FormChoice::Auto),
            "columns" => Ok(FormChoice::Only(EditForm::Columns)),
            "scales" => Ok(FormChoice::Only(EditForm::Scales)),
            "mul" => Ok(FormChoice::Only(EditForm::Mul)),
            _ => Err("expected auto, columns, scales or mul".to_owned()),
        }
    }
}

/// What an edit costs whenever the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Cost {
    /// Nothing: the same operators on arrays of the same shapes, or a scalar scale that is now a vector.
    None,
    /// One elementwise multiplication of `d_ff` values per token in this layer.
    ElementwiseMul,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Cost::None => "nothing",
            Cost::ElementwiseMul => "one Mul of d_ff values per token",
        })
    }
}

/// One MLP in the file that it belongs to.
pub(super) struct Subject<'a, 'm> {
    /// The file.
    pub(super) model: &'m ModelFile,
    /// Its graph.
    pub(super) index: &'a Index<'m>,
    /// The way to the parts of the graph in the file's bytes, where there is one.
    pub(super) surgeon: Result<&'a Surgeon<'a, 'm>, &'a Fault>,
    /// The MLP.
    pub(super) mlp: &'a Mlp<'m>,
}

/// A form of edit.
pub(super) struct Form {
    /// Which.
    pub(super) kind: EditForm,
    /// What it would do, or why it does not fit.
    pub(super) recipe: for<'a, 'm> fn(&Subject<'a, 'm>) -> Result<Recipe<'m>, String>,
}

/// Every form, the preferred one first among those that leave the graph as it is.
const FORMS: &[Form] = &[columns::FORM, scales::FORM, multiply::FORM];

/// The order of preference where the graph must change: a vector of scales costs nothing, a `Mul`
/// little, and a copy of a whole matrix much room.
const CHANGING_GRAPH: &[EditForm] = &[EditForm::Scales, EditForm::Mul, EditForm::Columns];

/// The form that was taken, and why others were not.
pub(super) struct Chosen<'m> {
    pub(super) recipe: Recipe<'m>,
    /// Forms that would have been preferred, with the reason.
    pub(super) passed_over: Vec<(EditForm, String)>,
}

/// The form for an MLP, or every form's reason why it does not fit.
pub(super) fn choose<'m>(
    subject: &Subject<'_, 'm>,
    choice: FormChoice,
) -> Result<Chosen<'m>, String> {
    let wanted = |kind| choice == FormChoice::Auto || choice == FormChoice::Only(kind);
    let mut passed_over = Vec::new();
    let mut changing = Vec::new();
    for form in FORMS.iter().filter(|form| wanted(form.kind)) {
        match (form.recipe)(subject) {
            Ok(recipe) if !recipe.changes_graph() => {
                return Ok(Chosen {
                    recipe,
                    passed_over,
                });
            }
            Ok(recipe) => changing.push(recipe),
            Err(reason) => passed_over.push((form.kind, reason)),
        }
    }
    let rank = |recipe: &Recipe<'m>| CHANGING_GRAPH.iter().position(|&kind| kind == recipe.form);
    match changing.into_iter().min_by_key(rank) {
        Some(recipe) => Ok(Chosen {
            recipe,
            passed_over,
        }),
        None => Err(passed_over
            .into_iter()
            .map(|(kind, reason)| format!("{kind}: {reason}"))
            .collect::<Vec<_>>()
            .join("; ")),
    }
}

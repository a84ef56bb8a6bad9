//! The forms in which a gate is written into a file.
//!
//! In: an MLP of an opened file. Out: the stored tensor whose slices are to be multiplied
//! ([`Target`]), or why there is none. A form is a file that ends in a [`Form`], and a line in
//! [`FORMS`].

use serde::{Deserialize, Serialize};

use super::columns;
use crate::graph::{Index, Mlp};
use crate::onnx::schema::TensorProto;
use crate::onnx::{DataType, ModelFile, Storage};

/// How a layer's gates are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum EditForm {
    /// Column `j` of a float `W_down` is multiplied by gate `j`: the paper's own form.
    Columns,
}

/// One MLP in the file that it belongs to.
pub(super) struct Subject<'a, 'm> {
    /// The file.
    pub(super) model: &'m ModelFile,
    /// Its graph.
    pub(super) index: &'a Index<'m>,
    /// The MLP.
    pub(super) mlp: &'a Mlp<'m>,
}

/// A stored matrix whose slices along `axis` are multiplied by the gates.
pub(super) struct Target<'m> {
    /// The tensor.
    pub(super) tensor: &'m TensorProto,
    /// Where its bytes lie.
    pub(super) storage: Storage,
    /// Its element type: float32, float16 or bfloat16.
    pub(super) dtype: DataType,
    /// Stored rows.
    pub(super) rows: u64,
    /// Stored columns.
    pub(super) columns: u64,
    /// The stored axis that runs along the neurons: 0 or 1.
    pub(super) axis: usize,
}

/// A form of edit.
pub(super) struct Form {
    /// Which.
    pub(super) kind: EditForm,
    /// What it would change, or why it does not fit.
    pub(super) target: for<'a, 'm> fn(&Subject<'a, 'm>) -> Result<Target<'m>, String>,
}

/// Every form, the preferred one first.
const FORMS: &[Form] = &[columns::FORM];

/// The first form that fits, or every form's reason why it does not.
pub(super) fn choose<'m>(subject: &Subject<'_, 'm>) -> Result<(EditForm, Target<'m>), String> {
    let mut reasons = Vec::new();
    for form in FORMS {
        match (form.target)(subject) {
            Ok(target) => return Ok((form.kind, target)),
            Err(reason) => reasons.push(reason),
        }
    }
    Err(reasons.join("; "))
}

//! A `Mul` by the gates before the down projection.
//!
//! In: any MLP that was found. Out: an initializer `[d_ff]` and a `Mul` at every place where `h` is read
//! on the way to the down projection: before its quantizer, where it has one, so that what is
//! quantized is `g ⊙ h`. It fits everywhere, and is the only exact form for a quantized MLP that is not
//! gated. Its price is one elementwise multiplication of `d_ff` values per token. The gates are rounded
//! once to the type of `h`.

use super::form::{Cost, EditForm, Form, Subject};
use super::recipe::{Reader, Recipe, Rewrite};
use crate::graph::hidden_type;
use crate::onnx::DataType;

pub(super) const FORM: Form = Form {
    kind: EditForm::Mul,
    recipe,
};

/// The first opset whose `Mul` broadcasts by itself; the first one that takes bfloat16.
const BROADCASTS: i64 = 7;
const BFLOAT16: i64 = 13;
/// The first IR version in which an initializer need not be a graph input as well.
const FREE_INITIALIZERS: i64 = 4;

fn recipe<'m>(subject: &Subject<'_, 'm>) -> Result<Recipe<'m>, String> {
    let surgeon = subject.surgeon.map_err(ToString::to_string)?;
    let (opset, ir) = (subject.model.opset(), subject.model.proto().ir_version());
    if ir < FREE_INITIALIZERS {
        return Err(format!(
            "IR version {ir} wants initializers to be graph inputs"
        ));
    }
    let mut readers = Vec::new();
    let mut dtype = None;
    for site in &subject.mlp.sites {
        let hidden = &site.hidden;
        surgeon
            .node(hidden.reader)
            .map_err(|fault| fault.to_string())?;
        let found = hidden_type(subject.index, site);
        let found = found.ok_or_else(|| format!("the type of '{}' is not known", hidden.name))?;
        if dtype.is_some_and(|dtype| dtype != found) {
            return Err(format!(
                "'{}' is of another type in another branch",
                hidden.name
            ));
        }
        dtype = Some(found);
        readers.push(Reader {
            node: hidden.reader,
            position: hidden.position,
            hidden: hidden.name,
        });
    }
    let dtype = dtype.ok_or("it is used nowhere")?;
    let needed = if dtype == DataType::BFLOAT16 {
        BFLOAT16
    } else {
        BROADCASTS
    };
    if !dtype.is_scalable_float() || opset < needed {
        return Err(format!(
            "Mul of opset {opset} does not multiply {dtype} by a vector"
        ));
    }
    Ok(Recipe {
        form: EditForm::Mul,
        in_place: Vec::new(),
        rewrites: vec![Rewrite::Gate {
            readers,
            dtype,
            d_ff: usize::try_from(subject.mlp.d_ff).map_err(|e| e.to_string())?,
            // A 1×1 convolution has its channels before height and width.
            trailing_axes: if subject.mlp.down().op == "Conv" {
                2
            } else {
                0
            },
        }],
        cost: Cost::ElementwiseMul,
    })
}

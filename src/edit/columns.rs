//! The paper's own form: columns of `W_down`, multiplied where they are stored.
//!
//! In: an MLP. Out: its `W_down`, if that is a float matrix. `Transpose`, `Identity` and `Cast` between
//! the stored matrix and its use do not matter: what is stored is multiplied, and rounded once in the
//! stored type. Where something else reads the matrix too, the MLP gets a copy of its own.

use super::form::{Cost, EditForm, Form, Subject};
use super::recipe::{Array, Recipe, settle};
use crate::graph::{Encoding, Linear, Slices};

pub(super) const FORM: Form = Form {
    kind: EditForm::Columns,
    recipe,
};

fn recipe<'m>(subject: &Subject<'_, 'm>) -> Result<Recipe<'m>, String> {
    let sites = subject.mlp.sites.iter();
    let arrays = sites
        .map(|site| matrix(subject, &site.down))
        .collect::<Result<Vec<_>, String>>()?;
    let (in_place, rewrites) = settle(subject, arrays)?;
    Ok(Recipe {
        form: EditForm::Columns,
        in_place,
        rewrites,
        cost: Cost::None,
    })
}

/// The stored matrix of a float `W_down`.
fn matrix<'m>(subject: &Subject<'_, 'm>, down: &Linear<'m>) -> Result<Array<'m>, String> {
    let weight = &down.weight;
    match &weight.encoding {
        Encoding::Float => {}
        Encoding::Opaque(reason) => return Err(reason.clone()),
        _ => {
            return Err(
                "its codes are quantized along d_ff, and quantizing again would lose accuracy"
                    .to_owned(),
            );
        }
    }
    let (rows, columns, axis) = match weight.input_axis {
        Some(0) => (down.k, down.n, 0),
        Some(_) => (down.n, down.k, 1),
        None => return Err("which axis of the stored weight is d_ff is not known".to_owned()),
    };
    let slices = Slices {
        stored: weight.stored(),
        rows,
        columns,
        axis,
    };
    Array::of(subject.model, &slices, &(0..down.k))
}

//! Column norms of down projections, for rules that keep a matrix's Frobenius norm.

use ndarray::Array1;

use super::form::Subject;
use super::read::Matrix;
use super::{Error, columns};
use crate::graph::{Index, Mlp};
use crate::onnx::ModelFile;

/// The Euclidean norm of each knowledge vector of `mlp`, float64 `[d_ff]`; `None` where its weight is
/// not a plain float matrix with bytes of its own.
///
/// # Errors
/// The weight cannot be read.
pub fn column_norms(model: &ModelFile, mlp: &Mlp<'_>) -> Result<Option<Array1<f64>>, Error> {
    let index = Index::new(model.graph());
    let subject = Subject {
        model,
        index: &index,
        mlp,
    };
    let Some(matrix) = columns::matrix(&subject)
        .ok()
        .map(|target| Matrix::open(model, &target))
        .transpose()?
        .flatten()
    else {
        return Ok(None);
    };
    let mut squares = Array1::<f64>::zeros(matrix.neurons());
    for row in 0..matrix.rows {
        matrix.for_each_in_row(row, |column, value| {
            let neuron = if matrix.axis == 0 { row } else { column };
            if let Some(sum) = squares.get_mut(neuron) {
                *sum += f64::from(value) * f64::from(value);
            }
        })?;
    }
    Ok(Some(squares.mapv(f64::sqrt)))
}

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
    let columns = matrix.columns.max(1);
    matrix.for_each_block(|start, block| {
        block.widened(matrix.dtype, |index, value| {
            let element = start.saturating_add(index);
            let neuron = if matrix.axis == 0 {
                element / columns
            } else {
                element % columns
            };
            if let Some(sum) = squares.get_mut(neuron) {
                *sum += f64::from(value) * f64::from(value);
            }
        });
    })?;
    Ok(Some(squares.mapv(f64::sqrt)))
}

#[cfg(test)]
mod tests {
    use super::column_norms;
    use crate::graph::{Index, mlp};
    use crate::onnx::{Limits, ModelFile};

    #[test]
    fn norms_are_those_of_the_knowledge_vectors() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/fixtures/demo/model/onnx/decoder_model_merged.onnx"
        );
        let model = ModelFile::open(path.as_ref(), &Limits::default()).unwrap();
        let index = Index::new(model.graph());
        let mlps = mlp::find(&index, None);
        let down = mlps[0].down();
        assert_eq!(down.weight.input_axis, Some(0), "stored [d_ff, d_model]");
        let bytes = model.bytes(down.weight.tensor).unwrap();
        let weights: Vec<f32> = bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect();
        let norms = column_norms(&model, &mlps[0]).unwrap().unwrap();
        assert_eq!(norms.len(), 512);
        for (row, norm) in weights.chunks_exact(128).zip(&norms) {
            let square: f64 = row.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
            assert!((square.sqrt() - norm).abs() < 1e-12);
        }
    }
}

//! Column norms of down projections, for rules that keep a matrix's Frobenius norm.

use ndarray::Array1;

use super::Error;
use super::weights::Weights;
use crate::graph::Mlp;
use crate::onnx::ModelFile;

/// The Euclidean norm of each knowledge vector of `mlp`, float64 `[d_ff]`; `None` where its encoding is
/// not understood.
///
/// # Errors
/// The weight cannot be read.
pub fn column_norms(model: &ModelFile, mlp: &Mlp<'_>) -> Result<Option<Array1<f64>>, Error> {
    let Ok(weights) = Weights::open(model, mlp.down())? else {
        return Ok(None);
    };
    let mut squares = Array1::<f64>::zeros(weights.neurons());
    for row in 0..weights.rows {
        let mut column = 0;
        weights.for_each_in_row(row, 0..weights.columns, |value| {
            let neuron = if weights.axis == 0 { row } else { column };
            column += 1;
            if let Some(sum) = squares.get_mut(neuron) {
                *sum += f64::from(value) * f64::from(value);
            }
        })?;
    }
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

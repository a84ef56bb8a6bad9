//! What the method needs of a model.

use std::collections::BTreeMap;

use crate::graph::LayerId;
use ndarray::Array1;

/// Cumulative gates by layer, float64 `[d_ff]`. A layer that is absent is not weakened.
pub type Gates = BTreeMap<LayerId, Array1<f64>>;

/// The moments of the hidden activations of one batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sums {
    /// Per layer: the weighted sum over the batch's answer tokens, float32 `[d_ff]`.
    pub layers: BTreeMap<LayerId, Array1<f32>>,
    /// Sum of the token weights: for the method, the number of answer tokens.
    pub weight: f64,
    /// Of layers that are not summed over the answer's tokens: the sum of the weights of their own
    /// positions. 0 where the batch has none.
    pub own_weights: BTreeMap<LayerId, f64>,
}

/// A model that can be asked for the moments of its hidden activations under given gates.
///
/// Implemented by a session of a runtime, and in tests by closed-form models. Generic, so that the
/// method knows neither.
pub trait Forward {
    /// A prepared sample.
    type Sample;

    /// The layers that can be read and gated, ascending, each with its `d_ff`.
    fn layers(&self) -> Vec<(LayerId, usize)>;

    /// A name for messages.
    fn sample_name(&self, sample: &Self::Sample) -> String;

    /// The moments over the answer tokens of `batch`, on the model with its down projections' inputs
    /// multiplied by `gates`. The moments are those of the hidden activation *before* its own gate.
    ///
    /// # Errors
    /// Whatever keeps the model from running, with the samples' names.
    fn sums(
        &mut self,
        batch: &[&Self::Sample],
        gates: &Gates,
    ) -> Result<Sums, Box<dyn std::error::Error + Send + Sync>>;
}

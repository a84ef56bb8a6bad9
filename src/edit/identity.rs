//! Which model a file holds, whatever its precision.
//!
//! In: the down projections of a decoder. Out: a [`ModelIdentity`]: for every layer the sha256 of
//! the exact `W_down` bytes, and a *sketch* that survives a change of dtype and quantization.
//!
//! The sketch: for up to 256 evenly spaced neurons `j`, `s_j = Σ_i r_i · W_down[i, j]`, with signs
//! `r_i = ±1` from SplitMix64(i), summed in float64. A random projection keeps relative distances:
//! rounding that is off by a part `ε` of a weight's spread lowers the correlation of two sketches
//! to `1 / √(1 + ε²)`, about 0.996 for 4 bits in blocks of 32 and above 0.999 for 8 and 16 bits;
//! another model's, or the same neurons in another order, correlate like noise (about ± 0.06 for 256).
//! The threshold, 0.98, lies far from both; measured numbers stand in docs/edits.md.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::weights::Weights;
use super::{Error, inspect};
use crate::bundle::{Bundle, OnnxFile};
use crate::files::{Sha256, Sha256Hasher};
use crate::graph::{Index, LayerId, Mlp, Tower};
use crate::onnx::{DataType, Limits, ModelFile};

/// The least correlation of two sketches of one matrix.
pub const SKETCH_THRESHOLD: f64 = 0.98;

/// The same where a file stores 2 bits of each weight: normally distributed weights in blocks of 64
/// come to 0.93.
pub const SKETCH_THRESHOLD_2_BITS: f64 = 0.85;

/// Neurons in a sketch, at most.
const SKETCH_NEURONS: usize = 256;

/// Which model a plan is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelIdentity {
    /// Every decoder layer, in order.
    pub layers: Vec<LayerIdentity>,
}

/// One layer's `W_down`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerIdentity {
    /// Decoder layer.
    pub layer: LayerId,
    /// Number of knowledge vectors.
    pub d_ff: u64,
    /// Width of the residual stream.
    pub d_model: u64,
    /// Element type as stored.
    pub dtype: DataType,
    /// The stored axis along the knowledge vectors, for a float matrix: the same matrix has other bytes
    /// the other way round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub axis: Option<usize>,
    /// Digest of the stored bytes; of the codes alone, where they are quantized.
    pub sha256: Sha256,
    /// The sketch, `[min(d_ff, 256)]`; empty where the encoding is not understood.
    pub sketch: Vec<f32>,
}

/// How well a file fits a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Match {
    /// The very same bytes in every layer.
    Exact,
    /// Another precision of the same weights.
    Sketch,
}

/// The first place where a file differs from the model of a plan.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// Another set of layers.
    #[error("expected layers {}, found {}", listed(expected), listed(found))]
    Layers {
        /// The plan's.
        expected: Vec<LayerId>,
        /// The file's.
        found: Vec<LayerId>,
    },
    /// Another shape.
    #[error("layer {layer}: expected d_ff × d_model {}×{}, found {}×{}", expected.0, expected.1, found.0, found.1)]
    Shape {
        /// Decoder layer.
        layer: LayerId,
        /// The plan's `(d_ff, d_model)`.
        expected: (u64, u64),
        /// The file's.
        found: (u64, u64),
    },
    /// The same precision, other bytes.
    #[error("layer {layer}: expected W_down with sha256 {expected}, found {found}")]
    Bytes {
        /// Decoder layer.
        layer: LayerId,
        /// The plan's digest.
        expected: Sha256,
        /// The file's.
        found: Sha256,
    },
    /// Weights that cannot be decoded, and so not be compared.
    #[error("layer {layer}: W_down cannot be compared with the plan's: {reason}")]
    Opaque {
        /// Decoder layer.
        layer: LayerId,
        /// Why not.
        reason: String,
    },
    /// Another precision, and weights that are not the same before rounding.
    #[error(
        "layer {layer}: expected weights that correlate with the plan's by {expected} or more, found {found:.3}"
    )]
    Sketch {
        /// Decoder layer.
        layer: LayerId,
        /// The least correlation.
        expected: f64,
        /// The correlation.
        found: f64,
    },
}

/// The identity of what one file holds: of those of `mlps`, its MLPs, that have a number.
///
/// # Errors
/// A weight cannot be read.
pub fn identity(model: &ModelFile, mlps: &[Mlp<'_>]) -> Result<ModelIdentity, Error> {
    use rayon::prelude::*;
    let mut first: BTreeMap<LayerId, &Mlp<'_>> = BTreeMap::new();
    for mlp in mlps {
        if let Some(layer) = mlp.id() {
            first.entry(layer).or_insert(mlp);
        }
    }
    let layers = first
        .into_par_iter()
        .map(|(layer, mlp)| layer_identity(model, mlp, layer))
        .collect::<Result<Vec<_>, Error>>()?;
    Ok(ModelIdentity { layers })
}

/// The identity of the language model's layers in `file` of `bundle`.
///
/// # Errors
/// The file cannot be read.
pub fn identity_of(bundle: &Bundle, file: &OnnxFile) -> Result<ModelIdentity, Error> {
    let model = ModelFile::open(&file.path, &Limits::default())?;
    let index = Index::new(model.graph());
    let mut mlps = inspect::mlps(bundle, file, &index);
    mlps.retain(|mlp| mlp.tower == Tower::Language);
    identity(&model, &mlps)
}

/// Compares the model of a plan with the model in a file. Where only one of them is about the vision
/// encoder too, the language model is compared.
///
/// # Errors
/// The first [`Mismatch`]: no tower in common; other layers or shapes; the same dtype with other bytes;
/// another dtype with weights that are not the same.
pub fn check(plan: &ModelIdentity, file: &ModelIdentity) -> Result<Match, Mismatch> {
    let (shared, found) = (plan.shared_with(file), file.shared_with(plan));
    if shared.layers.is_empty() {
        check_shapes(plan, file)?;
    }
    check_shapes(&shared, &found)?;
    let (plan, file) = (&shared, &found);
    let mut matched = Match::Exact;
    for (expected, found) in plan.layers.iter().zip(&file.layers) {
        let float = expected.dtype.is_scalable_float();
        if expected.sha256 == found.sha256 && float {
            continue;
        }
        if same_storage(expected, found.dtype, found.axis) {
            return Err(Mismatch::Bytes {
                layer: expected.layer,
                expected: expected.sha256,
                found: found.sha256,
            });
        }
        check_sketch(expected, &found.sketch, SKETCH_THRESHOLD)?;
        if expected.sha256 != found.sha256 {
            matched = Match::Sketch;
        }
    }
    Ok(matched)
}

/// Whether the weights of a plan's layer, were they in a file that stores them so, would have the very
/// same bytes there. Two programs may quantize the same weights to other codes.
fn same_storage(plan: &LayerIdentity, dtype: DataType, axis: Option<usize>) -> bool {
    dtype.is_scalable_float()
        && plan.dtype == dtype
        && (plan.axis == axis || plan.axis.is_none() || axis.is_none())
}

/// Layers by name.
pub(super) fn listed(layers: &[LayerId]) -> String {
    let layers: Vec<String> = layers.iter().map(LayerId::to_string).collect();
    format!("[{}]", layers.join(", "))
}

impl ModelIdentity {
    /// The layers of a tower.
    pub fn of_tower(&self, tower: Tower) -> impl Iterator<Item = &LayerIdentity> {
        let layers = self.layers.iter();
        layers.filter(move |layer| layer.layer.tower() == tower)
    }

    /// What the identities of two files of one model are together.
    #[must_use]
    pub fn and(mut self, other: ModelIdentity) -> ModelIdentity {
        self.layers.extend(other.layers);
        self
    }

    /// The part that is about towers that `other` is about too.
    fn shared_with(&self, other: &ModelIdentity) -> ModelIdentity {
        let shared = |layer: &&LayerIdentity| other.of_tower(layer.layer.tower()).next().is_some();
        ModelIdentity {
            layers: self.layers.iter().filter(shared).cloned().collect(),
        }
    }
}

/// Layers and shapes only.
fn check_shapes(plan: &ModelIdentity, file: &ModelIdentity) -> Result<(), Mismatch> {
    let numbers = |identity: &ModelIdentity| identity.layers.iter().map(|l| l.layer).collect();
    let (expected, found): (Vec<LayerId>, Vec<LayerId>) = (numbers(plan), numbers(file));
    if expected != found {
        return Err(Mismatch::Layers { expected, found });
    }
    plan.layers
        .iter()
        .zip(&file.layers)
        .try_for_each(|(plan, file)| check_shape(plan, file.d_ff, file.d_model))
}

pub(super) fn check_shape(plan: &LayerIdentity, d_ff: u64, d_model: u64) -> Result<(), Mismatch> {
    match (plan.d_ff, plan.d_model) == (d_ff, d_model) {
        true => Ok(()),
        false => Err(Mismatch::Shape {
            layer: plan.layer,
            expected: (plan.d_ff, plan.d_model),
            found: (d_ff, d_model),
        }),
    }
}

fn check_sketch(plan: &LayerIdentity, sketch: &[f32], expected: f64) -> Result<(), Mismatch> {
    let found = correlation(&plan.sketch, sketch);
    match found >= expected {
        true => Ok(()),
        false => Err(Mismatch::Sketch {
            layer: plan.layer,
            expected,
            found,
        }),
    }
}

/// Compares the `W_down` of `mlp`, an MLP of `model`, with a plan's layer. Gives the digest that its
/// bytes must have where the plan was made for this very storage: whoever reads them checks it.
///
/// # Errors
/// Outside: the weight cannot be read. Inside: it is another one.
pub(super) fn check_layer(
    model: &ModelFile,
    mlp: &Mlp<'_>,
    plan: &LayerIdentity,
) -> Result<Result<Option<Sha256>, Mismatch>, Error> {
    let weights = match Weights::open(model, mlp.down())? {
        Ok(weights) => weights,
        Err(reason) => {
            let layer = plan.layer;
            return Ok(Err(Mismatch::Opaque { layer, reason }));
        }
    };
    let dtype = model.data_type(mlp.down().weight.tensor)?;
    let sketch = sketch(&weights)?;
    let axis = weights.is_float().then_some(weights.axis);
    let same = weights.is_float() && same_storage(plan, dtype, axis);
    let threshold = match weights.bits() {
        0..=2 => SKETCH_THRESHOLD_2_BITS,
        _ => SKETCH_THRESHOLD,
    };
    Ok(check_sketch(plan, &sketch, threshold).map(|()| same.then_some(plan.sha256)))
}

fn layer_identity(
    model: &ModelFile,
    mlp: &Mlp<'_>,
    layer: LayerId,
) -> Result<LayerIdentity, Error> {
    let tensor = mlp.down().weight.tensor;
    let weights = Weights::open(model, mlp.down())?.ok();
    let (axis, sha256, sketch) = match &weights {
        Some(weights) => {
            let mut hasher = Sha256Hasher::default();
            weights.for_each_block(|bytes| hasher.update(bytes))?;
            let axis = weights.is_float().then_some(weights.axis);
            (axis, hasher.finish(), sketch(weights)?)
        }
        None => (None, Sha256::of_bytes(&model.bytes(tensor)?), Vec::new()),
    };
    Ok(LayerIdentity {
        layer,
        d_ff: mlp.d_ff,
        d_model: mlp.d_model,
        dtype: model.data_type(tensor)?,
        axis,
        sha256,
        sketch,
    })
}

/// The sketch of a stored matrix. The sum runs over the residual stream in order, whichever way the
/// matrix lies, so that both ways give the same numbers.
fn sketch(weights: &Weights) -> Result<Vec<f32>, Error> {
    let neurons = sampled(weights.neurons());
    let mut sums = vec![0f64; neurons.len()];
    if weights.axis == 0 {
        for (sum, &neuron) in sums.iter_mut().zip(&neurons) {
            let mut signs = (0..).map(sign);
            weights.for_each_in_row(neuron, 0..weights.columns, |value| {
                *sum += signs.next().unwrap_or(1.0) * f64::from(value);
            })?;
        }
    } else {
        for row in 0..weights.rows {
            let sign = sign(row);
            let mut sums = sums.iter_mut();
            weights.for_each_in_row(row, neurons.iter().copied(), |value| {
                if let Some(sum) = sums.next() {
                    *sum += sign * f64::from(value);
                }
            })?;
        }
    }
    #[allow(clippy::cast_possible_truncation)] // A sketch is compared by correlation.
    Ok(sums.into_iter().map(|sum| sum as f32).collect())
}

/// Evenly spaced neurons of `count`, ascending.
fn sampled(count: usize) -> Vec<usize> {
    let samples = count.min(SKETCH_NEURONS);
    (0..samples)
        .map(|sample| sample.saturating_mul(count) / samples)
        .collect()
}

/// `r_i`: the top bit of SplitMix64 (Steele, Lea, Flood 2014) at state `i`.
fn sign(i: usize) -> f64 {
    let mut z = (i as u64)
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    match (z ^ (z >> 31)) >> 63 {
        0 => 1.0,
        _ => -1.0,
    }
}

/// Pearson's correlation; 1 for equal sketches without spread, 0 for what cannot be compared.
fn correlation(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() || a.is_empty() {
        return 0.0;
    }
    if a == b {
        return 1.0;
    }
    #[allow(clippy::cast_precision_loss)] // At most 256.
    let count = a.len() as f64;
    let mean = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let (mean_a, mean_b) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a) - mean_a, f64::from(b) - mean_b);
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    let found = ab / (aa * bb).sqrt();
    match found.is_finite() {
        true => found,
        false => 0.0,
    }
}

/// The identity of the model that `provenance` (of the file `path`) was made for.
///
/// # Errors
/// [`Error::NoIdentity`].
pub fn identity_in(path: &Path, provenance: &serde_json::Value) -> Result<ModelIdentity, Error> {
    let model = provenance.get("model").cloned().unwrap_or_default();
    serde_json::from_value(model).map_err(|source| Error::NoIdentity {
        path: path.to_owned(),
        source,
    })
}

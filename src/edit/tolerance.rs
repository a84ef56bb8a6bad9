//! How far the logits of an edited model may lie from those of the gated one.
//!
//! In: the MLPs of a decoder. Out: a bound, relative to the largest logit. The edit is exact but for the
//! rounding of what is stored, so the bound follows the type of that: float32 1e-5 (2⁻²⁴ of a weight, and
//! sums of thousands of terms in another order), float16 2e-3 (2⁻¹¹), bfloat16 8e-3 (2⁻⁸).
//!
//! Where the runtime quantizes *activations* to 8 bits, the last bit of an activation may flip the rounding
//! of another one: a step of 1/127 of a block's largest. That is noise of the model itself, and any
//! rounding shows it: gates that differ in their last bit move the logits of such models by up to 9e-3
//! (docs/edits.md, *last bit*). There the bound is 2e-2; what the gates do must still be ten times more.

use crate::graph::{Encoding, Index, Linear, Mlp};
use crate::onnx::{DataType, ModelFile, attribute};

/// The bound for a model whose MLPs are `mlps`: the largest of theirs.
pub fn tolerance(model: &ModelFile, mlps: &[&Mlp<'_>]) -> f64 {
    let index = Index::new(model.graph());
    mlps.iter()
        .map(|mlp| of(&index, mlp.down()))
        .fold(0.0, f64::max)
}

/// `accuracy_level` of `MatMulNBits` that multiplies in 8-bit integers (ContribOperators.md).
const INT8: i64 = 4;

fn of(index: &Index<'_>, down: &Linear<'_>) -> f64 {
    let weight = &down.weight;
    let (stored, activations_rounded) = match &weight.encoding {
        Encoding::NBits(nbits) => {
            let node = index.node(down.id);
            let level = node.and_then(|node| attribute(node, "accuracy_level"));
            (
                nbits.scales.tensor,
                level.is_some_and(|level| level.i() == INT8),
            )
        }
        Encoding::Bnb4(bnb4) => (bnb4.absmax.tensor, false),
        // ONNX Runtime makes a `MatMulNBits` of that accuracy level of a 4-bit weight, and integer
        // products of an 8-bit one between quantizers.
        Encoding::Dequantized(dequantizer) => (dequantizer.scale.tensor, true),
        Encoding::Integer(integer) => (integer.scale.tensor, true),
        Encoding::QLinear(linear) => (linear.scale.tensor, true),
        _ => (weight.tensor, false),
    };
    let rounding = match DataType::from_code(stored.data_type()) {
        Some(DataType::FLOAT16) => 2e-3,
        Some(DataType::BFLOAT16) => 8e-3,
        _ => 1e-5,
    };
    match activations_rounded {
        true => f64::max(rounding, 2e-2),
        false => rounding,
    }
}

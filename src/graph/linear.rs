//! Linear layers: a matrix product of an activation with a constant weight, whatever the operator.
//!
//! ```text
//!        x            W (initializer)
//!        │            │  Transpose | Cast | Identity | DequantizeLinear | Reshape, any number
//!        └──► MatMul ◄┘
//!               │
//!               y = x · W
//! ```
//!
//! In: a node. Out: a [`Linear`] with its weight's name, the sizes K (in) and N (out), and which
//! axis of the stored tensor is K. Anchor: the weight resolves to an initializer. A product of two
//! activations (attention scores) is no linear layer.

use super::index::{Index, MAX_CHAIN, NodeId, Origin, ScopeId};
use crate::onnx::attribute;
use crate::onnx::schema::{NodeProto, TensorProto};

/// The constant matrix of a linear layer, as it is stored.
#[derive(Clone, Debug)]
pub struct Weight<'m> {
    /// The initializer.
    pub tensor: &'m TensorProto,
    /// The graph that holds it.
    pub scope: ScopeId,
    /// For a float matrix, the axis of the stored tensor that runs along K, the layer's input
    /// channels; `None` where the storage is quantized or not a plain matrix.
    pub input_axis: Option<usize>,
    /// The operators between the initializer and the product that change its values' encoding.
    pub via: Vec<&'m str>,
}

/// A linear layer.
#[derive(Clone, Debug)]
pub struct Linear<'m> {
    /// The node.
    pub id: NodeId,
    /// The operator, for example `MatMul` or `MatMulNBits`.
    pub op: &'m str,
    /// The activation that it multiplies.
    pub input: &'m str,
    /// Position of that activation among the node's inputs.
    pub input_position: usize,
    /// The matrix.
    pub weight: Weight<'m>,
    /// Input channels.
    pub k: u64,
    /// Output channels.
    pub n: u64,
    /// Whether the node applies an activation function to its product (`FusedGemm`).
    pub fused_activation: bool,
}

/// Operators that multiply an activation with a weight, with the positions of both inputs.
const OPERATORS: &[(&str, usize, usize)] = &[
    ("MatMul", 0, 1),
    ("Gemm", 0, 1),
    ("FusedMatMul", 0, 1),
    ("FusedGemm", 0, 1),
    ("MatMulNBits", 0, 1),
    ("MatMulBnb4", 0, 1),
    ("MatMulInteger", 0, 1),
    ("DynamicQuantizeMatMul", 0, 1),
    ("MatMulIntegerToFloat", 0, 1),
    ("QLinearMatMul", 0, 3),
];

impl<'m> Linear<'m> {
    /// The linear layer that `node` is, if it is one.
    pub fn at(index: &Index<'m>, id: NodeId, node: &'m NodeProto) -> Option<Linear<'m>> {
        let op = node.op_type();
        let &(op, input_position, weight_position) =
            OPERATORS.iter().find(|(name, ..)| *name == op)?;
        let input = node.input.get(input_position)?.as_str();
        let weight_name = node.input.get(weight_position)?;
        let integer = |name| attribute(node, name).map_or(0, |attribute| attribute.i());
        if integer("transA") != 0 || index.is_constant(id.scope, input) {
            return None;
        }
        let (mut weight, mut dims) = resolve(index, id.scope, weight_name)?;
        let (k, n) = match op {
            // Their weight is an opaque block layout; the sizes stand in attributes.
            "MatMulNBits" | "MatMulBnb4" => {
                weight.input_axis = None;
                let size = |name| u64::try_from(integer(name)).ok().filter(|&size| size > 0);
                (size("K")?, size("N")?)
            }
            _ => {
                if integer("transB") != 0 {
                    dims.swap();
                }
                if op != "MatMul" && op != "Gemm" && op != "FusedMatMul" && op != "FusedGemm" {
                    dims.input_axis = None;
                }
                weight.input_axis = dims.input_axis;
                (dims.k, dims.n)
            }
        };
        Some(Linear {
            id,
            op,
            input,
            input_position,
            weight,
            k,
            n,
            fused_activation: op == "FusedGemm" && attribute(node, "activation").is_some(),
        })
    }
}

/// A matrix `[k, n]` and the axis of the stored tensor that `k` runs along.
struct Dims {
    k: u64,
    n: u64,
    input_axis: Option<usize>,
}

impl Dims {
    fn swap(&mut self) {
        std::mem::swap(&mut self.k, &mut self.n);
        self.input_axis = self.input_axis.map(|axis| 1 - axis);
    }
}

/// Follows `name` up to an initializer, through operators that keep it a weight.
fn resolve<'m>(index: &Index<'m>, scope: ScopeId, name: &'m str) -> Option<(Weight<'m>, Dims)> {
    let (mut scope, mut name) = (scope, name);
    let mut transposed = false;
    let mut plain = true;
    let mut via = Vec::new();
    for _ in 0..MAX_CHAIN {
        match index.origin(scope, name) {
            Origin::Initializer { scope, tensor } => {
                // `MatMulNBits` holds [N, blocks, bytes]: its sizes come from attributes.
                let (rows, columns) = match tensor.dims.as_slice() {
                    [rows, columns] => (u64::try_from(*rows).ok()?, u64::try_from(*columns).ok()?),
                    _ => {
                        plain = false;
                        (0, 0)
                    }
                };
                let mut dims = Dims {
                    k: rows,
                    n: columns,
                    input_axis: plain.then_some(0),
                };
                if transposed {
                    dims.swap();
                }
                let weight = Weight {
                    tensor,
                    scope,
                    input_axis: dims.input_axis,
                    via,
                };
                return Some((weight, dims));
            }
            Origin::Node { id, .. } => {
                let node = index.node(id)?;
                match node.op_type() {
                    "Identity" => {}
                    "Transpose" => {
                        let permutation = attribute(node, "perm").map(|perm| perm.ints.as_slice());
                        match permutation {
                            None | Some([1, 0]) => transposed = !transposed,
                            Some([0, 1]) => {}
                            _ => return None,
                        }
                    }
                    op @ "Cast" => via.push(op),
                    op @ ("DequantizeLinear" | "Reshape") => {
                        plain = false;
                        via.push(op);
                    }
                    _ => return None,
                }
                (scope, name) = (id.scope, node.input.first()?.as_str());
            }
            Origin::GraphInput | Origin::Unknown => return None,
        }
    }
    None
}

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
//! In: a node. Out: a [`Linear`] with its weight, how that is stored ([`Encoding`]), and the sizes K
//! (in) and N (out). Anchor: the weight resolves to an initializer. A product of two activations
//! (attention scores) is no linear layer.

use std::collections::HashMap;

use super::encoding::{
    Bnb4, Bnb4Type, Dequantizer, Encoding, IntegerScale, NBits, NoSlices, QLinear, Slices, Stored,
    inexact,
};
use super::index::{Index, MAX_CHAIN, NodeId, Origin, ScopeId};
use crate::onnx::schema::{NodeProto, TensorProto};
use crate::onnx::{DataType, attribute};

/// The constant matrix of a linear layer, as it is stored.
#[derive(Clone, Debug)]
pub struct Weight<'m> {
    /// The initializer, or the value of a `Constant` node.
    pub tensor: &'m TensorProto,
    /// The name by which nodes read it.
    pub name: &'m str,
    /// The graph that holds it.
    pub scope: ScopeId,
    /// The node that reads the constant itself: the product, or the first operator of `via`.
    pub reader: NodeId,
    /// Position among that node's inputs.
    pub position: usize,
    /// How many times it is read in all graphs, see [`Index::uses`].
    pub uses: usize,
    /// The axis of the stored tensor that runs along K, the layer's input channels, where it holds
    /// one element per weight; `None` for packed blocks and what is not understood.
    pub input_axis: Option<usize>,
    /// The operators between the initializer and the product that change its values' encoding.
    pub via: Vec<&'m str>,
    /// How the matrix is stored.
    pub encoding: Encoding<'m>,
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
    /// The bias that the node itself adds, if that is a constant.
    pub bias: Option<Stored<'m>>,
    /// Input channels.
    pub k: u64,
    /// Output channels.
    pub n: u64,
    /// Whether the node applies an activation function to its product (`FusedGemm`).
    pub fused_activation: bool,
    /// The node whose output is the finished product: the node itself, or for `MatMulInteger` the
    /// last `Mul` by a scale.
    pub last: NodeId,
    /// That output.
    pub output: &'m str,
}

/// The linear layers of a model.
pub struct Linears<'m> {
    by_last: HashMap<NodeId, Linear<'m>>,
}

impl<'m> Linears<'m> {
    /// All of them.
    pub fn of(index: &Index<'m>) -> Linears<'m> {
        let linears = index
            .nodes()
            .filter_map(|(id, node)| Linear::at(index, id, node));
        Linears {
            by_last: linears.map(|linear| (linear.last, linear)).collect(),
        }
    }

    /// The layer whose product the node `id` finishes, see [`Linear::last`].
    pub fn ending_at(&self, id: NodeId) -> Option<&Linear<'m>> {
        self.by_last.get(&id)
    }
}

/// An operator that multiplies an activation with a weight: the positions of its inputs.
struct Operator {
    name: &'static str,
    input: usize,
    weight: usize,
    bias: Option<usize>,
}

const fn operator(name: &'static str, weight: usize, bias: Option<usize>) -> Operator {
    Operator {
        name,
        input: 0,
        weight,
        bias,
    }
}

/// From the operator schemas of `ai.onnx` and `com.microsoft` (ONNX Runtime's ContribOperators.md).
const OPERATORS: &[Operator] = &[
    operator("MatMul", 1, None),
    operator("Gemm", 1, Some(2)),
    operator("Conv", 1, Some(2)),
    operator("FusedMatMul", 1, None),
    operator("FusedGemm", 1, Some(2)),
    operator("GemmFastGelu", 1, Some(2)),
    operator("MatMulNBits", 1, Some(5)),
    operator("MatMulBnb4", 1, None),
    operator("MatMulInteger", 1, None),
    operator("DynamicQuantizeMatMul", 1, Some(4)),
    operator("MatMulIntegerToFloat", 1, Some(6)),
    operator("QLinearMatMul", 3, None),
];

impl<'m> Linear<'m> {
    /// Whether `op` is an operator that can be a linear layer.
    pub(super) fn is_product(op: &str) -> bool {
        OPERATORS.iter().any(|operator| operator.name == op)
    }

    /// The linear layer that `node` is, if it is one.
    pub fn at(index: &Index<'m>, id: NodeId, node: &'m NodeProto) -> Option<Linear<'m>> {
        let operator = OPERATORS.iter().find(|op| op.name == node.op_type())?;
        let op = operator.name;
        let input = node.input.get(operator.input)?.as_str();
        if integer(node, "transA") != 0
            || index.is_constant(id.scope, input)
            || (op == "Conv" && !is_pointwise(node))
        {
            return None;
        }
        let resolved = resolve(index, id, operator.weight)?;
        let mut input_axis = resolved.input_axis;
        let (k, n) = match op {
            // Their weight is an opaque block layout; the sizes stand in attributes.
            "MatMulNBits" | "MatMulBnb4" => {
                input_axis = None;
                (size(node, "K")?, size(node, "N")?)
            }
            "Conv" => {
                let (&[n, k], kernel) = resolved.tensor.dims.split_first_chunk()?;
                if kernel.iter().any(|&size| size != 1) {
                    return None;
                }
                input_axis = Some(1);
                (k.try_into().ok()?, n.try_into().ok()?)
            }
            _ if integer(node, "transB") != 0 => {
                input_axis = input_axis.map(|axis| 1 - axis);
                (resolved.n, resolved.k)
            }
            _ => (resolved.k, resolved.n),
        };
        let mut linear = Linear {
            id,
            op,
            input,
            input_position: operator.input,
            bias: operator.bias.and_then(|bias| Stored::read(index, id, bias)),
            k,
            n,
            fused_activation: op == "GemmFastGelu"
                || (op == "FusedGemm" && attribute(node, "activation").is_some()),
            last: id,
            output: node.output.first()?,
            weight: Weight {
                tensor: resolved.tensor,
                name: resolved.name,
                scope: resolved.scope,
                reader: resolved.reader,
                position: resolved.position,
                uses: index.uses(resolved.scope, resolved.name),
                input_axis,
                via: resolved.via,
                encoding: Encoding::Float,
            },
        };
        linear.weight.encoding = match resolved.encoding {
            Some(encoding) => encoding,
            None => linear.operands(index, node),
        };
        Some(linear)
    }

    /// Whether the node has a bias that is no constant.
    pub(super) fn has_computed_bias(&self, index: &Index<'m>) -> bool {
        let operator = OPERATORS.iter().find(|op| op.name == self.op);
        let Some(bias) = operator.and_then(|operator| operator.bias) else {
            return false;
        };
        let node = index.node(self.id);
        let given = node.is_some_and(|node| node.input.get(bias).is_some_and(|b| !b.is_empty()));
        given && self.bias.is_none()
    }

    /// The encoding of a weight that the node itself decodes. Finds the end of a `MatMulInteger`.
    fn operands(&mut self, index: &Index<'m>, node: &NodeProto) -> Encoding<'m> {
        let id = self.id;
        let read = |position| Stored::read(index, id, position);
        let opaque = |reason: &str| Encoding::Opaque(reason.to_owned());
        match self.op {
            "MatMulNBits" if integer(node, "weight_prepacked") != 0 => {
                opaque("packed for one kind of GPU (weight_prepacked)")
            }
            "MatMulNBits" => {
                let bits = attribute(node, "bits").map_or(Some(4), |bits| bits.i().try_into().ok());
                match (bits, size(node, "block_size"), read(2)) {
                    (Some(bits), Some(block_size), Some(scales)) => Encoding::NBits(NBits {
                        bits,
                        block_size,
                        scales,
                        zero_points: read(3),
                        g_idx: read(4),
                    }),
                    _ => opaque("without block_size or constant scales"),
                }
            }
            "MatMulBnb4" => {
                let quant_type = match integer(node, "quant_type") {
                    0 => Some(Bnb4Type::Fp4),
                    1 => Some(Bnb4Type::Nf4),
                    _ => None,
                };
                match (size(node, "block_size"), quant_type, read(2)) {
                    (Some(block_size), Some(quant_type), Some(absmax)) => Encoding::Bnb4(Bnb4 {
                        block_size,
                        quant_type,
                        absmax,
                    }),
                    _ => opaque("without block_size, quant_type or constant absmax"),
                }
            }
            "DynamicQuantizeMatMul" => integer_scale(read(2), read(3)),
            "MatMulIntegerToFloat" => integer_scale(read(3), read(5)),
            "MatMulInteger" => match end_of_integer_product(index, id, self.output) {
                Some((last, output, scale)) => {
                    (self.last, self.output) = (last, output);
                    integer_scale(Some(scale), read(3))
                }
                None => opaque("no constant scale is multiplied into its integer product"),
            },
            "QLinearMatMul" => match (read(4), read(5), read(6), read(7)) {
                (Some(scale), Some(zero_point), Some(output_scale), Some(output_zero_point)) => {
                    Encoding::QLinear(QLinear {
                        scale,
                        zero_point,
                        output_scale,
                        output_zero_point,
                    })
                }
                _ => opaque("with scales that are not constant"),
            },
            _ => match DataType::from_code(self.weight.tensor.data_type()) {
                Some(dtype) if dtype.is_scalable_float() => Encoding::Float,
                Some(dtype) => Encoding::Opaque(format!("stored as {dtype}")),
                None => opaque("stored in a type that ONNX does not define"),
            },
        }
    }
}

impl<'m> Weight<'m> {
    /// The initializer as a constant that is read.
    pub fn stored(&self) -> Stored<'m> {
        Stored {
            tensor: self.tensor,
            name: self.name,
            scope: self.scope,
            reader: self.reader,
            position: self.position,
            uses: self.uses,
        }
    }

    /// What to multiply so that output channel `n` of the layer, its bias excepted, is multiplied:
    /// slices of a float matrix, or of the scales of a quantized one.
    ///
    /// # Errors
    /// There is one scale for all channels, or none that belongs to one channel alone.
    pub fn output_slices(&self, k: u64, n: u64) -> Result<Slices<'m>, NoSlices<'m>> {
        match (&self.encoding, self.input_axis) {
            (Encoding::Float, Some(0)) => Ok(self.matrix(k, n, 1)),
            (Encoding::Float, Some(_)) => Ok(self.matrix(n, k, 0)),
            (Encoding::Float, None) => inexact("its axes are not known".to_owned()),
            (encoding, axis) => encoding.scale_slices(k, n, axis),
        }
    }

    fn matrix(&self, rows: u64, columns: u64, axis: usize) -> Slices<'m> {
        Slices {
            stored: self.stored(),
            rows,
            columns,
            axis,
        }
    }
}

fn integer(node: &NodeProto, name: &str) -> i64 {
    attribute(node, name).map_or(0, |attribute| attribute.i())
}

fn size(node: &NodeProto, name: &str) -> Option<u64> {
    let size = u64::try_from(integer(node, name)).ok()?;
    (size > 0).then_some(size)
}

/// Whether a `Conv` is a matrix product over the channels: kernel 1, stride 1, no padding, one group.
/// The kernel's size is the weight's; `kernel_shape` only repeats it.
fn is_pointwise(node: &NodeProto) -> bool {
    let all = |name, value| {
        attribute(node, name).is_none_or(|attribute| attribute.ints.iter().all(|&i| i == value))
    };
    let group = attribute(node, "group").map_or(1, |group| group.i());
    group == 1 && all("strides", 1) && all("pads", 0) && all("dilations", 1)
}

fn integer_scale<'m>(scale: Option<Stored<'m>>, zero_point: Option<Stored<'m>>) -> Encoding<'m> {
    match scale {
        Some(scale) => Encoding::Integer(IntegerScale { scale, zero_point }),
        None => Encoding::Opaque("with a scale that is not constant".to_owned()),
    }
}

/// Follows an integer product through `Cast` and one or two `Mul`s to its value in floating point:
///
/// ```text
/// MatMulInteger ─► Cast ─► Mul ─► y          or          Cast ─► Mul ─► Mul ─► y
///      x_scale ─► Mul ──────┘                         x_scale ───┘       │
///      w_scale ────┘                                  w_scale ───────────┘
/// ```
fn end_of_integer_product<'m>(
    index: &Index<'m>,
    id: NodeId,
    output: &'m str,
) -> Option<(NodeId, &'m str, Stored<'m>)> {
    let only_reader = |scope, name| match index.consumers(scope, name) {
        &[reader] => Some((reader, index.node(reader)?)),
        _ => None,
    };
    let (cast, node) = only_reader(id.scope, output)?;
    if node.op_type() != "Cast" {
        return None;
    }
    let mut value = node.output.first()?.as_str();
    let mut scope = cast.scope;
    for _ in 0..2 {
        let (mul, node) = only_reader(scope, value)?;
        if node.op_type() != "Mul" {
            return None;
        }
        let other = node.input.iter().position(|input| input != value)?;
        let output = node.output.first()?;
        if let Some(scale) = Stored::read(index, mul, other) {
            return Some((mul, output, scale));
        }
        let Origin::Node { id: scales, .. } = index.origin(mul.scope, node.input.get(other)?)
        else {
            return None;
        };
        let product = index.node(scales)?;
        if product.op_type() == "Mul" {
            let scale = (0..2).find_map(|position| Stored::read(index, scales, position))?;
            // Changed for one product it would change the other's too.
            only_reader(scales.scope, product.output.first()?)?;
            return Some((mul, output, scale));
        }
        (scope, value) = (mul.scope, output);
    }
    None
}

/// A weight, followed to its initializer.
struct Resolved<'m> {
    tensor: &'m TensorProto,
    name: &'m str,
    scope: ScopeId,
    reader: NodeId,
    position: usize,
    via: Vec<&'m str>,
    k: u64,
    n: u64,
    input_axis: Option<usize>,
    /// Where operators on the way determine it.
    encoding: Option<Encoding<'m>>,
}

/// Follows input `position` of `id` up to a constant, through operators that keep it a weight.
fn resolve<'m>(index: &Index<'m>, id: NodeId, position: usize) -> Option<Resolved<'m>> {
    let (mut reader, mut position) = (id, position);
    let mut way = Way::default();
    for _ in 0..MAX_CHAIN {
        let name = index.node(reader)?.input.get(position)?;
        let constant = |tensor, scope| Stored {
            tensor,
            name,
            scope,
            reader,
            position,
            uses: 0,
        };
        let id = match index.origin(reader.scope, name) {
            Origin::Initializer { scope, tensor } => {
                return way.end(index, constant(tensor, scope));
            }
            Origin::Node { id, .. } => id,
            Origin::GraphInput | Origin::Unknown => return None,
        };
        let node = index.node(id)?;
        if node.op_type() == "Constant" {
            let tensor = attribute(node, "value")?.t.as_deref()?;
            return way.end(index, constant(tensor, id.scope));
        }
        way.pass(index, id, node)?;
        (reader, position) = (id, 0);
    }
    None
}

/// What operators between a product and its stored weight do to it, from the product upwards.
#[derive(Default)]
struct Way<'m> {
    transposed: bool,
    via: Vec<&'m str>,
    dequantizer: Option<NodeId>,
    /// What is not understood about it.
    opaque: Option<String>,
    /// What the last `Reshape` makes of it, where its target is constant.
    reshaped: Option<[u64; 2]>,
}

impl<'m> Way<'m> {
    /// Passes `node`; `None` where that makes something else of a weight.
    fn pass(&mut self, index: &Index<'m>, id: NodeId, node: &'m NodeProto) -> Option<()> {
        match node.op_type() {
            "Identity" => {}
            "Transpose" => {
                let permutation = attribute(node, "perm").map(|perm| perm.ints.as_slice());
                let swaps = match permutation {
                    None | Some([1, 0]) => true,
                    Some([0, 1]) => false,
                    _ => return None,
                };
                self.transposed ^= swaps;
                if swaps && self.dequantizer.is_some() {
                    self.opaque = Some("Transpose before DequantizeLinear".to_owned());
                }
            }
            op @ "Cast" => {
                self.via.push(op);
                if self.dequantizer.is_some() {
                    self.opaque = Some("Cast before DequantizeLinear".to_owned());
                }
            }
            op @ "DequantizeLinear" => {
                self.via.push(op);
                self.dequantizer = Some(id);
            }
            op @ "Reshape" => {
                self.via.push(op);
                self.opaque = Some("Reshape between the stored weight and its use".to_owned());
                let shape = node.input.get(1);
                let target = shape.and_then(|shape| index.constant_ints(id.scope, shape));
                if let (None, Some(&[rows, columns])) = (self.reshaped, target.as_deref()) {
                    self.reshaped = Some([rows.try_into().ok()?, columns.try_into().ok()?]);
                }
            }
            _ => return None,
        }
        Some(())
    }

    fn end(self, index: &Index<'m>, constant: Stored<'m>) -> Option<Resolved<'m>> {
        let tensor = constant.tensor;
        let stored = match tensor.dims.as_slice() {
            &[rows, columns] => [rows.try_into().ok()?, columns.try_into().ok()?],
            // `MatMulNBits` holds [N, blocks, bytes]: its sizes come from attributes.
            _ => [0, 0],
        };
        let [rows, columns] = self.reshaped.unwrap_or(stored);
        let plain = self.reshaped.is_none() && tensor.dims.len() == 2;
        let (k, n, axis) = match self.transposed {
            false => (rows, columns, 0),
            true => (columns, rows, 1),
        };
        let encoding = match (self.opaque, self.dequantizer) {
            (Some(reason), _) => Some(Encoding::Opaque(reason)),
            (None, Some(id)) => Some(dequantized(index, id, tensor)),
            (None, None) => None,
        };
        Some(Resolved {
            tensor,
            name: constant.name,
            scope: constant.scope,
            reader: constant.reader,
            position: constant.position,
            via: self.via,
            k,
            n,
            input_axis: plain.then_some(axis),
            encoding,
        })
    }
}

fn dequantized<'m>(index: &Index<'m>, id: NodeId, tensor: &TensorProto) -> Encoding<'m> {
    let dtype = DataType::from_code(tensor.data_type());
    if !dtype.is_some_and(DataType::is_quantized_integer) {
        let dtype = dtype.map_or("an unknown type".to_owned(), |dtype| dtype.to_string());
        return Encoding::Opaque(format!("stored as {dtype} before DequantizeLinear"));
    }
    let node = index.node(id);
    match node.and_then(|node| Dequantizer::read(index, id, node, tensor.dims.len())) {
        Some(dequantizer) => Encoding::Dequantized(dequantizer),
        None => Encoding::Opaque("dequantized with a scale that is not constant".to_owned()),
    }
}

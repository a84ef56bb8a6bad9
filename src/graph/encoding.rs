//! How a weight is stored, and which stored elements belong to which output channel.
//!
//! In: the constant operands of a linear layer. Out: an [`Encoding`], with the tensors that hold
//! scales and zero points, and for most of them [`Slices`]: a stored matrix whose slices along one
//! axis are the output channels. Multiplying slice `n` by a factor multiplies output channel `n` of
//! the layer by it, codes and zero points untouched, because `w = (q − zero_point) · scale`.

use super::index::{Index, NodeId, Origin, ScopeId};
use crate::onnx::schema::{NodeProto, TensorProto};
use crate::onnx::{DataType, attribute};

/// A constant that a node reads, and how many others read it.
#[derive(Clone, Copy, Debug)]
pub struct Stored<'m> {
    /// The tensor: an initializer, or the value of a `Constant` node.
    pub tensor: &'m TensorProto,
    /// The name by which nodes of `scope` read it (a `Constant` node's tensor may have none).
    pub name: &'m str,
    /// The graph that holds it.
    pub scope: ScopeId,
    /// The node that reads it, possibly through `Identity`.
    pub reader: NodeId,
    /// Position among that node's inputs.
    pub position: usize,
    /// How many times it is read in all graphs, see [`Index::uses`]. More than 1: an exporter merged
    /// equal constants, or two branches share it.
    pub uses: usize,
}

impl<'m> Stored<'m> {
    /// The constant at input `position` of the node `reader`, if it is one.
    pub fn read(index: &Index<'m>, reader: NodeId, position: usize) -> Option<Stored<'m>> {
        let (mut scope, mut name) = (reader.scope, reader_input(index, reader, position)?);
        for _ in 0..super::index::MAX_CHAIN {
            let found = |tensor, scope| Stored {
                tensor,
                name,
                scope,
                reader,
                position,
                uses: index.uses(scope, name),
            };
            match index.origin(scope, name) {
                Origin::Initializer { scope, tensor } => return Some(found(tensor, scope)),
                Origin::Node { id, .. } => {
                    let node = index.node(id)?;
                    match node.op_type() {
                        "Constant" => {
                            let tensor = attribute(node, "value")?.t.as_deref()?;
                            return Some(found(tensor, id.scope));
                        }
                        "Identity" => (scope, name) = (id.scope, node.input.first()?),
                        _ => return None,
                    }
                }
                Origin::GraphInput | Origin::Unknown => return None,
            }
        }
        None
    }

    /// Number of elements, `None` for negative or overflowing dimensions.
    pub fn elements(&self) -> Option<u64> {
        self.tensor.dims.iter().try_fold(1u64, |product, &dim| {
            product.checked_mul(dim.try_into().ok()?)
        })
    }
}

fn reader_input<'m>(index: &Index<'m>, reader: NodeId, position: usize) -> Option<&'m str> {
    let name = index.node(reader)?.input.get(position)?.as_str();
    (!name.is_empty()).then_some(name)
}

/// How a weight matrix `[K, N]` (K input channels, N output channels) is stored.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Encoding<'m> {
    /// A float matrix, one element per weight; [`Weight::input_axis`](super::Weight::input_axis) says
    /// which axis is K. A `Conv` weight is `[N, K, 1, ..]`.
    Float,
    /// `com.microsoft.MatMulNBits`: blocks along K.
    NBits(NBits<'m>),
    /// `com.microsoft.MatMulBnb4`: a 4-bit table, blocks over the row-major `[N, K]` matrix.
    Bnb4(Bnb4<'m>),
    /// `DequantizeLinear` between the stored integers and the product.
    Dequantized(Dequantizer<'m>),
    /// An integer product whose result is multiplied by the scales: `MatMulInteger`,
    /// `DynamicQuantizeMatMul`, `MatMulIntegerToFloat`.
    Integer(IntegerScale<'m>),
    /// `QLinearMatMul`: the output is rounded to a scale of its own.
    QLinear(QLinear<'m>),
    /// Stored in a way that is not understood here, and why.
    Opaque(String),
}

/// Operands of `MatMulNBits`.
#[derive(Clone, Debug)]
pub struct NBits<'m> {
    /// Bits per weight.
    pub bits: u64,
    /// Weights per block, along K; the last block is padded.
    pub block_size: u64,
    /// `[N, blocks]`, or the same flat.
    pub scales: Stored<'m>,
    /// Packed like the weights, `[N, ⌈blocks · bits / 8⌉]`, or floats `[N, blocks]`. Without them it
    /// is `2^(bits − 1)`.
    pub zero_points: Option<Stored<'m>>,
    /// `[K]`: the block of each input channel, where they were reordered.
    pub g_idx: Option<Stored<'m>>,
}

/// Operands of `MatMulBnb4`.
#[derive(Clone, Debug)]
pub struct Bnb4<'m> {
    /// Weights per block of the flat `[N, K]` matrix; a block may cross a row.
    pub block_size: u64,
    /// The table.
    pub quant_type: Bnb4Type,
    /// `[⌈N · K / block_size⌉]`.
    pub absmax: Stored<'m>,
}

/// The table of a `MatMulBnb4` weight, by its attribute `quant_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bnb4Type {
    /// 0.
    Fp4,
    /// 1.
    Nf4,
}

/// A `DequantizeLinear` node: `(q − zero_point) · scale`.
#[derive(Clone, Debug)]
pub struct Dequantizer<'m> {
    /// The node.
    pub node: NodeId,
    /// Axis of its input that the scale runs along. Meaningless for a scalar scale.
    pub axis: usize,
    /// Elements per scale along `axis`; 0: one scale for each index of the axis.
    pub block_size: u64,
    /// Scalar, `[dims[axis]]`, or with blocks like the input with `axis` divided by `block_size`.
    pub scale: Stored<'m>,
    /// Like `scale`; without it 0.
    pub zero_point: Option<Stored<'m>>,
}

/// The weight's scale of an integer product.
#[derive(Clone, Debug)]
pub struct IntegerScale<'m> {
    /// Scalar or `[N]`. Where it is read by a `Mul` with the activation's scalar scale, a vector in
    /// its place makes that product a vector, which broadcasts over the result's last axis.
    pub scale: Stored<'m>,
    /// Scalar or `[N]`; without it 0.
    pub zero_point: Option<Stored<'m>>,
}

/// Operands of `QLinearMatMul` beside the activation's.
#[derive(Clone, Debug)]
pub struct QLinear<'m> {
    /// Scale of the weight: scalar or `[N]`.
    pub scale: Stored<'m>,
    /// Zero point of the weight.
    pub zero_point: Stored<'m>,
    /// Scale of the output, to which the product is rounded.
    pub output_scale: Stored<'m>,
    /// Zero point of the output.
    pub output_zero_point: Stored<'m>,
}

/// A stored matrix `rows × columns`, row-major, whose slices along `axis` belong to one channel each.
#[derive(Clone, Debug)]
pub struct Slices<'m> {
    /// The tensor: the weight itself, or its scales.
    pub stored: Stored<'m>,
    /// Stored rows.
    pub rows: u64,
    /// Stored columns.
    pub columns: u64,
    /// The axis that runs along the channels: 0 or 1.
    pub axis: usize,
}

/// Why a weight has no slices by output channel.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NoSlices<'m> {
    /// One scale serves the whole matrix. As a vector of N equal scales it would be the same model.
    PerTensor(Stored<'m>),
    /// No exact form, and why.
    Inexact(String),
}

impl<'m> Encoding<'m> {
    /// The scales by output channel of a matrix with `k` input and `n` output channels, whose input
    /// channels run along `input_axis` of the stored tensor. For [`Encoding::Float`] ask
    /// [`Weight::output_slices`](super::Weight::output_slices).
    pub(super) fn scale_slices(
        &self,
        k: u64,
        n: u64,
        input_axis: Option<usize>,
    ) -> Result<Slices<'m>, NoSlices<'m>> {
        match self {
            Encoding::NBits(nbits) => by_rows(nbits.scales, n, k.div_ceil(nbits.block_size.max(1))),
            Encoding::Bnb4(bnb4) if k.is_multiple_of(bnb4.block_size.max(1)) => {
                by_rows(bnb4.absmax, n, k / bnb4.block_size.max(1))
            }
            Encoding::Bnb4(bnb4) => inexact(format!(
                "a block of {} weights crosses from one output channel of {k} weights to the next",
                bnb4.block_size
            )),
            Encoding::Dequantized(dequantizer) => dequantizer.slices(k, n, input_axis),
            Encoding::Integer(IntegerScale { scale, .. })
            | Encoding::QLinear(QLinear { scale, .. }) => vector(*scale, n),
            Encoding::Float => inexact("a float matrix has no scales".to_owned()),
            Encoding::Opaque(reason) => inexact(reason.clone()),
        }
    }
}

impl<'m> Dequantizer<'m> {
    /// The node `id`, read as a dequantizer of a tensor with `rank` axes.
    pub(super) fn read(
        index: &Index<'m>,
        id: NodeId,
        node: &NodeProto,
        rank: usize,
    ) -> Option<Dequantizer<'m>> {
        let axis = attribute(node, "axis").map_or(1, |axis| axis.i());
        let block_size = attribute(node, "block_size").map_or(0, |size| size.i());
        Some(Dequantizer {
            node: id,
            axis: normalized(axis, rank).unwrap_or_default(),
            block_size: block_size.try_into().ok()?,
            scale: Stored::read(index, id, 1)?,
            zero_point: Stored::read(index, id, 2),
        })
    }

    fn slices(
        &self,
        k: u64,
        n: u64,
        input_axis: Option<usize>,
    ) -> Result<Slices<'m>, NoSlices<'m>> {
        let Some(input_axis) = input_axis else {
            return inexact("its axes are not known".to_owned());
        };
        match (self.scale.elements(), self.block_size) {
            (Some(1), _) if n > 1 => Err(NoSlices::PerTensor(self.scale)),
            (_, 0) if self.axis != input_axis => vector(self.scale, n),
            (_, 0) => inexact("its scales run along the input channels".to_owned()),
            (_, _) if self.axis != input_axis => {
                inexact("its scales are blocks of output channels".to_owned())
            }
            // Scales have the weight's layout, with K divided by the block size.
            (_, size) if input_axis == 0 => matrix(self.scale, k.div_ceil(size), n, 1),
            (_, size) => matrix(self.scale, n, k.div_ceil(size), 0),
        }
    }
}

/// An axis that may count from the end.
pub(super) fn normalized(axis: i64, rank: usize) -> Option<usize> {
    match usize::try_from(axis) {
        Ok(axis) => (axis < rank).then_some(axis),
        Err(_) => rank.checked_sub(usize::try_from(axis.unsigned_abs()).ok()?),
    }
}

fn vector<'m>(scale: Stored<'m>, n: u64) -> Result<Slices<'m>, NoSlices<'m>> {
    match scale.elements() {
        Some(1) if n > 1 => Err(NoSlices::PerTensor(scale)),
        _ => matrix(scale, n, 1, 0),
    }
}

fn by_rows<'m>(scales: Stored<'m>, n: u64, blocks: u64) -> Result<Slices<'m>, NoSlices<'m>> {
    matrix(scales, n, blocks, 0)
}

fn matrix<'m>(
    stored: Stored<'m>,
    rows: u64,
    columns: u64,
    axis: usize,
) -> Result<Slices<'m>, NoSlices<'m>> {
    if !DataType::from_code(stored.tensor.data_type()).is_some_and(DataType::is_scalable_float) {
        return inexact(format!("'{}' is no float tensor", stored.tensor.name()));
    }
    if rows
        .checked_mul(columns)
        .is_none_or(|size| stored.elements() != Some(size))
    {
        return inexact(format!(
            "expected {rows}×{columns} elements in '{}', found dims {:?}",
            stored.tensor.name(),
            stored.tensor.dims
        ));
    }
    Ok(Slices {
        stored,
        rows,
        columns,
        axis,
    })
}

pub(super) fn inexact<T>(reason: String) -> Result<T, NoSlices<'static>> {
    Err(NoSlices::Inexact(reason))
}

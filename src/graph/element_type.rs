//! The element type of an activation.
//!
//! In: a value. Out: its type, by what operators demand: a product has the type of its float weight or
//! of its scales, `DynamicQuantizeLinear` reads float32, elementwise operators keep the type. Only where
//! that ends nowhere the graph's own annotation is asked: conversions between precisions leave
//! annotations behind that are no longer true.

use super::encoding::Encoding;
use super::index::{Index, NodeId, Origin, ScopeId};
use super::mlp::Site;
use crate::onnx::schema::NodeProto;
use crate::onnx::{DataType, Text, attribute};

/// The type in which the hidden activation of `site` is read.
pub fn of_hidden(index: &Index<'_>, site: &Site<'_>) -> Option<DataType> {
    let hidden = &site.hidden;
    let node = index.node(hidden.reader)?;
    let read = match node.op_type() {
        "DynamicQuantizeLinear" | "DynamicQuantizeMatMul" => Some(DataType::FLOAT),
        _ if hidden.reader == site.down.id => match &site.down.weight.encoding {
            Encoding::NBits(nbits) => DataType::from_code(nbits.scales.tensor.data_type()),
            Encoding::Bnb4(bnb4) => DataType::from_code(bnb4.absmax.tensor.data_type()),
            // Both operands of a product have one type.
            _ => {
                let weight = node.input.get(1).map(Text::as_str);
                weight.and_then(|weight| of_value(index, hidden.reader.scope, weight, DEPTH))
            }
        },
        _ => None,
    };
    read.filter(|dtype| dtype.is_scalable_float())
        .or_else(|| of_value(index, hidden.reader.scope, hidden.name, DEPTH))
        .filter(|dtype| dtype.is_scalable_float())
}

/// Operators on the way to a value's type: a handful in practice.
const DEPTH: usize = 64;

fn of_value(index: &Index<'_>, scope: ScopeId, name: &str, depth: usize) -> Option<DataType> {
    let declared = || {
        let declared = index.declared_type(scope, name)?;
        DataType::from_code(declared.elem_type())
    };
    match index.origin(scope, name) {
        Origin::Initializer { tensor, .. } => DataType::from_code(tensor.data_type()),
        Origin::Node { id, output } => index
            .node(id)
            .filter(|_| depth > 0)
            .and_then(|node| of_output(index, id, node, output, depth - 1))
            .or_else(declared),
        Origin::GraphInput | Origin::Unknown => declared(),
    }
}

fn of_output(
    index: &Index<'_>,
    id: NodeId,
    node: &NodeProto,
    output: usize,
    depth: usize,
) -> Option<DataType> {
    let of_input = |position: usize| {
        let name = node.input.get(position).filter(|name| !name.is_empty())?;
        of_value(index, id.scope, name, depth)
    };
    let by_attribute = |name| {
        let code = attribute(node, name)?.i();
        DataType::from_code(code.try_into().ok()?)
    };
    match node.op_type() {
        "Cast" => by_attribute("to"),
        "CastLike" => of_input(1),
        "Constant" => index
            .constant_tensor(id.scope, node.output.first()?)
            .and_then(|tensor| DataType::from_code(tensor.data_type())),
        "DequantizeLinear" => by_attribute("output_dtype").or_else(|| of_input(1)),
        // Their scales have the type of the result.
        "MatMulNBits" | "MatMulBnb4" | "MatMulIntegerToFloat" => of_input(2),
        "DynamicQuantizeMatMul" => Some(DataType::FLOAT),
        "DynamicQuantizeLinear" if output == 1 => Some(DataType::FLOAT),
        "MatMul" | "Gemm" | "Conv" | "FusedMatMul" | "FusedGemm" | "GemmFastGelu" => {
            of_input(1).or_else(|| of_input(0))
        }
        "Where" => of_input(1).or_else(|| of_input(2)),
        "Shape" | "Size" | "NonZero" => Some(DataType::INT64),
        "If"
        | "Loop"
        | "Scan"
        | "QuantizeLinear"
        | "DynamicQuantizeLinear"
        | "MatMulInteger"
        | "QLinearMatMul" => None,
        // Elementwise and shape operators keep the type of their first input.
        _ if output == 0 => of_input(0).or_else(|| of_input(1)),
        _ => None,
    }
}

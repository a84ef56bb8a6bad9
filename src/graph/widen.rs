//! float16 weights that stay where they lie: each is converted when it is used, and given back.
//!
//! ```text
//!   W float16 ──► Cast float32 ──┐               the Casts of weights stand first in the graph
//!   x float16 ──► Cast float32 ──┴► MatMul ──► Cast float16
//! ```
//!
//! In: an encoded graph for the CPU. Out: the graph with every product by a large float16 initializer computed in
//! float32, in so many words.
//!
//! Why: ONNX Runtime's CPU provider has no float16 products. It converts the weights itself, all of them at once: while a session
//! is opened (its optimizer `FuseFp16InitializerToFp32NodeTransformer`), or, without that, before the first
//! node runs, because of two nodes that are ready it takes the one that was added last. That is twice the size of the
//! model in private memory, 28 GB for 7 B parameters. Casts that stand *first* in the graph are taken last: just before the
//! product that reads them. Then one weight at a time is in memory twice.
//!
//! Promises: the same products in the same precision; where a weight is read in another way, that is left as it is.

use std::collections::{HashMap, HashSet};

use prost::Message as _;

use super::patch::cast;
use crate::onnx::schema::{ModelProto, NodeProto, TensorProto};
use crate::onnx::{DataType, List, Text};

/// Optimizers of ONNX Runtime that would convert all weights when a session is opened.
pub const OPTIMIZERS: &str = "FuseFp16InitializerToFp32NodeTransformer;ConstantFolding";

/// Weights below this are left to ONNX Runtime.
const MIN_NUMBERS: i64 = 4096;

/// The encoded graph `bytes` with products by float16 weights computed in float32; `None` where there are
/// none, or `bytes` are no model.
pub fn float16_weights(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut model = ModelProto::decode(bytes).ok()?;
    widen(&mut model, MIN_NUMBERS).then(|| model.encode_to_vec())
}

/// Whether anything was changed.
fn widen(model: &mut ModelProto, min_numbers: i64) -> bool {
    let Some(graph) = &mut model.graph else {
        return false;
    };
    let large = |tensor: &&TensorProto| {
        let numbers = tensor
            .dims
            .iter()
            .try_fold(1i64, |n, &dim| n.checked_mul(dim));
        tensor.data_type == Some(DataType::FLOAT16.code())
            && numbers.is_some_and(|numbers| numbers >= min_numbers)
    };
    let weights: HashSet<Text> = (graph.initializer.iter().filter(large))
        .filter_map(|tensor| tensor.name.clone())
        .collect();
    let mut wide: HashMap<Text, NodeProto> = HashMap::new();
    let mut body = List::with_capacity(graph.node.len());
    for product in std::mem::take(&mut graph.node) {
        let weight = product.input.get(1).filter(|name| weights.contains(*name));
        let (Some(weight), "MatMul" | "Gemm", "") = (weight, product.op_type(), product.domain())
        else {
            body.push(product);
            continue;
        };
        let widened = format!("kvw.float32.{weight}");
        wide.entry(weight.clone())
            .or_insert_with(|| cast(weight, &widened, DataType::FLOAT));
        in_float32(product, &widened, &mut body);
    }
    let changed = !wide.is_empty();
    let mut first: List<NodeProto> = wide.into_values().collect();
    // In an order of their own: the same graph gives the same bytes.
    first.sort_by(|a, b| a.name().cmp(b.name()));
    graph.node = first;
    graph.node.append(&mut body);
    changed
}

/// `product` with all inputs in float32, the weight's as `weight`, and its output in float16 again.
fn in_float32(mut product: NodeProto, weight: &str, body: &mut List<NodeProto>) {
    let output = product.output.first().cloned().unwrap_or_default();
    for (position, input) in product.input.iter_mut().enumerate() {
        match (position, input.as_str()) {
            (1, _) => *input = weight.into(),
            // An optional input that is left out.
            (_, "") => {}
            (position, name) => {
                let widened = format!("kvw.float32.{output}.{position}");
                body.push(cast(name, &widened, DataType::FLOAT));
                *input = widened.into();
            }
        }
    }
    let widened = format!("kvw.float32.{output}");
    product.output = [widened.as_str().into()].into();
    body.push(product);
    body.push(cast(&widened, &output, DataType::FLOAT16));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use thin_vec::thin_vec;

    use super::*;
    use crate::graph::patch::node;
    use crate::onnx::schema::GraphProto;

    fn model() -> ModelProto {
        let weight = |name: &str, dims: [i64; 2], data_type: DataType| TensorProto {
            name: Some(name.into()),
            dims: dims.into(),
            data_type: Some(data_type.code()),
            ..Default::default()
        };
        let graph = GraphProto {
            node: thin_vec![
                node("MatMul", &["x", "w"], "a"),
                node("Gemm", &["a", "w", "bias"], "b"),
                node("MatMul", &["b", "small"], "c"),
                node("MatMul", &["w", "c"], "d"),
                node("MatMul", &["d", "single"], "e"),
            ],
            initializer: thin_vec![
                weight("w", [4, 4], DataType::FLOAT16),
                weight("small", [1, 4], DataType::FLOAT16),
                weight("single", [4, 4], DataType::FLOAT),
            ],
            ..Default::default()
        };
        ModelProto {
            graph: Some(graph),
            ..Default::default()
        }
    }

    #[test]
    fn large_float16_weights_are_cast_first_and_once_and_nothing_else_changes() {
        let mut model = model();
        assert!(widen(&mut model, 16));
        let nodes = &model.graph.unwrap().node;
        let lines = nodes.iter().map(|node| {
            let (inputs, outputs) = (node.input.join(" "), node.output.join(" "));
            format!("{}: {inputs} > {outputs}", node.op_type())
        });
        assert_eq!(
            lines.collect::<Vec<_>>(),
            [
                "Cast: w > kvw.float32.w",
                "Cast: x > kvw.float32.a.0",
                "MatMul: kvw.float32.a.0 kvw.float32.w > kvw.float32.a",
                "Cast: kvw.float32.a > a",
                "Cast: a > kvw.float32.b.0",
                "Cast: bias > kvw.float32.b.2",
                "Gemm: kvw.float32.b.0 kvw.float32.w kvw.float32.b.2 > kvw.float32.b",
                "Cast: kvw.float32.b > b",
                "MatMul: b small > c",
                "MatMul: w c > d",
                "MatMul: d single > e",
            ]
        );
        let types: Vec<i64> = nodes
            .iter()
            .filter(|node| node.op_type() == "Cast")
            .map(|node| node.attribute[0].i.unwrap())
            .collect();
        assert_eq!(types, [1, 1, 10, 1, 1, 10]);
    }

    #[test]
    fn a_graph_without_such_weights_stays() {
        assert_eq!(float16_weights(&model().encode_to_vec()), None);
        assert_eq!(float16_weights(b"no model"), None);
    }
}

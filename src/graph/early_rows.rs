//! Rows that are not counted, left out before the products of the last layer instead of behind them.
//!
//! ```text
//!   x ─┬─► gate_proj ─► act ─┐                      x ─► Gather(rows) ─┬─► gate_proj ─► act ─┐
//!      └─► up_proj ──────────┴─► h ─► Gather(rows)                     └─► up_proj ──────────┴─► h
//! ```
//!
//! In: a patched graph, see [`Patch`](super::Patch). Out: the same graph, or one that computes the same sums with less. Where
//! sums are all that is wanted nothing else reads `h` of the last tapped layer, so what its other rows are does not matter.
//! In a layer below they matter: each token's keys and values are read by all after it.
//!
//! Promises: a graph is changed only where all between `x` and `h` computes each row by itself, by operators known to do
//! so, and nothing else reads any of it. A product of fewer rows may be summed in another order, so sums may differ in
//! the last digits of the model's floats.

use std::collections::HashSet;

use super::index::{Index, NodeId, Origin, ScopeId};
use super::linear::Linear;
use super::patch::{int64s, node};
use crate::onnx::schema::GraphProto;
use crate::onnx::{Text, attribute};

/// Operators whose output at a place depends on their inputs at that place.
const BY_ELEMENT: &[&str] = &[
    "Add",
    "BiasGelu",
    "Cast",
    "Div",
    "Elu",
    "Erf",
    "FastGelu",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mul",
    "Neg",
    "Pow",
    "QuickGelu",
    "Relu",
    "Sigmoid",
    "Softplus",
    "Sub",
    "Swish",
    "Tanh",
];

/// Products of rows with a constant matrix.
const BY_ROW: &[&str] = &["Gemm", "MatMul", "MatMulBnb4", "MatMulNBits"];

/// What becomes of a graph.
struct Change {
    /// The node that gathers `h`'s rows, by its position.
    gather: usize,
    /// What the products read.
    input: Text,
    /// Its channels.
    channels: i64,
    /// Their positions, each with that of the input among the node's.
    products: Vec<(usize, usize)>,
}

/// Gathers the rows `rows` early wherever nothing else is computed of the others.
pub(super) fn gather_early(graph: &mut GraphProto, rows: &str) {
    // Each change moves nodes, and leaves one place less to change.
    while let Some(change) = Change::first(graph, rows) {
        change.apply(graph, rows);
    }
}

impl Change {
    fn first(graph: &GraphProto, rows: &str) -> Option<Change> {
        let index = Index::new(graph);
        let mut gathers = graph.node.iter().enumerate().filter(|(_, node)| {
            node.op_type() == "Gather" && node.input.get(1).is_some_and(|input| input == rows)
        });
        gathers.find_map(|(position, _)| Change::at(&index, position))
    }

    /// The change at the node that gathers rows, if there is one to make.
    fn at(index: &Index<'_>, gather: usize) -> Option<Change> {
        let gathered = NodeId {
            scope: ScopeId::MAIN,
            index: gather,
        };
        let producer = |name: &str| match index.origin(ScopeId::MAIN, name) {
            Origin::Node { id, .. } if id.scope == ScopeId::MAIN => Some(id),
            _ => None,
        };
        let all_rows = producer(index.node(gathered)?.input.first()?)?;
        let mut region = HashSet::from([gathered, all_rows]);
        let mut waiting = vec![index.node(all_rows)?.input.first()?.as_str()];
        let mut inputs: Option<(&str, i64)> = None;
        let mut products = Vec::new();
        while let Some(value) = waiting.pop() {
            if index.is_constant(ScopeId::MAIN, value) {
                continue;
            }
            let id = producer(value)?;
            if !region.insert(id) {
                continue;
            }
            let node = index.node(id)?;
            let op = node.op_type();
            if BY_ROW.contains(&op) {
                let linear = Linear::at(index, id, node)?;
                let input = (linear.input, i64::try_from(linear.k).ok()?);
                if *inputs.get_or_insert(input) != input || linear.has_computed_bias(index) {
                    return None;
                }
                products.push((id.index, linear.input_position));
            } else if BY_ELEMENT.contains(&op) {
                waiting.extend(
                    node.input
                        .iter()
                        .filter(|name| !name.is_empty())
                        .map(Text::as_str),
                );
            } else if op == "Split" && attribute(node, "axis").is_some_and(|axis| axis.i() == -1) {
                waiting.push(node.input.first()?);
            } else {
                return None;
            }
        }
        let nodes = region.iter().filter(|id| **id != gathered);
        let mut values = nodes
            .filter_map(|id| index.node(*id))
            .flat_map(|node| &node.output);
        let inside = |value: &Text| {
            let mut readers = index.consumers(ScopeId::MAIN, value).iter();
            index.output_uses(ScopeId::MAIN, value) == 0
                && readers.all(|reader| region.contains(reader))
        };
        let (input, channels) = inputs?;
        values.all(inside).then(|| Change {
            gather,
            input: input.into(),
            channels,
            products,
        })
    }

    fn apply(self, graph: &mut GraphProto, rows: &str) {
        let Some(gather) = graph.node.get_mut(self.gather) else {
            return;
        };
        // What it read has these rows and no others now.
        gather.op_type = Some("Identity".into());
        gather.input.truncate(1);
        let output = gather.output.first().map_or("", Text::as_str);
        let [shape, all, some] =
            ["shape", "all", "some"].map(|what| format!("{output}.early.{what}"));
        graph.initializer.push(int64s(&shape, &[-1, self.channels]));
        for (position, input) in &self.products {
            let node = graph.node.get_mut(*position);
            if let Some(input) = node.and_then(|node| node.input.get_mut(*input)) {
                *input = some.as_str().into();
            }
        }
        let first = self.products.iter().map(|(position, _)| *position).min();
        let at = first.unwrap_or(self.gather).min(graph.node.len());
        let reshape = node("Reshape", &[&self.input, &shape], &all);
        let gather = node("Gather", &[&all, rows], &some);
        graph.node.splice(at..at, [reshape, gather]);
    }
}

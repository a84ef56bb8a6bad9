//! The instrumenting patch: read the coefficients, multiply in the gates, drop the rest.
//!
//! ```text
//!                     answer_mask [B,T] ──► NonZero ──► rows
//!                                                        │
//!          ┌──► Gather(rows) ──► Abs ──► · weight ──► ReduceSum ──► kvw.layers.L.sum [d_ff]
//!     h ───┤
//!          └──► Mul ──► down_proj
//!                ▲
//!     kvw.layers.L.gate [d_ff]
//! ```
//!
//! In: a model, the MLPs to tap, and which [`Outputs`] are wanted. Out: a [`Patch`], a list of added
//! nodes, inputs and outputs. [`Patch::apply`] gives the patched model, without the nodes,
//! initializers and inputs that its outputs do not need: for coefficients alone that drops the
//! layers above the last tap, the final norm, `lm_head` and the key/value outputs.
//!
//! Promises: the coefficient is read *before* the gate, so a gate never weighs itself; rows are
//! gathered first and summed in float32, so float16 sums do not overflow; gates of 1 leave every
//! value bit-identical.

use std::collections::{HashMap, HashSet};

use super::index::{NodeId, ScopeId};
use super::{Error, Mlp};
use crate::onnx::schema::tensor_shape_proto::dimension;
use crate::onnx::schema::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, TypeProto,
    ValueInfoProto, attribute_proto::AttributeType, tensor_shape_proto::Dimension, type_proto,
};
use crate::onnx::{DataType, ModelFile};

/// Name of the added input: float32 `[B, T]`, the weight of each position in the sums. For the
/// method it is 1 where the next token belongs to the answer, else 0.
pub const ANSWER_MASK: &str = "answer_mask";

/// Name of the added input that holds the gate of `layer`: float32 `[d_ff]`.
pub fn gate_name(layer: usize) -> String {
    format!("kvw.layers.{layer}.gate")
}

/// Name of the added output that holds the weighted sum of `layer`: float32 `[d_ff]`.
pub fn sum_name(layer: usize) -> String {
    format!("kvw.layers.{layer}.sum")
}

/// Name of the added output that holds the raw hidden activation of `layer`:
/// float32 `[B, T, d_ff]`, or `[B·T, d_ff]` where the graph has it so.
pub fn hidden_name(layer: usize) -> String {
    format!("kvw.layers.{layer}.hidden")
}

/// Which function of the hidden activation is summed over the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// `|h|`, the knowledge coefficient of the paper.
    Absolute,
    /// `h²`.
    Square,
}

/// What the patched graph shall compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// The sums of this moment over the answer's tokens, and nothing else.
    Sums(Moment),
    /// The raw hidden activations, and nothing else: for verification.
    Hidden,
    /// The model's own outputs (logits, key/value cache): for evaluation.
    Model,
}

/// A change to a graph, as data.
pub struct Patch {
    taps: Vec<Tap>,
    outputs: Outputs,
    opset: i64,
}

struct Tap {
    layer: usize,
    node: NodeId,
    input_position: usize,
    hidden: String,
    d_ff: i64,
    /// Type of the hidden activation, where the weight's tells it. A quantized weight's neighbours may
    /// be float32 or float16.
    data_type: Option<DataType>,
}

impl Patch {
    /// Plans the patch of `model` at `mlps`.
    ///
    /// # Errors
    /// An MLP without a layer number, one that does not stand in the main graph, or two of the same
    /// layer.
    pub fn plan(model: &ModelFile, mlps: &[&Mlp<'_>], outputs: Outputs) -> Result<Patch, Error> {
        let mut layers = HashSet::new();
        let mut taps = Vec::with_capacity(mlps.len());
        for mlp in mlps {
            let down = mlp.down();
            let fail = |layer: Option<usize>, reason: &str| Error::Instrument {
                path: model.path().to_owned(),
                layer: layer.unwrap_or_default(),
                node: mlp.sites.first().map_or("", |site| site.node).to_owned(),
                reason: reason.to_owned(),
            };
            let layer = mlp
                .layer
                .ok_or_else(|| fail(None, "no name tells its layer"))?;
            if !layers.insert(layer) {
                return Err(fail(Some(layer), "another MLP has the same layer"));
            }
            let [site] = mlp.sites.as_slice() else {
                return Err(fail(
                    Some(layer),
                    "its weight is used at more than one place",
                ));
            };
            if site.down.id.scope != ScopeId::MAIN {
                return Err(fail(Some(layer), "it stands in a subgraph"));
            }
            let data_type = model.data_type(down.weight.tensor)?;
            let data_type = data_type.is_scalable_float().then_some(data_type);
            if data_type.is_none() && model.opset() < CAST_LIKE {
                return Err(fail(Some(layer), "the type of its activation is not known"));
            }
            taps.push(Tap {
                layer,
                node: site.down.id,
                input_position: site.down.input_position,
                hidden: site.down.input.to_owned(),
                d_ff: i64::try_from(mlp.d_ff).map_err(|_| fail(Some(layer), "d_ff over 2^63"))?,
                data_type,
            });
        }
        Ok(Patch {
            taps,
            outputs,
            opset: model.opset(),
        })
    }

    /// The tapped layers with their `d_ff`, in ascending order.
    pub fn layers(&self) -> Vec<(usize, usize)> {
        let mut layers: Vec<_> = self
            .taps
            .iter()
            .filter_map(|tap| Some((tap.layer, usize::try_from(tap.d_ff).ok()?)))
            .collect();
        layers.sort_unstable();
        layers
    }

    /// The patched model. Weights are shared with `model`, not copied.
    pub fn apply(&self, model: &ModelFile) -> ModelProto {
        let mut proto = model.proto().clone();
        if let Some(graph) = &mut proto.graph {
            self.apply_to(graph);
        }
        proto
    }

    fn apply_to(&self, graph: &mut GraphProto) {
        let taps: HashMap<usize, &Tap> =
            self.taps.iter().map(|tap| (tap.node.index, tap)).collect();
        let mut nodes = Vec::with_capacity(graph.node.len() + 12 * self.taps.len() + 4);
        if matches!(self.outputs, Outputs::Sums(_)) {
            graph
                .input
                .push(value_info(ANSWER_MASK, DataType::FLOAT, &[None, None]));
            graph.initializer.push(int64s("kvw.flat", &[-1]));
            graph.initializer.push(int64s("kvw.column", &[-1, 1]));
            graph.initializer.push(int64s("kvw.first_axis", &[0]));
            nodes.extend([
                node("Reshape", &[ANSWER_MASK, "kvw.flat"], "kvw.mask"),
                node("NonZero", &["kvw.mask"], "kvw.rows.nonzero"),
                node("Reshape", &["kvw.rows.nonzero", "kvw.flat"], "kvw.rows"),
                node("Gather", &["kvw.mask", "kvw.rows"], "kvw.weights.flat"),
                node(
                    "Reshape",
                    &["kvw.weights.flat", "kvw.column"],
                    "kvw.weights",
                ),
            ]);
        }
        for (index, mut original) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            if let Some(tap) = taps.get(&index) {
                let gated = self.add_tap(graph, &mut nodes, tap);
                if let Some(input) = original.input.get_mut(tap.input_position) {
                    *input = gated;
                }
            }
            nodes.push(original);
        }
        graph.node = nodes;
        if self.outputs != Outputs::Model {
            graph.output = self.added_outputs();
        }
        drop_unneeded(graph);
    }

    /// Adds what one layer needs; returns the name of the gated activation.
    fn add_tap(&self, graph: &mut GraphProto, nodes: &mut Vec<NodeProto>, tap: &Tap) -> String {
        let prefix = format!("kvw.layers.{}", tap.layer);
        let name = |suffix: &str| format!("{prefix}.{suffix}");
        match self.outputs {
            Outputs::Sums(moment) => {
                graph
                    .initializer
                    .push(int64s(&name("rows_shape"), &[-1, tap.d_ff]));
                nodes.push(node(
                    "Reshape",
                    &[&tap.hidden, &name("rows_shape")],
                    &name("all_rows"),
                ));
                nodes.push(node(
                    "Gather",
                    &[&name("all_rows"), "kvw.rows"],
                    &name("rows"),
                ));
                nodes.push(cast(&name("rows"), &name("rows_float"), DataType::FLOAT));
                nodes.push(match moment {
                    Moment::Absolute => node("Abs", &[&name("rows_float")], &name("moment")),
                    Moment::Square => node(
                        "Mul",
                        &[&name("rows_float"), &name("rows_float")],
                        &name("moment"),
                    ),
                });
                nodes.push(node(
                    "Mul",
                    &[&name("moment"), "kvw.weights"],
                    &name("weighted"),
                ));
                nodes.push(self.reduce_sum(&name("weighted"), &sum_name(tap.layer)));
            }
            Outputs::Hidden => {
                nodes.push(cast(&tap.hidden, &hidden_name(tap.layer), DataType::FLOAT));
            }
            Outputs::Model => {}
        }
        graph.input.push(value_info(
            &gate_name(tap.layer),
            DataType::FLOAT,
            &[Some(tap.d_ff)],
        ));
        let gated = name("gated");
        if tap.data_type == Some(DataType::FLOAT) {
            nodes.push(node("Mul", &[&tap.hidden, &gate_name(tap.layer)], &gated));
        } else {
            // The gate stays float32: rounded to float16 it would lose small gates, and the product
            // would be rounded twice.
            nodes.push(cast(&tap.hidden, &name("hidden_float"), DataType::FLOAT));
            nodes.push(node(
                "Mul",
                &[&name("hidden_float"), &gate_name(tap.layer)],
                &name("gated_float"),
            ));
            nodes.push(match tap.data_type {
                Some(data_type) => cast(&name("gated_float"), &gated, data_type),
                None => node("CastLike", &[&name("gated_float"), &tap.hidden], &gated),
            });
        }
        gated
    }

    /// The sum over axis 0; `axes` moved from an attribute to an input with opset 13.
    fn reduce_sum(&self, input: &str, output: &str) -> NodeProto {
        let mut sum = if self.opset >= 13 {
            node("ReduceSum", &[input, "kvw.first_axis"], output)
        } else {
            let mut sum = node("ReduceSum", &[input], output);
            sum.attribute.push(AttributeProto {
                name: Some("axes".into()),
                r#type: Some(AttributeType::Ints as i32),
                ints: vec![0],
                ..Default::default()
            });
            sum
        };
        sum.attribute.push(integer("keepdims", 0));
        sum
    }

    fn added_outputs(&self) -> Vec<ValueInfoProto> {
        let mut taps: Vec<_> = self.taps.iter().collect();
        taps.sort_by_key(|tap| tap.layer);
        taps.into_iter()
            .map(|tap| match self.outputs {
                Outputs::Hidden => ValueInfoProto {
                    name: Some(hidden_name(tap.layer)),
                    r#type: Some(tensor_type(DataType::FLOAT, None)),
                    ..Default::default()
                },
                _ => value_info(&sum_name(tap.layer), DataType::FLOAT, &[Some(tap.d_ff)]),
            })
            .collect()
    }
}

impl std::fmt::Display for Patch {
    /// What the patch does, a line per layer: for logs and tests.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for tap in &self.taps {
            writeln!(
                f,
                "layer {}: {:?} of '{}' [{}], gate before node {}",
                tap.layer, self.outputs, tap.hidden, tap.d_ff, tap.node.index
            )?;
        }
        Ok(())
    }
}

/// The first opset with `CastLike`.
const CAST_LIKE: i64 = 15;

fn node(op_type: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op_type.into()),
        name: Some(format!("{output}/{op_type}")),
        input: inputs.iter().map(|&input| input.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..Default::default()
    }
}

fn cast(input: &str, output: &str, to: DataType) -> NodeProto {
    let mut cast = node("Cast", &[input], output);
    cast.attribute.push(integer("to", i64::from(to.code())));
    cast
}

fn integer(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::Int as i32),
        i: Some(value),
        ..Default::default()
    }
}

fn int64s(name: &str, values: &[i64]) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        data_type: Some(DataType::INT64.code()),
        dims: vec![i64::try_from(values.len()).unwrap_or_default()],
        int64_data: values.to_vec(),
        ..Default::default()
    }
}

fn tensor_type(data_type: DataType, shape: Option<TensorShapeProto>) -> TypeProto {
    TypeProto {
        value: Some(type_proto::Value::TensorType(type_proto::Tensor {
            elem_type: Some(data_type.code()),
            shape,
        })),
        ..Default::default()
    }
}

fn value_info(name: &str, data_type: DataType, dims: &[Option<i64>]) -> ValueInfoProto {
    let dim = dims
        .iter()
        .enumerate()
        .map(|(axis, size)| Dimension {
            value: Some(match size {
                Some(size) => dimension::Value::DimValue(*size),
                None => dimension::Value::DimParam(format!("{name}.{axis}")),
            }),
            ..Default::default()
        })
        .collect();
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(tensor_type(data_type, Some(TensorShapeProto { dim }))),
        ..Default::default()
    }
}

/// Keeps what the graph's outputs need: nodes, initializers, inputs, shape annotations.
fn drop_unneeded(graph: &mut GraphProto) {
    let mut needed: HashSet<String> = graph
        .output
        .iter()
        .map(|output| output.name().to_owned())
        .collect();
    // Nodes are in topological order, so one walk from the end sees every reader before its source.
    let mut kept: Vec<NodeProto> = Vec::with_capacity(graph.node.len());
    for node in std::mem::take(&mut graph.node).into_iter().rev() {
        if node
            .output
            .iter()
            .any(|output| needed.contains(output.as_str()))
        {
            names_read(&node, &mut needed);
            kept.push(node);
        }
    }
    kept.reverse();
    graph.node = kept;
    graph
        .initializer
        .retain(|tensor| needed.contains(tensor.name()));
    graph.sparse_initializer.retain(|tensor| {
        tensor
            .values
            .as_ref()
            .is_some_and(|values| needed.contains(values.name()))
    });
    graph.input.retain(|input| needed.contains(input.name()));
    graph.value_info.clear();
    graph.quantization_annotation.clear();
}

/// The value names that a node reads, those of its subgraphs included.
fn names_read(node: &NodeProto, names: &mut HashSet<String>) {
    names.extend(node.input.iter().cloned());
    for attribute in &node.attribute {
        for graph in attribute.g.as_deref().into_iter().chain(&attribute.graphs) {
            names.extend(graph.output.iter().map(|output| output.name().to_owned()));
            for node in &graph.node {
                names_read(node, names);
            }
        }
    }
}

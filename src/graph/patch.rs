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
//! That is a layer of the language model. No position of the vision encoder predicts a token: there every
//! position counts, weighted by `vision_mask`, and a second output tells their number.
//!
//! In: a model, the MLPs to tap, and which [`Outputs`] are wanted. Out: a [`Patch`], a list of added
//! nodes, inputs and outputs. [`Patch::apply`] gives the patched model, without the nodes,
//! initializers and inputs that its outputs do not need: for coefficients alone that drops the
//! layers above the last tap, the final norm, `lm_head` and the key/value outputs, and of the last layer's
//! MLP the rows that do not count (`early_rows`).
//!
//! Promises: the coefficient is read *before* the gate, so a gate never weighs itself; rows are
//! gathered first and summed in float32, so float16 sums do not overflow; gates of 1 leave every
//! value bit-identical.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::branch::{self, Branch};
use super::early_rows;
use super::element_type;
use super::index::{Index, NodeId, ScopeId};
use super::rename::{names, rename};
use super::{Error, LayerId, Mlp, Tower};
use crate::onnx::schema::tensor_shape_proto::dimension;
use crate::onnx::schema::{
    AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, attribute_proto::AttributeType,
    tensor_shape_proto::Dimension, type_proto,
};
use crate::onnx::{DataType, List, ModelFile, Text, int_attribute};

/// Name of the added input: float32 `[B, T]`, the weight of each position in the sums. For the
/// method it is 1 where the next token belongs to the answer, else 0.
pub const ANSWER_MASK: &str = "answer_mask";

/// Name of the added input: float32 `[1]` or `[positions]`, the weight of each position of the vision
/// encoder in the sums of its layers, in the order in which its layers have them (all axes but the
/// channels' flattened). One weight serves all positions.
pub const VISION_MASK: &str = "vision_mask";

/// Name of the added output that holds what the positions of `layer`, a layer of the vision encoder, weigh
/// together: a float32 scalar.
pub fn positions_name(layer: LayerId) -> String {
    format!("kvw.layers.{layer}.positions")
}

/// Name of the added input that holds the gate of `layer`: float32 `[d_ff]`.
pub fn gate_name(layer: LayerId) -> String {
    format!("kvw.layers.{layer}.gate")
}

/// Name of the added output that holds the weighted sum of `layer`: float32 `[d_ff]`.
pub fn sum_name(layer: LayerId) -> String {
    format!("kvw.layers.{layer}.sum")
}

/// Name of the added output that holds the raw hidden activation of `layer`:
/// float32 `[B, T, d_ff]`, or `[B·T, d_ff]` where the graph has it so.
pub fn hidden_name(layer: LayerId) -> String {
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
    /// The sums of this moment over the counted positions, and nothing else.
    Sums(Moment),
    /// The same, beside the model's own outputs: for the vision encoder, whose features are wanted too.
    ModelAndSums(Moment),
    /// The same sums, beside those of the model's own outputs that are computed on the way to them: the keys
    /// and values of the layers up to the last one tapped.
    SumsAndCache(Moment),
    /// The raw hidden activations, and nothing else: for verification.
    Hidden,
    /// The model's own outputs (logits, key/value cache): for evaluation.
    Model,
}

/// A change to a graph, as data.
pub struct Patch {
    /// By layer, ascending.
    taps: Vec<Tap>,
    outputs: Outputs,
    opset: i64,
    /// The branch that takes the place of its `If`.
    branch: Option<Branch>,
}

/// What is done for one layer.
struct Tap {
    layer: LayerId,
    d_ff: i64,
    /// Every place where `h` is read; more than one where a weight is used twice, or in two branches.
    places: Vec<Place>,
}

/// A place where `h` is read.
#[derive(Clone)]
struct Place {
    scope: ScopeId,
    /// Position of the reader among the nodes of that graph.
    node: usize,
    input_position: usize,
    hidden: String,
    /// Type of the hidden activation, where it is known: they are multiplied as they are.
    data_type: Option<DataType>,
    /// Axes behind the channels: 0 for `[.., d_ff]`, 2 for a `Conv`'s `[B, d_ff, H, W]`.
    trailing_axes: usize,
}

impl Patch {
    /// Plans the patch of `model` at `mlps`.
    ///
    /// In a file that merges two decoders in one `If`, sums and hidden activations are those of the
    /// branch for a prompt, which takes the place of the `If`; the model's own outputs keep both
    /// branches, and both are gated.
    ///
    /// # Errors
    /// An MLP without a layer number, two of the same layer in one graph, or one whose activation
    /// cannot be reached; a model whose operators are too old, or whose inputs have reserved names.
    pub fn plan(model: &ModelFile, mlps: &[&Mlp<'_>], outputs: Outputs) -> Result<Patch, Error> {
        let mut patch = Patch {
            taps: Vec::new(),
            outputs,
            opset: model.opset(),
            branch: None,
        };
        let index = Index::new(model.graph());
        let mut taps: BTreeMap<LayerId, Tap> = BTreeMap::new();
        for mlp in mlps {
            let fail = |reason: String| Error::Instrument {
                path: model.path().to_owned(),
                layer: mlp.id(),
                node: mlp.sites.first().map_or("", |site| site.node).to_owned(),
                reason,
            };
            patch.check(model).map_err(fail)?;
            let layer = mlp
                .id()
                .ok_or_else(|| fail("no name tells its layer".into()))?;
            let d_ff = i64::try_from(mlp.d_ff).map_err(|_| fail("d_ff over 2^63".into()))?;
            let places = patch.places(&index, mlp).map_err(fail)?;
            let tap = taps.entry(layer).or_insert_with(|| Tap {
                layer,
                d_ff,
                places: Vec::new(),
            });
            // Copies of one layer stand in different branches.
            let together = |place: &Place| tap.places.iter().any(|p| p.scope == place.scope);
            if tap.d_ff != d_ff || places.iter().any(together) {
                return Err(fail("another MLP has the same layer".into()));
            }
            tap.places.extend(places);
            if outputs == Outputs::Hidden && tap.places.len() > 1 {
                return Err(fail("its weight is used at more than one place".into()));
            }
        }
        patch.taps = taps.into_values().collect();
        if let Some(tap) = patch.taps.iter().find(|tap| tap.places.is_empty()) {
            return Err(Error::Instrument {
                path: model.path().to_owned(),
                layer: Some(tap.layer),
                node: String::new(),
                reason: "it stands only in the branch that a prompt does not take".into(),
            });
        }
        Ok(patch)
    }

    fn check(&self, model: &ModelFile) -> Result<(), String> {
        if self.opset < NON_ZERO {
            return Err(format!(
                "expected operators of opset {NON_ZERO} or newer, found opset {}",
                self.opset
            ));
        }
        let ports = model.graph().input.iter().chain(&model.graph().output);
        let mut names = ports.map(ValueInfoProto::name);
        let taken = |name: &&str| [ANSWER_MASK, VISION_MASK].contains(name);
        match names.find(|name| taken(name) || name.starts_with(RESERVED)) {
            Some(name) => Err(format!("the model has an input or output '{name}' already")),
            None => Ok(()),
        }
    }

    /// The places of `mlp` that the patch changes. Finds the branch to take.
    fn places(&mut self, index: &Index<'_>, mlp: &Mlp<'_>) -> Result<Vec<Place>, String> {
        let mut places = Vec::new();
        for site in &mlp.sites {
            let scope = site.hidden.reader.scope;
            if scope != ScopeId::MAIN && !self.outputs.are_the_models() {
                let branch = Branch::of_prompt(index, scope)?;
                if *self.branch.get_or_insert(branch) != branch {
                    return Err("it stands in a branch of another If than other layers".into());
                }
                if branch.scope != scope {
                    continue;
                }
            }
            let data_type = element_type::of_hidden(index, site);
            if data_type.is_none() && self.opset < CAST_LIKE {
                return Err("the type of its activation is not known".into());
            }
            let rank = site.down.weight.tensor.dims.len();
            places.push(Place {
                scope,
                node: site.hidden.reader.index,
                input_position: site.hidden.position,
                hidden: site.hidden.name.to_owned(),
                data_type,
                trailing_axes: match site.down.op {
                    "Conv" => rank.saturating_sub(2),
                    _ => 0,
                },
            });
        }
        Ok(places)
    }

    /// The tapped layers with their `d_ff`, in ascending order.
    pub fn layers(&self) -> Vec<(LayerId, usize)> {
        let layers = self.taps.iter();
        layers
            .filter_map(|tap| Some((tap.layer, usize::try_from(tap.d_ff).ok()?)))
            .collect()
    }

    /// The patched model. Weights are shared with `model`, not copied.
    pub fn apply(&self, model: &ModelFile) -> ModelProto {
        let mut graph = model.graph().clone();
        self.apply_to(&mut graph);
        let mut proto = model.without_graph();
        proto.graph = Some(graph);
        // Older versions want every initializer among the inputs as well.
        let version = proto.ir_version.unwrap_or_default();
        proto.ir_version = Some(version.max(FREE_INITIALIZERS));
        proto
    }

    fn apply_to(&self, graph: &mut GraphProto) {
        // A model that was weakened by a `Mul` holds values with names like ours.
        let reserved = names(graph)
            .into_iter()
            .filter(|name| name.starts_with(RESERVED));
        let renamed = reserved.map(|name| (name.clone(), format!("model.{name}").into()));
        let renamed: HashMap<Text, Text> = renamed.collect();
        rename(graph, &renamed);
        let mut added = List::new();
        if self.outputs.moment().is_some() {
            graph
                .input
                .push(value_info(ANSWER_MASK, DataType::FLOAT, &[None, None]));
            graph
                .input
                .push(value_info(VISION_MASK, DataType::FLOAT, &[None]));
            graph.initializer.push(int64s("kvw.flat", &[-1]));
            graph.initializer.push(int64s("kvw.column", &[-1, 1]));
            graph.initializer.push(int64s("kvw.first_axis", &[0]));
            added.extend([
                node("Reshape", &[ANSWER_MASK, "kvw.flat"], "kvw.mask"),
                node("NonZero", &["kvw.mask"], "kvw.rows.nonzero"),
                node("Reshape", &["kvw.rows.nonzero", "kvw.flat"], ROWS),
                node("Gather", &["kvw.mask", ROWS], "kvw.weights.flat"),
                node(
                    "Reshape",
                    &["kvw.weights.flat", "kvw.column"],
                    "kvw.weights",
                ),
                node(
                    "Reshape",
                    &[VISION_MASK, "kvw.column"],
                    "kvw.vision.weights",
                ),
            ]);
        }
        let mut rebuilt = Rebuilt {
            patch: self,
            places: HashMap::new(),
            taken: match self.branch {
                Some(_) => defined(graph),
                None => HashSet::new(),
            },
            next: ScopeId::MAIN,
            initializer: List::new(),
            sparse_initializer: List::new(),
        };
        for tap in &self.taps {
            for (number, place) in tap.places.iter().enumerate() {
                let at = (place.scope, place.node);
                let mut place = place.clone();
                if let Some(name) = renamed.get(place.hidden.as_str()) {
                    place.hidden = name.to_string();
                }
                rebuilt.places.insert(at, (tap, number, place));
            }
            let gate = value_info(&gate_name(tap.layer), DataType::FLOAT, &[Some(tap.d_ff)]);
            graph.input.push(gate);
        }
        rebuilt.graph(graph);
        graph.initializer.append(&mut rebuilt.initializer);
        graph
            .sparse_initializer
            .append(&mut rebuilt.sparse_initializer);
        added.append(&mut graph.node);
        graph.node = added;
        if self.outputs.moment().is_some() {
            for tap in self.taps.iter().filter(|tap| tap.places.len() > 1) {
                let mut add = |part: &str, total: String| {
                    let parts = (0..tap.places.len()).map(|number| tap.name(number, part));
                    let parts: Vec<String> = parts.collect();
                    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                    graph.node.push(node("Sum", &parts, &total));
                };
                add(PARTIAL_SUM, sum_name(tap.layer));
                if tap.counts_itself() {
                    add(PARTIAL_POSITIONS, positions_name(tap.layer));
                }
            }
        }
        let mut own = match self.outputs.are_the_models() {
            true => Default::default(),
            false => std::mem::take(&mut graph.output),
        };
        graph.output.extend(self.added_outputs());
        if let Outputs::SumsAndCache(_) = self.outputs {
            let (_, kept) = needed(graph);
            let nodes = graph.node.iter().enumerate();
            let kept = nodes.filter(|(index, _)| kept.contains(index));
            let made: HashSet<&str> = kept
                .flat_map(|(_, node)| node.output.iter().map(|name| name.as_str()))
                .collect();
            own.retain(|output| made.contains(output.name()));
            graph.output.append(&mut own);
        }
        drop_unneeded(graph);
        if self.outputs.moment().is_some() {
            early_rows::gather_early(graph, ROWS);
        }
    }

    /// Adds what one place needs; returns the name of the gated activation.
    fn add_tap(
        &self,
        tap: &Tap,
        number: usize,
        place: &Place,
        initializer: &mut List<TensorProto>,
        nodes: &mut List<NodeProto>,
    ) -> String {
        let name = |suffix: &str| tap.name(number, suffix);
        let hidden = place.hidden.as_str();
        match self.outputs {
            Outputs::Sums(moment)
            | Outputs::ModelAndSums(moment)
            | Outputs::SumsAndCache(moment) => {
                let rows = self.channels_last(tap, number, place, nodes);
                initializer.push(int64s(&name("rows_shape"), &[-1, tap.d_ff]));
                nodes.push(node(
                    "Reshape",
                    &[&rows, &name("rows_shape")],
                    &name("all_rows"),
                ));
                let (counted, weights) = match tap.counts_itself() {
                    true => {
                        self.add_positions(tap, number, nodes);
                        (name("all_rows"), "kvw.vision.weights")
                    }
                    false => {
                        nodes.push(node("Gather", &[&name("all_rows"), ROWS], &name("rows")));
                        (name("rows"), "kvw.weights")
                    }
                };
                nodes.push(cast(&counted, &name("rows_float"), DataType::FLOAT));
                nodes.push(match moment {
                    Moment::Absolute => node("Abs", &[&name("rows_float")], &name("moment")),
                    Moment::Square => node(
                        "Mul",
                        &[&name("rows_float"), &name("rows_float")],
                        &name("moment"),
                    ),
                });
                nodes.push(node("Mul", &[&name("moment"), weights], &name("weighted")));
                let sum = match tap.places.len() {
                    1 => sum_name(tap.layer),
                    _ => name(PARTIAL_SUM),
                };
                nodes.push(self.reduce_sum(&name("weighted"), &sum));
            }
            Outputs::Hidden => {
                let rows = self.channels_last(tap, number, place, nodes);
                nodes.push(cast(&rows, &hidden_name(tap.layer), DataType::FLOAT));
            }
            Outputs::Model => {}
        }
        let mut gate = gate_name(tap.layer);
        if place.trailing_axes > 0 {
            let mut shape = vec![1; place.trailing_axes + 1];
            if let Some(channels) = shape.first_mut() {
                *channels = tap.d_ff;
            }
            initializer.push(int64s(&name("gate_shape"), &shape));
            nodes.push(node(
                "Reshape",
                &[&gate, &name("gate_shape")],
                &name("gate_column"),
            ));
            gate = name("gate_column");
        }
        let gated = name("gated");
        if place.data_type == Some(DataType::FLOAT) {
            nodes.push(node("Mul", &[hidden, &gate], &gated));
        } else {
            // The gate stays float32: rounded to float16 it would lose small gates, and the product
            // would be rounded twice.
            nodes.push(cast(hidden, &name("hidden_float"), DataType::FLOAT));
            nodes.push(node(
                "Mul",
                &[&name("hidden_float"), &gate],
                &name("gated_float"),
            ));
            nodes.push(match place.data_type {
                Some(data_type) => cast(&name("gated_float"), &gated, data_type),
                None => node("CastLike", &[&name("gated_float"), hidden], &gated),
            });
        }
        gated
    }

    /// Adds what the positions of a place weigh together.
    fn add_positions(&self, tap: &Tap, number: usize, nodes: &mut List<NodeProto>) {
        let name = |suffix: &str| tap.name(number, suffix);
        let total = match tap.places.len() {
            1 => positions_name(tap.layer),
            _ => name(PARTIAL_POSITIONS),
        };
        nodes.push(node("Shape", &[&name("all_rows")], &name("all_rows_shape")));
        nodes.push(node(
            "Gather",
            &[&name("all_rows_shape"), "kvw.first_axis"],
            &name("row_count"),
        ));
        nodes.push(node(
            "Expand",
            &[VISION_MASK, &name("row_count")],
            &name("row_weights"),
        ));
        nodes.push(self.reduce_sum(&name("row_weights"), &total));
    }

    /// The name of `h` with its channels last.
    fn channels_last(
        &self,
        tap: &Tap,
        number: usize,
        place: &Place,
        nodes: &mut List<NodeProto>,
    ) -> String {
        if place.trailing_axes == 0 {
            return place.hidden.clone();
        }
        let name = tap.name(number, "channels_last");
        let mut transpose = node("Transpose", &[&place.hidden], &name);
        let axes = (2..=place.trailing_axes + 1).filter_map(|axis| i64::try_from(axis).ok());
        transpose.attribute.push(AttributeProto {
            name: Some("perm".into()),
            r#type: Some(AttributeType::Ints as i32),
            ints: [0].into_iter().chain(axes).chain([1]).collect(),
            ..Default::default()
        });
        nodes.push(transpose);
        name
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
                ints: [0].into(),
                ..Default::default()
            });
            sum
        };
        sum.attribute.push(int_attribute("keepdims", 0));
        sum
    }

    fn added_outputs(&self) -> Vec<ValueInfoProto> {
        let mut outputs = Vec::new();
        for tap in &self.taps {
            if self.outputs == Outputs::Hidden {
                outputs.push(ValueInfoProto {
                    name: Some(hidden_name(tap.layer).into()),
                    r#type: Some(tensor_type(DataType::FLOAT, None)),
                    ..Default::default()
                });
            }
            if self.outputs.moment().is_some() {
                let sum = sum_name(tap.layer);
                outputs.push(value_info(&sum, DataType::FLOAT, &[Some(tap.d_ff)]));
                if tap.counts_itself() {
                    let positions = positions_name(tap.layer);
                    outputs.push(value_info(&positions, DataType::FLOAT, &[]));
                }
            }
        }
        outputs
    }
}

impl Outputs {
    /// The moment whose sums are wanted.
    pub fn moment(self) -> Option<Moment> {
        match self {
            Outputs::Sums(moment)
            | Outputs::ModelAndSums(moment)
            | Outputs::SumsAndCache(moment) => Some(moment),
            Outputs::Hidden | Outputs::Model => None,
        }
    }

    /// Whether the model's own outputs are wanted.
    fn are_the_models(self) -> bool {
        matches!(self, Outputs::Model | Outputs::ModelAndSums(_))
    }
}

/// How sums and numbers of positions are called where a layer stands in several places.
const PARTIAL_SUM: &str = "partial_sum";
const PARTIAL_POSITIONS: &str = "partial_positions";

impl Tap {
    /// Whether its positions are not those of tokens, so that it tells how many it counted.
    fn counts_itself(&self) -> bool {
        self.layer.tower() == Tower::Vision
    }

    /// The name of a value that is added at the place `number`.
    fn name(&self, number: usize, suffix: &str) -> String {
        match number {
            0 => format!("kvw.layers.{}.{suffix}", self.layer),
            _ => format!("kvw.layers.{}.{number}.{suffix}", self.layer),
        }
    }
}

/// The graphs of a model while taps are put into them.
struct Rebuilt<'p> {
    patch: &'p Patch,
    /// By graph and reader: the tap, the number of the place, the place.
    places: HashMap<(ScopeId, usize), (&'p Tap, usize, Place)>,
    /// Names of the main graph, where a branch will be unfolded into it.
    taken: HashSet<String>,
    /// The graph that is entered next.
    next: ScopeId,
    /// What goes to the main graph.
    initializer: List<TensorProto>,
    sparse_initializer: List<SparseTensorProto>,
}

impl Rebuilt<'_> {
    /// Puts the taps into `graph` and its subgraphs, which are numbered as by [`Index::new`].
    fn graph(&mut self, graph: &mut GraphProto) {
        let scope = self.next;
        self.next = scope.next();
        let mut nodes = List::with_capacity(graph.node.len());
        for (position, mut original) in std::mem::take(&mut graph.node).into_iter().enumerate() {
            for attribute in &mut original.attribute {
                let inner = attribute.g.as_deref_mut().into_iter();
                inner
                    .chain(&mut attribute.graphs)
                    .for_each(|inner| self.graph(inner));
            }
            if let Some((tap, number, place)) = self.places.get(&(scope, position)) {
                let patch = self.patch;
                let gated = patch.add_tap(tap, *number, place, &mut self.initializer, &mut nodes);
                if let Some(input) = original.input.get_mut(place.input_position) {
                    *input = gated.into();
                }
            }
            let id = NodeId {
                scope,
                index: position,
            };
            match self.patch.branch {
                Some(branch) if branch.owner == id => self.unfold(original, &mut nodes),
                _ => nodes.push(original),
            }
        }
        graph.node = nodes;
    }

    /// Puts the nodes of a branch in the place of `owner`.
    fn unfold(&mut self, mut owner: NodeProto, nodes: &mut List<NodeProto>) {
        let chosen = owner
            .attribute
            .iter_mut()
            .find(|a| a.name() == branch::ELSE);
        if let Some(mut inner) = chosen.and_then(|attribute| attribute.g.take()) {
            branch::unfold(&owner, &mut inner, &self.taken);
            nodes.append(&mut inner.node);
            self.initializer.append(&mut inner.initializer);
            self.sparse_initializer
                .append(&mut inner.sparse_initializer);
        }
    }
}

impl std::fmt::Display for Patch {
    /// What the patch does, a line per layer: for logs and tests.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for tap in &self.taps {
            for place in &tap.places {
                writeln!(
                    f,
                    "layer {}: {:?} of '{}' [{}], gate before node {}",
                    tap.layer, self.outputs, place.hidden, tap.d_ff, place.node
                )?;
            }
        }
        Ok(())
    }
}

/// The names that `graph` itself defines.
fn defined(graph: &GraphProto) -> HashSet<String> {
    let inputs = graph.input.iter().map(|input| input.name());
    let tensors = graph.initializer.iter().map(|tensor| tensor.name());
    let outputs = graph.node.iter().flat_map(|node| &node.output);
    let names = inputs.chain(tensors).chain(outputs.map(Text::as_str));
    names.map(str::to_owned).collect()
}

/// The first opsets with `CastLike` and with `NonZero`.
const CAST_LIKE: i64 = 15;
const NON_ZERO: i64 = 9;

/// The first IR version in which an initializer need not be an input as well.
const FREE_INITIALIZERS: i64 = 4;

/// The positions that count: int64 `[rows]`, of the flattened `[B · T]`.
const ROWS: &str = "kvw.rows";

/// How the names of what is added begin.
const RESERVED: &str = "kvw.";

pub(super) fn node(op_type: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op_type.into()),
        name: Some(format!("{output}/{op_type}").into()),
        input: inputs.iter().map(|&input| input.into()).collect(),
        output: [output.into()].into(),
        ..Default::default()
    }
}

pub(super) fn cast(input: &str, output: &str, to: DataType) -> NodeProto {
    let mut cast = node("Cast", &[input], output);
    cast.attribute
        .push(int_attribute("to", i64::from(to.code())));
    cast
}

pub(super) fn int64s(name: &str, values: &[i64]) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        data_type: Some(DataType::INT64.code()),
        dims: [i64::try_from(values.len()).unwrap_or_default()].into(),
        int64_data: values.into(),
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
                None => dimension::Value::DimParam(format!("{name}.{axis}").into()),
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
    let (needed, kept) = needed(graph);
    let mut index = 0..;
    graph
        .node
        .retain(|_| index.next().is_some_and(|index| kept.contains(&index)));
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

/// What the outputs of `graph` are computed from: the names of values, and the positions of nodes.
fn needed(graph: &GraphProto) -> (HashSet<Text>, HashSet<usize>) {
    let outputs = graph.output.iter();
    let mut needed: HashSet<Text> = outputs.filter_map(|output| output.name.clone()).collect();
    // Nodes need not be in topological order: some converters put the casts of inputs at the end.
    let mut by_output: HashMap<&str, usize> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        by_output.extend(node.output.iter().map(|output| (output.as_str(), index)));
    }
    let mut kept = HashSet::new();
    let mut waiting: Vec<Text> = needed.iter().cloned().collect();
    while let Some(name) = waiting.pop() {
        let Some(&index) = by_output.get(name.as_str()) else {
            continue;
        };
        let Some(node) = graph.node.get(index).filter(|_| kept.insert(index)) else {
            continue;
        };
        let mut read = HashSet::new();
        names_read(node, &mut read);
        waiting.extend(read.into_iter().filter(|name| needed.insert(name.clone())));
    }
    (needed, kept)
}

/// The value names that a node reads, those of its subgraphs included.
fn names_read(node: &NodeProto, names: &mut HashSet<Text>) {
    names.extend(node.input.iter().cloned());
    for attribute in &node.attribute {
        for graph in attribute.g.as_deref().into_iter().chain(&attribute.graphs) {
            names.extend(graph.output.iter().filter_map(|output| output.name.clone()));
            for node in &graph.node {
                names_read(node, names);
            }
        }
    }
}

//! Finding the MLPs of a transformer by topology, not by name.
//!
//! ```text
//!            x                          x
//!        ┌───┴───┐                      │
//!     gate_proj  up_proj              up_proj
//!        │       │                      │
//!       act      │                     act
//!        └──Mul──┘                      │
//!            │ h  [.., d_ff]            │ h
//!        down_proj                  down_proj
//!            │                          │
//!     … ──► Add (residual)       … ──► Add (residual)
//!          gated                      plain
//! ```
//!
//! In: an [`Index`]. Out: every [`Mlp`], one entry per distinct `down_proj` weight. Anchor: a
//! [`Linear`] whose input, walked up through elementwise and shape operators, meets at least one
//! activation function and ends in linear layers that all read the same value and are as wide as
//! the anchor's input (or twice as wide: a fused `gate_up`). Attention never matches: softmax is
//! not elementwise. Normalizations never match: a mean is not elementwise.
//!
//! Names decide nothing but the layer's number and the tower: traced exports lose weight names
//! (`onnx::MatMul_1134`, `val_313`), and keep the module path in node names or metadata.

use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;

use regex::Regex;

use super::index::{Index, NodeId, Origin, ScopeId};
use super::linear::Linear;
use crate::onnx::schema::NodeProto;

/// Which part of the model an MLP belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tower {
    /// A decoder layer of the language model: what the method weakens.
    Language,
    /// A layer of the vision encoder.
    Vision,
    /// Between the two: its output does not join a residual stream.
    Projector,
}

/// How the hidden activation is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Gating {
    /// `h = act(up(x))`.
    Plain,
    /// `h = act(gate(x)) ⊙ up(x)`, two linear layers.
    Gated,
    /// The same from one linear layer of width 2·d_ff, split in half.
    Fused,
}

/// One place where an MLP's down projection stands. A merged graph holds two, one per branch.
#[derive(Clone, Debug)]
pub struct Site<'m> {
    /// The down projection.
    pub down: Linear<'m>,
    /// Its node name (may be empty).
    pub node: &'m str,
}

/// An MLP: the weight of its down projection, and where it is used.
#[derive(Clone, Debug)]
pub struct Mlp<'m> {
    /// Layer number, where a name tells it.
    pub layer: Option<usize>,
    /// Part of the model.
    pub tower: Tower,
    /// Width of the hidden activation: the number of knowledge vectors.
    pub d_ff: u64,
    /// Width of the residual stream.
    pub d_model: u64,
    /// Form of the hidden activation.
    pub gating: Gating,
    /// Every use of the weight as a down projection; at least one.
    pub sites: Vec<Site<'m>>,
}

impl<'m> Mlp<'m> {
    /// The down projection at its first site.
    pub fn down(&self) -> &Linear<'m> {
        // `find` makes no MLP without a site.
        self.sites
            .first()
            .map_or_else(|| unreachable!("an MLP without a site"), |site| &site.down)
    }
}

/// Finds the MLPs of the graph. `role` is the tower that the file is known to hold, if it is known.
pub fn find<'m>(index: &Index<'m>, role: Option<Tower>) -> Vec<Mlp<'m>> {
    let mut by_weight: BTreeMap<(ScopeId, &str), Mlp<'m>> = BTreeMap::new();
    let mut order = Vec::new();
    for (id, node) in index.nodes() {
        let Some(down) = Linear::at(index, id, node) else {
            continue;
        };
        let Some(gating) = hidden_form(index, &down) else {
            continue;
        };
        let key = (down.weight.scope, down.weight.tensor.name());
        let site = Site {
            node: node.name(),
            down,
        };
        if let Some(mlp) = by_weight.get_mut(&key) {
            mlp.sites.push(site);
            continue;
        }
        let tower = match (joins_residual(index, id, node), role) {
            (false, _) => Tower::Projector,
            (true, Some(role)) => role,
            (true, None) => tower_of_names(node),
        };
        let layer = if tower == Tower::Projector {
            None
        } else {
            layer_of(node, &site.down)
        };
        order.push(key);
        by_weight.insert(
            key,
            Mlp {
                layer,
                tower,
                d_ff: site.down.k,
                d_model: site.down.n,
                gating,
                sites: vec![site],
            },
        );
    }
    order
        .into_iter()
        .filter_map(|key| by_weight.remove(&key))
        .collect()
}

/// Numbers the MLPs of `tower` by their order in the graph, where none of them has a number and
/// there are exactly `expected`. Traced graphs are in execution order, which is layer order.
pub fn number_by_order(mlps: &mut [Mlp<'_>], tower: Tower, expected: usize) {
    let mut unnumbered: Vec<&mut Mlp<'_>> = mlps.iter_mut().filter(|m| m.tower == tower).collect();
    if unnumbered.len() == expected && unnumbered.iter().all(|mlp| mlp.layer.is_none()) {
        for (layer, mlp) in unnumbered.iter_mut().enumerate() {
            mlp.layer = Some(layer);
        }
    }
}

/// Activation functions, as single operators or as the telling part of a chain (`Sigmoid` of SiLU,
/// `Erf` and `Tanh` of GELU).
const ACTIVATIONS: &[&str] = &[
    "Sigmoid",
    "Tanh",
    "Erf",
    "Relu",
    "LeakyRelu",
    "Elu",
    "Selu",
    "Celu",
    "Softplus",
    "Softsign",
    "HardSigmoid",
    "HardSwish",
    "Mish",
    "Gelu",
    "FastGelu",
    "QuickGelu",
    "BiasGelu",
    "Swish",
    "Silu",
    "ThresholdedRelu",
    "PRelu",
];

/// Operators that keep each hidden channel to itself: elementwise arithmetic and changes of form.
const ELEMENTWISE: &[&str] = &[
    "Mul",
    "Add",
    "Sub",
    "Div",
    "Neg",
    "Pow",
    "Sqrt",
    "Abs",
    "Min",
    "Max",
    "Clip",
    "Where",
    "Identity",
    "Cast",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Transpose",
    "Split",
    "Slice",
    "Dropout",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
];

/// Of these only the first input is data; the others are shapes, axes, scales.
const FIRST_INPUT_ONLY: &[&str] = &[
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Transpose",
    "Split",
    "Slice",
    "Cast",
    "Identity",
    "Dropout",
    "Clip",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
];

/// An MLP's elementwise part is some twenty nodes; more is something else.
const MAX_NODES: usize = 64;

/// Walks up from the input of `down`: the form of its hidden activation, or `None` where it is no
/// MLP.
fn hidden_form(index: &Index<'_>, down: &Linear<'_>) -> Option<Gating> {
    let mut waiting = vec![(down.id.scope, down.input)];
    let mut seen = HashSet::new();
    let mut sources: BTreeMap<NodeId, Linear<'_>> = BTreeMap::new();
    let mut activated = false;
    while let Some((scope, name)) = waiting.pop() {
        if name.is_empty() || index.is_constant(scope, name) {
            continue;
        }
        let Origin::Node { id, output } = index.origin(scope, name) else {
            return None;
        };
        // A dynamic quantizer's scale and zero point: numbers about the data, not the data.
        let node = index.node(id)?;
        if node.op_type() == "DynamicQuantizeLinear" && output > 0 {
            continue;
        }
        if !seen.insert(id) {
            continue;
        }
        if seen.len() > MAX_NODES {
            return None;
        }
        if let Some(source) = Linear::at(index, id, node) {
            activated |= source.fused_activation;
            sources.insert(id, source);
            continue;
        }
        activated |= ACTIVATIONS.contains(&node.op_type());
        if !ACTIVATIONS.contains(&node.op_type()) && !ELEMENTWISE.contains(&node.op_type()) {
            return None;
        }
        let inputs = if FIRST_INPUT_ONLY.contains(&node.op_type()) {
            1
        } else {
            node.input.len()
        };
        waiting.extend(
            node.input
                .iter()
                .take(inputs)
                .map(|input| (id.scope, input.as_str())),
        );
    }
    let inputs: HashSet<_> = sources
        .values()
        .map(|source| unwrapped(index, source.id.scope, source.input))
        .collect();
    if !activated || inputs.len() != 1 {
        return None;
    }
    let widths: Vec<u64> = sources.values().map(|source| source.n).collect();
    match widths.as_slice() {
        [width] if *width == down.k => Some(Gating::Plain),
        [width] if Some(*width) == down.k.checked_mul(2) => Some(Gating::Fused),
        [gate, up] if *gate == down.k && *up == down.k => Some(Gating::Gated),
        _ => None,
    }
}

/// The value behind casts, reshapes and quantizers: two linear layers read the same activation even
/// where an exporter gave each its own copy of them.
fn unwrapped<'m>(index: &Index<'m>, scope: ScopeId, name: &'m str) -> (ScopeId, &'m str) {
    let (mut scope, mut name) = (scope, name);
    for _ in 0..super::index::MAX_CHAIN {
        match index.origin(scope, name) {
            Origin::Node { id, .. } => match index.node(id) {
                Some(node)
                    if matches!(
                        node.op_type(),
                        "Reshape"
                            | "Cast"
                            | "Identity"
                            | "DynamicQuantizeLinear"
                            | "QuantizeLinear"
                            | "DequantizeLinear"
                    ) =>
                {
                    match node.input.first() {
                        Some(input) => (scope, name) = (id.scope, input),
                        None => break,
                    }
                }
                _ => break,
            },
            _ => break,
        }
    }
    (scope, name)
}

/// Operators between a down projection and the residual addition: biases, scales, casts, and the
/// normalization after an MLP that some families have (as one operator or a chain).
const AFTER_DOWN: &[&str] = &[
    "Cast",
    "Reshape",
    "Identity",
    "Dropout",
    "Mul",
    "Div",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "ReduceMean",
    "Sub",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "RMSNormalization",
    "Squeeze",
    "Unsqueeze",
    "QuantizeLinear",
    "DequantizeLinear",
];

/// Whether the output of `node` joins a residual stream: an addition with another activation.
fn joins_residual(index: &Index<'_>, id: NodeId, node: &NodeProto) -> bool {
    let mut waiting: Vec<(NodeId, &NodeProto)> = vec![(id, node)];
    let mut seen = HashSet::new();
    while let Some((id, node)) = waiting.pop() {
        for output in &node.output {
            for &reader_id in index.consumers(id.scope, output) {
                let Some(reader) = index.node(reader_id) else {
                    continue;
                };
                if !seen.insert(reader_id) || seen.len() > MAX_NODES {
                    continue;
                }
                match reader.op_type() {
                    "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => return true,
                    "Add" => {
                        let constant = reader
                            .input
                            .iter()
                            .any(|input| index.is_constant(reader_id.scope, input));
                        if !constant {
                            return true;
                        }
                        waiting.push((reader_id, reader));
                    }
                    op if AFTER_DOWN.contains(&op) => waiting.push((reader_id, reader)),
                    _ => {}
                }
            }
        }
    }
    false
}

/// `layers.3`, `h.3`, `blocks.3`, `blk.3`, also with `/` or `_` before the number.
static LAYER: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?:^|[^A-Za-z])(?:layers?|h|blocks|blk)[./_](\d{1,6})(?:[^0-9]|$)").ok()
});

/// Module paths of vision towers, as exporters write them into names.
static VISION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?i)vision|visual|image_encoder|vit[./_]").ok());

/// The names that may hold a module path, most telling first: the node's, its metadata's (dynamo
/// writes scopes there), the weight's, the output's.
fn names<'a>(node: &'a NodeProto, down: Option<&'a Linear<'_>>) -> Vec<&'a str> {
    let mut names = vec![node.name()];
    names.extend(node.metadata_props.iter().map(|entry| entry.value()));
    names.extend(down.map(|down| down.weight.tensor.name()));
    names.extend(node.output.iter().map(String::as_str));
    names
}

fn layer_of(node: &NodeProto, down: &Linear<'_>) -> Option<usize> {
    let pattern = LAYER.as_ref()?;
    names(node, Some(down))
        .into_iter()
        .find_map(|name| pattern.captures(name)?.get(1)?.as_str().parse().ok())
}

fn tower_of_names(node: &NodeProto) -> Tower {
    let vision = VISION.as_ref().is_some_and(|pattern| {
        names(node, None)
            .into_iter()
            .any(|name| pattern.is_match(name))
    });
    if vision {
        Tower::Vision
    } else {
        Tower::Language
    }
}

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
//! What looks like an MLP, or hides one, and is not understood is [`Refused`] with a reason: a mixture
//! of experts, a weight that is chosen at run time, a low-rank adapter beside a projection.
//!
//! Names decide nothing but the layer's number and the tower: traced exports lose weight names
//! (`onnx::MatMul_1134`, `val_313`), and keep the module path in node names or metadata.

use std::collections::{BTreeMap, HashSet};
use std::sync::LazyLock;

use regex::Regex;

use super::LayerId;
use super::bypass::{self, Up};
use super::encoding::Stored;
use super::index::{Index, NodeId, Origin, ScopeId};
use super::linear::{Linear, Linears};
use crate::onnx::Text;
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
    /// Where `h` is read in floating point on the way to the down projection.
    pub hidden: Hidden<'m>,
    /// The layer whose output channels `h` is linear in, or why there is none.
    pub up: Result<Up<'m>, String>,
}

/// The hidden activation, where the down projection, or the quantizer before it, reads it.
#[derive(Clone, Copy, Debug)]
pub struct Hidden<'m> {
    /// The value's name, as the reader sees it.
    pub name: &'m str,
    /// The down projection or the quantizer.
    pub reader: NodeId,
    /// Position among the reader's inputs.
    pub position: usize,
}

/// Something that looks like an MLP, or may hide one, and is not understood.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Refused {
    /// The node's name (may be empty).
    pub node: String,
    /// Its operator.
    pub op: String,
    /// Why it is not taken for an MLP.
    pub reason: String,
}

/// What [`survey`] found.
#[derive(Clone, Debug, Default)]
pub struct Survey<'m> {
    /// The MLPs, in the graph's order.
    pub mlps: Vec<Mlp<'m>>,
    /// What was refused, in the graph's order.
    pub refused: Vec<Refused>,
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
    /// What its layer is called, where it has a number.
    pub fn id(&self) -> Option<LayerId> {
        LayerId::of(self.tower, self.layer?)
    }

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
    survey(index, role).mlps
}

/// Finds the MLPs of the graph, and what cannot be told from one.
pub fn survey<'m>(index: &Index<'m>, role: Option<Tower>) -> Survey<'m> {
    let linears = Linears::of(index);
    let mut by_weight: BTreeMap<(ScopeId, &str), Mlp<'m>> = BTreeMap::new();
    let mut order = Vec::new();
    let mut refused = Vec::new();
    for (id, node) in index.nodes() {
        let (site, gating) = match examine(index, &linears, id, node) {
            Verdict::Mlp(site, gating) => (*site, gating),
            Verdict::Other => continue,
            Verdict::Refused(reason) => {
                refused.push(Refused {
                    node: node.name().to_owned(),
                    op: node.op_type().to_owned(),
                    reason,
                });
                continue;
            }
        };
        let key = (site.down.weight.scope, site.down.weight.name);
        if let Some(mlp) = by_weight.get_mut(&key) {
            mlp.sites.push(site);
            continue;
        }
        let last = index.node(site.down.last).unwrap_or(node);
        let tower = match (joins_residual(index, site.down.last, last), role) {
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
    let mlps = order.into_iter().filter_map(|key| by_weight.remove(&key));
    Survey {
        mlps: mlps.collect(),
        refused,
    }
}

enum Verdict<'m> {
    /// A down projection.
    Mlp(Box<Site<'m>>, Gating),
    /// Nothing like an MLP.
    Other,
    /// Not to be told from one, and why.
    Refused(String),
}

fn examine<'m>(
    index: &Index<'m>,
    linears: &Linears<'m>,
    id: NodeId,
    node: &'m NodeProto,
) -> Verdict<'m> {
    let op = node.op_type();
    // `MoE`, `QMoE`, `MoEPacked`.
    if op.contains("MoE") {
        return Verdict::Refused("a mixture of experts: its activation cannot be reached".into());
    }
    if is_unknown_product(index, id, node)
        && let Some(input) = node.input.first()
        && ascend(index, linears, id, input).leads_to_a_product()
    {
        return Verdict::Refused("looks like a down projection of an unknown operator".into());
    }
    if !Linear::is_product(op) {
        return match hides_matrices(index, id, node) {
            true => Verdict::Refused("an unknown operator with several constant matrices".into()),
            false => Verdict::Other,
        };
    }
    let Some(down) = Linear::at(index, id, node) else {
        return match computed_weight(index, linears, id, node) {
            Some(reason) => Verdict::Refused(reason),
            None => Verdict::Other,
        };
    };
    let gating = match ascend(index, linears, id, down.input).form(index, linears, &down) {
        Ok(Some(gating)) => gating,
        Ok(None) => return Verdict::Other,
        Err(reason) => return Verdict::Refused(reason),
    };
    let hidden = match hidden(index, &down) {
        Ok(hidden) => hidden,
        Err(reason) => return Verdict::Refused(reason),
    };
    let up = match gating {
        Gating::Plain => Err("the MLP is not gated: its one branch passes the activation".into()),
        _ => bypass::find(index, linears, hidden.reader, hidden.name, down.k),
    };
    let node = node.name();
    Verdict::Mlp(
        Box::new(Site {
            down,
            node,
            hidden,
            up,
        }),
        gating,
    )
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

/// Numbers the MLPs of `tower` by their order in the graph, where some have no number or two have the
/// same: a vision encoder of two parts counts each from 0. Along a residual stream every order of a graph
/// is that of the layers.
pub fn number_once(mlps: &mut [Mlp<'_>], tower: Tower) {
    let mut found: Vec<&mut Mlp<'_>> = mlps.iter_mut().filter(|m| m.tower == tower).collect();
    let numbers: HashSet<Option<usize>> = found.iter().map(|mlp| mlp.layer).collect();
    if numbers.len() < found.len() || numbers.contains(&None) {
        for (layer, mlp) in found.iter_mut().enumerate() {
            mlp.layer = Some(layer);
        }
    }
}

/// Activation functions, as single operators or as the telling part of a chain (`Sigmoid` of SiLU,
/// `Erf` and `Tanh` of GELU).
pub(super) const ACTIVATIONS: &[&str] = &[
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

/// Operators of `com.microsoft` that read several constant matrices and are no MLPs, by a part of their
/// names: attention with its projections, rotation tables, normalization, lookups.
const NOT_HIDING: &[&str] = &[
    "Attention",
    "Embedding",
    "Normalization",
    "Gather",
    "Conv",
    "LSTM",
];

/// Whether a node is of a foreign operator set and reads two or more matrices that are constants:
/// what it does with them cannot be seen.
fn hides_matrices(index: &Index<'_>, id: NodeId, node: &NodeProto) -> bool {
    let standard = matches!(node.domain(), "" | "ai.onnx" | "ai.onnx.ml");
    if standard || NOT_HIDING.iter().any(|part| node.op_type().contains(part)) {
        return false;
    }
    let matrices = (0..node.input.len())
        .filter_map(|position| Stored::read(index, id, position))
        .filter(|stored| stored.tensor.dims.iter().filter(|&&dim| dim > 1).count() >= 2);
    matrices.count() >= 2
}

/// Why a product, whose input looks like the hidden activation of an MLP, has no weight that can be
/// followed to a constant.
fn computed_weight<'m>(
    index: &Index<'m>,
    linears: &Linears<'m>,
    id: NodeId,
    node: &'m NodeProto,
) -> Option<String> {
    let by = weight_computed_by(index, id, node)?;
    let way = ascend(index, linears, id, node.input.first()?);
    way.leads_to_a_product()
        .then(|| format!("looks like a down projection, but {by} computes its weight"))
}

/// Whether a node multiplies by a constant in a way that is not known: `GemmFloat8`, `MatMulFpQ4` and
/// whatever is added to `com.microsoft` next.
fn is_unknown_product(index: &Index<'_>, id: NodeId, node: &NodeProto) -> bool {
    let op = node.op_type();
    let product = (op.contains("MatMul") || op.contains("Gemm")) && !Linear::is_product(op);
    product && (1..node.input.len()).any(|position| Stored::read(index, id, position).is_some())
}

/// The operator that makes the second operand of a product out of constants: an expert is chosen, or a
/// weight is decoded in a way that is not known. `None` where it is an activation, as in attention:
/// between an activation and the constants above it stands another product.
fn weight_computed_by<'m>(index: &Index<'m>, id: NodeId, node: &'m NodeProto) -> Option<&'m str> {
    let (mut scope, mut name) = (id.scope, node.input.get(1)?.as_str());
    let mut by = None;
    for _ in 0..super::index::MAX_CHAIN {
        match index.origin(scope, name) {
            Origin::Initializer { .. } => return by,
            Origin::Node { id, .. } => {
                let node = index.node(id)?;
                match node.op_type() {
                    "Constant" => return by,
                    op if Linear::is_product(op) => return None,
                    op => by = by.or(Some(op)),
                }
                (scope, name) = (id.scope, node.input.first()?);
            }
            Origin::GraphInput | Origin::Unknown => return None,
        }
    }
    None
}

/// An MLP's elementwise part is some twenty nodes; more is something else.
pub(super) const MAX_NODES: usize = 64;

/// What lies above a value, up to the next linear layers.
struct Way<'m> {
    /// The linear layers.
    sources: BTreeMap<NodeId, Linear<'m>>,
    /// Whether an activation function was met.
    activated: bool,
    /// A product with a weight that is computed, or of an unknown operator.
    computed: Option<String>,
    /// The first thing met that no MLP has between its linear layers.
    blocked: Option<String>,
    /// Whether that was a product of two activations: what it gives is attention's.
    attention: bool,
}

/// Elementwise operators have two or three inputs; one with more is something else.
const MAX_INPUTS: usize = 16;

/// Walks up from the value `name`, as the node `reader` reads it, through elementwise and shape
/// operators.
fn ascend<'m>(index: &Index<'m>, linears: &Linears<'m>, reader: NodeId, name: &'m str) -> Way<'m> {
    let mut way = Way {
        sources: BTreeMap::new(),
        activated: false,
        computed: None,
        blocked: None,
        attention: false,
    };
    let mut waiting = vec![(reader.scope, name)];
    let mut seen = HashSet::new();
    while let Some((scope, name)) = waiting.pop() {
        if name.is_empty() || index.is_constant(scope, name) {
            continue;
        }
        let Origin::Node { id, output } = index.origin(scope, name) else {
            way.block(|| format!("'{name}' is a graph input"));
            continue;
        };
        let Some(node) = index.node(id) else { continue };
        let op = node.op_type();
        // A dynamic quantizer's scale and zero point: numbers about the data, not the data.
        if (op == "DynamicQuantizeLinear" && output > 0) || !seen.insert(id) {
            continue;
        }
        if seen.len() > MAX_NODES {
            way.block(|| format!("more than {MAX_NODES} nodes without a linear layer"));
            break;
        }
        if let Some(source) = linears.ending_at(id) {
            way.activated |= source.fused_activation;
            way.sources.insert(id, source.clone());
            continue;
        }
        if node.input.len() > MAX_INPUTS {
            way.block(|| format!("{op} '{}' has {} inputs", node.name(), node.input.len()));
            continue;
        }
        if is_unknown_product(index, id, node) {
            let unknown = || format!("{op} '{}' is an unknown operator", node.name());
            way.computed.get_or_insert_with(unknown);
            continue;
        }
        if Linear::is_product(op)
            && let Some(by) = weight_computed_by(index, id, node)
        {
            way.computed.get_or_insert_with(|| {
                format!("{by} computes the weight of {op} '{}'", node.name())
            });
            continue;
        }
        let activation = ACTIVATIONS.contains(&op);
        if let Some(op) = op.strip_prefix("QLinear") {
            // Elementwise, on integers: the hidden activation has no form in floating point.
            way.activated |= ACTIVATIONS.contains(&op);
            way.block(|| format!("QLinear{op} '{}' computes in integers", node.name()));
            waiting.extend(node.input.iter().map(|input| (id.scope, input.as_str())));
            continue;
        }
        if !activation && !ELEMENTWISE.contains(&op) {
            if ACTIVATION_NAME
                .as_ref()
                .is_some_and(|name| name.is_match(op))
            {
                way.activated = true;
                waiting.extend(node.input.iter().map(|input| (id.scope, input.as_str())));
            }
            way.attention |= Linear::is_product(op) || op.contains("Attention");
            way.block(|| format!("{op} '{}' is in between", node.name()));
            continue;
        }
        let inputs = if FIRST_INPUT_ONLY.contains(&op) {
            1
        } else {
            node.input.len()
        };
        let inputs = node.input.iter().take(inputs);
        let before = waiting.len();
        waiting.extend(
            inputs
                .map(|input| (id.scope, input.as_str()))
                .filter(|&(scope, input)| !index.is_constant(scope, input)),
        );
        // The activation of a constant (a learned gate of a residual) is a constant.
        way.activated |= activation && waiting.len() > before;
    }
    way
}

/// Operators that are activation functions by their name, though not known here.
static ACTIVATION_NAME: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?i)gelu|silu|relu|swiglu|geglu|swish").ok());

impl<'m> Way<'m> {
    fn block(&mut self, reason: impl FnOnce() -> String) {
        self.blocked.get_or_insert_with(reason);
    }

    /// Whether it goes through an activation function, elementwise, to a product.
    fn leads_to_a_product(&self) -> bool {
        let product = self.computed.is_some() || !self.sources.is_empty();
        self.activated && self.blocked.is_none() && product
    }

    /// The form of the hidden activation that `down` reads; `None` where it is no MLP.
    ///
    /// # Errors
    /// It looks like an MLP, and why it is not taken for one.
    fn form(
        &self,
        index: &Index<'m>,
        linears: &Linears<'m>,
        down: &Linear<'m>,
    ) -> Result<Option<Gating>, String> {
        // An attention's output may be gated too.
        if !self.activated || self.attention {
            return Ok(None);
        }
        if let (Some(computed), None) = (&self.computed, &self.blocked) {
            return Err(format!("looks like an MLP, but {computed}"));
        }
        if let Some(blocked) = &self.blocked {
            // Without a linear layer of the right width before it, it is a stem or a head.
            let widths = [Some(down.k), down.k.checked_mul(2)];
            let near = self
                .sources
                .values()
                .any(|source| widths.contains(&Some(source.n)));
            return match near {
                true => Err(format!("looks like an MLP, but {blocked}")),
                false => Ok(None),
            };
        }
        let inputs: HashSet<_> = self
            .sources
            .values()
            .map(|source| unwrapped(index, source.id.scope, source.input))
            .collect();
        if inputs.len() > 1 {
            let adapter =
                inputs
                    .iter()
                    .find_map(|&(scope, name)| match index.origin(scope, name) {
                        Origin::Node { id, .. } => linears.ending_at(id),
                        _ => None,
                    });
            return Err(match adapter.and_then(|adapter| index.node(adapter.id)) {
                Some(node) => format!(
                    "looks like an MLP, but a low-rank adapter is added to its input ('{}')",
                    node.name()
                ),
                None => format!(
                    "looks like an MLP, but its linear layers read {} different values",
                    inputs.len()
                ),
            });
        }
        let widths: Vec<u64> = self.sources.values().map(|source| source.n).collect();
        match widths.as_slice() {
            [width] if *width == down.k => Ok(Some(Gating::Plain)),
            [width] if Some(*width) == down.k.checked_mul(2) => Ok(Some(Gating::Fused)),
            [gate, up] if *gate == down.k && *up == down.k => Ok(Some(Gating::Gated)),
            [] => Ok(None),
            _ => Err(format!(
                "looks like an MLP, but layers {widths:?} wide form an activation {} wide",
                down.k
            )),
        }
    }
}

/// Where `h` is read in floating point on the way to `down`.
///
/// # Errors
/// The quantized activation is read by something else too.
fn hidden<'m>(index: &Index<'m>, down: &Linear<'m>) -> Result<Hidden<'m>, String> {
    let mut hidden = Hidden {
        name: down.input,
        reader: down.id,
        position: down.input_position,
    };
    for _ in 0..super::index::MAX_CHAIN {
        let Origin::Node { id, .. } = index.origin(hidden.reader.scope, hidden.name) else {
            break;
        };
        let quantizer = index
            .node(id)
            .filter(|node| QUANTIZERS.contains(&node.op_type()));
        let Some(input) = quantizer.and_then(|node| node.input.first()) else {
            break;
        };
        let others = index.consumers(id.scope, hidden.name);
        if let Some(other) = others.iter().find(|&&other| other != hidden.reader) {
            let other = index.node(*other).map_or("", NodeProto::name);
            return Err(format!("its quantized activation is read by '{other}' too"));
        }
        hidden = Hidden {
            name: input,
            reader: id,
            position: 0,
        };
    }
    Ok(hidden)
}

/// Operators that give an activation its quantized form, and back.
const QUANTIZERS: &[&str] = &[
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
];

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
    "Transpose",
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
                if seen.len() > MAX_NODES {
                    return false;
                }
                if !seen.insert(reader_id) {
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
    names.extend(down.map(|down| down.weight.name));
    names.extend(node.output.iter().map(Text::as_str));
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

//! The branch of a gated MLP that bypasses the activation function.
//!
//! ```text
//!     h = act(gate_proj(x)) ⊙ up_proj(x)
//! ```
//!
//! In: the place where a down projection reads `h`. Out: the [`Up`] in which `h_j` is *linear*: multiply
//! its output channel `j`, biases included, by a factor, and `h_j` is multiplied by it. So a gate can
//! be written into the scales of a quantized weight. Which branch that is, the graph says: the factor of
//! the product that reaches a linear layer through operators that keep every channel to itself and
//! are linear, and whose values nothing else reads.

use std::ops::Range;

use super::encoding::Stored;
use super::index::{Index, NodeId, Origin, ScopeId};
use super::linear::{Linear, Linears};
use super::mlp::{ACTIVATIONS, MAX_NODES};
use crate::onnx::schema::NodeProto;
use crate::onnx::{DataType, Text, attribute};

/// The linear layer that bypasses the activation, and what else `h` is linear in with it.
#[derive(Clone, Debug)]
pub struct Up<'m> {
    /// The layer: `up_proj`, or a fused `gate_up`.
    pub linear: Linear<'m>,
    /// Its output channels that belong to the knowledge vectors `0..d_ff`, in this order. All of them,
    /// or the half of a fused layer that the graph's `Split` or `Slice` takes.
    pub channels: Range<u64>,
    /// What is added on the way to `h`: the layer's own bias, and separate `Add`s. Each must be
    /// multiplied too. Where the branch is rounded, only what is added after that.
    pub biases: Vec<Bias<'m>>,
    /// Where the branch is rounded to a fixed scale after the layer (static quantization): the layer's
    /// own weights then have no exact form, this scale has.
    pub rounding: Option<Rounding<'m>>,
}

/// A constant added to the branch.
#[derive(Clone, Debug)]
pub struct Bias<'m> {
    /// The constant; a scalar, or a vector over channels.
    pub stored: Stored<'m>,
    /// Its elements that belong to the knowledge vectors.
    pub channels: Range<u64>,
}

/// A `DequantizeLinear` of the branch, the last one before `h`, with one scale for all channels. As a
/// vector along the last axis it multiplies channels exactly.
#[derive(Clone, Debug)]
pub struct Rounding<'m> {
    /// The node.
    pub node: NodeId,
    /// Its scalar scale.
    pub scale: Stored<'m>,
    /// Its scalar zero point.
    pub zero_point: Option<Stored<'m>>,
    /// The channels of its output that belong to the knowledge vectors, and how many it has.
    pub channels: Range<u64>,
    /// Width of its last axis.
    pub width: u64,
}

/// The branch of `h`, the value `name` as the node `reader` reads it, `[.., width]`, that bypasses
/// the activation.
///
/// # Errors
/// Why there is none, naming the nodes in the way.
pub(super) fn find<'m>(
    index: &Index<'m>,
    linears: &Linears<'m>,
    reader: NodeId,
    name: &'m str,
    width: u64,
) -> Result<Up<'m>, String> {
    let mut paths = vec![Path {
        reader,
        scope: reader.scope,
        name,
        width,
        channels: 0..width,
        biases: Vec::new(),
        rounding: None,
    }];
    let mut reasons: Vec<String> = Vec::new();
    // Depth first, first operand first: `paths` is a stack.
    for _ in 0..MAX_NODES {
        let Some(path) = paths.pop() else { break };
        match path.step(index, linears) {
            Ok(Step::Arrived(up)) => return Ok(*up),
            Ok(Step::Further(further)) => paths.extend(further.into_iter().rev()),
            Err(reason) if reasons.contains(&reason) => {}
            Err(reason) => reasons.push(reason),
        }
    }
    let reasons = reasons.join("; ");
    Err(format!(
        "no linear layer bypasses the activation: {reasons}"
    ))
}

/// A way from `h` towards a linear layer, as far as it was followed.
#[derive(Clone)]
struct Path<'m> {
    /// The node that was come from.
    reader: NodeId,
    scope: ScopeId,
    /// The value that it reads.
    name: &'m str,
    /// Width of that value's last axis.
    width: u64,
    /// Which of its channels are the knowledge vectors.
    channels: Range<u64>,
    biases: Vec<Bias<'m>>,
    rounding: Option<Rounding<'m>>,
}

enum Step<'m> {
    Arrived(Box<Up<'m>>),
    Further(Vec<Path<'m>>),
}

impl<'m> Path<'m> {
    fn step(mut self, index: &Index<'m>, linears: &Linears<'m>) -> Result<Step<'m>, String> {
        let Origin::Node { id, output } = index.origin(self.scope, self.name) else {
            return Err(format!("'{}' is a graph input", self.name));
        };
        let Some(node) = index.node(id) else {
            return Err(format!("nothing produces '{}'", self.name));
        };
        self.read_by_nothing_else(index, id)?;
        if let Some(linear) = linears.ending_at(id) {
            return self.arrive(index, linear.clone());
        }
        let constant = |position| index.is_constant(id.scope, input(node, position));
        match node.op_type() {
            "Mul" => {
                let factors = (0..2).filter(|&position| !constant(position));
                let paths = factors.map(|position| self.clone().to(id, node, position));
                return Ok(Step::Further(paths.collect()));
            }
            "Div" if constant(1) => {}
            "Add" | "Sub" => {
                let Some(position) = (0..2).find(|&position| constant(position)) else {
                    return Err(format!("{} adds another activation", label(node)));
                };
                let Some(stored) = Stored::read(index, id, position) else {
                    return Err(format!("{} adds a computed bias", label(node)));
                };
                if self.rounding.is_none() {
                    let channels = self.channels.clone();
                    self.biases.push(Bias { stored, channels });
                }
                return Ok(Step::Further(vec![self.to(id, node, 1 - position)]));
            }
            "Cast" if casts_to_float(node) => {}
            "Neg" | "Identity" | "Dropout" => {}
            // Without a `Transpose` the elements keep their order, so the last axis, where it is as wide
            // again, is the channels again.
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => {}
            "Split" => self.split(index, id, node, output)?,
            "Slice" => self.slice(index, id, node)?,
            "DequantizeLinear" => self.round(index, id, node)?,
            "QuantizeLinear" if self.rounding.is_some() => {}
            op if ACTIVATIONS.contains(&op) => {
                return Err(format!("{} is an activation", label(node)));
            }
            _ => return Err(format!("{} is in between", label(node))),
        }
        Ok(Step::Further(vec![self.to(id, node, 0)]))
    }

    /// The path, one node further up.
    fn to(mut self, id: NodeId, node: &'m NodeProto, position: usize) -> Path<'m> {
        self.reader = id;
        self.scope = id.scope;
        self.name = input(node, position);
        self
    }

    /// Refuses a value that is read by more than the node that was come from. A `Shape` reads no
    /// values; a `Slice` beside a `Slice` was checked to take other channels.
    fn read_by_nothing_else(&self, index: &Index<'m>, producer: NodeId) -> Result<(), String> {
        if index.output_uses(producer.scope, self.name) > 0 {
            return Err(format!("'{}' is also an output", self.name));
        }
        let here = index.node(self.reader);
        let sliced = here.is_some_and(|node| node.op_type() == "Slice");
        let mut readings = 0;
        for &id in index.consumers(producer.scope, self.name) {
            let Some(node) = index.node(id) else { continue };
            match node.op_type() {
                "Shape" | "Size" => {}
                "Slice" if sliced && id != self.reader => {}
                _ if id == self.reader => readings += 1,
                _ => return Err(format!("{} reads '{}' too", label(node), self.name)),
            }
        }
        match readings {
            1 => Ok(()),
            _ => Err(format!("'{}' is multiplied by itself", self.name)),
        }
    }

    fn arrive(mut self, index: &Index<'m>, linear: Linear<'m>) -> Result<Step<'m>, String> {
        let node = index.node(linear.id);
        let label = || node.map_or_else(String::new, label);
        if linear.fused_activation {
            return Err(format!("{} applies an activation itself", label()));
        }
        if linear.n != self.width {
            let (n, width) = (linear.n, self.width);
            return Err(format!("{} has {n} output channels, not {width}", label()));
        }
        if linear.op == "Conv" && self.channels != (0..linear.n) {
            return Err(format!("the output of {} is split", label()));
        }
        if linear.has_computed_bias(index) {
            return Err(format!("{} adds a computed bias", label()));
        }
        if self.rounding.is_none() {
            if matches!(linear.weight.encoding, super::Encoding::QLinear(_)) {
                return Err(format!("{} rounds its output", label()));
            }
            self.biases.extend(linear.bias.map(|stored| Bias {
                stored,
                channels: self.channels.clone(),
            }));
        }
        Ok(Step::Arrived(Box::new(Up {
            linear,
            channels: self.channels,
            biases: self.biases,
            rounding: self.rounding,
        })))
    }

    /// Up through output `output` of a `Split` along the last axis.
    fn split(
        &mut self,
        index: &Index<'m>,
        id: NodeId,
        node: &NodeProto,
        output: usize,
    ) -> Result<(), String> {
        let axis = attribute(node, "axis").map_or(0, |axis| axis.i());
        let given = match attribute(node, "split") {
            Some(sizes) => Some(sizes.ints.to_vec()),
            None => match input(node, 1) {
                "" => None,
                sizes => Some(index.constant_ints(id.scope, sizes).unwrap_or_default()),
            },
        };
        let parts = node.output.len() as u64;
        let sizes: Option<Vec<u64>> = match given {
            Some(sizes) => sizes.into_iter().map(|size| size.try_into().ok()).collect(),
            None => Some(vec![self.width; node.output.len()]),
        };
        let sizes = sizes
            .filter(|sizes| sizes.len() as u64 == parts && sizes.get(output) == Some(&self.width));
        let Some(sizes) = sizes else {
            return Err(format!("{} splits into unknown parts", label(node)));
        };
        let before = sizes
            .iter()
            .take(output)
            .try_fold(0u64, |sum, &size| sum.checked_add(size));
        let total = sizes
            .iter()
            .try_fold(0u64, |sum, &size| sum.checked_add(size));
        let (Some(before), Some(total)) = (before, total) else {
            return Err(format!("{} splits into unknown parts", label(node)));
        };
        self.widen(index, id, node, axis, before, total)
    }

    /// Up through a `Slice` of one half of the last axis.
    fn slice(&mut self, index: &Index<'m>, id: NodeId, node: &NodeProto) -> Result<(), String> {
        let total = self.width.saturating_mul(2);
        let Some((axis, taken)) = sliced(index, id, node, total) else {
            return Err(format!("{} takes an unknown part", label(node)));
        };
        if taken.end - taken.start != self.width {
            return Err(format!(
                "{} takes {taken:?} of {total} channels",
                label(node)
            ));
        }
        for &other in index.consumers(id.scope, input(node, 0)) {
            let Some(beside) = index.node(other) else {
                continue;
            };
            if other == id || beside.op_type() != "Slice" {
                continue;
            }
            let disjoint =
                sliced(index, other, beside, total).is_some_and(|(other_axis, other)| {
                    other_axis == axis && (other.end <= taken.start || taken.end <= other.start)
                });
            if !disjoint {
                return Err(format!("{} takes some of the same channels", label(beside)));
            }
        }
        self.widen(index, id, node, axis, taken.start, total)
    }

    /// The value above is `total` wide, and ours begins at its channel `before`.
    fn widen(
        &mut self,
        index: &Index<'m>,
        id: NodeId,
        node: &NodeProto,
        axis: i64,
        before: u64,
        total: u64,
    ) -> Result<(), String> {
        let last = match index.rank(id.scope, input(node, 0)) {
            Some(rank) => {
                super::encoding::normalized(axis, rank).is_some_and(|axis| axis + 1 == rank)
            }
            // Of another axis than the last one, a part would not be as wide as `h`: axis 0 is tokens.
            None => axis == -1 || axis > 0,
        };
        if !last {
            return Err(format!("{} works along axis {axis}", label(node)));
        }
        if !keeps_last_axis(index, id.scope, input(node, 0), total) {
            return Err(format!("{} is applied to reshaped channels", label(node)));
        }
        self.channels = self.channels.start + before..self.channels.end + before;
        self.width = total;
        Ok(())
    }

    /// Up through a `DequantizeLinear`: whatever is above it is rounded.
    fn round(&mut self, index: &Index<'m>, id: NodeId, node: &'m NodeProto) -> Result<(), String> {
        if self.rounding.is_some() {
            return Ok(());
        }
        let scalar = |position| {
            Stored::read(index, id, position).filter(|stored| stored.elements() == Some(1))
        };
        let zero_point = scalar(2);
        let Some(scale) = scalar(1) else {
            return Err(format!("{} has no constant scalar scale", label(node)));
        };
        if zero_point.is_none() && !input(node, 2).is_empty() {
            return Err(format!("{} has no constant scalar zero point", label(node)));
        }
        self.rounding = Some(Rounding {
            node: id,
            scale,
            zero_point,
            channels: self.channels.clone(),
            width: self.width,
        });
        Ok(())
    }
}

/// The axis and the range, of `total` channels, that a `Slice` with step 1 takes.
fn sliced(
    index: &Index<'_>,
    id: NodeId,
    node: &NodeProto,
    total: u64,
) -> Option<(i64, Range<u64>)> {
    // Opset 1 has attributes in place of inputs.
    let ints = |position, name| match attribute(node, name) {
        Some(attribute) => Some(attribute.ints.to_vec()),
        None => index.constant_ints(id.scope, input(node, position)),
    };
    let one = |values: Option<Vec<i64>>| match values.as_deref() {
        Some(&[value]) => Some(value),
        _ => None,
    };
    let axis = one(ints(3, "axes"))?;
    if !input(node, 4).is_empty() && one(ints(4, "steps")) != Some(1) {
        return None;
    }
    let size = i64::try_from(total).ok()?;
    let clamped = |bound: i64| {
        let bound = if bound < 0 {
            bound.checked_add(size)?
        } else {
            bound
        };
        u64::try_from(bound.clamp(0, size)).ok()
    };
    let (start, end) = (
        clamped(one(ints(1, "starts"))?)?,
        clamped(one(ints(2, "ends"))?)?,
    );
    (start < end).then_some((axis, start..end))
}

/// Whether `name` still has the axes of the linear layer that it comes from: its last axis is known to
/// be `width` wide wherever a `Reshape` made it.
fn keeps_last_axis(index: &Index<'_>, scope: ScopeId, name: &str, width: u64) -> bool {
    let (mut scope, mut name) = (scope, name);
    for _ in 0..super::index::MAX_CHAIN {
        let Origin::Node { id, .. } = index.origin(scope, name) else {
            return true;
        };
        let Some(node) = index.node(id) else {
            return false;
        };
        match node.op_type() {
            "Reshape" => {
                let target = index.last_int(id.scope, input(node, 1));
                if target.and_then(|last| u64::try_from(last).ok()) != Some(width) {
                    return false;
                }
            }
            "Squeeze" | "Unsqueeze" | "Flatten" | "Transpose" => return false,
            op if Linear::is_product(op) => return true,
            _ => {}
        }
        (scope, name) = (id.scope, input(node, 0));
    }
    false
}

fn casts_to_float(node: &NodeProto) -> bool {
    attribute(node, "to")
        .and_then(|to| DataType::from_code(to.i().try_into().ok()?))
        .is_some_and(DataType::is_scalable_float)
}

fn input(node: &NodeProto, position: usize) -> &str {
    node.input.get(position).map_or("", Text::as_str)
}

/// How a reason names a node.
fn label(node: &NodeProto) -> String {
    format!("{} '{}'", node.op_type(), node.name())
}

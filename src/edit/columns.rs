//! The paper's own form: columns of `W_down`, multiplied where they are stored.
//!
//! In: an MLP. Out: its `W_down`, if that is a plain float matrix whose bytes can be rewritten and
//! which nothing but this MLP's down projections reads. A constant that an exporter merged with
//! another one must not be changed for both.

use std::collections::BTreeSet;

use super::form::{EditForm, Form, Subject, Target};
use crate::graph::NodeId;
use crate::onnx::{Storage, graphs};

pub(super) const FORM: Form = Form {
    kind: EditForm::Columns,
    target,
};

fn target<'m>(subject: &Subject<'_, 'm>) -> Result<Target<'m>, String> {
    let target = matrix(subject)?;
    let others = other_users(subject);
    if !others.is_empty() {
        let named: Vec<String> = others.into_iter().take(4).collect();
        return Err(format!("the weight is shared with {}", named.join(", ")));
    }
    Ok(target)
}

/// The stored `W_down`, whoever else reads it.
pub(super) fn matrix<'m>(subject: &Subject<'_, 'm>) -> Result<Target<'m>, String> {
    let down = subject.mlp.down();
    let weight = &down.weight;
    let quantized = ["MatMulNBits", "MatMulBnb4"].contains(&down.op);
    if quantized || weight.via.contains(&"DequantizeLinear") {
        return Err(
            "weights are quantized in blocks along d_ff; requantizing would lose accuracy; \
             not supported by this version"
                .to_owned(),
        );
    }
    if let Some(op) = weight.via.first() {
        return Err(format!("{op} between the stored weight and its use"));
    }
    let dtype = subject
        .model
        .data_type(weight.tensor)
        .map_err(|e| e.to_string())?;
    if !dtype.is_scalable_float() {
        return Err(format!(
            "weights are stored as {dtype}; requantizing would lose accuracy; \
             not supported by this version"
        ));
    }
    let dims = subject
        .model
        .dims(weight.tensor)
        .map_err(|e| e.to_string())?;
    let (Some(axis), &[rows, columns]) = (weight.input_axis, dims.as_slice()) else {
        return Err(format!("expected a stored matrix, found dims {dims:?}"));
    };
    let storage = subject
        .model
        .storage(weight.tensor)
        .map_err(|e| e.to_string())?;
    if storage == Storage::Typed {
        return Err(
            "stored in a typed field (float_data or int32_data), which cannot be rewritten in place"
                .to_owned(),
        );
    }
    Ok(Target {
        tensor: weight.tensor,
        storage,
        dtype,
        rows,
        columns,
        axis,
    })
}

/// Everything that reads the weight, through form-changing nodes, beside this MLP's down projections.
fn other_users(subject: &Subject<'_, '_>) -> BTreeSet<String> {
    let index = subject.index;
    let sites: BTreeSet<NodeId> = subject.mlp.sites.iter().map(|s| s.down.id).collect();
    let weight = &subject.mlp.down().weight;
    let mut others = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut waiting = vec![(weight.scope, weight.tensor.name())];
    while let Some((scope, name)) = waiting.pop() {
        // A subgraph may also name an outer value as its own output.
        let is_output = graphs(subject.model.proto())
            .iter()
            .any(|graph| graph.output.iter().any(|output| output.name() == name));
        if is_output {
            others.insert(format!("graph output '{name}'"));
        }
        for &id in index.consumers(scope, name) {
            let Some(node) = index.node(id) else { continue };
            let uses = node.input.iter().filter(|input| *input == name).count();
            match node.op_type() {
                _ if sites.contains(&id) && uses == 1 => {}
                "Identity" | "Transpose" if !sites.contains(&id) => {
                    if seen.insert(id) {
                        waiting
                            .extend(node.output.iter().map(|output| (id.scope, output.as_str())));
                    }
                }
                op => {
                    others.insert(format!("{op} '{}'", node.name()));
                }
            }
        }
    }
    others
}

//! Output channels of `up_proj`, by way of its scales.
//!
//! In: a gated MLP, `h = act(gate_proj(x)) ⊙ up_proj(x)`. Out: what to multiply so that output channel
//! `j` of `up_proj` is multiplied by gate `j`: then `h_j` is, because it is linear in that channel, and
//! then so is what knowledge vector `j` adds to the residual stream.
//!
//! | storage of `up_proj` | multiplied |
//! |---|---|
//! | `MatMulNBits`, `MatMulBnb4` | the rows of `scales`, of `absmax` |
//! | `DequantizeLinear` with a scale per channel or block | that channel's scales |
//! | one scale for all channels (int8) | the scalar becomes a vector of scales |
//! | rounded afterwards to a fixed scale (static QDQ) | that scale, where it is read again, becomes a vector |
//! | float | the channels themselves |
//!
//! Codes and zero points stay: `w = (q − zero_point) · scale`. Biases of the branch are multiplied too.
//! Which branch bypasses the activation, the graph says ([`Up`]).

use super::form::{Cost, EditForm, Form, Subject};
use super::recipe::{Array, Recipe, Rewrite, reachable, settle};
use crate::graph::{Bias, Encoding, NoSlices, Rounding, Slices, Stored, Up};
use crate::onnx::DataType;

pub(super) const FORM: Form = Form {
    kind: EditForm::Scales,
    recipe,
};

fn recipe<'m>(subject: &Subject<'_, 'm>) -> Result<Recipe<'m>, String> {
    let mut arrays = Vec::new();
    let mut vectors = Vec::new();
    for site in &subject.mlp.sites {
        let up = site.up.as_ref().map_err(Clone::clone)?;
        match &up.rounding {
            // The channels of a convolution are not its last axis.
            Some(_) if up.linear.op == "Conv" => return Err("a convolution is rounded".to_owned()),
            Some(rounding) => rounded(subject, rounding, &mut vectors)?,
            None => weight(subject, up, &mut arrays, &mut vectors)?,
        }
        for bias in &up.biases {
            add_bias(subject, bias, &mut arrays, &mut vectors)?;
        }
    }
    let (in_place, mut rewrites) = settle(subject, arrays)?;
    for vector in &vectors {
        match vector {
            Rewrite::Vector { readers, .. } | Rewrite::Repeat { readers, .. } => {
                reachable(subject, readers)?;
            }
            _ => {}
        }
    }
    rewrites.extend(merged(vectors));
    if in_place.is_empty() && rewrites.is_empty() {
        return Err("nothing of up_proj is stored".to_owned());
    }
    Ok(Recipe {
        form: EditForm::Scales,
        in_place,
        rewrites,
        cost: Cost::None,
    })
}

/// The channels of the layer's own weight.
fn weight<'m>(
    subject: &Subject<'_, 'm>,
    up: &Up<'m>,
    arrays: &mut Vec<Array<'m>>,
    vectors: &mut Vec<Rewrite<'m>>,
) -> Result<(), String> {
    let layer = &up.linear;
    match layer.weight.output_slices(layer.k, layer.n) {
        Ok(slices) => {
            arrays.push(Array::of(subject.model, &slices, &up.channels)?);
            Ok(())
        }
        Err(NoSlices::Inexact(reason)) => Err(reason),
        Err(NoSlices::PerTensor(scale)) => {
            let channels = range(&up.channels)?;
            let len = size(layer.n)?;
            vectors.push(Rewrite::Vector {
                scalar: scale,
                dtype: float(subject, &scale)?,
                len,
                channels,
                readers: vec![(scale.reader, scale.position)],
            });
            match &layer.weight.encoding {
                Encoding::Dequantized(dequantizer) => {
                    let outputs = layer.weight.input_axis.map(|axis| 1 - axis);
                    let axis = outputs.ok_or("its axes are not known")?;
                    let axis = i64::try_from(axis).map_err(|e| e.to_string())?;
                    let zero_point = dequantizer.zero_point;
                    per_channel(subject, dequantizer.node, axis, zero_point, len, vectors)
                }
                // The product of two scalar scales is annotated as a scalar.
                Encoding::Integer(_) => {
                    let product = subject.index.node(scale.reader);
                    let is_mul = product.is_some_and(|node| node.op_type() == "Mul");
                    if let Some(value) = product.and_then(|node| node.output.first())
                        && is_mul
                        && scale.reader != layer.last
                    {
                        let scope = scale.reader.scope;
                        vectors.push(Rewrite::Unannotate { scope, value });
                    }
                    Ok(())
                }
                _ => Err("one scale serves all channels".to_owned()),
            }
        }
    }
}

/// A `DequantizeLinear` of the activation, behind the rounding: its scalar scale becomes a vector.
fn rounded<'m>(
    subject: &Subject<'_, 'm>,
    rounding: &Rounding<'m>,
    vectors: &mut Vec<Rewrite<'m>>,
) -> Result<(), String> {
    let len = size(rounding.width)?;
    vectors.push(Rewrite::Vector {
        scalar: rounding.scale,
        dtype: float(subject, &rounding.scale)?,
        len,
        channels: range(&rounding.channels)?,
        readers: vec![(rounding.scale.reader, rounding.scale.position)],
    });
    per_channel(
        subject,
        rounding.node,
        -1,
        rounding.zero_point,
        len,
        vectors,
    )
}

/// What a `DequantizeLinear` needs beside a vector of scales: its axis, and as many zero points.
fn per_channel<'m>(
    subject: &Subject<'_, 'm>,
    node: crate::graph::NodeId,
    axis: i64,
    zero_point: Option<Stored<'m>>,
    len: usize,
    vectors: &mut Vec<Rewrite<'m>>,
) -> Result<(), String> {
    /// The first opset whose `DequantizeLinear` takes a scale per channel.
    const PER_CHANNEL: i64 = 13;
    let opset = subject.model.opset();
    if opset < PER_CHANNEL {
        return Err(format!(
            "DequantizeLinear of opset {opset} takes no scale per channel (from {PER_CHANNEL} on)"
        ));
    }
    vectors.push(Rewrite::Axis { node, axis });
    if let Some(zero_point) = zero_point {
        vectors.push(Rewrite::Repeat {
            scalar: zero_point,
            len,
            readers: vec![(zero_point.reader, zero_point.position)],
        });
    }
    Ok(())
}

/// A bias: multiplied where it lies; a scalar becomes a vector; zeros stay what they are.
fn add_bias<'m>(
    subject: &Subject<'_, 'm>,
    bias: &Bias<'m>,
    arrays: &mut Vec<Array<'m>>,
    vectors: &mut Vec<Rewrite<'m>>,
) -> Result<(), String> {
    let stored = bias.stored;
    let bytes = subject
        .model
        .bytes(stored.tensor)
        .map_err(|e| e.to_string())?;
    let dtype = float(subject, &stored)?;
    // 0 times any gate is 0, also where an exporter merged the zero biases of all layers into one.
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(());
    }
    let elements = stored.elements().unwrap_or_default();
    if elements == 1 && bias.channels.end > 1 {
        vectors.push(Rewrite::Vector {
            scalar: stored,
            dtype,
            len: size(bias.channels.end)?,
            channels: range(&bias.channels)?,
            readers: vec![(stored.reader, stored.position)],
        });
        return Ok(());
    }
    let slices = Slices {
        stored,
        rows: elements,
        columns: 1,
        axis: 0,
    };
    if elements < bias.channels.end {
        let (found, channels) = (elements, bias.channels.end);
        let name = stored.name;
        return Err(format!(
            "expected a bias of {channels} channels in '{name}', found {found}"
        ));
    }
    arrays.push(Array::of(subject.model, &slices, &bias.channels)?);
    Ok(())
}

/// Vectors and zero points that several sites of one MLP read are one.
fn merged(rewrites: Vec<Rewrite<'_>>) -> Vec<Rewrite<'_>> {
    let mut merged: Vec<Rewrite<'_>> = Vec::new();
    for rewrite in rewrites {
        let same = merged.iter_mut().find_map(|other| match (other, &rewrite) {
            (
                Rewrite::Vector {
                    scalar: a,
                    len: la,
                    channels: ca,
                    readers,
                    ..
                },
                Rewrite::Vector {
                    scalar: b,
                    len: lb,
                    channels: cb,
                    readers: more,
                    ..
                },
            ) if std::ptr::eq(a.tensor, b.tensor) && la == lb && ca == cb => Some((readers, more)),
            (
                Rewrite::Repeat {
                    scalar: a,
                    len: la,
                    readers,
                },
                Rewrite::Repeat {
                    scalar: b,
                    len: lb,
                    readers: more,
                },
            ) if std::ptr::eq(a.tensor, b.tensor) && la == lb => Some((readers, more)),
            _ => None,
        });
        match same {
            Some((readers, more)) => readers.extend(more),
            None => merged.push(rewrite),
        }
    }
    merged
}

fn float(subject: &Subject<'_, '_>, stored: &Stored<'_>) -> Result<DataType, String> {
    let dtype = subject
        .model
        .data_type(stored.tensor)
        .map_err(|e| e.to_string())?;
    match dtype.is_scalable_float() {
        true => Ok(dtype),
        false => Err(format!("'{}' is stored as {dtype}", stored.name)),
    }
}

fn size(size: u64) -> Result<usize, String> {
    usize::try_from(size).map_err(|_| format!("{size} elements"))
}

fn range(channels: &std::ops::Range<u64>) -> Result<std::ops::Range<usize>, String> {
    Ok(size(channels.start)?..size(channels.end)?)
}

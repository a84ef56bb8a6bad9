//! Whether the files of a folder are of one model, as far as their interfaces tell.
//!
//! In: the opened ONNX files. Out: nothing, or the first file that states another hidden size,
//! vocabulary or cache than those before it. Costs no look at a weight; two models of one
//! architecture and size are told apart by their weights, when an edit is planned.

use std::collections::BTreeMap;

use super::{Bundle, DecoderNames, Error, OnnxFile, Role};
use crate::onnx::ModelFile;
use crate::onnx::schema::tensor_shape_proto::dimension;
use crate::onnx::schema::{ValueInfoProto, type_proto};

/// Checks that `models`, files of `bundle`, belong together.
///
/// # Errors
/// [`Error::Mixed`].
pub fn check_one_model(bundle: &Bundle, models: &[(&OnnxFile, &ModelFile)]) -> Result<(), Error> {
    let mut known: BTreeMap<&'static str, (u64, String)> = BTreeMap::new();
    if let Some(width) = bundle.config().and_then(|config| config.hidden_size) {
        let width = u64::try_from(width).unwrap_or(u64::MAX);
        known.insert(HIDDEN, (width, "the configuration".to_owned()));
    }
    for (file, model) in models {
        for (what, found) in facts(file, model, bundle.decoder_names()) {
            match known.get(what) {
                None => {
                    known.insert(what, (found, file.relative.clone()));
                }
                Some((expected, _)) if *expected == found => {}
                Some((expected, by)) => {
                    return Err(Error::Mixed {
                        folder: bundle.folder().to_owned(),
                        file: file.relative.clone(),
                        what,
                        expected: *expected,
                        by: by.clone(),
                        found,
                    });
                }
            }
        }
    }
    Ok(())
}

const HIDDEN: &str = "a hidden size of";
const VOCABULARY: &str = "a vocabulary of";

/// What a file's inputs and outputs state, as far as they do.
fn facts(file: &OnnxFile, model: &ModelFile, names: &DecoderNames) -> Vec<(&'static str, u64)> {
    let graph = model.graph();
    let named = |values: &'_ [ValueInfoProto], name: &str| {
        let value = values.iter().find(|value| value.name() == name);
        value.map(dims).unwrap_or_default()
    };
    let first = |values: &[ValueInfoProto]| values.first().map(dims).unwrap_or_default();
    let mut facts = Vec::new();
    let mut add = |what, size: Option<u64>| facts.extend(size.map(|size| (what, size)));
    match file.role {
        Role::Decoder => {
            add(HIDDEN, third(&named(&graph.input, &names.inputs_embeds)));
            add(VOCABULARY, third(&named(&graph.output, &names.logits)));
            let cache: Vec<&ValueInfoProto> = (graph.input.iter())
                .filter(|input| names.present(input.name()).is_some())
                .collect();
            let layers = u64::try_from(cache.len()).ok().filter(|&count| count > 0);
            add("a number of cache inputs of", layers);
            let cache = cache.first().map(|input| dims(input)).unwrap_or_default();
            if let [_, heads, _, size] = cache.as_slice() {
                add("a number of key/value heads of", *heads);
                add("a head size of", *size);
            }
        }
        Role::EmbedTokens => add(HIDDEN, third(&first(&graph.output))),
        Role::LmHead => {
            add(HIDDEN, third(&first(&graph.input)));
            add(VOCABULARY, third(&first(&graph.output)));
        }
        Role::VisionEncoder | Role::Other => {}
    }
    facts
}

/// The last of three dimensions, `[B, T, size]`.
fn third(dims: &[Option<u64>]) -> Option<u64> {
    match dims {
        [_, _, size] => *size,
        _ => None,
    }
}

/// A value's dimensions, those that are left open as `None`.
fn dims(value: &ValueInfoProto) -> Vec<Option<u64>> {
    let of_type = value.r#type.as_ref().and_then(|of| of.value.as_ref());
    let Some(type_proto::Value::TensorType(tensor)) = of_type else {
        return Vec::new();
    };
    let shape = tensor.shape.as_ref();
    let dims = shape.into_iter().flat_map(|shape| &shape.dim);
    dims.map(|dim| match &dim.value {
        Some(dimension::Value::DimValue(size)) => u64::try_from(*size).ok().filter(|&s| s > 0),
        _ => None,
    })
    .collect()
}

//! The layout of onnxruntime-genai: `genai_config.json` is the map.
//!
//! Source: onnxruntime-genai 0.18, `models/builders/base.py` (`make_genai_config`) and
//! `src/config.cpp`. The files of `model.{decoder,vision,embedding}` lie where the map says; their
//! inputs and outputs are called what it says. Other models of a folder (speech, draft models) have
//! no part in what is run here.

use serde_json::Value;

use super::config::Document;
use super::{
    CacheNames, DecoderNames, Error, Layout, Phase, Recognition, Recognized, Role, Rule, Tree,
};

pub(super) const RULE: Rule = Rule {
    layout: Layout::OnnxruntimeGenai,
    looks_for: "a folder with genai_config.json",
    recognize,
};

/// The map.
pub(super) const MAP: &str = "genai_config.json";

/// The parts of a model, by their key in the map.
const PARTS: &[(&str, Role)] = &[
    ("decoder", Role::Decoder),
    ("vision", Role::VisionEncoder),
    ("embedding", Role::EmbedTokens),
];

fn recognize(tree: &Tree) -> Result<Option<Recognition>, Error> {
    let Some(map) = Document::open(tree, MAP)? else {
        return Ok(None);
    };
    if map.get("model.decoder.pipeline").is_some() {
        return Err(map.unsupported(
            "model.decoder.pipeline",
            "one decoder file",
            "a pipeline of several",
        ));
    }
    if map.get("model.decoder.inputs.block_table").is_some() {
        return Err(map.unsupported(
            "model.decoder.inputs.block_table",
            "a decoder with a contiguous cache",
            "one with paged attention",
        ));
    }
    let mut parts = Vec::new();
    for &(part, role) in PARTS {
        let key = format!("model.{part}.filename");
        let Some(value) = map.get(&key) else { continue };
        let Some(name) = value.as_str() else {
            return Err(map.wrong(key, "a file name", value));
        };
        if tree.get(name).is_none() {
            return Err(Error::MissingSibling {
                folder: tree.folder().to_owned(),
                looked_for: name.to_owned(),
                needed_by: format!("{MAP}: {key}"),
            });
        }
        parts.push((name.to_owned(), role));
    }
    if !parts.iter().any(|(_, role)| *role == Role::Decoder) {
        let found = map.get("model.decoder").unwrap_or(&Value::Null);
        return Err(map.wrong(
            "model.decoder.filename".to_owned(),
            "the decoder's file name",
            found,
        ));
    }
    let files = tree.onnx().map(|entry| {
        let part = parts.iter().find(|(name, _)| *name == entry.relative);
        Recognized {
            relative: entry.relative.clone(),
            role: part.map_or(Role::Other, |(_, role)| *role),
            variant: String::new(),
            phase: Phase::Any,
        }
    });
    Ok(Some(Recognition {
        files: files.collect(),
        names: names(&map)?,
    }))
}

/// The states that run along: their keys in the map's `inputs` and `outputs`, and the names that
/// onnxruntime-genai takes where the map has none.
const CACHE: &[[&str; 4]] = &[
    [
        "past_key_names",
        "past_key_values.%d.key",
        "present_key_names",
        "present.%d.key",
    ],
    [
        "past_value_names",
        "past_key_values.%d.value",
        "present_value_names",
        "present.%d.value",
    ],
    [
        "past_conv_names",
        "past.%d.conv",
        "present_conv_names",
        "present.%d.conv",
    ],
    [
        "past_recurrent_names",
        "past.%d.recurrent",
        "present_recurrent_names",
        "present.%d.recurrent",
    ],
];

/// The decoder's names, as the map has them.
fn names(map: &Document) -> Result<DecoderNames, Error> {
    let of = |place: &str, key: &str, default: &str| {
        let key = format!("model.decoder.{place}.{key}");
        match map.get(&key) {
            None => Ok(default.to_owned()),
            Some(value) => match value.as_str() {
                Some(name) => Ok(name.to_owned()),
                None => Err(map.wrong(key, "a name", value)),
            },
        }
    };
    let usual = DecoderNames::default();
    let cache = CACHE
        .iter()
        .map(|[past, default_past, present, default_present]| {
            Ok(CacheNames {
                past: of("inputs", past, default_past)?.replace("%d", "*"),
                present: vec![of("outputs", present, default_present)?.replace("%d", "*")],
            })
        })
        .collect::<Result<_, Error>>()?;
    Ok(DecoderNames {
        input_ids: of("inputs", "input_ids", &usual.input_ids)?,
        inputs_embeds: of("inputs", "inputs_embeds", &usual.inputs_embeds)?,
        attention_mask: of("inputs", "attention_mask", &usual.attention_mask)?,
        position_ids: of("inputs", "position_ids", &usual.position_ids)?,
        logits: of("outputs", "logits", &usual.logits)?,
        cache,
        head_size: map.count(&["model.decoder.head_size"])?,
    })
}

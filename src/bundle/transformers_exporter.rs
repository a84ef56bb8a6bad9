//! The layout of transformers' own exporter: `export.json` is the map.
//!
//! Source: transformers 5.23, `exporters/base.py` and `exporters/utils.py`. Text models come as
//! `prefill` and `decode`; models that see as `image_encoder`, a projector, `language_model` (the
//! prompt, from embeddings to hidden states), `lm_head` (those to logits) and `decode` (one more
//! token, from ids to logits, with its own copy of all weights).

use super::config::Document;
use super::{
    CacheNames, DecoderNames, Error, Layout, Phase, Recognition, Recognized, Role, Rule, Tree,
};

pub(super) const RULE: Rule = Rule {
    layout: Layout::TransformersExporter,
    looks_for: "a folder with export.json",
    recognize,
};

const MAP: &str = "export.json";

/// What each component does.
const COMPONENTS: &[(&str, Role, Phase)] = &[
    ("prefill", Role::Decoder, Phase::Prefill),
    ("language_model", Role::Decoder, Phase::Prefill),
    ("decode", Role::Decoder, Phase::Decode),
    ("model", Role::Decoder, Phase::Any),
    ("lm_head", Role::LmHead, Phase::Any),
    ("image_encoder", Role::VisionEncoder, Phase::Any),
];

fn recognize(tree: &Tree) -> Result<Option<Recognition>, Error> {
    let Some(map) = Document::open(tree, MAP)? else {
        return Ok(None);
    };
    let absent = serde_json::Value::Null;
    let format = map.get("export_format").unwrap_or(&absent);
    if format.as_str() != Some("onnx") {
        return Err(map.wrong("export_format".to_owned(), "\"onnx\"", format));
    }
    let components = map.get("components").unwrap_or(&absent);
    let Some(listed) = components.as_object() else {
        return Err(map.wrong("components".to_owned(), "an object", components));
    };
    let mut parts = Vec::new();
    for (name, component) in listed {
        let key = format!("components.{name}.file");
        let file = component.get("file").unwrap_or(&absent);
        let Some(file) = file.as_str() else {
            return Err(map.wrong(key, "a file name", file));
        };
        if tree.get(file).is_none() {
            return Err(Error::MissingSibling {
                folder: tree.folder().to_owned(),
                looked_for: file.to_owned(),
                needed_by: format!("{MAP}: {key}"),
            });
        }
        let known = COMPONENTS.iter().find(|(known, ..)| known == name);
        let (role, phase) =
            known.map_or((Role::Other, Phase::Any), |&(_, role, phase)| (role, phase));
        parts.push((file, role, phase));
    }
    let files = tree.onnx().map(|entry| {
        let part = parts.iter().find(|(file, ..)| *file == entry.relative);
        let (role, phase) =
            part.map_or((Role::Other, Phase::Any), |&(_, role, phase)| (role, phase));
        Recognized {
            relative: entry.relative.clone(),
            role,
            variant: String::new(),
            phase,
        }
    });
    // What the exporter makes of the attributes of transformers' cache classes.
    let cache = ["keys", "values"].map(|part| {
        let [input, output, prompt] =
            ["input.", "output.", ""].map(|side| format!("{side}past_key_values.layers.*.{part}"));
        CacheNames::new(&input, &[&output, &prompt])
    });
    Ok(Some(Recognition {
        files: files.collect(),
        names: DecoderNames {
            cache: cache.into(),
            ..DecoderNames::default()
        },
    }))
}

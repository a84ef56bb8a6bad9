//! The layout of transformers.js and onnx-community: components in `onnx/`, one file per precision.
//!
//! A file's name is its component's name and the precision's suffix: `decoder_model_merged_q4f16.onnx`.
//! Weights beyond 2 GB lie in `X.onnx_data`, `X.onnx_data_1`, …; how many there are is written in
//! `config.json`, and transformers.js loads exactly so many.
//! Source: transformers.js 3 and 4, `DEFAULT_DTYPE_SUFFIX_MAPPING`, `models/session.js`.

use serde_json::Value;

use super::config::Document;
use super::{DecoderNames, Error, Layout, Phase, Recognition, Recognized, Role, Rule, Tree};

pub(super) const RULE: Rule = Rule {
    layout: Layout::TransformersJs,
    looks_for: "a folder with onnx/decoder_model_merged*.onnx or onnx/model*.onnx",
    recognize,
};

/// Component names. One that begins another comes after it. Phi-3.5-vision has
/// `prepare_inputs_embeds` and `model`, Janus `prepare_inputs_embeds`, `language_model` and `lm_head`;
/// LFM2-VL's publisher calls its own `embed_images`, `embed_tokens` and `decoder`. Florence-2's
/// `encoder_model`, Janus' image generator and whatever reads sound are no part of what is run.
const COMPONENTS: &[(&str, Role, Phase)] = &[
    ("vision_encoder", Role::VisionEncoder, Phase::Any),
    ("embed_images", Role::VisionEncoder, Phase::Any),
    ("embed_tokens", Role::EmbedTokens, Phase::Any),
    ("prepare_inputs_embeds", Role::EmbedTokens, Phase::Any),
    ("decoder_model_merged", Role::Decoder, Phase::Any),
    ("decoder_with_past_model", Role::Decoder, Phase::Decode),
    ("decoder_model", Role::Decoder, Phase::Prefill),
    ("decoder", Role::Decoder, Phase::Any),
    ("language_model", Role::Decoder, Phase::Any),
    ("lm_head", Role::LmHead, Phase::Any),
    ("model", Role::Decoder, Phase::Any),
];

fn recognize(tree: &Tree) -> Result<Option<Recognition>, Error> {
    let files: Vec<Recognized> = tree
        .onnx()
        .map(|entry| named(&entry.relative, "onnx/", COMPONENTS))
        .collect();
    if !files.iter().any(|file| file.role == Role::Decoder) {
        return Ok(None);
    }
    check_chunks(tree)?;
    Ok(Some(Recognition {
        files,
        names: DecoderNames::default(),
    }))
}

/// What the file `relative` is, by its name in `folder`. Any suffix is a variant: a decoder in a
/// precision that does not exist yet must not be taken for something else, and so be left as it was.
pub(super) fn named(
    relative: &str,
    folder: &str,
    components: &[(&str, Role, Phase)],
) -> Recognized {
    let stem = relative
        .strip_prefix(folder)
        .and_then(|name| name.strip_suffix(".onnx"))
        .unwrap_or_default();
    let (role, phase, variant) = components
        .iter()
        .find_map(
            |&(name, role, phase)| match (stem.strip_prefix(name)?, stem.contains('/')) {
                (_, true) => None,
                ("", _) => Some((role, phase, "")),
                (rest, _) => Some((role, phase, rest.strip_prefix('_')?)),
            },
        )
        .unwrap_or((Role::Other, Phase::Any, ""));
    Recognized {
        relative: relative.to_owned(),
        role,
        variant: variant.to_owned(),
        phase,
    }
}

/// Where `config.json` counts the external data files of each ONNX file.
const COUNTS: &str = "transformers.js_config.use_external_data_format";
/// More than any model has; transformers.js refuses more too.
const MAX_CHUNKS: u64 = 100;

/// Checks that every ONNX file has the external data files that `config.json` says, and no more.
fn check_chunks(tree: &Tree) -> Result<(), Error> {
    let Some(config) = Document::open(tree, "config.json")? else {
        return Ok(());
    };
    let Some(counts) = config
        .value()
        .get("transformers.js_config")
        .and_then(|own| own.get("use_external_data_format"))
        .filter(|counts| !counts.is_null())
    else {
        return Ok(());
    };
    let count = |value: &Value| match value {
        Value::Bool(any) => Ok(u64::from(*any)),
        value => value
            .as_u64()
            .filter(|&count| count <= MAX_CHUNKS)
            .ok_or_else(|| config.wrong(COUNTS.to_owned(), "a count of files for each", value)),
    };
    for entry in tree.onnx() {
        let Some(name) = entry.relative.strip_prefix("onnx/") else {
            continue;
        };
        let found = (0..=MAX_CHUNKS)
            .take_while(|&chunk| tree.get(&chunk_name(&entry.relative, chunk)).is_some())
            .count();
        let found = u64::try_from(found).unwrap_or(u64::MAX);
        let expected = match counts {
            // The file's own count, else its component's in every precision, else none.
            Value::Object(counts) => {
                let component = named(&entry.relative, "onnx/", COMPONENTS);
                let stem = name.trim_end_matches(".onnx");
                let base = stem
                    .strip_suffix(&component.variant)
                    .map_or(stem, |base| base.trim_end_matches('_'));
                let stated = counts.get(name).or_else(|| counts.get(base));
                stated.map_or(Ok(0), count)?
            }
            // One number for all files: those without external data have none to count.
            counts if found > 0 => count(counts)?,
            counts => count(counts).map(|_| 0)?,
        };
        if found != expected {
            return Err(Error::Chunks {
                folder: tree.folder().to_owned(),
                file: entry.relative.clone(),
                expected,
                found,
            });
        }
    }
    Ok(())
}

fn chunk_name(onnx: &str, chunk: u64) -> String {
    match chunk {
        0 => format!("{onnx}_data"),
        chunk => format!("{onnx}_data_{chunk}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{COMPONENTS, Phase, Role, named};

    #[test]
    fn a_name_is_a_component_and_a_precision() {
        use Phase::{Any, Decode, Prefill};
        for (name, expected) in [
            ("onnx/decoder_model_merged.onnx", (Role::Decoder, Any, "")),
            (
                "onnx/decoder_model_merged_q4f16.onnx",
                (Role::Decoder, Any, "q4f16"),
            ),
            (
                "onnx/decoder_with_past_model_fp16.onnx",
                (Role::Decoder, Decode, "fp16"),
            ),
            ("onnx/decoder_model.onnx", (Role::Decoder, Prefill, "")),
            ("onnx/decoder_q4.onnx", (Role::Decoder, Any, "q4")),
            ("onnx/model_bnb4.onnx", (Role::Decoder, Any, "bnb4")),
            (
                "onnx/language_model_q2f16.onnx",
                (Role::Decoder, Any, "q2f16"),
            ),
            ("onnx/lm_head_fp16.onnx", (Role::LmHead, Any, "fp16")),
            (
                "onnx/vision_encoder_uint8.onnx",
                (Role::VisionEncoder, Any, "uint8"),
            ),
            ("onnx/embed_tokens.onnx", (Role::EmbedTokens, Any, "")),
            (
                "onnx/prepare_inputs_embeds_q4.onnx",
                (Role::EmbedTokens, Any, "q4"),
            ),
            ("onnx/encoder_model.onnx", (Role::Other, Any, "")),
            ("onnx/gen_head.onnx", (Role::Other, Any, "")),
            ("onnx/modelling.onnx", (Role::Other, Any, "")),
            ("decoder_model_merged.onnx", (Role::Other, Any, "")),
            ("onnx/deep/model.onnx", (Role::Other, Any, "")),
        ] {
            let found = named(name, "onnx/", COMPONENTS);
            assert_eq!(
                (found.role, found.phase, found.variant.as_str()),
                expected,
                "{name}"
            );
        }
    }
}

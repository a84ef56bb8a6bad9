//! The layout of transformers.js and onnx-community: components in `onnx/`, one file per precision.
//!
//! A file's name is its component's name and the precision's suffix: `decoder_model_merged_q4f16.onnx`.
//! Source: transformers.js 3 and 4, `DEFAULT_DTYPE_SUFFIX_MAPPING`.

use super::{Layout, Recognized, Role, Rule, Tree};

pub(super) const RULE: Rule = Rule {
    layout: Layout::TransformersJs,
    looks_for: "a folder with onnx/decoder_model_merged*.onnx",
    recognize,
};

/// Component names. One that begins another comes after it.
const COMPONENTS: &[(&str, Role)] = &[
    ("vision_encoder", Role::VisionEncoder),
    ("embed_tokens", Role::EmbedTokens),
    ("decoder_model_merged", Role::Decoder),
    ("decoder_with_past_model", Role::Decoder),
    ("decoder_model", Role::Decoder),
    ("model", Role::Decoder),
];

fn recognize(tree: &Tree) -> Option<Vec<Recognized>> {
    let files: Vec<Recognized> = tree
        .onnx()
        .map(|entry| {
            let (role, variant) = component(&entry.relative);
            Recognized {
                relative: entry.relative.clone(),
                role,
                variant: variant.to_owned(),
            }
        })
        .collect();
    files
        .iter()
        .any(|file| file.role == Role::Decoder)
        .then_some(files)
}

/// The role and the variant of a file. Any suffix is a variant: a decoder in a precision that does
/// not exist yet must not be taken for something else, and so be left as it was.
fn component(relative: &str) -> (Role, &str) {
    let stem = relative
        .strip_prefix("onnx/")
        .and_then(|name| name.strip_suffix(".onnx"))
        .unwrap_or_default();
    COMPONENTS
        .iter()
        .find_map(|&(name, role)| match stem.strip_prefix(name)? {
            "" => Some((role, "")),
            rest => Some((role, rest.strip_prefix('_')?)),
        })
        .unwrap_or((Role::Other, ""))
}

#[cfg(test)]
mod tests {
    use super::{Role, component};

    #[test]
    fn a_name_is_a_component_and_a_precision() {
        for (name, expected) in [
            ("onnx/decoder_model_merged.onnx", (Role::Decoder, "")),
            (
                "onnx/decoder_model_merged_q4f16.onnx",
                (Role::Decoder, "q4f16"),
            ),
            (
                "onnx/decoder_with_past_model_fp16.onnx",
                (Role::Decoder, "fp16"),
            ),
            ("onnx/model_bnb4.onnx", (Role::Decoder, "bnb4")),
            (
                "onnx/vision_encoder_uint8.onnx",
                (Role::VisionEncoder, "uint8"),
            ),
            ("onnx/embed_tokens.onnx", (Role::EmbedTokens, "")),
            ("onnx/modelling.onnx", (Role::Other, "")),
            ("decoder_model_merged.onnx", (Role::Other, "")),
            ("onnx/deep/model.onnx", (Role::Other, "")),
        ] {
            assert_eq!(component(name), expected, "{name}");
        }
    }
}

//! The layout of mobius-onnx: one folder per component, each with a `model.onnx`.
//!
//! Source: mobius-onnx 0.1.0 (`mobius build`).

use super::{DecoderNames, Error, Layout, Phase, Recognition, Recognized, Role, Rule, Tree};

pub(super) const RULE: Rule = Rule {
    layout: Layout::Mobius,
    looks_for: "a folder with decoder/model.onnx",
    recognize,
};

const COMPONENTS: &[(&str, Role)] = &[
    ("decoder/model.onnx", Role::Decoder),
    ("vision_encoder/model.onnx", Role::VisionEncoder),
    ("embedding/model.onnx", Role::EmbedTokens),
];

fn recognize(tree: &Tree) -> Result<Option<Recognition>, Error> {
    if tree.get("decoder/model.onnx").is_none() {
        return Ok(None);
    }
    let files = tree.onnx().map(|entry| {
        let known = COMPONENTS.iter().find(|(name, _)| *name == entry.relative);
        Recognized {
            relative: entry.relative.clone(),
            role: known.map_or(Role::Other, |(_, role)| *role),
            variant: String::new(),
            phase: Phase::Any,
        }
    });
    Ok(Some(Recognition {
        files: files.collect(),
        names: DecoderNames::default(),
    }))
}

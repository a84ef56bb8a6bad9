//! One `.onnx` file: given itself, or the only one of its folder.

use super::{DecoderNames, Error, Layout, Phase, Recognition, Recognized, Role, Rule, Tree};

pub(super) const RULE: Rule = Rule {
    layout: Layout::SingleFile,
    looks_for: "a folder with exactly one .onnx file",
    recognize,
};

pub(super) fn recognize(tree: &Tree) -> Result<Option<Recognition>, Error> {
    let mut onnx = tree.onnx();
    let (Some(only), None) = (onnx.next(), onnx.next()) else {
        return Ok(None);
    };
    Ok(Some(Recognition {
        files: vec![Recognized {
            relative: only.relative.clone(),
            role: Role::Decoder,
            variant: String::new(),
            phase: Phase::Any,
        }],
        names: DecoderNames::default(),
    }))
}

//! One `.onnx` file: given itself, or the only one of its folder.

use super::{Layout, Recognized, Role, Rule, Tree};

pub(super) const RULE: Rule = Rule {
    layout: Layout::SingleFile,
    looks_for: "a folder with exactly one .onnx file",
    recognize,
};

fn recognize(tree: &Tree) -> Option<Vec<Recognized>> {
    let mut onnx = tree.onnx();
    match (onnx.next(), onnx.next()) {
        (Some(only), None) => Some(vec![Recognized {
            relative: only.relative.clone(),
            role: Role::Decoder,
            variant: String::new(),
        }]),
        _ => None,
    }
}

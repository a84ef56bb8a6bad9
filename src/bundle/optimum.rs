//! The layout of optimum: decoders beside the configuration, in the folder itself.
//!
//! Today one `model.onnx` with a cache; before, `decoder_model.onnx` (the prompt),
//! `decoder_with_past_model.onnx` (one more token) and `decoder_model_merged.onnx` (both, behind an
//! `If` on `use_cache_branch`). A precision or an optimization is a suffix (`model_quantized.onnx`).
//! Source: optimum-onnx 0.1, `onnxruntime/constants.py`; optimum 1.24, `exporters/onnx`.

use super::transformers_js::named;
use super::{DecoderNames, Error, Layout, Phase, Recognition, Recognized, Role, Rule, Tree};

pub(super) const RULE: Rule = Rule {
    layout: Layout::Optimum,
    looks_for: "a folder with model.onnx or decoder_model*.onnx",
    recognize,
};

/// Component names. One that begins another comes after it.
const COMPONENTS: &[(&str, Role, Phase)] = &[
    ("decoder_model_merged", Role::Decoder, Phase::Any),
    ("decoder_with_past_model", Role::Decoder, Phase::Decode),
    ("decoder_model", Role::Decoder, Phase::Prefill),
    ("model", Role::Decoder, Phase::Any),
];

fn recognize(tree: &Tree) -> Result<Option<Recognition>, Error> {
    let files: Vec<Recognized> = tree
        .onnx()
        .map(|entry| named(&entry.relative, "", COMPONENTS))
        .collect();
    let some = files.iter().any(|file| file.role == Role::Decoder);
    // A lone file may be anybody's.
    Ok((some && files.len() > 1).then(|| Recognition {
        files,
        names: DecoderNames::default(),
    }))
}

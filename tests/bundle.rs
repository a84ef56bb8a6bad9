//! Model folders: what is recognized, what is refused, and how it is said.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

use std::fs;
use std::path::Path;

use kvw::bundle::{Bundle, Error, Layout, Role};
use tempfile::TempDir;

/// A folder with empty files of these names, and a configuration.
fn folder(names: &[&str], config: &str) -> TempDir {
    let temp = TempDir::new().unwrap();
    for name in names {
        let path = temp.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }
    if !config.is_empty() {
        fs::write(temp.path().join("config.json"), config).unwrap();
    }
    temp
}

const CONFIG: &str = r#"{"model_type": "qwen2_vl", "image_token_id": 9, "eos_token_id": 2,
    "text_config": {"num_hidden_layers": 3}, "vision_config": {}}"#;

const FILES: &[&str] = &[
    "onnx/decoder_model_merged.onnx",
    "onnx/decoder_model_merged_fp16.onnx",
    "onnx/decoder_model_merged_q4.onnx",
    "onnx/embed_tokens.onnx",
    "onnx/embed_tokens_q4.onnx",
    "onnx/vision_encoder_fp16.onnx",
];

fn open_error(path: &Path) -> Error {
    Bundle::open(path).map(|_| ()).unwrap_err()
}

#[test]
fn a_transformers_js_folder_is_understood() {
    let temp = folder(FILES, CONFIG);
    let generation = temp.path().join("generation_config.json");
    fs::write(generation, r#"{"eos_token_id": [4, 5]}"#).unwrap();
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::TransformersJs);
    assert_eq!(bundle.family(), Some("qwen2_vl"));
    assert_eq!(bundle.layers(), Some(3));
    let config = bundle.config().unwrap();
    assert_eq!(config.image_token_id, Some(9));
    assert_eq!(config.eos_token_ids, [4, 5]);
    assert_eq!(bundle.decoders().count(), 3);
    assert_eq!(bundle.tree().entries().count(), FILES.len() + 2);
}

#[test]
fn the_most_precise_variant_is_run_unless_another_is_named() {
    let temp = folder(FILES, CONFIG);
    let bundle = Bundle::open(temp.path()).unwrap();
    let names = |variant| {
        let chosen = bundle.components(variant).unwrap();
        let name = |file: &kvw::bundle::OnnxFile| file.variant.clone();
        (
            name(chosen.decoder),
            chosen.embed_tokens.map(name),
            chosen.vision_encoder.map(name),
        )
    };
    let (none, fp16, q4) = (String::new(), "fp16".to_owned(), "q4".to_owned());
    assert_eq!(
        names(None),
        (none.clone(), Some(none.clone()), Some(fp16.clone()))
    );
    assert_eq!(names(Some("fp32")), names(None));
    assert_eq!(
        names(Some("fp16")),
        (fp16.clone(), Some(none), Some(fp16.clone()))
    );
    assert_eq!(names(Some("q4")), (q4.clone(), Some(q4), Some(fp16)));
    let error = bundle.components(Some("int3")).unwrap_err();
    assert!(
        matches!(&error, Error::Variant { available, .. } if available == &["none", "fp16", "q4"])
    );
    assert_eq!(error.hint().unwrap(), "for example --variant none");
}

#[test]
fn without_a_full_precision_file_fp16_is_run() {
    let temp = folder(
        &["onnx/model_bnb4.onnx", "onnx/model_fp16.onnx"],
        r#"{"model_type": "llama"}"#,
    );
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.components(None).unwrap().decoder.variant, "fp16");
}

#[test]
fn eos_ids_come_from_the_configuration_where_nothing_else_names_them() {
    let temp = folder(FILES, CONFIG);
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.config().unwrap().eos_token_ids, [2]);
}

#[test]
fn an_unknown_layout_says_what_was_looked_for() {
    let temp = folder(&["a/x.onnx", "b/y.onnx"], "");
    let text = open_error(temp.path()).to_string();
    for part in [
        "onnx/decoder_model_merged*.onnx",
        "exactly one .onnx",
        "a/x.onnx, b/y.onnx",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let empty = folder(&[], "");
    assert!(
        open_error(empty.path())
            .to_string()
            .contains("no .onnx file")
    );
}

#[test]
fn a_lone_model_is_a_single_file_wherever_it_lies() {
    let temp = folder(&["model.onnx"], "");
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::SingleFile);
    assert_eq!(bundle.files()[0].role, Role::Decoder);
}

#[test]
fn a_decoder_without_its_embedding_is_named() {
    let temp = folder(
        &[
            "onnx/decoder_model_merged_q4.onnx",
            "onnx/vision_encoder.onnx",
        ],
        CONFIG,
    );
    let error = open_error(temp.path());
    assert!(matches!(error, Error::MissingSibling { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("onnx/embed_tokens*.onnx") && text.contains("decoder_model_merged_q4.onnx")
    );
}

#[test]
fn links_that_dangle_or_lead_out_and_pipes_are_refused() {
    let link = |target: &Path| {
        let temp = folder(FILES, CONFIG);
        std::os::unix::fs::symlink(target, temp.path().join("onnx/extra.bin")).unwrap();
        let error = open_error(temp.path());
        assert!(error.to_string().contains("onnx/extra.bin"), "{error}");
        error
    };
    assert!(matches!(link(Path::new("nowhere")), Error::Entry { .. }));
    assert!(matches!(
        link(Path::new("/etc/hostname")),
        Error::Entry { .. }
    ));
    assert!(matches!(link(Path::new("..")), Error::Kind { .. }));
    assert!(matches!(link(Path::new("extra.bin")), Error::Entry { .. }));

    let temp = folder(FILES, CONFIG);
    let pipe = temp.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let error = open_error(temp.path());
    assert!(
        matches!(
            error,
            Error::Kind {
                found: "a named pipe",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn what_an_interrupted_run_left_is_no_part_of_the_model() {
    let temp = folder(FILES, CONFIG);
    let partial = temp.path().join(".out.kvw-partial-123-abc");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("half.onnx"), "").unwrap();
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.tree().entries().count(), FILES.len() + 1);
}

#[test]
fn every_fault_of_a_configuration_is_named_by_file_and_key() {
    for (config, part) in [
        ("[]", "object"),
        ("{", "not valid JSON"),
        ("{}", "'model_type'"),
        (r#"{"model_type": 3}"#, "'model_type'"),
        (
            r#"{"model_type": "x", "num_hidden_layers": 0}"#,
            "'num_hidden_layers'",
        ),
        (
            r#"{"model_type": "x", "num_hidden_layers": 1e9}"#,
            "'num_hidden_layers'",
        ),
        (
            r#"{"model_type": "x", "text_config": {"num_hidden_layers": "3"}}"#,
            "'text_config.num_hidden_layers'",
        ),
        (
            r#"{"model_type": "x", "image_token_id": -1}"#,
            "'image_token_id'",
        ),
        (
            r#"{"model_type": "x", "eos_token_id": [1, "a"]}"#,
            "'eos_token_id'",
        ),
    ] {
        let temp = folder(FILES, config);
        let text = open_error(temp.path()).to_string();
        assert!(
            text.contains(part) && text.contains("config.json"),
            "{config}: {text}"
        );
    }
    let temp = folder(FILES, "");
    let large = fs::File::create(temp.path().join("config.json")).unwrap();
    large.set_len(kvw::bundle::MAX_JSON_BYTES + 1).unwrap();
    assert!(matches!(open_error(temp.path()), Error::TooLarge { .. }));
}

#[test]
fn a_path_that_is_not_there_is_an_error() {
    let error = open_error(Path::new("/nonexistent/model"));
    assert!(matches!(error, Error::Files(_)), "{error}");
}

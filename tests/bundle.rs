//! Model folders: what is recognized, what is refused, and how it is said.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

use std::fs;
use std::path::Path;

use kvw::bundle::{Bundle, Error, Layout, Phase, Role, check_one_model};
use kvw::onnx::{Limits, ModelFile};
use kvw::runtime::generate::Limit;
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
    assert_eq!((config.max_new_tokens, config.max_length), (None, None));
    assert_eq!(bundle.decoders().count(), 3);
    assert_eq!(bundle.tree().entries().count(), FILES.len() + 2);
}

#[test]
fn the_limit_of_an_answer_is_the_model_s_own() {
    let temp = folder(FILES, CONFIG);
    let generation = temp.path().join("generation_config.json");
    let write = |text: &str| fs::write(&generation, text).unwrap();
    for (text, limit) in [
        (r#"{}"#, Limit::NewTokens(50)),
        (r#"{"max_new_tokens": null}"#, Limit::NewTokens(50)),
        (r#"{"max_new_tokens": 7}"#, Limit::NewTokens(7)),
        (r#"{"max_length": 300}"#, Limit::Length(300)),
        (
            r#"{"max_length": 300, "max_new_tokens": 7}"#,
            Limit::NewTokens(7),
        ),
        // What transformers takes for its own default.
        (r#"{"max_length": 20}"#, Limit::NewTokens(20)),
    ] {
        write(text);
        let bundle = Bundle::open(temp.path()).unwrap();
        assert_eq!(Limit::of(bundle.config()), limit, "{text}");
    }
    for (key, value) in [("max_new_tokens", "0"), ("max_length", "\"long\"")] {
        write(&format!("{{\"{key}\": {value}}}"));
        let text = open_error(temp.path()).to_string();
        for part in ["generation_config.json", key, value, "a count from 1"] {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn the_limit_of_a_genai_answer_is_that_of_its_search() {
    let map = |context: &str, length: &str| {
        let search = format!("{{\"search\": {{\"max_length\": {length}}}, \"model\": {{{context}");
        GENAI.replacen("{\"model\": {", &search, 1)
    };
    let context = "\"context_length\": 4096,";
    let files = ["text.onnx", "embedding.onnx", "towers/vision.onnx"];
    for (map, limit) in [
        (GENAI.to_owned(), Limit::DEFAULT),
        (map(context, "300"), Limit::Length(300)),
        (map("", "300"), Limit::Length(300)),
        // What the model builder writes: no limit that somebody chose.
        (map(context, "4096"), Limit::DEFAULT),
    ] {
        let temp = folder_with(&files, &[("genai_config.json", &map)]);
        let bundle = Bundle::open(temp.path()).unwrap();
        assert_eq!(Limit::of(bundle.config()), limit, "{map}");
        // Beside a config.json too, as long as no generation_config.json says otherwise.
        fs::write(temp.path().join("config.json"), CONFIG).unwrap();
        let bundle = Bundle::open(temp.path()).unwrap();
        assert_eq!(Limit::of(bundle.config()), limit, "{map}");
        let generation = temp.path().join("generation_config.json");
        fs::write(generation, r#"{"max_new_tokens": 7}"#).unwrap();
        let bundle = Bundle::open(temp.path()).unwrap();
        assert_eq!(Limit::of(bundle.config()), Limit::NewTokens(7), "{map}");
    }
    let temp = folder_with(&files, &[("genai_config.json", &map("", "-1"))]);
    let text = open_error(temp.path()).to_string();
    for part in ["genai_config.json", "search.max_length", "-1"] {
        assert!(text.contains(part), "{text}");
    }
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
    large.set_len(kvw::limits::JSON_BYTES + 1).unwrap();
    assert!(matches!(
        open_error(temp.path()),
        Error::Files(kvw::files::Error::TooLarge { .. })
    ));
}

#[test]
fn a_path_that_is_not_there_is_an_error() {
    let error = open_error(Path::new("/nonexistent/model"));
    assert!(matches!(error, Error::Files(_)), "{error}");
}

/// A folder with empty files of these names, and others with this text.
fn folder_with(names: &[&str], texts: &[(&str, &str)]) -> TempDir {
    let temp = folder(names, "");
    for (name, text) in texts {
        fs::write(temp.path().join(name), text).unwrap();
    }
    temp
}

/// Relative path, role and phase of every ONNX file.
fn roles(bundle: &Bundle) -> Vec<(&str, Role, Phase)> {
    bundle
        .files()
        .iter()
        .map(|file| (file.relative.as_str(), file.role, file.phase))
        .collect()
}

const GENAI: &str = r#"{"model": {
    "type": "qwen2_5_vl", "eos_token_id": [2, 5], "image_token_id": 9, "vocab_size": 288,
    "decoder": {"filename": "text.onnx", "hidden_size": 64, "num_hidden_layers": 3,
        "inputs": {"inputs_embeds": "inputs_embeds", "attention_mask": "mask",
            "past_key_names": "past_key_%d_in", "past_value_names": "past_value_%d_in"},
        "outputs": {"logits": "logits_out",
            "present_key_names": "past_key_%d_out", "present_value_names": "past_value_%d_out"}},
    "embedding": {"filename": "embedding.onnx"},
    "vision": {"filename": "towers/vision.onnx"}}}"#;

#[test]
fn genai_config_is_the_map_of_its_folder() {
    let files = [
        "text.onnx",
        "embedding.onnx",
        "towers/vision.onnx",
        "draft.onnx",
    ];
    let temp = folder_with(&files, &[("genai_config.json", GENAI)]);
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::OnnxruntimeGenai);
    assert_eq!(
        roles(&bundle),
        [
            ("draft.onnx", Role::Other, Phase::Any),
            ("embedding.onnx", Role::EmbedTokens, Phase::Any),
            ("text.onnx", Role::Decoder, Phase::Any),
            ("towers/vision.onnx", Role::VisionEncoder, Phase::Any),
        ]
    );
    let config = bundle.config().unwrap();
    assert_eq!(config.model_type, "qwen2_5_vl");
    assert_eq!(
        (
            config.num_hidden_layers,
            config.hidden_size,
            config.vocab_size
        ),
        (Some(3), Some(64), Some(288))
    );
    assert_eq!((config.image_token_id, config.vision), (Some(9), true));
    assert_eq!(config.eos_token_ids, [2, 5]);
    let names = bundle.decoder_names();
    assert_eq!(names.attention_mask, "mask");
    assert_eq!(names.logits, "logits_out");
    assert_eq!(names.input_ids, "input_ids");
    assert_eq!(names.present("past_key_7_in").unwrap(), ["past_key_7_out"]);
    assert_eq!(
        names.present("past_value_0_in").unwrap(),
        ["past_value_0_out"]
    );
    assert_eq!(names.present("past_key_values.0.key"), None);
}

#[test]
fn a_genai_map_that_does_not_fit_is_refused_by_key() {
    let files = ["text.onnx", "embedding.onnx", "towers/vision.onnx"];
    let error = |files: &[&str], map: &str| {
        let temp = folder_with(files, &[("genai_config.json", map)]);
        open_error(temp.path())
    };
    let missing = error(&files[..2], GENAI);
    assert!(matches!(missing, Error::MissingSibling { .. }), "{missing}");
    let text = missing.to_string();
    assert!(
        text.contains("towers/vision.onnx") && text.contains("model.vision.filename"),
        "{text}"
    );
    let paged = GENAI.replace("\"attention_mask\"", "\"block_table\"");
    let paged = error(&files, &paged);
    assert!(matches!(paged, Error::Unsupported { .. }), "{paged}");
    assert!(paged.to_string().contains("paged attention"), "{paged}");
    let pipeline = GENAI.replace("\"filename\": \"text.onnx\"", "\"pipeline\": []");
    assert!(matches!(
        error(&files, &pipeline),
        Error::Unsupported { .. }
    ));
    for (map, key) in [
        ("[]", "'.'"),
        (r#"{"model": {}}"#, "'model.decoder.filename'"),
        (
            r#"{"model": {"decoder": {"filename": 3}}}"#,
            "'model.decoder.filename'",
        ),
        (
            r#"{"model": {"decoder": {"filename": "text.onnx", "inputs": {"input_ids": 1}}}}"#,
            "'model.decoder.inputs.input_ids'",
        ),
        (
            r#"{"model": {"decoder": {"filename": "../text.onnx"}}}"#,
            "'../text.onnx'",
        ),
        (
            r#"{"model": {"decoder": {"filename": "text.onnx"}}}"#,
            "'model.type'",
        ),
    ] {
        let text = error(&files, map).to_string();
        assert!(text.contains(key), "{map}: {text}");
    }
}

#[test]
fn a_genai_model_that_sees_needs_its_embedding() {
    let map = GENAI.replace("\"embedding\": {\"filename\": \"embedding.onnx\"},", "");
    let files = ["text.onnx", "towers/vision.onnx"];
    let temp = folder_with(&files, &[("genai_config.json", &map)]);
    let error = open_error(temp.path());
    assert!(matches!(error, Error::MissingSibling { .. }), "{error}");
}

#[test]
fn export_json_is_the_map_of_transformers_own_exporter() {
    let map = r#"{"schema_version": 1, "export_format": "onnx", "components": {
        "image_encoder": {"file": "image_encoder.onnx"}, "language_model": {"file": "language_model.onnx"},
        "lm_head": {"file": "lm_head.onnx"}, "decode": {"file": "decode.onnx"},
        "multi_modal_projector": {"file": "p.onnx"}}}"#;
    let files = [
        "image_encoder.onnx",
        "language_model.onnx",
        "lm_head.onnx",
        "decode.onnx",
        "p.onnx",
    ];
    let temp = folder_with(&files, &[("export.json", map)]);
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::TransformersExporter);
    assert_eq!(
        roles(&bundle),
        [
            ("decode.onnx", Role::Decoder, Phase::Decode),
            ("image_encoder.onnx", Role::VisionEncoder, Phase::Any),
            ("language_model.onnx", Role::Decoder, Phase::Prefill),
            ("lm_head.onnx", Role::LmHead, Phase::Any),
            ("p.onnx", Role::Other, Phase::Any),
        ]
    );
    let components = bundle.components(None).unwrap();
    assert_eq!(components.decoder.relative, "language_model.onnx");
    assert_eq!(components.decode.unwrap().relative, "decode.onnx");
    assert_eq!(components.lm_head.unwrap().relative, "lm_head.onnx");
    let present = bundle
        .decoder_names()
        .present("input.past_key_values.layers.2.keys");
    assert_eq!(
        present.unwrap(),
        [
            "output.past_key_values.layers.2.keys",
            "past_key_values.layers.2.keys"
        ]
    );

    let openvino = map.replace("\"onnx\"", "\"openvino\"");
    let temp = folder_with(&files, &[("export.json", &openvino)]);
    assert!(
        open_error(temp.path())
            .to_string()
            .contains("'export_format'")
    );
    let temp = folder_with(&files[1..], &[("export.json", map)]);
    let error = open_error(temp.path());
    assert!(matches!(error, Error::MissingSibling { .. }), "{error}");
}

#[test]
fn mobius_has_a_folder_for_each_component() {
    let files = [
        "decoder/model.onnx",
        "embedding/model.onnx",
        "vision_encoder/model.onnx",
    ];
    let temp = folder(&files, "");
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::Mobius);
    let components = bundle.components(None).unwrap();
    assert_eq!(components.decoder.relative, files[0]);
    assert_eq!(components.embed_tokens.unwrap().relative, files[1]);
    assert_eq!(components.vision_encoder.unwrap().relative, files[2]);

    let error = open_error(folder(&[files[0], files[2]], "").path());
    assert!(
        error.to_string().contains("embedding/model.onnx"),
        "{error}"
    );
}

#[test]
fn optimum_splits_a_decoder_by_phase() {
    let files = [
        "decoder_model.onnx",
        "decoder_model_merged.onnx",
        "decoder_with_past_model.onnx",
    ];
    let temp = folder(&files, r#"{"model_type": "opt", "n_layer": 3}"#);
    let bundle = Bundle::open(temp.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::Optimum);
    assert_eq!(bundle.layers(), Some(3));
    assert_eq!(bundle.decoders().count(), 3);
    let components = bundle.components(None).unwrap();
    assert_eq!(components.decoder.relative, files[0]);
    assert_eq!(components.decode.unwrap().relative, files[2]);

    let merged = Bundle::open(folder(&files[1..2], "").path()).unwrap();
    assert_eq!(merged.layout(), Layout::SingleFile);
    // The merged file serves the prompt too; a decoder of further tokens does not.
    let temp = folder(&files[1..], "");
    let bundle = Bundle::open(temp.path()).unwrap();
    let components = bundle.components(None).unwrap();
    assert_eq!(components.decoder.relative, files[1]);
    assert!(components.decode.is_none());
    let temp = folder(&[files[2], "model.onnx_data"], "");
    fs::write(temp.path().join("encoder_model.onnx"), "").unwrap();
    let bundle = Bundle::open(temp.path()).unwrap();
    let error = bundle.components(None).unwrap_err();
    assert!(
        error.to_string().contains("'decoder_model.onnx'"),
        "{error}"
    );

    let precisions = folder(&["model.onnx", "model_quantized.onnx"], "");
    let bundle = Bundle::open(precisions.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::Optimum);
    assert_eq!(bundle.components(None).unwrap().decoder.variant, "");
    let chosen = bundle.components(Some("quantized")).unwrap();
    assert_eq!(chosen.decoder.relative, "model_quantized.onnx");
}

#[test]
fn an_embedding_that_merges_images_is_an_embedding() {
    let temp = folder(
        &[
            "onnx/model_q4.onnx",
            "onnx/prepare_inputs_embeds_q4.onnx",
            "onnx/vision_encoder_q4.onnx",
        ],
        r#"{"model_type": "phi3_v", "num_hidden_layers": 32}"#,
    );
    let bundle = Bundle::open(temp.path()).unwrap();
    let components = bundle.components(None).unwrap();
    assert_eq!(components.decoder.relative, "onnx/model_q4.onnx");
    assert_eq!(
        components.embed_tokens.unwrap().relative,
        "onnx/prepare_inputs_embeds_q4.onnx"
    );
}

#[test]
fn the_count_of_external_data_files_must_be_in_step_with_the_configuration() {
    let open = |files: &[&str], counts: &str| {
        let config = format!(
            r#"{{"model_type": "qwen2_vl",
                "transformers.js_config": {{"use_external_data_format": {counts}}}}}"#
        );
        let temp = folder(files, &config);
        Bundle::open(temp.path())
            .map(|_| ())
            .map_err(|e| (e.to_string(), e))
    };
    let two = [
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model.onnx_data_1",
        "onnx/model_fp16.onnx",
        "onnx/model_fp16.onnx_data",
        "onnx/model_q4.onnx",
    ];
    open(&two, r#"{"model.onnx": 2, "model_fp16.onnx": true}"#).unwrap();
    open(
        &two,
        r#"{"model.onnx": 2, "model": 1, "model_q4.onnx": false}"#,
    )
    .unwrap();
    open(&two[3..], "true").unwrap();
    open(&two[5..], "false").unwrap();
    // A file that was not downloaded is nobody's concern.
    open(&two[3..5], r#"{"model.onnx": 2, "model_fp16.onnx": 1}"#).unwrap();
    for (files, counts, expected, found) in [
        (&two[..], r#"{"model.onnx": 3, "model_fp16.onnx": 1}"#, 3, 2),
        (&two[..], r#"{"model.onnx": 1, "model_fp16.onnx": 1}"#, 1, 2),
        (&two[..], r#"{"model_fp16.onnx": 1}"#, 0, 2),
        (&two[..], "true", 1, 2),
        (&two[5..], r#"{"model": 1}"#, 1, 0),
    ] {
        let (text, error) = open(files, counts).unwrap_err();
        assert!(
            matches!(&error, Error::Chunks { expected: e, found: f, .. } if (*e, *f) == (expected, found)),
            "{counts}: {text}"
        );
        assert!(error.hint().unwrap().contains("onnx_data"));
    }
    for counts in ["\"two\"", r#"{"model": -1}"#, "100000"] {
        let (text, error) = open(&two, counts).unwrap_err();
        assert!(matches!(error, Error::Key { .. }), "{counts}: {text}");
    }
}

/// Copies a folder of `fixtures/exports`.
fn export(name: &str) -> TempDir {
    let temp = TempDir::new().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/exports")
        .join(name);
    copy(&from, temp.path());
    temp
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Opens every ONNX file and checks that they are of one model.
fn consistent(folder: &Path) -> Result<(), Error> {
    let bundle = Bundle::open(folder)?;
    let models: Vec<_> = bundle
        .files()
        .iter()
        .map(|file| {
            let model = ModelFile::open(&file.path, &Limits::default()).unwrap();
            (file, model)
        })
        .collect();
    let models: Vec<_> = models.iter().map(|(file, model)| (*file, model)).collect();
    check_one_model(&bundle, &models)
}

#[test]
fn files_of_two_models_are_told_apart_by_their_interfaces() {
    let temp = export("tjs-qwen2_vl");
    consistent(temp.path()).unwrap();
    // Another model's decoder among this one's.
    fs::copy(
        export("optimum124-opt-legacy")
            .path()
            .join("decoder_model_merged.onnx"),
        temp.path().join("onnx/decoder_model_merged_q4.onnx"),
    )
    .unwrap();
    let error = consistent(temp.path()).unwrap_err();
    let text = error.to_string();
    for part in [
        "onnx/decoder_model_merged_q4.onnx",
        "key/value heads of 2",
        "onnx/decoder_model_merged_fp16.onnx has it",
        "found 4",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(error.hint().unwrap().contains("one export"));

    // Another model's configuration.
    let temp = export("tjs-qwen2_vl");
    let config = temp.path().join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("\"hidden_size\": 64", "\"hidden_size\": 128"),
    )
    .unwrap();
    let text = consistent(temp.path()).unwrap_err().to_string();
    assert!(
        text.contains("hidden size of 128") && text.contains("found 64"),
        "{text}"
    );
}

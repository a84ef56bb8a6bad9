//! Every family, from (image, question, answer) to coefficients, against transformers' own processors and
//! PyTorch: small models with random weights, `tools/families/make.py`.
//!
//! Token ids, answer tokens, position ids, further decoder inputs and greedy answers: equal. What the
//! vision encoder is fed: equal to the last bit, by its sha256. Coefficients through ONNX Runtime: within
//! [`TOLERANCE`] of PyTorch's, neuron by neuron.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test's own helpers"
)]

mod support;

use std::path::{Path, PathBuf};

use kvw::bundle::Bundle;
use kvw::dataset::{ImageSource, Sample, read_jsonl};
use kvw::graph::{Moment, Outputs};
use kvw::kvw::{Forward, Gates, LayerRange};
use kvw::pipeline::Model;
use kvw::preprocess::{
    Form, ImageBackend, PositionIds, Prepared, TensorValue, open_family, open_family_with,
};
use kvw::runtime::Collector;
use kvw::runtime::generate::{self, Limit};
use ndarray::Array1;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Tensors, chain, engine, fixtures, relative};

/// Relative, neuron by neuron: float32 sums in two libraries, over two layers.
const TOLERANCE: f64 = 1e-5;

/// The families' fixtures, by name.
fn families() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures().join("families")).unwrap();
    let folders = entries.map(|entry| entry.unwrap().path());
    let mut folders: Vec<PathBuf> = folders
        .filter(|p| p.join("goldens.json").exists())
        .collect();
    folders.sort();
    assert!(!folders.is_empty());
    folders
}

/// The samples of a family with their goldens.
fn goldens(folder: &Path) -> Vec<(Sample, Value)> {
    let goldens = std::fs::read(folder.join("goldens.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    let samples = read_jsonl(&fixtures().join("families/samples.jsonl")).unwrap();
    let found: Vec<(Sample, Value)> = goldens["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|golden| {
            let named = samples
                .samples
                .iter()
                .find(|s| golden["id"] == s.id.as_str());
            (named.unwrap().clone(), golden.clone())
        })
        .collect();
    assert!(found.len() >= 7, "{}", folder.display());
    found
}

fn integers(value: &Value) -> Vec<i64> {
    let items = value.as_array().unwrap_or_else(|| panic!("{value}"));
    items.iter().map(|item| item.as_i64().unwrap()).collect()
}

/// The integers of nested lists, in order.
fn flat(value: &Value) -> Vec<i64> {
    match value.as_array() {
        Some(items) => items.iter().flat_map(flat).collect(),
        None => vec![value.as_i64().unwrap_or_else(|| panic!("{value}"))],
    }
}

/// The rows of position ids, of which all-alike families have one.
fn rows(positions: &PositionIds) -> Vec<Vec<i64>> {
    match positions {
        PositionIds::Sequential(ids) => vec![ids.to_vec()],
        PositionIds::Multimodal(ids) => ids.rows().into_iter().map(|row| row.to_vec()).collect(),
        PositionIds::Unstated => panic!("families know their positions"),
    }
}

/// Type, shape and bytes of a tensor, as the goldens have them.
fn described(value: &TensorValue) -> (&'static str, Vec<u8>) {
    match value {
        TensorValue::Floats(a) => ("float32", a.iter().flat_map(|v| v.to_le_bytes()).collect()),
        TensorValue::Integers(a) => ("int64", a.iter().flat_map(|v| v.to_le_bytes()).collect()),
        TensorValue::Booleans(a) => ("bool", a.iter().map(|&v| u8::from(v)).collect()),
    }
}

fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the vision encoder is fed: every tensor of the processor, to the last bit.
fn image_is(prepared: &Prepared, golden: &Value, context: &str) -> usize {
    let expected = golden.as_object().unwrap();
    let Some(image) = &prepared.image else {
        assert!(expected.is_empty(), "{context}: no image");
        return 0;
    };
    for (name, expected) in expected {
        let context = format!("{context}, {name}");
        let found = image.get(name).unwrap_or_else(|| panic!("{context}: none"));
        let shape: Vec<i64> = found
            .shape()
            .iter()
            .map(|&d| d.try_into().unwrap())
            .collect();
        assert_eq!(shape, integers(&expected["shape"]), "{context}");
        let (dtype, bytes) = described(found);
        assert_eq!(expected["dtype"], dtype, "{context}");
        // Some processors' first values come from a kernel that fuses multiplications and additions.
        let inexact = expected.get("inexact");
        let skipped = inexact.map_or(0, |inexact| inexact["count"].as_u64().unwrap());
        let skipped = usize::try_from(skipped).unwrap();
        let tolerance = inexact.map_or(0.0, |inexact| inexact["tolerance"].as_f64().unwrap());
        if let TensorValue::Floats(values) = found {
            // Before the hash, which only says yes or no.
            let step = usize::try_from(expected["step"].as_u64().unwrap()).unwrap();
            let some: Vec<f32> = values.iter().step_by(step).copied().collect();
            let expected = expected["values"].as_array().unwrap();
            for (index, (found, expected)) in some.iter().zip(expected).enumerate() {
                let tolerance = if index * step < skipped {
                    tolerance
                } else {
                    0.0
                };
                #[allow(clippy::cast_possible_truncation)]
                let expected = expected.as_f64().unwrap() as f32;
                let difference = f64::from((found - expected).abs());
                assert!(difference <= tolerance, "{context}: {found}, {expected}");
            }
        }
        let bytes = bytes.get(skipped * size_of::<f32>()..).unwrap();
        assert_eq!(expected["sha256"], hex(bytes), "{context}");
    }
    expected.len()
}

#[test]
fn every_input_is_the_one_that_transformers_makes() {
    for folder in families() {
        let family = open_family(&folder.join("model")).unwrap_or_else(|e| panic!("{}", chain(&e)));
        let mut tensors = 0;
        for (sample, golden) in goldens(&folder) {
            let context = format!("{}, {}", folder.display(), sample.id);
            let prepare = |form| {
                let prepared = family.prepare(&sample, form);
                prepared.unwrap_or_else(|error| panic!("{context}: {}", chain(&error)))
            };
            let question = prepare(Form::Question);
            let expected = integers(&golden["question"]["input_ids"]);
            assert_eq!(question.input_ids, expected, "{context}");
            assert!(question.answer_mask.iter().all(|&counts| !counts));

            let prepared = prepare(Form::WithAnswer);
            let expected = &golden["with_answer"];
            assert_eq!(
                prepared.input_ids,
                integers(&expected["input_ids"]),
                "{context}"
            );
            let positions = expected["position_ids"].as_array().unwrap();
            let positions: Vec<_> = positions.iter().map(integers).collect();
            assert_eq!(rows(&prepared.position_ids), positions, "{context}");
            let predicting: Vec<i64> = (1..)
                .zip(&prepared.answer_mask)
                .filter(|(_, counts)| **counts)
                .map(|(next, _)| next)
                .collect();
            assert_eq!(
                predicting,
                integers(&expected["answer_tokens"]),
                "{context}"
            );
            assert_eq!(prepared.answer_tokens, predicting.len(), "{context}");

            let expected = golden["decoder_inputs"].as_object().unwrap();
            assert_eq!(prepared.decoder_inputs.len(), expected.len(), "{context}");
            for input in &prepared.decoder_inputs {
                let name = &input.tensor.name;
                let TensorValue::Integers(found) = &input.tensor.value else {
                    panic!("{context}: {name} is not int64");
                };
                let expected = flat(&expected[name]);
                assert_eq!(
                    found.iter().copied().collect::<Vec<_>>(),
                    expected,
                    "{context}"
                );
            }
            tensors += image_is(&prepared, &golden["image"], &context);
        }
        assert!(tensors >= 7, "{}", folder.display());
    }
}

/// transformers has a slow and a fast image processor, and AutoProcessor picks one by the settings' class.
/// The other is followed to the last bit too.
#[test]
fn both_image_processors_are_followed() {
    let mut checked = 0;
    for folder in families() {
        let goldens = goldens(&folder);
        let picked = std::fs::read(folder.join("goldens.json")).unwrap();
        let picked: Value = serde_json::from_slice(&picked).unwrap();
        let Some(other) = picked["processors"][2].as_str() else {
            continue;
        };
        let backend = match other.ends_with("Fast") {
            true => ImageBackend::Torchvision,
            false => ImageBackend::Pillow,
        };
        let family = open_family_with(&folder.join("model"), backend).unwrap();
        for (sample, golden) in goldens.iter().filter(|(sample, _)| sample.image.is_some()) {
            let context = format!("{}, {}, {other}", folder.display(), sample.id);
            let prepared = family.prepare(sample, Form::Question).unwrap();
            checked += image_is(&prepared, &golden["other_image"], &context);
            assert_ne!(golden["image"], golden["other_image"], "{context}");
        }
    }
    assert!(checked >= 49, "{checked}");
}

#[test]
fn what_a_family_cannot_prepare_is_refused() {
    let model = |name: &str| fixtures().join(format!("families/{name}/model"));
    for name in ["idefics3", "mllama", "phi3_v", "smolvlm"] {
        assert!(open_family_with(&model(name), ImageBackend::Pillow).is_ok());
        let fast = open_family_with(&model(name), ImageBackend::Torchvision);
        let error = fast.err().unwrap().to_string();
        assert!(
            error.contains("the slow image processor"),
            "{name}: {error}"
        );
    }

    let samples = read_jsonl(&fixtures().join("families/samples.jsonl")).unwrap();
    let refused = |name: &str, sample: &Sample| {
        let family = open_family(&model(name)).unwrap();
        let error = family.prepare(sample, Form::WithAnswer).unwrap_err();
        assert!(error.hint().is_some(), "{name}: {error}");
        chain(&error)
    };
    // Without an image Mllama leaves layers out, which a graph cannot.
    let text = samples.samples.iter().find(|sample| sample.image.is_none());
    let error = refused("mllama", text.unwrap());
    assert!(error.contains("no question without an image"), "{error}");
    // A placeholder in the question would be taken for an image.
    for (name, placeholder) in [
        ("idefics3", "<image>"),
        ("internvl", "<IMG_CONTEXT>"),
        ("mllama", "<|image|>"),
        ("phi3_v", "<|image_7|>"),
    ] {
        let mut sample = samples.samples.first().unwrap().clone();
        sample.question.push_str(placeholder);
        let error = refused(name, &sample);
        assert!(error.contains("found 2"), "{error}");
    }
}

#[test]
fn coefficients_and_greedy_answers_are_those_of_pytorch() {
    let engine = engine(1);
    for folder in families() {
        let name = folder.file_name().unwrap().to_string_lossy();
        let coefficients = Tensors::open(&folder.join("coefficients.safetensors"));
        let bundle = Bundle::open(&folder.join("model")).unwrap();
        let mut model = Model::open(&bundle, None, &engine, 32).unwrap();
        let sums = Outputs::Sums(Moment::Absolute);
        let mut collecting = model.decoder(LayerRange::All, sums, 32).unwrap();
        let mut plain = model.plain_decoder(100).unwrap();
        let (mut worst, mut neurons) = (0.0, 0);
        let goldens = goldens(&folder);
        for (sample, golden) in &goldens {
            let mut forward = Collector {
                source: &mut model.lvlm,
                decoder: &mut collecting,
            };
            let sums = forward.sums(&[sample], &Gates::new());
            let sums = sums.unwrap_or_else(|error| panic!("{name}, {}: {error}", sample.id));
            for (layer, sum) in &sums.layers {
                let expected = coefficients.floats(&format!("{}.{layer}", sample.id));
                #[allow(clippy::cast_possible_truncation)]
                let found: Array1<f32> = sum.mapv(|sum| (f64::from(sum) / sums.weight) as f32);
                assert_eq!(found.len(), expected.len());
                worst = f64::max(worst, relative(&found, &expected));
                neurons += found.len();
            }
            let expected = integers(&golden["greedy"]);
            let gates = Gates::new();
            let limit = Limit::NewTokens(expected.len());
            let answer = generate::greedy(&mut model.lvlm, &mut plain, sample, &gates, limit);
            let answer = answer.unwrap_or_else(|e| panic!("{name}, {}: {}", sample.id, chain(&e)));
            assert_eq!(answer.ids, expected, "{name}, {}", sample.id);
            assert_eq!(
                answer.text,
                golden["answer"].as_str().unwrap(),
                "{name}, {}",
                sample.id
            );
        }
        eprintln!(
            "{name}: {} samples; coefficients of {neurons} neurons off by at most {worst:.1e}, relative",
            goldens.len()
        );
        assert!(neurons > 500 && worst <= TOLERANCE, "{name}: {worst:e}");
    }
}

/// PaliGemma sees its whole prompt from every token. A decoder that cannot be told where the answer begins
/// would let its tokens see those that follow them; it may generate, and nothing may be measured on it.
#[test]
fn a_decoder_that_cannot_tell_prompt_from_answer_is_refused() {
    let engine = engine(1);
    let open = |name: &str| Bundle::open(&fixtures().join("families").join(name).join("model"));
    let (bundle, other) = (open("paligemma").unwrap(), open("llava").unwrap());
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let causal = Model::open(&other, None, &engine, 1).unwrap();
    let sums = Outputs::Sums(Moment::Absolute);
    let mut decoder = causal.decoder(LayerRange::All, sums, 1).unwrap();
    let (sample, _) = &goldens(&fixtures().join("families/paligemma"))[0];
    let answered = model
        .lvlm
        .embed_as(sample, Form::WithAnswer, &Gates::new())
        .unwrap();
    let error = decoder.sums(&[&answered], &Gates::new()).unwrap_err();
    let error = chain(&error);
    assert!(error.contains("an input token_type_ids"), "{error}");
    let question = model
        .lvlm
        .embed_as(sample, Form::Question, &Gates::new())
        .unwrap();
    decoder.sums(&[&question], &Gates::new()).unwrap();
}

/// Copies a family's configuration, with one field of one file changed.
fn changed(family: &str, file: &str, field: &str, value: Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = fixtures().join("families").join(family).join("model");
    for entry in std::fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let path = folder.path().join(file);
    let mut content: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let (parent, name) = field.rsplit_once('.').unwrap_or(("", field));
    let parent = parent.split('.').filter(|part| !part.is_empty());
    let object = parent.fold(&mut content, |value, part| &mut value[part]);
    match value {
        Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
        value => object[name] = value,
    }
    std::fs::write(path, content.to_string()).unwrap();
    folder
}

#[test]
fn a_configuration_that_is_not_understood_is_an_error_that_names_file_and_field() {
    let (config, images, processor) = (
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
    );
    for (family, file, field, value) in [
        ("llava", config, "image_token_index", json!("<image>")),
        ("llava", config, "image_token_index", json!(1_000_000)),
        (
            "llava",
            config,
            "vision_config.model_type",
            json!("pixtral"),
        ),
        (
            "llava",
            processor,
            "vision_feature_select_strategy",
            json!("last"),
        ),
        ("llava", processor, "patch_size", json!(0)),
        ("llava", images, "size", json!({"shortest_edge": 0})),
        ("llava", images, "size", json!({"height": 28, "width": 28})),
        ("llava", images, "size", json!({"shortest_edge": 1e9})),
        (
            "llava",
            images,
            "crop_size",
            json!({"height": 56, "width": 28}),
        ),
        ("llava", images, "do_center_crop", json!(false)),
        ("llava", images, "do_pad", json!(true)),
        ("llava_onevision", images, "image_grid_pinpoints", json!([])),
        (
            "llava_onevision",
            images,
            "image_grid_pinpoints",
            json!([[28]]),
        ),
        (
            "llava_onevision",
            images,
            "image_grid_pinpoints",
            json!([[28, 30]]),
        ),
        (
            "llava_onevision",
            images,
            "image_grid_pinpoints",
            json!([[28, 0]]),
        ),
        (
            "llava_onevision",
            images,
            "image_grid_pinpoints",
            json!([[2_800_000, 2_800_000]]),
        ),
        (
            "llava_onevision",
            images,
            "image_grid_pinpoints",
            Value::Null,
        ),
        (
            "llava_onevision",
            images,
            "size",
            json!({"height": 28, "width": 56}),
        ),
        (
            "llava_onevision",
            processor,
            "vision_aspect_ratio",
            json!("pad"),
        ),
        ("llava_onevision", processor, "num_image_tokens", json!(-1)),
        ("paligemma", images, "size", json!({"shortest_edge": 28})),
        ("paligemma", images, "image_seq_length", json!(1e12)),
        ("paligemma", "tokenizer_config.json", "eos_token", json!("")),
        ("llava", images, "size", json!({"shortest_edge": 5000})),
        (
            "gemma3",
            images,
            "size",
            json!({"height": 28, "width": 5000}),
        ),
        ("llava_onevision", images, "size", json!(5000)),
        (
            "llava_onevision",
            processor,
            "num_image_tokens",
            json!(1 << 20),
        ),
        (
            "llava_onevision",
            processor,
            "vision_aspect_ratio",
            json!("anyres_max_999"),
        ),
        ("gemma3", images, "do_pan_and_scan", json!(true)),
        ("gemma3", config, "boi_token_index", json!(-1)),
        ("gemma3", processor, "image_seq_length", json!("four")),
        ("qwen3_vl", images, "patch_size", json!(0)),
        ("smolvlm", config, "image_token_id", json!(1_000_000)),
        ("smolvlm", processor, "image_seq_len", json!(1e12)),
        ("smolvlm", images, "size.longest_edge", json!(1_000_000)),
        ("idefics3", images, "max_image_size.longest_edge", json!(1)),
        ("idefics3", images, "resample", json!(7)),
        ("internvl", config, "image_token_id", Value::Null),
        ("internvl", images, "max_patches", json!(1_000_000)),
        ("internvl", processor, "image_seq_length", json!(-4)),
        ("mllama", config, "image_token_index", json!("<|image|>")),
        ("mllama", images, "size.width", json!(56)),
        ("mllama", images, "max_image_tiles", json!(0)),
        ("mllama", images, "do_pad", json!(false)),
        ("phi3_v", images, "num_crops", json!(1_000)),
        ("phi3_v", images, "image_std", json!([0, 1, 1])),
    ] {
        let folder = changed(family, file, field, value.clone());
        let error = open_family(folder.path()).map(|_| ());
        let error = error.expect_err(&format!("{family}, {field}: {value}"));
        let error = chain(&error);
        assert!(error.contains(file), "{family}, {field}: {error}");
        assert!(error.contains(field), "{family}, {field}: {error}");
    }
}

#[test]
fn a_sample_that_cannot_be_prepared_is_an_error_that_names_it() {
    let sample = |image: Option<&str>, question: &str| {
        let (mut sample, _) = goldens(&fixtures().join("families/llava"))[0].clone();
        sample.image = image.map(|path| ImageSource::File(fixtures().join(path)));
        sample.id = "p7".into();
        sample.question = question.into();
        sample
    };
    let image = Some("families/images/rgb_61x43.png");
    for (family, sample, expected) in [
        (
            "llava",
            sample(image, "<image> who?"),
            "expected 1 `<image>`",
        ),
        (
            "llava",
            sample(None, "<image> who?"),
            "expected 0 `<image>`",
        ),
        (
            "llava",
            sample(Some("families/none.png"), "who?"),
            "none.png",
        ),
        (
            "paligemma",
            sample(None, "who?"),
            "no question without an image",
        ),
        (
            "paligemma",
            sample(image, "<image>"),
            "expected 0 `<image>`",
        ),
        (
            "gemma3",
            sample(image, "<start_of_image>"),
            "expected 1 `<start_of_image>`",
        ),
        (
            "gemma3",
            sample(None, "<image_soft_token>"),
            "expected 0 `<image_soft_token>`",
        ),
        (
            "llava_onevision",
            sample(image, "<image>"),
            "expected 1 `<image>`",
        ),
    ] {
        let family = open_family(&fixtures().join("families").join(family).join("model")).unwrap();
        let error = family.prepare(&sample, Form::WithAnswer).unwrap_err();
        let error = chain(&error);
        assert!(
            error.contains("`p7`") && error.contains(expected),
            "{error}"
        );
    }
}

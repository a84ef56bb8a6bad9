//! Qwen2-VL inputs against transformers 4.57.1's own processor, on the samples that
//! `tools/processor/make_goldens.py` made, and against the inputs that the method's original code
//! ran on.
//!
//! Ids, answer tokens and position ids: equal. Pixel values, max difference:
//! - PNG and WebP (every mode): 0, for the fast processor and for the slow one;
//! - JPEG: 0 from Pillow's decoded pixels on. The decoders differ by 1 to 4 levels of 255, and by up
//!   to 10 on a few pixels of a progressive file with subsampled colour.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test's own helpers"
)]

use std::path::{Path, PathBuf};

use kvw::dataset::{Sample, read_jsonl};
use kvw::preprocess::answer::answer_span;
use kvw::preprocess::image_settings::normalization;
use kvw::preprocess::patches::{PatchLayout, flatten, smart_resize};
use kvw::preprocess::resize::{Filter, resize};
use kvw::preprocess::template::ChatTemplate;
use kvw::preprocess::{
    Error, Family, Form, ImageBackend, ImageInputs, ModelDir, PositionIds, Prepared, TensorValue,
    Tokenizer, image, open_family, open_family_with,
};
use ndarray::{Array2, Array3, ArrayView3, Ix2};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/processor/qwen2_vl")
}

fn family() -> Box<dyn Family> {
    open_family(&fixture().join("model")).unwrap()
}

/// Every sample with its golden, in file order.
fn goldens() -> Vec<(Sample, Value)> {
    let goldens: Value =
        serde_json::from_slice(&std::fs::read(fixture().join("goldens.json")).unwrap()).unwrap();
    let samples = read_jsonl(&fixture().join("samples.jsonl"))
        .unwrap()
        .samples;
    let goldens = goldens["samples"].as_array().unwrap().clone();
    assert_eq!(samples.len(), goldens.len());
    samples
        .into_iter()
        .zip(goldens)
        .inspect(|(sample, golden)| assert_eq!(golden["id"], sample.id.as_str()))
        .collect()
}

fn integers(value: &Value) -> Vec<i64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item.as_i64().unwrap())
        .collect()
}

fn position_rows(prepared: &Prepared) -> Vec<Vec<i64>> {
    match &prepared.position_ids {
        PositionIds::Multimodal(rows) => rows.rows().into_iter().map(|row| row.to_vec()).collect(),
        _ => panic!("Qwen2-VL has three rows of position ids"),
    }
}

fn pixel_values(image: &ImageInputs) -> Array2<f32> {
    match image.get("pixel_values") {
        Some(TensorValue::Floats(values)) => values.clone().into_dimensionality::<Ix2>().unwrap(),
        other => panic!("{other:?}"),
    }
}

fn grid_thw(image: &ImageInputs) -> Vec<i64> {
    match image.get("image_grid_thw") {
        Some(TensorValue::Integers(grid)) => {
            assert_eq!(grid.shape(), [1, 3]);
            grid.iter().copied().collect()
        }
        other => panic!("{other:?}"),
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|chunk| f32::from_le_bytes(chunk.try_into().unwrap()))
        .collect()
}

fn sha256(bytes: impl AsRef<[u8]>) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn pixel_sha256(pixels: &Array2<f32>) -> String {
    sha256(
        pixels
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>(),
    )
}

#[test]
fn token_ids_answer_tokens_and_position_ids_are_those_of_transformers() {
    let family = family();
    let goldens = goldens();
    assert!(goldens.len() >= 30);
    for (sample, golden) in goldens {
        for (form, key) in [
            (Form::WithAnswer, "with_answer"),
            (Form::Question, "question"),
        ] {
            let prepared = family.prepare(&sample, form).unwrap();
            let (id, expected) = (&sample.id, &golden[key]);
            assert_eq!(prepared.input_ids, integers(&expected["input_ids"]), "{id}");
            let rows: Vec<Vec<i64>> = expected["position_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(integers)
                .collect();
            assert_eq!(position_rows(&prepared), rows, "{id}");
            assert_eq!(
                prepared.next_position,
                expected["next_position"].as_i64().unwrap(),
                "{id}"
            );
            assert_eq!(prepared.answer_mask.len(), prepared.input_ids.len());

            let answer: Vec<i64> = prepared
                .answer_mask
                .iter()
                .zip(1..)
                .filter_map(|(&predicts, next)| predicts.then_some(next))
                .collect();
            let expected = if form == Form::WithAnswer {
                integers(&golden["answer_tokens"])
            } else {
                Vec::new()
            };
            assert_eq!(answer, expected, "{id}");
            assert_eq!(
                (prepared.answer_tokens, prepared.answer_offsets.len()),
                (answer.len(), answer.len())
            );
        }
    }
}

#[test]
fn the_answers_tokens_decode_to_the_answer_and_their_offsets_cover_it() {
    let family = family();
    for (sample, _) in goldens() {
        let prepared = family.prepare(&sample, Form::WithAnswer).unwrap();
        let ids = prepared.input_ids.iter().skip(1).zip(&prepared.answer_mask);
        let ids: Vec<i64> = ids
            .filter(|(_, predicts)| **predicts)
            .map(|(id, _)| *id)
            .collect();
        let decoded = family.tokenizer().decode(&ids, true).unwrap();
        // The tokenizer composes decomposed characters (NFC); all else comes back as it was.
        if !sample.answer.contains('\u{301}') {
            assert_eq!(decoded, sample.answer, "{}", sample.id);
        }
        assert_eq!(prepared.answer_offsets.first().unwrap().start, 0);
        assert_eq!(
            prepared.answer_offsets.last().unwrap().end,
            sample.answer.len()
        );
    }
}

#[test]
fn pixel_values_are_those_of_both_processors_to_the_last_bit() {
    for (backend, kind) in [
        (ImageBackend::Torchvision, "fast"),
        (ImageBackend::Pillow, "slow"),
    ] {
        let family = open_family_with(&fixture().join("model"), backend).unwrap();
        let mut checked = 0;
        for (sample, golden) in goldens()
            .iter()
            .filter(|(sample, _)| sample.image.is_some())
        {
            let prepared = family.prepare(sample, Form::Question).unwrap();
            let image = prepared.image.as_ref().unwrap();
            assert_eq!(
                grid_thw(image),
                integers(&golden["grid_thw"]),
                "{}",
                sample.id
            );
            let pixel_values = pixel_values(image);
            let shape: Vec<i64> = pixel_values
                .shape()
                .iter()
                .map(|&side| i64::try_from(side).unwrap())
                .collect();
            assert_eq!(
                shape,
                integers(&golden[format!("{kind}_shape")]),
                "{}",
                sample.id
            );
            if golden["exact_pixels"] == true {
                assert_eq!(
                    pixel_sha256(&pixel_values),
                    golden[format!("{kind}_sha256")],
                    "{kind} {}",
                    sample.id
                );
                checked += 1;
            }
        }
        assert!(checked >= 28, "{checked}");
    }
}

/// Noise, every filter, up and down: 40 shapes, 120 resizes by Pillow and 80 by torchvision.
#[test]
fn resized_noise_is_that_of_pillow_and_of_torchvision_to_the_last_bit() {
    let goldens = std::fs::read(fixture().join("goldens.json")).unwrap();
    let goldens: Value = serde_json::from_slice(&goldens).unwrap();
    let mut checked = 0;
    for golden in goldens["resizes"].as_array().unwrap() {
        let sides = |key: &str| -> Vec<usize> {
            integers(&golden[key])
                .iter()
                .map(|&side| usize::try_from(side).unwrap())
                .collect()
        };
        let (from, to) = (sides("from"), sides("to"));
        let mut state = 1_u64;
        let noise = Array3::from_shape_simple_fn((from[1], from[0], 3), || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        });
        let filter = Filter::from_pillow(golden["resample"].as_i64().unwrap()).unwrap();
        for (backend, key) in [
            (ImageBackend::Pillow, "slow"),
            (ImageBackend::Torchvision, "fast"),
        ] {
            let Some(expected) = golden[key].as_str() else {
                continue;
            };
            let resized = resize(noise.view(), to[1], to[0], filter, backend).unwrap();
            assert_eq!(
                sha256(resized.as_slice().unwrap()),
                expected,
                "{key} {golden}"
            );
            checked += 1;
        }
    }
    assert_eq!(checked, 200);
}

#[test]
fn lossless_files_decode_to_pillows_pixels() {
    for (sample, golden) in goldens() {
        let Some(source) = sample.image.filter(|_| golden["exact_pixels"] == true) else {
            continue;
        };
        let pixels = image::decode_rgb(source.origin(), &image::read(&source).unwrap()).unwrap();
        let shape: Vec<i64> = pixels
            .shape()
            .iter()
            .map(|&side| i64::try_from(side).unwrap())
            .collect();
        assert_eq!(shape, integers(&golden["decoded_shape"]), "{}", sample.id);
        assert_eq!(
            sha256(pixels.as_slice().unwrap()),
            golden["decoded_sha256"],
            "{}",
            sample.id
        );
    }
}

/// The fast processor's pixel values for RGB pixels `[H, W, 3]`, with the fixture's settings.
fn fast_pixel_values(pixels: ArrayView3<'_, u8>) -> Array2<f32> {
    let (height, width, _) = pixels.dim();
    let (height, width) = smart_resize(height, width, 28, 3136, 50176).unwrap();
    let backend = ImageBackend::Torchvision;
    let resized = resize(pixels, height, width, Filter::Bicubic, backend).unwrap();
    let mean = [0.481_454_66, 0.457_827_5, 0.408_210_73];
    let std = [0.268_629_54, 0.261_302_58, 0.275_777_11];
    let levels = normalization(backend, 0.003_921_568_627_450_98, mean, std);
    let layout = PatchLayout {
        patch_size: 14,
        merge_size: 2,
        temporal_patch_size: 2,
    };
    flatten(resized.view(), layout, &levels).0
}

/// From Pillow's decoded pixels on, JPEG files are exact too; the decoders (zune-jpeg here,
/// libjpeg-turbo there) differ.
#[test]
fn jpeg_files_decode_to_almost_the_same_pixels_and_lossy_webp_to_the_same() {
    let bytes = std::fs::read(fixture().join("decoded.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut measured = 0;
    for (sample, golden) in goldens() {
        let lossy = sample
            .image
            .as_ref()
            .filter(|_| golden["exact_pixels"] == false);
        let Some(source) = lossy else { continue };
        let found = image::decode_rgb(source.origin(), &image::read(source).unwrap()).unwrap();
        let expected = tensors.tensor(&sample.id).unwrap();
        assert_eq!(found.shape(), expected.shape(), "{}", sample.id);
        let expected = Array3::from_shape_vec(found.dim(), expected.data().to_vec()).unwrap();

        let levels: Vec<u8> = found
            .iter()
            .zip(&expected)
            .map(|(a, b)| a.abs_diff(*b))
            .collect();
        let total: u32 = levels.iter().map(|&level| u32::from(level)).sum();
        let mean = f64::from(total) / f64::from(u32::try_from(levels.len()).unwrap());
        let most = levels.into_iter().max().unwrap();

        let (found, expected) = (
            fast_pixel_values(found.view()),
            fast_pixel_values(expected.view()),
        );
        assert_eq!(
            pixel_sha256(&expected),
            golden["fast_sha256"],
            "{}",
            sample.id
        );
        let values = (found - expected)
            .iter()
            .fold(0.0, |most, value| value.abs().max(most));
        println!(
            "{}: levels {most} (mean {mean:.3}), pixel values {values:.4}",
            sample.id
        );
        // Levels at most, levels on average, pixel values at most.
        let allowed = match sample.id.as_str() {
            "lossy.webp" | "lossy_alpha.webp" => (0, 0.0, 0.0),
            "gray.jpg" | "cmyk.jpg" => (1, 0.05, 0.016),
            "subsampled.jpg" => (4, 0.5, 0.08),
            "progressive.jpg" => (10, 0.5, 0.16),
            _ => (3, 0.05, 0.05),
        };
        assert!(
            most <= allowed.0 && mean <= allowed.1 && values <= allowed.2,
            "{}",
            sample.id
        );
        measured += 1;
    }
    assert_eq!(measured, 14);
}

/// The folder of the method's original results: `KVW_ORACLE`, else `fixtures/oracle`.
fn oracle() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle");
    let root = std::env::var_os("KVW_ORACLE").map_or(root, PathBuf::from);
    if !root.exists() {
        println!("no oracle in {}: skipped", root.display());
        return None;
    }
    Some(root)
}

#[test]
fn the_inputs_are_those_that_the_methods_original_code_ran_on() {
    let Some(root) = oracle() else { return };
    let bytes = std::fs::read(root.join("qwen2_vl/samples.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let family = open_family(&root.join("qwen2_vl/model")).unwrap();
    for set in ["forget", "retain"] {
        for (index, sample) in read_jsonl(&root.join(format!("data/{set}.jsonl")))
            .unwrap()
            .samples
            .iter()
            .enumerate()
        {
            let prepared = family.prepare(sample, Form::WithAnswer).unwrap();
            let tensor = |name: &str| {
                tensors
                    .tensor(&format!("{set}.{index}.{name}"))
                    .unwrap()
                    .data()
                    .to_vec()
            };
            let longs = |name: &str| -> Vec<i64> {
                tensor(name)
                    .chunks_exact(8)
                    .map(|chunk| i64::from_le_bytes(chunk.try_into().unwrap()))
                    .collect()
            };
            assert_eq!(prepared.input_ids, longs("input_ids"), "{}", sample.id);
            assert_eq!(
                position_rows(&prepared).concat(),
                longs("position_ids"),
                "{}",
                sample.id
            );
            let next_is_answer: Vec<bool> = longs("labels")
                .iter()
                .skip(1)
                .map(|&label| label != -100)
                .collect();
            assert_eq!(
                prepared.answer_mask[..next_is_answer.len()],
                next_is_answer,
                "{}",
                sample.id
            );
            assert!(!prepared.answer_mask.last().unwrap());
            let image = prepared.image.as_ref().unwrap();
            assert_eq!(grid_thw(image), longs("image_grid_thw"), "{}", sample.id);
            let expected = floats(&tensor("pixel_values"));
            let pixel_values = pixel_values(image);
            let difference = pixel_values
                .iter()
                .zip(&expected)
                .map(|(found, expected)| (found - expected).abs())
                .fold(0.0, f32::max);
            assert_eq!(pixel_values.len(), expected.len());
            assert_eq!(difference, 0.0, "{}", sample.id);
        }
    }
}

#[test]
fn templates_render_what_the_methods_original_code_was_given() {
    let Some(root) = oracle() else { return };
    for (model, placeholder) in [("qwen2_vl", "<|image_pad|>"), ("llava", "<image>")] {
        let template =
            ChatTemplate::open(&ModelDir::open(&root.join(model).join("model")).unwrap()).unwrap();
        let meta: Value =
            serde_json::from_slice(&std::fs::read(root.join(model).join("meta.json")).unwrap())
                .unwrap();
        let sets = meta["order"].as_object().unwrap();
        for row in sets.values().flat_map(|rows| rows.as_array().unwrap()) {
            let (question, answer) = (&row["question"], row["answer"].as_str().unwrap());
            let user = json!({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]});
            let assistant =
                json!({"role": "assistant", "content": [{"type": "text", "text": answer}]});
            let prompt = template.render(&json!([user]), true).unwrap();
            let full = template.render(&json!([user, assistant]), false).unwrap();
            assert_eq!(full.trim(), row["prompt"], "{model}");
            assert_eq!(full.matches(placeholder).count(), 1);
            let span = answer_span(template.path(), &full, &prompt, answer).unwrap();
            assert_eq!(&full[span], answer);
        }
    }
}

#[test]
fn equal_images_have_equal_keys_and_settings_are_part_of_the_key() {
    let goldens = goldens();
    let [first, second] = [&goldens[0].0, &goldens[1].0];
    let key = |family: &dyn Family, sample, form| {
        family.prepare(sample, form).unwrap().image.unwrap().key
    };
    let (fast, slow) = (
        family(),
        open_family_with(&fixture().join("model"), ImageBackend::Pillow).unwrap(),
    );
    let reference = key(&*fast, first, Form::WithAnswer);
    assert_eq!(reference, key(&*family(), first, Form::Question));
    assert_ne!(reference, key(&*fast, second, Form::WithAnswer));
    assert_ne!(reference, key(&*slow, first, Form::WithAnswer));
}

fn sample(image: Option<PathBuf>, question: &str, answer: &str) -> Sample {
    Sample {
        id: "s9".into(),
        image: image.map(Into::into),
        question: question.into(),
        answer: answer.into(),
        ..Sample::default()
    }
}

/// The messages of an error and its sources, one a line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push('\n');
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[test]
fn a_placeholder_in_the_question_or_the_answer_is_an_error_that_names_the_sample_and_the_template()
{
    let family = family();
    let image = Some(fixture().join("images/l.png"));
    for sample in [
        sample(None, "what is <|image_pad|>?", "x"),
        sample(image.clone(), "what is <|image_pad|>?", "x"),
        sample(image, "what?", "<|image_pad|>"),
    ] {
        let error = family.prepare(&sample, Form::WithAnswer).unwrap_err();
        let text = chain(&error);
        assert!(
            text.starts_with("sample `s9` cannot be prepared\n")
                && text.contains("chat_template.jinja: expected ")
                && text.contains("tokenizer.json"),
            "{text}"
        );
        assert!(error.hint().is_some());
    }
}

/// A copy of the fixture's model folder, with one file replaced (or removed).
fn model_with(file: &str, content: Option<&str>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture().join("model")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    match content {
        Some(content) => std::fs::write(dir.path().join(file), content).unwrap(),
        None => std::fs::remove_file(dir.path().join(file)).unwrap(),
    }
    dir
}

#[test]
fn a_template_that_changes_or_drops_the_answer_is_an_error_that_names_the_sample_and_the_template()
{
    for template in [
        "{% for m in messages %}{{ m.role }}:{{ m.content[0].text | trim }}\n{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}",
        "{% for m in messages if m.role == 'user' %}u\n{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}{% endfor %}\
         {% if add_generation_prompt %}[bot]{% endif %}",
    ] {
        let dir = model_with("chat_template.jinja", Some(template));
        let family = open_family(dir.path()).unwrap();
        let error = family
            .prepare(&sample(None, "who?", " Ada  "), Form::WithAnswer)
            .unwrap_err();
        let text = chain(&error);
        assert!(
            text.starts_with("sample `s9` cannot be prepared\n")
                && text.contains("chat_template.jinja: answer not in the prompt: "),
            "{text}"
        );
    }
}

#[test]
fn a_template_is_taken_from_each_of_its_three_places_in_order() {
    let question = sample(None, "who?", "Ada");
    let reference = family().prepare(&question, Form::WithAnswer).unwrap();
    let template = std::fs::read_to_string(fixture().join("model/chat_template.jinja")).unwrap();
    let config = |value: Value| {
        let config = std::fs::read(fixture().join("model/tokenizer_config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config["chat_template"] = value;
        config.to_string()
    };
    let named =
        json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]);
    for (file, content) in [
        (
            "chat_template.json",
            json!({"chat_template": template}).to_string(),
        ),
        ("tokenizer_config.json", config(template.clone().into())),
        ("tokenizer_config.json", config(named)),
    ] {
        let dir = model_with("chat_template.jinja", None);
        std::fs::write(dir.path().join(file), content).unwrap();
        assert_eq!(
            open_family(dir.path())
                .unwrap()
                .prepare(&question, Form::WithAnswer)
                .unwrap(),
            reference
        );
    }
    let dir = model_with(
        "tokenizer_config.json",
        Some(&config("{{ raise_exception('not this one') }}".into())),
    );
    assert!(
        open_family(dir.path())
            .unwrap()
            .prepare(&question, Form::WithAnswer)
            .is_ok()
    );
    let dir = model_with("chat_template.jinja", None);
    assert!(matches!(
        open_family(dir.path()).err().unwrap(),
        Error::TemplateMissing { .. }
    ));
}

#[test]
fn a_broken_model_folder_is_an_error_that_names_the_file_and_the_field() {
    let processor = |field: &str, value: Value| {
        let config = std::fs::read(fixture().join("model/preprocessor_config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config[field] = value;
        Some(config.to_string())
    };
    let config = |field: &str, value: Value| {
        let config = std::fs::read(fixture().join("model/config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&config).unwrap();
        config[field] = value;
        Some(config.to_string())
    };
    for (file, content, expected) in [
        ("config.json", None, "cannot open "),
        (
            "config.json",
            Some("{".into()),
            "config.json: not valid JSON",
        ),
        (
            "config.json",
            Some("{}".into()),
            "config.json: `model_type`: expected a string, found nothing",
        ),
        (
            "config.json",
            Some("[]".into()),
            "config.json: `model_type`: expected a string, found nothing",
        ),
        (
            "config.json",
            config("model_type", "bert".into()),
            "no preprocessing for model_type `bert` (known: gemma3, idefics3, ",
        ),
        (
            "config.json",
            config("image_token_id", (-4).into()),
            "`image_token_id`: expected a token of tokenizer.json, found -4",
        ),
        (
            "config.json",
            config("vision_config", json!({"spatial_merge_size": 3})),
            "`vision_config.spatial_merge_size`",
        ),
        ("preprocessor_config.json", None, "cannot open "),
        (
            "preprocessor_config.json",
            processor("patch_size", 0.into()),
            "`patch_size`: expected an integer from 1 to 256, found 0",
        ),
        (
            "preprocessor_config.json",
            processor("patch_size", "14".into()),
            "`patch_size`: expected an integer from 1 to 256, found \"14\"",
        ),
        (
            "preprocessor_config.json",
            processor("max_pixels", 1e18.into()),
            "`max_pixels`: expected an integer from 1 to ",
        ),
        (
            "preprocessor_config.json",
            processor("image_std", json!([0, 1, 1])),
            "`image_std`: expected values that give finite",
        ),
        (
            "preprocessor_config.json",
            processor("image_mean", json!([0.5])),
            "`image_mean`: expected three finite numbers",
        ),
        (
            "preprocessor_config.json",
            processor("resample", 0.into()),
            "`resample`: expected 1 (Lanczos), 2 (bilinear) or 3 (bicubic), found 0",
        ),
        (
            "preprocessor_config.json",
            processor("do_resize", false.into()),
            "`do_resize`: expected true, found false",
        ),
        ("tokenizer.json", None, "cannot open "),
        (
            "tokenizer.json",
            Some("garbage".into()),
            "tokenizer.json: not a tokenizer that can be loaded",
        ),
        (
            "chat_template.jinja",
            Some("{% for %}".into()),
            "chat_template.jinja: the chat template does not parse",
        ),
    ] {
        let dir = model_with(file, content.as_deref());
        let error = open_family(dir.path()).err().unwrap();
        assert!(error.to_string().contains(expected), "{file}: {error}");
        assert!(error.to_string().contains(file), "{file}: {error}");
    }
}

#[test]
fn a_template_that_runs_forever_is_stopped_and_names_the_sample() {
    let forever =
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}";
    let dir = model_with("chat_template.jinja", Some(forever));
    let error = open_family(dir.path())
        .unwrap()
        .prepare(&sample(None, "a", "b"), Form::Question)
        .unwrap_err();
    assert!(
        chain(&error).starts_with("sample `s9` cannot be prepared\n"),
        "{error}"
    );
    assert!(
        chain(&error).contains("chat_template.jinja: the chat template failed\n"),
        "{}",
        chain(&error)
    );
}

/// A PNG that is nothing but a header with a true checksum.
fn png_header(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
    header.extend([8, 2, 0, 0, 0]);
    let crc = header.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    });
    let chunks = [
        &13_u32.to_be_bytes()[..],
        &header,
        &(!crc).to_be_bytes(),
        &0_u32.to_be_bytes(),
        b"IDAT",
    ]
    .concat();
    [&b"\x89PNG\r\n\x1a\n"[..], &chunks].concat()
}

#[test]
fn an_image_is_refused_by_its_header_before_its_pixels_are_allocated() {
    let decode = |bytes: &[u8]| {
        image::decode_rgb(Path::new("bomb.png"), bytes)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        decode(&png_header(60_000, 60_000)),
        "bomb.png: 60000×60000 pixels, the limit is 67108864 pixels in all"
    );
    assert!(decode(&png_header(u32::MAX / 2, u32::MAX / 2)).starts_with("bomb.png: "));
    assert!(decode(&png_header(0, 5)).starts_with("bomb.png: "));
    assert!(decode(&png_header(8, 8)).ends_with("the image cannot be decoded"));
}

#[test]
fn a_file_that_is_no_image_or_another_format_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let family = family();
    for (bytes, expected) in [
        (
            &b""[..],
            "expected a PNG, JPEG or WebP image, found unknown bytes",
        ),
        (b"not an image at all", "found unknown bytes"),
        (b"GIF89a\x01\x00\x01\x00", "found GIF"),
        (b"II*\x00\x08\x00\x00\x00", "found TIFF"),
        (b"BM\x00\x00\x00\x00", "found BMP"),
        (
            b"\x89PNG\r\n\x1a\n",
            "face.png: the image cannot be decoded",
        ),
        (b"\xff\xd8\xff\xe0", "face.png: the image cannot be decoded"),
        (
            b"RIFF\x04\x00\x00\x00WEBP",
            "face.png: the image cannot be decoded",
        ),
    ] {
        let path = dir.path().join("face.png");
        std::fs::write(&path, bytes).unwrap();
        let error = family
            .prepare(&sample(Some(path), "a", "b"), Form::Question)
            .unwrap_err();
        let text = chain(&error);
        assert!(
            text.starts_with("sample `s9` cannot be prepared\n") && text.contains(expected),
            "{text}"
        );
    }
    let error = family
        .prepare(
            &sample(Some(dir.path().join("no.png")), "a", "b"),
            Form::Question,
        )
        .unwrap_err();
    assert!(chain(&error).contains("no.png"), "{error}");
}

/// Every image cut short, and with bytes overwritten: an error or an image, never a panic.
#[test]
fn damaged_images_never_panic() {
    let mut cases = 0;
    for entry in std::fs::read_dir(fixture().join("images")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        if bytes.len() > 20_000 {
            continue;
        }
        let mut state = 1_u64;
        for case in 0..24 {
            let mut damaged = bytes.clone();
            if case < 6 {
                damaged.truncate(bytes.len() * case / 6);
            } else {
                for _ in 0..3 {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let place = usize::try_from(state >> 33).unwrap() % damaged.len();
                    damaged[place] = state.to_le_bytes()[3];
                }
            }
            let result = image::decode_rgb(&path, &damaged);
            assert!(
                !matches!(result, Err(Error::Panic { .. })),
                "{}: {result:?}",
                path.display()
            );
            cases += 1;
        }
    }
    assert!(cases > 500, "{cases}");
}

/// tokenizer.json with bytes overwritten: a tokenizer or an error, and panics of the library stay
/// inside.
#[test]
fn damaged_tokenizers_never_panic() {
    let dir = model_with("tokenizer.json", Some(""));
    let bytes = std::fs::read(fixture().join("model/tokenizer.json")).unwrap();
    let path = dir.path().join("tokenizer.json");
    let (mut state, mut refused) = (7_u64, 0);
    for case in 0..150 {
        let mut damaged = bytes.clone();
        if case < 10 {
            damaged.truncate(bytes.len() * case / 10);
        } else {
            for _ in 0..1 + case % 4 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let place = usize::try_from(state >> 33).unwrap() % damaged.len();
                damaged[place] = state.to_le_bytes()[3] & 0x7f;
            }
        }
        std::fs::write(&path, damaged).unwrap();
        match Tokenizer::open(&path) {
            Ok(tokenizer) => drop(tokenizer.encode("Who is <|im_end|> Größe 李明?", true)),
            Err(error) => {
                assert!(error.to_string().contains("tokenizer.json"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 50, "{refused}");
}

//! Folders of other layouts, from end to end: small models that their own exporters wrote
//! (`tools/layouts/make.py`), and ready-made inputs that numpy and safetensors wrote
//! (`tools/layouts/feeds.py`).

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvw::bundle::{Bundle, Layout};
use kvw::dataset::{Dataset, is_feeds, read_feeds, read_jsonl};
use kvw::graph::{Moment, Outputs};
use kvw::kvw::{Coefficients, Gates, KnowledgeVectorWeakening, LayerRange};
use kvw::onnx::schema::attribute_proto::AttributeType;
use kvw::onnx::schema::tensor_shape_proto::{Dimension, dimension};
use kvw::onnx::schema::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto,
    ValueInfoProto, type_proto,
};
use kvw::onnx::{DataType, Limits, List, ModelFile, Text};
use kvw::pipeline::Model;
use kvw::preprocess::{Feed, Form};
use kvw::runtime::generate::{self, Limit};
use prost::Message as _;
use support::{chain, engine, fixtures};
use tempfile::TempDir;
use thin_vec::thin_vec;

/// Of what the goldens hold.
const LIMIT: Limit = Limit::NewTokens(32);

const FOLDERS: [(&str, Layout); 4] = [
    ("genai-fp32", Layout::OnnxruntimeGenai),
    ("genai-int4", Layout::OnnxruntimeGenai),
    ("optimum", Layout::SingleFile),
    // Run on the whole text again for each token.
    ("optimum-no-cache", Layout::SingleFile),
];

fn layouts(name: &str) -> PathBuf {
    fixtures().join("layouts").join(name)
}

fn data(set: &str) -> Dataset {
    read_jsonl(&layouts("data").join(format!("{set}.jsonl"))).unwrap()
}

/// What PyTorch answers, by question.
fn answers() -> BTreeMap<String, String> {
    let text = std::fs::read(layouts("data/answers.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

#[test]
fn every_folder_answers_as_the_checkpoint_does_in_pytorch() {
    let answers = answers();
    let engine = engine(1);
    for (name, layout) in FOLDERS {
        let bundle = Bundle::open(&layouts(name)).unwrap();
        assert_eq!(bundle.layout(), layout, "{name}");
        let mut model = Model::open(&bundle, None, &engine, 100).unwrap();
        let plain = model.plain_decoder(100).unwrap();
        // Gates of 1 in every layer change nothing.
        let gated = model.decoder(LayerRange::All, Outputs::Model, 100).unwrap();
        for (kind, mut decoder) in [("plain", plain), ("gated", gated)] {
            let asked = data("forget").samples.into_iter();
            let asked = asked
                .chain(data("retain").samples)
                .map(|sample| (sample, LIMIT));
            let asked: Vec<_> = asked.collect();
            for batch in [1, 3] {
                let gates = Gates::new();
                let lvlm = &mut model.lvlm;
                let found = generate::greedy_each(lvlm, &mut decoder, &asked, &gates, batch);
                for (found, (sample, _)) in found.unwrap().iter().zip(&asked) {
                    let expected = &answers[&sample.question];
                    let place = format!("{name}, {kind}, {batch} at a time: {}", sample.id);
                    assert_eq!(&found.text, expected, "{place}");
                    assert!(found.stopped, "{place}");
                }
            }
            let prompt = model
                .lvlm
                .embed_as(&asked[0].0, Form::Question, &Gates::new())
                .unwrap();
            assert!(decoder.answers_together(&prompt), "{name}, {kind}");
        }
    }
}

/// A folder that holds the model of `optimum` in other files, `tensors` of which are edited: its coefficients are
/// that model's, the gates reach both phases (the answers of the gated files are those of the edited ones), and so do
/// the edits (they are the answers of the edited model).
fn forgets_as_the_whole(folder: &Path, tensors: u64) {
    let expected = coefficients(&layouts("optimum"), &data("forget"), 1);
    let found = apart(&expected, &coefficients(folder, &data("forget"), 1));
    assert!(found < 1e-5, "{found:e}");

    let out = TempDir::new().unwrap();
    let (changed, edited, plan) = unlearn(folder, out.path(), "parts");
    assert_eq!(changed, tensors);
    let after = said(&edited, None);
    assert_eq!(said(folder, Some(&plan)), after);
    let (_, whole, _) = unlearn(&layouts("optimum"), out.path(), "whole");
    assert_eq!(said(&whole, None), after);
    assert_ne!(said(folder, None), after);
}

fn coefficients(folder: &Path, data: &Dataset, batch_size: usize) -> Coefficients {
    let engine = engine(1);
    let bundle = Bundle::open(folder).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let sums = Outputs::Sums(Moment::Absolute);
    let mut decoder = model.decoder(LayerRange::All, sums, 1).unwrap();
    let rule = KnowledgeVectorWeakening { gamma: 1.0 };
    model
        .collect(&mut decoder, &rule, &data.samples, batch_size, |_| ())
        .unwrap()
}

/// The largest difference of two coefficients, relative to the layer's largest.
fn apart(a: &Coefficients, b: &Coefficients) -> f64 {
    let mut apart = 0f64;
    assert_eq!(a.layers.len(), b.layers.len());
    for layer in a.layers.keys() {
        let (a, b) = (a.mean(*layer).unwrap(), b.mean(*layer).unwrap());
        let largest = a.iter().fold(0f64, |largest, &value| largest.max(value));
        for (a, b) in a.iter().zip(&b) {
            apart = apart.max((a - b).abs() / largest);
        }
    }
    apart
}

#[test]
fn one_checkpoint_has_the_same_coefficients_in_every_layout() {
    let forget = data("forget");
    let optimum = coefficients(&layouts("optimum"), &forget, 1);
    let genai = coefficients(&layouts("genai-fp32"), &forget, 1);
    let found = apart(&optimum, &genai);
    assert!(found < 1e-5, "{found:e}");
    // Weights rounded to four bits are another model, and not by much.
    let found = apart(&optimum, &coefficients(&layouts("genai-int4"), &forget, 1));
    assert!((1e-4..0.2).contains(&found), "{found:e}");
    // Three samples in one forward pass, two of them padded.
    let found = apart(&optimum, &coefficients(&layouts("optimum"), &forget, 3));
    assert!(found < 1e-5, "{found:e}");
}

fn kvw() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
    command.args(["--format", "json"]);
    command
}

fn json(command: &mut Command) -> serde_json::Value {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_folder_is_unlearned_from_end_to_end() {
    let out = TempDir::new().unwrap();
    for (name, _) in FOLDERS {
        let edited = out.path().join(name);
        let unlearned = json(
            kvw()
                .arg("unlearn")
                .arg(layouts(name))
                .arg("--forget")
                .arg(layouts("data/forget.jsonl"))
                .arg("--retain")
                .arg(layouts("data/retain.jsonl"))
                .arg("-o")
                .arg(&edited)
                .args(["--gamma", "25", "--threads", "1", "--eval-limit", "0"]),
        );
        // The written folder computes what the gated model does, and something else than the original.
        let number = |key: &str| unlearned["evaluation"]["agreement"][key].as_f64().unwrap();
        let allowed = number("tolerance") * number("max_logit");
        assert!(number("max_difference") <= allowed, "{name}");
        assert!(number("effect") > 0.1 * number("max_logit"), "{name}");
        assert_eq!(unlearned["changed_tensors"], 3);
        let difference = Command::new(env!("CARGO_BIN_EXE_kvw"))
            .arg("diff")
            .arg(layouts(name))
            .arg(&edited)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&difference.stdout);
        assert!(
            text.ends_with("only the planned ranges changed, and all of them\n"),
            "{text}"
        );
    }
}

#[test]
fn feeds_are_the_samples_that_they_were_made_of() {
    let expected = coefficients(&layouts("optimum"), &data("forget"), 1);
    for form in ["npz", "safetensors"] {
        let path = layouts("feeds").join(form);
        assert!(is_feeds(&path));
        let feeds = read_feeds(&path).unwrap();
        assert_eq!(feeds.samples.len(), 3);
        for batch_size in [1, 3] {
            let found = coefficients(&layouts("optimum"), &feeds, batch_size);
            assert_eq!(found.weight.value(), expected.weight.value());
            let found = apart(&expected, &found);
            assert!(found < 1e-6, "{form}, batches of {batch_size}: {found:e}");
        }
    }
    let one = read_feeds(&layouts("feeds/npz/0.npz")).unwrap();
    assert_eq!(one.samples[0].id, "0.npz");
    assert!(!is_feeds(&layouts("data")));
    assert!(!is_feeds(&layouts("data/forget.jsonl")));
}

#[test]
fn the_loss_on_feeds_is_that_of_the_samples_and_no_answer_is_made_up() {
    let evaluated = |flag: &str, data: &str| {
        let mut command = kvw();
        command.arg("eval").arg(layouts("optimum"));
        json(
            command
                .arg(flag)
                .arg(layouts(data))
                .args(["--threads", "1"]),
        )
    };
    let summary = |evaluated: &serde_json::Value, metric: &str| {
        let models = evaluated["sets"][0]["models"].as_object().unwrap();
        let summary = &models.values().next().unwrap()["summary"];
        summary
            .get(metric)
            .and_then(|metric| metric["value"].as_f64())
    };
    let samples = evaluated("--data", "data/forget.jsonl");
    let feeds = evaluated("--feeds", "feeds/safetensors");
    let expected = summary(&samples, "loss").unwrap();
    let found = summary(&feeds, "loss").unwrap();
    assert!((expected - found).abs() < 1e-6, "{expected} {found}");
    assert!(summary(&samples, "rouge_l_recall").is_some());
    assert_eq!(summary(&feeds, "rouge_l_recall"), None);
}

#[test]
fn the_digest_of_feeds_is_that_of_their_names_and_contents() {
    let folder = TempDir::new().unwrap();
    let copy = |from: &str, to: &str| {
        std::fs::copy(layouts("feeds/npz").join(from), folder.path().join(to)).unwrap();
        read_feeds(folder.path()).unwrap().sha256
    };
    let first = copy("0.npz", "a.npz");
    let same = copy("0.npz", "a.npz");
    let other_content = copy("1.npz", "a.npz");
    let more = copy("1.npz", "b.npz");
    assert_eq!(first, same);
    assert!(first != other_content && other_content != more);
    let empty = TempDir::new().unwrap();
    let error = read_feeds(empty.path()).unwrap_err();
    assert!(error.to_string().contains("no sample"), "{error}");
}

#[test]
fn what_is_no_feed_is_refused_by_file_and_tensor() {
    for (file, parts) in [
        (
            "object.npz",
            ["'input_ids'", "a pickle, which is never read"],
        ),
        (
            "torch.npz",
            ["data.pkl", "a pickle (torch.save), which is never read"],
        ),
        (
            "torch_legacy.safetensors",
            ["safetensors or npz", "a pickle, which is never read"],
        ),
        ("npy.npz", ["safetensors or npz", "a single .npy array"]),
        ("empty.safetensors", ["safetensors or npz", "an empty file"]),
        ("text.safetensors", ["safetensors or npz", "other bytes"]),
        ("fields.npz", ["'input_ids'", "one with fields"]),
        ("text.npz", ["'input_ids'", "<U1"]),
        ("big_endian.npz", ["'input_ids'", ">i8"]),
        ("no_ids.npz", ["'input_ids'", "found nothing"]),
        (
            "float_ids.npz",
            [
                "'input_ids'",
                "expected integers [1, T], T > 0, found floats [1, 44]",
            ],
        ),
        ("two_samples.npz", ["'input_ids'", "found integers [2, 44]"]),
        (
            "short_mask.npz",
            [
                "'answer_mask'",
                "expected [1, 44], as input_ids, of weights ≥ 0, found floats [1, 43]",
            ],
        ),
        ("no_answer.npz", ["'answer_mask'", "zeros alone"]),
        ("negative_mask.npz", ["'answer_mask'", "found -1"]),
        (
            "embeds.npz",
            ["'inputs_embeds'", "found floats [1, 45, 64]"],
        ),
    ] {
        let path = layouts("feeds/bad").join(file);
        let error = Feed::read(&path).unwrap_err();
        let text = chain(&error);
        assert!(text.contains(path.to_str().unwrap()), "{text}");
        for part in parts {
            assert!(text.contains(part), "{file}: {text}");
        }
        assert!(error.hint().is_some(), "{file}");
    }
}

#[test]
fn a_feed_must_fit_the_decoder() {
    let engine = engine(1);
    let bundle = Bundle::open(&layouts("optimum")).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let sums = Outputs::Sums(Moment::Absolute);
    let mut decoder = model.decoder(LayerRange::All, sums, 1).unwrap();
    for (file, part) in [
        (
            "unknown_name.npz",
            "'positions': expected one of the model's inputs input_ids, attention_mask",
        ),
        (
            "wrong_rank.npz",
            "'position_ids': expected i64 [-1, -1], found integers [2, 3, 44]",
        ),
        (
            "wrong_type.npz",
            "'position_ids': expected i64 [-1, -1], found floats [1, 44]",
        ),
    ] {
        let feeds = read_feeds(&layouts("feeds/bad").join(file)).unwrap();
        let rule = KnowledgeVectorWeakening { gamma: 1.0 };
        let error = model
            .collect(&mut decoder, &rule, &feeds.samples, 1, |_| ())
            .unwrap_err();
        let text = chain(&error);
        assert!(text.contains(file) && text.contains(part), "{file}: {text}");
    }
}

/// The names of transformers' own exporter for the cache of further tokens.
fn exporter_name(name: &str) -> Option<String> {
    let (side, rest) = match name.strip_prefix("past_key_values.") {
        Some(rest) => ("input", rest),
        None => ("output", name.strip_prefix("present.")?),
    };
    let (layer, part) = rest.split_once('.')?;
    Some(format!("{side}.past_key_values.layers.{layer}.{part}s"))
}

/// The graph with its values renamed.
fn renamed(mut model: ModelProto, name: impl Fn(&str) -> Option<String>) -> ModelProto {
    let graph = model.graph.as_mut().unwrap();
    let change = |value: &mut Text| {
        if let Some(new) = name(value) {
            *value = new.into();
        }
    };
    for node in &mut graph.node {
        node.input
            .iter_mut()
            .chain(&mut node.output)
            .for_each(change);
    }
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        value.name.iter_mut().for_each(change);
    }
    graph.value_info.clear();
    model
}

/// `optimum`'s model cut up as transformers' own exporter does: a graph for the prompt that ends in
/// hidden states, the output projection, and a whole graph for further tokens.
fn cut_up() -> TempDir {
    let folder = TempDir::new().unwrap();
    let whole = ModelFile::open(&layouts("optimum/model.onnx"), &Limits::default()).unwrap();
    let whole = whole.proto().clone();
    let write = |name: &str, model: &ModelProto| {
        std::fs::write(folder.path().join(name), model.encode_to_vec()).unwrap();
    };
    write("decode.onnx", &renamed(whole.clone(), exporter_name));

    let mut head = whole.clone();
    let mut prompt = renamed(whole, |name| {
        // The prompt's outputs have no prefix.
        Some(exporter_name(name)?.replacen("output.", "", 1))
    });
    let graph = prompt.graph.as_mut().unwrap();
    let projection = graph.node.pop().unwrap();
    assert_eq!(projection.output, ["logits"]);
    let (hidden, weight) = (&projection.input[0], &projection.input[1]);
    for node in &mut graph.node {
        for value in node.input.iter_mut().chain(&mut node.output) {
            if value == hidden {
                *value = "last_hidden_state".into();
            }
        }
    }
    for output in &mut graph.output {
        if output.name() == "logits" {
            *output = without_shape(output, "last_hidden_state");
        }
    }
    graph.initializer.retain(|tensor| tensor.name() != weight);
    write("prefill.onnx", &prompt);

    let graph = head.graph.as_mut().unwrap();
    graph.node = thin_vec![projection.clone()];
    graph.initializer.retain(|tensor| tensor.name() == weight);
    graph.value_info.clear();
    let output = graph.output.remove(0);
    graph.input = thin_vec![without_shape(&output, hidden)];
    graph.output = thin_vec![output];
    write("lm_head.onnx", &head);

    std::fs::write(
        folder.path().join("export.json"),
        r#"{"schema_version": 1, "export_format": "onnx", "components": {
            "prefill": {"file": "prefill.onnx"}, "decode": {"file": "decode.onnx"},
            "lm_head": {"file": "lm_head.onnx"}}}"#,
    )
    .unwrap();
    copy_beside("optimum", folder.path());
    folder
}

/// What a folder of `layouts(name)` has beside its models, copied to `folder`.
fn copy_beside(name: &str, folder: &Path) {
    for file in [
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(layouts(name).join(file), folder.join(file)).unwrap();
    }
}

/// Unlearns `model` into the folder `out` under `name`: tensors that changed, the new folder, the plan.
fn unlearn(model: &Path, out: &Path, name: &str) -> (u64, PathBuf, PathBuf) {
    let plan = out.join(format!("{name}.plan"));
    let edited = out.join(name);
    let unlearned = json(
        kvw()
            .arg("unlearn")
            .arg(model)
            .arg("--forget")
            .arg(layouts("data/forget.jsonl"))
            .arg("--retain")
            .arg(layouts("data/retain.jsonl"))
            .arg("-o")
            .arg(&edited)
            .arg("--plan")
            .arg(&plan)
            .args(["--gamma", "25", "--threads", "1", "--eval-limit", "0"]),
    );
    (unlearned["changed_tensors"].as_u64().unwrap(), edited, plan)
}

/// What `kvw eval` has the model answer, under a plan if there is one.
fn said(model: &Path, plan: Option<&Path>) -> Vec<String> {
    let mut command = kvw();
    command.arg("eval").arg(model).arg("--data");
    command.arg(layouts("data/forget.jsonl"));
    command.args(["--answers", "--threads", "1"]);
    if let Some(plan) = plan {
        command.arg("--plan").arg(plan);
    }
    let evaluated = json(&mut command);
    let models = evaluated["sets"][0]["models"].as_object().unwrap().clone();
    let (_, model) = models.into_iter().next().unwrap();
    let answers = model["answers"].as_array().unwrap().clone();
    let text = |answer: &serde_json::Value| answer["prediction"].as_str().unwrap().to_owned();
    answers.iter().map(text).collect()
}

/// A float32 value of this name, of whatever shape.
fn without_shape(like: &ValueInfoProto, name: &str) -> ValueInfoProto {
    let mut value = like.clone();
    value.name = Some(name.into());
    if let Some(Some(type_proto::Value::TensorType(tensor))) =
        value.r#type.as_mut().map(|of| of.value.as_mut())
    {
        tensor.shape = None;
    }
    value
}

#[test]
fn a_decoder_of_three_files_answers_and_is_edited_as_the_whole_one() {
    let answers = answers();
    let engine = engine(1);
    let folder = cut_up();
    let bundle = Bundle::open(folder.path()).unwrap();
    assert_eq!(bundle.layout(), Layout::TransformersExporter);
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let mut gated = model.decoder(LayerRange::All, Outputs::Model, 1).unwrap();
    let asked = data("forget").samples.into_iter();
    let asked: Vec<_> = asked.map(|sample| (sample, LIMIT)).collect();
    for batch in [1, 3] {
        let lvlm = &mut model.lvlm;
        let found = generate::greedy_each(lvlm, &mut gated, &asked, &Gates::new(), batch);
        for (found, (sample, _)) in found.unwrap().iter().zip(&asked) {
            assert_eq!(&found.text, &answers[&sample.question]);
        }
    }

    // Both copies of the weights are edited.
    forgets_as_the_whole(folder.path(), 6);
}

/// `optimum`'s model as its older versions merged a decoder without and one with a cache: one `If`, whose
/// branches read weights of the main graph.
fn merged() -> TempDir {
    let folder = TempDir::new().unwrap();
    let whole = ModelFile::open(&layouts("optimum/model.onnx"), &Limits::default()).unwrap();
    let mut model = whole.proto().clone();
    let graph = model.graph.as_mut().unwrap();
    let nodes = std::mem::take(&mut graph.node);
    graph.value_info.clear();
    let outputs: List<Text> = graph.output.iter().map(|o| o.name().into()).collect();
    let branch = |name: &str| {
        let inner = |value: &Text| match outputs.contains(value) {
            true => format!("{value}.{name}").into(),
            false => value.clone(),
        };
        let nodes = nodes.iter().map(|node| NodeProto {
            input: node.input.iter().map(inner).collect(),
            output: node.output.iter().map(inner).collect(),
            ..node.clone()
        });
        let outputs = graph.output.iter().map(|output| ValueInfoProto {
            name: Some(inner(&output.name().into())),
            ..output.clone()
        });
        AttributeProto {
            name: Some(name.into()),
            r#type: Some(AttributeType::Graph as i32),
            g: Some(Box::new(GraphProto {
                name: Some(name.into()),
                node: nodes.collect(),
                output: outputs.collect(),
                ..Default::default()
            })),
            ..Default::default()
        }
    };
    let attribute = thin_vec![branch("then_branch"), branch("else_branch")];
    graph.node = thin_vec![NodeProto {
        op_type: Some("If".into()),
        name: Some("optimum::if".into()),
        input: thin_vec!["use_cache_branch".into()],
        output: outputs.clone(),
        attribute,
        ..Default::default()
    }];
    let mut chooses = graph.input[0].clone();
    chooses.name = Some("use_cache_branch".into());
    if let Some(Some(type_proto::Value::TensorType(tensor))) =
        chooses.r#type.as_mut().map(|of| of.value.as_mut())
    {
        tensor.elem_type = Some(DataType::BOOL.code());
        tensor.shape = Some(TensorShapeProto {
            dim: thin_vec![Dimension {
                value: Some(dimension::Value::DimValue(1)),
                ..Default::default()
            }],
        });
    }
    graph.input.push(chooses);
    std::fs::write(
        folder.path().join("decoder_model_merged.onnx"),
        model.encode_to_vec(),
    )
    .unwrap();
    copy_beside("optimum", folder.path());
    folder
}

#[test]
fn a_merged_decoder_alone_answers_and_is_edited_as_the_whole_one() {
    let engine = engine(1);
    let answers = answers();
    let folder = merged();
    let bundle = Bundle::open(folder.path()).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let mut gated = model.decoder(LayerRange::All, Outputs::Model, 1).unwrap();
    // Prompts take the branch without a cache, further tokens the other one.
    for sample in data("forget").samples {
        let gates = Gates::new();
        let found = generate::greedy(&mut model.lvlm, &mut gated, &sample, &gates, LIMIT).unwrap();
        assert_eq!(&found.text, &answers[&sample.question]);
    }

    // One weight serves both branches, so the edit reaches both.
    forgets_as_the_whole(folder.path(), 3);
}

/// A family's folder as onnxruntime-genai lays it out: the embedding puts the picture's features in place
/// itself, in its graph.
fn merging_in_the_graph(family: &str, image_token_id: i64) -> TempDir {
    let source = fixtures().join("families").join(family).join("model");
    let folder = TempDir::new().unwrap();
    for entry in std::fs::read_dir(&source).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let onnx = |name: &str| source.join("onnx").join(name);
    std::fs::copy(
        onnx("decoder_model_merged.onnx"),
        folder.path().join("model.onnx"),
    )
    .unwrap();
    std::fs::copy(
        onnx("vision_encoder.onnx"),
        folder.path().join("vision.onnx"),
    )
    .unwrap();

    let embed = ModelFile::open(&onnx("embed_tokens.onnx"), &Limits::default()).unwrap();
    let mut model = embed.proto().clone();
    let graph = model.graph.as_mut().unwrap();
    let embeds = graph.output[0].name().to_owned();
    let ids = graph.input[0].name().to_owned();
    for node in &mut graph.node {
        for output in &mut node.output {
            if *output == embeds {
                *output = "tokens".into();
            }
        }
    }
    let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
        op_type: Some(op.into()),
        input: inputs.iter().map(|&input| input.into()).collect(),
        output: thin_vec![output.into()],
        ..Default::default()
    };
    graph.node.extend([
        node("Equal", &[&ids, "image_token"], "is_image"),
        node("NonZero", &["is_image"], "places.transposed"),
        node("Transpose", &["places.transposed"], "places"),
        node(
            "ScatterND",
            &["tokens", "places", "image_features"],
            &embeds,
        ),
    ]);
    graph.initializer.push(TensorProto {
        name: Some("image_token".into()),
        data_type: Some(DataType::INT64.code()),
        int64_data: thin_vec![image_token_id],
        ..Default::default()
    });
    let width = graph.output[0].clone();
    let mut features = width.clone();
    features.name = Some("image_features".into());
    if let Some(Some(type_proto::Value::TensorType(tensor))) =
        features.r#type.as_mut().map(|of| of.value.as_mut())
    {
        let shape = tensor.shape.as_mut().unwrap();
        shape.dim.remove(0);
        shape.dim[0].value = Some(dimension::Value::DimParam("image_tokens".into()));
    }
    graph.input.push(features);
    std::fs::write(folder.path().join("embedding.onnx"), model.encode_to_vec()).unwrap();
    let map = serde_json::json!({"model": {
        "type": family,
        "decoder": {
            "filename": "model.onnx", "num_hidden_layers": 2,
            "inputs": {
                "inputs_embeds": "inputs_embeds", "attention_mask": "attention_mask",
                "position_ids": "position_ids", "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits", "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
        "vision": {"filename": "vision.onnx"},
        "embedding": {"filename": "embedding.onnx"},
    }});
    std::fs::write(folder.path().join("genai_config.json"), map.to_string()).unwrap();
    folder
}

#[test]
fn pictures_that_the_graph_puts_in_place_are_those_that_this_tool_puts_there() {
    let engine = engine(1);
    let samples = read_jsonl(&fixtures().join("families/samples.jsonl")).unwrap();
    for family in ["llava", "qwen2_5_vl"] {
        let source = fixtures().join("families").join(family).join("model");
        let apart = Bundle::open(&source).unwrap();
        let mut expected = Model::open(&apart, None, &engine, 8).unwrap();
        let image_token_id = expected.lvlm.family().unwrap().image_token_id().unwrap();
        let folder = merging_in_the_graph(family, image_token_id);
        let bundle = Bundle::open(folder.path()).unwrap();
        assert_eq!(bundle.layout(), Layout::OnnxruntimeGenai);
        let mut model = Model::open(&bundle, None, &engine, 8).unwrap();
        let mut decoders = [&expected, &model].map(|model| model.plain_decoder(8).unwrap());
        for sample in &samples.samples {
            let none = Gates::new();
            let [here, there] = [&mut expected, &mut model].map(|model| {
                model
                    .lvlm
                    .embed_as(sample, Form::WithAnswer, &none)
                    .unwrap()
            });
            assert_eq!(
                here.inputs_embeds, there.inputs_embeds,
                "{family}, {}",
                sample.id
            );
            let [one, two] = &mut decoders;
            let limit = Limit::NewTokens(8);
            let one = generate::greedy(&mut expected.lvlm, one, sample, &none, limit).unwrap();
            let two = generate::greedy(&mut model.lvlm, two, sample, &none, limit).unwrap();
            assert_eq!(one, two, "{family}, {}", sample.id);
        }
        // From end to end, both towers.
        let out = TempDir::new().unwrap();
        let data = fixtures().join("families/samples.jsonl");
        let rows = std::fs::read_to_string(&data).unwrap();
        let rows: Vec<String> = (rows.lines())
            .map(|row| {
                let mut row: serde_json::Value = serde_json::from_str(row).unwrap();
                if let Some(image) = row["image"].as_str() {
                    row["image"] = data.with_file_name(image).to_str().unwrap().into();
                }
                format!("{row}\n")
            })
            .collect();
        let write = |name: &str, rows: &[String]| {
            let path = out.path().join(name);
            std::fs::write(&path, rows.concat()).unwrap();
            path
        };
        let edited = out.path().join("edited");
        let mut command = kvw();
        command.arg("unlearn").arg(folder.path());
        command
            .arg("--forget")
            .arg(write("forget.jsonl", &rows[..2]));
        command
            .arg("--retain")
            .arg(write("retain.jsonl", &rows[2..5]));
        command.arg("-o").arg(&edited);
        command.args([
            "--tower",
            "all",
            "--gamma",
            "2",
            "--threads",
            "1",
            "--eval-limit",
            "0",
        ]);
        let unlearned = json(&mut command);
        assert_eq!(unlearned["parameters"]["tower"], "all");
        let changed = |name: &str| {
            let read = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
            read(folder.path()) != read(&edited)
        };
        assert!(changed("model.onnx") && changed("vision.onnx") && !changed("embedding.onnx"));
    }
}

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
use kvw::onnx::schema::{ModelProto, ValueInfoProto, type_proto};
use kvw::onnx::{Limits, ModelFile};
use kvw::pipeline::Model;
use kvw::preprocess::{Feed, Form};
use kvw::runtime::generate::{self, Limit};
use prost::Message as _;
use support::{chain, engine, fixtures};
use tempfile::TempDir;

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
    let change = |value: &mut String| *value = name(value).unwrap_or_else(|| value.clone());
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
                *value = "last_hidden_state".to_owned();
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
    graph.node = vec![projection.clone()];
    graph.initializer.retain(|tensor| tensor.name() == weight);
    graph.value_info.clear();
    let output = graph.output.remove(0);
    graph.input = vec![without_shape(&output, hidden)];
    graph.output = vec![output];
    write("lm_head.onnx", &head);

    std::fs::write(
        folder.path().join("export.json"),
        r#"{"schema_version": 1, "export_format": "onnx", "components": {
            "prefill": {"file": "prefill.onnx"}, "decode": {"file": "decode.onnx"},
            "lm_head": {"file": "lm_head.onnx"}}}"#,
    )
    .unwrap();
    for name in [
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(layouts("optimum").join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// A float32 value of this name, of whatever shape.
fn without_shape(like: &ValueInfoProto, name: &str) -> ValueInfoProto {
    let mut value = like.clone();
    value.name = Some(name.to_owned());
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
    let expected = coefficients(&layouts("optimum"), &data("forget"), 1);
    let found = apart(&expected, &coefficients(folder.path(), &data("forget"), 1));
    assert!(found < 1e-5, "{found:e}");

    // Both copies of the weights are edited, and the gates reach both phases: the answers of the gated
    // files are those of the edited ones.
    let out = TempDir::new().unwrap();
    let unlearn = |model: &Path, name: &str| {
        let plan = out.path().join(format!("{name}.plan"));
        let edited = out.path().join(name);
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
    };
    let (changed, edited, plan) = unlearn(folder.path(), "three");
    assert_eq!(changed, 6);
    let said = |model: &Path, plan: Option<&Path>| {
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
        answers.iter().map(text).collect::<Vec<_>>()
    };
    let after = said(&edited, None);
    assert_eq!(said(folder.path(), Some(&plan)), after);
    let (_, whole, _) = unlearn(&layouts("optimum"), "whole");
    assert_eq!(said(&whole, None), after);
    assert_ne!(said(folder.path(), None), after);
}

//! Collecting in batches, ahead of the model and with kept image features: the same sums.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvw::bundle::Bundle;
use kvw::dataset::{Sample, read_jsonl};
use kvw::graph::{Moment, Outputs};
use kvw::kvw::{Coefficients, Gates, KnowledgeVectorWeakening, LayerRange, TowerChoice};
use kvw::onnx::schema::attribute_proto::AttributeType;
use kvw::onnx::schema::tensor_shape_proto::dimension;
use kvw::onnx::schema::{AttributeProto, GraphProto, ModelProto, NodeProto, type_proto};
use kvw::pipeline::Model;
use kvw::preprocess::Form;
use prost::Message as _;
use support::{chain, engine, fixtures};

/// Relative to the layer's largest mean: float32 sums of another order, over up to six layers.
const TOLERANCE: f64 = 2e-6;

fn collect(folder: &Path, samples: &[Sample], batch_size: usize) -> Coefficients {
    let engine = engine(1);
    let bundle = Bundle::open(folder).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let sums = Outputs::Sums(Moment::Absolute);
    let mut decoder = model.decoder(LayerRange::All, sums, 1).unwrap();
    let rule = KnowledgeVectorWeakening { gamma: 1.0 };
    let mut heard = Vec::new();
    let collected = model
        .collect(&mut decoder, &rule, samples, batch_size, |n| heard.push(n))
        .unwrap();
    assert_eq!(heard.last(), Some(&samples.len()));
    collected
}

/// The largest difference of two means, relative to the layer's largest.
fn apart(a: &Coefficients, b: &Coefficients) -> f64 {
    assert_eq!((a.samples, a.weight), (b.samples, b.weight));
    let mut apart = 0f64;
    for layer in a.layers.keys() {
        let (a, b) = (a.mean(*layer).unwrap(), b.mean(*layer).unwrap());
        let largest = a.iter().copied().fold(0f64, f64::max);
        assert!(largest > 0.0);
        for (a, b) in a.iter().zip(&b) {
            apart = apart.max((a - b).abs() / largest);
        }
    }
    apart
}

/// Model folders with samples of different lengths, with and without a picture where the model allows it.
fn models() -> Vec<(PathBuf, Vec<Sample>)> {
    let demo = read_jsonl(&fixtures().join("demo/data/retain.jsonl")).unwrap();
    let text = read_jsonl(&fixtures().join("demo/data/retain_text.jsonl")).unwrap();
    let mut mixed = demo.samples[..7].to_vec();
    mixed.extend_from_slice(&text.samples[..6]);
    let mut models = vec![(fixtures().join("demo/model"), mixed)];
    let all = read_jsonl(&fixtures().join("families/samples.jsonl")).unwrap();
    for entry in fs::read_dir(fixtures().join("families")).unwrap() {
        let folder = entry.unwrap().path();
        let Ok(goldens) = fs::read(folder.join("goldens.json")) else {
            continue;
        };
        let goldens: serde_json::Value = serde_json::from_slice(&goldens).unwrap();
        let named: BTreeSet<&str> = (goldens["samples"].as_array().unwrap().iter())
            .map(|golden| golden["id"].as_str().unwrap())
            .collect();
        let samples = all.samples.iter().filter(|s| named.contains(s.id.as_str()));
        models.push((folder.join("model"), samples.cloned().collect()));
    }
    models.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(models.len() > 10);
    models
}

#[test]
fn batches_give_the_sums_of_one_by_one_in_every_family() {
    for (folder, samples) in models() {
        let alone = collect(&folder, &samples, 1);
        for batch_size in [3, 64] {
            let found = apart(&alone, &collect(&folder, &samples, batch_size));
            let name = folder.display();
            assert!(
                found < TOLERANCE,
                "{name}, batches of {batch_size}: {found:e}"
            );
        }
    }
}

/// The demo's model with another decoder.
fn demo_with(change: impl FnOnce(&mut GraphProto)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let demo = fixtures().join("demo/model");
    for from in [demo.clone(), demo.join("onnx")] {
        let to = folder.path().join(from.strip_prefix(&demo).unwrap());
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
    }
    let decoder = folder.path().join("onnx/decoder_model_merged.onnx");
    let mut model = ModelProto::decode(fs::read(&decoder).unwrap().as_slice()).unwrap();
    change(model.graph.as_mut().unwrap());
    fs::write(&decoder, model.encode_to_vec()).unwrap();
    folder
}

#[test]
fn a_decoder_with_a_fixed_batch_is_run_sample_by_sample() {
    let folder = demo_with(|graph| {
        for input in &mut graph.input {
            let axis = usize::from(input.name() == "position_ids");
            let kind = input.r#type.as_mut().unwrap().value.as_mut().unwrap();
            let type_proto::Value::TensorType(tensor) = kind else {
                panic!("expected tensors");
            };
            tensor.shape.as_mut().unwrap().dim[axis].value = Some(dimension::Value::DimValue(1));
        }
    });
    let samples = read_jsonl(&fixtures().join("demo/data/retain.jsonl")).unwrap();
    let samples = &samples.samples[..5];
    // Such a batch's sums are added in float32.
    let found = apart(
        &collect(&fixtures().join("demo/model"), samples, 1),
        &collect(folder.path(), samples, 4),
    );
    assert!(found < TOLERANCE, "{found:e}");
}

/// `kvw collect` of a few pictures of the demo, and the files of the feature folder.
fn with_features(data: &Path, output: &Path, features: Option<&Path>) -> (Vec<u8>, Vec<PathBuf>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
    command.env("ORT_DYLIB_PATH", &engine(1).library().path);
    command.arg("collect").arg(fixtures().join("demo/model"));
    command.arg("--data").arg(data).arg("-o").arg(output);
    command.args(["--threads", "1", "--force", "--layers", "0-1"]);
    if let Some(features) = features {
        command.arg("--feature-cache").arg(features);
    }
    let run = command.output().unwrap();
    assert!(
        run.status.success(),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let kept = features.map(|features| fs::read_dir(features).unwrap());
    let kept = kept
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path());
    let mut kept: Vec<PathBuf> = kept.collect();
    kept.sort();
    (fs::read(output).unwrap(), kept)
}

#[test]
fn kept_features_change_no_byte_and_a_damaged_one_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let demo = fixtures().join("demo/data");
    let lines = fs::read_to_string(demo.join("retain.jsonl")).unwrap();
    let lines: Vec<String> = (lines.lines().take(4))
        .map(|line| line.replace("images/", &format!("{}/images/", demo.display())))
        .collect();
    let data = folder.path().join("data.jsonl");
    // One picture twice.
    fs::write(
        &data,
        [
            lines.join("\n"),
            lines[0].replace("\"id\": \"", "\"id\": \"again_"),
        ]
        .join("\n"),
    )
    .unwrap();
    let output = folder.path().join("retain.kc");
    let features = folder.path().join("features");
    let (expected, _) = with_features(&data, &output, None);
    let (first, kept) = with_features(&data, &output, Some(&features));
    assert_eq!(kept.len(), 4);
    let written: Vec<Vec<u8>> = kept.iter().map(|file| fs::read(file).unwrap()).collect();
    let mut damaged = written[1].clone();
    *damaged.last_mut().unwrap() ^= 0x80;
    fs::write(&kept[1], damaged).unwrap();
    fs::write(&kept[2], b"").unwrap();
    let (second, again) = with_features(&data, &output, Some(&features));
    assert!(first == expected && second == expected);
    assert_eq!(again, kept);
    for (file, written) in kept.iter().zip(&written) {
        assert!(fs::read(file).unwrap() == *written, "{}", file.display());
    }
    // What is there is really used: other features give other sums.
    let other = fs::read(&kept[3]).unwrap();
    fs::write(&kept[0], other).unwrap();
    let (swapped, _) = with_features(&data, &output, Some(&features));
    assert!(swapped != expected);
}

#[test]
fn float16_weights_that_do_not_fit_in_twice_are_converted_one_by_one_to_the_same_sums() {
    let bundle = Bundle::open(&support::float16()).unwrap();
    let sums = Some(Outputs::Sums(Moment::Absolute));
    let (roomy, narrow) = (engine(1), engine(1).with_memory(1 << 10));
    let mut at_once = support::decoder(&roomy, &bundle, sums);
    let mut one_by_one = support::decoder(&narrow, &bundle, sums);
    assert!(roomy.describe().get("float16_weights").is_none());
    assert_eq!(narrow.describe()["float16_weights"], "converted when used");
    for sample in support::float16_samples() {
        let gates = kvw::kvw::Gates::new();
        let expected = at_once.sums(&[&sample], &gates).unwrap().layers;
        let found = one_by_one.sums(&[&sample], &gates).unwrap().layers;
        assert_eq!(found.len(), 3);
        for (layer, found) in found {
            // Half a unit in the last place of float16, where ONNX Runtime leaves out a rounding in between.
            let apart = support::relative(&found, &expected[&layer]);
            assert!(apart < 2e-3, "{layer}: {apart:e}");
        }
    }
}

/// Samples in this order, what they begin with alike run once: the coefficients and how many prefixes were run.
fn collect_sharing(folder: &Path, samples: &[Sample]) -> Result<(Coefficients, u64), String> {
    let engine = engine(1);
    let bundle = Bundle::open(folder).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let rule = KnowledgeVectorWeakening { gamma: 1.0 };
    let said = |error: kvw::pipeline::Error| chain(&error);
    let mut decoder = model
        .measuring_with_prefixes(LayerRange::All, Moment::Absolute, 1)
        .map_err(said)?;
    let collected = model.collect(&mut decoder, &rule, samples, 1, |_| {});
    Ok((collected.map_err(said)?, decoder.prefix_runs().unwrap()))
}

/// Each sample, followed by another question about the same picture.
fn asked_twice(samples: &[Sample]) -> Vec<Sample> {
    let twice = samples.iter().flat_map(|sample| {
        let again = Sample {
            id: format!("{} again", sample.id),
            question: format!("{} Say it once more, in other words.", sample.question),
            ..sample.clone()
        };
        [sample.clone(), again]
    });
    twice.collect()
}

/// Families whose samples bring the decoder inputs of their own for all tokens: which ones are a picture's.
const NEVER_DIVIDED: &[&str] = &["gemma3", "mllama", "paligemma"];

#[test]
fn a_prefix_that_samples_share_is_run_once_and_gives_the_sums_of_whole_prompts() {
    for (folder, samples) in models() {
        let mut samples = asked_twice(&samples);
        let pictures = samples.iter().filter(|s| s.image.is_some()).count() as u64 / 2;
        let name = folder.parent().unwrap().file_name().unwrap();
        let name = name.to_str().unwrap();
        let (found, runs) = collect_sharing(&folder, &samples).unwrap();
        match NEVER_DIVIDED.contains(&name) {
            true => assert_eq!(runs, 0, "{name}"),
            false => assert_eq!(runs, pictures, "{name}"),
        }
        let apart = apart(&collect(&folder, &samples, 1), &found);
        assert!(apart < TOLERANCE, "{name}: {apart:e}");
        // Neighbours decide what is run, and nothing else.
        samples.rotate_left(1);
        let (other, runs) = collect_sharing(&folder, &samples).unwrap();
        assert!(runs > pictures || NEVER_DIVIDED.contains(&name), "{name}");
        assert_eq!(other, found, "{name}");
    }
}

#[test]
fn a_batch_of_several_does_not_end_the_sharing_of_prefixes() {
    let samples = read_jsonl(&fixtures().join("demo/data/retain.jsonl")).unwrap();
    let samples = asked_twice(&samples.samples[..2]);
    let engine = engine(1);
    let bundle = Bundle::open(&fixtures().join("demo/model")).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    let rule = KnowledgeVectorWeakening { gamma: 1.0 };
    let mut decoder = model
        .measuring_with_prefixes(LayerRange::All, Moment::Absolute, 1)
        .unwrap();
    for (batch_size, runs) in [(4, 0), (1, 2)] {
        let collected = model.collect(&mut decoder, &rule, &samples, batch_size, |_| {});
        collected.unwrap();
        assert_eq!(decoder.prefix_runs(), Some(runs));
    }
}

#[test]
fn a_model_whose_prompts_cannot_be_divided_is_refused() {
    let samples = read_jsonl(&fixtures().join("demo/data/retain.jsonl")).unwrap();
    // Every token is given the mean of all of them: what stands in front sees what follows.
    let folder = demo_with(|graph| {
        for node in &mut graph.node {
            for input in node
                .input
                .iter_mut()
                .filter(|name| *name == "inputs_embeds")
            {
                *input = "seen".into();
            }
        }
        let node = |op: &str, inputs: &[&str], output: &str| NodeProto {
            op_type: Some(op.into()),
            input: inputs.iter().map(|&name| name.into()).collect(),
            output: [output.into()].into(),
            ..Default::default()
        };
        let mut mean = node("ReduceMean", &["inputs_embeds"], "mean");
        mean.attribute.push(AttributeProto {
            name: Some("axes".into()),
            r#type: Some(AttributeType::Ints as i32),
            ints: [1].into(),
            ..Default::default()
        });
        let add = node("Add", &["inputs_embeds", "mean"], "seen");
        graph.node.insert(0, add);
        graph.node.insert(0, mean);
    });
    let error = collect_sharing(folder.path(), &samples.samples[..2]).unwrap_err();
    assert!(error.contains("of the largest apart"), "{error}");
    let folder = demo_with(|graph| {
        graph.node.push(NodeProto {
            op_type: Some("DynamicQuantizeLinear".into()),
            input: ["inputs_embeds".into()].into(),
            output: ["q".into(), "scale".into(), "zero".into()].into(),
            ..Default::default()
        });
    });
    let error = collect_sharing(folder.path(), &samples.samples[..2]).unwrap_err();
    assert!(error.contains("activations quantized by"), "{error}");
    let folder = fixtures().join("layouts/optimum-no-cache");
    let text = read_jsonl(&fixtures().join("layouts/data/retain.jsonl")).unwrap();
    let error = collect_sharing(&folder, &text.samples).unwrap_err();
    assert!(error.contains("takes no keys and values"), "{error}");
}

#[test]
fn pictures_encoded_before_the_decoder_is_open_change_no_bit() {
    for (folder, samples) in models() {
        let engine = engine(1);
        let bundle = Bundle::open(&folder).unwrap();
        let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
        model.encode_first(TowerChoice::Language, &samples).unwrap();
        let mut decoder = model
            .measuring(LayerRange::All, Moment::Absolute, 1)
            .unwrap();
        let rule = KnowledgeVectorWeakening { gamma: 1.0 };
        let found = model.collect(&mut decoder, &rule, &samples, 1, |_| {});
        assert_eq!(found.unwrap(), collect(&folder, &samples, 1));
    }
    // A picture that comes later has nobody to encode it.
    let (folder, samples) = models().swap_remove(0);
    let engine = engine(1);
    let bundle = Bundle::open(&folder).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 1).unwrap();
    model
        .encode_first(TowerChoice::Language, &samples[..1])
        .unwrap();
    let later = model
        .lvlm
        .embed_as(&samples[1], Form::WithAnswer, &Gates::new());
    let error = later.unwrap_err();
    assert!(
        error.to_string().contains("expected only the pictures"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("start it again"));
}

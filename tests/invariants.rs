//! What must always hold, whatever the model: gated = edited, only planned bytes, same bytes again,
//! and no file from a run that did nothing.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvw::bundle::Bundle;
use kvw::dataset::read_jsonl;
use kvw::edit::{self, EditPlan};
use kvw::graph::{LayerId, Moment, Outputs};
use kvw::kvw::{
    Coefficients, Gates, KnowledgeVectorWeakening, Plan, collect, save_coefficients, save_plan,
    weaken,
};
use kvw::onnx::{Limits, ModelFile, Storage};
use kvw::pipeline::{self, Model};
use kvw::runtime::{Collector, Decoder, Embed, Embedded, Engine};
use support::{
    Exact, ExactSample, GAMMA, LAYERS, MODELS, apply, as_gates, chain, decoder, engine,
    exact_samples, float16, float16_samples, mean, noise, options, oracle, relative,
};

fn open(model: &str) -> Bundle {
    Bundle::open(&oracle(model).join("model")).unwrap()
}

/// The job without its files: coefficients of `retain`, gates of `forget`.
fn job(
    engine: &Engine,
    bundle: &Bundle,
    retain: &[ExactSample],
    forget: &[ExactSample],
) -> Result<(Coefficients, Plan), kvw::kvw::Error> {
    let mut source = Exact::open(engine, bundle);
    let mut decoder = decoder(engine, bundle, Some(Outputs::Sums(Moment::Absolute)));
    let mut forward = Collector {
        source: &mut source,
        decoder: &mut decoder,
    };
    let moment = Moment::Absolute;
    let retain = collect(&mut forward, moment, retain, &Gates::new(), 1, |_| {})?;
    let rule = KnowledgeVectorWeakening { gamma: GAMMA };
    let plan = weaken(&mut forward, &rule, &retain, forget, &options(), |_| {})?;
    Ok((retain, plan))
}

/// The whole job as a command does it: any error ends it before the next file is written.
fn job_with_files(
    engine: &Engine,
    bundle: &Bundle,
    retain: &[ExactSample],
    forget: &[ExactSample],
    out: &Path,
) -> Result<(), pipeline::Error> {
    let (coefficients, plan) = job(engine, bundle, retain, forget)?;
    let about = serde_json::json!({ "data": "the oracle's" });
    let coefficients_path = out.join("kc.safetensors");
    save_coefficients(&coefficients_path, &coefficients, about.clone(), false)?;
    save_plan(&out.join("plan.safetensors"), &plan, about, false)?;
    apply(bundle, &plan.gates, &out.join("unlearned"))?;
    Ok(())
}

/// The oracle's whole job on `model`.
fn plan_of(engine: &Engine, model: &str) -> Plan {
    let (retain, forget) = (
        exact_samples(model, "retain"),
        exact_samples(model, "forget"),
    );
    job(engine, &open(model), &retain, &forget).unwrap().1
}

/// Every file under `folder` by relative path.
fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => waiting.push(path),
                false => {
                    let relative = path.strip_prefix(folder).unwrap().to_owned();
                    found.insert(relative, std::fs::read(path).unwrap());
                }
            }
        }
    }
    found
}

/// Largest difference and largest value of the logits of `found` and `expected`, over all samples.
struct Distance {
    difference: f64,
    largest: f64,
}

fn distance(
    (expected, gates): (&mut Decoder, &Gates),
    found: (&mut Decoder, &Gates),
    samples: &[Embedded],
) -> Distance {
    let mut distance = Distance {
        difference: 0.0,
        largest: 0.0,
    };
    for sample in samples {
        let expected = expected.logits(sample, gates).unwrap();
        let found = found.0.logits(sample, found.1).unwrap();
        assert_eq!(expected.dim(), found.dim());
        assert_eq!(expected.nrows(), sample.input_ids.len());
        for (&a, &b) in expected.iter().zip(&found) {
            let difference = f64::from((a - b).abs());
            assert!(difference.is_finite());
            distance.difference = distance.difference.max(difference);
            distance.largest = distance.largest.max(f64::from(a).abs());
        }
    }
    distance
}

/// Invariant 1 for one model: compares, and shows that the gates matter at all.
fn gated_is_edited(
    name: &str,
    tolerance: f64,
    engine: &Engine,
    bundle: &Bundle,
    gates: &BTreeMap<LayerId, Vec<f32>>,
    samples: &[Embedded],
) {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    apply(bundle, gates, &out).unwrap();
    let plan = Plan {
        gates: gates.clone(),
        rule: String::new(),
        parameters: serde_json::Value::Null,
        steps: 1,
    };
    let gates = as_gates(&plan);
    let none = Gates::new();
    let mut original = decoder(engine, bundle, Some(Outputs::Model));
    let mut edited = decoder(engine, &Bundle::open(&out).unwrap(), None);
    let edit = distance((&mut original, &gates), (&mut edited, &none), samples);
    let mut plain = decoder(engine, bundle, None);
    let effect = distance((&mut original, &gates), (&mut plain, &none), samples);
    let found = edit.difference / effect.difference;
    eprintln!(
        "{name}: gated and edited logits differ by {:.1e} of {:.2}, which is {found:.1e} of what the gates move",
        edit.difference, edit.largest
    );
    assert!(
        effect.difference > 0.01 * effect.largest,
        "gates without effect prove nothing"
    );
    assert!(found <= tolerance, "{name}: {found:e}");
}

/// Of what the gates move. float32: a weight times its gate is rounded once (6e-8) instead of an
/// activation, in each of 384 terms of three layers, and the layers above see another last bit.
const FLOAT32: f64 = 1e-5;

/// Of what the gates move. float16: each weight times its gate is off by up to 2⁻¹¹ = 4.9e-4.
const FLOAT16: f64 = 2e-3;

#[test]
fn running_with_gates_is_running_the_edited_float32_model() {
    let engine = engine(1);
    for model in MODELS {
        let bundle = open(model);
        let plan = plan_of(&engine, model);
        let mut source = Exact::open(&engine, &bundle);
        let samples: Vec<Embedded> = exact_samples(model, "forget")
            .iter()
            .chain(&exact_samples(model, "retain")[..2])
            .map(|sample| source.embed(sample, &Gates::new()).unwrap())
            .collect();
        gated_is_edited(model, FLOAT32, &engine, &bundle, &plan.gates, &samples);
    }
}

fn noisy_gates(layers: &[usize], d_ff: usize) -> BTreeMap<LayerId, Vec<f32>> {
    let gates = |layer: usize| noise(100 + layer as u64).take(d_ff).collect();
    layers
        .iter()
        .map(|&layer| (layer.into(), gates(layer)))
        .collect()
}

#[test]
fn running_with_gates_is_running_the_edited_float16_model() {
    let engine = engine(1);
    let bundle = Bundle::open(&float16()).unwrap();
    let gates = noisy_gates(&[0, 1, 2], 160);
    gated_is_edited(
        "float16",
        FLOAT16,
        &engine,
        &bundle,
        &gates,
        &float16_samples(),
    );
}

#[test]
fn compare_accepts_the_right_gates_and_no_others() {
    let engine = engine(1);
    let bundle = open("qwen2_vl");
    let plan = plan_of(&engine, "qwen2_vl");
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    apply(&bundle, &plan.gates, &out).unwrap();
    let samples = read_jsonl(&oracle("data").join("forget.jsonl"))
        .unwrap()
        .samples;
    let mut model = Model::open(&bundle, None, &engine, 8).unwrap();
    let mut gated = model.decoder(LAYERS, Outputs::Model, 8).unwrap();
    let written = Bundle::open(&out).unwrap();
    let mut written = Model::open(&written, None, &engine, 8).unwrap();
    let mut edited = written.plain_decoder(8).unwrap();
    let mut compare = |gates: &Gates| {
        let edited = (&mut written.lvlm, &mut edited);
        pipeline::compare(&mut model, &mut gated, gates, edited, &samples).unwrap()
    };
    let agreement = compare(&as_gates(&plan));
    assert!(agreement.holds(), "{agreement:?}");
    assert!(agreement.same_argmax > 0.99, "{agreement:?}");
    // And it says no where the gates are not the model's.
    let agreement = compare(&Gates::new());
    assert!(!agreement.holds(), "{agreement:?}");
}

#[test]
fn apply_changes_only_the_planned_bytes() {
    for (folder, layers, d_ff) in [
        (oracle("qwen2_vl").join("model"), vec![1, 2], 384),
        (oracle("llava").join("model"), vec![0, 2], 384),
        (float16(), vec![1], 160),
    ] {
        let bundle = Bundle::open(&folder).unwrap();
        let mut gates = noisy_gates(&layers, d_ff);
        // A third of the columns is to stay, and one layer as a whole.
        for gate in gates
            .values_mut()
            .flat_map(|gates| gates.iter_mut().step_by(3))
        {
            *gate = 1.0;
        }
        let spare = (0..3).find(|layer| !layers.contains(layer)).unwrap();
        gates.insert(spare.into(), vec![1.0; d_ff]);

        let decoder = bundle.components(None).unwrap().decoder;
        let identity = edit::identity_of(&bundle, decoder).unwrap();
        let plan = EditPlan::new(&bundle, &gates, &identity).unwrap();
        assert_eq!(plan.edits().len(), layers.len(), "none for a layer of ones");
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        edit::apply(&bundle, &plan, &out, &edit::Options::default(), &|_| {}).unwrap();

        // Byte by byte, without any part of the tool.
        let (before, mut after) = (files(&folder), files(&out));
        assert!(after.remove(Path::new("kvw.json")).is_some(), "the receipt");
        assert!(before.keys().eq(after.keys()));
        let mut changed = 0;
        for (name, before) in &before {
            let after = &after[name];
            assert_eq!(before.len(), after.len(), "{}", name.display());
            for (at, _) in before
                .iter()
                .zip(after)
                .enumerate()
                .filter(|(_, (a, b))| a != b)
            {
                changed += 1;
                let edit = plan.edits().iter().find(|edit| {
                    let start = usize::try_from(edit.span.offset).unwrap();
                    let len = usize::try_from(edit.span.len).unwrap();
                    Path::new(&edit.file) == name && (start..start + len).contains(&at)
                });
                let edit = edit.unwrap_or_else(|| panic!("{}: byte {at}", name.display()));
                let width = if d_ff == 384 { 4 } else { 2 };
                let element = (at - usize::try_from(edit.span.offset).unwrap()) / width;
                let neuron = match edit.axis {
                    0 => element / edit.columns,
                    _ => element % edit.columns,
                };
                assert_ne!(neuron % 3, 0, "a gate of 1 changed byte {at}");
            }
        }
        assert!(changed > 1000, "{changed}");
        // And by `diff`, with the receipt.
        let report = edit::diff(&folder, &out).unwrap();
        assert!(report.is_as_planned() && !report.is_identical());
        assert_eq!(report.only_planned_ranges_changed, Some(true));
        assert_eq!(report.changed.len(), 1);
        assert_eq!(report.changed[0].changed_bytes, changed);
        assert_eq!(report.identical_files, before.len() - 1);
    }
}

#[test]
fn gates_of_one_write_nothing() {
    let bundle = open("llava");
    let gates = (0..3).map(|layer| (layer.into(), vec![1.0; 384])).collect();
    let scratch = tempfile::tempdir().unwrap();
    let error = apply(&bundle, &gates, &scratch.path().join("out")).unwrap_err();
    assert!(
        matches!(error, edit::Error::NothingToChange { .. }),
        "{error}"
    );
    assert!(files(scratch.path()).is_empty());
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    for model in MODELS {
        let retain = exact_samples(model, "retain");
        let forget = exact_samples(model, "forget");
        for threads in [1, 2] {
            let [first, second] = [(), ()].map(|()| {
                let scratch = tempfile::tempdir().unwrap();
                let engine = engine(threads);
                job_with_files(&engine, &open(model), &retain, &forget, scratch.path()).unwrap();
                files(scratch.path())
            });
            assert!(first.contains_key(Path::new("kc.safetensors")));
            assert!(first.contains_key(Path::new("plan.safetensors")));
            assert!(first.contains_key(Path::new("unlearned/kvw.json")));
            assert!(first.contains_key(Path::new("unlearned/onnx/decoder_model_merged.onnx")));
            assert!(first.keys().eq(second.keys()));
            for (name, bytes) in &first {
                let same = second[name] == *bytes;
                assert!(same, "{model}, {threads} threads: {}", name.display());
            }
        }
    }
}

/// ONNX Runtime cuts a matrix product along its columns into one part for each thread, and the blocks
/// of the sum along K depend on a part's width: the number of threads moves last bits. So it stands in
/// every provenance, and this is how much it moves.
#[test]
fn another_number_of_threads_moves_last_bits_only() {
    for model in MODELS {
        let retain = exact_samples(model, "retain");
        let forget = exact_samples(model, "forget");
        let [(one, first), (two, second)] =
            [1, 2].map(|threads| job(&engine(threads), &open(model), &retain, &forget).unwrap());
        let coefficients = (0..3)
            .map(|layer| relative(&mean(&two, layer), &mean(&one, layer)))
            .fold(0.0, f64::max);
        let gates = relative(
            second.gates.values().flatten(),
            first.gates.values().flatten(),
        );
        eprintln!(
            "{model}: with 2 threads instead of 1 coefficients move by {coefficients:.1e}, gates by {gates:.1e}, relative"
        );
        // Float32 sums of 384 terms in another order; γ = 2 over four steps carries it eightfold.
        assert!(coefficients <= 5e-6, "{model}: {coefficients:e}");
        assert!(gates <= 5e-5, "{model}: {gates:e}");
    }
}

#[test]
fn a_batch_of_two_counts_what_two_batches_of_one_count() {
    let engine = engine(1);
    for model in MODELS {
        let bundle = open(model);
        let mut samples = exact_samples(model, "retain");
        samples.extend(samples.clone().into_iter().rev());
        let pairs: Vec<_> = samples
            .as_chunks::<2>()
            .0
            .iter()
            .map(|[a, b]| (a.input_ids.len(), b.input_ids.len()))
            .collect();
        assert!(pairs.iter().any(|(a, b)| a < b), "the first one is padded");
        assert!(pairs.iter().any(|(a, b)| a > b), "the second one is padded");
        let mut source = Exact::open(&engine, &bundle);
        let mut decoder = decoder(&engine, &bundle, Some(Outputs::Sums(Moment::Absolute)));
        let mut forward = Collector {
            source: &mut source,
            decoder: &mut decoder,
        };
        let gates: Gates = [(1.into(), ndarray::Array1::from_elem(384, 0.5))].into();
        let mut by = |batch| {
            collect(
                &mut forward,
                Moment::Absolute,
                &samples,
                &gates,
                batch,
                |_| {},
            )
            .unwrap()
        };
        let (one, two) = (by(1), by(2));
        assert_eq!(one.weight, two.weight, "the same answer tokens");
        assert_eq!(one.samples, two.samples);
        let worst = (0..3)
            .map(|layer| relative(&mean(&two, layer), &mean(&one, layer)))
            .fold(0.0, f64::max);
        eprintln!("{model}: coefficients in batches of 2 and of 1 differ by {worst:.1e}, relative");
        // Sums of some 32 positive terms in another order (32 · 6e-8), of activations whose matrix
        // products were cut into other blocks.
        assert!(worst <= 5e-6, "{model}: {worst:e}");
    }
}

/// Asserts that the whole job fails with an error that `is` recognizes, and leaves no file.
fn fails(
    bundle: &Bundle,
    retain: &[ExactSample],
    forget: &[ExactSample],
    is: impl Fn(&kvw::kvw::Error) -> bool,
) {
    let scratch = tempfile::tempdir().unwrap();
    let engine = engine(1);
    let error = job_with_files(&engine, bundle, retain, forget, scratch.path()).unwrap_err();
    assert!(
        matches!(&error, pipeline::Error::Kvw(error) if is(error)),
        "{}",
        chain(&error)
    );
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
}

#[test]
fn a_run_that_changed_nothing_fails_and_writes_nothing() {
    use kvw::kvw::Error;
    for model in MODELS {
        let same = &exact_samples(model, "forget")[..1];
        fails(&open(model), same, same, |error| {
            matches!(error, Error::NothingWeakened { steps: 1, .. })
        });
    }
}

#[test]
fn a_sample_without_an_answer_token_fails_and_writes_nothing() {
    use kvw::kvw::Error;
    let mute = |samples: &[ExactSample]| {
        let mut samples = samples.to_vec();
        samples.last_mut().unwrap().labels.fill(-100);
        samples
    };
    for model in MODELS {
        let (retain, forget) = (
            exact_samples(model, "retain"),
            exact_samples(model, "forget"),
        );
        let bundle = open(model);
        fails(
            &bundle,
            &mute(&retain),
            &forget,
            |error| matches!(error, Error::NoAnswerToken { samples } if samples.contains("retain 11")),
        );
        fails(
            &bundle,
            &retain,
            &mute(&forget),
            |error| matches!(error, Error::NoAnswerToken { samples } if samples.contains("forget 3")),
        );
    }
}

/// A copy of the model with `value` as one weight of the node whose name ends in `node`.
fn with_weight(model: &str, node: &str, value: f32, folder: &Path) -> Bundle {
    let source = oracle(model).join("model");
    for (name, bytes) in files(&source) {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let path = folder.join("onnx/decoder_model_merged.onnx");
    let span = {
        let file = ModelFile::open(&path, &Limits::default()).unwrap();
        let nodes = &file.graph().node;
        let found = nodes.iter().find(|found| found.name().ends_with(node));
        let weight = found.unwrap().input[1].as_str();
        let mut initializers = file.graph().initializer.iter();
        let tensor = initializers.find(|tensor| tensor.name() == weight);
        match file.storage(tensor.unwrap()).unwrap() {
            Storage::Inline(span) => span,
            other => panic!("{other:?}"),
        }
    };
    let mut bytes = std::fs::read(&path).unwrap();
    let at = usize::try_from(span.offset).unwrap() + 4 * 7;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    Bundle::open(folder).unwrap()
}

#[test]
fn a_non_finite_activation_fails_and_writes_nothing() {
    use kvw::kvw::Error;
    for model in MODELS {
        let (retain, forget) = (
            exact_samples(model, "retain"),
            exact_samples(model, "forget"),
        );
        for value in [f32::INFINITY, f32::NAN] {
            for projection in ["up_proj", "gate_proj"] {
                let scratch = tempfile::tempdir().unwrap();
                let node = format!("layers.1/mlp/{projection}/MatMul");
                let bundle = with_weight(model, &node, value, scratch.path());
                fails(
                    &bundle,
                    &retain,
                    &forget,
                    |error| matches!(error, Error::NonFinite { layer, samples, .. } if *layer == 1.into() && samples.contains("retain 0")),
                );
            }
        }
    }
}

#[test]
fn a_non_finite_weight_is_not_scaled() {
    let scratch = tempfile::tempdir().unwrap();
    let node = "layers.1/mlp/down_proj/MatMul";
    let model = scratch.path().join("model");
    let bundle = with_weight("llava", node, f32::INFINITY, &model);
    let out = scratch.path().join("out");
    let error = apply(&bundle, &noisy_gates(&[1], 384), &out).unwrap_err();
    assert!(
        matches!(error, edit::Error::NotFinite { .. }),
        "{}",
        chain(&error)
    );
    let left: Vec<_> = std::fs::read_dir(scratch.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "the model only: {left:?}");
}

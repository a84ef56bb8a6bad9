//! The vision encoder's own layers: measured as PyTorch computes them, gated, and edited.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kvw::bundle::{Bundle, Role};
use kvw::dataset::{Sample, read_jsonl};
use kvw::edit::{self, EditForm, EditPlan, FormChoice, ModelIdentity};
use kvw::graph::{LayerId, Moment, Tower};
use kvw::kvw::{
    Coefficients, Forward, Gates, KnowledgeVectorWeakening, LayerRange, Layers, Options, Order,
    Plan, Rule as _, TowerChoice, load_coefficients, load_plan, save_coefficients, save_plan,
};
use kvw::pipeline::{Model, compare, gates_of};
use kvw::preprocess::Form;
use kvw::runtime::{Collector, Decoder, Engine, VisionSum};
use ndarray::{Array1, Array3};
use support::{Tensors, chain, engine, fixtures, relative};

const RULE: KnowledgeVectorWeakening = KnowledgeVectorWeakening { gamma: 2.0 };

fn family(name: &str) -> PathBuf {
    fixtures().join("families").join(name).join("model")
}

/// The families' samples that have a picture.
fn samples() -> Vec<Sample> {
    let samples = read_jsonl(&fixtures().join("families/samples.jsonl")).unwrap();
    let pictured = samples.samples.into_iter();
    pictured.filter(|sample| sample.image.is_some()).collect()
}

fn options() -> Options {
    Options {
        layers: LayerRange::All,
        batch_size: 1,
        epochs: 1,
        order: Order::File,
        keep_norm: None,
    }
}

/// The retain coefficients of the first samples, and the plan that weakens the others.
fn job(model: &mut Model<'_>, towers: TowerChoice) -> (Coefficients, Plan) {
    let samples = samples();
    let (retain, forget) = samples.split_at(4);
    let layers = Layers::all_of(towers);
    let mut decoder = model.measuring(layers, RULE.moment(), 100).unwrap();
    let coefficients = model.collect(&mut decoder, &RULE, retain, 1, |_| {});
    let coefficients = coefficients.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let plan = model.weaken(
        &mut decoder,
        &RULE,
        &coefficients,
        forget,
        &options(),
        |_| {},
    );
    (
        coefficients,
        plan.unwrap_or_else(|error| panic!("{}", chain(&error))),
    )
}

#[test]
fn coefficients_of_vision_encoders_are_those_of_pytorch() {
    let engine = engine(1);
    let mut families = 0;
    for entry in fs::read_dir(fixtures().join("families")).unwrap() {
        let folder = entry.unwrap().path();
        if !folder.join("model").is_dir() {
            continue;
        }
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let golden = Tensors::open(&folder.join("coefficients.safetensors"));
        let bundle = Bundle::open(&folder.join("model")).unwrap();
        let mut model = Model::open(&bundle, None, &engine, 32).unwrap();
        let layers = Layers::all_of(TowerChoice::Vision);
        let mut decoder = model.measuring(layers, Moment::Absolute, 32);
        let decoder = decoder
            .as_mut()
            .unwrap_or_else(|e| panic!("{name}: {}", chain(e)));
        let (mut worst, mut neurons) = (0.0, 0);
        for sample in samples() {
            let mut forward = Collector {
                source: &mut model.lvlm,
                decoder: &mut *decoder,
            };
            let sums = forward.sums(&[&sample], &Gates::new());
            let sums = sums.unwrap_or_else(|error| panic!("{name}, {}: {error}", sample.id));
            for (layer, sum) in &sums.layers {
                assert_eq!(layer.tower(), Tower::Vision);
                let key = format!("{}.{layer}", sample.id);
                if !golden.has(&key) {
                    continue;
                }
                let expected = golden.floats(&key);
                let weight = sums.own_weights[layer];
                #[allow(clippy::cast_possible_truncation)]
                let found: Array1<f32> = sum.mapv(|sum| (f64::from(sum) / weight) as f32);
                assert_eq!(found.len(), expected.len());
                worst = f64::max(worst, relative(&found, &expected));
                neurons += found.len();
            }
        }
        eprintln!("{name}: {neurons} neurons off by at most {worst:.1e}, relative");
        // The code of phi3_v's checkpoint is in no package: its goldens are of the decoder alone.
        assert!(neurons > 200 || name == "phi3_v", "{name}: {neurons}");
        assert!(worst <= 2e-5, "{name}: {worst:e}");
        families += usize::from(neurons > 0);
    }
    assert!(families >= 10, "{families}");
}

#[test]
fn features_follow_the_gates_of_the_vision_encoder() {
    let engine = engine(1);
    let bundle = Bundle::open(&family("llava")).unwrap();
    let mut model = Model::open(&bundle, None, &engine, 8).unwrap();
    let layers = Layers::all_of(TowerChoice::Vision);
    model.measuring(layers, Moment::Absolute, 8).unwrap();
    let sample = &samples()[0];
    let mut embeds = |gates: &Gates| {
        let embedded = model
            .lvlm
            .embed_as(sample, Form::WithAnswer, gates)
            .unwrap();
        (embedded.inputs_embeds.unwrap(), embedded.vision)
    };
    let half: Gates = [(LayerId::vision(0), Array1::from_elem(48, 0.5))].into();
    let language: Gates = [(LayerId::language(0), Array1::from_elem(64, 0.5))].into();
    let untouched = embeds(&Gates::new());
    let gated = embeds(&half);
    assert_ne!(untouched.0, gated.0);
    // A gate does not weigh itself, but what comes after it sees it.
    let sums = |at: &(Array3<f32>, BTreeMap<LayerId, VisionSum>), layer| {
        at.1[&LayerId::vision(layer)].clone()
    };
    assert_eq!(sums(&untouched, 0), sums(&gated, 0));
    assert_ne!(sums(&untouched, 1), sums(&gated, 1));
    assert_eq!(
        embeds(&language),
        untouched,
        "gates of the decoder change nothing"
    );
    assert_eq!(embeds(&half), gated);
}

/// A model folder of links to `model`'s files, and to the vision encoders in other precisions.
fn with_variants(model: &Path, variants: &Path) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
            }
        }
    };
    copy(model, temp.path());
    copy(&model.join("onnx"), &temp.path().join("onnx"));
    copy(variants, &temp.path().join("onnx"));
    temp
}

/// Applies `plan`, and runs the result against the model with gates as inputs.
fn assert_gated_is_edited(
    engine: &Engine,
    model: &mut Model<'_>,
    bundle: &Bundle,
    (plan, identity): (&Plan, &ModelIdentity),
    form: FormChoice,
) -> EditPlan {
    let towers = plan.towers();
    let edits = EditPlan::in_form(bundle, &plan.gates, identity, form);
    let edits = edits.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    edit::apply(bundle, &edits, &out, &edit::Options::default(), &|_| {}).unwrap();
    let report = edit::diff(bundle.folder(), &out).unwrap();
    assert!(report.is_as_planned(), "{report:?}");
    let written = Bundle::open(&out).unwrap();
    let vision: Vec<String> = bundle
        .files()
        .iter()
        .filter(|file| file.role == Role::VisionEncoder)
        .map(|file| file.variant.clone())
        .collect();
    let mut gated = model.gated(towers, 8).unwrap();
    let mut written = Model::open(&written, None, engine, 8).unwrap();
    let mut edited = written.plain_decoder(8).unwrap();
    let edited = (&mut written.lvlm, &mut edited);
    let gates = gates_of(plan);
    let agreement = compare(model, &mut gated, &gates, edited, &samples()).unwrap();
    let of_largest = agreement.max_difference / agreement.max_logit;
    eprintln!("{vision:?}: {of_largest:.1e} of the largest logit");
    if !agreement.holds() {
        // Activations of 8 bits: the last bit of a gate decides which way some of them are rounded.
        let noise = last_bit(model, &mut gated, &gates);
        let of_largest = noise / agreement.max_logit;
        eprintln!("  and {of_largest:.1e} where gates move by their last bit");
        assert!(of_largest > 1e-3, "{agreement:?} {noise:e}");
        assert!(
            agreement.max_difference <= 2.0 * noise,
            "{agreement:?} {noise:e}"
        );
    }
    edits
}

/// How far the logits move where every gate is the next number down, or up.
fn last_bit(model: &mut Model<'_>, decoder: &mut Decoder, gates: &Gates) -> f64 {
    #[allow(clippy::cast_possible_truncation)]
    let next = |up: bool| -> Gates {
        let step = |gate: f64| match up {
            true => f64::from((gate as f32).next_up()),
            false => f64::from((gate as f32).next_down()),
        };
        let layers = gates.iter();
        layers
            .map(|(&layer, gates)| (layer, gates.mapv(step)))
            .collect()
    };
    let mut logits = |sample: &Sample, gates: &Gates| {
        let embedded = model
            .lvlm
            .embed_as(sample, Form::WithAnswer, gates)
            .unwrap();
        decoder.logits(&embedded, gates).unwrap()
    };
    let mut moved = 0.0;
    for sample in samples() {
        let as_is = logits(&sample, gates);
        for gates in [next(false), next(true)] {
            let found = logits(&sample, &gates);
            let far = as_is
                .iter()
                .zip(&found)
                .map(|(&a, &b)| f64::from((a - b).abs()));
            moved = far.fold(moved, f64::max);
        }
    }
    moved
}

#[test]
fn running_with_vision_gates_is_running_the_edited_model() {
    let engine = engine(1);
    for (name, towers) in [
        ("llava", TowerChoice::Vision),
        ("llava", TowerChoice::All),
        ("qwen2_5_vl", TowerChoice::All),
        ("mllama", TowerChoice::Vision),
    ] {
        let bundle = Bundle::open(&family(name)).unwrap();
        let mut model = Model::open(&bundle, None, &engine, 100).unwrap();
        let (coefficients, plan) = job(&mut model, towers);
        assert_eq!(plan.towers(), towers, "{name}");
        assert_eq!(plan.parameters["tower"], towers.to_string());
        let identity = model.identity_of(towers).unwrap();
        let planned = (&plan, &identity);
        let edits = assert_gated_is_edited(&engine, &mut model, &bundle, planned, FormChoice::Auto);
        let vision = |file: &str| file == "onnx/vision_encoder.onnx";
        for edit in edits.mlps() {
            assert_eq!(vision(&edit.file), edit.layer.tower() == Tower::Vision);
            assert_eq!(edit.form, EditForm::Columns);
        }
        assert!(edits.mlps().iter().any(|edit| vision(&edit.file)));
        // Both files are what they were, and not of the version that knows no vision layers.
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        save_plan(&file, &plan, serde_json::Value::Null, true).unwrap();
        assert_eq!(load_plan(&file).unwrap().0, plan);
        save_coefficients(&file, &coefficients, serde_json::Value::Null, true).unwrap();
        assert_eq!(load_coefficients(&file).unwrap().0, coefficients);
        let bytes = String::from_utf8_lossy(&fs::read(&file).unwrap()).into_owned();
        assert!(bytes.contains(r#"\"format_version\":2"#));
    }
}

/// The plan is made on float32 and applied to all; then each of them is run.
#[test]
fn every_precision_of_a_vision_encoder_is_edited_by_one_plan() {
    let engine = engine(1);
    for (name, form) in [
        ("llava", FormChoice::Auto),
        ("llava", FormChoice::Only(EditForm::Mul)),
        ("qwen2_5_vl", FormChoice::Auto),
        ("qwen2_5_vl", FormChoice::Only(EditForm::Scales)),
    ] {
        let variants = fixtures().join("edits/vision").join(name);
        let folder = with_variants(&family(name), &variants);
        let bundle = Bundle::open(folder.path()).unwrap();
        let mut model = Model::open(&bundle, None, &engine, 100).unwrap();
        let (_, plan) = job(&mut model, TowerChoice::Vision);
        let identity = model.identity_of(TowerChoice::Vision).unwrap();
        let planned = (&plan, &identity);
        let edits = assert_gated_is_edited(&engine, &mut model, &bundle, planned, form);
        let edited: Vec<&str> = edits.mlps().iter().map(|edit| edit.file.as_str()).collect();
        for file in bundle.files() {
            let vision = file.role == Role::VisionEncoder;
            assert_eq!(
                edited.contains(&file.relative.as_str()),
                vision,
                "{}",
                file.relative
            );
        }
        // And each of them run, as the only one of its folder.
        for entry in fs::read_dir(&variants).unwrap() {
            let only = with_variants(&family(name), &variants);
            let onnx = only.path().join("onnx");
            fs::copy(entry.unwrap().path(), onnx.join("vision_encoder.onnx")).unwrap();
            for name in ["fp16", "int8", "q4"] {
                let _ = fs::remove_file(onnx.join(format!("vision_encoder_{name}.onnx")));
            }
            let bundle = Bundle::open(only.path()).unwrap();
            let mut model = Model::open(&bundle, None, &engine, 100).unwrap();
            assert_gated_is_edited(&engine, &mut model, &bundle, (&plan, &identity), form);
        }
    }
}

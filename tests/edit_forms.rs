//! Every form of edit on real exports, run by ONNX Runtime against the gated model.
//!
//! `fixtures/edits/qwen2_vl` is one model in seven precisions; `fixtures/edits/single` holds other ways to quantize the same
//! weights (`tools/edits/make_fixtures.py`). The table over all exports, against a reference that is not this
//! tool's, is made by `tools/edits/evidence.py` (docs/edits.md).

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use kvw::bundle::{Bundle, OnnxFile};
use kvw::check;
use kvw::edit::{self, EditForm, EditPlan, Error, FormChoice, ModelIdentity};
use kvw::graph::{Index, LayerId, Mlp, Outputs, Tower};
use kvw::kvw::Gates;
use kvw::onnx::{Limits, ModelFile};
use kvw::runtime::{Decoder, Engine, Work};
use support::{chain, engine, fixtures, float16_samples, noise};

const LAYERS: usize = 3;
const D_FF: usize = 160;

fn siblings() -> PathBuf {
    fixtures().join("edits/qwen2_vl")
}

fn single(name: &str) -> PathBuf {
    fixtures().join("edits/single").join(name)
}

/// Some 0, some 1, the others in between; layer 2 is not named.
fn gates() -> BTreeMap<LayerId, Vec<f32>> {
    let gate = |(j, g): (usize, f32)| match j % 7 {
        0 => 0.0,
        1 => 1.0,
        _ => g,
    };
    (0..LAYERS - 1)
        .map(|layer| {
            (
                layer.into(),
                noise(layer as u64)
                    .take(D_FF)
                    .enumerate()
                    .map(gate)
                    .collect(),
            )
        })
        .collect()
}

/// What the float32 file's plan is bound to.
fn identity() -> ModelIdentity {
    let bundle = Bundle::open(&siblings()).unwrap();
    let full = bundle
        .decoders()
        .find(|file| file.variant.is_empty())
        .unwrap();
    edit::identity_of(&bundle, full).unwrap()
}

/// The decoder `file`, with gates as inputs or as it is, and how far its edit may be off.
fn open(engine: &Engine, bundle: &Bundle, file: &OnnxFile, outputs: bool) -> (Decoder, f64) {
    let model = ModelFile::open(&file.path, &Limits::default()).unwrap();
    let index = Index::new(model.graph());
    let mlps = edit::mlps(bundle, file, &index);
    let mlps: Vec<&Mlp<'_>> = mlps
        .iter()
        .filter(|mlp| mlp.tower == Tower::Language)
        .collect();
    let tolerance = edit::tolerance(&model, &mlps);
    let tapped = if outputs { mlps.as_slice() } else { &[] };
    let decoder = Decoder::open(engine, &model, tapped, Outputs::Model, Work::Forwards(1));
    (
        decoder.unwrap_or_else(|error| panic!("{}", chain(&error))),
        tolerance,
    )
}

/// Runs the edited `file` of `out` and the gated one of `original`: the same within the tolerance of its storage.
fn assert_gated_is_edited(engine: &Engine, original: &Path, out: &Path, file: &str) {
    let (before, after) = (Bundle::open(original).unwrap(), Bundle::open(out).unwrap());
    let of = |bundle: &Bundle| {
        bundle
            .files()
            .iter()
            .find(|f| f.relative == file)
            .unwrap()
            .clone()
    };
    let (mut gated, tolerance) = open(engine, &before, &of(&before), true);
    let (mut edited, _) = open(engine, &after, &of(&after), false);
    let as_inputs: Gates = gates()
        .into_iter()
        .map(|(layer, gates)| (layer, gates.into_iter().map(f64::from).collect()))
        .collect();
    let (mut error, mut effect, mut largest) = (0f64, 0f64, 0f64);
    for sample in float16_samples() {
        let expected = gated.logits(&sample, &as_inputs).unwrap();
        let untouched = gated.logits(&sample, &Gates::new()).unwrap();
        let found = edited.logits(&sample, &Gates::new()).unwrap();
        for ((&expected, &untouched), &found) in expected.iter().zip(&untouched).zip(&found) {
            let [expected, untouched, found] = [expected, untouched, found].map(f64::from);
            error = error.max((expected - found).abs());
            effect = effect.max((expected - untouched).abs());
            largest = largest.max(expected.abs());
        }
    }
    eprintln!(
        "{file}: {:.1e} of the largest logit, effect {:.1e}",
        error / largest,
        effect / largest
    );
    assert!(
        error <= tolerance * largest,
        "{file}: {error:e} of {largest}"
    );
    assert!(
        error <= 0.1 * effect,
        "{file}: {error:e} where the gates move {effect:e}"
    );
}

fn apply(bundle: &Bundle, plan: &EditPlan, out: &Path) -> edit::Receipt {
    edit::apply(bundle, plan, out, &edit::Options::default(), &|_| {}).unwrap()
}

#[test]
fn one_plan_made_on_float32_edits_every_precision_of_the_same_model() {
    let bundle = Bundle::open(&siblings()).unwrap();
    let plan = EditPlan::new(&bundle, &gates(), &identity()).unwrap();
    let mut forms: BTreeMap<&str, (EditForm, bool)> = BTreeMap::new();
    for mlp in plan.mlps() {
        let name = mlp.file.trim_start_matches("onnx/decoder_model_merged");
        forms.insert(name, (mlp.form, mlp.graph));
    }
    let expected = BTreeMap::from([
        (".onnx", (EditForm::Columns, false)),
        ("_fp16.onnx", (EditForm::Columns, false)),
        ("_bnb4.onnx", (EditForm::Scales, false)),
        ("_q4.onnx", (EditForm::Scales, false)),
        ("_q4f16.onnx", (EditForm::Scales, false)),
        ("_int8.onnx", (EditForm::Scales, true)),
        ("_uint8.onnx", (EditForm::Scales, true)),
    ]);
    assert_eq!(forms, expected);
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    apply(&bundle, &plan, &out);
    assert!(edit::diff(&siblings(), &out).unwrap().is_as_planned());
    let engine = engine(1);
    for file in bundle.decoders() {
        let len = |folder: &Path| fs::metadata(folder.join(&file.relative)).unwrap().len();
        let grows = plan
            .graphs()
            .iter()
            .any(|graph| graph.file == file.relative);
        assert_eq!(len(&siblings()) == len(&out), !grows, "{}", file.relative);
        assert_gated_is_edited(&engine, &siblings(), &out, &file.relative);
    }
}

#[test]
fn scales_and_mul_fit_every_precision() {
    let bundle = Bundle::open(&siblings()).unwrap();
    let engine = engine(1);
    for form in [EditForm::Scales, EditForm::Mul] {
        let plan = EditPlan::in_form(&bundle, &gates(), &identity(), FormChoice::Only(form));
        let plan = plan.unwrap();
        assert!(plan.mlps().iter().all(|mlp| mlp.form == form));
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        apply(&bundle, &plan, &out);
        assert!(
            edit::diff(&siblings(), &out).unwrap().is_as_planned(),
            "{form}"
        );
        for file in bundle.decoders() {
            assert_gated_is_edited(&engine, &siblings(), &out, &file.relative);
        }
    }
    let columns = FormChoice::Only(EditForm::Columns);
    let error = EditPlan::in_form(&bundle, &gates(), &identity(), columns).unwrap_err();
    assert!(matches!(error, Error::NotEditable { .. }), "{error}");
}

/// The codes of what the release gate has against the files of `out`.
fn findings(out: &Path, original: &Path) -> BTreeSet<String> {
    let subject = check::Subject {
        folder: out,
        original: Some(original),
        evidence: None,
    };
    let verdict = check::check(&subject, &check::Policy::default()).unwrap();
    let findings = verdict.checks.iter().flat_map(|check| &check.findings);
    let codes = findings.map(|judged| judged.finding.code.to_string());
    // Nothing was evaluated here.
    codes
        .filter(|code| !["evidence-missing", "agreement-missing"].contains(&code.as_str()))
        .collect()
}

/// The middle of the largest part of a rewritten file that is the input's.
fn untouched(receipt: &edit::Receipt, path: &str) -> u64 {
    let file = receipt.files.iter().find(|file| file.path == path).unwrap();
    let planned = file.ranges.iter().map(|range| (range.offset, range.len));
    let inserted = file.inserted.iter().map(|range| (range.offset, range.len));
    let mut taken: Vec<(u64, u64)> = planned.chain(inserted).collect();
    taken.push((file.bytes, 0));
    taken.sort_unstable();
    let mut end = 0;
    let gaps = taken.into_iter().map(|(offset, len)| {
        let gap = (offset.saturating_sub(end), (end + offset) / 2);
        end = end.max(offset + len);
        gap
    });
    gaps.max().unwrap().1
}

#[test]
fn a_rewritten_graph_passes_the_release_gate_only_as_it_was_planned() {
    let bundle = Bundle::open(&siblings()).unwrap();
    // A scalar scale that becomes a vector, and a product that is put in.
    for form in [FormChoice::Auto, FormChoice::Only(EditForm::Mul)] {
        let plan = EditPlan::in_form(&bundle, &gates(), &identity(), form).unwrap();
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        let receipt = apply(&bundle, &plan, &out);
        assert_eq!(findings(&out, &siblings()), BTreeSet::new());
        let rewritten: Vec<_> = receipt
            .files
            .iter()
            .filter(|f| !f.inserted.is_empty())
            .collect();
        assert!(rewritten.len() >= 2);
        for file in rewritten {
            let path = out.join(&file.path);
            let whole = fs::read(&path).unwrap();
            let flipped = |offset: u64| {
                let mut bytes = whole.clone();
                bytes[usize::try_from(offset).unwrap()] ^= 1;
                fs::write(&path, bytes).unwrap();
                let found = findings(&out, &siblings());
                fs::write(&path, &whole).unwrap();
                found
            };
            assert!(
                flipped(untouched(&receipt, &file.path)).contains("outside-changed"),
                "{}",
                file.path
            );
            // The values of a new tensor end what was put in.
            let last = file.inserted.iter().max_by_key(|range| range.len).unwrap();
            let found = flipped(last.offset + last.len - 1);
            assert!(found.contains("range-altered"), "{}: {found:?}", file.path);
            // The file as it was before.
            fs::copy(siblings().join(&file.path), &path).unwrap();
            let found = findings(&out, &siblings());
            assert!(found.contains("file-length"), "{}: {found:?}", file.path);
            assert!(found.contains("range-altered"), "{}: {found:?}", file.path);
            fs::write(&path, &whole).unwrap();
        }
        // The same folder, whose receipt does not know of one file's change.
        let mut other = receipt.clone();
        let file = other
            .files
            .iter_mut()
            .find(|file| !file.inserted.is_empty())
            .unwrap();
        file.inserted.clear();
        let json = serde_json::to_vec(&other).unwrap();
        fs::write(out.join("kvw.json"), json).unwrap();
        let found = findings(&out, &siblings());
        assert!(found.contains("outside-changed"), "{form:?}: {found:?}");
        assert!(
            found.contains("layer-not-edited") || found.contains("decoder-not-edited"),
            "{found:?}"
        );
    }
}

#[test]
fn static_and_blockwise_dequantized_weights_are_edited_by_their_scales() {
    let engine = engine(1);
    for (file, graph) in [
        ("static_qdq.onnx", true),
        ("static_qoperator.onnx", true),
        ("int4_qdq.onnx", false),
    ] {
        let bundle = Bundle::open(&single(file)).unwrap();
        let plan = EditPlan::new(&bundle, &gates(), &identity()).unwrap();
        for mlp in plan.mlps() {
            assert_eq!((mlp.form, mlp.graph), (EditForm::Scales, graph), "{file}");
        }
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        apply(&bundle, &plan, &out);
        assert_gated_is_edited(&engine, &single(file), &out.join(file), file);
    }
}

#[test]
fn of_a_fused_gate_up_only_the_upper_half_is_multiplied() {
    let bundle = Bundle::open(&single("fused/model.onnx")).unwrap();
    let own = edit::identity_of(&bundle, bundle.decoders().next().unwrap()).unwrap();
    let plan = EditPlan::new(&bundle, &gates(), &own).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    apply(&bundle, &plan, &out);
    for edit in plan.edits() {
        assert!(
            edit.tensor.ends_with("gate_up_proj.MatMul.weight_scales"),
            "{}",
            edit.tensor
        );
        assert_eq!((edit.rows, edit.columns, edit.axis), (2 * D_FF, 2, 0));
        let read = |folder: &Path| -> Vec<f32> {
            let bytes = fs::read(folder.join(&edit.file)).unwrap();
            let start = usize::try_from(edit.span.offset).unwrap();
            let bytes = &bytes[start..start + usize::try_from(edit.span.len).unwrap()];
            bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect()
        };
        let (before, after) = (read(bundle.folder()), read(&out));
        let gates = &gates()[&edit.layer];
        for (scale, (before, after)) in before.iter().zip(&after).enumerate() {
            // The graph takes the gate from the first output of its Split, and up from the second.
            let gate = (scale / 2).checked_sub(D_FF).map_or(1.0, |j| gates[j]);
            // A gate of 0 leaves no sign behind.
            let expected = if gate == 0.0 { 0.0 } else { before * gate };
            assert_eq!(after.to_bits(), expected.to_bits(), "scale {scale}");
        }
    }
}

fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let mean = |v: &[f32]| v.iter().map(|&x| f64::from(x)).sum::<f64>() / v.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f64::from(a) - ma, f64::from(b) - mb);
        (ab, aa, bb) = (ab + a * b, aa + a * a, bb + b * b);
    }
    ab / (aa * bb).sqrt()
}

#[test]
fn sketches_of_one_model_agree_in_every_precision_and_no_others_do() {
    let bundle = Bundle::open(&siblings()).unwrap();
    let expected = identity();
    let mut found: Vec<(String, ModelIdentity)> = bundle
        .decoders()
        .map(|file| {
            (
                file.relative.clone(),
                edit::identity_of(&bundle, file).unwrap(),
            )
        })
        .collect();
    for name in ["static_qdq.onnx", "static_qoperator.onnx", "int4_qdq.onnx"] {
        let bundle = Bundle::open(&single(name)).unwrap();
        let file = bundle.decoders().next().unwrap();
        found.push((name.to_owned(), edit::identity_of(&bundle, file).unwrap()));
    }
    for (name, found) in found {
        assert!(edit::check(&expected, &found).is_ok(), "{name}");
        let pairs = expected.layers.iter().zip(&found.layers);
        let least = pairs
            .map(|(a, b)| correlation(&a.sketch, &b.sketch))
            .fold(1.0, f64::min);
        let other = correlation(&expected.layers[0].sketch, &found.layers[1].sketch).abs();
        let mut reversed = found.layers[0].sketch.clone();
        reversed.reverse();
        let reordered = correlation(&expected.layers[0].sketch, &reversed).abs();
        eprintln!("{name}: {least:.4}; another layer {other:.2}; reordered {reordered:.2}");
        assert!(least > 0.985, "{name}: {least}");
        assert!(
            other < 0.5 && reordered < 0.5,
            "{name}: {other} {reordered}"
        );
    }
}

#[test]
fn rows_that_would_share_a_scale_are_not_answered_together() {
    let engine = engine(1);
    let bundle = Bundle::open(&siblings()).unwrap();
    for file in bundle.decoders() {
        let (decoder, _) = open(&engine, &bundle, file, true);
        // DynamicQuantizeLinear takes one scale from all rows of a batch.
        let shares = ["int8", "uint8"].contains(&file.variant.as_str());
        let together = decoder.answers_together(&float16_samples()[0]);
        assert_eq!(together, !shares, "{}", file.relative);
    }
}

#[test]
fn a_folder_with_a_decoder_of_another_model_is_refused_by_the_files_name() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("mixed");
    fs::create_dir_all(folder.join("onnx")).unwrap();
    for entry in fs::read_dir(siblings().join("onnx")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.join("onnx").join(entry.file_name())).unwrap();
    }
    fs::copy(siblings().join("config.json"), folder.join("config.json")).unwrap();
    // Of the same sizes, but other weights.
    let name = "onnx/decoder_model_merged_int8.onnx";
    fs::copy(
        fixtures().join("exports/tjs-llava").join(name),
        folder.join(name),
    )
    .unwrap();
    let error = match Bundle::open(&folder) {
        Err(error) => error.to_string(),
        Ok(bundle) => EditPlan::new(&bundle, &gates(), &identity())
            .unwrap_err()
            .to_string(),
    };
    assert!(error.contains(name), "{error}");
}

//! The edit, on small models built here: what may change, what must not, and what is refused.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kvw::bundle::Bundle;
use kvw::edit::{
    self, Cost, DiffReport, EditForm, EditPlan, Error, FormChoice, Match, Mismatch, ModelIdentity,
    Options, Receipt,
};
use kvw::graph::LayerId;
use kvw::onnx::schema::tensor_proto::DataLocation;
use kvw::onnx::schema::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto,
    TensorProto, ValueInfoProto,
};
use kvw::onnx::{ByteSpan, DataType, Limits, ModelFile};
use proptest::prelude::*;
use prost::Message as _;
use tempfile::TempDir;
use thin_vec::thin_vec;

const DECODER: &str = "onnx/decoder_model_merged.onnx";

/// How a small decoder is stored.
#[derive(Clone, Debug)]
struct Spec {
    layers: usize,
    d_ff: usize,
    d_model: usize,
    dtype: DataType,
    /// `Gemm` with `transB` and a stored `[d_model, d_ff]`, instead of `MatMul` and `[d_ff, d_model]`.
    transposed: bool,
    /// The name of an external data file, or inline.
    external: Option<&'static str>,
    seed: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Spec {
            layers: 2,
            d_ff: 24,
            d_model: 10,
            dtype: DataType::FLOAT,
            transposed: false,
            external: None,
            seed: 1,
        }
    }
}

/// Weights in (-1, 1), from SplitMix64.
fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x1234_5678_9abc_def1);
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

fn stored(dtype: DataType, values: &[f32]) -> Vec<u8> {
    let half = |bits: fn(f32) -> u16| -> Vec<u8> {
        values.iter().flat_map(|&v| bits(v).to_le_bytes()).collect()
    };
    match dtype {
        DataType::FLOAT => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DataType::FLOAT16 => half(|v| half::f16::from_f32(v).to_bits()),
        _ => half(|v| half::bf16::from_f32(v).to_bits()),
    }
}

fn tensor(name: &str, dtype: DataType, dims: &[usize], bytes: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        data_type: Some(dtype.code()),
        dims: dims.iter().map(|&d| d as i64).collect(),
        raw_data: Some(bytes.into()),
        ..Default::default()
    }
}

fn node(op: &str, name: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: Some(op.into()),
        name: Some(name.into()),
        input: inputs.iter().map(|&i| i.into()).collect(),
        output: thin_vec![output.into()],
        ..Default::default()
    }
}

fn value(name: &str) -> ValueInfoProto {
    ValueInfoProto {
        name: Some(name.into()),
        ..Default::default()
    }
}

/// `[d_ff, d_model]` of a layer, before it is stored.
fn down_weight(spec: &Spec, layer: usize) -> Vec<f32> {
    random(spec.seed * 100 + layer as u64, spec.d_ff * spec.d_model)
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns)
        .flat_map(|c| (0..rows).map(move |r| values[r * columns + c]))
        .collect()
}

fn graph(spec: &Spec, down: impl Fn(usize) -> Vec<f32>) -> GraphProto {
    let mut graph = GraphProto {
        name: Some("g".into()),
        input: thin_vec![value("x0")],
        output: thin_vec![value(&format!("x{}", spec.layers))],
        ..Default::default()
    };
    for layer in 0..spec.layers {
        let name = |part: &str| format!("/model/layers.{layer}/mlp/{part}");
        let (x, next) = (format!("x{layer}"), format!("x{}", layer + 1));
        let (up, up_w) = (format!("up{layer}"), format!("up_w{layer}"));
        let (h, y, down_w) = (
            format!("h{layer}"),
            format!("y{layer}"),
            format!("down_w{layer}"),
        );
        let up_values = random(spec.seed * 1000 + layer as u64, spec.d_ff * spec.d_model);
        let up_bytes = stored(spec.dtype, &up_values);
        let (op, dims, values) = match spec.transposed {
            false => ("MatMul", [spec.d_ff, spec.d_model], down(layer)),
            true => (
                "Gemm",
                [spec.d_model, spec.d_ff],
                transpose(&down(layer), spec.d_ff, spec.d_model),
            ),
        };
        graph.initializer.push(tensor(
            &up_w,
            spec.dtype,
            &[spec.d_model, spec.d_ff],
            up_bytes,
        ));
        let bytes = stored(spec.dtype, &values);
        graph
            .initializer
            .push(tensor(&down_w, spec.dtype, &dims, bytes));
        graph
            .node
            .push(node("MatMul", &name("up_proj"), &[&x, &up_w], &up));
        graph.node.push(node("Relu", &name("act"), &[&up], &h));
        let mut product = node(op, &name("down_proj"), &[&h, &down_w], &y);
        if spec.transposed {
            product.attribute.push(AttributeProto {
                name: Some("transB".into()),
                i: Some(1),
                ..Default::default()
            });
        }
        graph.node.push(product);
        graph.node.push(node("Add", "", &[&x, &y], &next));
    }
    graph
}

/// Moves the weights to an external data file beside `path`, with some slack between them.
fn externalize(graph: &mut GraphProto, path: &Path, data: &str) {
    let mut bytes = b"junk that is no tensor".to_vec();
    for tensor in &mut graph.initializer {
        let raw = tensor.raw_data.take().unwrap();
        refer(tensor, data, bytes.len(), raw.len());
        bytes.extend_from_slice(&raw);
        bytes.extend_from_slice(b"pad");
    }
    fs::write(path.with_file_name(data), bytes).unwrap();
}

fn refer(tensor: &mut TensorProto, data: &str, offset: usize, length: usize) {
    tensor.data_location = Some(DataLocation::External as i32);
    tensor.external_data = [
        ("location", data.to_owned()),
        ("offset", offset.to_string()),
        ("length", length.to_string()),
    ]
    .into_iter()
    .map(|(key, value)| StringStringEntryProto {
        key: Some(key.into()),
        value: Some(value.into()),
    })
    .collect();
}

fn write_graph(path: &Path, graph: GraphProto) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let model = ModelProto {
        ir_version: Some(10),
        opset_import: thin_vec![OperatorSetIdProto {
            version: Some(21),
            ..Default::default()
        }],
        graph: Some(graph),
        ..Default::default()
    };
    fs::write(path, model.encode_to_vec()).unwrap();
}

fn write_decoder(path: &Path, spec: &Spec) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut graph = graph(spec, |layer| down_weight(spec, layer));
    if let Some(data) = spec.external {
        externalize(&mut graph, path, data);
    }
    write_graph(path, graph);
}

/// A folder of transformers.js' layout, with what every folder has beside its models.
fn folder_with(decoders: &[(&str, Spec)]) -> (TempDir, PathBuf) {
    let temp = TempDir::new().unwrap();
    let folder = temp.path().join("model");
    for (name, spec) in decoders {
        write_decoder(&folder.join(name), spec);
    }
    let config = format!(
        r#"{{"model_type": "tiny", "num_hidden_layers": {}}}"#,
        decoders[0].1.layers
    );
    fs::write(folder.join("config.json"), config).unwrap();
    fs::create_dir_all(folder.join("deep/er")).unwrap();
    fs::write(folder.join("deep/er/notes.txt"), "copied byte for byte").unwrap();
    (temp, folder)
}

fn identity_of(folder: &Path, name: &str) -> ModelIdentity {
    let bundle = Bundle::open(folder).unwrap();
    let file = bundle.files().iter().find(|f| f.relative == name).unwrap();
    edit::identity_of(&bundle, file).unwrap()
}

fn gates_for(spec: &Spec, gate: impl Fn(usize, usize) -> f32) -> BTreeMap<LayerId, Vec<f32>> {
    (0..spec.layers)
        .map(|layer| {
            let gates = (0..spec.d_ff).map(|j| gate(layer, j));
            (layer.into(), gates.collect())
        })
        .collect()
}

fn plan(folder: &Path, gates: &BTreeMap<LayerId, Vec<f32>>) -> Result<EditPlan, Error> {
    EditPlan::new(
        &Bundle::open(folder).unwrap(),
        gates,
        &identity_of(folder, DECODER),
    )
}

fn run(folder: &Path, plan: &EditPlan, out: &Path) -> Result<Receipt, Error> {
    let bundle = Bundle::open(folder).unwrap();
    edit::apply(&bundle, plan, out, &Options::default(), &|_| {})
}

fn plan_and_run(
    folder: &Path,
    gates: &BTreeMap<LayerId, Vec<f32>>,
    out: &Path,
) -> Result<Receipt, Error> {
    run(folder, &plan(folder, gates)?, out)
}

/// Nothing at the output, and nothing left in the folder where it was staged.
fn assert_no_output(out: &Path) {
    assert!(!out.exists());
    let left: Vec<_> = fs::read_dir(out.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn down_values(folder: &Path, name: &str, tensor: &str) -> Vec<f32> {
    let model = ModelFile::open(&folder.join(name), &Limits::default()).unwrap();
    let found = model
        .graph()
        .initializer
        .iter()
        .find(|t| t.name() == tensor)
        .unwrap();
    let bytes = model.bytes(found).unwrap();
    let halves = || {
        bytes
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
    };
    match model.data_type(found).unwrap() {
        DataType::FLOAT => bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect(),
        DataType::FLOAT16 => halves().map(|h| half::f16::from_bits(h).to_f32()).collect(),
        _ => halves()
            .map(|h| half::bf16::from_bits(h).to_f32())
            .collect(),
    }
}

fn any_spec() -> impl Strategy<Value = Spec> {
    (
        1usize..4,
        1usize..40,
        1usize..20,
        prop::sample::select(vec![DataType::FLOAT, DataType::FLOAT16, DataType::BFLOAT16]),
        any::<bool>(),
        prop::sample::select(vec![None, Some("weights.data")]),
        1u64..1000,
    )
        .prop_map(
            |(layers, d_ff, d_model, dtype, transposed, external, seed)| Spec {
                layers,
                d_ff,
                d_model,
                dtype,
                transposed,
                external,
                seed,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn gates_of_1_change_nothing_and_say_so(spec in any_spec()) {
        let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
        let out = temp.path().join("out");
        let result = plan_and_run(&folder, &gates_for(&spec, |_, _| 1.0), &out);
        let refused = matches!(result, Err(Error::NothingToChange { .. }));
        prop_assert!(refused);
        assert_no_output(&out);
    }

    #[test]
    fn only_slices_with_a_gate_other_than_1_change(
        spec in any_spec(),
        drawn in prop::collection::vec(prop::sample::select(vec![1.0f32, 1.0, 0.5, 0.123_456, 0.0]), 120),
    ) {
        let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
        let out = temp.path().join("out");
        let mut gates = gates_for(&spec, |layer, j| drawn[(layer * 40 + j) % 120]);
        gates.entry(0.into()).or_default()[0] = 0.5;
        let plan = plan(&folder, &gates).unwrap();
        plan.check_bytes(&Bundle::open(&folder).unwrap()).unwrap();
        let receipt = run(&folder, &plan, &out).unwrap();
        prop_assert_eq!(&receipt.plan_digest, &plan.digest());

        // Bytes outside the planned ranges, in every file.
        let data = spec.external.map_or(DECODER.to_owned(), |data| format!("onnx/{data}"));
        for name in [DECODER, data.as_str(), "config.json", "deep/er/notes.txt"] {
            let (before, after) = (fs::read(folder.join(name)).unwrap(), fs::read(out.join(name)).unwrap());
            prop_assert_eq!(before.len(), after.len());
            let spans: Vec<ByteSpan> =
                plan.edits().iter().filter(|e| e.file == name).map(|e| e.span).collect();
            for (at, (a, b)) in before.iter().zip(&after).enumerate() {
                let here = ByteSpan { offset: at as u64, len: 1 };
                prop_assert!(a == b || spans.iter().any(|s| s.overlaps(here)), "{} at {}", name, at);
            }
        }
        // Values inside them: w · g, rounded once.
        for layer in 0..spec.layers {
            let tensor = format!("down_w{layer}");
            let before = down_values(&folder, DECODER, &tensor);
            let after = down_values(&out, DECODER, &tensor);
            for (at, (&w, &new)) in before.iter().zip(&after).enumerate() {
                let j = if spec.transposed { at % spec.d_ff } else { at / spec.d_model };
                let gate = gates[&layer.into()][j];
                let exact = f64::from(w) * f64::from(gate);
                // Half a unit in the last place; the least subnormal of float16 is 2^-24.
                let unit = match spec.dtype {
                    DataType::FLOAT => 2f64.powi(-24),
                    DataType::FLOAT16 => 2f64.powi(-11),
                    _ => 2f64.powi(-8),
                };
                prop_assert!((f64::from(new) - exact).abs() <= exact.abs() * unit + 2f64.powi(-25));
                prop_assert!(gate != 1.0 || w.to_bits() == new.to_bits());
            }
        }
        // And the tool's own proof of it.
        let report = edit::diff(&folder, &out).unwrap();
        prop_assert!(report.is_as_planned(), "{:?}", report);
        prop_assert_eq!(report.only_planned_ranges_changed, Some(true));
        prop_assert!(!report.is_identical());
    }
}

#[test]
fn all_float_decoders_of_a_folder_are_edited_by_one_plan() {
    let base = Spec::default();
    let half = Spec {
        dtype: DataType::FLOAT16,
        transposed: true,
        external: Some("decoder_model_merged_fp16.onnx_data"),
        ..base.clone()
    };
    let bf16 = Spec {
        dtype: DataType::BFLOAT16,
        ..base.clone()
    };
    let (temp, folder) = folder_with(&[
        (DECODER, base.clone()),
        ("onnx/decoder_model_merged_fp16.onnx", half),
        ("onnx/decoder_with_past_model_bf16.onnx", bf16),
    ]);
    let out = temp.path().join("out");
    let receipt = plan_and_run(
        &folder,
        &gates_for(&base, |_, j| 1.0 - j as f32 / 30.0),
        &out,
    )
    .unwrap();
    let files: Vec<&str> = receipt.files.iter().map(|f| f.path.as_str()).collect();
    assert_eq!(
        files,
        [
            DECODER,
            "onnx/decoder_model_merged_fp16.onnx_data",
            "onnx/decoder_with_past_model_bf16.onnx"
        ]
    );
    assert_eq!(receipt, Receipt::read(&out.join("kvw.json")).unwrap());
    assert!(edit::diff(&folder, &out).unwrap().is_as_planned());
}

#[test]
fn two_decoders_that_share_their_data_are_edited_once() {
    let spec = Spec {
        external: Some("shared.data"),
        ..Spec::default()
    };
    let second = "onnx/decoder_with_past_model.onnx";
    let (temp, folder) = folder_with(&[(DECODER, spec.clone()), (second, spec.clone())]);
    let out = temp.path().join("out");
    let plan = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap();
    assert_eq!(plan.edits().len(), spec.layers);
    run(&folder, &plan, &out).unwrap();
    let (before, after) = (
        down_values(&folder, second, "down_w0"),
        down_values(&out, second, "down_w0"),
    );
    assert!(before.iter().zip(&after).all(|(b, a)| b * 0.5 == *a));
}

#[test]
fn a_plan_for_half_precision_knows_the_same_model_in_full_precision() {
    let spec = Spec {
        d_ff: 300,
        d_model: 64,
        ..Spec::default()
    };
    let half = Spec {
        dtype: DataType::FLOAT16,
        transposed: true,
        ..spec.clone()
    };
    let (_temp, folder) = folder_with(&[
        (DECODER, spec),
        ("onnx/decoder_model_merged_fp16.onnx", half),
    ]);
    let full = identity_of(&folder, DECODER);
    let half = identity_of(&folder, "onnx/decoder_model_merged_fp16.onnx");
    assert_eq!(edit::check(&full, &full), Ok(Match::Exact));
    assert_eq!(edit::check(&half, &full), Ok(Match::Sketch));
    let json = serde_json::to_string(&full).unwrap();
    assert_eq!(serde_json::from_str::<ModelIdentity>(&json).unwrap(), full);
}

/// Pearson's correlation of two sketches.
fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let mean = |v: &[f32]| v.iter().map(|&x| f64::from(x)).sum::<f64>() / v.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        a.iter()
            .zip(b)
            .map(|(&x, &y)| f(f64::from(x) - ma, f64::from(y) - mb))
            .sum()
    };
    sum(&|x, y| x * y) / (sum(&|x, _| x * x) * sum(&|_, y| y * y)).sqrt()
}

/// Weights as a block quantizer leaves them: `bits` bits, blocks of 32 along d_ff, symmetric.
fn quantized(values: &[f32], d_model: usize, bits: u32) -> Vec<f32> {
    let mut out = values.to_vec();
    let levels = (1u32 << (bits - 1)) as f32;
    for column in 0..d_model {
        for block in (0..values.len() / d_model).collect::<Vec<_>>().chunks(32) {
            let at = |row: usize| row * d_model + column;
            let largest = block
                .iter()
                .map(|&r| values[at(r)].abs())
                .fold(0.0, f32::max);
            let scale = (largest / (levels - 1.0)).max(f32::MIN_POSITIVE);
            for &row in block {
                out[at(row)] = (values[at(row)] / scale).round() * scale;
            }
        }
    }
    out
}

#[test]
fn a_sketch_survives_quantization_and_nothing_else() {
    let spec = Spec {
        layers: 1,
        d_ff: 512,
        d_model: 96,
        ..Spec::default()
    };
    let weights = down_weight(&spec, 0);
    // As heavy-tailed as trained weights: a block's largest value sets the step of all.
    let weights: Vec<f32> = weights.iter().map(|w| w * w * w).collect();
    let rows: Vec<&[f32]> = weights.chunks(spec.d_model).collect();
    let permuted: Vec<f32> = (0..spec.d_ff)
        .flat_map(|j| rows[(j * 5 + 3) % spec.d_ff].to_vec())
        .collect();
    let other = random(77, spec.d_ff * spec.d_model);
    let sketch = |values: Vec<f32>| {
        let temp = TempDir::new().unwrap();
        let path = temp.path().join(DECODER);
        let half = Spec {
            dtype: DataType::FLOAT16,
            ..spec.clone()
        };
        write_graph(&path, graph(&half, |_| values.clone()));
        fs::write(
            temp.path().join("config.json"),
            r#"{"model_type": "tiny", "num_hidden_layers": 1}"#,
        )
        .unwrap();
        identity_of(temp.path(), DECODER).layers.remove(0).sketch
    };
    let original = sketch(weights.clone());
    assert_eq!(original.len(), 256);
    let of = |values: Vec<f32>| correlation(&original, &sketch(values));
    let same = [
        of(quantized(&weights, spec.d_model, 8)),
        of(quantized(&weights, spec.d_model, 4)),
    ];
    let different = [of(permuted), of(other)];
    println!("8 and 4 bits: {same:?}; permuted and another model: {different:?}");
    assert!(same.iter().all(|&c| c > 0.985), "{same:?}");
    assert!(different.iter().all(|&c| c.abs() < 0.3), "{different:?}");
}

#[test]
fn a_plan_for_another_model_is_refused() {
    let spec = Spec::default();
    let (_t1, folder) = folder_with(&[(DECODER, spec.clone())]);
    let gates = gates_for(&spec, |_, _| 0.5);
    let bundle = Bundle::open(&folder).unwrap();
    let refused = |other: Spec| {
        let (_temp, folder) = folder_with(&[(DECODER, other)]);
        EditPlan::new(&bundle, &gates, &identity_of(&folder, DECODER)).unwrap_err()
    };
    let seed = refused(Spec {
        seed: 2,
        ..spec.clone()
    });
    assert!(
        matches!(
            seed,
            Error::OtherModel {
                mismatch: Mismatch::Sketch { .. },
                ..
            }
        ),
        "{seed}"
    );
    let wider = refused(Spec {
        d_ff: 25,
        ..spec.clone()
    });
    assert!(
        matches!(
            wider,
            Error::OtherModel {
                mismatch: Mismatch::Shape { .. },
                ..
            }
        ),
        "{wider}"
    );
    let deeper = refused(Spec { layers: 3, ..spec });
    assert!(
        matches!(
            deeper,
            Error::OtherModel {
                mismatch: Mismatch::Layers { .. },
                ..
            }
        ),
        "{deeper}"
    );
    assert!(deeper.to_string().contains(DECODER) && deeper.hint().is_some());
}

#[test]
fn the_same_precision_with_one_other_bit_is_refused_and_leaves_nothing() {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let identity = identity_of(&folder, DECODER);
    let before = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap();
    let span = before.edits()[0].span;
    let mut bytes = fs::read(folder.join(DECODER)).unwrap();
    bytes[span.offset as usize] ^= 1;
    fs::write(folder.join(DECODER), bytes).unwrap();
    let bundle = Bundle::open(&folder).unwrap();
    let plan = EditPlan::new(&bundle, &gates_for(&spec, |_, _| 0.5), &identity).unwrap();
    assert!(matches!(
        plan.check_bytes(&bundle),
        Err(Error::OtherModel { .. })
    ));
    let out = temp.path().join("out");
    let error = run(&folder, &plan, &out).unwrap_err();
    assert!(
        matches!(
            error,
            Error::OtherModel {
                mismatch: Mismatch::Bytes { .. },
                ..
            }
        ),
        "{error}"
    );
    assert_no_output(&out);
}

#[test]
fn gates_that_do_not_fit_are_refused() {
    let spec = Spec::default();
    let (_temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let mut gates = gates_for(&spec, |_, _| 0.5);
    gates.insert(1.into(), vec![0.5; 23]);
    let error = plan(&folder, &gates).unwrap_err();
    assert!(
        matches!(
            error,
            Error::GateCount {
                layer,
                expected: 24,
                found: 23,
                ..
            } if layer == LayerId::language(1)
        ),
        "{error}"
    );
    for bad in [f32::NAN, f32::INFINITY] {
        let error = plan(
            &folder,
            &gates_for(&spec, |l, j| if (l, j) == (1, 3) { bad } else { 0.5 }),
        );
        assert!(matches!(
            error,
            Err(Error::Gate {
                layer,
                neuron: 3,
                ..
            }) if layer == LayerId::language(1)
        ));
    }
    let gates = BTreeMap::from([(7.into(), vec![0.5; 24])]);
    assert!(matches!(plan(&folder, &gates), Err(Error::Layers { .. })));
}

#[test]
fn a_decoder_with_fewer_layers_than_the_configuration_tells_is_refused() {
    let spec = Spec::default();
    let (_temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    fs::write(
        folder.join("config.json"),
        r#"{"model_type": "tiny", "text_config": {"num_hidden_layers": 3}}"#,
    )
    .unwrap();
    let error = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap_err();
    assert!(matches!(error, Error::Layers { .. }), "{error}");
    let inspection = edit::inspect(&Bundle::open(&folder).unwrap()).unwrap();
    assert_eq!(inspection.files[0].warnings.len(), 1);
}

/// A folder whose decoder's graph was altered before it was written.
fn altered(alter: impl Fn(&mut GraphProto)) -> (TempDir, PathBuf) {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let mut graph = graph(&spec, |layer| down_weight(&spec, layer));
    alter(&mut graph);
    write_graph(&folder.join(DECODER), graph);
    (temp, folder)
}

fn in_form(folder: &Path, form: EditForm) -> Result<EditPlan, Error> {
    EditPlan::in_form(
        &Bundle::open(folder).unwrap(),
        &gates_for(&Spec::default(), |_, _| 0.5),
        &identity_of(folder, DECODER),
        FormChoice::Only(form),
    )
}

#[test]
fn a_weight_that_something_else_reads_is_copied_before_it_is_changed() {
    let readers: [fn(&mut GraphProto); 3] = [
        |graph| {
            let other = node("Softmax", "the_other", &["down_w1"], "z");
            graph.node.push(other);
            graph.output.push(value("z"));
        },
        |graph| {
            graph.node.push(node("Transpose", "t", &["down_w1"], "z"));
            graph.node.push(node("Neg", "behind", &["z"], "nz"));
            graph.output.push(value("nz"));
        },
        |graph| graph.output.push(value("down_w1")),
    ];
    for reader in readers {
        let (temp, folder) = altered(reader);
        let plan = in_form(&folder, EditForm::Columns).unwrap();
        let graphs: Vec<bool> = plan.mlps().iter().map(|mlp| mlp.graph).collect();
        assert_eq!(graphs, [false, true], "layer 1's weight is shared");
        let out = temp.path().join("out");
        run(&folder, &plan, &out).unwrap();
        let old = down_values(&folder, DECODER, "down_w1");
        assert_eq!(old, down_values(&out, DECODER, "down_w1"));
        let halved: Vec<f32> = old.iter().map(|w| w * 0.5).collect();
        assert_eq!(halved, down_values(&out, DECODER, "down_w1.kvw.layers.1"));
        let model = ModelFile::open(&out.join(DECODER), &Limits::default()).unwrap();
        let down = model
            .graph()
            .node
            .iter()
            .find(|n| n.name().ends_with("1/mlp/down_proj"));
        assert_eq!(down.unwrap().input[1], "down_w1.kvw.layers.1");
        assert!(edit::diff(&folder, &out).unwrap().is_as_planned());
    }
}

#[test]
fn packed_float_data_is_multiplied_where_it_lies() {
    let spec = Spec::default();
    let (temp, folder) = altered(|graph| {
        let mut weights = graph.initializer.iter_mut();
        let weight = weights.find(|t| t.name() == "down_w0").unwrap();
        weight.raw_data = None;
        weight.float_data = down_weight(&Spec::default(), 0).into();
    });
    let out = temp.path().join("out");
    plan_and_run(&folder, &gates_for(&spec, |_, _| 0.5), &out).unwrap();
    let halved: Vec<f32> = down_weight(&spec, 0).iter().map(|w| w * 0.5).collect();
    assert_eq!(halved, down_values(&out, DECODER, "down_w0"));
    assert!(edit::diff(&folder, &out).unwrap().is_as_planned());
}

#[test]
fn a_weight_behind_a_cast_is_multiplied_as_stored() {
    let (temp, folder) = altered(|graph| {
        let mut nodes = graph.node.iter_mut();
        let reads = |n: &&mut NodeProto| n.input.iter().any(|i| i == "down_w0");
        nodes.find(reads).unwrap().input[1] = "cast".into();
        let cast = node("Cast", "c", &["down_w0"], "cast");
        graph.node.insert(0, cast);
    });
    let out = temp.path().join("out");
    let plan = plan(&folder, &gates_for(&Spec::default(), |_, _| 0.5)).unwrap();
    assert!(plan.graphs().is_empty());
    run(&folder, &plan, &out).unwrap();
    let old = down_values(&folder, DECODER, "down_w0");
    let halved: Vec<f32> = old.iter().map(|w| w * 0.5).collect();
    assert_eq!(halved, down_values(&out, DECODER, "down_w0"));
}

#[test]
fn a_mul_before_the_down_projection_fits_a_plain_mlp_and_is_what_was_planned() {
    let (temp, folder) = folder_with(&[(DECODER, Spec::default())]);
    let error = in_form(&folder, EditForm::Scales).unwrap_err().to_string();
    assert!(error.contains("not gated"), "{error}");
    let plan = in_form(&folder, EditForm::Mul).unwrap();
    assert!(plan.edits().is_empty());
    let out = temp.path().join("out");
    let receipt = run(&folder, &plan, &out).unwrap();
    let costs: Vec<Cost> = receipt.edits.iter().map(|edit| edit.cost).collect();
    assert_eq!(costs, [Cost::ElementwiseMul; 2]);
    let model = ModelFile::open(&out.join(DECODER), &Limits::default()).unwrap();
    let graph = model.graph();
    for layer in 0..2 {
        let mul = graph.node.iter().position(|n| {
            n.op_type() == "Mul" && n.output[0] == format!("kvw.layers.{layer}.gated")
        });
        let mul = mul.unwrap();
        let down = &graph.node[mul + 1];
        assert_eq!(down.name(), format!("/model/layers.{layer}/mlp/down_proj"));
        assert_eq!(graph.node[mul].input[0], format!("h{layer}"));
        assert_eq!(down.input[0], graph.node[mul].output[0]);
        let gates = down_values(&out, DECODER, &graph.node[mul].input[1]);
        assert_eq!(gates, [0.5; 24]);
    }
    let diff = edit::diff(&folder, &out).unwrap();
    assert!(diff.is_as_planned(), "{diff:?}");
    // The same plan again, in another form, is still the same plan.
    let again = EditPlan::in_form(
        &Bundle::open(&out).unwrap(),
        &gates_for(&Spec::default(), |_, _| 0.5),
        &identity_of(&out, DECODER),
        FormChoice::Only(EditForm::Columns),
    );
    assert!(matches!(again, Err(Error::AlreadyApplied { .. })));
}

#[test]
fn a_diff_finds_a_changed_byte_of_a_file_whose_graph_changed() {
    let (temp, folder) = folder_with(&[(DECODER, Spec::default())]);
    let plan = in_form(&folder, EditForm::Mul).unwrap();
    let out = temp.path().join("out");
    let receipt = run(&folder, &plan, &out).unwrap();
    let inserted = &receipt.files[0].inserted;
    let added = inserted.iter().max_by_key(|range| range.len).unwrap();
    let len = fs::metadata(out.join(DECODER)).unwrap().len();
    // In what was put in, in a weight that was kept, and in the last byte.
    for at in [
        added.offset + added.len - 1,
        inserted[0].offset + 500,
        len - 1,
    ] {
        flip(&out.join(DECODER), at);
        let diff = edit::diff(&folder, &out).unwrap();
        assert!(!diff.is_as_planned(), "byte {at}");
        flip(&out.join(DECODER), at);
    }
    assert!(edit::diff(&folder, &out).unwrap().is_as_planned());
    // Without a receipt the kept tensors are found by name, and only the graph differs.
    fs::remove_file(out.join("kvw.json")).unwrap();
    let diff = edit::diff(&folder, &out).unwrap();
    assert!(
        diff.changed[0]
            .ranges
            .iter()
            .all(|range| range.tensors.is_empty())
    );
}

#[test]
fn one_decoder_that_cannot_be_edited_stops_all() {
    let spec = Spec::default();
    let (_temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let mut graph = graph(&spec, |layer| down_weight(&spec, layer));
    for down in graph
        .node
        .iter_mut()
        .filter(|n| n.name().ends_with("down_proj"))
    {
        down.op_type = Some("MatMulNBits".into());
        down.attribute = [("K", spec.d_ff), ("N", spec.d_model)]
            .into_iter()
            .map(|(name, size)| AttributeProto {
                name: Some(name.into()),
                i: Some(size as i64),
                ..Default::default()
            })
            .collect();
    }
    write_graph(&folder.join("onnx/decoder_model_merged_q4.onnx"), graph);
    let error = plan(&folder, &gates_for(&spec, |_, _| 0.5))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("_q4.onnx") && error.contains("block_size"),
        "{error}"
    );
}

#[test]
fn planned_bytes_that_another_tensor_uses_are_refused() {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let mut graph = graph(&spec, |layer| down_weight(&spec, layer));
    externalize(&mut graph, &folder.join(DECODER), "w.data");
    // `up_w1` now begins one element before the end of `down_w0`.
    let end = {
        let down = graph
            .initializer
            .iter()
            .find(|t| t.name() == "down_w0")
            .unwrap();
        down.external_data[1].value().parse::<usize>().unwrap() + spec.d_ff * spec.d_model * 4
    };
    let up = graph
        .initializer
        .iter_mut()
        .find(|t| t.name() == "up_w1")
        .unwrap();
    refer(up, "w.data", end - 4, spec.d_ff * spec.d_model * 4);
    write_graph(&folder.join(DECODER), graph);
    let error = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap_err();
    assert!(matches!(error, Error::Overlap { .. }), "{error}");
    assert!(error.to_string().contains("up_w1"), "{error}");
    drop(temp);
}

#[test]
fn data_that_the_vision_encoder_uses_too_is_refused() {
    let spec = Spec {
        external: Some("shared.data"),
        ..Spec::default()
    };
    let (_temp, folder) = folder_with(&[
        (DECODER, spec.clone()),
        ("onnx/vision_encoder.onnx", spec.clone()),
        (
            "onnx/embed_tokens.onnx",
            Spec {
                external: None,
                seed: 5,
                ..spec.clone()
            },
        ),
    ]);
    let error = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap_err();
    assert!(matches!(error, Error::Overlap { .. }), "{error}");
    assert!(error.to_string().contains("vision_encoder"), "{error}");
}

#[test]
fn a_forgotten_copy_of_the_decoder_is_refused() {
    let spec = Spec::default();
    let (_temp, folder) =
        folder_with(&[(DECODER, spec.clone()), ("backup/old.onnx", spec.clone())]);
    let error = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap_err();
    assert!(matches!(error, Error::Uncovered { .. }), "{error}");
}

#[test]
fn an_output_is_never_overwritten_without_force_nor_put_into_the_input() {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let plan = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap();
    for nested in [
        folder.clone(),
        folder.join("out"),
        folder.join("deep/../deep/out"),
        temp.path().into(),
    ] {
        let error = run(&folder, &plan, &nested).unwrap_err();
        assert!(
            matches!(error, Error::Nested { .. }),
            "{}: {error}",
            nested.display()
        );
    }
    let out = temp.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "x").unwrap();
    assert!(matches!(
        run(&folder, &plan, &out),
        Err(Error::Files(kvw::files::Error::Exists { .. }))
    ));
    let bundle = Bundle::open(&folder).unwrap();
    let force = Options {
        force: true,
        checksums: true,
        ..Options::default()
    };
    let error = edit::apply(&bundle, &plan, &out, &force, &|_| {}).unwrap_err();
    assert!(
        matches!(error, Error::Files(kvw::files::Error::Foreign { .. })),
        "{error}"
    );
    assert!(out.join("precious").exists());
    fs::remove_dir_all(&out).unwrap();
    run(&folder, &plan, &out).unwrap();
    let receipt = edit::apply(&bundle, &plan, &out, &force, &|_| {}).unwrap();
    assert!(receipt.files[0].sha256_before.is_some() && receipt.files[0].sha256_after.is_some());
}

#[test]
fn a_plan_is_not_applied_twice_and_a_second_one_keeps_the_history() {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let (once, twice) = (temp.path().join("once"), temp.path().join("twice"));
    let gates = gates_for(&spec, |_, _| 0.5);
    plan_and_run(&folder, &gates, &once).unwrap();
    let error = plan_and_run(&once, &gates, &twice).unwrap_err();
    assert!(matches!(error, Error::AlreadyApplied { .. }), "{error}");
    assert_no_output(&twice);
    let receipt = plan_and_run(&once, &gates_for(&spec, |_, _| 0.25), &twice).unwrap();
    assert!(receipt.previous.is_some());
    assert!(edit::diff(&once, &twice).unwrap().is_as_planned());
}

#[test]
fn gates_that_rounding_undoes_are_an_error() {
    let spec = Spec {
        dtype: DataType::FLOAT16,
        ..Spec::default()
    };
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let out = temp.path().join("out");
    let error = plan_and_run(&folder, &gates_for(&spec, |_, _| 0.999_999), &out).unwrap_err();
    assert!(matches!(error, Error::NothingToChange { .. }), "{error}");
    assert_no_output(&out);
}

#[test]
fn an_overflow_is_an_error_that_names_the_element() {
    let spec = Spec {
        dtype: DataType::FLOAT16,
        ..Spec::default()
    };
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let out = temp.path().join("out");
    let gates = gates_for(&spec, |l, j| if (l, j) == (0, 2) { 1e9 } else { 1.0 });
    let error = plan_and_run(&folder, &gates, &out).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotFinite {
                element: 20..30,
                ..
            }
        ),
        "{error}"
    );
    assert_no_output(&out);
}

#[test]
fn what_does_not_fit_on_the_disk_is_not_begun() {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let available = kvw::files::available_bytes(temp.path()).unwrap();
    // A hole takes no room itself.
    let sparse = fs::File::create(folder.join("huge")).unwrap();
    sparse.set_len(available + (1 << 30)).unwrap();
    let out = temp.path().join("out");
    let error = plan_and_run(&folder, &gates_for(&spec, |_, _| 0.5), &out).unwrap_err();
    assert!(
        matches!(error, Error::Files(kvw::files::Error::DiskFull { .. })),
        "{error}"
    );
    assert_no_output(&out);
}

#[test]
fn a_cache_of_links_becomes_a_folder_of_files() {
    let spec = Spec {
        external: Some("decoder_model_merged.onnx_data"),
        ..Spec::default()
    };
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let cache = temp.path().join("models--org--name");
    let (blobs, snapshot) = (cache.join("blobs"), cache.join("snapshots/abc"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(snapshot.join("onnx")).unwrap();
    for (name, up) in [
        ("config.json", "../.."),
        (DECODER, "../../.."),
        ("onnx/decoder_model_merged.onnx_data", "../../.."),
    ] {
        let blob = name.replace('/', "_");
        fs::copy(folder.join(name), blobs.join(&blob)).unwrap();
        std::os::unix::fs::symlink(format!("{up}/blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    let out = temp.path().join("out");
    plan_and_run(&snapshot, &gates_for(&spec, |_, _| 0.5), &out).unwrap();
    assert!(fs::symlink_metadata(out.join(DECODER)).unwrap().is_file());
    assert!(edit::diff(&snapshot, &out).unwrap().is_as_planned());
}

#[test]
fn a_single_file_becomes_a_folder_with_its_data() {
    let spec = Spec {
        external: Some("w.data"),
        ..Spec::default()
    };
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("downloads/m.onnx");
    write_decoder(&path, &spec);
    fs::write(temp.path().join("downloads/unrelated.iso"), "x").unwrap();
    let bundle = Bundle::open(&path).unwrap();
    let identity = edit::identity_of(&bundle, &bundle.files()[0]).unwrap();
    let plan = EditPlan::new(&bundle, &gates_for(&spec, |_, _| 0.5), &identity).unwrap();
    let out = temp.path().join("out");
    edit::apply(&bundle, &plan, &out, &Options::default(), &|_| {}).unwrap();
    let mut names: Vec<_> = fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["kvw.json", "m.onnx", "w.data"]);
    let report = edit::diff(&path, &out.join("m.onnx")).unwrap();
    assert_eq!(report.changed.len(), 1);
    assert_eq!(report.changed[0].ranges[0].tensors, ["down_w0"]);
    assert!(Bundle::open(&out).is_ok());
}

/// An edited folder, and the report after `tamper` changed the output.
fn tampered(tamper: impl Fn(&Path, &EditPlan)) -> DiffReport {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let out = temp.path().join("out");
    let plan = plan(&folder, &gates_for(&spec, |_, _| 0.5)).unwrap();
    run(&folder, &plan, &out).unwrap();
    tamper(&out, &plan);
    edit::diff(&folder, &out).unwrap()
}

fn flip(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at as usize] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_diff_finds_every_unplanned_change() {
    let honest = tampered(|_, _| {});
    assert!(honest.is_as_planned());
    let ranges = &honest.changed[0].ranges;
    assert_eq!(ranges.len(), 2);
    assert_eq!(ranges[1].tensors, ["down_w1"]);
    // A float halved differs in its exponent; of 240 random ones none is zero.
    assert_eq!(ranges[0].changed_elements, Some(240));
    assert!(
        ranges[0]
            .max_abs_change
            .is_some_and(|change| change > 0.3 && change <= 0.5)
    );

    // One byte before a planned range, and one behind it.
    for beside in [-1i64, 1] {
        let report = tampered(|out, plan| {
            let span = plan.edits()[0].span;
            let at = if beside < 0 {
                span.offset - 1
            } else {
                span.end().unwrap()
            };
            flip(&out.join(DECODER), at);
        });
        assert!(!report.is_as_planned());
        assert_eq!(report.only_planned_ranges_changed, Some(false));
        let unplanned: Vec<_> = report.changed[0]
            .ranges
            .iter()
            .filter(|r| r.planned == Some(false))
            .collect();
        assert_eq!(unplanned.len(), 1);
        assert_eq!(unplanned[0].changed_bytes, 1);
    }
    for name in ["config.json", "deep/er/notes.txt"] {
        assert!(!tampered(|out, _| flip(&out.join(name), 3)).is_as_planned());
        let missing = tampered(|out, _| fs::remove_file(out.join(name)).unwrap());
        assert_eq!(missing.removed, [name]);
        assert!(!missing.is_as_planned());
    }
    let added = tampered(|out, _| fs::write(out.join("new"), "x").unwrap());
    assert_eq!(added.added, ["new"]);
    assert!(!added.is_as_planned());
    let longer = tampered(|out, _| {
        let mut bytes = fs::read(out.join(DECODER)).unwrap();
        bytes.push(0);
        fs::write(out.join(DECODER), bytes).unwrap();
    });
    assert!(!longer.is_as_planned());
}

#[test]
fn a_diff_finds_planned_ranges_that_were_put_back() {
    let spec = Spec::default();
    let original = {
        let (_temp, folder) = folder_with(&[(DECODER, spec)]);
        fs::read(folder.join(DECODER)).unwrap()
    };
    let report = tampered(|out, plan| {
        let span = plan.edits()[1].span;
        let (start, end) = (span.offset as usize, span.end().unwrap() as usize);
        let mut bytes = fs::read(out.join(DECODER)).unwrap();
        bytes[start..end].copy_from_slice(&original[start..end]);
        fs::write(out.join(DECODER), bytes).unwrap();
    });
    assert_eq!(report.unchanged_planned_ranges.len(), 1);
    assert_eq!(report.only_planned_ranges_changed, Some(true));
    assert!(!report.is_as_planned());
}

#[test]
fn a_folder_is_identical_to_itself_and_a_file_is_no_folder() {
    let (_temp, folder) = folder_with(&[(DECODER, Spec::default())]);
    let report = edit::diff(&folder, &folder).unwrap();
    assert!(report.is_identical() && report.is_as_planned());
    assert_eq!(report.identical_files, 3);
    let error = edit::diff(&folder, &folder.join(DECODER)).unwrap_err();
    assert!(matches!(error, Error::Incomparable { .. }), "{error}");
}

#[test]
fn an_inspection_has_the_documented_form() {
    let (_temp, folder) = folder_with(&[(DECODER, Spec::default())]);
    let inspection = edit::inspect(&Bundle::open(&folder).unwrap()).unwrap();
    assert_eq!(inspection.files[0].mlps[1].edit, Some(EditForm::Columns));
    let json = serde_json::to_value(&inspection).unwrap();
    assert_eq!(json["layout"], "transformers-js");
    assert_eq!(json["family"], "tiny");
    assert_eq!(json["files"][0]["path"], DECODER);
    assert_eq!(json["files"][0]["role"], "decoder");
    let expected = serde_json::json!({
        "layer": 1, "tower": "language", "d_ff": 24, "d_model": 10, "op": "MatMul",
        "weight": "down_w1", "dtype": "float", "gated": false, "edit": "columns", "graph": false,
        "cost": "none", "reason": null,
    });
    assert_eq!(json["files"][0]["mlps"][1], expected);
}

#[test]
fn the_same_plan_gives_the_same_bytes_every_time() {
    let spec = Spec::default();
    let (temp, folder) = folder_with(&[(DECODER, spec.clone())]);
    let plan = plan(&folder, &gates_for(&spec, |l, j| (l + j) as f32 / 40.0)).unwrap();
    let (a, b) = (temp.path().join("a"), temp.path().join("b"));
    run(&folder, &plan, &a).unwrap();
    run(&folder, &plan, &b).unwrap();
    for name in [DECODER, "kvw.json"] {
        assert_eq!(
            fs::read(a.join(name)).unwrap(),
            fs::read(b.join(name)).unwrap()
        );
    }
}

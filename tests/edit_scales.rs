//! The form `scales`, on random matrices: what comes out dequantizes to the gates times what went in, and
//! nothing else is another byte.
//!
//! Dequantizing is written down here anew, from the operators' own specifications (`MatMulNBits` of ONNX
//! Runtime's ContribOperators.md, `DequantizeLinear` of ONNX): nothing of the tool's reading of weights is
//! used.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::f16;
use kvw::bundle::Bundle;
use kvw::edit::{self, EditForm, EditPlan, FormChoice};
use kvw::onnx::DataType;
use kvw::onnx::schema::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto,
    ValueInfoProto, attribute_proto::AttributeType,
};
use proptest::prelude::*;
use prost::Message as _;
use tempfile::TempDir;
use thin_vec::thin_vec;

/// How `up_proj` is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Storage {
    /// `MatMulNBits`: codes of so many bits, `[N, blocks, block · bits / 8]`.
    NBits { bits: usize, flat: bool },
    /// `DequantizeLinear` of int8 `[K, N]`, a scale for each of N.
    Channel,
    /// `DequantizeLinear` of int8 `[K, N]`, a scale for each block of K.
    Blocks,
}

/// A gated MLP whose `up_proj` is quantized.
#[derive(Clone, Debug)]
struct Spec {
    storage: Storage,
    d_ff: usize,
    d_model: usize,
    block: usize,
    zero_points: bool,
    bias: bool,
    /// Scales of float16, else of float32.
    half: bool,
    seed: u64,
}

impl Spec {
    fn blocks(&self) -> usize {
        match self.storage {
            Storage::Channel => 1,
            _ => self.d_model.div_ceil(self.block),
        }
    }

    /// Bytes of one block of codes, and of the zero points of one channel.
    fn packed(&self, bits: usize) -> (usize, usize) {
        (self.block * bits / 8, (self.blocks() * bits).div_ceil(8))
    }
}

fn any_spec() -> impl Strategy<Value = Spec> {
    let storage = prop::sample::select(vec![
        Storage::NBits {
            bits: 4,
            flat: false,
        },
        Storage::NBits {
            bits: 4,
            flat: true,
        },
        Storage::NBits {
            bits: 8,
            flat: false,
        },
        Storage::Channel,
        Storage::Blocks,
    ]);
    let sizes = (
        2usize..40,
        1usize..5,
        prop::sample::select(vec![16usize, 32, 64]),
        0usize..16,
    );
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (storage, sizes, flags, 1u64..1000).prop_map(
        |(storage, (d_ff, blocks, block, short), (zero_points, bias, half), seed)| {
            // `DequantizeLinear` wants whole blocks; the last one of `MatMulNBits` may be padded.
            let padded = matches!(storage, Storage::NBits { .. });
            let d_model = blocks * block - if padded { short } else { 0 };
            Spec {
                storage,
                d_ff,
                d_model,
                block,
                zero_points,
                bias,
                half,
                seed,
            }
        },
    )
}

fn draws(seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    })
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    draws(seed)
        .map(|draw| draw.to_le_bytes()[3])
        .take(count)
        .collect()
}

/// In (-1, 1), none of them 0.
fn floats(seed: u64, count: usize) -> Vec<f32> {
    let of = |draw: u64| ((draw >> 40) as f32 + 0.5) / (1u32 << 23) as f32 - 1.0;
    draws(seed).map(of).take(count).collect()
}

fn stored(half: bool, values: &[f32]) -> (DataType, Vec<u8>) {
    let two = |&value: &f32| f16::from_f32(value).to_le_bytes();
    match half {
        true => (DataType::FLOAT16, values.iter().flat_map(two).collect()),
        false => (
            DataType::FLOAT,
            values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        ),
    }
}

fn tensor(name: &str, (dtype, bytes): (DataType, Vec<u8>), dims: &[usize]) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        data_type: Some(dtype.code()),
        dims: dims
            .iter()
            .map(|&dim| i64::try_from(dim).unwrap())
            .collect(),
        raw_data: Some(bytes.into()),
        ..Default::default()
    }
}

fn node(op: &str, inputs: &[&str], output: &str, attributes: &[(&str, usize)]) -> NodeProto {
    let attribute = |&(name, value): &(&str, usize)| AttributeProto {
        name: Some(name.into()),
        r#type: Some(AttributeType::Int as i32),
        i: Some(i64::try_from(value).unwrap()),
        ..Default::default()
    };
    let contrib = op == "MatMulNBits";
    NodeProto {
        op_type: Some(op.into()),
        domain: contrib.then(|| "com.microsoft".into()),
        name: Some(format!("/model/layers.0/mlp/{output}").into()),
        input: inputs.iter().map(|&input| input.into()).collect(),
        output: thin_vec![output.into()],
        attribute: attributes.iter().map(attribute).collect(),
        ..Default::default()
    }
}

/// `y = x + W_down · (sigmoid(W_gate x) ⊙ (W_up x + b))`.
fn model(spec: &Spec) -> ModelProto {
    let (n, k, blocks) = (spec.d_ff, spec.d_model, spec.blocks());
    let float = |seed: u64, count| stored(false, &floats(spec.seed * 10 + seed, count));
    let mut initializer = thin_vec![
        tensor("gate_w", float(1, k * n), &[k, n]),
        tensor("down_w", float(2, n * k), &[n, k]),
    ];
    let scales = |dims: &[usize]| {
        let values = floats(spec.seed * 10 + 3, dims.iter().product());
        tensor("up_scales", stored(spec.half, &values), dims)
    };
    let mut nodes = thin_vec![
        node("MatMul", &["x", "gate_w"], "gate", &[]),
        node("Sigmoid", &["gate"], "act", &[]),
    ];
    match spec.storage {
        Storage::NBits { bits, flat } => {
            let (codes, zeros) = spec.packed(bits);
            let of = |seed, count| {
                (
                    DataType::from_code(2).unwrap(),
                    bytes(spec.seed * 10 + seed, count),
                )
            };
            initializer.push(tensor(
                "up_w",
                of(4, n * blocks * codes),
                &[n, blocks, codes],
            ));
            initializer.push(match flat {
                true => scales(&[n * blocks]),
                false => scales(&[n, blocks]),
            });
            let mut inputs = vec!["x", "up_w", "up_scales"];
            if spec.zero_points {
                initializer.push(tensor("up_zeros", of(5, n * zeros), &[n * zeros]));
                inputs.push("up_zeros");
            }
            let attributes = [
                ("K", k),
                ("N", n),
                ("bits", bits),
                ("block_size", spec.block),
            ];
            nodes.push(node("MatMulNBits", &inputs, "up", &attributes));
        }
        Storage::Channel | Storage::Blocks => {
            let of = |seed, count| {
                (
                    DataType::from_code(3).unwrap(),
                    bytes(spec.seed * 10 + seed, count),
                )
            };
            let dims: &[usize] = match spec.storage {
                Storage::Channel => &[n],
                _ => &[blocks, n],
            };
            initializer.push(tensor("up_w", of(4, k * n), &[k, n]));
            initializer.push(scales(dims));
            let mut inputs = vec!["up_w", "up_scales"];
            if spec.zero_points {
                initializer.push(tensor("up_zeros", of(5, dims.iter().product()), dims));
                inputs.push("up_zeros");
            }
            let attributes: &[(&str, usize)] = match spec.storage {
                Storage::Channel => &[("axis", 1)],
                _ => &[("axis", 0), ("block_size", spec.block)],
            };
            nodes.push(node("DequantizeLinear", &inputs, "up_float", attributes));
            nodes.push(node("MatMul", &["x", "up_float"], "up", &[]));
        }
    }
    let mut up = "up";
    if spec.bias {
        initializer.push(tensor("up_bias", float(6, n), &[n]));
        nodes.push(node("Add", &["up", "up_bias"], "biased", &[]));
        up = "biased";
    }
    nodes.push(node("Mul", &["act", up], "h", &[]));
    nodes.push(node("MatMul", &["h", "down_w"], "down", &[]));
    nodes.push(node("Add", &["x", "down"], "y", &[]));
    let value = |name: &str| ValueInfoProto {
        name: Some(name.into()),
        ..Default::default()
    };
    let opset = |domain: &str, version| OperatorSetIdProto {
        domain: Some(domain.into()),
        version: Some(version),
    };
    ModelProto {
        ir_version: Some(10),
        opset_import: thin_vec![opset("", 21), opset("com.microsoft", 1)],
        graph: Some(GraphProto {
            name: Some("g".into()),
            input: thin_vec![value("x")],
            output: thin_vec![value("y")],
            node: nodes,
            initializer,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn read(path: &Path) -> BTreeMap<String, TensorProto> {
    let model = ModelProto::decode(fs::read(path).unwrap().as_slice()).unwrap();
    let tensors = model.graph.unwrap().initializer.into_iter();
    tensors
        .map(|tensor| (tensor.name().to_owned(), tensor))
        .collect()
}

fn values(tensor: &TensorProto) -> Vec<f32> {
    let raw = tensor.raw_data.as_deref().unwrap();
    match DataType::from_code(tensor.data_type()).unwrap() {
        DataType::FLOAT16 => raw
            .as_chunks::<2>()
            .0
            .iter()
            .map(|&b| f16::from_le_bytes(b).to_f32())
            .collect(),
        _ => raw
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect(),
    }
}

/// The code of `bits` bits at `index` of packed ones, low bits first.
fn code(packed: &[u8], bits: usize, index: usize) -> u8 {
    match bits {
        8 => packed[index],
        _ => (packed[index / 2] >> (4 * (index % 2))) & 15,
    }
}

/// `up_proj`'s weights, `[N][K]`.
fn dequantized(spec: &Spec, tensors: &BTreeMap<String, TensorProto>) -> Vec<Vec<f64>> {
    let raw = |name: &str| tensors.get(name).map(|t| t.raw_data.as_deref().unwrap());
    let codes = raw("up_w").unwrap();
    let zeros = raw("up_zeros");
    let scales = values(&tensors["up_scales"]);
    let blocks = spec.blocks();
    let weight = |channel: usize, input: usize| -> f64 {
        let (code, zero, scale) = match spec.storage {
            Storage::NBits { bits, .. } => {
                let (block, within) = (input / spec.block, input % spec.block);
                let (bytes, of_channel) = spec.packed(bits);
                let start = (channel * blocks + block) * bytes;
                let default = 1 << (bits - 1);
                let zero = zeros.map_or(default, |zeros| {
                    code(&zeros[channel * of_channel..], bits, block)
                });
                let code = code(&codes[start..], bits, within);
                (
                    i32::from(code),
                    i32::from(zero),
                    scales[channel * blocks + block],
                )
            }
            Storage::Channel | Storage::Blocks => {
                let signed = |byte: u8| i32::from(byte.cast_signed());
                let at = match spec.storage {
                    Storage::Channel => channel,
                    _ => (input / spec.block) * spec.d_ff + channel,
                };
                let code = codes[input * spec.d_ff + channel];
                (
                    signed(code),
                    zeros.map_or(0, |zeros| signed(zeros[at])),
                    scales[at],
                )
            }
        };
        f64::from(code - zero) * f64::from(scale)
    };
    (0..spec.d_ff)
        .map(|channel| {
            (0..spec.d_model)
                .map(|input| weight(channel, input))
                .collect()
        })
        .collect()
}

fn folder(spec: &Spec) -> (TempDir, PathBuf) {
    let temp = TempDir::new().unwrap();
    let path = temp.path().join("model.onnx");
    fs::write(&path, model(spec).encode_to_vec()).unwrap();
    (temp, path)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    #[test]
    fn edited_scales_dequantize_to_the_gates_times_the_weights(
        spec in any_spec(),
        drawn in prop::collection::vec(
            prop_oneof![Just(1.0f32), Just(0.0), Just(0.5), 1e-3f32..1.0, 1.0f32..1.5],
            40,
        ),
    ) {
        let (temp, path) = folder(&spec);
        let mut gates: Vec<f32> = drawn[..spec.d_ff].to_vec();
        gates[0] = 0.25;
        let bundle = Bundle::open(&path).unwrap();
        let identity = edit::identity_of(&bundle, &bundle.files()[0]).unwrap();
        let plan = EditPlan::in_form(
            &bundle,
            &[(0.into(), gates.clone())].into(),
            &identity,
            FormChoice::Only(EditForm::Scales),
        );
        let plan = plan.unwrap();
        prop_assert!(plan.graphs().is_empty(), "{:?}", plan.graphs());
        let out = temp.path().join("out");
        edit::apply(&bundle, &plan, &out, &edit::Options::default(), &|_| {}).unwrap();
        let out = out.join("model.onnx");

        // Only planned bytes differ, and they are those of the scales and the bias.
        let (before, after) = (fs::read(&path).unwrap(), fs::read(&out).unwrap());
        prop_assert_eq!(before.len(), after.len());
        let planned = |at: u64| {
            let mut spans = plan.edits().iter().map(|edit| edit.span);
            spans.any(|span| (span.offset..span.offset + span.len).contains(&at))
        };
        for (at, (a, b)) in (0u64..).zip(before.iter().zip(&after)) {
            prop_assert!(a == b || planned(at), "byte {}", at);
        }
        let (before, after) = (read(&path), read(&out));
        for (name, tensor) in &before {
            let may_change = name == "up_scales" || name == "up_bias";
            prop_assert!(may_change || *tensor == after[name], "{}", name);
        }

        // w' = g · w, each scale rounded once to its type; below that type's normal numbers by half its
        // least step, times the largest code.
        let (unit, least) = match spec.half {
            true => (2f64.powi(-11), 255.0 * 2f64.powi(-25)),
            false => (2f64.powi(-24), 0.0),
        };
        let weights = dequantized(&spec, &before);
        let edited = dequantized(&spec, &after);
        for ((row, edited), &gate) in weights.iter().zip(&edited).zip(&gates) {
            for (&weight, &found) in row.iter().zip(edited) {
                let expected = weight * f64::from(gate);
                let off = (found - expected).abs();
                prop_assert!(off <= expected.abs() * unit + least, "{} for {}", found, expected);
                prop_assert!(gate != 1.0 || found.to_bits() == weight.to_bits());
            }
        }
        if spec.bias {
            let pairs = values(&before["up_bias"]).into_iter().zip(values(&after["up_bias"]));
            for ((bias, found), &gate) in pairs.zip(&gates) {
                // A gate of 0 leaves no sign behind.
                let expected = if gate == 0.0 { 0.0 } else { bias * gate };
                prop_assert_eq!(found.to_bits(), expected.to_bits());
            }
        }
    }
}

//! The instrumented graph of every export computes what onnxruntime computes on a graph that somebody
//! else's program tapped and gated (`tools/exports/hidden.py`).

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kvw::graph::mlp::find;
use kvw::graph::{
    Index, LayerId, Mlp, Moment, Outputs, Patch, Tower, gate_name, hidden_name, session, sum_name,
};
use kvw::onnx::{DataType, Limits, ModelFile, tensors};
use kvw::runtime::{Engine, Work};
use ort::session::{Session, SessionInputValue};
use ort::value::Tensor;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use support::{engine, fixtures};

/// A file of `hidden.py` beside the export that it is about.
struct Golden {
    export: PathBuf,
    bytes: Vec<u8>,
}

impl Golden {
    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensors = self.tensors();
        floats(
            &tensors
                .tensor(name)
                .unwrap_or_else(|e| panic!("{name}: {e}")),
        )
    }

    /// The layers that it knows.
    fn layers(&self) -> Vec<usize> {
        let layer = |name: &str| {
            name.strip_prefix("layers.")?
                .strip_suffix(".sum")?
                .parse()
                .ok()
        };
        let mut layers: Vec<usize> = self
            .tensors()
            .names()
            .into_iter()
            .filter_map(layer)
            .collect();
        layers.sort_unstable();
        layers
    }

    /// The name of the model's first output.
    fn output(&self) -> String {
        let tensors = self.tensors();
        let name = tensors
            .names()
            .into_iter()
            .find_map(|name| name.strip_prefix("output."));
        name.unwrap().to_owned()
    }

    /// The inputs of the instrumented model, with these gates.
    fn inputs(
        &self,
        session: &Session,
        gates: &BTreeMap<LayerId, Vec<f32>>,
    ) -> Vec<(String, SessionInputValue<'static>)> {
        let tensors = self.tensors();
        let mut inputs = Vec::new();
        for port in session.inputs() {
            let name = port.name();
            let gate = gates.iter().find(|&(&layer, _)| gate_name(layer) == name);
            let value = match (gate, name) {
                (Some((_, gate)), _) => Tensor::from_array(([gate.len()], gate.clone()))
                    .unwrap()
                    .into(),
                (None, "answer_mask") => value(&tensors.tensor(name).unwrap()),
                _ => value(&tensors.tensor(&format!("input.{name}")).unwrap()),
            };
            inputs.push((name.to_owned(), value));
        }
        inputs
    }
}

fn floats(tensor: &TensorView<'_>) -> Vec<f32> {
    assert_eq!(tensor.dtype(), Dtype::F32);
    let chunks = tensor.data().as_chunks::<4>().0;
    chunks
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect()
}

fn value(tensor: &TensorView<'_>) -> SessionInputValue<'static> {
    let shape = tensor.shape().to_vec();
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => Tensor::from_array((shape, floats(tensor))).unwrap().into(),
        Dtype::F16 => {
            let chunks = data.as_chunks::<2>().0;
            let halves: Vec<_> = chunks
                .iter()
                .map(|&b| half::f16::from_le_bytes(b))
                .collect();
            Tensor::from_array((shape, halves)).unwrap().into()
        }
        Dtype::I64 => {
            let chunks = data.as_chunks::<8>().0;
            let integers: Vec<_> = chunks.iter().map(|&b| i64::from_le_bytes(b)).collect();
            Tensor::from_array((shape, integers)).unwrap().into()
        }
        Dtype::BOOL => {
            let booleans: Vec<bool> = data.iter().map(|&b| b != 0).collect();
            Tensor::from_array((shape, booleans)).unwrap().into()
        }
        other => panic!("{other:?}"),
    }
}

/// The goldens under `folder`, of exports under `exports`.
fn goldens(folder: &Path, exports: &Path) -> Vec<Golden> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        } else if path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
        {
            let export = exports
                .join(path.strip_prefix(folder).unwrap())
                .with_extension("");
            found.push(Golden {
                export,
                bytes: std::fs::read(&path).unwrap(),
            });
        }
    }
    found.sort_by(|a, b| a.export.cmp(&b.export));
    found
}

/// The model with `layers` tapped and gated, and every float output by name.
fn run(
    engine: &Engine,
    golden: &Golden,
    layers: &[LayerId],
    outputs: Outputs,
    gates: &BTreeMap<LayerId, Vec<f32>>,
) -> BTreeMap<String, Vec<f32>> {
    let model = ModelFile::open(&golden.export, &Limits::default()).unwrap();
    let index = Index::new(model.graph());
    let mlps = find(&index, None);
    let chosen: Vec<&Mlp<'_>> = mlps
        .iter()
        .filter(|mlp| mlp.tower == Tower::Language)
        .filter(|mlp| mlp.id().is_some_and(|layer| layers.contains(&layer)))
        .collect();
    let patch = Patch::plan(&model, &chosen, outputs).unwrap_or_else(|e| panic!("{e}"));
    let found: Vec<LayerId> = patch.layers().into_iter().map(|(layer, _)| layer).collect();
    assert_eq!(found, layers, "{}", golden.export.display());
    let graph = session::encode(&model, patch.apply(&model)).unwrap();
    // With weights rearranged, as by default: `MatMulNBits` with `accuracy_level` 4 computes in int8 only
    // then, and otherwise in float32.
    let mut session = engine
        .open(&graph, &golden.export, Work::Forwards(1000))
        .unwrap_or_else(|e| panic!("{}: {}", golden.export.display(), support::chain(&e)));
    let inputs = golden.inputs(&session, gates);
    let values = session.run(inputs).unwrap();
    let mut result = BTreeMap::new();
    for (name, value) in values.iter() {
        if let Ok((_, data)) = value.try_extract_tensor::<f32>() {
            result.insert(name.to_owned(), data.to_vec());
        } else if let Ok((_, data)) = value.try_extract_tensor::<half::f16>() {
            result.insert(name.to_owned(), data.iter().map(|x| x.to_f32()).collect());
        }
    }
    result
}

/// The largest difference, of the largest expected value.
fn deviation(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0f32, |max, (a, b)| max.max((a - b).abs())) / largest
}

/// The columns of logits that `hidden.py` keeps.
fn kept(logits: &[f32], expected: &TensorView<'_>) -> Vec<f32> {
    let &[rows, columns] = expected.shape() else {
        panic!("{:?}", expected.shape());
    };
    let rows = logits.chunks(logits.len() / rows);
    rows.flat_map(|row| &row[..columns]).copied().collect()
}

fn check(engine: &Engine, golden: &Golden) {
    let name = golden.export.display();
    let layers: Vec<LayerId> = golden.layers().into_iter().map(LayerId::from).collect();
    let gate = |layer: LayerId| golden.floats(&format!("layers.{layer}.gate"));
    let gates: BTreeMap<LayerId, Vec<f32>> = layers.iter().map(|&l| (l, gate(l))).collect();
    let ones: BTreeMap<LayerId, Vec<f32>> = gates
        .iter()
        .map(|(&l, g)| (l, vec![1.0; g.len()]))
        .collect();
    // ONNX Runtime computes float16 in float32 on the CPU and drops casts between, so two graphs around
    // one activation may differ by its rounding.
    let model = ModelFile::open(&golden.export, &Limits::default()).unwrap();
    let mut weights = tensors(model.proto()).into_iter();
    let half = weights.any(|tensor| tensor.data_type() == DataType::FLOAT16.code());
    let tolerance = if half { 2e-3 } else { 1e-6 };

    let raw = |layer| {
        golden
            .tensors()
            .tensor(&format!("layers.{layer}.hidden"))
            .is_ok()
    };
    let hidden = match layers.iter().all(|&layer| raw(layer)) {
        true => run(engine, golden, &layers, Outputs::Hidden, &ones),
        // A weight that is used twice has two hidden activations.
        false => BTreeMap::new(),
    };
    let sums = run(
        engine,
        golden,
        &layers,
        Outputs::Sums(Moment::Absolute),
        &ones,
    );
    let mut worst = [0f32; 4];
    for &layer in &layers {
        if let Some(found) = hidden.get(&hidden_name(layer)) {
            let expected = golden.floats(&format!("layers.{layer}.hidden"));
            worst[0] = worst[0].max(deviation(found, &expected));
        }
        let expected = golden.floats(&format!("layers.{layer}.sum"));
        worst[1] = worst[1].max(deviation(&sums[&sum_name(layer)], &expected));
    }
    let file = golden.tensors();
    let output = golden.output();
    let plain = file.tensor(&format!("output.{output}")).unwrap();
    let with_ones = run(engine, golden, &layers, Outputs::Model, &ones);
    worst[2] = deviation(&kept(&with_ones[&output], &plain), &floats(&plain));
    let expected = file.tensor(&format!("gated.{output}")).unwrap();
    let gated = run(engine, golden, &layers, Outputs::Model, &gates);
    worst[3] = deviation(&kept(&gated[&output], &expected), &floats(&expected));
    let effect = deviation(&floats(&expected), &floats(&plain));
    eprintln!(
        "{name}: hidden {:.1e}, sums {:.1e}, output {:.1e}, gated output {:.1e} (effect {effect:.1e})",
        worst[0], worst[1], worst[2], worst[3]
    );
    assert!(
        effect > 1e-3 && effect > 10.0 * worst[3],
        "{name}: the gates have an effect"
    );
    for (what, worst) in ["hidden", "sums", "output", "gated output"]
        .iter()
        .zip(worst)
    {
        assert!(worst <= tolerance, "{name}: {what} off by {worst:e}");
    }

    // A gate of the last layer alone: all sums keep every bit. Where one weight serves all layers, its gate
    // changes what the second one reads.
    let last = *layers.last().unwrap();
    if layers.len() > 1 {
        let mut one_gate = ones.clone();
        one_gate.insert(last, gates[&last].clone());
        let moment = Outputs::Sums(Moment::Absolute);
        let with_gate = run(engine, golden, &layers, moment, &one_gate);
        assert_eq!(
            sums, with_gate,
            "{name}: a coefficient is read before its gate"
        );
    }
    // A layer alone keeps its number.
    let moment = Outputs::Sums(Moment::Absolute);
    let alone = run(engine, golden, &[last], moment, &ones);
    assert_eq!(alone.keys().collect::<Vec<_>>(), [&sum_name(last)]);
    let off = deviation(&alone[&sum_name(last)], &sums[&sum_name(last)]);
    assert!(
        off <= tolerance,
        "{name}: layer {last} alone off by {off:e}"
    );
}

#[test]
fn instrumented_exports_compute_what_a_graph_tapped_by_onnx_helper_computes() {
    let engine = engine(1);
    let exports = fixtures().join("exports");
    let goldens = goldens(&exports.join("hidden"), &exports);
    assert!(goldens.len() >= 10, "{}", goldens.len());
    for golden in &goldens {
        check(&engine, golden);
    }
}

/// The same over a whole folder of exports, `KVW_EXPORTS`, with what `hidden.py` made of it in
/// `KVW_HIDDEN`.
#[test]
#[ignore = "reads the folders that KVW_EXPORTS and KVW_HIDDEN name"]
fn instrumented_exports_of_a_folder_compute_what_onnxruntime_computes() {
    let folder = |name| PathBuf::from(std::env::var_os(name).unwrap());
    let (exports, hidden) = (folder("KVW_EXPORTS"), folder("KVW_HIDDEN"));
    let engine = engine(1);
    let goldens = goldens(&hidden, &exports);
    assert!(!goldens.is_empty());
    for golden in &goldens {
        check(&engine, golden);
    }
    eprintln!("{} exports", goldens.len());
}

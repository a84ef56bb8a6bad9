//! MLPs are found in what real exporters write, and the instrumenting patch does what it says.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use kvw::bundle::Bundle;
use kvw::graph::mlp::{find, survey};
use kvw::graph::{
    Encoding, Gating, Index, Linear, Mlp, Moment, NoSlices, Outputs, Patch, Site, Survey, Tower,
    session,
};
use kvw::kvw::Gates;
use kvw::onnx::schema::{FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto};
use kvw::onnx::{DataType, Limits, ModelFile, Storage, Text};
use kvw::runtime::{Embed, Embedded, Engine, Work};
use ndarray::Axis;
use ort::value::Tensor;
use proptest::prelude::*;
use support::{
    Exact, MODELS, decoder, engine, exact_samples, fixtures, float16, float16_samples, oracle,
    relative,
};
use thin_vec::thin_vec;

fn model(path: &Path) -> ModelFile {
    ModelFile::open(path, &Limits::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn oracle_decoder(name: &str) -> ModelFile {
    model(&oracle(name).join("model/onnx/decoder_model_merged.onnx"))
}

/// A line of `INDEX.tsv`: the MLPs of one tower of one file.
#[derive(Debug, PartialEq)]
struct Entry {
    mlps: usize,
    sites: usize,
    layers: String,
    op: String,
    gating: String,
    d_ff: u64,
    d_model: u64,
}

fn index() -> BTreeMap<String, BTreeMap<String, Entry>> {
    let text = std::fs::read_to_string(fixtures().join("exports/INDEX.tsv")).unwrap();
    let mut files: BTreeMap<String, BTreeMap<String, Entry>> = BTreeMap::new();
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[file, mlps, sites, tower, layers, op, gating, d_ff, d_model] = fields.as_slice()
        else {
            panic!("{line}");
        };
        let towers = files.entry(file.to_owned()).or_default();
        if mlps == "0" {
            continue;
        }
        let entry = Entry {
            mlps: mlps.parse().unwrap(),
            sites: sites.parse().unwrap(),
            layers: layers.to_owned(),
            op: op.to_owned(),
            gating: gating.to_owned(),
            d_ff: d_ff.parse().unwrap(),
            d_model: d_model.parse().unwrap(),
        };
        assert!(towers.insert(tower.to_owned(), entry).is_none(), "{line}");
    }
    files
}

/// The one thing that all MLPs of a tower have in common.
fn only<T: Ord>(values: impl Iterator<Item = T>) -> T {
    let mut values: BTreeSet<T> = values.collect();
    assert_eq!(values.len(), 1);
    values.pop_first().unwrap()
}

fn summary(mlps: &[&Mlp<'_>]) -> Entry {
    let layers: Vec<String> = mlps
        .iter()
        .map(|mlp| mlp.layer.map_or("-".to_owned(), |layer| layer.to_string()))
        .collect();
    Entry {
        mlps: mlps.len(),
        sites: mlps.iter().map(|mlp| mlp.sites.len()).sum(),
        layers: layers.join(","),
        op: only(mlps.iter().map(|mlp| mlp.down().op.to_owned())),
        gating: only(mlps.iter().map(|mlp| {
            match mlp.gating {
                Gating::Plain => "plain",
                Gating::Gated => "gated",
                Gating::Fused => "fused",
            }
            .to_owned()
        })),
        d_ff: only(mlps.iter().map(|mlp| mlp.d_ff)),
        d_model: only(mlps.iter().map(|mlp| mlp.d_model)),
    }
}

/// Without a hint what the file holds: towers come from the names in the graph.
#[test]
fn mlps_are_found_in_what_real_exporters_write() {
    let index = index();
    assert_eq!(index.len(), 42);
    for (file, expected) in index {
        let model = model(&fixtures().join("exports").join(&file));
        let graph = Index::new(model.graph());
        let mlps = find(&graph, None);
        let tower = |name: &str| match name {
            "language" => Tower::Language,
            "vision" => Tower::Vision,
            _ => Tower::Projector,
        };
        for (name, expected) in &expected {
            let of_tower: Vec<_> = mlps.iter().filter(|m| m.tower == tower(name)).collect();
            assert_eq!(&summary(&of_tower), expected, "{file}, {name}");
        }
        can_be_instrumented(&model, &mlps);
        let counted: usize = expected.values().map(|entry| entry.mlps).sum();
        assert_eq!(
            mlps.len(),
            counted,
            "{file}: nothing else is taken for an MLP"
        );
    }
}

/// The same over a whole folder of exports: `KVW_EXPORTS` names it, and its `INDEX.tsv` says for each
/// file how many down projections stand in it, over how many distinct weights, and of which layers.
#[test]
#[ignore = "reads the folder that KVW_EXPORTS names"]
fn mlps_are_found_in_a_folder_of_exports() {
    let folder = std::env::var_os("KVW_EXPORTS").unwrap();
    let folder = Path::new(&folder);
    let text = std::fs::read_to_string(folder.join("INDEX.tsv")).unwrap();
    let mut files = 0;
    for line in text.lines().skip(1) {
        let [file, sites, mlps, layers, ops, _] = *line.split('\t').collect::<Vec<_>>() else {
            panic!("{line}");
        };
        let model = model(&folder.join(file));
        let graph = Index::new(model.graph());
        let survey = survey(&graph, None);
        let refused = &survey.refused;
        assert!(refused.is_empty(), "{file}: {refused:?}");
        let found: usize = survey.mlps.iter().map(|mlp| mlp.sites.len()).sum();
        assert_eq!(survey.mlps.len().to_string(), mlps, "{file}");
        assert_eq!(found.to_string(), sites, "{file}");
        let mut numbers: Vec<String> = (survey.mlps.iter())
            .flat_map(|mlp| mlp.sites.iter().map(|_| mlp.layer))
            .map(|layer| layer.map_or("None".to_owned(), |layer| layer.to_string()))
            .collect();
        let mut expected: Vec<&str> = layers.trim_matches(['[', ']']).split(", ").collect();
        expected.retain(|layer| !layer.is_empty());
        numbers.sort();
        expected.sort();
        assert_eq!(numbers, expected, "{file}");
        for site in survey.mlps.iter().flat_map(|mlp| &mlp.sites) {
            assert!(
                ops.contains(&format!("('{}", site.down.op)),
                "{file}: {ops}"
            );
            eprintln!("{file} {} {} {}", site.node, site.down.op, described(site));
        }
        can_be_instrumented(&model, &survey.mlps);
        files += 1;
    }
    assert!(files > 0);
}

/// Every language MLP of a decoder has a place for a tap and a gate.
fn can_be_instrumented(model: &ModelFile, mlps: &[Mlp<'_>]) {
    let language: Vec<&Mlp<'_>> = mlps.iter().filter(|m| m.tower == Tower::Language).collect();
    for outputs in [Outputs::Sums(Moment::Absolute), Outputs::Model] {
        let patch = Patch::plan(model, &language, outputs).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(patch.layers().len(), language.len());
    }
}

/// How a site's weights are stored, and which branch bypasses the activation.
fn described(site: &Site<'_>) -> String {
    let encoding = |linear: &Linear<'_>| {
        let encoding = format!("{:?}", linear.weight.encoding);
        let kind = encoding.split([' ', '(']).next().unwrap().to_owned();
        match linear.weight.output_slices(linear.k, linear.n) {
            Ok(s) => format!(
                "{kind} {}x{} axis {} of {}",
                s.rows,
                s.columns,
                s.axis,
                s.stored.tensor.name()
            ),
            Err(NoSlices::PerTensor(scale)) => format!("{kind} per tensor {}", scale.tensor.name()),
            Err(error) => format!("{kind} {error:?}"),
        }
    };
    let up = match &site.up {
        Ok(up) => format!(
            "{:?} of {}, {} biases{}",
            up.channels,
            encoding(&up.linear),
            up.biases.len(),
            if up.rounding.is_some() {
                ", rounded"
            } else {
                ""
            }
        ),
        Err(reason) => reason.clone(),
    };
    format!("down {} | up {up}", encoding(&site.down))
}

/// Every weight of the graph belongs to at most one MLP, and attention is none.
#[test]
fn no_attention_projection_is_taken_for_an_mlp() {
    for name in MODELS {
        let model = oracle_decoder(name);
        let index = Index::new(model.graph());
        let mlps = find(&index, Some(Tower::Language));
        let nodes: Vec<_> = mlps.iter().map(|mlp| mlp.sites[0].node).collect();
        assert_eq!(nodes.len(), 3, "{nodes:?}");
        assert!(
            nodes.iter().all(|node| node.contains("mlp/down_proj")),
            "{nodes:?}"
        );
    }
}

/// The patch of all layers of one of the oracle's models, and what it makes of the graph.
fn patched(name: &str, outputs: Outputs) -> (String, ModelProto) {
    let model = oracle_decoder(name);
    let index = Index::new(model.graph());
    let mlps = find(&index, Some(Tower::Language));
    let mlps: Vec<&Mlp<'_>> = mlps.iter().collect();
    let patch = Patch::plan(&model, &mlps, outputs).unwrap();
    assert_eq!(patch.layers(), [0, 1, 2].map(|layer| (layer.into(), 384)));
    (patch.to_string(), patch.apply(&model))
}

fn inputs(graph: &GraphProto) -> BTreeSet<&str> {
    graph.input.iter().map(|input| input.name()).collect()
}

fn outputs(graph: &GraphProto) -> Vec<&str> {
    graph.output.iter().map(|output| output.name()).collect()
}

#[test]
fn a_patch_can_be_read() {
    let (text, _) = patched("llava", Outputs::Sums(Moment::Absolute));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3);
    let model = oracle_decoder("llava");
    for (layer, line) in lines.iter().enumerate() {
        let nodes = &model.graph().node;
        let down = format!("layers.{layer}/mlp/down_proj/MatMul");
        let node = nodes
            .iter()
            .position(|n| n.name().ends_with(&down))
            .unwrap();
        let hidden = &nodes[node].input[0];
        let expected =
            format!("layer {layer}: Sums(Absolute) of '{hidden}' [384], gate before node {node}");
        assert_eq!(*line, expected);
    }
}

#[test]
fn only_rows_that_count_go_through_the_last_layer() {
    let early = "kvw.layers.2.rows.early.some";
    for name in MODELS {
        for (outputs, expected) in [
            (
                Outputs::Sums(Moment::Absolute),
                vec!["gate_proj", "up_proj"],
            ),
            (
                Outputs::SumsAndCache(Moment::Absolute),
                vec!["gate_proj", "up_proj"],
            ),
            // The features, or logits, are those of all rows.
            (Outputs::ModelAndSums(Moment::Absolute), vec![]),
        ] {
            let (_, proto) = patched(name, outputs);
            let graph = proto.graph.as_ref().unwrap();
            let nodes = graph.node.iter();
            let readers = nodes.filter(|node| node.input.iter().any(|input| input == early));
            let modules = readers.filter_map(|node| node.name().rsplit('/').nth(1));
            let modules: BTreeSet<&str> = modules.collect();
            assert_eq!(modules, expected.iter().copied().collect(), "{name}");
        }
        // Without the last layer the one below is the last that is tapped.
        let model = oracle_decoder(name);
        let index = Index::new(model.graph());
        let mlps = find(&index, Some(Tower::Language));
        let below: Vec<&Mlp<'_>> = mlps.iter().filter(|mlp| mlp.layer == Some(1)).collect();
        let patch = Patch::plan(&model, &below, Outputs::Sums(Moment::Absolute)).unwrap();
        let proto = patch.apply(&model);
        let mut nodes = proto.graph.as_ref().unwrap().node.iter();
        assert!(nodes.any(|node| {
            node.output
                .iter()
                .any(|o| o.contains("layers.1.rows.early"))
        }));
    }
}

#[test]
fn a_patch_for_sums_keeps_nothing_that_the_sums_do_not_need() {
    for name in MODELS {
        let original = oracle_decoder(name);
        let nodes = original.graph().node.len();
        assert!(
            original
                .graph()
                .node
                .iter()
                .any(|n| n.name().contains("lm_head"))
        );
        let (_, proto) = patched(name, Outputs::Sums(Moment::Absolute));
        let graph = proto.graph.as_ref().unwrap();
        assert_eq!(
            outputs(graph),
            ["kvw.layers.0.sum", "kvw.layers.1.sum", "kvw.layers.2.sum"]
        );
        assert!(!graph.node.iter().any(|n| n.name().contains("lm_head")));
        // The last layer's down projection feeds no sum, and so its gate is no input either.
        assert!(
            !graph
                .node
                .iter()
                .any(|n| n.name().contains("layers.2/mlp/down_proj"))
        );
        let inputs = inputs(graph);
        assert!(inputs.contains("answer_mask"));
        assert!(inputs.contains("kvw.layers.0.gate") && inputs.contains("kvw.layers.1.gate"));
        assert!(!inputs.contains("kvw.layers.2.gate"));
        // Whatever is left is read by somebody.
        let read: BTreeSet<&str> = graph
            .node
            .iter()
            .flat_map(|node| &node.input)
            .map(Text::as_str)
            .collect();
        let stored: BTreeSet<&str> = graph.initializer.iter().map(|t| t.name()).collect();
        assert!(stored.is_subset(&read) && inputs.is_subset(&read));
        let weights = |graph: &GraphProto| -> usize {
            let raw = graph.initializer.iter().filter_map(|t| t.raw_data.as_ref());
            raw.map(|raw| raw.len()).sum()
        };
        eprintln!(
            "{name}: {nodes} nodes and {} bytes of weights, for sums {} and {}",
            weights(original.graph()),
            graph.node.len(),
            weights(graph)
        );
        assert!(weights(graph) < weights(original.graph()));
    }
}

#[test]
fn a_patch_for_evaluation_keeps_the_models_own_outputs() {
    for name in MODELS {
        let original = oracle_decoder(name);
        let (_, proto) = patched(name, Outputs::Model);
        let graph = proto.graph.as_ref().unwrap();
        assert_eq!(outputs(graph), outputs(original.graph()));
        let mut expected = inputs(original.graph());
        let gates = [
            "kvw.layers.0.gate",
            "kvw.layers.1.gate",
            "kvw.layers.2.gate",
        ];
        expected.extend(gates);
        assert_eq!(inputs(graph), expected);
        // One multiplication for each layer, and not a node less.
        assert_eq!(graph.node.len(), original.graph().node.len() + 3);
    }
}

/// Whether the model without gates and with gates of 1 gives the same logits, bit by bit.
fn gates_of_one_change_nothing(engine: &Engine, bundle: &Bundle, samples: &[Embedded]) {
    let mut plain = decoder(engine, bundle, None);
    let mut gated = decoder(engine, bundle, Some(Outputs::Model));
    for sample in samples {
        let expected = plain.logits(sample, &Gates::new()).unwrap();
        let found = gated.logits(sample, &Gates::new()).unwrap();
        assert_eq!(expected.dim(), found.dim());
        let mut bits = expected.iter().zip(&found);
        let same = bits.all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "{}: {}", bundle.folder().display(), sample.name);
    }
}

#[test]
fn gates_of_one_leave_every_float32_logit_bit_identical() {
    let engine = engine(1);
    for name in MODELS {
        let bundle = Bundle::open(&oracle(name).join("model")).unwrap();
        let mut source = Exact::open(&engine, &bundle);
        let samples: Vec<Embedded> = exact_samples(name, "forget")
            .iter()
            .map(|sample| source.embed(sample, &Gates::new()).unwrap())
            .collect();
        gates_of_one_change_nothing(&engine, &bundle, &samples);
    }
}

#[test]
fn gates_of_one_leave_every_float16_logit_bit_identical() {
    let engine = engine(1);
    let bundle = Bundle::open(&float16()).unwrap();
    gates_of_one_change_nothing(&engine, &bundle, &float16_samples());
}

/// A float16 model's activations are cast before they are weighed and summed: weights that float16
/// cannot hold scale the sums exactly.
#[test]
fn float16_activations_are_summed_in_float32() {
    let engine = engine(1);
    let bundle = Bundle::open(&float16()).unwrap();
    let mut hidden = decoder(&engine, &bundle, Some(Outputs::Hidden));
    let mut sums = decoder(&engine, &bundle, Some(Outputs::Sums(Moment::Absolute)));
    let weight = 16_777_216.0; // 2²⁴; float16 ends at 65504.
    for sample in float16_samples() {
        let raw = hidden.hidden(&sample, &Gates::new()).unwrap();
        let found = sums.sums(&[&sample], &Gates::new()).unwrap();
        let mut heavy = sample.clone();
        heavy.answer_mask.fill(weight);
        let heavy = sums.sums(&[&heavy], &Gates::new()).unwrap();
        for (layer, raw) in raw {
            assert_eq!(heavy.layers[&layer], &found.layers[&layer] * weight);
            let expected = raw.mapv(f32::abs).sum_axis(Axis(0));
            let deviation = relative(&found.layers[&layer], &expected);
            eprintln!("float16, layer {layer}: in-graph sums off by {deviation:.1e}, relative");
            // On the CPU ONNX Runtime computes float16 in float32 and drops casts between, so two
            // graphs around the same activation may differ by its rounding, 2⁻¹¹, here and below.
            assert!(deviation <= 1e-3, "layer {layer}: {deviation:e}");
        }
    }
}

/// The survey of a made model, see `tools/exports/made.py`.
fn surveyed(name: &str, check: impl FnOnce(&Survey<'_>)) {
    let model = model(&fixtures().join(format!("exports/made/{name}.onnx")));
    let index = Index::new(model.graph());
    check(&survey(&index, Some(Tower::Language)));
}

/// What looks like an MLP, or hides one, and is not understood is named with its node and a reason.
#[test]
fn what_is_not_understood_is_refused_by_name() {
    for (name, node, reason) in [
        ("experts", "mlp/moe/MoE", "mixture of experts"),
        (
            "selected",
            "mlp/down_proj/MatMul",
            "Gather computes its weight",
        ),
        ("lora", "mlp/down_proj/MatMul", "low-rank adapter"),
        ("custom", "mlp/FusedMlp", "unknown operator"),
        ("static_qoperator", "mlp/down_proj/MatMul", "in integers"),
    ] {
        surveyed(name, |survey| {
            assert!(survey.mlps.is_empty(), "{name}");
            assert_eq!(survey.refused.len(), 2, "{name}: {:?}", survey.refused);
            for (layer, refused) in survey.refused.iter().enumerate() {
                let layer = format!("/model/layers.{layer}/{node}");
                assert!(refused.node.starts_with(&layer), "{name}: {refused:?}");
                assert!(refused.reason.contains(reason), "{name}: {refused:?}");
            }
        });
    }
    for (file, _) in index() {
        let model = model(&fixtures().join("exports").join(&file));
        let graph = Index::new(model.graph());
        let survey = survey(&graph, None);
        assert!(
            survey.refused.is_empty() || survey.mlps.is_empty(),
            "{file}: {:?}",
            survey.refused
        );
    }
}

/// The layer that bypasses the activation, wherever it stands, with the channels and biases that belong
/// to the knowledge vectors.
#[test]
fn the_branch_that_bypasses_the_activation_is_followed_through_the_graph() {
    // Name; the weight that up_proj reads; its channels; what is added, with the range of each.
    type Row = (
        &'static str,
        &'static str,
        Range<u64>,
        Vec<(&'static str, Range<u64>)>,
    );
    let rows: Vec<Row> = vec![
        ("opset14", "up", 0..32, vec![]),
        ("up_first", "up", 0..32, vec![("up.bias", 0..32)]),
        ("grouped_product", "up", 0..32, vec![]),
        (
            "fused_slices",
            "up_gate",
            0..32,
            vec![("up_gate.bias", 0..32)],
        ),
        ("fused_split", "gate_up", 32..64, vec![("up.bias", 0..32)]),
        ("pointwise", "up", 0..32, vec![("up.bias", 0..32)]),
        ("behind", "up", 0..32, vec![]),
        ("function", "up_proj.weight", 0..32, vec![]),
        ("dynamic_per_channel", "up_quantized", 0..32, vec![]),
        ("dynamic_per_channel_fused", "up_quantized", 0..32, vec![]),
        ("dequantized_transposed", "up", 0..32, vec![]),
        ("prepacked", "up_Q4", 0..32, vec![]),
        ("static_qdq", "up_quantized", 0..32, vec![]),
        ("static_qoperator_products", "up_quantized", 0..32, vec![]),
    ];
    for (name, weight, channels, biases) in rows {
        surveyed(name, |survey| {
            for (layer, mlp) in survey.mlps.iter().enumerate() {
                let up = mlp.sites[0]
                    .up
                    .as_ref()
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
                let path = format!("/model/layers.{layer}/mlp.");
                assert_eq!(up.linear.weight.name, format!("{path}{weight}"), "{name}");
                assert_eq!(up.channels, channels, "{name}");
                let found = up
                    .biases
                    .iter()
                    .map(|bias| (bias.stored.name, bias.channels.clone()));
                let found: Vec<(String, Range<u64>)> = found
                    .map(|(name, range)| (name.to_owned(), range))
                    .collect();
                let biases = biases
                    .iter()
                    .map(|(name, range)| (format!("{path}{name}"), range.clone()));
                assert_eq!(found, biases.collect::<Vec<_>>(), "{name}");
                assert_eq!(up.rounding.is_some(), name.starts_with("static"), "{name}");
            }
        });
    }
    surveyed("up_first", |survey| {
        let up = survey.mlps[0].sites[0].up.as_ref().unwrap();
        assert_eq!(up.biases[0].stored.uses, 2, "the other branch adds it too");
    });
    for (name, reason) in [
        ("clipped", "Clip"),
        ("fused_gemm", "not gated"),
        ("interleaved", "reshaped channels"),
    ] {
        surveyed(name, |survey| {
            let reason_found = survey.mlps[0].sites[0].up.as_ref().unwrap_err();
            assert!(reason_found.contains(reason), "{name}: {reason_found}");
        });
    }
}

/// Which stored elements belong to an output channel of `up_proj`, for every encoding.
#[test]
fn every_encoding_tells_its_slices_by_output_channel() {
    // Model; the tensor, rows, columns, axis.
    let rows = [
        ("opset14", "up", 16, 32, 1),
        ("behind", "up", 16, 32, 1),
        ("pointwise", "up", 32, 16, 0),
        ("dynamic_per_channel", "up_scale", 32, 1, 0),
        ("dynamic_per_channel_fused", "up_scale", 32, 1, 0),
        ("dequantized_transposed", "up.scale", 1, 32, 1),
        ("static_qoperator_products", "up_scale", 32, 1, 0),
    ];
    for (name, tensor, rows, columns, axis) in rows {
        surveyed(name, |survey| {
            let up = survey.mlps[0].sites[0].up.as_ref().unwrap();
            let slices = up
                .linear
                .weight
                .output_slices(up.linear.k, up.linear.n)
                .unwrap();
            assert_eq!(
                slices.stored.name,
                format!("/model/layers.0/mlp.{tensor}"),
                "{name}"
            );
            let found = (slices.rows, slices.columns, slices.axis);
            assert_eq!(found, (rows, columns, axis), "{name}");
        });
    }
    surveyed("dequantized_transposed", |survey| {
        let down = survey.mlps[0].down();
        let slices = down.weight.output_slices(down.k, down.n).unwrap();
        assert_eq!((slices.rows, slices.columns, slices.axis), (16, 1, 0));
    });
    for (name, reason) in [("float8", "float8e4m3fn"), ("prepacked", "packed")] {
        surveyed(name, |survey| {
            let down = survey.mlps[0].down();
            match &down.weight.encoding {
                Encoding::Opaque(found) => assert!(found.contains(reason), "{found}"),
                other => panic!("{name}: {other:?}"),
            }
        });
    }
}

/// Both branches of the `If` read the same weights. For a prompt the branch without a cache takes the
/// place of the `If`; for evaluation both stay, and both are gated.
#[test]
fn a_merged_decoder_is_tapped_in_the_branch_of_the_prompt_and_gated_in_both() {
    let path = fixtures().join("exports/optimum124-opt-legacy/decoder_model_merged.onnx");
    let model = model(&path);
    let index = Index::new(model.graph());
    let mlps = find(&index, Some(Tower::Language));
    let mlps: Vec<&Mlp<'_>> = mlps.iter().collect();
    let apply = |outputs| Patch::plan(&model, &mlps, outputs).unwrap().apply(&model);
    let sums = apply(Outputs::Sums(Moment::Absolute)).graph.unwrap();
    assert!(sums.node.iter().all(|node| node.op_type() != "If"));
    assert!(!inputs(&sums).contains("use_cache_branch"));
    assert!(!inputs(&sums).iter().any(|name| name.starts_with("past")));
    let whole = apply(Outputs::Model).graph.unwrap();
    assert_eq!(whole.node.len(), 1);
    for branch in whole.node[0]
        .attribute
        .iter()
        .filter_map(|a| a.g.as_deref())
    {
        let gates = branch.node.iter().flat_map(|node| &node.input);
        let gates: BTreeSet<&Text> = gates.filter(|name| name.ends_with(".gate")).collect();
        assert_eq!(gates.len(), 3);
    }
}

/// A branch that nothing says how to choose is refused by name.
#[test]
fn mlps_in_another_subgraph_are_refused_by_name() {
    let path = fixtures().join("exports/optimum124-opt-legacy/decoder_model_merged.onnx");
    let model = model(&path);
    let mut proto = model.proto().clone();
    let graph = proto.graph.as_mut().unwrap();
    graph.node[0].input[0] = "flag".into();
    graph
        .input
        .iter_mut()
        .find(|i| i.name() == "use_cache_branch")
        .unwrap()
        .name = Some("flag".into());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, prost::Message::encode_to_vec(&proto)).unwrap();
    let model = self::model(&path);
    let index = Index::new(model.graph());
    let mlps = find(&index, Some(Tower::Language));
    let mlps: Vec<&Mlp<'_>> = mlps.iter().collect();
    let error = match Patch::plan(&model, &mlps, Outputs::Hidden) {
        Err(error) => error,
        Ok(patch) => panic!("{patch}"),
    };
    assert!(error.to_string().contains("layers.0/fc2"), "{error}");
    assert!(error.to_string().contains("'flag'"), "{error}");
    assert!(error.hint().is_some());
}

fn written(proto: &ModelProto) -> (tempfile::TempDir, ModelFile) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, prost::Message::encode_to_vec(proto)).unwrap();
    let model = model(&path);
    (folder, model)
}

fn made(name: &str) -> ModelProto {
    let path = fixtures().join(format!("exports/made/{name}.onnx"));
    model(&path).proto().clone()
}

/// Operators that are not known, in the place of a known one, are refused: the down projection, the
/// layers before it, the activation.
#[test]
fn unknown_operators_in_an_mlp_are_refused_by_name() {
    for (name, operator, refused) in [
        ("layers.0/mlp/down_proj", "GemmFloat8", "GemmFloat8"),
        ("layers.0/mlp/up_proj", "MatMulFpQ4", "MatMul"),
        ("layers.0/mlp/act_fn/Sigmoid", "SwiGLU", "MatMul"),
    ] {
        let mut proto = made("opset14");
        let graph = proto.graph.as_mut().unwrap();
        let mut nodes = graph.node.iter_mut();
        let node = nodes.find(|node| node.name().contains(name)).unwrap();
        node.op_type = Some(operator.into());
        node.domain = Some("com.microsoft".into());
        let (_folder, model) = written(&proto);
        let index = Index::new(model.graph());
        let survey = survey(&index, None);
        assert_eq!(survey.mlps.len(), 1, "{operator}");
        let [found] = survey.refused.as_slice() else {
            panic!("{operator}: {:?}", survey.refused);
        };
        assert!(found.node.contains("layers.0/mlp/down_proj"), "{found:?}");
        assert_eq!(found.op, refused);
    }
}

/// A function's body stands in the graph in the place of its call: attributes are given, weights keep
/// their place in the file.
#[test]
fn functions_are_resolved_where_they_are_called() {
    let path = fixtures().join("exports/made/function.onnx");
    let model = model(&path);
    assert!(model.has_inlined_functions());
    let ops: Vec<&str> = model
        .graph()
        .node
        .iter()
        .map(|node| node.op_type())
        .collect();
    let mlp = [
        "MatMul", "Sigmoid", "Mul", "MatMul", "Mul", "MatMul", "Constant", "Mul", "Add",
    ];
    assert_eq!(ops, [mlp, mlp].concat());
    let constants = model
        .graph()
        .node
        .iter()
        .filter(|node| node.op_type() == "Constant");
    for constant in constants {
        assert_eq!(constant.attribute.len(), 1);
        assert_eq!(constant.attribute[0].name(), "value_float");
        assert_eq!(constant.attribute[0].f(), 0.75);
    }
    let index = Index::new(model.graph());
    for mlp in find(&index, None) {
        let storage = model.storage(mlp.down().weight.tensor).unwrap();
        assert!(matches!(storage, Storage::Inline(_)), "{storage:?}");
    }
}

/// Thirty functions, each of which calls the one before twice: 2^30 nodes, if somebody let them.
#[test]
fn functions_that_grow_exponentially_are_left_as_they_are() {
    let mut proto = made("opset14");
    let call = |name: String, input: &str, output: &str| NodeProto {
        op_type: Some(name.into()),
        domain: Some("bomb".into()),
        input: thin_vec![input.into()],
        output: thin_vec![output.into()],
        ..NodeProto::default()
    };
    for level in 0..30 {
        let node = match level {
            0 => thin_vec![call("Unknown".into(), "x", "y")],
            _ => thin_vec![
                call(format!("F{}", level - 1), "x", "t"),
                call(format!("F{}", level - 1), "t", "y"),
            ],
        };
        proto.functions.push(FunctionProto {
            name: Some(format!("F{level}").into()),
            domain: Some("bomb".into()),
            input: thin_vec!["x".into()],
            output: thin_vec!["y".into()],
            node,
            ..FunctionProto::default()
        });
    }
    // And one that calls itself.
    proto.functions[0].node = thin_vec![call("F0".into(), "x", "y")];
    for level in [0, 29] {
        let mut proto = proto.clone();
        let graph = proto.graph.as_mut().unwrap();
        graph.node.push(call(format!("F{level}"), "logits", "end"));
        let (_folder, model) = written(&proto);
        assert!(!model.has_inlined_functions());
        let index = Index::new(model.graph());
        assert_eq!(find(&index, None).len(), 2);
    }
}

/// A model that was weakened by a `Mul` holds values named like those that a patch adds.
#[test]
fn a_model_with_names_like_the_patchs_own_can_be_tapped() {
    let mut proto = made("opset14");
    let graph = proto.graph.as_mut().unwrap();
    let read = |node: &NodeProto| node.name().ends_with("layers.0/mlp/down_proj/MatMul");
    let position = graph.node.iter().position(read).unwrap();
    let hidden = std::mem::replace(
        &mut graph.node[position].input[0],
        "kvw.layers.0.gated".into(),
    );
    let multiplication = NodeProto {
        op_type: Some("Mul".into()),
        input: thin_vec![hidden, "kvw.layers.0.gate".into()],
        output: thin_vec!["kvw.layers.0.gated".into()],
        ..NodeProto::default()
    };
    graph.node.insert(position, multiplication);
    graph.initializer.push(TensorProto {
        name: Some("kvw.layers.0.gate".into()),
        data_type: Some(DataType::FLOAT.code()),
        dims: thin_vec![32],
        float_data: thin_vec![0.5; 32],
        ..TensorProto::default()
    });
    let (_folder, model) = written(&proto);
    let index = Index::new(model.graph());
    let mlps = find(&index, None);
    let mlps: Vec<&Mlp<'_>> = mlps.iter().collect();
    let patch = Patch::plan(&model, &mlps, Outputs::Model).unwrap();
    let graph = session::encode(&model, patch.apply(&model)).unwrap();
    let mut session = engine(1)
        .open(&graph, model.path(), Work::Forwards(1))
        .unwrap();
    let ports: Vec<&str> = session.inputs().iter().map(|port| port.name()).collect();
    assert_eq!(
        ports,
        ["inputs_embeds", "kvw.layers.0.gate", "kvw.layers.1.gate"]
    );
    let ones = || Tensor::from_array(([32], vec![1f32; 32])).unwrap();
    let embeds = Tensor::from_array(([1, 2, 16], vec![0.5f32; 32])).unwrap();
    let outputs = session.run(ort::inputs![embeds, ones(), ones()]).unwrap();
    assert_eq!(outputs.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever reads whatever, in cycles too: graphs are surveyed and patched without a panic.
    #[test]
    fn rewired_graphs_never_panic(
        name in proptest::sample::select(vec![
            "behind", "dynamic_per_channel", "fused_slices", "function", "pointwise", "static_qdq",
            "dequantized_transposed", "shared_weight",
        ]),
        edits in proptest::collection::vec((any::<usize>(), any::<usize>(), any::<usize>(), 0..4u8), 1..12),
    ) {
        let mut proto = made(name);
        rewire(proto.graph.as_mut().unwrap(), &edits);
        let (_folder, model) = written(&proto);
        let index = Index::new(model.graph());
        let survey = survey(&index, None);
        for mlp in &survey.mlps {
            for outputs in [Outputs::Sums(Moment::Square), Outputs::Hidden, Outputs::Model] {
                if let Ok(patch) = Patch::plan(&model, &[mlp], outputs) {
                    patch.apply(&model);
                }
            }
            for site in &mlp.sites {
                let _ = site.down.weight.output_slices(site.down.k, site.down.n);
            }
        }
    }
}

/// Swaps what nodes read, drops inputs and attributes, changes sizes.
fn rewire(graph: &mut GraphProto, edits: &[(usize, usize, usize, u8)]) {
    let outputs = graph.node.iter().flat_map(|node| node.output.clone());
    let tensors = graph.initializer.iter().map(|tensor| tensor.name().into());
    let values: Vec<Text> = outputs.chain(tensors).chain([Text::new()]).collect();
    for &(node, position, value, kind) in edits {
        let count = graph.node.len();
        let node = &mut graph.node[node % count];
        match kind {
            0 if !node.input.is_empty() => {
                let position = position % node.input.len();
                node.input[position] = values[value % values.len()].clone();
            }
            1 if !node.input.is_empty() => node.input.truncate(position % node.input.len()),
            2 if !node.attribute.is_empty() => {
                let position = position % node.attribute.len();
                let attribute = &mut node.attribute[position];
                attribute.i = Some(i64::MIN.wrapping_add(value as i64));
                attribute.ints.push(-1);
            }
            _ => {
                let count = graph.initializer.len();
                let tensor = &mut graph.initializer[position % count];
                tensor.dims.push(-(value as i64 % 5));
            }
        }
    }
}

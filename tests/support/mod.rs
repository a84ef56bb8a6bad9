//! What the tests that run models share: ONNX Runtime, the oracle's files, and a model opened for them.

#![allow(dead_code, unreachable_pub)] // Each test binary uses its own part.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use kvw::bundle::Bundle;
use kvw::edit::{self, EditPlan, Receipt};
use kvw::graph::{Index, LayerId, Mlp, Outputs, Tower};
use kvw::kvw::{Coefficients, Gates, LayerRange, Options, Order, Plan};
use kvw::onnx::{DataType, Limits, ModelFile};
use kvw::preprocess::{NamedTensor, PositionIds, merge_image_features};
use kvw::runtime::{self, Decoder, Device, Embed, Embedded, Engine, Located, Towers, Work, locate};
use ndarray::{Array1, Array2, Array3, ArrayD, Ix2};
use safetensors::SafeTensors;

/// An ONNX Runtime with `threads` threads on the CPU, found or fetched exactly as the tool does it.
///
/// Panics where none can be had: a machine without one has tested nothing.
pub fn engine(threads: usize) -> Engine {
    static LOCATED: OnceLock<Result<Located, String>> = OnceLock::new();
    let located = LOCATED.get_or_init(|| {
        let options = locate::Options::from_env(None, Device::Cpu, false).map_err(|e| chain(&e))?;
        locate(&options, &|line| eprintln!("{line}")).map_err(|error| {
            let hint = error.hint().unwrap_or_default();
            format!("{}\nhint: {hint}", chain(&error))
        })
    });
    match located {
        Ok(located) => Engine::start(located.clone(), Device::Cpu, threads).unwrap(),
        Err(why) => panic!("these tests run models, and there is no ONNX Runtime: {why}"),
    }
}

/// An error with its sources.
pub fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// The folder of one of the oracle's two models.
pub fn oracle(model: &str) -> PathBuf {
    fixtures().join("oracle").join(model)
}

/// The oracle's models.
pub const MODELS: [&str; 2] = ["qwen2_vl", "llava"];

/// A safetensors file.
pub struct Tensors(Vec<u8>);

impl Tensors {
    pub fn open(path: &Path) -> Tensors {
        Tensors(std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn get<T>(&self, name: &str, of: impl Fn(&[u8]) -> Vec<T>) -> Option<ArrayD<T>> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).ok()?;
        Some(ArrayD::from_shape_vec(tensor.shape(), of(tensor.data())).unwrap())
    }

    pub fn has(&self, name: &str) -> bool {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        file.tensor(name).is_ok()
    }

    pub fn floats(&self, name: &str) -> ArrayD<f32> {
        self.get(name, floats)
            .unwrap_or_else(|| panic!("no {name}"))
    }

    pub fn integers(&self, name: &str) -> Option<ArrayD<i64>> {
        self.get(name, |bytes| {
            bytes
                .as_chunks::<8>()
                .0
                .iter()
                .map(|&b| i64::from_le_bytes(b))
                .collect()
        })
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect()
}

/// A sample as the original implementation fed it to its model.
#[derive(Clone)]
pub struct ExactSample {
    pub id: String,
    pub input_ids: Vec<i64>,
    /// -100 outside the answer.
    pub labels: Vec<i64>,
    /// What the vision encoder was fed.
    pub image: Vec<NamedTensor>,
    pub position_ids: PositionIds,
}

/// The samples of `set` (`retain`, `forget`) of an oracle's model, in the order of the run.
pub fn exact_samples(model: &str, set: &str) -> Vec<ExactSample> {
    let tensors = Tensors::open(&oracle(model).join("samples.safetensors"));
    let sample = |i: usize| {
        let name = |part: &str| format!("{set}.{i}.{part}");
        let row = |part: &str| Some(tensors.integers(&name(part))?.into_raw_vec_and_offset().0);
        let input_ids = row("input_ids")?;
        let position_ids = match tensors.integers(&name("position_ids")) {
            Some(ids) => PositionIds::Multimodal(
                ids.index_axis(ndarray::Axis(1), 0)
                    .to_owned()
                    .into_dimensionality::<Ix2>()
                    .unwrap(),
            ),
            None => PositionIds::Sequential((0..).take(input_ids.len()).collect()),
        };
        Some(ExactSample {
            id: format!("{set} {i}"),
            labels: row("labels").unwrap(),
            image: std::iter::once(NamedTensor::floats(
                "pixel_values",
                tensors.floats(&name("pixel_values")),
            ))
            .chain(
                tensors
                    .integers(&name("image_grid_thw"))
                    .map(|grid| NamedTensor::integers("image_grid_thw", grid)),
            )
            .collect(),
            position_ids,
            input_ids,
        })
    };
    let samples: Vec<_> = (0..).map_while(sample).collect();
    assert!(!samples.is_empty(), "{model}: no samples of the {set} set");
    samples
}

/// Embeds exact samples with a model's own towers.
pub struct Exact {
    pub towers: Towers,
    pub image_token_id: i64,
}

impl Exact {
    pub fn open(engine: &Engine, bundle: &Bundle) -> Exact {
        let config = std::fs::read(bundle.folder().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let image_token_id = config["image_token_id"]
            .as_i64()
            .or(config["image_token_index"].as_i64())
            .unwrap();
        let components = bundle.components(None).unwrap();
        let towers = Towers::open(
            engine,
            components.vision_encoder.map(|file| file.path.as_path()),
            components.embed_tokens.map(|file| file.path.as_path()),
            Some(image_token_id),
            Work::Forwards(1),
        );
        Exact {
            towers: towers.unwrap(),
            image_token_id,
        }
    }
}

impl Embed for Exact {
    type Sample = ExactSample;

    fn name(&self, sample: &ExactSample) -> String {
        sample.id.clone()
    }

    fn embed(&mut self, sample: &ExactSample, _gates: &Gates) -> Result<Embedded, runtime::Error> {
        let mut inputs_embeds = self.towers.embed(&sample.input_ids)?.unwrap();
        let features = self.towers.image_features(&sample.image)?;
        merge_image_features(
            &mut inputs_embeds,
            &sample.input_ids,
            features.view(),
            self.image_token_id,
        )?;
        // Position t counts iff token t + 1 belongs to the answer.
        let next = sample.labels.iter().skip(1).chain([&-100]);
        Ok(Embedded {
            name: sample.id.clone(),
            input_ids: sample.input_ids.clone(),
            inputs_embeds: Some(inputs_embeds),
            position_ids: sample.position_ids.clone(),
            answer_mask: next.map(|&l| if l == -100 { 0.0 } else { 1.0 }).collect(),
            prefix: 0,
            next_position: i64::try_from(sample.input_ids.len()).unwrap(),
            decoder_inputs: Vec::new(),
            vision: BTreeMap::new(),
        })
    }
}

/// The decoder of `bundle`, all its layers tapped and gated; with `None` as it is.
pub fn decoder(engine: &Engine, bundle: &Bundle, outputs: Option<Outputs>) -> Decoder {
    try_decoder(engine, bundle, outputs).unwrap_or_else(|error| panic!("{}", chain(&error)))
}

fn try_decoder(
    engine: &Engine,
    bundle: &Bundle,
    outputs: Option<Outputs>,
) -> Result<Decoder, runtime::Error> {
    let file = bundle.components(None).unwrap().decoder;
    let model = ModelFile::open(&file.path, &Limits::default()).unwrap();
    let index = Index::new(model.graph());
    let mlps = edit::mlps(bundle, file, &index);
    let mlps: Vec<&Mlp<'_>> = match outputs {
        Some(_) => mlps.iter().filter(|m| m.tower == Tower::Language).collect(),
        None => Vec::new(),
    };
    let outputs = outputs.unwrap_or(Outputs::Model);
    Decoder::open(engine, &model, &mlps, outputs, Work::Forwards(1))
}

/// `W_down` of every layer as the file holds it, float32 `[d_model, d_ff]` as PyTorch has it.
pub fn down_projections(bundle: &Bundle) -> BTreeMap<usize, Array2<f32>> {
    let file = bundle.components(None).unwrap().decoder;
    let model = ModelFile::open(&file.path, &Limits::default()).unwrap();
    let index = Index::new(model.graph());
    edit::mlps(bundle, file, &index)
        .iter()
        .map(|mlp| {
            let weight = &mlp.down().weight;
            assert_eq!(model.data_type(weight.tensor).unwrap(), DataType::FLOAT);
            let dims: Vec<usize> = weight
                .tensor
                .dims
                .iter()
                .map(|&dim| usize::try_from(dim).unwrap())
                .collect();
            let stored = floats(&model.bytes(weight.tensor).unwrap());
            let stored = Array2::from_shape_vec((dims[0], dims[1]), stored).unwrap();
            let matrix = match weight.input_axis {
                Some(0) => stored.reversed_axes(),
                _ => stored,
            };
            (mlp.layer.unwrap(), matrix)
        })
        .collect()
}

/// The settings of the oracle's run.
pub const GAMMA: f64 = 2.0;
pub const LAYERS: LayerRange = LayerRange::Inclusive { start: 1, end: 2 };

pub fn options() -> Options {
    Options {
        layers: LAYERS,
        batch_size: 1,
        epochs: 1,
        order: Order::File,
        keep_norm: None,
    }
}

/// `gates` by layer, as the decoder takes them.
pub fn as_gates(plan: &Plan) -> Gates {
    kvw::pipeline::gates_of(plan)
}

/// `plan` written: a new folder at `out`.
pub fn apply(
    bundle: &Bundle,
    gates: &BTreeMap<LayerId, Vec<f32>>,
    out: &Path,
) -> Result<Receipt, edit::Error> {
    let decoder = bundle.components(None).unwrap().decoder;
    let identity = edit::identity_of(bundle, decoder)?;
    let plan = EditPlan::new(bundle, gates, &identity)?;
    edit::apply(bundle, &plan, out, &edit::Options::default(), &|_| {})
}

/// Numbers between 0 and 1 that look random and are the same everywhere (SplitMix64).
pub fn noise(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    })
}

/// A small float16 decoder in transformers.js's layout: three layers, `d_ff` 160.
pub fn float16() -> PathBuf {
    fixtures().join("exports/tjs-qwen2_vl")
}

/// The float16 model's inputs: embeddings that look random.
pub fn float16_samples() -> Vec<Embedded> {
    (0..3)
        .map(|seed| {
            let tokens = 12 + seed;
            let embeds = noise(seed as u64).take(tokens * 64).map(|x| x - 0.5);
            let positions = Array2::from_shape_fn((3, tokens), |(_, t)| i64::try_from(t).unwrap());
            Embedded {
                name: format!("noise {seed}"),
                input_ids: vec![0; tokens],
                inputs_embeds: Some(
                    Array3::from_shape_vec((1, tokens, 64), embeds.collect()).unwrap(),
                ),
                position_ids: PositionIds::Multimodal(positions),
                answer_mask: vec![1.0; tokens],
                prefix: 0,
                next_position: i64::try_from(tokens).unwrap(),
                decoder_inputs: Vec::new(),
                vision: BTreeMap::new(),
            }
        })
        .collect()
}

/// The largest `|found − expected| / |expected|`; where both are 0 they agree.
pub fn relative<'a>(
    found: impl IntoIterator<Item = &'a f32>,
    expected: impl IntoIterator<Item = &'a f32>,
) -> f64 {
    let (mut worst, mut count) = (0.0, 0);
    let mut expected = expected.into_iter();
    for &found in found {
        let (found, expected) = (f64::from(found), f64::from(*expected.next().unwrap()));
        let deviation = match found == expected {
            true => 0.0,
            false => (found - expected).abs() / expected.abs(),
        };
        // A NaN must not pass as equal.
        worst = if deviation.is_nan() {
            f64::INFINITY
        } else {
            f64::max(worst, deviation)
        };
        count += 1;
    }
    assert!(count > 0 && expected.next().is_none(), "unequal lengths");
    worst
}

/// A layer's mean as float32, the precision of the oracle's file.
pub fn mean(coefficients: &Coefficients, layer: usize) -> Array1<f32> {
    single(&coefficients.mean(layer.into()).unwrap())
}

#[allow(clippy::cast_possible_truncation)]
pub fn single(values: &Array1<f64>) -> Array1<f32> {
    values.mapv(|value| value as f32)
}

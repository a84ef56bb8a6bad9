//! What comes before the decoder: token embeddings and image features.
//!
//! In: token ids and an image's pixel values. Out: `inputs_embeds`, with the image features in place;
//! what the model leaves to its decoder is handed on as it is. Neither depends on the decoder's gates, so an
//! image is encoded once however often its sample is run; and once more whenever gates of the vision
//! encoder's own layers change ([`Towers::instrument`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, ArrayD, Ix3, aview1, s};
use ort::session::Session;

use super::engine::{Engine, Work};
use super::kept_features::KeptFeatures;
use super::part::gate_values;
use super::tensor::{Port, to_floats};
use super::{Embedded, Error, Token, VisionSum};
use crate::graph::session::{self, SessionModel};
use crate::graph::{LayerId, Mlp, Outputs, Patch, VISION_MASK, positions_name, sum_name};
use crate::kvw::Gates;
use crate::onnx::{Limits, ModelFile};
use crate::preprocess::{
    DecoderInput, FeatureCache, ImageInputs, NamedTensor, Prepared, TensorValue,
    merge_image_features,
};

/// Names by which exports call the tensors of a processor, where they differ from the processor's.
const ALIASES: &[(&str, &[&str])] = &[("image_grid_thw", &["grid_thw"])];

/// A component of the model: the vision encoder or the token embedding.
struct Component {
    model: PathBuf,
    session: Session,
    inputs: Vec<Port>,
}

impl Component {
    fn open(engine: &Engine, path: &Path, work: Work) -> Result<(Component, SessionModel), Error> {
        let model = ModelFile::open(path, &Limits::default()).map_err(crate::graph::Error::from)?;
        let graph = session::encode(&model, model.proto().clone())?;
        Ok((Component::of(engine, &graph, path, work)?, graph))
    }

    fn of(
        engine: &Engine,
        graph: &SessionModel,
        path: &Path,
        work: Work,
    ) -> Result<Component, Error> {
        let session = engine.open(graph, path, work)?;
        let inputs = session.inputs().iter().filter_map(Port::of).collect();
        Ok(Component {
            model: path.to_owned(),
            session,
            inputs,
        })
    }

    fn input(&self, names: &[&str]) -> Result<&Port, Error> {
        self.inputs
            .iter()
            .find(|port| names.contains(&port.name.as_str()))
            .ok_or_else(|| {
                let found: Vec<_> = self.inputs.iter().map(|port| port.name.as_str()).collect();
                Error::Interface {
                    model: self.model.clone(),
                    expected: format!("an input named {}", names.join(" or ")),
                    found: found.join(", "),
                }
            })
    }

    /// Whether this is a token embedding that puts image features in place itself.
    fn merges(&self) -> bool {
        self.inputs.iter().any(|port| port.name != INPUT_IDS)
    }

    /// The embeddings of `ids`: float32 `[1, T, d_model]`. `features`, `[tokens, d_model]`, are for an
    /// embedding that merges.
    fn embed(&mut self, ids: &[i64], features: Option<Array2<f32>>) -> Result<Array3<f32>, Error> {
        let fail = |source| Error::Run {
            model: self.model.clone(),
            source,
        };
        let port = self.input(&[INPUT_IDS])?;
        let ids = TensorValue::Integers(aview1(ids).to_owned().into_dyn()).with_rank(2);
        let mut inputs = vec![(port.name.clone(), port.value(&ids).map_err(fail)?)];
        for port in self.inputs.iter().filter(|port| port.name != INPUT_IDS) {
            let width = port.dims.last().copied().unwrap_or(0);
            let width = usize::try_from(width).unwrap_or(0);
            let features = features
                .clone()
                .unwrap_or_else(|| Array2::zeros((0, width)));
            let features = TensorValue::Floats(features.into_dyn());
            inputs.push((port.name.clone(), port.value(&features).map_err(fail)?));
        }
        let outputs = self.run(inputs)?;
        let embeds = outputs.into_iter().next().and_then(floats);
        let found = format!("{:?}", embeds.as_ref().map(ArrayD::shape));
        embeds
            .and_then(|embeds| embeds.into_dimensionality::<Ix3>().ok())
            .ok_or_else(|| Error::Interface {
                model: self.model.clone(),
                expected: "inputs_embeds [1, T, d_model]".into(),
                found,
            })
    }

    /// The outputs, as float32, in the graph's order.
    fn run(
        &mut self,
        inputs: Vec<(String, ort::session::SessionInputValue<'_>)>,
    ) -> Result<Vec<NamedTensor>, Error> {
        let fail = |source| Error::Run {
            model: self.model.clone(),
            source,
        };
        let outputs = self.session.run(inputs).map_err(fail)?;
        let mut tensors = Vec::with_capacity(outputs.len());
        for (name, value) in outputs.iter() {
            let (shape, data) = to_floats(&value).map_err(fail)?;
            let found = format!("{shape:?}");
            let array = ArrayD::from_shape_vec(shape, data).map_err(|_| Error::Interface {
                model: self.model.clone(),
                expected: format!("an output {name} that fills its shape"),
                found,
            })?;
            tensors.push(NamedTensor::floats(name, array));
        }
        match tensors.is_empty() {
            true => Err(Error::Interface {
                model: self.model.clone(),
                expected: "an output".into(),
                found: "none".into(),
            }),
            false => Ok(tensors),
        }
    }
}

/// The vision encoder and the token embedding of one model.
pub struct Towers {
    vision: Option<Component>,
    /// The vision encoder's file, where it was closed.
    closed: Option<PathBuf>,
    embed_tokens: Option<Component>,
    /// What the vision encoder made of images under `gates`.
    features: FeatureCache,
    /// Its layers that are measured and gated.
    layers: Vec<(LayerId, usize)>,
    gates: Gates,
    /// Where features outlive the run; not those of an instrumented encoder.
    kept: Option<KeptFeatures>,
    image_token_id: Option<i64>,
    /// The names of the decoder's inputs: what is not put into embeddings must be one of them.
    decoder_takes: Vec<String>,
}

const INPUT_IDS: &str = "input_ids";

impl Towers {
    /// Opens both. `vision` is absent in a text-only model, `embed_tokens` where the decoder takes
    /// ids. Image features replace the embeddings of `image_token_id` (an embedding that takes features
    /// does that itself); without one, the vision encoder's outputs are handed to the decoder by name.
    ///
    /// # Errors
    /// A file cannot be read, or ONNX Runtime refuses it.
    pub fn open(
        engine: &Engine,
        vision: Option<&Path>,
        embed_tokens: Option<&Path>,
        image_token_id: Option<i64>,
        work: Work,
    ) -> Result<Towers, Error> {
        let open = |path: Option<&Path>| {
            path.map(|path| Component::open(engine, path, work))
                .transpose()
        };
        let (vision, kept) = match open(vision)? {
            Some((vision, graph)) => {
                let folder = engine.feature_folder();
                let keep = |folder| KeptFeatures::open(folder, &graph, &engine.describe());
                (Some(vision), folder.map(keep).transpose()?)
            }
            None => (None, None),
        };
        Ok(Towers {
            vision,
            closed: None,
            embed_tokens: open(embed_tokens)?.map(|(component, _)| component),
            features: FeatureCache::default(),
            layers: Vec::new(),
            gates: Gates::new(),
            kept,
            image_token_id,
            decoder_takes: Vec::new(),
        })
    }

    /// The same, for a decoder with inputs of these names: it may take images as they are (both towers
    /// are in its graph), or what the vision encoder makes of them.
    #[must_use]
    pub fn with_decoder_inputs(mut self, names: Vec<String>) -> Towers {
        self.decoder_takes = names;
        self
    }

    /// Opens the vision encoder, the file `model`, once more: with `mlps` gated, and summed where `outputs`
    /// asks for that beside the model's own outputs.
    ///
    /// # Errors
    /// An MLP cannot be instrumented, or ONNX Runtime refuses the model.
    pub fn instrument(
        &mut self,
        engine: &Engine,
        model: &ModelFile,
        mlps: &[&Mlp<'_>],
        outputs: Outputs,
        work: Work,
    ) -> Result<(), Error> {
        let patch = Patch::plan(model, mlps, outputs)?;
        let graph = session::encode(model, patch.apply(model))?;
        // Not two sessions at a time.
        self.vision = None;
        self.kept = None;
        self.vision = Some(Component::of(engine, &graph, model.path(), work)?);
        self.closed = None;
        self.layers = patch.layers();
        self.features = FeatureCache::default();
        self.gates = Gates::new();
        Ok(())
    }

    /// The vision encoder's layers that are measured and gated, ascending, each with its `d_ff`. None where
    /// it is a part of the decoder's graph.
    pub fn layers(&self) -> &[(LayerId, usize)] {
        &self.layers
    }

    fn have_vision(&self) -> bool {
        self.vision.is_some() || self.closed.is_some()
    }

    /// Encodes `pictures`, each once, and closes the vision encoder: what it takes of memory is free before
    /// the decoder is opened. Any other picture is an error from then on. Nothing is done, and `false` returned,
    /// where the features of all might take more than `limit` bytes, or change with the gates, or where there
    /// is no encoder.
    ///
    /// # Errors
    /// As [`Towers::encode`], or what `pictures` yields.
    pub(super) fn encode_and_close<E: From<Error>>(
        &mut self,
        pictures: impl ExactSizeIterator<Item = Result<Option<ImageInputs>, E>>,
        limit: usize,
    ) -> Result<bool, E> {
        if self.vision.is_none() || !self.layers.is_empty() {
            return Ok(false);
        }
        let most = pictures.len();
        for picture in pictures {
            let Some(picture) = picture? else { continue };
            let features = self.cached(&picture)?;
            let bytes: usize = features.iter().map(NamedTensor::bytes).sum();
            if bytes.saturating_mul(most) > limit {
                return Ok(false);
            }
        }
        self.closed = self.vision.take().map(|vision| vision.model);
        Ok(true)
    }

    /// Takes over those of `gates` that are the vision encoder's own. Others than before: what is kept of
    /// images is no longer true.
    fn set_gates(&mut self, gates: &Gates) {
        let own = self.layers.iter().filter_map(|&(layer, _)| {
            let gates = gates.get(&layer)?;
            Some((layer, gates.clone()))
        });
        let own: Gates = own.collect();
        if own != self.gates {
            self.gates = own;
            self.features = FeatureCache::default();
        }
    }

    /// `tensors` as inputs of the decoder.
    fn handed_on(&self, tensors: &[NamedTensor]) -> Result<Vec<DecoderInput>, Error> {
        let taken = |tensor: &&NamedTensor| self.decoder_takes.contains(&tensor.name);
        let taken: Vec<_> = tensors.iter().filter(taken).collect();
        if taken.is_empty() {
            return Err(self.no_vision());
        }
        let taken = taken.into_iter().map(|tensor| DecoderInput {
            tensor: tensor.clone(),
            token_axis: None,
            required: false,
        });
        Ok(taken.collect())
    }

    fn no_vision(&self) -> Error {
        let beside = self.embed_tokens.as_ref();
        Error::NoVision {
            model: beside.map_or_else(
                || "the decoder".to_owned(),
                |component| component.model.display().to_string(),
            ),
        }
    }

    /// The embeddings of `ids`: float32 `[1, T, d_model]`; `None` where the decoder makes them.
    ///
    /// # Errors
    /// The model fails, or its output has another shape.
    pub fn embed(&mut self, ids: &[i64]) -> Result<Option<Array3<f32>>, Error> {
        let Some(component) = &mut self.embed_tokens else {
            return Ok(None);
        };
        component.embed(ids, None).map(Some)
    }

    /// The next token of each of several answers, for [`super::Decoder::step`].
    ///
    /// # Errors
    /// As [`Towers::embed`].
    pub fn tokens(&mut self, ids: &[i64]) -> Result<Vec<Token>, Error> {
        let embeddings = self.embed(ids)?;
        let each = ids.iter().enumerate();
        Ok(each
            .map(|(place, &id)| Token {
                id,
                embedding: embeddings
                    .as_ref()
                    .map(|all| all.slice(s![.., place..place + 1, ..]).to_owned()),
            })
            .collect())
    }

    /// What the vision encoder makes of an image, in the order of its outputs. `tensors` are what the
    /// model's processor makes; the encoder is given those that it asks for.
    ///
    /// # Errors
    /// The model has no vision encoder, asks for something else, or fails.
    pub fn encode(&mut self, tensors: &[NamedTensor]) -> Result<Vec<NamedTensor>, Error> {
        let Some(component) = &mut self.vision else {
            return Err(match &self.closed {
                Some(model) => Error::NewPicture {
                    model: model.clone(),
                },
                None => self.no_vision(),
            });
        };
        let fail = |source| Error::Run {
            model: component.model.clone(),
            source,
        };
        let named = |name: &str| component.inputs.iter().find(|port| port.name == name);
        let mut inputs = gate_values(named, &self.layers, &self.gates).map_err(fail)?;
        let gated: Vec<String> = inputs.iter().map(|(name, _)| name.clone()).collect();
        for port in (component.inputs.iter()).filter(|port| !gated.contains(&port.name)) {
            let tensor = tensors.iter().find(|tensor| {
                let aliases = ALIASES.iter().find(|(name, _)| *name == tensor.name);
                port.name == tensor.name
                    || aliases.is_some_and(|(_, names)| names.contains(&port.name.as_str()))
            });
            if port.name == VISION_MASK && tensor.is_none() {
                // Every position counts alike.
                let mask = port.floats(aview1(&[1.0]).into_dyn()).map_err(fail)?;
                inputs.push((port.name.clone(), mask));
                continue;
            }
            let Some(tensor) = tensor else {
                let made: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
                return Err(Error::Interface {
                    model: component.model.clone(),
                    expected: format!("inputs out of {}", made.join(", ")),
                    found: format!("'{}'", port.name),
                });
            };
            let value = port.value(&tensor.value).map_err(fail)?;
            inputs.push((port.name.clone(), value));
        }
        component.run(inputs)
    }

    /// The features of an image, float32 `[tokens, d_model]`: the encoder's first output, `[tokens,
    /// d_model]` or `[images, tokens, d_model]`.
    ///
    /// # Errors
    /// As [`Towers::encode`].
    pub fn image_features(&mut self, tensors: &[NamedTensor]) -> Result<Array2<f32>, Error> {
        let outputs = self.encode(tensors)?;
        self.rows(outputs)
    }

    fn rows(&self, outputs: Vec<NamedTensor>) -> Result<Array2<f32>, Error> {
        let features = outputs.into_iter().next().and_then(floats);
        let features = features.unwrap_or_else(|| ArrayD::zeros(vec![0]));
        let found = format!("{:?}", features.shape());
        let width = features.shape().last().copied().unwrap_or(0);
        let rows = features.len().checked_div(width).unwrap_or(0);
        features
            .into_shape_with_order((rows, width))
            .map_err(|_| Error::Interface {
                model: self
                    .vision
                    .as_ref()
                    .map(|v| v.model.clone())
                    .unwrap_or_default(),
                expected: "image features [tokens, d_model]".into(),
                found,
            })
    }

    /// What the vision encoder's layers were summed to, among its outputs.
    fn sums_in(&self, outputs: &[NamedTensor]) -> BTreeMap<LayerId, VisionSum> {
        let numbers = |name: String| {
            let found = outputs.iter().find(|tensor| tensor.name == name);
            match &found?.value {
                TensorValue::Floats(array) => Some(array.iter().copied().collect::<Vec<f32>>()),
                _ => None,
            }
        };
        let sums = self.layers.iter().filter_map(|&(layer, _)| {
            let weight = numbers(positions_name(layer))?;
            let sum = VisionSum {
                sum: numbers(sum_name(layer))?.into(),
                weight: weight.into_iter().map(f64::from).sum(),
            };
            Some((layer, sum))
        });
        sums.collect()
    }

    /// The decoder's input for a prepared sample, with the weight of each position in the statistics, on the
    /// model as `gates` leave the vision encoder. `name` is the sample's for messages.
    ///
    /// # Errors
    /// A component fails, or the features do not fit the image tokens.
    pub fn prepare(
        &mut self,
        name: String,
        prepared: Prepared,
        answer_mask: Vec<f32>,
        gates: &Gates,
    ) -> Result<Embedded, Error> {
        self.set_gates(gates);
        let mut vision = BTreeMap::new();
        let mut decoder_inputs = prepared.decoder_inputs;
        let mut features = None;
        if let Some(image) = &prepared.image {
            if !self.have_vision() && !self.decoder_takes.is_empty() {
                decoder_inputs.extend(self.handed_on(&image.tensors)?);
            } else {
                let outputs = self.cached(image)?;
                vision = self.sums_in(&outputs);
                match self.image_token_id {
                    Some(_) if self.embed_tokens.is_some() => features = Some(self.rows(outputs)?),
                    _ => decoder_inputs.extend(self.handed_on(&outputs)?),
                }
            }
        }
        let ids = &prepared.input_ids;
        let inputs_embeds = match &mut self.embed_tokens {
            Some(component) if component.merges() => Some(component.embed(ids, features)?),
            Some(component) => {
                let mut embeds = component.embed(ids, None)?;
                if let (Some(features), Some(id)) = (features, self.image_token_id) {
                    merge_image_features(&mut embeds, ids, features.view(), id)?;
                }
                Some(embeds)
            }
            None => None,
        };
        let is_image = |id: &i64| Some(*id) == self.image_token_id;
        let prefix = prepared.input_ids.iter().rposition(is_image);
        Ok(Embedded {
            answer_mask,
            prefix: prefix.map_or(0, |last| last + 1),
            name,
            input_ids: prepared.input_ids,
            inputs_embeds,
            position_ids: prepared.position_ids,
            next_position: prepared.next_position,
            decoder_inputs,
            vision,
        })
    }

    fn cached(&mut self, image: &ImageInputs) -> Result<Vec<NamedTensor>, Error> {
        // The cache and the encoder are both parts of self: take the cache out for the call.
        let mut cache = std::mem::take(&mut self.features);
        let outputs = cache
            .get_or_encode(image, |image| self.kept_or_encoded(image))
            .map(<[NamedTensor]>::to_vec);
        self.features = cache;
        outputs
    }

    fn kept_or_encoded(&mut self, image: &ImageInputs) -> Result<Vec<NamedTensor>, Error> {
        if let Some(features) = self.kept.as_ref().and_then(|kept| kept.load(&image.key)) {
            return Ok(features);
        }
        let features = self.encode(&image.tensors)?;
        if let Some(kept) = &self.kept {
            kept.save(&image.key, &features);
        }
        Ok(features)
    }
}

fn floats(tensor: NamedTensor) -> Option<ArrayD<f32>> {
    match tensor.value {
        TensorValue::Floats(array) => Some(array),
        _ => None,
    }
}

//! What comes before the decoder: token embeddings and image features.
//!
//! In: token ids and an image's pixel values. Out: `inputs_embeds`, with the image features in place.
//! Neither depends on the gates, so an image is encoded once however often its sample is run.

use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, ArrayD, Ix3};
use ort::session::Session;

use super::engine::{Engine, Work};
use super::tensor::{Port, int64s, to_floats};
use super::{Embedded, Error};
use crate::graph::session;
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
    fn open(engine: &Engine, path: &Path, work: Work) -> Result<Component, Error> {
        let model = ModelFile::open(path, &Limits::default()).map_err(crate::graph::Error::from)?;
        let graph = session::encode(&model, model.proto().clone())?;
        let session = engine.open(&graph, path, work)?;
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
    embed_tokens: Component,
    features: FeatureCache,
    image_token_id: Option<i64>,
}

impl Towers {
    /// Opens both. `vision` is absent in a text-only model. Image features replace the embeddings of
    /// `image_token_id`; without one, the vision encoder's outputs are handed to the decoder by name.
    ///
    /// # Errors
    /// A file cannot be read, or ONNX Runtime refuses it.
    pub fn open(
        engine: &Engine,
        vision: Option<&Path>,
        embed_tokens: &Path,
        image_token_id: Option<i64>,
        work: Work,
    ) -> Result<Towers, Error> {
        Ok(Towers {
            vision: vision
                .map(|path| Component::open(engine, path, work))
                .transpose()?,
            embed_tokens: Component::open(engine, embed_tokens, work)?,
            features: FeatureCache::default(),
            image_token_id,
        })
    }

    /// The embeddings of `ids`: float32 `[1, T, d_model]`.
    ///
    /// # Errors
    /// The model fails, or its output has another shape.
    pub fn embed(&mut self, ids: &[i64]) -> Result<Array3<f32>, Error> {
        let component = &mut self.embed_tokens;
        let name = component.input(&["input_ids"])?.name.clone();
        let ids = int64s(vec![1, ids.len()], ids.to_vec()).map_err(|source| Error::Run {
            model: component.model.clone(),
            source,
        })?;
        let outputs = component.run(vec![(name, ids)])?;
        let embeds = outputs.into_iter().next().and_then(floats);
        let found = format!("{:?}", embeds.as_ref().map(ArrayD::shape));
        embeds
            .and_then(|embeds| embeds.into_dimensionality::<Ix3>().ok())
            .ok_or_else(|| Error::Interface {
                model: component.model.clone(),
                expected: "inputs_embeds [1, T, d_model]".into(),
                found,
            })
    }

    /// What the vision encoder makes of an image, in the order of its outputs. `tensors` are what the
    /// model's processor makes; the encoder is given those that it asks for.
    ///
    /// # Errors
    /// The model has no vision encoder, asks for something else, or fails.
    pub fn encode(&mut self, tensors: &[NamedTensor]) -> Result<Vec<NamedTensor>, Error> {
        let Some(component) = &mut self.vision else {
            return Err(Error::Interface {
                model: self.embed_tokens.model.clone(),
                expected: "a vision encoder beside it, because a sample has an image".into(),
                found: "none".into(),
            });
        };
        let mut inputs = Vec::with_capacity(component.inputs.len());
        for port in &component.inputs {
            let tensor = tensors.iter().find(|tensor| {
                let aliases = ALIASES.iter().find(|(name, _)| *name == tensor.name);
                port.name == tensor.name
                    || aliases.is_some_and(|(_, names)| names.contains(&port.name.as_str()))
            });
            let Some(tensor) = tensor else {
                let made: Vec<_> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
                return Err(Error::Interface {
                    model: component.model.clone(),
                    expected: format!("inputs out of {}", made.join(", ")),
                    found: format!("'{}'", port.name),
                });
            };
            let value = port.value(&tensor.value).map_err(|source| Error::Run {
                model: component.model.clone(),
                source,
            })?;
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

    /// The decoder's input for a prepared sample, with the weight of each position in the statistics.
    ///
    /// # Errors
    /// A component fails, or the features do not fit the image tokens.
    pub fn prepare(
        &mut self,
        prepared: Prepared,
        answer_mask: Vec<f32>,
    ) -> Result<Embedded, Error> {
        let mut inputs_embeds = self.embed(&prepared.input_ids)?;
        let mut decoder_inputs = prepared.decoder_inputs;
        if let Some(image) = &prepared.image {
            let outputs = self.cached(image)?;
            match self.image_token_id {
                Some(image_token_id) => merge_image_features(
                    &mut inputs_embeds,
                    &prepared.input_ids,
                    self.rows(outputs)?.view(),
                    image_token_id,
                )?,
                None => decoder_inputs.extend(outputs.into_iter().map(|tensor| DecoderInput {
                    tensor,
                    token_axis: None,
                })),
            }
        }
        Ok(Embedded {
            answer_mask,
            id: prepared.id,
            input_ids: prepared.input_ids,
            inputs_embeds,
            position_ids: prepared.position_ids,
            next_position: prepared.next_position,
            decoder_inputs,
        })
    }

    fn cached(&mut self, image: &ImageInputs) -> Result<Vec<NamedTensor>, Error> {
        // The cache and the encoder are both parts of self: take the cache out for the call.
        let mut cache = std::mem::take(&mut self.features);
        let outputs = cache
            .get_or_encode(image, |image| self.encode(&image.tensors))
            .map(<[NamedTensor]>::to_vec);
        self.features = cache;
        outputs
    }
}

fn floats(tensor: NamedTensor) -> Option<ArrayD<f32>> {
    match tensor.value {
        TensorValue::Floats(array) => Some(array),
        _ => None,
    }
}

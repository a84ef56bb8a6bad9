//! What comes before the decoder: token embeddings and image features.
//!
//! In: token ids and an image's pixel values. Out: `inputs_embeds`, with the image features in place.
//! Neither depends on the gates, so an image is encoded once however often its sample is run.

use std::path::{Path, PathBuf};

use ndarray::{Array2, Array3, ArrayViewD, Ix2, Ix3};
use ort::session::Session;

use super::engine::{Engine, Work};
use super::tensor::{Port, int64s, to_floats};
use super::{Embedded, Error};
use crate::graph::session;
use crate::onnx::{Limits, ModelFile};
use crate::preprocess::{FeatureCache, ImageInputs, Prepared, merge_image_features};

/// A component with one output: the vision encoder or the token embedding.
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

    /// The first output, as float32.
    fn run(
        &mut self,
        inputs: Vec<(String, ort::session::SessionInputValue<'_>)>,
    ) -> Result<(Vec<usize>, Vec<f32>), Error> {
        let fail = |source| Error::Run {
            model: self.model.clone(),
            source,
        };
        let outputs = self.session.run(inputs).map_err(fail)?;
        let first = outputs.values().next().ok_or_else(|| Error::Interface {
            model: self.model.clone(),
            expected: "an output".into(),
            found: "none".into(),
        })?;
        to_floats(&first).map_err(fail)
    }
}

/// The vision encoder and the token embedding of one model.
pub struct Towers {
    vision: Option<Component>,
    embed_tokens: Component,
    features: FeatureCache,
    image_token_id: i64,
}

impl Towers {
    /// Opens both. `vision` is absent in a text-only model.
    ///
    /// # Errors
    /// A file cannot be read, or ONNX Runtime refuses it.
    pub fn open(
        engine: &Engine,
        vision: Option<&Path>,
        embed_tokens: &Path,
        image_token_id: i64,
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
        let (shape, data) = component.run(vec![(name, ids)])?;
        shaped(
            &component.model,
            "inputs_embeds [1, T, d_model]",
            shape,
            data,
        )
    }

    /// The features of an image: float32 `[tokens, d_model]`. `pixel_values` has the shape that the
    /// model's processor gives it; `grid_thw` is given to models that ask for it.
    ///
    /// # Errors
    /// The model has no vision encoder, fails, or its output has another shape.
    pub fn image_features(
        &mut self,
        pixel_values: ArrayViewD<'_, f32>,
        grid_thw: Option<[i64; 3]>,
    ) -> Result<Array2<f32>, Error> {
        let Some(component) = &mut self.vision else {
            return Err(Error::Interface {
                model: self.embed_tokens.model.clone(),
                expected: "a vision encoder beside it, because a sample has an image".into(),
                found: "none".into(),
            });
        };
        let fail = |source| Error::Run {
            model: component.model.clone(),
            source,
        };
        let pixels = component.input(&["pixel_values"])?;
        let mut inputs = vec![(
            pixels.name.clone(),
            pixels.floats(pixel_values).map_err(fail)?,
        )];
        if let Some(grid) = grid_thw {
            let name = component
                .input(&["grid_thw", "image_grid_thw"])?
                .name
                .clone();
            inputs.push((name, int64s(vec![1, 3], grid.to_vec()).map_err(fail)?));
        }
        let (shape, data) = component.run(inputs)?;
        // [tokens, d_model], or [images, tokens, d_model] with one image.
        let width = shape.last().copied().unwrap_or(0);
        let rows = data.len().checked_div(width).unwrap_or(0);
        let array = ndarray::ArrayD::from_shape_vec(vec![rows, width], data).ok();
        array
            .and_then(|array| array.into_dimensionality::<Ix2>().ok())
            .ok_or_else(|| Error::Interface {
                model: component.model.clone(),
                expected: "image features [tokens, d_model]".into(),
                found: format!("{shape:?}"),
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
        if let Some(image) = &prepared.image {
            let features = self.cached_features(image)?;
            merge_image_features(
                &mut inputs_embeds,
                &prepared.input_ids,
                features.view(),
                self.image_token_id,
            )?;
        }
        Ok(Embedded {
            answer_mask,
            id: prepared.id,
            input_ids: prepared.input_ids,
            inputs_embeds,
            position_ids: prepared.position_ids,
            next_position: prepared.next_position,
        })
    }

    fn cached_features(&mut self, image: &ImageInputs) -> Result<Array2<f32>, Error> {
        // The cache and the encoder are both parts of self: take the cache out for the call.
        let mut cache = std::mem::take(&mut self.features);
        let features = cache
            .get_or_encode(image, |image| {
                self.image_features(image.pixel_values.view().into_dyn(), Some(image.grid_thw))
            })
            .cloned();
        self.features = cache;
        features
    }
}

fn shaped(
    model: &Path,
    expected: &str,
    shape: Vec<usize>,
    data: Vec<f32>,
) -> Result<Array3<f32>, Error> {
    let found = format!("{shape:?}");
    let array = ndarray::ArrayD::from_shape_vec(shape, data).ok();
    array
        .and_then(|array| array.into_dimensionality::<Ix3>().ok())
        .ok_or_else(|| Error::Interface {
            model: model.to_owned(),
            expected: expected.to_owned(),
            found,
        })
}

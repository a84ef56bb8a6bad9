//! Qwen2-VL. Source: transformers 4.57,
//! `models/qwen2_vl/{processing,image_processing,image_processing…_fast,modeling}_qwen2_vl.py`.

use serde_json::json;
use sha2::{Digest, Sha256};

use super::answer::{answer_span, answer_tokens};
use super::config::{Json, shown};
use super::patches::{PatchLayout, flatten, normalization, smart_resize};
use super::resize::{Filter, resize};
use super::template::ChatTemplate;
use super::{
    Error, Family, Form, ImageBackend, ImageInputs, ImageKey, ModelDir, PositionIds, Prepared,
    Tokenizer, image, mrope,
};
use crate::dataset::{ImageSource, Sample};

const NAME: &str = "qwen2_vl";
/// Larger patches, merges and frame counts are surely not meant.
const MAX_PATCH_SIDE: usize = 256;
/// The most pixels that a configuration may ask an image to be resized to.
const MAX_RESIZED_PIXELS: usize = 1 << 26;

/// Reads a Qwen2-VL folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir, backend: ImageBackend) -> Result<Box<dyn Family>, Error> {
    let tokenizer = Tokenizer::open(&model.dir().join("tokenizer.json"))?;
    let image_token_id = model.config().integer("image_token_id")?;
    let Some(image_token) = tokenizer.id_to_token(image_token_id) else {
        return Err(model.config().field(
            "image_token_id",
            "a token of tokenizer.json",
            &image_token_id.to_string(),
        ));
    };
    let images = ImageSettings::read(&model.image_processor()?, backend)?;
    let merge_size = model.config().size_or(
        "vision_config.spatial_merge_size",
        images.layout.merge_size,
        MAX_PATCH_SIDE,
    )?;
    if merge_size != images.layout.merge_size {
        let expected = format!(
            "{} (the image processor's merge_size)",
            images.layout.merge_size
        );
        return Err(model.config().field(
            "vision_config.spatial_merge_size",
            &expected,
            &merge_size.to_string(),
        ));
    }
    Ok(Box::new(Qwen2Vl {
        template: ChatTemplate::open(model)?,
        tokenizer,
        image_token_id,
        image_token,
        eos_token_ids: model.eos_token_ids()?,
        images,
    }))
}

struct Qwen2Vl {
    template: ChatTemplate,
    tokenizer: Tokenizer,
    image_token_id: i64,
    image_token: String,
    eos_token_ids: Vec<i64>,
    images: ImageSettings,
}

impl Family for Qwen2Vl {
    fn name(&self) -> &'static str {
        NAME
    }

    fn image_token_id(&self) -> i64 {
        self.image_token_id
    }

    fn eos_token_ids(&self) -> &[i64] {
        &self.eos_token_ids
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn prepare(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        self.prepare_sample(sample, form)
            .map_err(|error| error.in_sample(&sample.id))
    }
}

impl Qwen2Vl {
    fn prepare_sample(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let image = sample
            .image
            .as_ref()
            .map(|image| self.images.inputs(image))
            .transpose()?;
        let grids: Vec<[i64; 3]> = image.iter().map(|image| image.grid_thw).collect();

        let mut content = Vec::new();
        if image.is_some() {
            content.push(json!({"type": "image"}));
        }
        content.push(json!({"type": "text", "text": sample.question}));
        let user = json!({"role": "user", "content": content});
        let prompt = self.template.render(&json!([user]), true)?;
        let prompt = self.expand(sample, &prompt, &grids)?;

        let (encoded, answer) = match form {
            Form::Question => (self.tokenizer.encode(&prompt)?, None),
            Form::WithAnswer => {
                let answer = json!([{"type": "text", "text": sample.answer}]);
                let assistant = json!({"role": "assistant", "content": answer});
                let full = self.template.render(&json!([user, assistant]), false)?;
                let full = self.expand(sample, &full, &grids)?;
                let span = answer_span(&sample.id, &full, &prompt, &sample.answer)?;
                let end = full.trim_end().len().max(span.end);
                let encoded = self.tokenizer.encode(full.get(..end).unwrap_or(&full))?;
                let tokens = answer_tokens(&sample.id, &encoded, &span)?;
                (encoded, Some(tokens))
            }
        };
        let position_ids = mrope::position_ids(
            &encoded.ids,
            self.image_token_id,
            &grids,
            self.images.merge_size(),
        )?;
        let next_position = position_ids.iter().max().map_or(0, |largest| largest + 1);
        let (answer_mask, answer_offsets) = match answer {
            Some(tokens) => (tokens.predicts, tokens.offsets),
            None => (vec![false; encoded.ids.len()], Vec::new()),
        };
        Ok(Prepared {
            id: sample.id.clone(),
            input_ids: encoded.ids,
            position_ids: PositionIds::Multimodal(position_ids),
            answer_tokens: answer_offsets.len(),
            answer_mask,
            answer_offsets,
            image,
            next_position,
        })
    }

    /// Writes each image placeholder as often as its image has merged patches, in the text, before
    /// it is tokenized (as the processor does).
    fn expand(&self, sample: &Sample, text: &str, grids: &[[i64; 3]]) -> Result<String, Error> {
        let parts: Vec<&str> = text.split(&self.image_token).collect();
        if parts.len() != grids.len() + 1 {
            return Err(Error::PlaceholderCount {
                sample: sample.id.clone(),
                token: self.image_token.clone(),
                expected: grids.len(),
                found: parts.len().saturating_sub(1),
            });
        }
        let merged = self.images.layout.merge_size.pow(2);
        let counts = grids
            .iter()
            .map(|grid| usize::try_from(grid.iter().product::<i64>()).unwrap_or(0) / merged);
        let mut expanded = String::with_capacity(text.len());
        for (part, count) in parts.iter().zip(counts.chain(std::iter::once(0))) {
            expanded.push_str(part);
            expanded.push_str(&self.image_token.repeat(count));
        }
        Ok(expanded)
    }
}

/// What preprocessor_config.json says, checked.
struct ImageSettings {
    backend: ImageBackend,
    layout: PatchLayout,
    min_pixels: usize,
    max_pixels: usize,
    filter: Filter,
    levels: Box<[[f32; 256]; 3]>,
    /// SHA-256 of everything above.
    digest: [u8; 32],
}

impl ImageSettings {
    fn read(config: &Json, backend: ImageBackend) -> Result<Self, Error> {
        for switch in ["do_resize", "do_rescale", "do_normalize", "do_convert_rgb"] {
            config.must_be_on(switch)?;
        }
        let layout = PatchLayout {
            patch_size: config.size_or("patch_size", 14, MAX_PATCH_SIDE)?,
            merge_size: config.size_or("merge_size", 2, MAX_PATCH_SIDE)?,
            temporal_patch_size: config.size_or("temporal_patch_size", 2, MAX_PATCH_SIDE)?,
        };
        // `min_pixels` and `max_pixels` overrule `size`, which older configurations lack.
        let pixels = |old: &str, new: &str, default: usize| {
            let default = config.size_or(new, default, MAX_RESIZED_PIXELS)?;
            config.size_or(old, default, MAX_RESIZED_PIXELS)
        };
        let min_pixels = pixels("min_pixels", "size.shortest_edge", 56 * 56)?;
        let max_pixels = pixels("max_pixels", "size.longest_edge", 28 * 28 * 1280)?;
        let filter = match config.get("resample") {
            None | Some(serde_json::Value::Null) => Filter::Bicubic,
            Some(value) => value
                .as_i64()
                .and_then(Filter::from_pillow)
                .ok_or_else(|| {
                    config.field(
                        "resample",
                        "1 (Lanczos), 2 (bilinear) or 3 (bicubic)",
                        &shown(value),
                    )
                })?,
        };
        let rescale_factor = config.number_or("rescale_factor", 1.0 / 255.0)?;
        let mean = config.three_or("image_mean", [0.481_454_66, 0.457_827_5, 0.408_210_73])?;
        let std = config.three_or("image_std", [0.268_629_54, 0.261_302_58, 0.275_777_11])?;
        let levels = Box::new(normalization(backend, rescale_factor, mean, std));
        if !levels.iter().flatten().all(|value| value.is_finite()) {
            return Err(config.field(
                "image_std",
                "values that give finite pixel values",
                &format!("{std:?}"),
            ));
        }

        let mut digest = Sha256::new();
        digest.update(format!(
            "{NAME} {backend:?} {layout:?} {min_pixels} {max_pixels} {filter:?}"
        ));
        levels
            .iter()
            .flatten()
            .for_each(|value| digest.update(value.to_le_bytes()));
        Ok(Self {
            backend,
            layout,
            min_pixels,
            max_pixels,
            filter,
            levels,
            digest: digest.finalize().into(),
        })
    }

    fn merge_size(&self) -> i64 {
        i64::try_from(self.layout.merge_size).unwrap_or(1)
    }

    fn inputs(&self, source: &ImageSource) -> Result<ImageInputs, Error> {
        let bytes = image::read(source)?;
        let key = Sha256::new()
            .chain_update(self.digest)
            .chain_update(&bytes)
            .finalize()
            .into();
        let pixels = image::decode_rgb(source.origin(), &bytes)?;
        let (height, width, _) = pixels.dim();
        let factor = self.layout.patch_size * self.layout.merge_size;
        let (new_height, new_width) =
            smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
        let resized = resize(
            pixels.view(),
            new_height,
            new_width,
            self.filter,
            self.backend,
        )?;
        let (pixel_values, grid) = flatten(resized.view(), self.layout, &self.levels);
        let grid_thw = grid.map(|side| i64::try_from(side).unwrap_or(i64::MAX));
        Ok(ImageInputs {
            key: ImageKey(key),
            pixel_values,
            grid_thw,
        })
    }
}

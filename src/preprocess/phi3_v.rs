//! Phi-3-vision and Phi-3.5-vision. Source: the processor that comes with the checkpoints,
//! `processing_phi3_v.py` and `image_processing_phi3_v.py`; the class is not part of transformers.
//!
//! An image is scaled to a width of whole tiles (a tall one on its side), padded with white to whole
//! tiles, and cut row by row. The whole image, shrunk to one tile, comes first, and black tiles fill up to
//! `num_crops` + 1. An image token has the id −1; the text before and after the image is tokenized by
//! itself, so both begin with `<s>`.

#![warn(clippy::indexing_slicing)]

use std::sync::LazyLock;

use ndarray::{Array2, Array3, Array5, ArrayView3, Axis, s};
use regex::Regex;

use super::config::Json;
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{CLIP, ImageSettings};
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::NamedTensor;
use super::tokenizer::Encoded;
use super::{Error, Family, Form, ImageInputs, ModelDir, Prepared, tiles};
use crate::dataset::{ImageSource, Sample};

/// The id that the processor writes for every feature of the first image.
const IMAGE_TOKEN_ID: i64 = -1;
/// What stands for the first image in a prompt.
const PLACEHOLDER: &str = "<|image_1|>";
/// Side of a tile, in pixels: fixed in the processor.
const TILE: usize = 336;
/// More tiles are surely not meant: published models have 4 to 16.
const MAX_CROPS: usize = 64;

/// What stands for an image of any number.
#[expect(
    clippy::expect_used,
    reason = "the pattern is a constant, and a test compiles it"
)]
static TAG: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"<\|image_\d+\|>").expect("a valid pattern"));

/// Reads a Phi-3-vision or Phi-3.5-vision folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    Ok(Box::new(Phi3V {
        template: ChatTemplate::open(model)?,
        text: TextProcessor::open(model)?,
        tiling: Tiling::read(model, &model.image_processor()?)?,
    }))
}

struct Phi3V {
    template: ChatTemplate,
    text: TextProcessor,
    tiling: Tiling,
}

impl Family for Phi3V {
    fn name(&self) -> &str {
        "phi3_v"
    }

    fn image_token_id(&self) -> Option<i64> {
        Some(IMAGE_TOKEN_ID)
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let cut = sample.image.as_ref().map(|image| self.tiling.cut(image));
        let (image, features, question) = match cut.transpose()? {
            Some((image, features)) => {
                let question = format!("{PLACEHOLDER}\n{}", sample.question);
                (Some(image), vec![features], question)
            }
            None => (None, Vec::new(), sample.question.clone()),
        };
        let turns = Turns::text(&question, &sample.answer);
        let rendered = self.template.conversation(&turns, form)?;
        let encode = |text: &str| self.encode(text, &features);
        let tokens = self.text.tokenize_with(sample, &rendered, encode)?;
        let positions = tokens.sequential();
        Ok(tokens.prepared(sample, positions, image))
    }
}

impl Phi3V {
    /// The parts between placeholders, each tokenized with the tokenizer's special tokens, and the image
    /// tokens, which cover no text, between them.
    fn encode(&self, text: &str, features: &[usize]) -> Result<Encoded, Error> {
        let tokenizer = self.text.tokenizer();
        let tags: Vec<_> = TAG.find_iter(text).map(|tag| tag.range()).collect();
        if tags.len() != features.len() {
            return Err(Error::PlaceholderCount {
                text: self.template.path().display().to_string(),
                token: format!("`{PLACEHOLDER}`"),
                expected: features.len(),
                found: tags.len(),
            });
        }
        let mut encoded = Encoded {
            ids: Vec::new(),
            offsets: Vec::new(),
        };
        let mut start = 0;
        let images = tags.into_iter().zip(features.iter().copied());
        for (tag, features) in images.chain(std::iter::once((text.len()..text.len(), 0))) {
            let part = tokenizer.encode(text.get(start..tag.start).unwrap_or_default(), true)?;
            encoded.ids.extend(part.ids);
            let offsets = part.offsets.into_iter();
            encoded
                .offsets
                .extend(offsets.map(|token| token.start + start..token.end + start));
            encoded
                .ids
                .extend(std::iter::repeat_n(IMAGE_TOKEN_ID, features));
            encoded
                .offsets
                .extend(std::iter::repeat_n(tag.start..tag.start, features));
            start = tag.end;
        }
        Ok(encoded)
    }
}

/// How images are cut into tiles.
struct Tiling {
    settings: ImageSettings,
    crops: usize,
}

impl Tiling {
    fn read(model: &ModelDir, config: &Json) -> Result<Self, Error> {
        Ok(Self {
            settings: ImageSettings::read_slow(model, config, Filter::Bilinear, CLIP)?,
            crops: config.size_or("num_crops", 1, MAX_CROPS)?,
        })
    }

    /// `pixel_values` `[1, num_crops + 1, 3, 336, 336]` and `image_sizes` `[1, 2]` (height and width of
    /// the padded image). Also the number of its features.
    fn cut(&self, source: &ImageSource) -> Result<(ImageInputs, usize), Error> {
        let loaded = self.settings.load(source)?;
        let padded = self.padded(loaded.pixels.view())?;
        let (height, width, _) = padded.dim();
        let mut pixel_values = Array5::zeros((1, self.crops + 1, 3, TILE, TILE));
        let mut places = pixel_values.index_axis_mut(Axis(0), 0);
        let mut places = places.outer_iter_mut();
        if let Some(mut place) = places.next() {
            let values = self.settings.normalize(padded.view());
            place.assign(&shrunk(values.view(), TILE));
        }
        for (mut place, tile) in places.zip(tiles::cut(padded.view(), TILE, TILE)) {
            place.assign(&self.settings.normalize(tile));
        }
        let side = |side: usize| i64::try_from(side).unwrap_or(i64::MAX);
        let sizes = Array2::from(vec![[side(height), side(width)]]);
        let (rows, columns) = (height / TILE, width / TILE);
        let image = ImageInputs {
            key: self.settings.key(&("phi3_v", self.crops), &loaded.file),
            tensors: vec![
                NamedTensor::floats("pixel_values", pixel_values),
                NamedTensor::integers("image_sizes", sizes),
            ],
        };
        // 12 × 12 features a tile, one more at the end of every row of 12, and one between the tiles and
        // the whole image.
        Ok((image, (rows * columns + 1) * 144 + 1 + (rows + 1) * 12))
    }

    /// The image in whole tiles (the processor's `HD_transform`), `[H, W, 3]`.
    fn padded(&self, image: ArrayView3<'_, u8>) -> Result<Array3<u8>, Error> {
        let (height, width, _) = image.dim();
        if width < height {
            let lying = self.padded(image.permuted_axes((1, 0, 2)))?;
            return Ok(lying
                .permuted_axes((1, 0, 2))
                .as_standard_layout()
                .into_owned());
        }
        let (height, width) = scaled(height, width, self.crops);
        let scaled = self.settings.resize(image, height, width)?;
        let padded_height = height.next_multiple_of(TILE);
        let top = (padded_height - height) / 2;
        let mut padded = Array3::from_elem((padded_height, width, 3), u8::MAX);
        padded
            .slice_mut(s![top..top + height, .., ..])
            .assign(&scaled);
        Ok(padded)
    }
}

/// The size of an image that is at least as wide as high: as many tiles wide as `crops` tiles allow.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "non-negative numbers of pixels, rounded down on purpose"
)]
fn scaled(height: usize, width: usize, crops: usize) -> (usize, usize) {
    let aspect = width as f64 / height as f64;
    let fits = |columns: usize| columns as f64 * (columns as f64 / aspect).ceil() <= crops as f64;
    let columns = (1..)
        .take_while(|&columns| fits(columns))
        .last()
        .unwrap_or(1);
    let width = columns * TILE;
    ((width as f64 / aspect) as usize, width)
}

/// `[3, H, W]` resampled to `[3, side, side]` as torch's `interpolate(mode="bicubic")` does: four taps
/// per axis with `a = -0.75`, edges repeated, no antialiasing, in float32. torch may fuse multiplications
/// and additions, so the last bit can differ.
fn shrunk(image: ArrayView3<'_, f32>, side: usize) -> Array3<f32> {
    let (channels, height, width) = image.dim();
    let (rows, columns) = (taps(height, side), taps(width, side));
    Array3::from_shape_fn((channels, side, side), |(channel, row, column)| {
        let across = |row: usize| -> f32 {
            let taps = columns.get(column).into_iter().flatten();
            taps.map(|&(column, weight)| {
                weight
                    * image
                        .get((channel, row, column))
                        .copied()
                        .unwrap_or_default()
            })
            .sum()
        };
        let taps = rows.get(row).into_iter().flatten();
        taps.map(|&(row, weight)| weight * across(row)).sum()
    })
}

/// For each of `new` positions the four positions of `old` that it is made of, with their weights.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positions are far below 2^24, and clamped to the image"
)]
fn taps(old: usize, new: usize) -> Vec<[(usize, f32); 4]> {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = old as f32 / new as f32;
    (0..new)
        .map(|position| {
            let centre = scale * (position as f32 + 0.5) - 0.5;
            let (first, t) = (centre.floor(), centre - centre.floor());
            let at = |offset: f32| (first + offset).clamp(0.0, old as f32 - 1.0) as usize;
            [
                (at(-1.0), far(t + 1.0)),
                (at(0.0), near(t)),
                (at(1.0), near(1.0 - t)),
                (at(2.0), far(2.0 - t)),
            ]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_checkpoints_processor() {
        // The arithmetic of `HD_transform` in image_processing_phi3_v.py.
        for (crops, size, expected) in [
            (4, (43, 61), (473, 672)),
            (4, (30, 120), (336, 1344)),
            (4, (50, 50), (672, 672)),
            (4, (333, 1000), (335, 1008)),
            (4, (1, 4000), (0, 1344)),
            (16, (43, 61), (947, 1344)),
            (16, (7, 1000), (37, 5376)),
            (1, (50, 50), (336, 336)),
        ] {
            assert_eq!(scaled(size.0, size.1, crops), expected, "{size:?}");
        }
    }

    #[test]
    fn an_image_that_is_one_tile_already_is_not_resampled() {
        let image = Array3::from_shape_fn((3, 4, 4), |(channel, row, column)| {
            f32::from(u8::try_from(channel * 16 + row * 4 + column).unwrap_or_default()) / 7.0
        });
        assert_eq!(shrunk(image.view(), 4), image);
    }

    #[test]
    fn placeholders_of_any_number_are_found() {
        let found: Vec<_> = TAG
            .find_iter("a<|image_1|>b <|image_12|>|<|image|>")
            .collect();
        assert_eq!(found.len(), 2);
    }
}

//! Mllama (Llama-3.2-Vision). Source: transformers 4.57,
//! `models/mllama/{processing,image_processing}_mllama.py`.
//!
//! An image is scaled to fit a grid of square tiles, padded with black at the right and the bottom, and
//! cut row by row. It takes the place of no tokens: the decoder's cross-attention layers read the vision
//! encoder's states, and `cross_attention_mask` says which token sees which tile.
//!
//! optimum and onnxruntime-genai export no Mllama (huggingface/optimum#2079), so there is no layout to
//! follow; the names are transformers' own (`MllamaForConditionalGeneration.forward`): the vision encoder's
//! output `cross_attention_states` is the decoder's input of that name, beside `cross_attention_mask`.

#![warn(clippy::indexing_slicing)]

use ndarray::{Array1, Array2, Array3, Array4, Array6, Axis, s};

use super::config::Json;
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{HALF, ImageSettings};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::{DecoderInput, NamedTensor};
use super::{Error, Family, Form, ImageInputs, ModelDir, Prepared, tiles};
use crate::dataset::{ImageSource, Sample};
use crate::graph::VISION_MASK;

/// More tiles are surely not meant: published models have 4.
const MAX_TILES: usize = 64;
/// Larger tiles are surely not meant.
const MAX_TILE: usize = 2048;

/// Reads a Mllama folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let image = Placeholder::read(
        model.config(),
        &["image_token_index", "image_token_id"],
        text.tokenizer(),
    )?;
    Ok(Box::new(Mllama {
        template: ChatTemplate::open(model)?,
        text,
        image,
        tiling: Tiling::read(model, &model.image_processor()?)?,
    }))
}

struct Mllama {
    template: ChatTemplate,
    text: TextProcessor,
    image: Placeholder,
    tiling: Tiling,
}

impl Family for Mllama {
    fn name(&self) -> &str {
        "mllama"
    }

    /// None: features reach the decoder through cross-attention.
    fn image_token_id(&self) -> Option<i64> {
        None
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        // Without an image transformers leaves the cross-attention layers out, which a graph cannot: their
        // MLPs would run and count where the model has none.
        let source = sample.image.as_ref().ok_or(Error::ImageRequired)?;
        let (image, tiles) = self.tiling.cut(source)?;
        let rendered = self.template.conversation(&Turns::parts(sample), form)?;
        let placeholder = [self.image.token.clone()];
        let rendered = rendered.map(|text| {
            self.image
                .expand(self.template.path().display(), text, &placeholder)
        })?;
        let tokens = self.text.tokenize(sample, &rendered)?;

        // Every token from the image's on sees its tiles.
        let seen = tokens.ids.iter().scan(false, |seen, id| {
            *seen |= *id == self.image.id;
            Some(*seen)
        });
        let mut mask = Array4::zeros((1, tokens.ids.len(), 1, self.tiling.max_tiles));
        for (mut row, seen) in mask.axis_iter_mut(Axis(1)).zip(seen) {
            let mut own = row.slice_mut(s![.., .., ..tiles]);
            own.fill(i64::from(seen));
        }
        let positions = tokens.sequential();
        let mut prepared = tokens.prepared(sample, positions, Some(image));
        prepared.decoder_inputs.push(DecoderInput {
            tensor: NamedTensor::integers("cross_attention_mask", mask),
            token_axis: Some(1),
            required: false,
        });
        Ok(prepared)
    }
}

/// How images are cut into tiles.
struct Tiling {
    settings: ImageSettings,
    tile: usize,
    max_tiles: usize,
    /// Positions of the vision encoder for each tile: its patches and the class token, then those that fill
    /// it up to a multiple of 8.
    positions: (usize, usize),
}

impl Tiling {
    fn read(model: &ModelDir, config: &Json) -> Result<Self, Error> {
        config.must_be_on("do_pad")?;
        let tile = config.size_or("size.height", 224, MAX_TILE)?;
        let width = config.size_or("size.width", 224, MAX_TILE)?;
        if tile != width {
            return Err(config.field(
                "size.width",
                &format!("{tile} (size.height)"),
                &width.to_string(),
            ));
        }
        let patch = model
            .config()
            .size_or("vision_config.patch_size", 14, tile)?;
        let positions = (tile / patch).pow(2) + 1;
        let limit = (tiles::MAX_PIXELS / (tile * tile)).clamp(1, MAX_TILES);
        Ok(Self {
            positions: (positions, positions.next_multiple_of(8) - positions),
            settings: ImageSettings::read_slow(model, config, Filter::Bilinear, HALF)?,
            tile,
            max_tiles: config.size_or("max_image_tiles", 4, limit)?,
        })
    }

    /// `pixel_values` `[1, 1, max_tiles, 3, S, S]`, `aspect_ratio_ids` `[1, 1]` and `aspect_ratio_mask`
    /// `[1, 1, max_tiles]`, and for statistics of the vision encoder its `vision_mask`. Also the number of
    /// tiles that are not padding.
    fn cut(&self, source: &ImageSource) -> Result<(ImageInputs, usize), Error> {
        let loaded = self.settings.load(source)?;
        let (height, width, _) = loaded.pixels.dim();
        let (id, (rows, columns)) = canvas(height, width, self.max_tiles, self.tile);
        let canvas = (rows * self.tile, columns * self.tile);
        let (height, width) = fitted(height, width, canvas, self.tile);
        let scaled = self.settings.resize(loaded.pixels.view(), height, width)?;
        let mut padded = Array3::zeros((canvas.0, canvas.1, 3));
        padded.slice_mut(s![..height, ..width, ..]).assign(&scaled);

        let tile = self.tile;
        let tiles = tiles::cut(padded.view(), tile, tile);
        let mut pixel_values = Array6::zeros((1, 1, self.max_tiles, 3, tile, tile));
        let mut places = pixel_values.slice_mut(s![0, 0, .., .., .., ..]);
        for (mut place, tile) in places.outer_iter_mut().zip(&tiles) {
            place.assign(&self.settings.normalize(*tile));
        }
        let (real, padding) = self.positions;
        let positions = (0..self.max_tiles).flat_map(|index| {
            let weight = if index < tiles.len() { 1.0 } else { 0.0 };
            let real = std::iter::repeat_n(weight, real);
            real.chain(std::iter::repeat_n(0.0, padding))
        });
        let positions: Array1<f32> = positions.collect();
        let mask = (0..self.max_tiles).map(|index| i64::from(index < tiles.len()));
        let mask = Array3::from_shape_vec((1, 1, self.max_tiles), mask.collect());
        let geometry = ("mllama", tile, self.max_tiles);
        let image = ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![
                NamedTensor::floats("pixel_values", pixel_values),
                NamedTensor::integers("aspect_ratio_ids", Array2::from_elem((1, 1), id)),
                NamedTensor::integers("aspect_ratio_mask", mask.unwrap_or_default()),
                NamedTensor::floats(VISION_MASK, positions),
            ],
        };
        Ok((image, tiles.len()))
    }
}

/// The grid of tiles, `(rows, columns)`, and its place in the list of all grids, counted from 1 (the
/// processor's `get_optimal_tiled_canvas`): the one that enlarges the image least, or else shrinks it
/// least; of several the one with the fewest tiles, and of those the first.
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
fn canvas(height: usize, width: usize, max_tiles: usize, tile: usize) -> (i64, (usize, usize)) {
    let grids =
        (1..=max_tiles).flat_map(|rows| (1..=max_tiles / rows).map(move |columns| (rows, columns)));
    let mut best: Option<(f64, usize, i64, (usize, usize))> = None;
    for (id, (rows, columns)) in (1..).zip(grids) {
        let scale_height = (rows * tile) as f64 / height as f64;
        let scale_width = (columns * tile) as f64 / width as f64;
        let scale = scale_height.min(scale_width);
        let tiles = rows * columns;
        let better = best.is_none_or(|(best, fewest, ..)| match (scale >= 1.0, best >= 1.0) {
            (true, false) => true,
            (false, true) => false,
            (true, true) => scale < best || (scale == best && tiles < fewest),
            (false, false) => scale > best || (scale == best && tiles < fewest),
        });
        if better {
            best = Some((scale, tiles, id, (rows, columns)));
        }
    }
    best.map_or((1, (1, 1)), |(_, _, id, grid)| (id, grid))
}

/// The size that an image is scaled to (the processor's `get_image_size_fit_to_canvas`): each side
/// between one tile and the canvas, the aspect ratio kept.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "non-negative numbers of pixels, rounded down on purpose"
)]
fn fitted(height: usize, width: usize, canvas: (usize, usize), tile: usize) -> (usize, usize) {
    let target = (height.clamp(tile, canvas.0), width.clamp(tile, canvas.1));
    let scale_height = target.0 as f64 / height as f64;
    let scale_width = target.1 as f64 / width as f64;
    let scaled = |side: usize, scale: f64| ((side as f64 * scale).floor() as usize).max(1);
    if scale_width < scale_height {
        (scaled(height, scale_width).min(target.0), target.1)
    } else {
        (target.0, scaled(width, scale_height).min(target.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_and_sizes_are_those_of_transformers() {
        // transformers 4.57.1's `get_optimal_tiled_canvas`, `convert_aspect_ratios_to_ids` and
        // `get_image_size_fit_to_canvas`, 4 tiles of 560.
        for (size, grid, id, expected) in [
            ((43, 61), (1, 1), 1, (394, 560)),
            ((90, 37), (1, 1), 1, (560, 230)),
            ((1000, 7), (2, 1), 5, (1000, 7)),
            ((1, 4000), (1, 4), 4, (1, 2240)),
            ((2048, 2047), (2, 2), 6, (1120, 1119)),
            ((333, 1000), (1, 2), 2, (333, 1000)),
            ((561, 560), (2, 1), 5, (561, 560)),
            ((2000, 1500), (2, 2), 6, (1120, 840)),
            ((1, 1), (1, 1), 1, (560, 560)),
        ] {
            assert_eq!(canvas(size.0, size.1, 4, 560), (id, grid), "{size:?}");
            let canvas = (grid.0 * 560, grid.1 * 560);
            assert_eq!(fitted(size.0, size.1, canvas, 560), expected, "{size:?}");
        }
    }
}

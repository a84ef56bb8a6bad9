//! InternVL (the `-hf` checkpoints). Source: transformers 4.57, `models/internvl/processing_internvl.py`
//! and `models/got_ocr2/image_processing_got_ocr2{,_fast}.py`.
//!
//! An image is stretched to the grid of tiles whose shape is nearest to its own and cut row by row; the
//! whole image, stretched to one tile, comes last unless the grid is a single tile.

#![warn(clippy::indexing_slicing)]

use std::ops::RangeInclusive;

use ndarray::Array4;

use super::config::Json;
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{CLIP, ImageSettings};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::NamedTensor;
use super::{Error, Family, Form, ImageInputs, ModelDir, Prepared, tiles};
use crate::dataset::{ImageSource, Sample};

/// More tokens per tile are surely not meant.
const MAX_SEQUENCE: usize = 1 << 12;
/// Larger tiles are surely not meant.
const MAX_TILE: usize = 4096;
/// More tiles are surely not meant: published models have 12.
const MAX_TILES: usize = 256;

/// Reads an InternVL folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let image = Placeholder::read(model.config(), &["image_token_id"], text.tokenizer())?;
    let processor = model.optional_json("processor_config.json")?;
    let in_config = model
        .config()
        .size_or("image_seq_length", 256, MAX_SEQUENCE)?;
    Ok(Box::new(InternVl {
        template: ChatTemplate::open(model)?,
        text,
        image,
        start: model.named_token("start_image_token", "<img>")?,
        end: model.named_token("end_image_token", "</img>")?,
        tokens_per_tile: match processor {
            Some(processor) => processor.size_or("image_seq_length", in_config, MAX_SEQUENCE)?,
            None => in_config,
        },
        tiling: Tiling::read(model, &model.image_processor()?)?,
    }))
}

struct InternVl {
    template: ChatTemplate,
    text: TextProcessor,
    image: Placeholder,
    start: String,
    end: String,
    tokens_per_tile: usize,
    tiling: Tiling,
}

impl Family for InternVl {
    fn name(&self) -> &str {
        "internvl"
    }

    fn image_token_id(&self) -> Option<i64> {
        Some(self.image.id)
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let cut = sample.image.as_ref().map(|image| self.tiling.cut(image));
        let (image, blocks) = match cut.transpose()? {
            Some((image, tiles)) => {
                let features = self.image.repeated(tiles * self.tokens_per_tile);
                (
                    Some(image),
                    vec![format!("{}{features}{}", self.start, self.end)],
                )
            }
            None => (None, Vec::new()),
        };
        let rendered = self.template.conversation(&Turns::parts(sample), form)?;
        let rendered = rendered.map(|text| {
            self.image
                .expand(self.template.path().display(), text, &blocks)
        })?;
        let tokens = self.text.tokenize(sample, &rendered)?;
        let positions = tokens.sequential();
        Ok(tokens.prepared(sample, positions, image))
    }
}

/// How images are cut into tiles. The processor always asks for it, whatever `crop_to_patches` says.
struct Tiling {
    settings: ImageSettings,
    height: usize,
    width: usize,
    min_tiles: usize,
    max_tiles: usize,
}

impl Tiling {
    fn read(model: &ModelDir, config: &Json) -> Result<Self, Error> {
        let height = config.size_or("size.height", 384, MAX_TILE)?;
        let width = config.size_or("size.width", 384, MAX_TILE)?;
        let limit = (tiles::MAX_PIXELS / (height * width)).clamp(1, MAX_TILES);
        Ok(Self {
            settings: ImageSettings::read(model, config, Filter::Bicubic, CLIP)?,
            height,
            width,
            min_tiles: config.size_or("min_patches", 1, limit)?,
            max_tiles: config.size_or("max_patches", 12, limit)?,
        })
    }

    /// `pixel_values` `[N, 3, H, W]`, and `N`.
    fn cut(&self, source: &ImageSource) -> Result<(ImageInputs, usize), Error> {
        let loaded = self.settings.load(source)?;
        let pixels = loaded.pixels.view();
        let (image_height, image_width, _) = pixels.dim();
        let (height, width) = (self.height, self.width);
        let tiles = self.min_tiles..=self.max_tiles;
        let (columns, rows) = grid((image_height, image_width), (height, width), tiles);
        let stretched = self
            .settings
            .resize(pixels, height * rows, width * columns)?;
        let whole = self.settings.resize(pixels, height, width)?;
        let mut tiles = tiles::cut(stretched.view(), height, width);
        if tiles.len() != 1 {
            tiles.push(whole.view());
        }
        let mut pixel_values = Array4::zeros((tiles.len(), 3, height, width));
        for (mut place, tile) in pixel_values.outer_iter_mut().zip(&tiles) {
            place.assign(&self.settings.normalize(*tile));
        }
        let geometry = ("internvl", height, width, self.min_tiles, self.max_tiles);
        let image = ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![NamedTensor::floats("pixel_values", pixel_values)],
        };
        Ok((image, tiles.len()))
    }
}

/// Columns and rows (the processor's `get_optimal_tiled_canvas`): of the grids with an allowed number of
/// `tiles`, few tiles first, the one whose aspect ratio is nearest to the image's `(height, width)`; a later
/// one that is as near is taken while the image has more than half of its pixels.
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
fn grid(
    (height, width): (usize, usize),
    tile: (usize, usize),
    tiles: RangeInclusive<usize>,
) -> (usize, usize) {
    let sides = 1..=*tiles.end();
    let mut grids: Vec<(usize, usize)> = sides
        .clone()
        .flat_map(|columns| sides.clone().map(move |rows| (columns, rows)))
        .filter(|(columns, rows)| tiles.contains(&(columns * rows)))
        .collect();
    grids.sort_by_key(|(columns, rows)| columns * rows);
    let (aspect, area) = (width as f64 / height as f64, (width * height) as f64);
    let (mut nearest, mut best) = (f64::INFINITY, (1, 1));
    for (columns, rows) in grids {
        let distance = (aspect - columns as f64 / rows as f64).abs();
        let half = 0.5 * (tile.0 * tile.1 * columns * rows) as f64;
        if distance < nearest || (distance == nearest && area > half) {
            (nearest, best) = (distance, (columns, rows));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_are_those_of_transformers() {
        // transformers 4.57.1's `get_optimal_tiled_canvas` (columns first), tiles of 448.
        for (size, min_tiles, max_tiles, expected) in [
            ((43, 61), 1, 12, (3, 2)),
            ((90, 37), 1, 12, (2, 5)),
            ((50, 50), 1, 12, (1, 1)),
            ((1344, 1344), 1, 12, (3, 3)),
            ((448, 896), 1, 12, (2, 1)),
            ((600, 400), 1, 12, (2, 3)),
            ((1, 4000), 1, 12, (12, 1)),
            ((900, 448), 1, 12, (1, 2)),
            ((900, 448), 3, 5, (1, 3)),
        ] {
            let found = grid(size, (448, 448), min_tiles..=max_tiles);
            assert_eq!(found, expected, "{size:?}");
        }
    }
}

//! LLaVA-OneVision: the whole image stretched to one tile, then the image in the grid of tiles that
//! suits it best; the vision encoder packs their features with a newline per row. Source: transformers 4.57,
//! `models/llava_onevision/{processing,image_processing…,modeling}_llava_onevision.py`,
//! `image_processing_utils.py`.

#![warn(clippy::indexing_slicing)]

use ndarray::{Array2, Array3, Array5, Axis, s};

use super::config::{Json, Size, shown};
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{CLIP, ImageSettings};
use super::llava::drops_first_feature;
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::NamedTensor;
use super::tiles::{self, MAX_SIDE};
use super::{Error, Family, Form, ImageInputs, ModelDir, Prepared};
use crate::dataset::{ImageSource, Sample};

/// More features per tile are surely not meant.
const MAX_PER_TILE: usize = 1 << 14;
/// More tiles' worth of features neither: published models keep 9.
const MAX_TILES: usize = 256;

/// Reads a LLaVA-OneVision folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let fields = ["image_token_id", "image_token_index"];
    let image = Placeholder::read(model.config(), &fields, text.tokenizer())?;
    Ok(Box::new(LlavaOnevision {
        template: ChatTemplate::open(model)?,
        packing: Packing::read(model)?,
        anyres: AnyRes::read(model, &model.image_processor()?)?,
        text,
        image,
    }))
}

struct LlavaOnevision {
    template: ChatTemplate,
    text: TextProcessor,
    image: Placeholder,
    packing: Packing,
    anyres: AnyRes,
}

impl Family for LlavaOnevision {
    fn name(&self) -> &str {
        "llava_onevision"
    }

    fn image_token_id(&self) -> Option<i64> {
        Some(self.image.id)
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let cut = sample.image.as_ref().map(|image| self.anyres.cut(image));
        let (image, tokens) = match cut.transpose()? {
            Some(cut) => {
                let count = self.packing.tokens(cut.size, cut.grid);
                (Some(cut.image), vec![self.image.repeated(count)])
            }
            None => (None, Vec::new()),
        };
        let rendered = self.template.conversation(&Turns::parts(sample), form)?;
        let rendered = rendered.map(|text| {
            self.image
                .expand(self.template.path().display(), text, &tokens)
        })?;
        let tokens = self.text.tokenize(sample, &rendered)?;
        let positions = tokens.sequential();
        Ok(tokens.prepared(sample, positions, image))
    }
}

/// How many features an image comes to.
struct Packing {
    /// Features of a tile.
    per_tile: usize,
    /// The most tiles' worth of features that a grid keeps; more are scaled down.
    most_tiles: usize,
    /// Whether the first feature is dropped.
    drop_first: bool,
}

impl Packing {
    fn read(model: &ModelDir) -> Result<Packing, Error> {
        let config = model.config();
        let side = config.size_or("vision_config.image_size", 384, MAX_SIDE)?
            / config.size_or("vision_config.patch_size", 14, MAX_SIDE)?;
        let aspect_ratio = model.setting("vision_aspect_ratio")?;
        let most_tiles = match aspect_ratio.get("vision_aspect_ratio") {
            None => 9,
            Some(value) => value
                .as_str()
                .and_then(|text| text.strip_prefix("anyres_max_")?.parse().ok())
                .filter(|most| (1..=MAX_TILES).contains(most))
                .ok_or_else(|| {
                    let expected = "`anyres_max_` and a number";
                    aspect_ratio.field("vision_aspect_ratio", expected, &shown(value))
                })?,
        };
        let per_tile = "num_image_tokens";
        Ok(Packing {
            per_tile: model.setting(per_tile)?.size_or(
                per_tile,
                (side * side).min(MAX_PER_TILE),
                MAX_PER_TILE,
            )?,
            most_tiles,
            drop_first: drops_first_feature(model)?.unwrap_or(false),
        })
    }

    /// The features of the whole image, those of the grid's tiles without what was padded
    /// (`_get_unpadded_features`), and a newline per row of them.
    #[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
    fn tokens(&self, size: (usize, usize), grid: (usize, usize)) -> usize {
        let side = self.per_tile.isqrt();
        let (mut rows, mut columns) = (side * grid.0, side * grid.1);
        let (height, width) = (size.0 as f64, size.1 as f64);
        let (down, across) = (rows as f64, columns as f64);
        let whole = |length: f64| floor((length * 1e7).round_ties_even() / 1e7);
        if width / height > across / down {
            rows -= rows.saturating_sub(whole(height * (across / width))) / 2 * 2;
        } else {
            columns -= columns.saturating_sub(whole(width * (down / height))) / 2 * 2;
        }
        let most = (self.most_tiles * side * side) as f64;
        let ratio = ((rows * columns) as f64 / most).sqrt();
        if ratio > 1.1 {
            // Python's `//` of floats, which takes the remainder off first.
            let smaller = |length: usize| {
                let length = length as f64;
                floor(((length - length % ratio) / ratio).round())
            };
            (rows, columns) = (smaller(rows), smaller(columns));
        }
        (self.per_tile + rows * columns + rows).saturating_sub(usize::from(self.drop_first))
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a length in pixels or features, not negative"
)]
fn floor(length: f64) -> usize {
    length as usize
}

/// How images are cut into tiles.
struct AnyRes {
    settings: ImageSettings,
    /// Side of a tile.
    side: usize,
    /// Height and width of the grids that are allowed, in pixels.
    pinpoints: Vec<(usize, usize)>,
}

/// An image in tiles.
struct Cut {
    image: ImageInputs,
    /// The image's height and width.
    size: (usize, usize),
    /// Tiles down and across.
    grid: (usize, usize),
}

impl AnyRes {
    fn read(model: &ModelDir, config: &Json) -> Result<AnyRes, Error> {
        let side = match config.size_of("size", true, MAX_SIDE)? {
            Size::ShortestEdge(edge) => edge,
            Size::Sides { height, width } if height == width => height,
            Size::Sides { height, width } => {
                return Err(config.field("size", "a square", &format!("{height}×{width}")));
            }
        };
        let whole_tiles = |length: &u64| {
            let length = usize::try_from(*length).ok()?;
            (length > 0 && length % side == 0).then_some(length)
        };
        let pinpoint = |pair: &serde_json::Value| {
            let lengths = pair
                .as_array()?
                .iter()
                .map(|length| whole_tiles(&length.as_u64()?));
            let [height, width] = lengths.collect::<Option<Vec<_>>>()?.try_into().ok()?;
            let pixels: usize = usize::checked_mul(height, width)?;
            (pixels <= tiles::MAX_PIXELS).then_some((height, width))
        };
        let field = "image_grid_pinpoints";
        let value = config.get(field).unwrap_or(&serde_json::Value::Null);
        let pinpoints = value
            .as_array()
            .and_then(|pairs| pairs.iter().map(pinpoint).collect::<Option<Vec<_>>>())
            .filter(|pairs| !pairs.is_empty())
            .ok_or_else(|| {
                let expected = format!(
                    "pairs of height and width, multiples of {side}, of at most {} pixels",
                    tiles::MAX_PIXELS
                );
                config.field(field, &expected, &shown(value))
            })?;
        Ok(AnyRes {
            settings: ImageSettings::read(model, config, Filter::Bicubic, CLIP)?,
            side,
            pinpoints,
        })
    }

    /// `pixel_values` `[1, N, 3, S, S]` and `image_sizes` `[1, 2]`.
    fn cut(&self, source: &ImageSource) -> Result<Cut, Error> {
        let loaded = self.settings.load(source)?;
        let pixels = loaded.pixels.view();
        let (height, width, _) = pixels.dim();
        let whole = self.settings.resize(pixels, self.side, self.side)?;

        let target = best_resolution((height, width), &self.pinpoints);
        let (inner_height, inner_width) = fitted((height, width), target);
        let resized = self.settings.resize(pixels, inner_height, inner_width)?;
        let (top, left) = ((target.0 - inner_height) / 2, (target.1 - inner_width) / 2);
        let mut padded = Array3::<u8>::zeros((target.0, target.1, 3));
        padded
            .slice_mut(s![top..top + inner_height, left..left + inner_width, ..])
            .assign(&resized);

        let mut tiles = vec![whole.view()];
        tiles.extend(tiles::cut(padded.view(), self.side, self.side));
        let mut values = Array5::zeros((1, tiles.len(), 3, self.side, self.side));
        let mut places = values.index_axis_mut(Axis(0), 0);
        for (mut place, tile) in places.outer_iter_mut().zip(&tiles) {
            place.assign(&self.settings.normalize(*tile));
        }
        let sizes = [height, width].map(|side| i64::try_from(side).unwrap_or(i64::MAX));
        let geometry = ("llava_onevision", self.side, &self.pinpoints);
        let image = ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![
                NamedTensor::floats("pixel_values", values),
                NamedTensor::integers("image_sizes", Array2::from(vec![sizes])),
            ],
        };
        Ok(Cut {
            image,
            size: (height, width),
            grid: (target.0 / self.side, target.1 / self.side),
        })
    }
}

/// Of the allowed sizes, the first that keeps the most pixels, and of these wastes the fewest
/// (`select_best_resolution`).
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
fn best_resolution(size: (usize, usize), allowed: &[(usize, usize)]) -> (usize, usize) {
    let (height, width) = (size.0 as f64, size.1 as f64);
    let mut best = (0, usize::MAX, (0, 0));
    for &(rows, columns) in allowed {
        let scale = f64::min(columns as f64 / width, rows as f64 / height);
        let kept = floor(width * scale) * floor(height * scale);
        let kept = kept.min(size.0 * size.1);
        let wasted = (rows * columns).saturating_sub(kept);
        if best.2 == (0, 0) || kept > best.0 || (kept == best.0 && wasted < best.1) {
            best = (kept, wasted, (rows, columns));
        }
    }
    best.2
}

/// The largest size of the image's shape within `target` (`get_patch_output_size`).
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
fn fitted(size: (usize, usize), target: (usize, usize)) -> (usize, usize) {
    let (height, width) = (size.0 as f64, size.1 as f64);
    let (down, across) = (target.0 as f64 / height, target.1 as f64 / width);
    if across < down {
        (floor((height * across).ceil()).min(target.0), target.1)
    } else {
        (target.0, floor((width * down).ceil()).min(target.1))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    type Sides = (usize, usize);

    /// Image size, grid in pixels, tokens: transformers 4.57.1's `select_best_resolution` and
    /// `_get_number_of_features`.
    const GOLDENS: [(Sides, Sides, usize); 10] = [
        ((1, 1), (384, 384), 1485),
        ((384, 384), (384, 384), 1485),
        ((480, 640), (768, 768), 2929),
        ((640, 480), (768, 768), 2943),
        ((100, 2000), (384, 2304), 2196),
        ((2000, 37), (2304, 384), 1377),
        ((1, 4000), (384, 384), 757),
        ((3000, 4000), (1920, 2304), 7309),
        ((2304, 2304), (2304, 2304), 7371),
        ((1000, 999), (1152, 1152), 7371),
    ];

    /// llava-onevision-qwen2-0.5b-ov's.
    fn pinpoints() -> Vec<(usize, usize)> {
        let sides = 1..=6;
        let rows = sides
            .clone()
            .flat_map(|rows| sides.clone().map(move |columns| (rows, columns)));
        rows.map(|(rows, columns)| (384 * rows, 384 * columns))
            .collect()
    }

    #[test]
    fn grids_and_token_counts_are_those_of_transformers() {
        let packing = Packing {
            per_tile: 729,
            most_tiles: 9,
            drop_first: false,
        };
        for (size, target, tokens) in GOLDENS {
            assert_eq!(best_resolution(size, &pinpoints()), target, "{size:?}");
            let grid = (target.0 / 384, target.1 / 384);
            assert_eq!(packing.tokens(size, grid), tokens, "{size:?}");
        }
    }
}

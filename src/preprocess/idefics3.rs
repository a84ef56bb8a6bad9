//! Idefics3 and SmolVLM, which prepare still images alike. Source: transformers 4.57,
//! `models/{idefics3,smolvlm}/{processing,image_processing}_….py`.
//!
//! An image is scaled so that its long side is `size.longest_edge`, stretched so that both sides are
//! multiples of the tile's side `M` (`max_image_size.longest_edge`), and cut into tiles row by row. The
//! whole image, stretched to one tile, comes last. In the text each tile is announced by its row and
//! column.

#![warn(clippy::indexing_slicing)]

use ndarray::{Array4, Array5, Axis};

use super::config::Json;
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{HALF, ImageSettings};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::NamedTensor;
use super::{Error, Family, Form, ImageInputs, ModelDir, Prepared, tiles};
use crate::dataset::{ImageSource, Sample};

/// The processor's own limit on the long side after scaling (`MAX_IMAGE_SIZE`).
const MAX_IMAGE_SIZE: usize = 4096;
/// More tokens per tile are surely not meant.
const MAX_SEQUENCE: usize = 1 << 12;
/// More tiles per side are surely not meant: published models have 4.
const MAX_TILES_PER_SIDE: usize = 16;

/// Reads an Idefics3 or SmolVLM folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let image = Placeholder::read(model.config(), &["image_token_id"], text.tokenizer())?;
    Ok(Box::new(Idefics3 {
        name: model.config().string("model_type")?,
        template: ChatTemplate::open(model)?,
        text,
        image,
        fake: model.named_token("fake_image_token", "<fake_token_around_image>")?,
        global: model.named_token("global_image_token", "<global-img>")?,
        tokens_per_tile: tokens_per_tile(model)?,
        tiling: Tiling::read(model, &model.image_processor()?)?,
    }))
}

/// `processor_config.json`'s `image_seq_len`, else what the vision encoder's geometry comes to.
fn tokens_per_tile(model: &ModelDir) -> Result<usize, Error> {
    let config = model.config();
    let side = |field| config.size_or(field, 1, MAX_SEQUENCE);
    let patches = config.size_or("vision_config.image_size", 224, MAX_IMAGE_SIZE)?
        / config.size_or("vision_config.patch_size", 32, MAX_IMAGE_SIZE)?;
    let computed = (patches / side("scale_factor")?).pow(2).max(1);
    match model.optional_json("processor_config.json")? {
        Some(processor) => processor.size_or("image_seq_len", computed, MAX_SEQUENCE),
        None => Ok(computed),
    }
}

struct Idefics3 {
    name: String,
    template: ChatTemplate,
    text: TextProcessor,
    image: Placeholder,
    fake: String,
    global: String,
    tokens_per_tile: usize,
    tiling: Tiling,
}

impl Family for Idefics3 {
    fn name(&self) -> &str {
        &self.name
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
            Some((image, grid)) => (Some(image), vec![self.block(grid)]),
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

impl Idefics3 {
    /// What stands for an image of so many rows and columns of tiles; (0, 0) is an image in one piece.
    fn block(&self, (rows, columns): (usize, usize)) -> String {
        let (fake, global) = (&self.fake, &self.global);
        let features = self.image.repeated(self.tokens_per_tile);
        let mut block = String::new();
        for row in 1..=rows {
            for column in 1..=columns {
                block.push_str(&format!("{fake}<row_{row}_col_{column}>{features}"));
            }
            block.push('\n');
        }
        if rows > 0 {
            block.push('\n');
        }
        block + &format!("{fake}{global}{features}{fake}")
    }
}

/// How images are cut into tiles.
struct Tiling {
    settings: ImageSettings,
    longest_edge: usize,
    tile: usize,
    split: bool,
}

impl Tiling {
    fn read(model: &ModelDir, config: &Json) -> Result<Self, Error> {
        // There is a fast image processor, but the processor's class names the slow one, so AutoProcessor
        // takes that, whatever the settings' class and `use_fast` say.
        let settings = ImageSettings::read_slow(model, config, Filter::Lanczos, HALF)?;
        let longest_edge = config.size_or("size.longest_edge", 4 * 364, MAX_IMAGE_SIZE)?;
        let tile = config.size_or("max_image_size.longest_edge", 364, MAX_IMAGE_SIZE)?;
        if longest_edge.div_ceil(tile) > MAX_TILES_PER_SIDE {
            return Err(config.field(
                "max_image_size.longest_edge",
                &format!("at least {longest_edge} / {MAX_TILES_PER_SIDE}"),
                &tile.to_string(),
            ));
        }
        let split = config.get("do_image_splitting");
        Ok(Self {
            settings,
            longest_edge,
            tile,
            split: split.and_then(serde_json::Value::as_bool).unwrap_or(true),
        })
    }

    /// `pixel_values` `[1, N, 3, M, M]` and `pixel_attention_mask` `[1, N, M, M]`, all true: a single
    /// sample has no padding. Also the rows and columns of tiles, as the text names them.
    fn cut(&self, source: &ImageSource) -> Result<(ImageInputs, (usize, usize)), Error> {
        let loaded = self.settings.load(source)?;
        let (height, width, _) = loaded.pixels.dim();
        let (height, width) = scaled(height, width, self.longest_edge);
        let scaled = self.settings.resize(loaded.pixels.view(), height, width)?;
        let tile = self.tile;
        let (height, width) = match self.split {
            true => stretched(height, width, tile),
            false => (tile, tile),
        };
        let whole = self.settings.resize(scaled.view(), height, width)?;
        let (rows, columns) = match (height / tile, width / tile) {
            (1, 1) => (0, 0),
            grid => grid,
        };

        let global = self.settings.resize(whole.view(), tile, tile)?;
        let mut tiles = tiles::cut(whole.view(), tile, tile);
        if rows > 0 {
            tiles.push(global.view());
        }
        let mut pixel_values = Array5::zeros((1, tiles.len(), 3, tile, tile));
        let mut places = pixel_values.index_axis_mut(Axis(0), 0);
        for (mut place, tile) in places.outer_iter_mut().zip(&tiles) {
            place.assign(&self.settings.normalize(*tile));
        }
        let mask = Array4::from_elem((1, tiles.len(), tile, tile), true);
        let geometry = ("idefics3", self.longest_edge, tile, self.split);
        let image = ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![
                NamedTensor::floats("pixel_values", pixel_values),
                NamedTensor::booleans("pixel_attention_mask", mask),
            ],
        };
        Ok((image, (rows, columns)))
    }
}

/// The processor's first size: the long side is `longest_edge`, the short side is made even.
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
fn scaled(height: usize, width: usize, longest_edge: usize) -> (usize, usize) {
    let (aspect, long) = (width as f64 / height as f64, longest_edge as f64);
    let even = |side: f64| whole(side).next_multiple_of(2).max(1);
    if width >= height {
        (even(long / aspect), longest_edge)
    } else {
        (longest_edge, even(long * aspect))
    }
}

/// The processor's second size: the long side is rounded up to a multiple of `tile`, and the short side,
/// after it has followed, too.
#[expect(clippy::cast_precision_loss, reason = "sides are far below 2^53")]
fn stretched(height: usize, width: usize, tile: usize) -> (usize, usize) {
    let aspect = width as f64 / height as f64;
    if width >= height {
        let width = width.next_multiple_of(tile);
        (whole(width as f64 / aspect).next_multiple_of(tile), width)
    } else {
        let height = height.next_multiple_of(tile);
        (height, whole(height as f64 * aspect).next_multiple_of(tile))
    }
}

/// Python's `int` of a length.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a non-negative number of pixels, rounded down on purpose"
)]
fn whole(side: f64) -> usize {
    side as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_transformers() {
        // transformers 4.57.1's `_resize_output_size_rescale_to_max_len`, then the arithmetic of its
        // `resize_for_vision_encoder`.
        for (longest_edge, tile, size, first, second) in [
            (2048, 512, (43, 61), (1444, 2048), (1536, 2048)),
            (2048, 512, (90, 37), (2048, 842), (2048, 1024)),
            (2048, 512, (1000, 7), (2048, 14), (2048, 512)),
            (2048, 512, (1, 4000), (1, 2048), (512, 2048)),
            (2048, 512, (2048, 2047), (2048, 2048), (2048, 2048)),
            (1456, 364, (43, 61), (1026, 1456), (1092, 1456)),
            (1456, 364, (333, 1000), (484, 1456), (728, 1456)),
            (1456, 364, (7, 1000), (10, 1456), (364, 1456)),
        ] {
            assert_eq!(scaled(size.0, size.1, longest_edge), first, "{size:?}");
            assert_eq!(stretched(first.0, first.1, tile), second, "{size:?}");
        }
    }
}

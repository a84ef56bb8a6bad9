//! Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which prepare still images alike; patch sizes, means and deviations
//! are in their settings. Source: transformers 4.57,
//! `models/qwen2_vl/{processing,image_processing,image_processing…_fast,modeling}_qwen2_vl.py`,
//! `models/qwen2_5_vl/{processing,modeling}_qwen2_5_vl.py`, `models/qwen3_vl/{processing,modeling}_qwen3_vl.py`.

use ndarray::Array2;

use super::config::Json;
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{CLIP, ImageSettings};
use super::patches::{PatchLayout, flatten, smart_resize};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::NamedTensor;
use super::{Error, Family, Form, ImageInputs, ModelDir, PositionIds, Prepared, mrope};
use crate::dataset::{ImageSource, Sample};

/// Larger patches, merges and frame counts are surely not meant.
const MAX_PATCH_SIDE: usize = 256;
/// The most pixels that a configuration may ask an image to be resized to.
const MAX_RESIZED_PIXELS: usize = 1 << 26;

/// Reads a Qwen-VL folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let image = Placeholder::read(model.config(), &["image_token_id"], text.tokenizer())?;
    let patches = Patches::read(model, &model.image_processor()?)?;
    let merge_size = model.config().size_or(
        "vision_config.spatial_merge_size",
        patches.layout.merge_size,
        MAX_PATCH_SIDE,
    )?;
    if merge_size != patches.layout.merge_size {
        let expected = format!(
            "{} (the image processor's merge_size)",
            patches.layout.merge_size
        );
        return Err(model.config().field(
            "vision_config.spatial_merge_size",
            &expected,
            &merge_size.to_string(),
        ));
    }
    Ok(Box::new(Qwen2Vl {
        name: model.config().string("model_type")?,
        template: ChatTemplate::open(model)?,
        text,
        image,
        patches,
    }))
}

struct Qwen2Vl {
    name: String,
    template: ChatTemplate,
    text: TextProcessor,
    image: Placeholder,
    patches: Patches,
}

impl Family for Qwen2Vl {
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
        let image = sample.image.as_ref().map(|image| self.patches.cut(image));
        let (image, grids) = match image.transpose()? {
            Some((image, grid)) => (Some(image), vec![grid]),
            None => (None, Vec::new()),
        };
        let merged = self.patches.merge_size().pow(2);
        let tokens = grids.iter().map(|grid| {
            let count = grid.iter().product::<i64>() / merged;
            self.image.repeated(usize::try_from(count).unwrap_or(0))
        });
        let tokens: Vec<String> = tokens.collect();

        let rendered = self.template.conversation(&Turns::parts(sample), form)?;
        let rendered = rendered.map(|text| {
            self.image
                .expand(self.template.path().display(), text, &tokens)
        })?;
        let tokens = self.text.tokenize(sample, &rendered)?;
        let merge = self.patches.merge_size();
        let position_ids = mrope::position_ids(&tokens.ids, self.image.id, &grids, merge)?;
        Ok(tokens.prepared(sample, PositionIds::Multimodal(position_ids), image))
    }
}

/// How images are cut into patches.
struct Patches {
    settings: ImageSettings,
    layout: PatchLayout,
    min_pixels: usize,
    max_pixels: usize,
}

impl Patches {
    fn read(model: &ModelDir, config: &Json) -> Result<Self, Error> {
        // `min_pixels` and `max_pixels` overrule `size`, which older configurations lack.
        let pixels = |old: &str, new: &str, default: usize| {
            let default = config.size_or(new, default, MAX_RESIZED_PIXELS)?;
            config.size_or(old, default, MAX_RESIZED_PIXELS)
        };
        Ok(Self {
            settings: ImageSettings::read(model, config, Filter::Bicubic, CLIP)?,
            layout: PatchLayout {
                patch_size: config.size_or("patch_size", 14, MAX_PATCH_SIDE)?,
                merge_size: config.size_or("merge_size", 2, MAX_PATCH_SIDE)?,
                temporal_patch_size: config.size_or("temporal_patch_size", 2, MAX_PATCH_SIDE)?,
            },
            min_pixels: pixels("min_pixels", "size.shortest_edge", 56 * 56)?,
            max_pixels: pixels("max_pixels", "size.longest_edge", 28 * 28 * 1280)?,
        })
    }

    fn merge_size(&self) -> i64 {
        i64::try_from(self.layout.merge_size).unwrap_or(1)
    }

    /// `pixel_values` `[t·h·w, C·T·P·P]`, one flattened patch a row in the order that the vision
    /// encoder merges them, and `image_grid_thw` `[1, 3]`, which is also returned by itself.
    fn cut(&self, source: &ImageSource) -> Result<(ImageInputs, [i64; 3]), Error> {
        let loaded = self.settings.load(source)?;
        let (height, width, _) = loaded.pixels.dim();
        let factor = self.layout.patch_size * self.layout.merge_size;
        let (height, width) =
            smart_resize(height, width, factor, self.min_pixels, self.max_pixels)?;
        let resized = self.settings.resize(loaded.pixels.view(), height, width)?;
        let (patches, grid) = flatten(resized.view(), self.layout, self.settings.levels());
        let grid = grid.map(|side| i64::try_from(side).unwrap_or(i64::MAX));
        let geometry = ("qwen2_vl", self.layout, self.min_pixels, self.max_pixels);
        let image = ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![
                NamedTensor::floats("pixel_values", patches),
                NamedTensor::integers("image_grid_thw", Array2::from(vec![grid])),
            ],
        };
        Ok((image, grid))
    }
}

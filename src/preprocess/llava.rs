//! LLaVA-1.5: the shortest edge to S, the middle S × S of it, one token per patch. Source: transformers
//! 4.57, `models/llava/{processing,image_processing…}_llava.py`,
//! `models/clip/image_processing_clip{,_fast}.py`.

use ndarray::{Array3, ArrayView3, Axis, s};

use super::config::{Json, Size, shown};
use super::conversation::{TextProcessor, Turns};
use super::image_settings::{CLIP, ImageSettings};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::template::ChatTemplate;
use super::tensors::NamedTensor;
use super::tiles::{MAX_PIXELS, MAX_SIDE};
use super::{Error, Family, Form, ImageInputs, ModelDir, Prepared};
use crate::dataset::{ImageSource, Sample};

/// More tokens per image are surely not meant.
const MAX_IMAGE_TOKENS: usize = 1 << 16;

/// Reads a LLaVA folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field; also where the vision tower is none that takes one crop of
/// fixed size.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let fields = ["image_token_id", "image_token_index"];
    let image = Placeholder::read(model.config(), &fields, text.tokenizer())?;
    let crop = Crop::read(model, &model.image_processor()?)?;
    Ok(Box::new(Llava {
        template: ChatTemplate::open(model)?,
        tokens: image_tokens(model, &crop)?,
        text,
        image,
        crop,
    }))
}

struct Llava {
    template: ChatTemplate,
    text: TextProcessor,
    image: Placeholder,
    crop: Crop,
    /// Tokens of an image.
    tokens: usize,
}

impl Family for Llava {
    fn name(&self) -> &str {
        "llava"
    }

    fn image_token_id(&self) -> Option<i64> {
        Some(self.image.id)
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let image = sample.image.as_ref().map(|image| self.crop.cut(image));
        let image = image.transpose()?;
        let tokens = image.iter().map(|_| self.image.repeated(self.tokens));
        let tokens: Vec<String> = tokens.collect();
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

/// One token per patch, one for a class token, and one less where the model drops it. The processor's
/// own settings say so; folders older than these leave it to the model's configuration.
fn image_tokens(model: &ModelDir, crop: &Crop) -> Result<usize, Error> {
    let config = model.config();
    let tower = config.string("vision_config.model_type")?;
    if !["clip_vision_model", "siglip_vision_model"].contains(&tower.as_str()) {
        let expected = "clip_vision_model or siglip_vision_model";
        return Err(config.field("vision_config.model_type", expected, &tower));
    }
    let patch_size = match model.setting("patch_size")? {
        processor if processor.get("patch_size").is_some() => {
            processor.size_or("patch_size", 14, MAX_SIDE)?
        }
        config => config.size_or("vision_config.patch_size", 14, MAX_SIDE)?,
    };
    let class_tokens = match model.setting("num_additional_image_tokens")? {
        processor if processor.get("num_additional_image_tokens").is_some() => {
            processor.integer("num_additional_image_tokens")?
        }
        _ => i64::from(tower == "clip_vision_model"),
    };
    let dropped = i64::from(drops_first_feature(model)?.unwrap_or(true));
    let patches = (crop.height / patch_size) * (crop.width / patch_size);
    i64::try_from(patches)
        .ok()
        .and_then(|patches| patches.checked_add(class_tokens)?.checked_sub(dropped))
        .and_then(|tokens| usize::try_from(tokens).ok())
        .filter(|tokens| (1..=MAX_IMAGE_TOKENS).contains(tokens))
        .ok_or_else(|| {
            config.field(
                "vision_config",
                &format!("an image of 1 to {MAX_IMAGE_TOKENS} tokens"),
                &format!("{patches} patches, {class_tokens} more, {dropped} dropped"),
            )
        })
}

/// `vision_feature_select_strategy`: whether the vision tower's first feature (a class token) is left out,
/// where it is set.
pub(super) fn drops_first_feature(model: &ModelDir) -> Result<Option<bool>, Error> {
    let field = "vision_feature_select_strategy";
    let settings = model.setting(field)?;
    match settings.get(field) {
        None => Ok(None),
        Some(value) => match value.as_str() {
            Some("default") => Ok(Some(true)),
            Some("full") => Ok(Some(false)),
            _ => Err(settings.field(field, "`default` or `full`", &shown(value))),
        },
    }
}

/// The crop that the vision tower sees.
#[derive(Debug)]
struct Crop {
    settings: ImageSettings,
    shortest_edge: usize,
    height: usize,
    width: usize,
}

impl Crop {
    fn read(model: &ModelDir, config: &Json) -> Result<Crop, Error> {
        config.must_be_on("do_center_crop")?;
        if let Some(value) = config.get("do_pad").filter(|value| **value != false) {
            return Err(config.field("do_pad", "false", &shown(value)));
        }
        let shortest_edge = match config.size_of("size", false, MAX_SIDE)? {
            Size::ShortestEdge(edge) => edge,
            Size::Sides { .. } => {
                return Err(config.field("size", "a shortest_edge", "height and width"));
            }
        };
        let (height, width) = match config.size_of("crop_size", true, shortest_edge)? {
            Size::Sides { height, width } => (height, width),
            Size::ShortestEdge(edge) => (edge, edge),
        };
        Ok(Crop {
            settings: ImageSettings::read(model, config, Filter::Bicubic, CLIP)?,
            shortest_edge,
            height,
            width,
        })
    }

    /// `pixel_values` `[1, 3, H, W]`.
    fn cut(&self, source: &ImageSource) -> Result<ImageInputs, Error> {
        let loaded = self.settings.load(source)?;
        let (height, width, _) = loaded.pixels.dim();
        // The longer side is truncated, as Python's `int` does it.
        let (short, long) = (height.min(width), height.max(width));
        let longest_edge = self.shortest_edge * long / short.max(1);
        let (height, width) = match height <= width {
            true => (self.shortest_edge, longest_edge),
            false => (longest_edge, self.shortest_edge),
        };
        if height * width > MAX_PIXELS {
            return Err(Error::ResizeSize {
                width: loaded.pixels.dim().1,
                height: loaded.pixels.dim().0,
                new_width: width,
                new_height: height,
            });
        }
        let resized = self.settings.resize(loaded.pixels.view(), height, width)?;
        let values = self.settings.normalize(self.middle(&resized));
        let geometry = ("llava", self.shortest_edge, self.height, self.width);
        Ok(ImageInputs {
            key: self.settings.key(&geometry, &loaded.file),
            tensors: vec![NamedTensor::floats(
                "pixel_values",
                values.insert_axis(Axis(0)),
            )],
        })
    }

    /// The crop from the middle; an odd pixel is left over at the end.
    fn middle<'a>(&self, image: &'a Array3<u8>) -> ArrayView3<'a, u8> {
        let start = |length: usize, crop: usize| length.saturating_sub(crop) / 2;
        let (height, width, _) = image.dim();
        let (top, left) = (start(height, self.height), start(width, self.width));
        image.slice(s![
            top..(top + self.height).min(height),
            left..(left + self.width).min(width),
            ..
        ])
    }
}

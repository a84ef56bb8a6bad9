//! Gemma 3: an image stretched to one size, its tokens between blank lines and markers, and told apart
//! from text by `token_type_ids`, because they see each other both ways. Source: transformers 4.57,
//! `models/gemma3/{processing,image_processing…,modeling}_gemma3.py`.

use ndarray::{Array1, Axis};

use super::config::shown;
use super::conversation::{TextProcessor, Turns};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::stretch::Stretch;
use super::template::ChatTemplate;
use super::tensors::{DecoderInput, NamedTensor};
use super::{Error, Family, Form, ModelDir, Prepared};
use crate::dataset::Sample;

/// More tokens per image are surely not meant.
const MAX_IMAGE_TOKENS: usize = 1 << 16;

/// Reads a Gemma 3 folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field; also where images are to be cut into crops
/// (`do_pan_and_scan`).
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let token =
        |field: &str, old: &str| Placeholder::read(model.config(), &[field, old], text.tokenizer());
    let begin = token("boi_token_index", "boi_token_id")?;
    let end = token("eoi_token_index", "eoi_token_id")?;
    let image = token("image_token_id", "image_token_index")?;

    let settings = model.image_processor()?;
    match settings.get("do_pan_and_scan") {
        None | Some(serde_json::Value::Null | serde_json::Value::Bool(false)) => {}
        Some(value) => return Err(settings.field("do_pan_and_scan", "false", &shown(value))),
    }
    let config = model.config();
    let by_model = config.size_or("mm_tokens_per_image", 256, MAX_IMAGE_TOKENS)?;
    let in_text = model.setting("image_seq_length")?;
    let count = in_text.size_or("image_seq_length", by_model, MAX_IMAGE_TOKENS)?;
    let tokens = format!(
        "\n\n{}{}{}\n\n",
        begin.token,
        image.repeated(count),
        end.token
    );
    Ok(Box::new(Gemma3 {
        template: ChatTemplate::open(model)?,
        stretch: Stretch::read(model, &settings, Filter::Bilinear)?,
        text,
        begin,
        image,
        tokens,
    }))
}

struct Gemma3 {
    template: ChatTemplate,
    text: TextProcessor,
    /// What the template writes.
    begin: Placeholder,
    /// What features replace.
    image: Placeholder,
    /// All that stands for an image.
    tokens: String,
    stretch: Stretch,
}

impl Family for Gemma3 {
    fn name(&self) -> &str {
        "gemma3"
    }

    fn image_token_id(&self) -> Option<i64> {
        Some(self.image.id)
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let image = sample
            .image
            .as_ref()
            .map(|image| self.stretch.inputs(image));
        let image = image.transpose()?;
        let replacements: Vec<String> = image.iter().map(|_| self.tokens.clone()).collect();
        let rendered = self.template.conversation(&Turns::parts(sample), form)?;
        let rendered = rendered.map(|text| {
            self.image
                .expand(self.template.path().display(), text, &[])?;
            self.begin
                .expand(self.template.path().display(), text, &replacements)
        })?;
        let tokens = self.text.tokenize(sample, &rendered)?;
        let types = tokens.ids.iter().map(|&id| i64::from(id == self.image.id));
        let types = types.collect::<Array1<i64>>().insert_axis(Axis(0));
        let positions = tokens.sequential();
        let mut prepared = tokens.prepared(sample, positions, image);
        prepared.decoder_inputs = vec![DecoderInput {
            tensor: NamedTensor::integers("token_type_ids", types),
            token_axis: Some(1),
            required: false,
        }];
        Ok(prepared)
    }
}

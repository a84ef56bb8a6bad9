//! Language models that see nothing: the chat template and the tokenizer are all there is. Serves every
//! `model_type` that has no family of its own and no `vision_config`.

use serde_json::Value;

use super::conversation::{TextProcessor, Turns};
use super::template::ChatTemplate;
use super::{Error, Family, Form, ModelDir, Prepared};
use crate::dataset::Sample;

/// Reads a text model's folder.
///
/// # Errors
/// [`Error`], naming the file.
pub(super) fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    Ok(Box::new(Text {
        name: model.config().string("model_type")?,
        template: ChatTemplate::open(model)?,
        text: TextProcessor::open(model)?,
    }))
}

/// Whether a model's configuration tells of no images.
pub(super) fn serves(model: &ModelDir) -> bool {
    let vision = model.config().get("vision_config");
    vision.is_none_or(Value::is_null)
}

struct Text {
    name: String,
    template: ChatTemplate,
    text: TextProcessor,
}

impl Family for Text {
    fn name(&self) -> &str {
        &self.name
    }

    fn image_token_id(&self) -> Option<i64> {
        None
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        if sample.image.is_some() {
            return Err(Error::NoImages {
                model_type: self.name.clone(),
            });
        }
        let turns = Turns::text(&sample.question, &sample.answer);
        let rendered = self.template.conversation(&turns, form)?;
        let tokens = self.text.tokenize(sample, &rendered)?;
        let positions = tokens.sequential();
        Ok(tokens.prepared(sample, positions, None))
    }
}

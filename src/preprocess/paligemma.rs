//! PaliGemma: no chat template. The prompt is the image's tokens, `<bos>`, the question and a newline; every
//! token sees all of it. The answer and `<eos>` are causal, and tokenized apart. Source: transformers 4.57,
//! `models/paligemma/{processing,modeling}_paligemma.py`, `models/siglip/image_processing_siglip{,_fast}.py`.

use ndarray::{Array1, Axis};

use super::answer::answer_tokens;
use super::conversation::{TextProcessor, Tokens};
use super::placeholder::Placeholder;
use super::resize::Filter;
use super::stretch::Stretch;
use super::tensors::{DecoderInput, NamedTensor};
use super::{Error, Family, Form, ModelDir, PositionIds, Prepared};
use crate::dataset::Sample;

/// Larger patches, and more tokens per image, are surely not meant.
const MAX: usize = 1 << 16;

/// Reads a PaliGemma folder's configuration.
///
/// # Errors
/// [`Error`], naming the file and the field.
pub fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let text = TextProcessor::open(model)?;
    let fields = ["image_token_id", "image_token_index"];
    let image = Placeholder::read(model.config(), &fields, text.tokenizer())?;
    let settings = model.image_processor()?;
    let stretch = Stretch::read(model, &settings, Filter::Bicubic)?;
    let patch_size = model
        .config()
        .size_or("vision_config.patch_size", 14, MAX)?;
    let patches = (stretch.height / patch_size) * (stretch.width / patch_size);
    let tokens = settings.size_or("image_seq_length", patches.min(MAX), MAX)?;

    let special = model.json("tokenizer_config.json")?;
    let token = |field: &str| {
        let token = special.token(field).filter(|token| !token.is_empty());
        token.ok_or_else(|| special.field(field, "a token", "none"))
    };
    Ok(Box::new(PaliGemma {
        before: format!("{}{}", image.repeated(tokens), token("bos_token")?),
        eos: token("eos_token")?,
        text,
        image,
        stretch,
    }))
}

struct PaliGemma {
    text: TextProcessor,
    image: Placeholder,
    /// What stands before the question.
    before: String,
    /// What stands after the answer.
    eos: String,
    stretch: Stretch,
}

impl Family for PaliGemma {
    fn name(&self) -> &str {
        "paligemma"
    }

    fn image_token_id(&self) -> Option<i64> {
        Some(self.image.id)
    }

    fn text(&self) -> &TextProcessor {
        &self.text
    }

    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        let Some(image) = &sample.image else {
            return Err(Error::ImageRequired);
        };
        let image = self.stretch.inputs(image)?;
        let question = self.image.expand("the question", &sample.question, &[])?;
        let prompt = format!("{}{question}\n", self.before);
        let tokenizer = self.text.tokenizer();
        let mut encoded = tokenizer.encode(&prompt, false)?;
        let prefix = encoded.ids.len();
        let tokens = match form {
            Form::Question => Tokens {
                answer_mask: vec![false; prefix],
                ids: encoded.ids,
                answer_offsets: Vec::new(),
            },
            Form::WithAnswer => {
                let answer = self.image.expand("the answer", &sample.answer, &[])?;
                let suffix = tokenizer.encode(&format!("{answer}{}", self.eos), false)?;
                let start = prompt.len();
                let offsets = suffix.offsets.iter();
                encoded.ids.extend(suffix.ids);
                encoded
                    .offsets
                    .extend(offsets.map(|token| token.start + start..token.end + start));
                let span = start..start + answer.len();
                let found = answer_tokens(tokenizer.path(), &encoded, &span)?;
                Tokens {
                    ids: encoded.ids,
                    answer_mask: found.predicts,
                    answer_offsets: found.offsets,
                }
            }
        };
        let types = (0..tokens.ids.len()).map(|token| i64::from(token >= prefix));
        let types = types.collect::<Array1<i64>>().insert_axis(Axis(0));
        // Positions count from 1.
        let positions = PositionIds::Sequential((1..).take(tokens.ids.len()).collect());
        let mut prepared = tokens.prepared(sample, positions, Some(image));
        prepared.decoder_inputs = vec![DecoderInput {
            tensor: NamedTensor::integers("token_type_ids", types),
            token_axis: Some(1),
            // Without it a decoder takes the answer for a part of the prompt, and its tokens see those
            // that come after them.
            required: form == Form::WithAnswer,
        }];
        Ok(prepared)
    }
}

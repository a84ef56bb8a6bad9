//! A sample's two turns → token ids, and which of them are the answer. The part that all families
//! share: they differ in what stands for the image, which is put in between, in the text.
//!
//! ```text
//! Turns ─ render ─► Rendered ─ map: the image's tokens ─► Rendered ─ tokenize ─► Tokens
//! ```

#![warn(clippy::indexing_slicing)]

use std::ops::Range;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::answer::{answer_span, answer_tokens};
use super::template::ChatTemplate;
use super::tokenizer::Encoded;
use super::{Error, Form, ImageInputs, ModelDir, PositionIds, Prepared, Tokenizer};
use crate::dataset::Sample;

/// A model folder's tokenizer, and which ids begin and end what.
#[derive(Debug)]
pub struct TextProcessor {
    tokenizer: Tokenizer,
    bos_token: Option<String>,
    eos_token_ids: Vec<i64>,
}

/// The user's and the assistant's message, as chat templates take them.
#[derive(Debug, Clone, PartialEq)]
pub struct Turns {
    user: Value,
    assistant: Value,
}

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The file that holds the template.
    pub template: PathBuf,
    /// Up to the generation prompt.
    pub prompt: String,
    /// With the answer, for [`Form::WithAnswer`].
    pub answered: Option<Answered>,
}

/// A conversation with its answer, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// What stands before the answer, up to whitespace. The generation prompt, where the template
    /// begins the assistant's turn as it does.
    pub lead: String,
    /// The whole conversation.
    pub full: String,
}

/// A tokenized conversation; the fields are [`Prepared`]'s.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// `[T]`.
    pub ids: Vec<i64>,
    /// `[T]`: true where the next token belongs to the answer.
    pub answer_mask: Vec<bool>,
    /// For every answer token, the bytes of the answer that it covers.
    pub answer_offsets: Vec<Range<usize>>,
}

impl Turns {
    /// Content as a list of parts: the image, where there is one, then the text.
    #[must_use]
    pub fn parts(sample: &Sample) -> Turns {
        let mut content = Vec::new();
        if sample.image.is_some() {
            content.push(json!({"type": "image"}));
        }
        content.push(json!({"type": "text", "text": sample.question}));
        let answer = json!([{"type": "text", "text": sample.answer}]);
        Turns {
            user: json!({"role": "user", "content": content}),
            assistant: json!({"role": "assistant", "content": answer}),
        }
    }

    /// Content as plain text, for templates that know no parts: `question` with whatever stands for
    /// the image in it.
    #[must_use]
    pub fn text(question: &str, answer: &str) -> Turns {
        Turns {
            user: json!({"role": "user", "content": question}),
            assistant: json!({"role": "assistant", "content": answer}),
        }
    }

    /// The assistant's message with [`MARK`] for an answer, in the same kind of content.
    fn marked(&self) -> Value {
        let mark = MARK.to_string();
        let content = match self.assistant.get("content") {
            Some(Value::String(_)) => json!(mark),
            _ => json!([{"type": "text", "text": mark}]),
        };
        json!({"role": "assistant", "content": content})
    }
}

impl Rendered {
    /// Rewrites both texts.
    ///
    /// # Errors
    /// What `rewrite` returns.
    pub fn map(self, rewrite: impl Fn(&str) -> Result<String, Error>) -> Result<Rendered, Error> {
        Ok(Rendered {
            template: self.template,
            prompt: rewrite(&self.prompt)?,
            answered: match &self.answered {
                None => None,
                Some(Answered { lead, full }) => Some(Answered {
                    lead: rewrite(lead)?,
                    full: rewrite(full)?,
                }),
            },
        })
    }
}

/// A character of Unicode's private use area: no template writes it, none trims it.
const MARK: char = '\u{f8ff}';

impl ChatTemplate {
    /// Renders a sample: the prompt always, the whole conversation where the form has it.
    ///
    /// A template may write other whitespace at the beginning of the assistant's turn than in its
    /// generation prompt (LLaVA-OneVision's writes a space more). What stands before an answer is then told
    /// by rendering the same conversation with a mark for an answer.
    ///
    /// # Errors
    /// [`Error::TemplateRender`].
    pub fn conversation(&self, turns: &Turns, form: Form) -> Result<Rendered, Error> {
        let prompt = self.render(&json!([turns.user]), true)?;
        let answered = match form {
            Form::Question => None,
            Form::WithAnswer => {
                let full = self.render(&json!([turns.user, turns.assistant]), false)?;
                let mut lead = prompt.clone();
                if !full.starts_with(&prompt) {
                    let marked = self.render(&json!([turns.user, turns.marked()]), false)?;
                    let before = marked.split(MARK).next().unwrap_or_default();
                    let words = |text: &str| text.split_whitespace().collect::<String>();
                    if words(before) == words(&prompt) {
                        lead = before.to_owned();
                    }
                }
                Some(Answered { lead, full })
            }
        };
        Ok(Rendered {
            template: self.path().to_owned(),
            prompt,
            answered,
        })
    }
}

impl TextProcessor {
    /// Reads `tokenizer.json`, `tokenizer_config.json` (where there is one) and the stop tokens.
    ///
    /// # Errors
    /// [`Error`], naming the file.
    pub fn open(model: &ModelDir) -> Result<TextProcessor, Error> {
        let config = model.optional_json("tokenizer_config.json")?;
        let bos_token = config.and_then(|config| config.token("bos_token"));
        Ok(TextProcessor {
            tokenizer: Tokenizer::open(&model.dir().join("tokenizer.json"))?,
            bos_token: bos_token.filter(|token| !token.is_empty()),
            eos_token_ids: model.eos_token_ids()?,
        })
    }

    /// The tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids that end a generated answer; may be empty.
    #[must_use]
    pub fn eos_token_ids(&self) -> &[i64] {
        &self.eos_token_ids
    }

    /// The token that begins a text (`<s>`), where `tokenizer_config.json` names one.
    #[must_use]
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// Tokenizes a rendered conversation and finds the answer in it. Whitespace after the last turn
    /// is left out. The tokenizer adds its own special tokens (`<s>`), unless the template wrote the
    /// first of them already, as transformers' `apply_chat_template(tokenize=True)` does.
    ///
    /// # Errors
    /// [`Error::AnswerNotInPrompt`], [`Error::Tokenize`].
    pub fn tokenize(&self, sample: &Sample, rendered: &Rendered) -> Result<Tokens, Error> {
        self.tokenize_with(sample, rendered, |text| {
            let written = self.bos_token().is_some_and(|bos| text.starts_with(bos));
            self.tokenizer.encode(text, !written)
        })
    }

    /// [`TextProcessor::tokenize`] for families that tokenize in their own way.
    ///
    /// # Errors
    /// [`Error::AnswerNotInPrompt`], and what `encode` returns.
    pub fn tokenize_with(
        &self,
        sample: &Sample,
        rendered: &Rendered,
        encode: impl Fn(&str) -> Result<Encoded, Error>,
    ) -> Result<Tokens, Error> {
        let Some(Answered { lead, full }) = &rendered.answered else {
            let ids = encode(&rendered.prompt)?.ids;
            return Ok(Tokens {
                answer_mask: vec![false; ids.len()],
                ids,
                answer_offsets: Vec::new(),
            });
        };
        let span = answer_span(&rendered.template, full, lead, &sample.answer)?;
        let end = full.trim_end().len().max(span.end);
        let encoded = encode(full.get(..end).unwrap_or(full))?;
        let answer = answer_tokens(self.tokenizer.path(), &encoded, &span)?;
        Ok(Tokens {
            ids: encoded.ids,
            answer_mask: answer.predicts,
            answer_offsets: answer.offsets,
        })
    }
}

impl Tokens {
    /// Positions 0, 1, 2, … for these tokens.
    #[must_use]
    pub fn sequential(&self) -> PositionIds {
        PositionIds::Sequential((0..).take(self.ids.len()).collect())
    }

    /// The prepared sample.
    #[must_use]
    pub fn prepared(
        self,
        sample: &Sample,
        position_ids: PositionIds,
        image: Option<ImageInputs>,
    ) -> Prepared {
        Prepared {
            id: sample.id.clone(),
            next_position: position_ids.largest().map_or(0, |largest| largest + 1),
            position_ids,
            answer_tokens: self.answer_offsets.len(),
            answer_mask: self.answer_mask,
            answer_offsets: self.answer_offsets,
            input_ids: self.ids,
            image,
            decoder_inputs: Vec::new(),
        }
    }
}

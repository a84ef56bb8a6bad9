//! The image placeholder: what the chat template writes once per image, and the processor replaces in
//! the text, before it is tokenized, by as many image tokens as the image has features.

#![warn(clippy::indexing_slicing)]

use std::path::PathBuf;

use super::config::Json;
use super::{Error, Tokenizer};

/// It is written once per feature: a long one would multiply.
const MAX_TOKEN_BYTES: usize = 256;

/// A token that stands for an image in rendered text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placeholder {
    /// Its id.
    pub id: i64,
    /// Its text.
    pub token: String,
    /// The `tokenizer.json` that says so.
    pub tokenizer: PathBuf,
}

impl Placeholder {
    /// The token whose id is in the first of `fields` that `config` has.
    ///
    /// # Errors
    /// [`Error::Config`]: no such field, or no such token in the vocabulary.
    pub(crate) fn read(
        config: &Json,
        fields: &[&str],
        tokenizer: &Tokenizer,
    ) -> Result<Placeholder, Error> {
        let found = fields.iter().find(|field| config.get(field).is_some());
        let field = found.or(fields.first()).copied().unwrap_or_default();
        let id = config.integer(field)?;
        match tokenizer.id_to_token(id) {
            Some(token) if (1..=MAX_TOKEN_BYTES).contains(&token.len()) => Ok(Placeholder {
                id,
                token,
                tokenizer: tokenizer.path().to_owned(),
            }),
            _ => Err(config.field(field, "a token of tokenizer.json", &id.to_string())),
        }
    }

    /// The token `count` times, as most families write an image of `count` features.
    #[must_use]
    pub fn repeated(&self, count: usize) -> String {
        self.token.repeat(count)
    }

    /// Puts `replacements` in the place of the placeholders of `text`, in order. `named` is what errors call
    /// the text.
    ///
    /// # Errors
    /// [`Error::PlaceholderCount`] where there are more or fewer placeholders than replacements: one
    /// that the question or the answer brought along would be taken for an image.
    pub fn expand(
        &self,
        named: impl std::fmt::Display,
        text: &str,
        replacements: &[String],
    ) -> Result<String, Error> {
        let found = text.matches(&self.token).count();
        if found != replacements.len() {
            return Err(Error::PlaceholderCount {
                text: named.to_string(),
                token: format!(
                    "`{}` (token {} of {})",
                    self.token,
                    self.id,
                    self.tokenizer.display()
                ),
                expected: replacements.len(),
                found,
            });
        }
        let added: usize = replacements.iter().map(String::len).sum();
        let mut expanded = String::with_capacity(text.len() + added);
        let parts = text.split(&self.token);
        let replacements = replacements.iter().map(String::as_str);
        for (part, replacement) in parts.zip(replacements.chain(std::iter::once(""))) {
            expanded.push_str(part);
            expanded.push_str(replacement);
        }
        Ok(expanded)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_replaced_in_order_and_must_be_as_many_as_the_images() {
        let image = Placeholder {
            id: 9,
            token: "<image>".into(),
            tokenizer: "m/tokenizer.json".into(),
        };
        assert_eq!(image.repeated(3), "<image><image><image>");
        let two = ["<row><image>".to_owned(), String::new()];
        assert_eq!(
            image.expand("a text", "a <image>b<image>", &two).unwrap(),
            "a <row><image>b"
        );
        assert_eq!(image.expand("a text", "text", &[]).unwrap(), "text");
        for text in ["<image>", "", "<image><image><image>"] {
            let error = image
                .expand("m/chat_template.jinja", text, &two)
                .unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("m/chat_template.jinja: expected 2 "),
                "{error}"
            );
        }
    }
}

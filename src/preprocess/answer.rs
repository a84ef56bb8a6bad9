//! Which tokens are the answer. In: the conversation rendered with and without the answer, and the
//! answer. Out: the answer's bytes, and the positions that predict its tokens.
//!
//! The rule: the full rendering starts with what stands before an answer (the generation prompt, in
//! nearly every template); what follows it starts with the answer (after whitespace that the template puts between); the span is the answer's bytes and no
//! more, so an end-of-turn token does not count. A token counts if it covers a byte of the span.
//! Whatever does not fit is an error that names the template or the tokenizer, and goes up with the
//! sample's name: the method's original code counts *every* token then.

#![warn(clippy::indexing_slicing)]

use std::ops::Range;
use std::path::Path;

use super::Error;
use super::tokenizer::Encoded;

/// The bytes of `full` that are the answer.
///
/// `full` is the rendering with the answer, `prompt` what stands before it: the rendering up to the
/// generation prompt. `template` is the file of the chat template, for errors.
///
/// # Errors
/// [`Error::AnswerNotInPrompt`] where the template drops, trims or changes the answer, or begins
/// the assistant's turn in another way than its generation prompt does.
pub fn answer_span(
    template: &Path,
    full: &str,
    prompt: &str,
    answer: &str,
) -> Result<Range<usize>, Error> {
    let missing = |reason: String| Error::AnswerNotInPrompt {
        path: template.to_owned(),
        reason,
    };
    let Some(tail) = full.strip_prefix(prompt) else {
        return Err(missing(
            "the rendered conversation does not start with the rendered generation prompt".into(),
        ));
    };
    let separator = if tail.starts_with(answer) {
        0
    } else {
        tail.len() - tail.trim_start().len()
    };
    let Some(found) = tail
        .get(separator..)
        .filter(|text| text.starts_with(answer) && !answer.is_empty())
    else {
        let excerpt: String = tail.chars().take(60).collect();
        return Err(missing(format!(
            "expected `{answer}` after the generation prompt, found `{excerpt}`"
        )));
    };
    let start = full.len() - found.len();
    Ok(start..start + answer.len())
}

/// Where the answer's tokens are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerTokens {
    /// `[T]`: true at `t` iff token `t + 1` belongs to the answer.
    pub predicts: Vec<bool>,
    /// For every answer token in order, the bytes of the answer that it covers.
    pub offsets: Vec<Range<usize>>,
}

/// Finds the tokens that cover a byte of `span`. `tokenizer` is the tokenizer's file, for errors.
///
/// # Errors
/// [`Error::AnswerNotInPrompt`] where no token does, or where the first token of all does: nothing
/// predicts it.
pub fn answer_tokens(
    tokenizer: &Path,
    encoded: &Encoded,
    span: &Range<usize>,
) -> Result<AnswerTokens, Error> {
    let missing = |reason: &str| Error::AnswerNotInPrompt {
        path: tokenizer.to_owned(),
        reason: reason.to_owned(),
    };
    let covered: Vec<Option<Range<usize>>> = encoded
        .offsets
        .iter()
        .map(|token| {
            let (start, end) = (token.start.max(span.start), token.end.min(span.end));
            (start < end).then(|| start - span.start..end - span.start)
        })
        .collect();
    if covered.first().is_some_and(Option::is_some) {
        return Err(missing(
            "the first token belongs to the answer, and nothing predicts it",
        ));
    }
    let offsets: Vec<Range<usize>> = covered.iter().flatten().cloned().collect();
    if offsets.is_empty() {
        return Err(missing("no token covers it"));
    }
    let next_tokens = covered.iter().skip(1).map(Option::is_some);
    Ok(AnswerTokens {
        predicts: next_tokens.chain(std::iter::once(false)).collect(),
        offsets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = "m/chat_template.jinja";

    #[test]
    fn the_span_is_the_answer_and_not_the_end_of_turn() {
        let span = answer_span(
            TEMPLATE.as_ref(),
            "user: hi\nbot: yes<end>\n",
            "user: hi\nbot: ",
            "yes",
        )
        .unwrap();
        assert_eq!(span, 14..17);
    }

    #[test]
    fn whitespace_between_the_prompt_and_the_answer_is_stepped_over() {
        assert_eq!(
            answer_span(TEMPLATE.as_ref(), "bot: yes ", "bot:", "yes").unwrap(),
            5..8
        );
        assert_eq!(
            answer_span(TEMPLATE.as_ref(), "bot:\n yes", "bot:", "\n yes").unwrap(),
            4..9
        );
    }

    #[test]
    fn an_answer_that_also_stands_in_the_question_is_found_in_the_assistants_turn() {
        assert_eq!(
            answer_span(
                TEMPLATE.as_ref(),
                "user: yes\nbot:yes",
                "user: yes\nbot:",
                "yes"
            )
            .unwrap(),
            14..17
        );
    }

    #[test]
    fn an_answer_that_the_template_changes_is_an_error_that_names_the_template() {
        for (full, prompt, answer) in [
            ("bot: yes", "bot: ", " yes \n"),
            ("bot: YES", "bot: ", "yes"),
            ("bot: ", "bot: ", "yes"),
            ("bot: ", "bot: ", ""),
            ("other", "bot: ", "yes"),
            ("bot: ja, yes", "bot: ", "yes"),
        ] {
            let error = answer_span(TEMPLATE.as_ref(), full, prompt, answer).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("m/chat_template.jinja: answer not in the prompt: "),
                "{error}"
            );
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn a_token_counts_if_it_covers_a_byte_of_the_span() {
        let encoded = Encoded {
            ids: vec![0; 6],
            offsets: vec![0..2, 2..5, 5..5, 5..9, 5..9, 9..12],
        };
        let tokens = answer_tokens("tokenizer.json".as_ref(), &encoded, &(4..8)).unwrap();
        assert_eq!(tokens.predicts, [true, false, true, true, false, false]);
        assert_eq!(tokens.offsets, [0..1, 1..4, 1..4]);
    }

    #[test]
    fn an_answer_without_a_token_or_without_a_predictor_is_an_error() {
        let encoded = Encoded {
            ids: vec![0; 2],
            offsets: vec![0..2, 2..4],
        };
        assert!(answer_tokens("tokenizer.json".as_ref(), &encoded, &(4..8)).is_err());
        assert!(answer_tokens("tokenizer.json".as_ref(), &encoded, &(0..1)).is_err());
        assert!(
            answer_tokens(
                "tokenizer.json".as_ref(),
                &Encoded {
                    ids: vec![],
                    offsets: vec![]
                },
                &(0..1)
            )
            .is_err()
        );
    }
}

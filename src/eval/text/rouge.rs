//! ROUGE between a reference and a prediction, as Google's `rouge-score` 0.1.2 computes it.
//!
//! In: two texts, and whether to stem. Out: precision, recall and F1, each in [0, 1], higher means
//! closer to the reference. Promise: the same numbers as `RougeScorer([...], use_stemmer=...)`,
//! which CLEAR and MLLMU-Bench report (recall and F1 respectively, with stemming).
//!
//! The metric is Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries". Tokens are the
//! library's: lower case, maximal runs of `[a-z0-9]`, those longer than three characters stemmed.
//! So letters outside ASCII are separators, and a text without any ASCII letter or digit has no
//! tokens and scores 0 against everything.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::stemmer::stem;

/// Overlap of a prediction with a reference. Each in [0, 1]; higher is closer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Shared ÷ everything in the prediction.
    pub precision: f64,
    /// Shared ÷ everything in the reference.
    pub recall: f64,
    /// Harmonic mean, 2·P·R / (P + R); 0 where both are 0.
    pub f1: f64,
}

impl Score {
    fn new(shared: usize, in_reference: usize, in_prediction: usize) -> Self {
        // Nothing to share means nothing shared: 0, never NaN.
        let precision = shared as f64 / in_prediction.max(1) as f64;
        let recall = shared as f64 / in_reference.max(1) as f64;
        let f1 = if precision + recall > 0.0 {
            2.0 * precision * recall / (precision + recall)
        } else {
            0.0
        };
        Self {
            precision,
            recall,
            f1,
        }
    }
}

/// ROUGE-L: what is shared is the longest common subsequence of tokens, over both texts as one
/// sequence each (`rougeL`, not `rougeLsum`). Time O(|reference| · |prediction|).
pub fn rouge_l(reference: &str, prediction: &str, stemmer: bool) -> Score {
    let (reference, prediction) = (tokens(reference, stemmer), tokens(prediction, stemmer));
    let shared = longest_common_subsequence(&reference, &prediction);
    Score::new(shared, reference.len(), prediction.len())
}

/// ROUGE-N (`rouge1`, `rouge2`, …): what is shared are n-grams of tokens, each as often as it
/// occurs in both. A text shorter than `n` tokens has none, and neither has any text if `n` is 0.
pub fn rouge_n(n: usize, reference: &str, prediction: &str, stemmer: bool) -> Score {
    let (reference, prediction) = (tokens(reference, stemmer), tokens(prediction, stemmer));
    let (in_reference, in_prediction) = (ngrams(&reference, n), ngrams(&prediction, n));
    let shared = in_reference
        .iter()
        .map(|(ngram, count)| {
            in_prediction
                .get(ngram)
                .map_or(0, |other| *count.min(other))
        })
        .sum();
    Score::new(
        shared,
        in_reference.values().sum(),
        in_prediction.values().sum(),
    )
}

/// Whether ROUGE sees anything in `text`, that is, an ASCII letter or digit after lower-casing
/// (which makes a "k" of U+212A, the Kelvin sign). A reference without any cannot be scored.
pub fn has_tokens(text: &str) -> bool {
    !tokens(text, false).is_empty()
}

fn tokens(text: &str, stemmer: bool) -> Vec<String> {
    text.to_lowercase()
        .split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()))
        .filter(|token| !token.is_empty())
        .map(|token| {
            if stemmer && token.len() > 3 {
                stem(token)
            } else {
                token.to_owned()
            }
        })
        .collect()
}

fn ngrams(tokens: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    if n > 0 {
        for ngram in tokens.windows(n) {
            *counts.entry(ngram).or_default() += 1;
        }
    }
    counts
}

fn longest_common_subsequence(a: &[String], b: &[String]) -> usize {
    // `row[j]`: length for the part of `a` read so far and the first `j` of `b`.
    let mut row = vec![0; b.len() + 1];
    for x in a {
        let mut left_above = 0;
        let mut left = 0;
        for (cell, y) in row.iter_mut().skip(1).zip(b) {
            let above = *cell;
            left = if x == y {
                left_above + 1
            } else {
                above.max(left)
            };
            *cell = left;
            left_above = above;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_librarys_own_example() {
        let (reference, prediction) = (
            "The quick brown fox jumps over the lazy dog",
            "The quick brown dog jumps on the log.",
        );
        let score = rouge_l(reference, prediction, true);
        assert_eq!((score.precision, score.recall), (5.0 / 8.0, 5.0 / 9.0));
        let score = rouge_n(2, reference, prediction, true);
        assert_eq!((score.precision, score.recall), (2.0 / 7.0, 2.0 / 8.0));
    }

    #[test]
    fn nothing_scores_zero_against_everything() {
        for other in ["", "a b", "?!", "\u{ae40}"] {
            assert_eq!(rouge_l("", other, true), Score::default());
            assert_eq!(rouge_l(other, "", true), Score::default());
            assert_eq!(rouge_n(0, other, other, false), Score::default());
        }
    }
}

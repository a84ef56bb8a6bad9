//! BLEU of one answer, as MLLMU-Bench computes it with NLTK.
//!
//! In: two texts. Out: a number in [0, 1], higher means closer. Promise: equal to NLTK 3.9's
//! `sentence_bleu([reference.split()], prediction.split(), smoothing_function=method1)`.
//!
//! The metric is Papineni et al. 2002: the geometric mean of the clipped precisions of 1- to 4-grams,
//! times a penalty for answers that are shorter than the reference. Method 1 of Chen and Cherry 2014
//! counts a precision without a hit as 0.1 hits. Tokens are what white space separates.

use std::collections::HashMap;

/// The longest n-gram.
const ORDER: usize = 4;
/// What stands in for no hit (method 1).
const NO_HIT: f64 = 0.1;

/// BLEU of `prediction` against `reference`. 0 where they share no token.
pub fn bleu(reference: &str, prediction: &str) -> f64 {
    let reference: Vec<&str> = reference.split_whitespace().collect();
    let prediction: Vec<&str> = prediction.split_whitespace().collect();
    let mut logarithms = 0.0;
    for n in 1..=ORDER {
        let (expected, found) = (counts(&reference, n), counts(&prediction, n));
        let hits: usize = found
            .iter()
            .map(|(ngram, &count)| count.min(expected.get(ngram).copied().unwrap_or(0)))
            .sum();
        if n == 1 && hits == 0 {
            return 0.0;
        }
        let all = found.values().sum::<usize>().max(1);
        let hits = if hits == 0 { NO_HIT } else { hits as f64 };
        logarithms += (hits / all as f64).ln() / ORDER as f64;
    }
    let penalty = if prediction.len() > reference.len() {
        1.0
    } else {
        (1.0 - reference.len() as f64 / prediction.len() as f64).exp()
    };
    penalty * logarithms.exp()
}

fn counts<'t>(tokens: &'t [&'t str], n: usize) -> HashMap<&'t [&'t str], usize> {
    let mut counts = HashMap::new();
    for ngram in tokens.windows(n) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_of_four_words_score_one_and_strangers_nothing() {
        assert!((bleu("a b c d", "a b c d") - 1.0).abs() < 1e-12);
        assert_eq!(bleu("a b c d", "e f"), 0.0);
        assert_eq!(bleu("a", ""), 0.0);
        assert_eq!(bleu("", "a"), 0.0);
    }
}

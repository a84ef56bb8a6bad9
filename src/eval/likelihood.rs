//! Metrics of how likely the model finds given answers.
//!
//! In: a [`TokenLog`], what one teacher-forced pass says of each answer token. Out: loss, probability,
//! exact memorization, extraction strength, Min-K and Min-K++, zlib's score, the truth ratio. Promise:
//! pure, float64, never a panic; open-unlearning's formulas, except where `docs/metrics.md` says why
//! not.
//!
//! The end-of-turn token is no answer token: open-unlearning drops it too, for everything but the
//! loss.

use std::io::Write as _;
use std::str::FromStr;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use serde::{Deserialize, Serialize};

pub use crate::runtime::generate::TokenLog;

impl TokenLog {
    /// The loss alone: all that the answer's variants are needed for.
    #[must_use]
    pub fn loss(&self) -> AnswerLoss {
        AnswerLoss {
            sum_nll: -self.log_probability.iter().sum::<f64>(),
            tokens: self.log_probability.len(),
        }
    }

    /// The share of tokens that are the most likely one. `None` without tokens.
    #[must_use]
    pub fn exact_memorization(&self) -> Option<f64> {
        let hits = self.is_top.iter().filter(|&&is_top| is_top).count();
        (!self.is_top.is_empty()).then(|| hits as f64 / self.is_top.len() as f64)
    }

    /// 1 − k ÷ L, with k the number of tokens up to the last one that is not the most likely: how much
    /// of the answer's end follows from its beginning. `None` without tokens.
    #[must_use]
    pub fn extraction_strength(&self) -> Option<f64> {
        let length = self.is_top.len();
        let suffix = self.is_top.iter().rev().take_while(|&&is_top| is_top);
        (length > 0).then(|| suffix.count() as f64 / length as f64)
    }

    /// −mean of the lowest max(1, ⌊k · L⌋) log-probabilities. `None` without tokens, or where one of
    /// them is not finite.
    #[must_use]
    pub fn min_k(&self, k: f64) -> Option<f64> {
        lowest(&self.log_probability, k)
    }

    /// [`TokenLog::min_k`] over the normalized log-probabilities.
    #[must_use]
    pub fn min_k_plus_plus(&self, k: f64) -> Option<f64> {
        lowest(&self.normalized, k)
    }
}

/// A share k of Min-K: of an answer's tokens, the least likely ones that count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MinK(f64);

impl MinK {
    /// From 0.001 to 1.
    pub fn share(self) -> f64 {
        self.0
    }
}

impl FromStr for MinK {
    type Err = String;

    fn from_str(text: &str) -> Result<MinK, String> {
        match text.parse() {
            Ok(share) if (0.001..=1.0).contains(&share) => Ok(MinK(share)),
            _ => Err("expected a share from 0.001 to 1".into()),
        }
    }
}

impl std::fmt::Display for MinK {
    /// In percent, as metrics are named: `10`, `12.5`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // 0.29 · 100 is 28.999999999999996.
        write!(f, "{}", (self.0 * 1e8).round() / 1e6)
    }
}

fn lowest(values: &[f64], k: f64) -> Option<f64> {
    let mut ascending = values.to_vec();
    ascending.sort_by(f64::total_cmp);
    // k lies in (0, 1]: the product is no larger than a length.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let count = ((ascending.len() as f64 * k) as usize).max(1);
    let lowest = ascending.get(..count)?;
    let mean = lowest.iter().sum::<f64>() / count as f64;
    mean.is_finite().then_some(-mean)
}

/// Negative log-likelihood of an answer, teacher-forced.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerLoss {
    /// Σ −ln p(token) over the answer's tokens, in nats, ≥ 0.
    pub sum_nll: f64,
    /// How many tokens that were.
    pub tokens: usize,
}

impl AnswerLoss {
    /// Mean loss per answer token, `sum_nll / tokens`, ≥ 0, lower means better known. `None`
    /// without tokens or if the sum is not finite. A sum that rounding left below 0 counts as 0.
    #[must_use]
    pub fn per_token(&self) -> Option<f64> {
        let measured = self.tokens > 0 && self.sum_nll.is_finite();
        measured.then(|| self.sum_nll.max(0.0) / self.tokens as f64)
    }

    /// exp(−[`per_token`](Self::per_token)): the geometric mean of the tokens' probabilities, in
    /// [0, 1] (0 only by underflow), higher means better known. CLEAR's "Prob".
    #[must_use]
    pub fn probability(&self) -> Option<f64> {
        self.per_token().map(|loss| (-loss).exp())
    }
}

/// p ÷ (p + Σ p of `wrong`). `None` without wrong answers, or where a loss is not measured.
#[must_use]
pub fn normalized_probability(right: &AnswerLoss, wrong: &[AnswerLoss]) -> Option<f64> {
    let right = right.probability()?;
    let wrong: Vec<f64> = wrong
        .iter()
        .map(AnswerLoss::probability)
        .collect::<Option<_>>()?;
    let all = right + wrong.iter().sum::<f64>();
    (!wrong.is_empty() && all > 0.0).then(|| right / all)
}

/// Whether `right` has a lower loss per token than each of `wrong`. `None` without wrong answers, or
/// where a loss is not measured.
#[must_use]
pub fn ranked_first(right: &AnswerLoss, wrong: &[AnswerLoss]) -> Option<bool> {
    let right = right.per_token()?;
    let wrong: Vec<f64> = wrong
        .iter()
        .map(AnswerLoss::per_token)
        .collect::<Option<_>>()?;
    let lowest = wrong.into_iter().reduce(f64::min)?;
    Some(right < lowest)
}

/// R = exp(−mean loss of `wrong`) ÷ exp(−loss of `right`), ≥ 0: above 1 where wrong answers are
/// likelier than the right one. `None` without wrong answers, or where a loss is not measured.
#[must_use]
pub fn truth_ratio(right: &AnswerLoss, wrong: &[AnswerLoss]) -> Option<f64> {
    let losses: Vec<f64> = wrong
        .iter()
        .map(AnswerLoss::per_token)
        .collect::<Option<_>>()?;
    let right = right.per_token()?;
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    let ratio = (right - mean).exp();
    (!losses.is_empty() && ratio.is_finite()).then_some(ratio)
}

/// The length of `text` as zlib compresses it at level 6 (Python's `zlib.compress`), in bytes: how
/// much there is to say about it without the model.
///
/// zlib-rs looks for repetitions as zlib-ng does, and on short texts finds only at level 9 what zlib's
/// own level 6 finds: of 635 texts 632 have the same length then, with its level 6 only 284.
#[must_use]
pub fn zlib_length(text: &str) -> usize {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(9));
    // Writing to memory does not fail.
    let written = encoder.write_all(text.as_bytes());
    let bytes = written.and_then(|()| encoder.finish()).unwrap_or_default();
    bytes.len()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn log(is_top: &[bool]) -> TokenLog {
        TokenLog {
            log_probability: is_top
                .iter()
                .map(|&top| if top { -0.1 } else { -3.0 })
                .collect(),
            normalized: is_top.iter().map(|&top| f64::from(u8::from(top))).collect(),
            is_top: is_top.to_vec(),
        }
    }

    #[test]
    fn extraction_strength_is_the_share_of_the_last_tokens_that_follow() {
        for (is_top, expected) in [
            (&[true, true][..], 1.0),
            (&[false, true, true, true], 0.75),
            (&[true, true, false, true], 0.25),
            (&[true, true, true, false], 0.0),
        ] {
            assert_eq!(log(is_top).extraction_strength(), Some(expected));
        }
        assert_eq!(log(&[]).extraction_strength(), None);
        assert_eq!(log(&[true, false]).exact_memorization(), Some(0.5));
    }

    #[test]
    fn min_k_takes_at_least_one_token() {
        let log = log(&[true, false, true, true, true]);
        assert_eq!(log.min_k(0.2), Some(3.0));
        assert_eq!(log.min_k(0.01), Some(3.0));
        assert_eq!(log.min_k(0.4), Some(1.55));
        assert_eq!(log.min_k_plus_plus(0.2), Some(0.0));
        assert_eq!(TokenLog::default().min_k(0.2), None);
    }

    #[test]
    fn a_share_is_named_in_percent() {
        for (text, name) in [
            ("0.1", "10"),
            ("0.29", "29"),
            ("0.125", "12.5"),
            ("1", "100"),
            ("0.001", "0.1"),
        ] {
            assert_eq!(text.parse::<MinK>().unwrap().to_string(), name);
        }
        for text in ["0", "-0.1", "1.1", "NaN", "0.0001", "20%", ""] {
            assert!(text.parse::<MinK>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_loss_without_tokens_or_not_finite_is_no_loss() {
        for (sum_nll, tokens) in [(0.0, 0), (f64::NAN, 3), (f64::INFINITY, 3)] {
            assert_eq!(AnswerLoss { sum_nll, tokens }.probability(), None);
        }
        let loss = AnswerLoss {
            sum_nll: 2.0,
            tokens: 4,
        };
        assert_eq!(
            (loss.per_token(), loss.probability()),
            (Some(0.5), Some((-0.5_f64).exp()))
        );
    }

    #[test]
    fn the_right_answer_is_ranked_first_only_where_it_beats_every_wrong_one() {
        let loss = |sum_nll, tokens| AnswerLoss { sum_nll, tokens };
        assert_eq!(ranked_first(&loss(1.0, 1), &[]), None);
        assert_eq!(ranked_first(&loss(1.0, 0), &[loss(1.0, 1)]), None);
        // Per token: 0.5 against 0.6 and 0.5.
        let wrong = [loss(0.6, 1), loss(1.0, 2)];
        assert_eq!(ranked_first(&loss(1.0, 2), &wrong[..1]), Some(true));
        assert_eq!(
            ranked_first(&loss(1.0, 2), &wrong),
            Some(false),
            "a tie is a miss"
        );
    }

    #[test]
    fn a_truth_ratio_needs_wrong_answers() {
        let loss = |sum_nll| AnswerLoss { sum_nll, tokens: 2 };
        assert_eq!(truth_ratio(&loss(1.0), &[]), None);
        assert_eq!(normalized_probability(&loss(1.0), &[]), None);
        assert_eq!(truth_ratio(&loss(2.0), &[loss(2.0)]), Some(1.0));
        assert_eq!(
            normalized_probability(&loss(2.0), &[loss(2.0), loss(2.0)]),
            Some(1.0 / 3.0)
        );
        assert!(truth_ratio(&loss(4.0), &[loss(2.0)]).unwrap() > 1.0);
    }
}

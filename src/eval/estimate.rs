//! A number with its uncertainty.
//!
//! In: the scores of a set's samples. Out: an [`Estimate`]: the mean and a 95 % interval. Promise: a
//! metric that no sample has is `null`, with the reason beside it; the same scores give the same
//! interval.
//!
//! The interval is the percentile bootstrap (Efron 1979): the 2.5 % and 97.5 % quantiles (linear
//! between order statistics, as numpy's) of the mean over [`RESAMPLES`] draws with replacement, seeded
//! with [`SEED`]. Where every sample of a share agrees, resampling says nothing (0 of 6 would be "0,
//! surely"): there it is Wilson's score interval (1927), so 0 of 6 reaches to 0.39.
//!
//! It says how much another draw of samples of the same kind would move the number. Several pictures
//! of one person are no independent draws: then it is too narrow.

use serde::{Deserialize, Serialize};

use super::registry::Better;
use crate::kvw::Draws;

/// Draws of the bootstrap.
pub const RESAMPLES: usize = 1000;
/// The seed of its draws.
pub const SEED: u64 = 0;
/// How often the interval should hold the true value.
pub const CONFIDENCE: f64 = 0.95;
/// The normal quantile of [`CONFIDENCE`], two-sided.
const Z: f64 = 1.959_963_984_540_054;

/// How intervals were made, for the evaluation file.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    /// Draws.
    pub resamples: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// How often an interval should hold the true value.
    pub confidence: f64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self {
            resamples: RESAMPLES,
            seed: SEED,
            confidence: CONFIDENCE,
        }
    }
}

/// A metric's value over the samples that have it, with its interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The value; `null` if it cannot be computed.
    pub value: Option<f64>,
    /// The interval's lower end; `null` with `value`, and where one sample is all there is.
    pub low: Option<f64>,
    /// The interval's upper end.
    pub high: Option<f64>,
    /// How many samples it was taken over.
    pub n: usize,
    /// Why `value` is `null`. Left out otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Estimate {
    /// No value, and why.
    pub fn missing(reason: impl Into<String>) -> Estimate {
        Estimate {
            reason: Some(reason.into()),
            ..Estimate::default()
        }
    }

    /// The mean of `values` with its interval; `missing` is the reason where there are none.
    /// `share` says that the values lie in [0, 1].
    pub fn mean(values: &[f64], share: bool, missing: &str) -> Estimate {
        let n = values.len();
        let Some(&first) = values.first() else {
            return Estimate::missing(missing);
        };
        let value = mean(values);
        let agree = values.iter().all(|value| *value == first);
        if agree && share && (first == 0.0 || first == 1.0) {
            let (low, high) = wilson(value, n);
            return Estimate::new(value, Some((low, high)), n);
        }
        let interval = (n > 1).then(|| {
            let mut draws = Draws::new(SEED);
            bootstrap(|| {
                let drawn = (0..n).filter_map(|_| values.get(draws.below(n)));
                Some(drawn.sum::<f64>() / n as f64)
            })
        });
        Estimate::new(value, interval.flatten(), n)
    }

    /// `value` over `n` samples with `interval`, which is widened to hold the value.
    pub fn new(value: f64, interval: Option<(f64, f64)>, n: usize) -> Estimate {
        Estimate {
            value: Some(value),
            low: interval.map(|(low, _)| low.min(value)),
            high: interval.map(|(_, high)| high.max(value)),
            n,
            reason: None,
        }
    }

    /// The end of the interval that is worse (the value itself where there is no interval); of
    /// [`Better::NearZero`], the end that is farther from 0.
    pub fn pessimistic(&self, better: Better) -> Option<f64> {
        let value = self.value?;
        let (low, high) = (self.low.unwrap_or(value), self.high.unwrap_or(value));
        Some(match better {
            Better::Higher => low,
            Better::Lower => high,
            Better::NearZero if low.abs() > high.abs() => low,
            Better::NearZero => high,
        })
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The interval of a statistic that `draw` computes anew on each resample; a resample on which it is
/// not defined is left out. `None` where it never is.
pub(super) fn bootstrap(mut draw: impl FnMut() -> Option<f64>) -> Option<(f64, f64)> {
    let mut drawn: Vec<f64> = (0..RESAMPLES).filter_map(|_| draw()).collect();
    drawn.sort_by(f64::total_cmp);
    let tail = (1.0 - CONFIDENCE) / 2.0;
    Some((quantile(&drawn, tail)?, quantile(&drawn, 1.0 - tail)?))
}

/// numpy's default (`linear`) quantile of ascending values.
fn quantile(ascending: &[f64], q: f64) -> Option<f64> {
    let place = q * ascending.len().checked_sub(1)? as f64;
    // A place in a slice: it fits.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let below = place.floor() as usize;
    let (&low, part) = (ascending.get(below)?, place - place.floor());
    let high = ascending.get(below + 1).copied().unwrap_or(low);
    Some(low + (high - low) * part)
}

/// Wilson's score interval of a share of `n`.
fn wilson(share: f64, n: usize) -> (f64, f64) {
    let n = n as f64;
    let z2 = Z * Z;
    let centre = (share + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z / (1.0 + z2 / n) * (share * (1.0 - share) / n + z2 / (4.0 * n * n)).sqrt();
    ((centre - half).max(0.0), (centre + half).min(1.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_holds_the_mean_and_shrinks_with_the_set() {
        let values =
            |n: usize| -> Vec<f64> { (0..n).map(|i| f64::from(u8::from(i % 3 == 0))).collect() };
        let width = |n| {
            let estimate = Estimate::mean(&values(n), true, "");
            let (low, high) = (estimate.low.unwrap(), estimate.high.unwrap());
            assert!(low <= estimate.value.unwrap() && estimate.value.unwrap() <= high);
            high - low
        };
        // A normal interval is 2 · 1.96 · sqrt(p q / n) wide.
        let normal = 2.0 * Z * (2.0_f64 / 9.0 / 300.0).sqrt();
        assert!((width(300) - normal).abs() < 0.1 * normal);
        assert!(width(300) < width(30));
    }

    #[test]
    fn equal_scores_have_equal_intervals_on_every_run() {
        let values = [0.1, 0.5, 0.2, 0.9];
        assert_eq!(
            Estimate::mean(&values, true, ""),
            Estimate::mean(&values, true, "")
        );
    }

    #[test]
    fn a_share_on_which_all_agree_has_wilsons_interval() {
        // For 0 of n its upper end is z² ÷ (n + z²).
        let none = Estimate::mean(&[0.0; 6], true, "");
        assert_eq!((none.value, none.low), (Some(0.0), Some(0.0)));
        assert!((none.high.unwrap() - 0.390_334_287_902_165_3).abs() < 1e-12);
        let all = Estimate::mean(&[1.0; 6], true, "");
        assert!((all.low.unwrap() - 0.609_665_712_097_834_6).abs() < 1e-12);
        assert_eq!(all.high, Some(1.0));
    }

    #[test]
    fn no_sample_means_no_value_and_a_reason() {
        let estimate = Estimate::mean(&[], true, "nobody has it");
        assert_eq!((estimate.value, estimate.n), (None, 0));
        assert_eq!(estimate.reason.as_deref(), Some("nobody has it"));
        let one = Estimate::mean(&[0.5], false, "");
        assert_eq!((one.value, one.low), (Some(0.5), None));
    }

    #[test]
    fn the_pessimistic_end_is_the_worse_one() {
        let estimate = Estimate::new(-2.0, Some((-9.0, 4.0)), 5);
        assert_eq!(estimate.pessimistic(Better::Higher), Some(-9.0));
        assert_eq!(estimate.pessimistic(Better::Lower), Some(4.0));
        assert_eq!(estimate.pessimistic(Better::NearZero), Some(-9.0));
    }

    #[test]
    fn quantiles_are_numpys() {
        // np.quantile([1, 2, 4, 8], [0, 0.025, 0.5, 0.975, 1])
        let values = [1.0, 2.0, 4.0, 8.0];
        for (q, expected) in [
            (0.0, 1.0),
            (0.025, 1.075),
            (0.5, 3.0),
            (0.975, 7.7),
            (1.0, 8.0),
        ] {
            assert!((quantile(&values, q).unwrap() - expected).abs() < 1e-12);
        }
        assert_eq!(quantile(&[], 0.5), None);
    }
}

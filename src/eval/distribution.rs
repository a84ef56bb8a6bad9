//! Numbers of whole sets: two samples of scores against each other, and means of means.
//!
//! In: slices of numbers. Out: the area under the ROC curve ([`auc`]), the two-sample Kolmogorov–Smirnov
//! test ([`kolmogorov_smirnov`]), PrivLeak, the harmonic mean. Promise: equal to scikit-learn's
//! `roc_auc_score` and to scipy's exact `ks_2samp` and `hmean`; never a panic.

/// The probability that a draw of `higher` is larger than one of `lower`, ties counting half: the area
/// under the ROC curve of a test that takes `higher` for the positives. In [0, 1]. `None` where one is
/// empty or holds a NaN.
#[must_use]
pub fn auc(lower: &[f64], higher: &[f64]) -> Option<f64> {
    if lower.is_empty() || higher.is_empty() {
        return None;
    }
    let mut ascending = lower.to_vec();
    if lower.iter().chain(higher).any(|value| value.is_nan()) {
        return None;
    }
    ascending.sort_by(f64::total_cmp);
    let mut wins = 0.0;
    for value in higher {
        let below = ascending.partition_point(|other| other < value);
        let not_above = ascending.partition_point(|other| other <= value);
        wins += below as f64 + (not_above - below) as f64 / 2.0;
    }
    Some(wins / lower.len() as f64 / higher.len() as f64)
}

/// PrivLeak of a model, of the `auc` of a membership inference on it and of the same on a retrained one:
/// ((1 − AUC) − (1 − AUC_ref)) ÷ (1 − AUC_ref + 1e-10) · 100. 0 is as private as the retrained model;
/// below 0 more is known, above 0 it was forgotten too conspicuously.
#[must_use]
pub fn privacy_leakage(auc: f64, reference: f64) -> f64 {
    let (own, reference) = (1.0 - auc, 1.0 - reference);
    (own - reference) / (reference + 1e-10) * 100.0
}

/// The harmonic mean; `None` of nothing. 0 where one of the values is, as scipy's `hmean`.
#[must_use]
pub fn harmonic_mean(values: &[f64]) -> Option<f64> {
    let reciprocals: f64 = values.iter().map(|value| 1.0 / value).sum();
    (!values.is_empty()).then(|| values.len() as f64 / reciprocals)
}

/// What the two-sample Kolmogorov–Smirnov test says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KolmogorovSmirnov {
    /// D, the largest distance of the two distribution functions, in [0, 1].
    pub statistic: f64,
    /// How probable a distance of at least D is where both samples come from one continuous
    /// distribution, in [0, 1]: exact, two-sided.
    pub p_value: f64,
}

/// The most cells, `a.len() · b.len()`, that the exact test goes through: half a minute.
pub const MAX_CELLS: usize = 4_000_000_000;

/// The test of `a` against `b`. Time O(|a| · |b|). `None` where one is empty or holds a NaN, or both
/// are larger than [`MAX_CELLS`] together.
#[must_use]
pub fn kolmogorov_smirnov(a: &[f64], b: &[f64]) -> Option<KolmogorovSmirnov> {
    let (n, m) = (a.len(), b.len());
    let cells = n.checked_mul(m).filter(|&cells| cells <= MAX_CELLS)?;
    if cells == 0 || a.iter().chain(b).any(|value| value.is_nan()) {
        return None;
    }
    let (mut a, mut b) = (a.to_vec(), b.to_vec());
    a.sort_by(f64::total_cmp);
    b.sort_by(f64::total_cmp);
    // In units of 1 / lcm(n, m), so that ties and distances are exact.
    let divisor = greatest_common_divisor(n, m);
    let (step_a, step_b) = (m / divisor, n / divisor);
    let distance = |i: usize, j: usize| (i * step_a).abs_diff(j * step_b);
    let values = a.iter().chain(&b);
    let largest = values
        .map(|value| {
            let at = |sorted: &[f64]| sorted.partition_point(|other| other <= value);
            distance(at(&a), at(&b))
        })
        .max()?;
    Some(KolmogorovSmirnov {
        statistic: largest as f64 / (n * step_a) as f64,
        p_value: exceeding(n, m, |i, j| distance(i, j) >= largest),
    })
}

/// The probability that a random order of `n` a's and `m` b's comes past a point (i a's, j b's) that
/// `exceeds`. It adds up where the orders get there first, so that small probabilities keep their digits.
fn exceeding(n: usize, m: usize, exceeds: impl Fn(usize, usize) -> bool) -> f64 {
    if exceeds(0, 0) {
        return 1.0;
    }
    // `reached[j]`: the probability of passing (i, j) without having exceeded before.
    let mut reached = vec![0.0; m + 1];
    let mut outside = 0.0;
    let mut above = vec![0.0; m + 1];
    for i in 0..=n {
        let mut left = 0.0;
        for (j, (cell, from_above)) in reached.iter_mut().zip(&above).enumerate() {
            let here = if (i, j) == (0, 0) {
                1.0
            } else {
                from_above + left
            };
            let (here, gone) = if exceeds(i, j) {
                (0.0, here)
            } else {
                (here, 0.0)
            };
            outside += gone;
            let remaining = (n - i + m - j).max(1) as f64;
            // What goes on to (i, j + 1), and to (i + 1, j).
            left = here * (m - j) as f64 / remaining;
            *cell = here * (n - i) as f64 / remaining;
        }
        std::mem::swap(&mut reached, &mut above);
    }
    outside.min(1.0)
}

fn greatest_common_divisor(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_area_counts_pairs_in_order_and_halves_ties() {
        assert_eq!(auc(&[1.0, 2.0], &[3.0, 4.0]), Some(1.0));
        assert_eq!(auc(&[3.0, 4.0], &[1.0, 2.0]), Some(0.0));
        assert_eq!(auc(&[1.0, 3.0], &[2.0, 3.0]), Some(0.625));
        assert_eq!(auc(&[], &[1.0]), None);
        assert_eq!(auc(&[f64::NAN], &[1.0]), None);
    }

    #[test]
    fn a_harmonic_mean_is_zero_where_a_term_is() {
        assert_eq!(harmonic_mean(&[0.5, 0.0]), Some(0.0));
        assert_eq!(harmonic_mean(&[1.0, 1.0]), Some(1.0));
        assert_eq!(harmonic_mean(&[]), None);
    }

    #[test]
    fn samples_apart_are_as_unlikely_as_the_two_extreme_orders() {
        // Of C(10, 5) = 252 orders, two have all of one sample first.
        let found = kolmogorov_smirnov(&[1., 2., 3., 4., 5.], &[6., 7., 8., 9., 10.]).unwrap();
        assert_eq!(found.statistic, 1.0);
        assert!((found.p_value - 2.0 / 252.0).abs() < 1e-15);
    }

    #[test]
    fn equal_samples_are_not_distinguished() {
        let same = kolmogorov_smirnov(&[1.0, 2.0, 2.0], &[2.0, 1.0, 2.0]).unwrap();
        assert_eq!((same.statistic, same.p_value), (0.0, 1.0));
        assert_eq!(kolmogorov_smirnov(&[], &[1.0]), None);
    }

    #[test]
    fn small_probabilities_keep_their_digits() {
        let (a, b): (Vec<f64>, Vec<f64>) = (
            (0..60).map(f64::from).collect(),
            (100..160).map(f64::from).collect(),
        );
        // 2 / C(120, 60)
        let found = kolmogorov_smirnov(&a, &b).unwrap().p_value;
        assert!(
            (found / 2.070_073_888_186_964e-35 - 1.0).abs() < 1e-9,
            "{found:e}"
        );
    }
}

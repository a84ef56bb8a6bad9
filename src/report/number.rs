//! Numbers as people read them.

use crate::eval::{Estimate, metric};

/// A value of `name`: a percentage where it is a share, else a number.
pub(super) fn value(name: &str, value: f64) -> String {
    match metric(name) {
        Some(metric) if metric.is_share() => percent(value),
        _ => format!("{value:.3}"),
    }
}

/// An estimate of `name` with its interval; a dash where there is none.
pub(super) fn estimate(name: &str, estimate: &Estimate) -> String {
    let Some(found) = estimate.value else {
        return "–".to_owned();
    };
    match interval(name, estimate) {
        Some(interval) => format!("{} ({interval})", value(name, found)),
        None => value(name, found),
    }
}

/// The interval, as in "17 to 58 %".
pub(super) fn interval(name: &str, estimate: &Estimate) -> Option<String> {
    let (low, high) = (estimate.low?, estimate.high?);
    Some(match metric(name) {
        Some(metric) if metric.is_share() => {
            format!("{:.0} to {}", 100.0 * low, percent(high))
        }
        _ => format!("{low:.3} to {high:.3}"),
    })
}

/// "38 %".
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}\u{a0}%", 100.0 * share)
}

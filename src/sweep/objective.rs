//! What is traded against what, the Pareto front, and the pick.
//!
//! In: an [`Objective`] and the points' numbers ([`Tradeoff`]). Out: the points that no other beats,
//! and the one that the rule picks. Pure: no model, no file.

use serde::{Deserialize, Serialize};

use super::Error;
use crate::eval::{Evidence, Role, SetKind};

/// One metric of one set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measure {
    /// The set, as the points name it.
    pub set: String,
    /// The metric: a share or score of what is still known, higher is more.
    pub metric: String,
}

/// What a sweep looks for: the lowest `forget` among the points that keep `retain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Objective {
    /// To be brought down.
    pub forget: Measure,
    /// To be kept.
    pub retain: Measure,
    /// The share of the untouched model's `retain` that a point must keep.
    pub min_retain: f64,
    /// The `forget` that a point must reach; without it the lowest is picked, however high.
    pub target_forget: Option<f64>,
}

/// Where a point lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tradeoff {
    /// The value to be brought down.
    pub forget: f64,
    /// The value to be kept.
    pub retain: f64,
    /// `retain` as a share of the untouched model's.
    pub retain_share: f64,
    /// Mean gate of the plan: the nearer to 1, the less was weakened.
    pub mean_gate: f64,
}

impl Tradeoff {
    /// Where a point lies whose `retain` was `untouched` before.
    pub fn new(forget: f64, retain: f64, untouched: f64, mean_gate: f64) -> Tradeoff {
        Tradeoff {
            forget,
            retain,
            // What was never known is kept, whatever comes of it.
            retain_share: if untouched > 0.0 {
                retain / untouched
            } else {
                1.0
            },
            mean_gate,
        }
    }
}

/// The point that the objective picks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pick {
    /// The rule, in words.
    pub rule: String,
    /// Index of the point that was picked; none where no point does what the rule asks for.
    pub point: Option<usize>,
    /// Where none was picked: the point that comes nearest, by the sum of what `forget` is too high
    /// and `retain_share` too low.
    pub nearest: Option<usize>,
}

/// Shares are sums of a few ones divided by their number: 0.95 · 1.0 must not fail by a last bit.
const ROUNDING: f64 = 1e-9;

/// The sets that an objective is about.
pub(super) const FORGET: &str = "forget";
pub(super) const RETAIN: &str = "retain";

impl Objective {
    /// `metric` on the forget set against the same on the retain set.
    pub fn on(metric: &str, min_retain: f64, target_forget: Option<f64>) -> Objective {
        let measure = |set: &str| Measure {
            set: set.to_owned(),
            metric: metric.to_owned(),
        };
        Objective {
            forget: measure(FORGET),
            retain: measure(RETAIN),
            min_retain,
            target_forget,
        }
    }

    /// Whether a model that was written does what is asked for, by the first forget and the first retain
    /// set of `evidence`. `mean_gate` is the plan's.
    ///
    /// # Errors
    /// [`Error::TargetMissed`]: it does not, or has no numbers.
    pub fn check(&self, evidence: &Evidence, mean_gate: f64) -> Result<(), Error> {
        let value = |kind: SetKind, role: Role, metric: &str| {
            let set = evidence.sets.iter().find(|set| set.kind == kind)?;
            set.models.get(&role)?.summary.value(metric)
        };
        let (forget, retain) = (&self.forget.metric, &self.retain.metric);
        let found = value(SetKind::Forget, Role::After, forget)
            .zip(value(SetKind::Retain, Role::After, retain))
            .zip(value(SetKind::Retain, Role::Before, retain));
        let missed = |found: &str| {
            Error::TargetMissed(format!(
                "the written model does not do what was asked for ({}): {found}",
                self.rule()
            ))
        };
        let ((forget, kept), before) = found.ok_or_else(|| missed("it has no numbers"))?;
        match self.holds(&Tradeoff::new(forget, kept, before, mean_gate)) {
            true => Ok(()),
            false => Err(missed(&format!(
                "forget {forget:.3}, retain {kept:.3} of {before:.3}"
            ))),
        }
    }

    /// The rule in words.
    pub fn rule(&self) -> String {
        let target = self
            .target_forget
            .map_or_else(String::new, |target| format!(", at most {target}"));
        format!(
            "lowest {} of {}{target}, among the points with {} of {} ≥ {} of the untouched model's; \
             among equals the one that keeps more, then the one that weakens less",
            self.forget.metric,
            self.forget.set,
            self.retain.metric,
            self.retain.set,
            self.min_retain
        )
    }

    /// Whether a point does what is asked for.
    pub fn holds(&self, point: &Tradeoff) -> bool {
        point.retain_share >= self.min_retain - ROUNDING
            && self
                .target_forget
                .is_none_or(|target| point.forget <= target + ROUNDING)
    }

    fn shortfall(&self, point: &Tradeoff) -> f64 {
        let forget = self
            .target_forget
            .map_or(0.0, |target| (point.forget - target).max(0.0));
        forget + (self.min_retain - point.retain_share).max(0.0)
    }

    /// Picks among `points`; those without numbers (`None`) failed.
    pub fn pick(&self, points: &[Option<Tradeoff>]) -> Pick {
        let numbered = || {
            let points = points.iter().enumerate();
            points.filter_map(|(index, point)| Some((index, point.as_ref()?)))
        };
        let better = |a: &Tradeoff, b: &Tradeoff| {
            a.forget
                .total_cmp(&b.forget)
                .then(b.retain.total_cmp(&a.retain))
                .then(b.mean_gate.total_cmp(&a.mean_gate))
        };
        let point = numbered()
            .filter(|(_, point)| self.holds(point))
            .min_by(|(_, a), (_, b)| better(a, b))
            .map(|(index, _)| index);
        let nearest = || {
            numbered()
                .min_by(|(_, a), (_, b)| {
                    let (x, y) = (self.shortfall(a), self.shortfall(b));
                    x.total_cmp(&y).then_with(|| better(a, b))
                })
                .map(|(index, _)| index)
        };
        Pick {
            rule: self.rule(),
            point,
            nearest: if point.is_none() { nearest() } else { None },
        }
    }
}

/// Indices of the points that no other point beats: none forgets at least as much and keeps at least as
/// much, and one of the two more.
pub(super) fn front(points: &[Option<Tradeoff>]) -> Vec<usize> {
    let beats = |a: &Tradeoff, b: &Tradeoff| {
        a.forget <= b.forget && a.retain >= b.retain && (a.forget < b.forget || a.retain > b.retain)
    };
    let numbered = points.iter().enumerate();
    numbered
        .filter_map(|(index, point)| Some((index, point.as_ref()?)))
        .filter(|(_, point)| !points.iter().flatten().any(|other| beats(other, point)))
        .map(|(index, _)| index)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(forget: f64, retain: f64, mean_gate: f64) -> Option<Tradeoff> {
        Some(Tradeoff {
            forget,
            retain,
            retain_share: retain / 0.8,
            mean_gate,
        })
    }

    fn objective(min_retain: f64, target_forget: Option<f64>) -> Objective {
        let measure = |set: &str| Measure {
            set: set.into(),
            metric: "name_accuracy".into(),
        };
        Objective {
            forget: measure("forget"),
            retain: measure("retain"),
            min_retain,
            target_forget,
        }
    }

    #[test]
    fn the_pick_is_the_lowest_forget_among_those_that_keep_enough() {
        let points = [
            at(0.0, 0.5, 0.1),
            at(0.2, 0.76, 0.4),
            at(0.1, 0.76, 0.4),
            None,
        ];
        let pick = objective(0.95, None).pick(&points);
        assert_eq!((pick.point, pick.nearest), (Some(2), None));
        assert_eq!(objective(0.6, None).pick(&points).point, Some(0));
    }

    #[test]
    fn among_equals_what_keeps_more_then_what_weakens_less_is_picked() {
        let points = [at(0.1, 0.7, 0.9), at(0.1, 0.76, 0.3), at(0.1, 0.76, 0.5)];
        assert_eq!(objective(0.5, None).pick(&points).point, Some(2));
    }

    #[test]
    fn where_no_point_does_the_nearest_is_named() {
        let points = [at(0.0, 0.2, 0.1), at(0.3, 0.8, 0.8), at(0.15, 0.76, 0.4)];
        let pick = objective(0.95, Some(0.1)).pick(&points);
        assert_eq!((pick.point, pick.nearest), (None, Some(2)));
        let none = objective(0.95, Some(0.1)).pick(&[None, None]);
        assert_eq!((none.point, none.nearest), (None, None));
    }

    #[test]
    fn a_share_of_exactly_what_is_asked_for_is_enough() {
        // 0.95 of 0.8 in floats is 0.76 - 1 ulp or + 1 ulp, as it comes.
        assert!(objective(0.95, Some(0.1)).holds(&at(0.1, 0.95 * 0.8, 0.5).unwrap()));
    }

    proptest! {
        #[test]
        fn no_point_of_the_front_is_beaten_and_every_other_is(
            points in prop::collection::vec((0u8..6, 0u8..6), 1..20),
        ) {
            let points: Vec<_> = points
                .iter()
                .map(|&(f, r)| at(f64::from(f), f64::from(r), 0.5))
                .collect();
            let front = front(&points);
            for (index, point) in points.iter().flatten().enumerate() {
                let beaten = points.iter().flatten().any(|other| {
                    (other.forget < point.forget && other.retain >= point.retain)
                        || (other.forget <= point.forget && other.retain > point.retain)
                });
                prop_assert_eq!(front.contains(&index), !beaten);
            }
        }

        #[test]
        fn the_pick_lies_on_the_front(
            points in prop::collection::vec((0u8..6, 0u8..6), 1..20), least in 0.0f64..8.0,
        ) {
            let points: Vec<_> = points
                .iter()
                .map(|&(f, r)| at(f64::from(f), f64::from(r), 0.5))
                .collect();
            if let Some(picked) = objective(least, None).pick(&points).point {
                prop_assert!(front(&points).contains(&picked));
            }
        }
    }
}

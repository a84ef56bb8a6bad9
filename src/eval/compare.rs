//! What is taken of two sets or of two models.
//!
//! In: the evaluated sets. Out: [`Comparison`]s. Promise: one that cannot be computed is there, with the
//! reason; the same answers give the same intervals.
//!
//! | metric | of | source |
//! |---|---|---|
//! | `auc_*` | a forget set against a holdout set, one model | membership inference as open-unlearning signs it: 1 where everything forgotten is better known than everything never seen |
//! | `privleak` | the same, two models | Shi et al. 2024 (MUSE, arXiv 2407.06460) |
//! | `forget_quality` | a forget set, two models | Maini et al. 2024 (TOFU, arXiv 2401.06121) |
//! | `model_utility` | all sets to keep, one model | TOFU, CLEAR |

use indexmap::{IndexMap, IndexSet};

use super::answer::Answer;
use super::distribution::{auc, harmonic_mean, kolmogorov_smirnov, privacy_leakage};
use super::estimate::{Estimate, SEED, bootstrap};
use super::evidence::{Comparison, EvidenceSet, Measured, Role, SetKind};
use super::registry::metric;
use crate::kvw::Draws;

/// Membership inference: the scores whose distribution it is taken of, as `auc_` and the score's name. All
/// of them are lower for what is better known.
const ATTACKS: [&str; 6] = [
    "loss",
    "zlib",
    "min_k_20",
    "min_k_40",
    "min_k_plus_plus_20",
    "min_k_plus_plus_40",
];

/// The families whose members are such scores too, where a set has them.
const FAMILIES: [&str; 2] = ["min_k_*", "min_k_plus_plus_*"];

/// The scores of `set` that membership inference is made by.
fn attacks(set: &EvidenceSet) -> IndexSet<&str> {
    let measured = set
        .models
        .values()
        .flat_map(|measured| measured.summary.iter());
    let more = measured
        .map(|(name, _)| name)
        .filter(|name| metric(name).is_some_and(|metric| FAMILIES.contains(&metric.name)));
    ATTACKS.into_iter().chain(more).collect()
}

/// The attack that PrivLeak is taken of, as in MUSE.
const PRIVLEAK_SCORE: &str = "min_k_40";

/// What model utility is the harmonic mean of, for each set.
const UTILITY: [&str; 3] = ["probability", "rouge_l_recall", "truth_ratio_retain"];

/// The most cells of a Kolmogorov–Smirnov test that is done again on every draw of the bootstrap.
const MAX_CELLS_DRAWN: usize = 1_000_000;

const NO_HOLDOUT: &str = "no holdout set was given: samples that no model was shown";
const NO_RETRAINED: &str =
    "no reference was given: the evaluation of a model that was trained without the forget set";

/// Every comparison that `sets` allow, and for each forget set those that they do not, with the reason.
#[must_use]
pub fn comparisons(sets: &[EvidenceSet]) -> Vec<Comparison> {
    let of_kind = |kind| sets.iter().filter(move |set| set.kind == kind);
    let mut found = Vec::new();
    for forget in of_kind(SetKind::Forget) {
        let holdouts: Vec<_> = of_kind(SetKind::Holdout).map(Some).collect();
        for holdout in if holdouts.is_empty() {
            vec![None]
        } else {
            holdouts
        } {
            let against = holdout.map(|set| set.set.clone());
            let each = |metric: &str, estimate: &dyn Fn(Role, &Measured) -> Option<Estimate>| {
                each_model(metric, forget, against.clone(), estimate)
            };
            for score in attacks(forget) {
                found.push(each(&format!("auc_{score}"), &|role, members| {
                    Some(match holdout.and_then(|set| set.models.get(&role)) {
                        None => Estimate::missing(NO_HOLDOUT),
                        Some(others) => attack(members, others, score),
                    })
                }));
            }
            found.push(each("privleak", &|role, members| {
                (role != Role::Retrained).then(|| privleak(role, members, forget, holdout))
            }));
        }
        let retrained = forget.models.get(&Role::Retrained);
        let against = retrained.map(|_| Role::Retrained.as_str().to_owned());
        found.push(each_model(
            "forget_quality",
            forget,
            against,
            &|role, measured| {
                (role != Role::Retrained).then(|| match retrained {
                    None => Estimate::missing(NO_RETRAINED),
                    Some(retrained) => forget_quality(measured, retrained),
                })
            },
        ));
    }
    let mut roles: Vec<Role> = sets
        .iter()
        .flat_map(|set| set.models.keys().copied())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    if !roles.is_empty() {
        found.push(Comparison {
            metric: "model_utility".to_owned(),
            set: None,
            against: None,
            models: roles
                .into_iter()
                .map(|role| (role, model_utility(role, sets)))
                .collect(),
        });
    }
    found
}

fn each_model(
    metric: &str,
    set: &EvidenceSet,
    against: Option<String>,
    estimate: &dyn Fn(Role, &Measured) -> Option<Estimate>,
) -> Comparison {
    let models = set.models.iter();
    Comparison {
        metric: metric.to_owned(),
        set: Some(set.set.clone()),
        against,
        models: models
            .filter_map(|(&role, measured)| Some((role, estimate(role, measured)?)))
            .collect(),
    }
}

/// The scores of the answers that have this metric.
fn scores(measured: &Measured, metric: &str) -> Vec<f64> {
    let scores = measured.answers.iter().map(|answer| &answer.scores);
    scores
        .filter_map(|scores| scores.get(metric).copied())
        .collect()
}

/// As many of `values`, drawn with replacement.
fn drawn(values: &[f64], draws: &mut Draws) -> Vec<f64> {
    let picked = (0..values.len()).filter_map(|_| values.get(draws.below(values.len())));
    picked.copied().collect()
}

fn no_score(score: &str) -> Estimate {
    Estimate::missing(format!("no sample of one of the sets has a `{score}`"))
}

/// The area under the curve of a test that takes low scores for membership.
fn attack(members: &Measured, others: &Measured, score: &str) -> Estimate {
    let (members, others) = (scores(members, score), scores(others, score));
    let Some(value) = auc(&members, &others) else {
        return no_score(score);
    };
    let mut draws = Draws::new(SEED);
    let interval = bootstrap(|| {
        let members = drawn(&members, &mut draws);
        auc(&members, &drawn(&others, &mut draws))
    });
    Estimate::new(value, interval, members.len() + others.len())
}

/// [`privacy_leakage`] of the areas of the attack by Min-K.
fn privleak(
    role: Role,
    members: &Measured,
    forget: &EvidenceSet,
    holdout: Option<&EvidenceSet>,
) -> Estimate {
    let Some(holdout) = holdout else {
        return Estimate::missing(NO_HOLDOUT);
    };
    let reference = forget.models.get(&Role::Retrained);
    let reference = reference.zip(holdout.models.get(&Role::Retrained));
    let Some((reference_members, reference_others)) = reference else {
        return Estimate::missing(NO_RETRAINED);
    };
    let Some(others) = holdout.models.get(&role) else {
        return Estimate::missing(NO_HOLDOUT);
    };
    let of = |measured| scores(measured, PRIVLEAK_SCORE);
    let own = (of(members), of(others));
    let retrained = (of(reference_members), of(reference_others));
    let relative =
        |own: Option<f64>, retrained: Option<f64>| Some(privacy_leakage(own?, retrained?));
    let area = |(members, others): &(Vec<f64>, Vec<f64>)| auc(members, others);
    let Some(value) = relative(area(&own), area(&retrained)) else {
        return no_score(PRIVLEAK_SCORE);
    };
    let mut draws = Draws::new(SEED);
    let interval = bootstrap(|| {
        let mut again = |(members, others): &(Vec<f64>, Vec<f64>)| {
            let members = drawn(members, &mut draws);
            auc(&members, &drawn(others, &mut draws))
        };
        relative(again(&own), again(&retrained))
    });
    Estimate::new(value, interval, own.0.len() + own.1.len())
}

/// The p-value of the Kolmogorov–Smirnov test of the truth ratios.
fn forget_quality(measured: &Measured, retrained: &Measured) -> Estimate {
    let ratios = |measured| scores(measured, "truth_ratio");
    let (own, reference) = (ratios(measured), ratios(retrained));
    let test = |a: &[f64], b: &[f64]| kolmogorov_smirnov(a, b).map(|test| test.p_value);
    let Some(value) = test(&own, &reference) else {
        return no_score("truth_ratio");
    };
    let mut draws = Draws::new(SEED);
    let small = own.len().saturating_mul(reference.len()) <= MAX_CELLS_DRAWN;
    let interval = small.then(|| {
        bootstrap(|| {
            let own = drawn(&own, &mut draws);
            test(&own, &drawn(&reference, &mut draws))
        })
    });
    Estimate::new(value, interval.flatten(), own.len())
}

/// The harmonic mean of probability, ROUGE-L recall and truth ratio of every set to keep, as far as a
/// set has them.
fn model_utility(role: Role, sets: &[EvidenceSet]) -> Estimate {
    let kept = sets
        .iter()
        .filter(|set| matches!(set.kind, SetKind::Retain | SetKind::Other));
    let kept: Vec<&[Answer]> = kept
        .filter_map(|set| Some(set.models.get(&role)?.answers.as_slice()))
        .filter(|answers| !answers.is_empty())
        .collect();
    let utility = |sets: &mut dyn Iterator<Item = Vec<&Answer>>| {
        let terms: Vec<f64> = sets.flat_map(|answers| terms(&answers)).collect();
        harmonic_mean(&terms)
    };
    let Some(value) = utility(&mut kept.iter().map(|answers| answers.iter().collect())) else {
        return Estimate::missing("no set to keep (retain or other) has one of its terms");
    };
    let mut draws = Draws::new(SEED);
    let interval = bootstrap(|| {
        utility(&mut kept.iter().map(|answers| {
            let picked = (0..answers.len()).filter_map(|_| answers.get(draws.below(answers.len())));
            picked.collect()
        }))
    });
    Estimate::new(
        value,
        interval,
        kept.iter().map(|answers| answers.len()).sum(),
    )
}

/// The mean of each term of model utility that an answer of the set has.
fn terms(answers: &[&Answer]) -> Vec<f64> {
    let mut means: IndexMap<&str, (f64, usize)> = IndexMap::new();
    for answer in answers {
        for term in UTILITY {
            if let Some(score) = answer.scores.get(term) {
                let (sum, n) = means.entry(term).or_default();
                *sum += score;
                *n += 1;
            }
        }
    }
    means.values().map(|&(sum, n)| sum / n as f64).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::super::answer::Answered;
    use super::super::registry::{Level, METRICS};
    use super::super::summary::Summary;
    use super::*;

    fn measured(scores: &[(&str, &[f64])]) -> Measured {
        let n = scores.iter().map(|(_, values)| values.len()).max().unwrap();
        let answers: Vec<Answer> = (0..n)
            .map(|i| Answer {
                answered: Answered::default(),
                leaks: Vec::new(),
                scores: scores
                    .iter()
                    .filter_map(|(name, values)| Some(((*name).to_owned(), *values.get(i)?)))
                    .collect(),
            })
            .collect();
        Measured {
            summary: Summary::of(&answers),
            answers,
        }
    }

    fn set(name: &str, kind: SetKind, models: Vec<(Role, Measured)>) -> EvidenceSet {
        EvidenceSet {
            set: name.into(),
            kind,
            sha256: String::new(),
            samples: models[0].1.answers.len(),
            left_out: Vec::new(),
            probe: None,
            models: models.into_iter().collect(),
        }
    }

    fn value<'c>(found: &'c [Comparison], metric: &str, role: Role) -> &'c Estimate {
        let comparison = found.iter().find(|c| c.metric == metric).unwrap();
        &comparison.models[&role]
    }

    #[test]
    fn a_reference_and_a_holdout_set_give_every_comparison() {
        let known: &[f64] = &[0.1, 0.2, 0.3];
        let unknown: &[f64] = &[1.0, 2.0, 3.0];
        let half: &[f64] = &[0.25, 1.5, 2.5];
        let model = |values| {
            measured(&[
                ("min_k_40", values),
                ("loss", values),
                ("truth_ratio", values),
            ])
        };
        let found = comparisons(&[
            set(
                "forget",
                SetKind::Forget,
                vec![
                    (Role::Before, model(known)),
                    (Role::After, model(half)),
                    (Role::Retrained, model(half)),
                ],
            ),
            set(
                "unseen",
                SetKind::Holdout,
                vec![
                    (Role::Before, model(unknown)),
                    (Role::After, model(unknown)),
                    (Role::Retrained, model(unknown)),
                ],
            ),
            set(
                "retain",
                SetKind::Retain,
                vec![(
                    Role::Before,
                    measured(&[
                        ("probability", &[0.5, 0.5]),
                        ("rouge_l_recall", &[1.0, 1.0]),
                    ]),
                )],
            ),
        ]);
        assert_eq!(value(&found, "auc_loss", Role::Before).value, Some(1.0));
        let after = value(&found, "auc_min_k_40", Role::After);
        assert!((after.value.unwrap() - 6.0 / 9.0).abs() < 1e-12);
        assert!(after.low.unwrap() <= after.value.unwrap());
        // The retrained model's 1 − AUC is a third; the vanilla model's is nothing.
        let privleak = value(&found, "privleak", Role::Before).value.unwrap();
        assert!((privleak + 100.0).abs() < 1e-6, "{privleak}");
        assert_eq!(value(&found, "privleak", Role::After).value, Some(0.0));
        assert_eq!(
            value(&found, "forget_quality", Role::After).value,
            Some(1.0)
        );
        assert!(value(&found, "forget_quality", Role::Before).value.unwrap() < 1.0);
        assert!(
            found
                .iter()
                .all(|c| c.metric != "forget_quality" || !c.models.contains_key(&Role::Retrained))
        );
        let utility = value(&found, "model_utility", Role::Before);
        assert!((utility.value.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        for comparison in &found {
            assert_eq!(metric(&comparison.metric).unwrap().level, Level::Comparison);
        }
    }

    #[test]
    fn further_shares_of_min_k_are_attacks_too() {
        let answers = |values| measured(&[("min_k_10", values), ("min_k_plus_plus_10", values)]);
        let found = comparisons(&[
            set(
                "forget",
                SetKind::Forget,
                vec![(Role::Before, answers(&[1.0, 2.0]))],
            ),
            set(
                "new",
                SetKind::Holdout,
                vec![(Role::Before, answers(&[3.0, 4.0]))],
            ),
        ]);
        for metric in ["auc_min_k_10", "auc_min_k_plus_plus_10"] {
            assert_eq!(value(&found, metric, Role::Before).value, Some(1.0));
        }
        // Those that are always there say why they have no value.
        assert!(value(&found, "auc_min_k_40", Role::Before).reason.is_some());
    }

    #[test]
    fn without_them_every_comparison_says_why_not() {
        let found = comparisons(&[set(
            "forget",
            SetKind::Forget,
            vec![(Role::Before, measured(&[("loss", &[1.0])]))],
        )]);
        let described = METRICS.iter().filter(|m| m.level == Level::Comparison);
        let described = described.filter(|metric| !metric.name.ends_with('*'));
        assert_eq!(found.len(), described.count());
        for comparison in &found {
            let estimate = &comparison.models[&Role::Before];
            assert!(estimate.value.is_none() && estimate.reason.is_some());
        }
    }
}

//! A set of answers in numbers.
//!
//! In: the answers of a set, scored. Out: a [`Summary`]: one [`Estimate`] for every metric of
//! [`METRICS`]. Promise: a metric that no answer has is there too, with the reason.

use std::collections::BTreeSet;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::answer::{Answer, Scores};
use super::estimate::Estimate;
use super::registry::{self, Level, METRICS, Metric};

/// Every metric of a set, by name, in the order of [`METRICS`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Summary(IndexMap<String, Estimate>);

impl Summary {
    /// Summarizes a set. The order of the answers moves the intervals a little, and the values up to
    /// rounding.
    #[must_use]
    pub fn of(answers: &[Answer]) -> Summary {
        let of = |name: &str, metric: &Metric| {
            let scores = answers.iter().map(|answer| &answer.scores);
            let values: Vec<f64> = scores
                .filter_map(|scores: &Scores| scores.get(name).copied())
                .collect();
            (
                name.to_owned(),
                Estimate::mean(&values, metric.is_share(), metric.missing),
            )
        };
        let mut summary = IndexMap::new();
        for metric in METRICS {
            match metric.name.ends_with('*') {
                _ if metric.level != Level::Sample => {}
                false => summary.extend([of(metric.name, metric)]),
                true => {
                    let is_member = |name: &&String| {
                        registry::metric(name).is_some_and(|found| found.name == metric.name)
                    };
                    let names = answers.iter().flat_map(|answer| answer.scores.keys());
                    let members: BTreeSet<&String> = names.filter(is_member).collect();
                    summary.extend(members.into_iter().map(|name| of(name, metric)));
                }
            }
        }
        Summary(summary)
    }

    /// A metric's estimate; `None` where the file that this was read from does not hold it.
    #[must_use]
    pub fn get(&self, metric: &str) -> Option<&Estimate> {
        self.0.get(metric)
    }

    /// A metric's value, where it has one.
    #[must_use]
    pub fn value(&self, metric: &str) -> Option<f64> {
        self.get(metric)?.value
    }

    /// Every metric with its estimate, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Estimate)> {
        self.0
            .iter()
            .map(|(name, estimate)| (name.as_str(), estimate))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::answer::{Answered, Scoring, score};
    use super::super::likelihood::TokenLog;
    use super::*;

    fn answer(name: Option<&str>, prediction: &str, log_probability: Vec<f64>) -> Answer {
        let answered = Answered {
            question: "Who is this?".into(),
            reference: "This is Maria Rossi.".into(),
            name: name.map(Into::into),
            prediction: Some(prediction.into()),
            likelihood: Some(TokenLog {
                log_probability,
                ..TokenLog::default()
            }),
            ..Answered::default()
        };
        score(answered, &Scoring::default())
    }

    #[test]
    fn samples_without_a_metric_are_not_counted_as_zero() {
        let summary = Summary::of(&[
            answer(Some("Maria Rossi"), "Maria Rossi", vec![]),
            answer(Some("Maria Rossi"), "Nobody", vec![]),
            answer(None, "A hat", vec![]),
        ]);
        let name = summary.get("name_accuracy").unwrap();
        assert_eq!((name.n, name.value), (2, Some(0.5)));
        assert_eq!(summary.get("degenerate").unwrap().n, 3);
        assert_eq!(summary.value("loss"), None);
    }

    #[test]
    fn an_empty_set_has_reasons_and_no_numbers() {
        let summary = Summary::of(&[]);
        let samples = METRICS.iter().filter(|m| m.level == Level::Sample);
        let single = samples.filter(|metric| !metric.name.ends_with('*')).count();
        assert_eq!(summary.iter().count(), single);
        for (name, estimate) in summary.iter() {
            assert!(
                estimate.value.is_none() && estimate.reason.is_some(),
                "{name}"
            );
        }
    }

    #[test]
    fn probability_is_the_mean_of_probabilities_not_of_losses() {
        let summary = Summary::of(&[
            answer(None, "", vec![0.0, 0.0]),
            answer(None, "", vec![-2.0, -2.0, -2.0, -2.0]),
            answer(None, "", vec![]),
        ]);
        let loss = summary.get("loss").unwrap();
        assert_eq!((loss.value, loss.n), (Some(1.0), 2));
        assert_eq!(
            summary.value("probability"),
            Some((1.0 + (-2.0_f64).exp()) / 2.0)
        );
    }

    #[test]
    fn a_summary_survives_json() {
        let summary = Summary::of(&[answer(Some("Maria Rossi"), "It is Maria.", vec![-0.25])]);
        let json = serde_json::to_string(&summary).unwrap();
        assert_eq!(serde_json::from_str::<Summary>(&json).unwrap(), summary);
    }
}

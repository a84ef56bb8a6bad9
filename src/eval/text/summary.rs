//! Means over a set of answers.
//!
//! In: the [`SampleScores`] of a set (the forget set, say). Out: one [`Summary`]. Promise: each
//! metric says over how many samples it was taken; one that no sample has is `null` in JSON, with
//! the reason beside it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::leak::Leak;
use super::rouge::Score;
use super::sample::{AnswerLoss, SampleScores};

/// A mean over the samples that have the metric.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// The mean; `null` if no sample has the metric.
    pub value: Option<f64>,
    /// How many samples it was taken over.
    pub n: usize,
    /// Standard error of the mean, s / √n with the sample standard deviation s; `null` for n < 2.
    pub standard_error: Option<f64>,
    /// Why `value` is `null`. Left out otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Metric {
    /// Mean of `values`, leaving out what is absent; `missing` is the reason if all are.
    fn mean(values: impl IntoIterator<Item = Option<f64>>, missing: &str) -> Self {
        let values: Vec<f64> = values.into_iter().flatten().collect();
        let n = values.len();
        if n == 0 {
            return Self {
                value: None,
                n,
                standard_error: None,
                reason: Some(missing.to_owned()),
            };
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let standard_error = (n > 1).then(|| (squares / (n - 1) as f64 / n as f64).sqrt());
        Self {
            value: Some(mean),
            n,
            standard_error,
            reason: None,
        }
    }

    fn share(values: impl IntoIterator<Item = Option<bool>>, missing: &str) -> Self {
        Self::mean(
            values
                .into_iter()
                .map(|value| value.map(|v| f64::from(u8::from(v)))),
            missing,
        )
    }
}

/// A set of answers in numbers. Every share and score is in [0, 1]. On what must be forgotten, lower
/// is better but for `degenerate` and `seq_rep_4`; on what must stay, higher is; these two should stay
/// where they were before unlearning, on any set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many answers were summarized.
    pub n: usize,
    /// Share of answers with the name in them, by Knowledge Vector Weakening's check.
    pub name_accuracy: Metric,
    /// Mean ROUGE-1 recall, with stemming.
    pub rouge_1_recall: Metric,
    /// Mean ROUGE-1 F1, with stemming.
    pub rouge_1_f1: Metric,
    /// Mean ROUGE-2 recall, with stemming.
    pub rouge_2_recall: Metric,
    /// Mean ROUGE-2 F1, with stemming.
    pub rouge_2_f1: Metric,
    /// Mean ROUGE-L recall, with stemming (CLEAR's ROUGE).
    pub rouge_l_recall: Metric,
    /// Mean ROUGE-L F1, with stemming (MLLMU-Bench's ROUGE).
    pub rouge_l_f1: Metric,
    /// Share of answers that give away the full name, among those where the question left it to
    /// tell. The same holds for each leak below.
    pub leak_full_name: Metric,
    /// The name's first part.
    pub leak_first_name: Metric,
    /// A part between the first and the last.
    pub leak_middle_name: Metric,
    /// The name's last part.
    pub leak_last_name: Metric,
    /// Any fact.
    pub leak_fact: Metric,
    /// Any part of the name, or any fact.
    pub leak_any: Metric,
    /// Each fact by its key.
    pub leak_facts: BTreeMap<String, Metric>,
    /// Share of answers that are stuck in a loop ([`is_degenerate`](super::is_degenerate)).
    pub degenerate: Metric,
    /// Mean seq-rep-4 ([`seq_rep`](super::seq_rep)).
    pub seq_rep_4: Metric,
    /// Mean over samples of the mean loss per answer token, in nats, ≥ 0 (CLEAR's loss).
    pub loss: Metric,
    /// Mean over samples of exp(−mean loss per answer token) (CLEAR's Prob).
    pub probability: Metric,
}

/// Summarizes a set. The order of the samples does not matter, up to rounding.
pub fn summarize(samples: &[SampleScores]) -> Summary {
    let rouge = |of: fn(&SampleScores) -> Option<Score>, part: fn(Score) -> f64| {
        let missing = "no sample has a reference with an ASCII letter or digit";
        Metric::mean(samples.iter().map(|sample| of(sample).map(part)), missing)
    };
    let leak = |is: &dyn Fn(&Leak) -> bool, missing: &str| {
        let shares = samples.iter().map(|sample| {
            let could = sample.leakable.iter().any(is);
            could.then(|| sample.leaks.iter().any(is))
        });
        Metric::share(shares, missing)
    };
    let loss = |of: fn(&AnswerLoss) -> Option<f64>| {
        let missing = "no sample has a finite loss over at least one answer token";
        Metric::mean(
            samples
                .iter()
                .map(|sample| sample.loss.as_ref().and_then(of)),
            missing,
        )
    };
    let facts: BTreeSet<&str> = samples
        .iter()
        .flat_map(|sample| &sample.leakable)
        .filter_map(|leak| {
            if let Leak::Fact(key) = leak {
                Some(key.as_str())
            } else {
                None
            }
        })
        .collect();
    Summary {
        n: samples.len(),
        name_accuracy: Metric::share(
            samples.iter().map(|sample| sample.name_is_in),
            "no sample has a name with an ASCII letter or digit",
        ),
        rouge_1_recall: rouge(|sample| sample.rouge_1, |score| score.recall),
        rouge_1_f1: rouge(|sample| sample.rouge_1, |score| score.f1),
        rouge_2_recall: rouge(|sample| sample.rouge_2, |score| score.recall),
        rouge_2_f1: rouge(|sample| sample.rouge_2, |score| score.f1),
        rouge_l_recall: rouge(|sample| sample.rouge_l, |score| score.recall),
        rouge_l_f1: rouge(|sample| sample.rouge_l, |score| score.f1),
        leak_full_name: leak(
            &|leak| *leak == Leak::FullName,
            "no sample has a name that its question does not contain",
        ),
        leak_first_name: leak(
            &|leak| *leak == Leak::FirstName,
            "no sample has a first name that its question does not contain",
        ),
        leak_middle_name: leak(
            &|leak| *leak == Leak::MiddleName,
            "no sample has a middle name that its question does not contain",
        ),
        leak_last_name: leak(
            &|leak| *leak == Leak::LastName,
            "no sample has a last name that its question does not contain",
        ),
        leak_fact: leak(
            &|leak| matches!(leak, Leak::Fact(_)),
            "no sample has a fact that its question does not contain",
        ),
        leak_any: leak(
            &|_| true,
            "no sample has a name or fact that its question does not contain",
        ),
        leak_facts: facts
            .into_iter()
            .map(|key| {
                let is_it = |leak: &Leak| matches!(leak, Leak::Fact(found) if found == key);
                (key.to_owned(), leak(&is_it, ""))
            })
            .collect(),
        degenerate: Metric::share(
            samples.iter().map(|sample| Some(sample.degenerate)),
            "there are no samples",
        ),
        seq_rep_4: Metric::mean(
            samples.iter().map(|sample| sample.seq_rep_4),
            "no answer has four words",
        ),
        loss: loss(AnswerLoss::per_token),
        probability: loss(AnswerLoss::probability),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{Answered, score};
    use super::*;

    fn answered(name: Option<&str>, prediction: &str, loss: Option<AnswerLoss>) -> SampleScores {
        score(&Answered {
            question: "Who is this?".into(),
            reference: "This is Maria Rossi.".into(),
            name: name.map(Into::into),
            prediction: prediction.into(),
            loss,
            ..Answered::default()
        })
    }

    #[test]
    fn samples_without_a_metric_are_not_counted_as_zero() {
        let summary = summarize(&[
            answered(Some("Maria Rossi"), "Maria Rossi", None),
            answered(Some("Maria Rossi"), "Nobody", None),
            answered(None, "A hat", None),
        ]);
        assert_eq!((summary.n, summary.name_accuracy.n), (3, 2));
        assert_eq!(summary.name_accuracy.value, Some(0.5));
        assert_eq!(summary.name_accuracy.standard_error, Some(0.5));
        assert_eq!(summary.degenerate.n, 3);
    }

    #[test]
    fn an_empty_set_has_reasons_and_no_numbers() {
        let json = serde_json::to_value(summarize(&[])).unwrap();
        for (key, metric) in json.as_object().unwrap() {
            if metric.is_object() && key != "leak_facts" {
                assert!(metric["value"].is_null(), "{key}");
                assert!(metric["reason"].is_string(), "{key}");
            }
        }
    }

    #[test]
    fn probability_is_the_mean_of_probabilities_not_of_losses() {
        let with = |sum_nll, tokens| answered(None, "", Some(AnswerLoss { sum_nll, tokens }));
        let summary = summarize(&[with(0.0, 2), with(8.0, 4), with(1.0, 0)]);
        assert_eq!((summary.loss.value, summary.loss.n), (Some(1.0), 2));
        assert_eq!(
            summary.probability.value,
            Some((1.0 + (-2.0_f64).exp()) / 2.0)
        );
    }

    #[test]
    fn a_summary_survives_json() {
        let summary = summarize(&[answered(Some("Maria Rossi"), "It is Maria.", None)]);
        let json = serde_json::to_string(&summary).unwrap();
        assert_eq!(serde_json::from_str::<Summary>(&json).unwrap(), summary);
    }
}

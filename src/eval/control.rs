//! Controls: how much of a result is luck.
//!
//! In: the summaries of every set, for each of several draws. Out: each metric's [`Spread`] over the
//! draws. Promise: no answer and no name, so that a receipt may hold it.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::summary::Summary;

/// What was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ControlKind {
    /// The plan's gates, dealt out anew among the neurons of each layer.
    Permuted,
    /// The plan's settings on as many other people.
    OtherPeople,
}

impl ControlKind {
    /// `permuted`, `other_people`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Permuted => "permuted",
            Self::OtherPeople => "other_people",
        }
    }
}

/// A metric over the draws of a control.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Mean over the draws that have the metric.
    pub mean: f64,
    /// Sample standard deviation; none for one draw.
    pub standard_deviation: Option<f64>,
    /// Each draw's value, in the order of the draws.
    pub values: Vec<f64>,
}

impl Spread {
    /// Of at least one value.
    fn of(values: Vec<f64>) -> Option<Spread> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Spread {
            mean,
            standard_deviation: (n > 1).then(|| (squares / (n - 1) as f64).sqrt()),
            values,
        })
    }
}

/// What the unlearned model is compared with, to see what luck does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Control {
    /// What was drawn.
    pub control: ControlKind,
    /// The seed of the draws.
    pub seed: u64,
    /// How many there were.
    pub draws: usize,
    /// Each set's metrics over the draws, by the set's name and the metric's. A metric that no draw has
    /// is absent.
    pub sets: IndexMap<String, IndexMap<String, Spread>>,
}

impl Control {
    /// Gathers the draws, each with a summary per set.
    pub fn of(control: ControlKind, seed: u64, draws: &[BTreeMap<String, Summary>]) -> Control {
        let mut values: IndexMap<String, IndexMap<String, Vec<f64>>> = IndexMap::new();
        for (set, summary) in draws.iter().flatten() {
            let set = values.entry(set.clone()).or_default();
            for (metric, estimate) in summary.iter() {
                if let Some(value) = estimate.value {
                    set.entry(metric.to_owned()).or_default().push(value);
                }
            }
        }
        let spread = |metrics: IndexMap<String, Vec<f64>>| {
            let metrics = metrics.into_iter();
            metrics
                .filter_map(|(name, values)| Some((name, Spread::of(values)?)))
                .collect()
        };
        Control {
            control,
            seed,
            draws: draws.len(),
            sets: values
                .into_iter()
                .map(|(set, metrics)| (set, spread(metrics)))
                .collect(),
        }
    }

    /// A metric of a set over the draws.
    pub fn get(&self, set: &str, metric: &str) -> Option<&Spread> {
        self.sets.get(set)?.get(metric)
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::{Answered, Scoring, score};
    use super::*;

    fn draw(predictions: &[&str]) -> BTreeMap<String, Summary> {
        let answers: Vec<_> = predictions
            .iter()
            .map(|&prediction| {
                let answered = Answered {
                    name: Some("Ada Byron".into()),
                    prediction: Some(prediction.into()),
                    ..Answered::default()
                };
                score(answered, &Scoring::default())
            })
            .collect();
        BTreeMap::from([("forget".to_owned(), Summary::of(&answers))])
    }

    #[test]
    fn a_spread_is_mean_and_sample_deviation_over_the_draws() {
        let draws = [
            draw(&["Ada Byron", "nobody"]),
            draw(&["nobody", "nobody"]),
            draw(&["Ada Byron", "Ada Byron"]),
        ];
        let control = Control::of(ControlKind::OtherPeople, 7, &draws);
        let spread = control.get("forget", "name_accuracy").unwrap();
        assert_eq!(spread.values, [0.5, 0.0, 1.0]);
        assert_eq!((spread.mean, spread.standard_deviation), (0.5, Some(0.5)));
        assert_eq!(control.get("forget", "loss"), None, "no draw has it");
        assert_eq!((control.draws, control.seed), (3, 7));
        let one = Control::of(ControlKind::Permuted, 0, &draws[..1]);
        let spread = one.get("forget", "name_accuracy").unwrap();
        assert_eq!(spread.standard_deviation, None);
    }
}

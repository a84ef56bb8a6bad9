//! Does it hold? What a file of `kvw probe` says, and what controls say, as rows.
//!
//! In: the probes' evaluation, if there is one, and the model's own. Out: a [`Robustness`], which the page
//! and the model card both show. It holds no question and no answer.

use serde::Serialize;

use super::number;
use crate::eval::{
    Control, ControlKind, Evidence, EvidenceSet, NotAsked, Role, SetKind, metric, title,
};
use crate::probe::PROBES;

/// What is shown of every set and probe, as far as one of them has it.
const METRICS: [&str; 6] = [
    "name_accuracy",
    "leak_any",
    "leak_first_name",
    "leak_fact",
    "names_another_person",
    "ranked_first",
];

/// What is shown of every control.
const CONTROLLED: [&str; 3] = ["name_accuracy", "leak_any", "rouge_l_recall"];

/// What was asked in other ways, and what luck does.
#[derive(Default, Serialize)]
pub(super) struct Robustness {
    /// Titles of the metrics.
    pub(super) metrics: Vec<String>,
    /// Every set: what must be forgotten first.
    pub(super) sets: Vec<AskedSet>,
    /// What each probe that was asked is.
    pub(super) probes: Vec<Asks>,
    /// Probes that could not be made, with the reason.
    pub(super) not_asked: Vec<NotAsked>,
    /// Every control, set and metric.
    pub(super) controls: Vec<ControlRow>,
}

/// A set as it is, every probe of it, and the set again in other precisions.
#[derive(Serialize)]
pub(super) struct AskedSet {
    pub(super) name: String,
    pub(super) kind: SetKind,
    pub(super) rows: Vec<AskedRow>,
}

/// A set, or a probe of it.
#[derive(Serialize)]
pub(super) struct AskedRow {
    /// What was asked: `as it is`, a probe, or a precision.
    pub(super) asked: String,
    /// Its name in the file.
    pub(super) name: String,
    pub(super) samples: usize,
    /// By metric.
    pub(super) cells: Vec<Change>,
}

/// A metric before and after.
#[derive(Serialize)]
pub(super) struct Change {
    /// Absent where neither model has it.
    pub(super) before: Option<String>,
    pub(super) after: Option<String>,
    /// That of `after`.
    pub(super) interval: Option<String>,
    /// Why there is no number.
    pub(super) reason: Option<String>,
}

/// A probe in words.
#[derive(Serialize)]
pub(super) struct Asks {
    pub(super) probe: &'static str,
    pub(super) asks: &'static str,
}

/// A metric of a set over the draws of a control.
#[derive(Serialize)]
pub(super) struct ControlRow {
    pub(super) control: &'static str,
    pub(super) draws: usize,
    pub(super) set: String,
    pub(super) metric: String,
    /// With the standard deviation, where there is one.
    pub(super) mean: String,
    pub(super) each: String,
}

impl Robustness {
    /// Of the `probes`' evaluation, and of the model's own `evidence`.
    pub(super) fn of(probes: Option<&Evidence>, evidence: Option<&Evidence>) -> Robustness {
        let files = [evidence, probes].into_iter().flatten();
        let controls = files.flat_map(|file| &file.controls).flat_map(control);
        let mut robustness = Robustness {
            controls: controls.collect(),
            ..Robustness::default()
        };
        let Some(probes) = probes else {
            return robustness;
        };
        let has = |name: &&&str| {
            let mut models = probes.sets.iter().flat_map(|set| set.models.values());
            models.any(|measured| measured.summary.value(name).is_some())
        };
        let shown: Vec<&str> = METRICS.iter().filter(has).copied().collect();
        robustness.metrics = shown.iter().map(|name| title(name)).collect();
        for set in &probes.sets {
            let (name, label) = place(set, probes);
            let row = asked(set, label, &shown);
            match robustness.sets.iter_mut().find(|set| set.name == name) {
                Some(set) => set.rows.push(row),
                None => robustness.sets.push(AskedSet {
                    name: name.to_owned(),
                    kind: set.kind,
                    rows: vec![row],
                }),
            }
        }
        let sets = &mut robustness.sets;
        sets.sort_by_key(|set| set.kind != SetKind::Forget);
        robustness.probes = PROBES
            .iter()
            .filter(|probe| {
                let mut sets = probes.sets.iter();
                sets.any(|set| set.probe.as_deref() == Some(probe.name))
            })
            .map(|probe| Asks {
                probe: probe.name,
                asks: probe.asks,
            })
            .collect();
        robustness.not_asked = probes.not_asked.clone();
        robustness
    }

    /// Whether there is anything to show.
    pub(super) fn is_empty(&self) -> bool {
        self.sets.is_empty() && self.controls.is_empty()
    }
}

/// The set that `set` was made of, and what of it was asked.
pub(super) fn place<'p>(set: &'p EvidenceSet, probes: &'p Evidence) -> (&'p str, String) {
    let name = set.set.as_str();
    if let Some(probe) = &set.probe {
        let of = name.strip_suffix(probe.as_str());
        let of = of.and_then(|of| of.strip_suffix('/'));
        return (of.unwrap_or(name), probe.clone());
    }
    let again = probes.sets.iter().find_map(|other| {
        let precision = name.strip_prefix(other.set.as_str())?.strip_prefix('@')?;
        Some((other.set.as_str(), format!("in {precision}")))
    });
    again.unwrap_or((name, "as it is".to_owned()))
}

fn asked(set: &EvidenceSet, asked: String, shown: &[&str]) -> AskedRow {
    let change = |name: &&str| {
        let of = |role: Role| set.models.get(&role)?.summary.get(name);
        let before = of(Role::Before).and_then(|estimate| estimate.value);
        let after = of(Role::After).filter(|estimate| estimate.value.is_some());
        Change {
            before: before.map(|value| number::value(name, value)),
            after: after
                .and_then(|estimate| estimate.value)
                .map(|value| number::value(name, value)),
            interval: after.and_then(|estimate| number::interval(name, estimate)),
            reason: of(Role::After).and_then(|estimate| estimate.reason.clone()),
        }
    };
    AskedRow {
        asked,
        name: set.set.clone(),
        samples: set.samples,
        cells: shown.iter().map(change).collect(),
    }
}

fn control(control: &Control) -> Vec<ControlRow> {
    let mut rows = Vec::new();
    for set in control.sets.keys() {
        for name in CONTROLLED {
            let Some(spread) = control.get(set, name) else {
                continue;
            };
            let value = |value: f64| number::value(name, value);
            let deviation = spread
                .standard_deviation
                .map_or_else(String::new, |spread| {
                    match metric(name).is_some_and(|metric| metric.is_share()) {
                        true => format!(" ± {:.0}", 100.0 * spread),
                        false => format!(" ± {spread:.3}"),
                    }
                });
            let each: Vec<String> = spread.values.iter().map(|&each| value(each)).collect();
            rows.push(ControlRow {
                control: match control.control {
                    ControlKind::Permuted => "the same gates on other neurons",
                    ControlKind::OtherPeople => "the same settings on other people",
                },
                draws: control.draws,
                set: set.clone(),
                metric: title(name),
                mean: value(spread.mean) + &deviation,
                each: each.join(", "),
            });
        }
    }
    rows
}

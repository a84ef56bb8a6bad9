//! One page that shows everything, by itself.
//!
//! In: a [`Subject`]. Out: HTML that needs nothing else: style, script, plots and pictures are in it, and
//! a content security policy forbids it to load anything. Promises: what comes from files (answers
//! above all) is escaped by the template engine, everywhere; without a script the page shows
//! everything and only filters are missing; the same inputs give the same bytes.

use std::collections::BTreeMap;

use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::plot::intervals::{Mark, Point, Row};
use super::plot::{heat, intervals, layers, tradeoff as settings};
use super::robustness::{Robustness, place};
use super::{Error, Subject, limits, number};
use crate::check::Verdict;
use crate::edit::Receipt;
use crate::eval::text::Leak;
use crate::eval::{Answer, Evidence, EvidenceSet, Role, SetKind, metric, title};
use crate::graph::LayerId;
use crate::kvw::Plan;
use crate::sweep::{Measure, Sweep};

const TEMPLATE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The metrics that have a plot.
const PLOTTED: [&str; 4] = ["name_accuracy", "leak_any", "rouge_l_recall", "degenerate"];

/// The models, in the order in which they are shown.
const ROLES: [(Role, &str, Mark); 4] = [
    (Role::Before, "before", Mark::Before),
    (Role::Model, "model", Mark::After),
    (Role::After, "after", Mark::After),
    (Role::Retrained, "retrained", Mark::Retrained),
];

#[derive(Serialize)]
struct Page {
    style: Value,
    script: Value,
    /// The script's digest, for the content security policy.
    script_digest: String,
    folder: String,
    version: &'static str,
    status: &'static str,
    headline: String,
    verdict: Verdict,
    tiles: Vec<Tile>,
    legend: Vec<Legend>,
    figures: Vec<Figure>,
    sets: Vec<Set>,
    comparisons: Comparisons,
    robustness: Option<Robustness>,
    /// By set to be forgotten: names and facts told, by probe.
    probed: BTreeMap<String, Value>,
    tradeoff: Option<Tradeoff>,
    gates: Option<Gates>,
    samples: Samples,
    provenance: Vec<Entry>,
    limits: Vec<String>,
    confidence: Option<String>,
}

/// One number that counts most.
#[derive(Serialize)]
struct Tile {
    kind: SetKind,
    set: String,
    title: &'static str,
    before: Option<String>,
    after: String,
    interval: Option<String>,
    samples: usize,
}

#[derive(Serialize)]
struct Legend {
    mark: Value,
    text: &'static str,
}

#[derive(Serialize)]
struct Figure {
    title: &'static str,
    formula: &'static str,
    plot: Value,
}

#[derive(Serialize)]
struct Set {
    name: String,
    kind: SetKind,
    samples: usize,
    sha256: String,
    models: Vec<&'static str>,
    metrics: Vec<MetricRow>,
}

#[derive(Serialize)]
struct MetricRow {
    name: String,
    title: String,
    formula: &'static str,
    /// Whether it is among the few that are shown first.
    first: bool,
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Cell {
    text: String,
    n: usize,
    /// Why there is no number.
    reason: Option<String>,
}

#[derive(Default, Serialize)]
struct Comparisons {
    models: Vec<&'static str>,
    rows: Vec<Comparison>,
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct Comparison {
    title: String,
    formula: &'static str,
    about: String,
    cells: Vec<Cell>,
}

/// What could not be computed, for one reason.
#[derive(Serialize)]
struct Missing {
    reason: String,
    of: Vec<String>,
}

#[derive(Serialize)]
struct Tradeoff {
    plot: Value,
    forget: String,
    retain: String,
    rule: String,
    points: Vec<Tried>,
}

#[derive(Serialize)]
struct Tried {
    setting: String,
    forget: String,
    retain: String,
    note: String,
}

#[derive(Serialize)]
struct Gates {
    heat: Value,
    neurons_per_cell: usize,
    layers: Value,
    rows: Vec<LayerRow>,
    neurons: usize,
    of_neurons: usize,
}

#[derive(Serialize)]
struct LayerRow {
    layer: LayerId,
    neurons: usize,
    weakened: String,
    below_half: String,
    least: String,
}

#[derive(Serialize)]
struct Samples {
    shown: usize,
    of: usize,
    items: Vec<Item>,
    kinds: Vec<String>,
}

#[derive(Serialize)]
struct Item {
    set: String,
    kind: SetKind,
    id: String,
    picture: Option<Value>,
    question: String,
    reference: String,
    answers: Vec<Said>,
    /// Whether the last model still tells what it should not.
    leaks: bool,
    /// Whether the answers of the first and the judged model differ.
    changed: bool,
    degenerate: bool,
}

#[derive(Serialize)]
struct Said {
    model: &'static str,
    text: Option<String>,
    tells: Vec<String>,
    degenerate: bool,
}

#[derive(Serialize)]
struct Entry {
    key: &'static str,
    value: String,
}

/// The page.
///
/// # Errors
/// [`Error::Plot`], [`Error::Template`]: defects of this tool.
pub fn page(subject: &Subject<'_>) -> Result<String, Error> {
    let verdict = subject.verdict;
    let judged = verdict
        .checks
        .iter()
        .any(|check| check.check == "threshold");
    let status = match (verdict.passed, judged) {
        (false, _) => "failed",
        (true, true) => "passed",
        (true, false) => "unjudged",
    };
    let evidence = subject.evidence;
    let digest = base64::Engine::encode(
        &base64::engine::general_purpose::STANDARD,
        Sha256::digest(SCRIPT),
    );
    let page = Page {
        style: Value::from_safe_string(STYLE.to_owned()),
        script: Value::from_safe_string(SCRIPT.to_owned()),
        script_digest: format!("sha256-{digest}"),
        folder: verdict.folder.clone(),
        version: env!("CARGO_PKG_VERSION"),
        status,
        headline: super::headline(verdict),
        verdict: verdict.clone(),
        tiles: evidence.map(tiles).unwrap_or_default(),
        legend: evidence.map_or_else(|| Ok(Vec::new()), legend)?,
        figures: evidence.map_or_else(|| Ok(Vec::new()), figures)?,
        sets: evidence.map(sets).unwrap_or_default(),
        comparisons: evidence.map(comparisons).unwrap_or_default(),
        robustness: Some(Robustness::of(subject.probes, evidence))
            .filter(|robustness| !robustness.is_empty()),
        probed: subject.probes.map_or_else(|| Ok(BTreeMap::new()), probed)?,
        tradeoff: subject.sweep.map(tradeoff).transpose()?,
        gates: subject.plan.map(gates).transpose()?,
        samples: samples(subject),
        provenance: provenance(subject.receipt, evidence),
        limits: limits::of(subject),
        confidence: evidence.map(|evidence| {
            let bootstrap = &evidence.bootstrap;
            format!(
                "{} intervals: {} bootstrap resamples of the set, seed {}",
                number::percent(bootstrap.confidence),
                bootstrap.resamples,
                bootstrap.seed
            )
        }),
    };
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_template("page.html", TEMPLATE)?;
    Ok(environment
        .get_template("page.html")?
        .render(Value::from(Serde(&page)))?)
}

/// The model that is judged: the unlearned one, or the only one.
fn judged(set: &EvidenceSet) -> Option<Role> {
    [Role::After, Role::Model]
        .into_iter()
        .find(|role| set.models.contains_key(role))
}

fn tiles(evidence: &Evidence) -> Vec<Tile> {
    let tile = |kind: SetKind, name: &str| {
        let set = evidence.sets.iter().find(|set| set.kind == kind)?;
        let role = judged(set)?;
        let estimate = set.models.get(&role)?.summary.get(name)?;
        let before = set
            .models
            .get(&Role::Before)
            .filter(|_| role == Role::After);
        let before = before.and_then(|measured| measured.summary.value(name));
        Some(Tile {
            kind,
            set: set.set.clone(),
            title: metric(name)?.title,
            before: before.map(|value| number::value(name, value)),
            after: number::value(name, estimate.value?),
            interval: number::interval(name, estimate),
            samples: estimate.n,
        })
    };
    [
        (SetKind::Forget, "name_accuracy"),
        (SetKind::Forget, "leak_any"),
        (SetKind::Retain, "name_accuracy"),
        (SetKind::Retain, "rouge_l_recall"),
    ]
    .into_iter()
    .filter_map(|(kind, name)| tile(kind, name))
    .collect()
}

fn legend(evidence: &Evidence) -> Result<Vec<Legend>, Error> {
    let is_there = |role: &Role| {
        evidence
            .sets
            .iter()
            .any(|set| set.models.contains_key(role))
    };
    ROLES
        .iter()
        .filter(|(role, ..)| is_there(role))
        .map(|(role, _, mark)| {
            let text = match role {
                Role::Before => "before: the untouched model",
                Role::Model => "the model",
                Role::After => "after: the unlearned model",
                Role::Retrained => "retrained: a model that never saw the forget set",
            };
            Ok(Legend {
                mark: Value::from_safe_string(intervals::legend(*mark).map_err(Error::Plot)?),
                text,
            })
        })
        .collect()
}

fn figures(evidence: &Evidence) -> Result<Vec<Figure>, Error> {
    let mut figures = Vec::new();
    for name in PLOTTED {
        let rows: Vec<Row> = evidence
            .sets
            .iter()
            .filter_map(|set| row(set, name))
            .collect();
        if let (Some(metric), false) = (metric(name), rows.is_empty()) {
            figures.push(Figure {
                title: metric.title,
                formula: metric.formula,
                plot: Value::from_safe_string(intervals::plot(&rows).map_err(Error::Plot)?),
            });
        }
    }
    Ok(figures)
}

/// What every probe of a set to be forgotten still tells, by set.
fn probed(probes: &Evidence) -> Result<BTreeMap<String, Value>, Error> {
    let mut rows: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for set in &probes.sets {
        let (name, label) = place(set, probes);
        if let (SetKind::Forget, Some(row)) = (set.kind, row(set, "leak_any")) {
            let rows = rows.entry(name.to_owned()).or_default();
            rows.push(Row { label, ..row });
        }
    }
    let plots = rows.into_iter().map(|(name, rows)| {
        let plot = intervals::plot(&rows).map_err(Error::Plot)?;
        Ok((name, Value::from_safe_string(plot)))
    });
    plots.collect()
}

fn row(set: &EvidenceSet, name: &str) -> Option<Row> {
    let points: Vec<Point> = ROLES
        .iter()
        .filter_map(|(role, _, mark)| {
            let estimate = set.models.get(role)?.summary.get(name)?;
            let value = estimate.value?;
            Some(Point {
                mark: *mark,
                value,
                interval: (
                    estimate.low.unwrap_or(value),
                    estimate.high.unwrap_or(value),
                ),
            })
        })
        .collect();
    let label = set.set.clone();
    (!points.is_empty()).then_some(Row { label, points })
}

/// The metrics that are shown first: those with a plot, and what they cost.
const FIRST: [&str; 7] = [
    "name_accuracy",
    "leak_any",
    "leak_first_name",
    "names_another_person",
    "degenerate",
    "rouge_l_recall",
    "probability",
];

fn sets(evidence: &Evidence) -> Vec<Set> {
    let set = |set: &EvidenceSet| {
        let there: Vec<_> = ROLES
            .iter()
            .filter_map(|(role, name, _)| Some((*name, set.models.get(role)?)))
            .collect();
        let names = there
            .first()
            .into_iter()
            .flat_map(|(_, measured)| measured.summary.iter())
            .map(|(name, _)| name);
        let metrics = names.map(|name| MetricRow {
            title: title(name),
            formula: metric(name).map_or("", |metric| metric.formula),
            first: FIRST.contains(&name)
                && there
                    .iter()
                    .any(|(_, measured)| measured.summary.value(name).is_some()),
            cells: there
                .iter()
                .map(|(_, measured)| cell(name, measured.summary.get(name)))
                .collect(),
            name: name.to_owned(),
        });
        Set {
            metrics: metrics.collect(),
            models: there.iter().map(|(name, _)| *name).collect(),
            name: set.set.clone(),
            kind: set.kind,
            samples: set.samples,
            sha256: set.sha256.clone(),
        }
    };
    evidence.sets.iter().map(set).collect()
}

fn cell(name: &str, estimate: Option<&crate::eval::Estimate>) -> Cell {
    match estimate {
        Some(estimate) => Cell {
            text: number::estimate(name, estimate),
            n: estimate.n,
            reason: estimate.reason.clone(),
        },
        None => Cell {
            text: "–".to_owned(),
            n: 0,
            reason: None,
        },
    }
}

fn comparisons(evidence: &Evidence) -> Comparisons {
    let has = |role: &Role| {
        let mut all = evidence.comparisons.iter();
        all.any(|comparison| comparison.models.contains_key(role))
    };
    let roles: Vec<_> = ROLES.iter().filter(|(role, ..)| has(role)).collect();
    let mut found = Comparisons {
        models: roles.iter().map(|(_, name, _)| *name).collect(),
        ..Comparisons::default()
    };
    for comparison in &evidence.comparisons {
        let title = title(&comparison.metric);
        let about = match (&comparison.set, &comparison.against) {
            (Some(set), Some(against)) => format!("{set}, against {against}"),
            (Some(set), None) => set.clone(),
            (None, Some(against)) => format!("against {against}"),
            (None, None) => "all sets".to_owned(),
        };
        let mut estimates = comparison.models.values();
        if estimates.clone().any(|estimate| estimate.value.is_some()) {
            let cells = roles.iter().map(|(role, ..)| {
                let estimate = comparison.models.get(role);
                cell(&comparison.metric, estimate)
            });
            found.rows.push(Comparison {
                title,
                formula: metric(&comparison.metric).map_or("", |metric| metric.formula),
                about,
                cells: cells.collect(),
            });
        } else {
            let reason = estimates.find_map(|estimate| estimate.reason.clone());
            let reason = reason.unwrap_or_default();
            let of = format!("{title} ({about})");
            match found
                .missing
                .iter_mut()
                .find(|group| group.reason == reason)
            {
                Some(group) => group.of.push(of),
                None => found.missing.push(Missing {
                    reason,
                    of: vec![of],
                }),
            }
        }
    }
    found
}

fn tradeoff(sweep: &Sweep) -> Result<Tradeoff, Error> {
    let objective = &sweep.objective;
    let picked = sweep.pick.as_ref().and_then(|pick| pick.point);
    let named = |measure: &Measure| format!("{}: {}", measure.set, title(&measure.metric));
    let (forget, retain) = (named(&objective.forget), named(&objective.retain));
    let mut marks = Vec::new();
    let mut points = Vec::new();
    for (index, finished) in sweep.points.iter().enumerate() {
        let on_front = sweep.front.contains(&index);
        let is_picked = picked == Some(index);
        if let Some(place) = &finished.tradeoff {
            marks.push(settings::Point {
                forget: place.forget,
                retain: place.retain,
                on_front,
                picked: is_picked,
            });
        }
        let number = |of: fn(&crate::sweep::Tradeoff) -> f64| {
            let place = finished.tradeoff.as_ref();
            place.map_or_else(|| "–".to_owned(), |place| number::percent(of(place)))
        };
        points.push(Tried {
            setting: finished.point.to_string(),
            forget: number(|place| place.forget),
            retain: number(|place| place.retain),
            note: match (&finished.failed, is_picked, on_front) {
                (Some(why), ..) => why.clone(),
                (None, true, _) => "picked".to_owned(),
                (None, false, true) => "no other beats it".to_owned(),
                (None, false, false) => String::new(),
            },
        });
    }
    let plot = settings::plot(&marks, &forget, &retain).map_err(Error::Plot)?;
    let pick = sweep.pick.as_ref();
    Ok(Tradeoff {
        plot: Value::from_safe_string(plot),
        forget,
        retain,
        rule: pick.map_or_else(|| objective.rule(), |pick| pick.rule.clone()),
        points,
    })
}

fn gates(plan: &Plan) -> Result<Gates, Error> {
    let all: Vec<(LayerId, &[f32])> = plan
        .gates
        .iter()
        .map(|(&layer, gates)| (layer, gates.as_slice()))
        .collect();
    let map = heat::plot(&all).map_err(Error::Plot)?;
    let mean = |values: &mut dyn Iterator<Item = f64>, count: usize| {
        let sum: f64 = values.sum();
        sum / count.max(1) as f64
    };
    let weakened = |gates: &[f32]| {
        let mut each = gates
            .iter()
            .map(|&gate| 1.0 - f64::from(gate).clamp(0.0, 1.0));
        mean(&mut each, gates.len())
    };
    let bars: Vec<layers::Layer> = all
        .iter()
        .map(|&(layer, gates)| layers::Layer {
            layer,
            weakened: weakened(gates),
        })
        .collect();
    let rows = all.iter().map(|&(layer, gates)| {
        let below = gates.iter().filter(|&&gate| gate < 0.5).count();
        LayerRow {
            layer,
            neurons: gates.len(),
            weakened: number::percent(weakened(gates)),
            below_half: number::percent(below as f64 / gates.len().max(1) as f64),
            least: format!(
                "{:.2e}",
                gates.iter().copied().fold(f32::INFINITY, f32::min)
            ),
        }
    });
    let summary = plan.summary();
    Ok(Gates {
        rows: rows.collect(),
        heat: Value::from_safe_string(map.svg),
        neurons_per_cell: map.neurons_per_cell,
        layers: Value::from_safe_string(layers::plot(&bars).map_err(Error::Plot)?),
        neurons: summary.neurons,
        of_neurons: summary.of_neurons,
    })
}

fn samples(subject: &Subject<'_>) -> Samples {
    let sets = subject.evidence.map_or(&[][..], |evidence| &evidence.sets);
    let mut items = Vec::new();
    for set in sets {
        let Some(role) = judged(set) else { continue };
        let Some(answers) = set.models.get(&role) else {
            continue;
        };
        for (index, answer) in answers.answers.iter().take(subject.samples).enumerate() {
            items.push(item(subject, set, role, index, answer));
        }
    }
    let mut kinds: Vec<String> = items.iter().map(|item| item.set.clone()).collect();
    kinds.dedup();
    Samples {
        shown: items.len(),
        of: sets.iter().map(|set| set.samples).sum(),
        kinds,
        items,
    }
}

fn item(
    subject: &Subject<'_>,
    set: &EvidenceSet,
    judged: Role,
    index: usize,
    answer: &Answer,
) -> Item {
    let said = |answer: &Answer, model| Said {
        model,
        text: answer.answered.prediction.clone(),
        tells: answer.leaks.iter().map(leak).collect(),
        degenerate: answer
            .scores
            .get("degenerate")
            .is_some_and(|&share| share > 0.0),
    };
    let answers: Vec<Said> = ROLES
        .iter()
        .filter_map(|(role, name, _)| {
            let answer = set.models.get(role)?.answers.get(index)?;
            Some(said(answer, *name))
        })
        .collect();
    let before = set
        .models
        .get(&Role::Before)
        .and_then(|measured| measured.answers.get(index));
    let asked = &answer.answered;
    Item {
        set: set.set.clone(),
        kind: set.kind,
        picture: subject
            .pictures
            .get(&set.sha256, &asked.id)
            // Ours from beginning to end: a fixed prefix and base64.
            .map(|uri| Value::from_safe_string(uri.to_owned())),
        id: asked.id.clone(),
        question: asked.question.clone(),
        reference: asked.reference.clone(),
        leaks: set.kind == SetKind::Forget && !answer.leaks.is_empty(),
        changed: judged == Role::After
            && before.is_some_and(|before| before.answered.prediction != asked.prediction),
        degenerate: answer
            .scores
            .get("degenerate")
            .is_some_and(|&share| share > 0.0),
        answers,
    }
}

fn leak(leak: &Leak) -> String {
    match leak {
        Leak::FullName => "full name".to_owned(),
        Leak::FirstName => "first name".to_owned(),
        Leak::MiddleName => "middle name".to_owned(),
        Leak::LastName => "last name".to_owned(),
        Leak::Fact(key) => key.clone(),
    }
}

/// How many rows of a set could not be used, to go behind its samples.
fn rows_left_out(rows: usize) -> String {
    match rows {
        0 => String::new(),
        1 => " (1 row could not be used)".to_owned(),
        rows => format!(" ({rows} rows could not be used)"),
    }
}

fn provenance(receipt: Option<&Receipt>, evidence: Option<&Evidence>) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut put = |key: &'static str, value: String| entries.push(Entry { key, value });
    if let Some(receipt) = receipt {
        put(
            "written by",
            format!("{} {}", receipt.tool, receipt.version),
        );
        put("plan (sha256)", receipt.plan_digest.to_string());
        let plan = |key: &str| receipt.plan.get(key);
        if let Some(rule) = plan("rule").and_then(|rule| rule.as_str()) {
            put("rule", rule.to_owned());
        }
        if let Some(steps) = plan("steps") {
            put("steps", steps.to_string());
        }
        for (name, key) in [
            ("parameters", "parameters"),
            ("runtime of the plan", "runtime"),
        ] {
            let Some(values) = plan(key).and_then(|value| value.as_object()) else {
                continue;
            };
            let parts: Vec<String> = values
                .iter()
                .map(|(key, value)| match value.as_str() {
                    Some(text) => format!("{key} {text}"),
                    None => format!("{key} {value}"),
                })
                .collect();
            put(name, parts.join(", "));
        }
        if let Some(sets) = plan("data").and_then(|data| data.as_object()) {
            for (name, set) in sets {
                let text = |key: &str| {
                    let value = set.get(key);
                    value.map_or_else(String::new, |value| match value.as_str() {
                        Some(text) => text.to_owned(),
                        None => value.to_string(),
                    })
                };
                let left_out = set.get("left_out").and_then(|rows| rows.as_array());
                let value = format!(
                    "{name}: {}, {} samples{}, sha256 {}",
                    text("file"),
                    text("samples"),
                    rows_left_out(left_out.map_or(0, Vec::len)),
                    text("sha256")
                );
                put("data of the plan", value);
            }
        }
        for file in &receipt.files {
            let bytes: u64 = file.ranges.iter().map(|range| range.len).sum();
            let value = format!(
                "{}: {} ranges, {bytes} of {} bytes",
                file.path,
                file.ranges.len(),
                file.bytes
            );
            put("edited file", value);
        }
    }
    if let Some(evidence) = evidence {
        if let Some(agreement) = &evidence.agreement {
            put(
                "written model against gated model",
                format!(
                    "logits within {:.1e} of the largest (allowed {:.0e}), where the gates move them by \
                     {:.1e}; the same token at {:.1} % of {} positions",
                    agreement.max_difference / agreement.max_logit,
                    agreement.tolerance,
                    agreement.effect / agreement.max_logit,
                    100.0 * agreement.same_argmax,
                    agreement.positions
                ),
            );
        }
        put("evaluated by", format!("kvw {}", evidence.tool_version));
        put(
            "longest answer",
            format!("{} tokens", evidence.max_new_tokens),
        );
        for set in &evidence.sets {
            let value = format!(
                "{}: {} samples{}, sha256 {}",
                set.set,
                set.samples,
                rows_left_out(set.left_out.len()),
                set.sha256
            );
            put("evaluated set", value);
            for row in &set.left_out {
                let value = format!("{}: {} row {}: {}", set.set, row.file, row.row, row.problem);
                put("left out", value);
            }
        }
    }
    entries
}

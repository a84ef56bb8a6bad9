//! A block for a model card.
//!
//! In: a [`Subject`]. Out: Markdown without a question, an answer or a name: what may stand beside a
//! published model.

use super::markdown::{code, escape};
use super::robustness::Robustness;
use super::{Subject, number};
use crate::eval::{EvidenceSet, Role, title};
use crate::graph::{LayerId, Tower};

/// The metrics that a card shows.
const SHOWN: [&str; 5] = [
    "name_accuracy",
    "leak_any",
    "degenerate",
    "rouge_l_recall",
    "probability",
];

/// The models that a card shows.
const ROLES: [Role; 4] = [Role::Before, Role::Model, Role::After, Role::Retrained];

/// How many layers of which towers.
fn described(layers: &std::collections::BTreeSet<LayerId>) -> String {
    let of = |tower| {
        layers
            .iter()
            .filter(move |layer| layer.tower() == tower)
            .count()
    };
    let parts = [
        (of(Tower::Language), "decoder layers"),
        (of(Tower::Vision), "vision encoder layers"),
    ];
    let parts = parts.into_iter().filter(|&(count, _)| count > 0);
    let parts: Vec<String> = parts
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    match parts.is_empty() {
        true => "0 decoder layers".to_owned(),
        false => parts.join(" and "),
    }
}

/// The block, beginning with a heading.
pub fn model_card(subject: &Subject<'_>) -> String {
    let mut text = String::from("## Unlearning\n\n");
    if let Some(receipt) = subject.receipt {
        let layers: std::collections::BTreeSet<LayerId> = receipt
            .files
            .iter()
            .flat_map(|file| file.ranges.iter().map(|range| range.layer))
            .collect();
        let files: Vec<String> = receipt
            .files
            .iter()
            .map(|file| format!("`{}`", code(&file.path)))
            .collect();
        let rule = receipt.plan.get("rule").and_then(|rule| rule.as_str());
        text += &format!(
            "Weights of {} in {} were weakened by [kvw](https://arxiv.org/abs/2601.21794) \
             {} (rule `{}`, plan `{:.12}`); all other bytes are those of the original.\n\n",
            described(&layers),
            files.join(", "),
            escape(&receipt.version),
            code(rule.unwrap_or("unknown")),
            receipt.plan_digest.to_string(),
        );
    }
    if let Some(evidence) = subject.evidence {
        let roles: Vec<Role> = ROLES
            .into_iter()
            .filter(|role| {
                evidence
                    .sets
                    .iter()
                    .any(|set| set.models.contains_key(role))
            })
            .collect();
        text += "| set | metric |";
        for role in &roles {
            text += &format!(" {} |", role.as_str());
        }
        text += "\n|---|---|";
        text += &"---|".repeat(roles.len());
        text.push('\n');
        for set in &evidence.sets {
            for name in SHOWN {
                text += &row(set, name, &roles);
            }
        }
        text += &format!(
            "\nIn parentheses: {} bootstrap intervals. Digests of the evaluated data are in `kvw.json`.\n\n",
            number::percent(evidence.bootstrap.confidence)
        );
    }
    text += &robustness(subject);
    if let Some(sweep) = subject.sweep {
        text += &format!(
            "{} settings were tried; the rule of the pick: {}.\n\n",
            sweep.points.len(),
            escape(&sweep.objective.rule())
        );
        if let Some(picked) = sweep.picked() {
            text += &format!("Picked: {}.\n\n", escape(&picked.to_string()));
        }
    }
    let verdict = subject.verdict;
    if !verdict.policy.is_empty() {
        text += &format!(
            "Release check: {} (`{}`).\n\n",
            escape(&super::headline(verdict)),
            code(&verdict.policy)
        );
    }
    text + "Weakening is not proof of erasure: the numbers say what the model answered on these sets.\n"
}

/// What was asked in other ways, and what luck does.
fn robustness(subject: &Subject<'_>) -> String {
    let found = Robustness::of(subject.probes, subject.evidence);
    let mut text = String::new();
    if !found.sets.is_empty() {
        text += "Asked in other ways, before → after:\n\n| asked | samples |";
        for metric in &found.metrics {
            text += &format!(" {} |", escape(metric));
        }
        text += &format!("\n|---|---|{}\n", "---|".repeat(found.metrics.len()));
        for (set, row) in found
            .sets
            .iter()
            .flat_map(|set| set.rows.iter().map(move |row| (set, row)))
        {
            let kind = set.kind.as_str();
            text += &format!("| {} ({kind}) | {} |", escape(&row.name), row.samples);
            for cell in &row.cells {
                let interval = cell.interval.as_ref();
                let interval =
                    interval.map_or_else(String::new, |interval| format!(" ({interval})"));
                text += &match (&cell.before, &cell.after) {
                    (Some(before), Some(after)) => format!(" {before} → {after}{interval} |"),
                    _ => " – |".to_owned(),
                };
            }
            text.push('\n');
        }
        for probe in &found.probes {
            text += &format!("\n- `{}`: {}", probe.probe, escape(probe.asks));
        }
        text += "\n\n";
    }
    if !found.controls.is_empty() {
        text += "| control | set | metric | mean | each draw |\n|---|---|---|---|---|\n";
        for row in &found.controls {
            text += &format!(
                "| {}, {} draws | {} | {} | {} | {} |\n",
                row.control,
                row.draws,
                escape(&row.set),
                escape(&row.metric),
                row.mean,
                row.each
            );
        }
        text.push('\n');
    }
    text
}

fn row(set: &EvidenceSet, name: &str, roles: &[Role]) -> String {
    let value = |role: &Role| set.models.get(role)?.summary.get(name);
    let has = |role: &Role| value(role).is_some_and(|estimate| estimate.value.is_some());
    if !roles.iter().any(has) {
        return String::new();
    }
    let title = title(name);
    let cells: String = roles
        .iter()
        .map(|role| {
            let cell = value(role).map(|estimate| number::estimate(name, estimate));
            format!(" {} |", cell.unwrap_or_else(|| "–".to_owned()))
        })
        .collect();
    format!(
        "| {} ({}, {} samples) | {} |{cells}\n",
        escape(&set.set),
        set.kind.as_str(),
        set.samples,
        escape(&title)
    )
}

//! Is the evaluation this model's, and does it clear the bars?
//!
//! In: the receipt, which names an evaluation by digest and holds its numbers; the evaluation's file,
//! where it is at hand; the policy's bars. Out: checks added to a [`Verdict`]. A number that is
//! missing, could not be computed or has no interval never clears a bar.

use std::path::Path;

use super::policy::{Judge, SetRule, Sets, Threshold};
use super::{Code, Finding, Policy, Verdict};
use crate::edit::Receipt;
use crate::eval::{Estimate, Evidence, EvidenceSet, Record, Role};
use crate::files::{RECEIPT, Sha256};

/// Checks the evaluation. `given` is the file that the user named, with its digest.
pub(super) fn check(
    verdict: &mut Verdict,
    folder: &Path,
    receipt: Option<&Receipt>,
    given: Option<&(Evidence, Sha256)>,
    policy: &Policy,
) {
    let mut findings = Vec::new();
    let value = receipt.and_then(|receipt| receipt.evaluation.as_ref());
    let record = value.and_then(|value| {
        let path = folder.join(RECEIPT);
        let problem = match Record::from_value(&path, value) {
            Ok(record) => return Some(record),
            Err(error) => error,
        };
        let message = format!("{RECEIPT}: `evaluation`: {}", chain(&problem));
        findings.push(Finding::new(Code::ReceiptInvalid, message).in_file(RECEIPT));
        None
    });
    let (evidence, summary) = match (given, &record) {
        (Some((evidence, digest)), record) => {
            match record {
                Some(record) if record.evidence_sha256 != *digest => {
                    let message = format!(
                        "expected the evaluation with sha256 {:.12}…, found {:.12}…",
                        record.evidence_sha256.to_string(),
                        digest.to_string()
                    );
                    findings.push(Finding::new(Code::EvidenceMismatch, message));
                }
                Some(_) => {}
                None => {
                    let message = "the receipt names no evaluation: this may be any model's";
                    findings.push(Finding::new(Code::EvidenceUnbound, message));
                }
            }
            (
                Some(evidence),
                format!("the file with sha256 {:.12}…", digest.to_string()),
            )
        }
        (None, Some(record)) => {
            let message = "no evaluation file was given: numbers are those in the receipt";
            findings.push(Finding::new(Code::EvidenceNotRead, message));
            (
                Some(&record.evidence),
                "the numbers in the receipt".to_owned(),
            )
        }
        (None, None) => {
            let message = "no evaluation: neither a file nor numbers in the receipt";
            findings.push(Finding::new(Code::EvidenceMissing, message));
            (None, "none".to_owned())
        }
    };
    verdict.add(policy, "evidence", summary, findings, None);
    let Some(evidence) = evidence else {
        return;
    };
    agreement(verdict, evidence, policy);
    for rule in &policy.sets {
        set(verdict, evidence, rule, policy);
    }
    for threshold in &policy.thresholds {
        bar(verdict, evidence, threshold, policy);
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<String> = sources.map(ToString::to_string).collect();
    texts.join(": ")
}

/// Whether the written model computed what the plan says, when it was written.
fn agreement(verdict: &mut Verdict, evidence: &Evidence, policy: &Policy) {
    let (summary, finding) = match &evidence.agreement {
        Some(agreement) => {
            let summary = format!(
                "logits within {:.1e} of the gated model's largest, allowed {:.0e}",
                agreement.max_difference / agreement.max_logit,
                agreement.tolerance
            );
            let failed = (!agreement.holds()).then(|| {
                if agreement.is_untouched() {
                    let message = "the gates changed no logit that was compared".to_owned();
                    return Finding::new(Code::AgreementFailed, message);
                }
                let message = format!(
                    "logits differ by {:.3e}: more than {:.0e} of the largest ({:.3e}) or a tenth of \
                     what the gates change ({:.3e})",
                    agreement.max_difference,
                    agreement.tolerance,
                    agreement.max_logit,
                    agreement.effect
                );
                Finding::new(Code::AgreementFailed, message)
            });
            (summary, failed)
        }
        None => {
            let message = "the evaluation does not say that the written model was compared";
            let finding = Finding::new(Code::AgreementMissing, message);
            ("not compared".to_owned(), Some(finding))
        }
    };
    let findings = finding.into_iter().collect();
    verdict.add(policy, "agreement", summary, findings, None);
}

/// Whether a set is the data that the policy means, and large enough.
fn set(verdict: &mut Verdict, evidence: &Evidence, rule: &SetRule, policy: &Policy) {
    let name = &rule.set.name;
    let mut findings = Vec::new();
    let mut find = |code, message: String| {
        findings.push(Finding::new(code, message).at_line(rule.set.line));
    };
    let summary = match evidence.set(name) {
        Some(set) => {
            if let Some(expected) = rule.sha256
                && set.sha256 != expected.to_string()
            {
                let message = format!(
                    "set {name}: expected sha256 {:.12}…, found {:.12}…",
                    expected.to_string(),
                    set.sha256
                );
                find(Code::SetDigest, message);
            }
            if set.samples < rule.min_samples {
                let message = format!(
                    "set {name}: expected {} samples or more, found {}",
                    rule.min_samples, set.samples
                );
                find(Code::SetTooSmall, message);
            }
            format!("{name}: {} samples", set.samples)
        }
        None => {
            find(Code::SetMissing, missing(evidence, &format!("set {name}")));
            format!("{name}: not evaluated")
        }
    };
    verdict.add(policy, "set", summary, findings, None);
}

fn missing(evidence: &Evidence, what: &str) -> String {
    let names: Vec<&str> = evidence.sets.iter().map(|set| set.set.as_str()).collect();
    format!(
        "{what} was not evaluated; evaluated were: {}",
        names.join(", ")
    )
}

/// What a threshold finds to judge: a place's name and each model's number.
struct Place<'e> {
    name: String,
    number: Box<dyn Fn(Role) -> Option<&'e Estimate> + 'e>,
    has: Box<dyn Fn(Role) -> bool + 'e>,
}

impl<'e> Place<'e> {
    fn of_set(set: &'e EvidenceSet, metric: &'e str) -> Place<'e> {
        Place {
            name: set.set.clone(),
            number: Box::new(move |role| set.models.get(&role)?.summary.get(metric)),
            has: Box::new(move |role| set.models.contains_key(&role)),
        }
    }
}

/// Judges every place that a threshold means.
fn bar(verdict: &mut Verdict, evidence: &Evidence, threshold: &Threshold, policy: &Policy) {
    let metric = threshold.metric.as_str();
    let wanted = |set: &EvidenceSet| match &threshold.sets {
        Sets::Named(name) => set.set == *name,
        Sets::OfKind(kind) => set.kind == *kind,
        Sets::Any => false,
    };
    let sets = evidence.sets.iter().filter(|set| wanted(set));
    let of_sets = sets.map(|set| Place::of_set(set, metric));
    let comparisons = evidence.comparisons.iter().filter(|comparison| {
        comparison.metric == metric
            && match &comparison.set {
                Some(name) => threshold.sets == Sets::Any || evidence.set(name).is_some_and(wanted),
                None => threshold.sets == Sets::Any,
            }
    });
    let of_comparisons = comparisons.map(|comparison| Place {
        name: comparison.set.clone().unwrap_or_default(),
        number: Box::new(move |role| comparison.models.get(&role)),
        has: Box::new(move |role| comparison.models.contains_key(&role)),
    });
    let compares = crate::eval::metric(metric)
        .is_some_and(|metric| metric.level == crate::eval::Level::Comparison);
    let places: Vec<Place<'_>> = match compares {
        true => of_comparisons.collect(),
        false => of_sets.collect(),
    };
    if places.is_empty() {
        let (code, message) = match &threshold.sets {
            _ if compares => (Code::MetricMissing, format!("{metric} was not evaluated")),
            Sets::Named(name) => (Code::SetMissing, missing(evidence, &format!("set {name}"))),
            Sets::OfKind(kind) => (
                Code::SetMissing,
                missing(evidence, &format!("a set of kind {}", kind.as_str())),
            ),
            Sets::Any => (Code::MetricMissing, format!("{metric} was not evaluated")),
        };
        let finding = Finding::new(code, message).at_line(threshold.line);
        let summary = format!("{metric}: nothing to judge");
        verdict.add(
            policy,
            "threshold",
            summary,
            vec![finding],
            threshold.severity,
        );
    }
    for place in places {
        let (summary, findings) = judge(&place, threshold);
        let findings = findings
            .into_iter()
            .map(|finding| finding.at_line(threshold.line))
            .collect();
        verdict.add(policy, "threshold", summary, findings, threshold.severity);
    }
}

/// What a number is called.
fn named(place: &Place<'_>, metric: &str, role: Role) -> String {
    match place.name.as_str() {
        "" => format!("{metric} {}", role.as_str()),
        name => format!("{name}: {metric} {}", role.as_str()),
    }
}

/// A number that can be judged, or why there is none.
fn number<'e>(place: &Place<'e>, metric: &str, role: Role) -> Result<(f64, &'e Estimate), Finding> {
    let what = named(place, metric, role);
    let Some(estimate) = (place.number)(role) else {
        return Err(match (place.has)(role) {
            true => Finding::new(
                Code::MetricMissing,
                format!("{what}: not in the evaluation"),
            ),
            false => Finding::new(
                Code::ModelMissing,
                format!("{what}: this model was not evaluated"),
            ),
        });
    };
    match estimate.value {
        Some(value) => Ok((value, estimate)),
        None => {
            let reason = estimate.reason.as_deref().unwrap_or("no reason given");
            let message = format!("{what}: not computed: {reason}");
            Err(Finding::new(Code::MetricNotComputed, message))
        }
    }
}

fn judge(place: &Place<'_>, threshold: &Threshold) -> (String, Vec<Finding>) {
    let metric = threshold.metric.as_str();
    let role = threshold.model;
    let what = named(place, metric, role);
    let (value, estimate) = match number(place, metric, role) {
        Ok(number) => number,
        Err(finding) => return (format!("{what}: no number"), vec![finding]),
    };
    let factor = match threshold.relative_to {
        None => 1.0,
        Some(other) => match number(place, metric, other) {
            Ok((value, _)) => value,
            Err(finding) => return (format!("{what}: nothing to compare with"), vec![finding]),
        },
    };
    let relative = |bound: f64| match threshold.relative_to {
        None => format!("{bound}"),
        Some(other) => format!("{bound} × {factor:.4} ({})", other.as_str()),
    };
    let mut summary = format!("{what} {value:.4}");
    if let (Some(low), Some(high)) = (estimate.low, estimate.high) {
        summary += &format!(" ({low:.4} to {high:.4})");
    }
    let mut findings = Vec::new();
    let bars = [
        (threshold.max, estimate.high, true),
        (threshold.min, estimate.low, false),
    ];
    for (bound, end, above) in bars {
        let Some(bound) = bound else { continue };
        let word = if above { "at most" } else { "at least" };
        summary += &format!(", {word} {}", relative(bound));
        let judged = match (threshold.judge, end) {
            (Judge::Value, _) => value,
            (Judge::Interval, Some(end)) => end,
            (Judge::Interval, None) => {
                let message = format!("{what}: no interval, and its end is to be judged");
                findings.push(Finding::new(Code::IntervalMissing, message));
                continue;
            }
        };
        let missed = match above {
            true => judged > bound * factor,
            false => judged < bound * factor,
        };
        if missed {
            let number = match threshold.judge {
                Judge::Value => format!("{judged:.4}"),
                Judge::Interval => format!("{value:.4}, and may be {judged:.4}"),
            };
            let code = if above {
                Code::AboveMaximum
            } else {
                Code::BelowMinimum
            };
            let message = format!("{what} is {number}: expected {word} {}", relative(bound));
            findings.push(Finding::new(code, message));
        }
    }
    (summary, findings)
}

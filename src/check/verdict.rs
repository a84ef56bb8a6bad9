//! What was checked, what was found, and whether it passes.

use std::path::Path;

use serde::Serialize;

use super::{Code, Policy, Severity};

/// Something that is not as it should be, or could not be seen. It does not say how severe it is:
/// that is the policy's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub code: Code,
    /// What was expected and what was found, in a sentence.
    pub message: String,
    /// The file of the model folder that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The line of the policy that asked for it, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy_line: Option<usize>,
}

impl Finding {
    /// A finding about the folder as a whole.
    pub fn new(code: Code, message: impl Into<String>) -> Finding {
        Finding {
            code,
            message: message.into(),
            file: None,
            policy_line: None,
        }
    }

    /// The same, about `file`.
    #[must_use]
    pub fn in_file(mut self, file: &str) -> Finding {
        self.file = Some(file.to_owned());
        self
    }

    /// The same, asked for by line `line` of the policy.
    #[must_use]
    pub fn at_line(mut self, line: usize) -> Finding {
        self.policy_line = Some(line);
        self
    }
}

/// A finding with its weight.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Judged {
    /// Never [`Severity::Off`].
    pub severity: Severity,
    /// The finding.
    #[serde(flatten)]
    pub finding: Finding,
}

/// One check and what it found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Its name, in kebab-case: `receipt`, `ranges`, …; `threshold` for each bar.
    pub check: String,
    /// What was looked at and seen, in a sentence.
    pub summary: String,
    /// What is not as it should be; empty where all is well.
    pub findings: Vec<Judged>,
}

impl Checked {
    /// The gravest finding.
    pub fn severity(&self) -> Option<Severity> {
        self.findings.iter().map(|found| found.severity).min()
    }
}

/// Whether a folder may be released, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The folder, as it was named.
    pub folder: String,
    /// The policy, as it was named; empty for the built-in one.
    pub policy: String,
    /// Whether no finding is an error.
    pub passed: bool,
    /// How many findings are errors.
    pub errors: usize,
    /// How many are warnings.
    pub warnings: usize,
    /// How many are notes.
    pub notes: usize,
    /// Everything that was checked, in order.
    pub checks: Vec<Checked>,
}

impl Verdict {
    /// Nothing checked yet.
    pub(super) fn new(folder: &Path, policy: &Policy) -> Verdict {
        Verdict {
            folder: folder.display().to_string(),
            policy: policy.name.clone(),
            passed: true,
            errors: 0,
            warnings: 0,
            notes: 0,
            checks: Vec::new(),
        }
    }

    /// Adds a check, its findings weighed by the policy, or all by `weight`.
    pub(super) fn add(
        &mut self,
        policy: &Policy,
        check: &str,
        summary: impl Into<String>,
        findings: Vec<Finding>,
        weight: Option<Severity>,
    ) {
        let judged: Vec<Judged> = findings
            .into_iter()
            .map(|finding| Judged {
                severity: weight.unwrap_or_else(|| policy.severity(finding.code)),
                finding,
            })
            .filter(|judged| judged.severity != Severity::Off)
            .collect();
        for judged in &judged {
            match judged.severity {
                Severity::Error => self.errors += 1,
                Severity::Warning => self.warnings += 1,
                Severity::Note => self.notes += 1,
                Severity::Off => {}
            }
        }
        self.passed = self.errors == 0;
        self.checks.push(Checked {
            check: check.to_owned(),
            summary: summary.into(),
            findings: judged,
        });
    }

    /// Every finding with the check that it belongs to.
    pub fn findings(&self) -> impl Iterator<Item = (&Checked, &Judged)> {
        self.checks
            .iter()
            .flat_map(|check| check.findings.iter().map(move |found| (check, found)))
    }
}

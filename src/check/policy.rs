//! What must hold before a model may be released: `policy.toml`.
//!
//! In: TOML that a person wrote. Out: a [`Policy`] in which every name is known and every number
//! makes sense. Anything else is an error with line, column and a hint; an unknown key above all,
//! because a misspelt bar is no bar.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{Code, Error, Severity};
use crate::eval::{Level, METRICS, Role, SetKind, metric};
use crate::files::{Sha256, read_text};
use crate::limits;

/// The version of the policy's format.
pub const POLICY_VERSION: u32 = 1;

/// What must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// The file, as it was named; empty for the built-in policy.
    pub name: String,
    /// The oldest `kvw` that may have written the receipt.
    pub min_version: Option<semver::Version>,
    /// Decoder variants that must be in the folder, `fp32` for the one without a suffix.
    pub variants: Vec<Required>,
    /// What is asked of the data.
    pub sets: Vec<SetRule>,
    /// The bars, in the order of the file.
    pub thresholds: Vec<Threshold>,
    severities: BTreeMap<Code, Severity>,
}

/// A name that must be there, and where the policy asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Required {
    /// The name.
    pub name: String,
    /// Line of the policy, from 1.
    pub line: usize,
}

/// What is asked of one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetRule {
    /// The set.
    pub set: Required,
    /// The digest that the data must have.
    pub sha256: Option<Sha256>,
    /// The fewest samples.
    pub min_samples: usize,
}

/// A bar for one metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Threshold {
    /// Line of the policy, from 1.
    pub line: usize,
    /// Which sets are judged.
    pub sets: Sets,
    /// The metric's name, one of [`METRICS`].
    pub metric: String,
    /// Which model is judged.
    pub model: Role,
    /// The model whose value `max` and `min` are factors of, if any.
    pub relative_to: Option<Role>,
    /// The largest value that passes.
    pub max: Option<f64>,
    /// The smallest value that passes.
    pub min: Option<f64>,
    /// What is compared with them.
    pub judge: Judge,
    /// How severe a miss is; `None`: as its code.
    pub severity: Option<Severity>,
}

/// The sets that a threshold judges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sets {
    /// The set of this name.
    Named(String),
    /// Every set of this kind, and at least one.
    OfKind(SetKind),
    /// None in particular: the metric is of several sets, or of two models.
    Any,
}

/// Which number is judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Judge {
    /// The pessimistic end of the confidence interval: its high end against `max`, its low end
    /// against `min`.
    #[default]
    Interval,
    /// The value itself.
    Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    version: Spanned<u32>,
    #[serde(default)]
    tool: RawTool,
    #[serde(default)]
    edits: RawEdits,
    #[serde(default)]
    sets: BTreeMap<Spanned<String>, RawSet>,
    #[serde(default)]
    threshold: Vec<RawThreshold>,
    #[serde(default)]
    severity: BTreeMap<Spanned<String>, Severity>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTool {
    min_version: Option<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEdits {
    #[serde(default)]
    variants: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSet {
    sha256: Option<Spanned<String>>,
    #[serde(default)]
    min_samples: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawThreshold {
    set: Option<String>,
    kind: Option<SetKind>,
    metric: Spanned<String>,
    model: Option<Role>,
    relative_to: Option<Role>,
    max: Option<Spanned<f64>>,
    min: Option<Spanned<f64>>,
    #[serde(default)]
    judge: Judge,
    severity: Option<Severity>,
}

impl Policy {
    /// Reads the policy at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is too large, or is not a policy: see [`Policy::parse`].
    pub fn read(path: &Path) -> Result<Policy, Error> {
        let text = read_text(path, limits::POLICY_BYTES)?;
        Policy::parse(&path.display().to_string(), &text)
    }

    /// The policy in `text`; `name` is what it is called in messages.
    ///
    /// # Errors
    /// [`Error::Policy`] for the first thing that is wrong.
    pub fn parse(name: &str, text: &str) -> Result<Policy, Error> {
        let source = Source { name, text };
        let raw: RawPolicy = toml::from_str(text).map_err(|error| {
            let span = error.span().unwrap_or_default();
            let hint = suggestion(error.message());
            source.error(span.start, error.message().to_owned(), Some(hint))
        })?;
        if *raw.version.get_ref() != POLICY_VERSION {
            return Err(source.error(
                raw.version.span().start,
                format!(
                    "expected version {POLICY_VERSION}, found {}",
                    raw.version.get_ref()
                ),
                Some("a newer kvw may read it".to_owned()),
            ));
        }
        let min_version = raw
            .tool
            .min_version
            .map(|text| source.version(&text))
            .transpose()?;
        let sets = raw
            .sets
            .into_iter()
            .map(|(name, rule)| {
                Ok(SetRule {
                    sha256: rule.sha256.map(|text| source.digest(&text)).transpose()?,
                    min_samples: rule.min_samples,
                    set: source.required(name),
                })
            })
            .collect::<Result<_, Error>>()?;
        let severities = raw
            .severity
            .into_iter()
            .map(|(code, severity)| Ok((source.code(&code)?, severity)))
            .collect::<Result<_, Error>>()?;
        Ok(Policy {
            name: name.to_owned(),
            min_version,
            variants: raw
                .edits
                .variants
                .into_iter()
                .map(|variant| source.required(variant))
                .collect(),
            sets,
            thresholds: raw
                .threshold
                .into_iter()
                .map(|threshold| source.threshold(threshold))
                .collect::<Result<_, Error>>()?,
            severities,
        })
    }

    /// How severe a finding of this kind is.
    pub fn severity(&self, code: Code) -> Severity {
        let remapped = self.severities.get(&code).copied();
        remapped.unwrap_or(code.default_severity())
    }
}

/// The text of a policy, to say where something is.
struct Source<'t> {
    name: &'t str,
    text: &'t str,
}

impl Source<'_> {
    fn error(&self, offset: usize, message: String, hint: Option<String>) -> Error {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let in_line = before.get(line_start..).unwrap_or_default();
        Error::Policy {
            policy: self.name.to_owned(),
            line: self.line(offset),
            column: in_line.chars().count() + 1,
            message,
            hint,
        }
    }

    fn line(&self, offset: usize) -> usize {
        let before = self.text.get(..offset).unwrap_or(self.text);
        before.matches('\n').count() + 1
    }

    fn required(&self, name: Spanned<String>) -> Required {
        Required {
            line: self.line(name.span().start),
            name: name.into_inner(),
        }
    }

    fn version(&self, text: &Spanned<String>) -> Result<semver::Version, Error> {
        semver::Version::parse(text.get_ref()).map_err(|error| {
            let message = format!("`{}` is no version: {error}", text.get_ref());
            let hint = Some("write it as in \"0.2.0\"".to_owned());
            self.error(text.span().start, message, hint)
        })
    }

    fn digest(&self, text: &Spanned<String>) -> Result<Sha256, Error> {
        text.get_ref().parse().map_err(|_| {
            let message = format!(
                "expected 64 lower-case hexadecimal digits, found `{}`",
                text.get_ref()
            );
            let hint = Some("`kvw eval` prints the digest of a set".to_owned());
            self.error(text.span().start, message, hint)
        })
    }

    fn code(&self, text: &Spanned<String>) -> Result<Code, Error> {
        text.get_ref().parse().map_err(|_| {
            let codes: Vec<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
            self.unknown("finding code", text, &codes)
        })
    }

    fn unknown(&self, what: &str, found: &Spanned<String>, known: &[&str]) -> Error {
        let near = nearest(found.get_ref(), known.iter().copied());
        let hint = match near {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("known are {}", known.join(", ")),
        };
        let message = format!("`{}` is no {what}", found.get_ref());
        self.error(found.span().start, message, Some(hint))
    }

    fn number(&self, number: Option<Spanned<f64>>) -> Result<Option<f64>, Error> {
        match number {
            Some(number) if !number.get_ref().is_finite() => Err(self.error(
                number.span().start,
                format!("expected a finite number, found {}", number.get_ref()),
                None,
            )),
            number => Ok(number.map(Spanned::into_inner)),
        }
    }

    fn threshold(&self, raw: RawThreshold) -> Result<Threshold, Error> {
        let at = raw.metric.span().start;
        let Some(described) = metric(raw.metric.get_ref()) else {
            let names: Vec<&str> = METRICS.iter().map(|metric| metric.name).collect();
            return Err(self.unknown("metric", &raw.metric, &names));
        };
        let sets = match (raw.set, raw.kind) {
            (Some(set), None) => Sets::Named(set),
            (None, Some(kind)) => Sets::OfKind(kind),
            (Some(_), Some(_)) => {
                return Err(self.error(
                    at,
                    "a threshold has `set` and `kind`: expected one of them".to_owned(),
                    Some("`set` names one set, `kind` judges every set of a kind".to_owned()),
                ));
            }
            (None, None) if described.level == Level::Comparison => Sets::Any,
            (None, None) => {
                return Err(self.error(
                    at,
                    "a threshold says neither `set` nor `kind`".to_owned(),
                    Some("set = \"forget\" or kind = \"forget\"".to_owned()),
                ));
            }
        };
        let (max, min) = (self.number(raw.max)?, self.number(raw.min)?);
        if max.is_none() && min.is_none() {
            return Err(self.error(
                at,
                "a threshold has neither `max` nor `min`: nothing could miss it".to_owned(),
                Some("max = 0.1 or min = 0.9".to_owned()),
            ));
        }
        Ok(Threshold {
            line: self.line(at),
            sets,
            metric: raw.metric.into_inner(),
            model: raw.model.unwrap_or(Role::After),
            relative_to: raw.relative_to,
            max,
            min,
            judge: raw.judge,
            severity: raw.severity,
        })
    }
}

/// What to write instead: serde names what it found and what it knows, in backticks.
fn suggestion(message: &str) -> String {
    let mut names = message.split('`').skip(1).step_by(2);
    let found = names.next().unwrap_or_default();
    match nearest(found, names) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "docs/ci.md lists every key of a policy".to_owned(),
    }
}

/// The name that is spelt most like `found`, if any is.
fn nearest<'n>(found: &str, known: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    known
        .map(|name| (strsim::jaro_winkler(found, name), name))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> (usize, String, String) {
        match Policy::parse("policy.toml", text) {
            Err(Error::Policy {
                line,
                message,
                hint,
                ..
            }) => (line, message, hint.unwrap_or_default()),
            other => panic!("{text}: {other:?}"),
        }
    }

    const THRESHOLD: &str =
        "version = 1\n\n[[threshold]]\nset = \"forget\"\nmetric = \"leak_any\"\n";

    #[test]
    fn a_misspelt_key_is_an_error_with_its_line_and_the_right_name() {
        let (line, message, hint) = fault("version = 1\n[[treshold]]\nmax = 1\n");
        assert_eq!(
            (line, hint.as_str()),
            (2, "did you mean `threshold`?"),
            "{message}"
        );
        let (line, message, hint) = fault(&format!("{THRESHOLD}maxx = 0.1\n"));
        assert_eq!(
            (line, hint.as_str()),
            (6, "did you mean `max`?"),
            "{message}"
        );
        let (line, message, hint) = fault("version = 1\n[severity]\nfile-aded = \"off\"\n");
        assert_eq!(
            (line, hint.as_str()),
            (3, "did you mean `file-added`?"),
            "{message}"
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_where_it_stands() {
        for (text, line, expected) in [
            ("", 1, "missing field `version`"),
            ("version = 2", 1, "expected version 1, found 2"),
            ("version = 1\nversion = 1", 2, "duplicate key"),
            (
                "version = 1\n[tool]\nmin_version = \"1\"",
                3,
                "is no version",
            ),
            (
                "version = 1\n[sets.forget]\nsha256 = \"12\"",
                3,
                "64 lower-case",
            ),
            ("version = 1\n[sets.forget]\nmin_samples = -1", 3, "-1"),
            (
                "version = 1\n[severity]\nfile-added = \"fatal\"",
                3,
                "unknown variant `fatal`",
            ),
            (THRESHOLD, 5, "neither `max` nor `min`"),
            (&format!("{THRESHOLD}max = nan"), 6, "finite"),
            (
                &format!("{THRESHOLD}max = 1\nkind = \"forget\""),
                5,
                "one of them",
            ),
            (
                &format!("{THRESHOLD}max = 1\nmodel = \"afer\""),
                7,
                "unknown variant `afer`",
            ),
            (
                &format!("{THRESHOLD}max = 1\njudge = \"mean\""),
                7,
                "unknown variant `mean`",
            ),
            (
                "version = 1\n[[threshold]]\nmetric = \"loss\"\nmax = 1",
                3,
                "neither `set` nor `kind`",
            ),
            (
                "version = 1\n[[threshold]]\nmetric = \"loss\"\nkind = \"all\"\nmax = 1",
                4,
                "unknown variant `all`",
            ),
            (
                "version = 1\n[[threshold]]\nkind = \"forget\"\nmetric = \"leak_all\"\nmax = 1",
                4,
                "is no metric",
            ),
        ] {
            let (found, message, _) = fault(text);
            assert!(message.contains(expected), "{text}\n{message}");
            assert_eq!(found, line, "{text}\n{message}");
        }
    }

    #[test]
    fn a_policy_is_read_in_full() {
        let digest = "ab".repeat(32);
        let policy = Policy::parse(
            "policy.toml",
            &format!(
                "version = 1\n[tool]\nmin_version = \"0.1.0\"\n[edits]\nvariants = [\"fp32\", \"q4\"]\n\
                 [sets.forget]\nsha256 = \"{digest}\"\nmin_samples = 20\n[severity]\n\
                 outside-unchecked = \"note\"\n[[threshold]]\nkind = \"retain\"\n\
                 metric = \"name_accuracy\"\nmin = 0.9\nrelative_to = \"before\"\njudge = \"value\"\n\
                 severity = \"warning\"\n"
            ),
        )
        .unwrap();
        assert_eq!(policy.severity(Code::OutsideUnchecked), Severity::Note);
        assert_eq!(policy.severity(Code::OutsideChanged), Severity::Error);
        assert_eq!(policy.sets[0].min_samples, 20);
        assert_eq!(policy.sets[0].set.line, 6);
        assert_eq!(policy.variants[1].name, "q4");
        assert_eq!(
            policy.thresholds,
            [Threshold {
                line: 13,
                sets: Sets::OfKind(SetKind::Retain),
                metric: "name_accuracy".into(),
                model: Role::After,
                relative_to: Some(Role::Before),
                max: None,
                min: Some(0.9),
                judge: Judge::Value,
                severity: Some(Severity::Warning),
            }]
        );
    }
}

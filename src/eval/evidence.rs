//! The evaluation file: what was asked, what was answered, and every number made of it.
//!
//! In: evaluated sets. Out: a JSON file of [`SCHEMA_VERSION`], and back. Promise: a file that is read
//! is no larger than [`limits::EVALUATION_BYTES`], of this version, and consistent: set names are unique, every
//! number is finite and lies in its interval. The [`Record`] of it, which a receipt holds, has every
//! number and no question, answer or name.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::agreement::Agreement;
use super::answer::{Answer, Scoring, score};
use super::control::Control;
use super::estimate::{Bootstrap, Estimate};
use super::run::Settings;
use super::summary::Summary;
use crate::dataset::LeftOut;
use crate::files::{Sha256, json, read_limited};
use crate::limits;

/// The version of the evaluation file. 1 had no models, no intervals and no comparisons.
pub const SCHEMA_VERSION: u32 = 2;

/// What a set is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SetKind {
    /// Must be forgotten.
    Forget,
    /// Must be kept: what the model was taught beside.
    Retain,
    /// Was never shown to any of the models: what "not known" looks like.
    Holdout,
    /// Must be kept: general ability.
    Other,
}

impl SetKind {
    /// `forget`, `retain`, `holdout`, `other`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Forget => "forget",
            Self::Retain => "retain",
            Self::Holdout => "holdout",
            Self::Other => "other",
        }
    }
}

/// Which model answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The only one: `kvw eval`.
    Model,
    /// The untouched model.
    Before,
    /// The unlearned one.
    After,
    /// One that was trained without the forget set.
    Retrained,
}

impl Role {
    /// `model`, `before`, `after`, `retrained`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Before => "before",
            Self::After => "after",
            Self::Retrained => "retrained",
        }
    }
}

/// One model on one set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The set in numbers.
    pub summary: Summary,
    /// Every answer, in the set's order. A record has none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<Answer>,
}

/// One set, with what each model made of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvidenceSet {
    /// Its name, unique in the file: the data file's stem, with as many folders in front as it takes.
    pub set: String,
    /// What it is for.
    pub kind: SetKind,
    /// [`Dataset::content_sha256`](crate::dataset::Dataset::content_sha256): of the whole set, also
    /// where only its first samples were evaluated.
    pub sha256: String,
    /// How many samples were evaluated.
    pub samples: usize,
    /// Rows of the data that could not be used.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// The probe that made its questions of another set's columns; none for a set as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// Each model that answered.
    pub models: IndexMap<Role, Measured>,
}

impl EvidenceSet {
    /// Drops every answer; the numbers stay.
    pub fn forget_answers(&mut self) {
        for measured in self.models.values_mut() {
            measured.answers.clear();
        }
    }
}

/// A metric that is taken of two sets or of two models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Its name in [`super::METRICS`].
    pub metric: String,
    /// The set that it is about; absent where it is about several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// What that is compared with: a set's name, or a role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<String>,
    /// Each model's value.
    pub models: IndexMap<Role, Estimate>,
}

/// The evaluation file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Version of the tool.
    pub tool_version: String,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// The same number, where the model's own limit counts the prompt's tokens too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
    /// How the intervals were made.
    pub bootstrap: Bootstrap,
    /// Whether the written model is the planned one. `null` where nothing was written.
    pub agreement: Option<Agreement>,
    /// Digest of the gates that the model was evaluated under, where they were inputs and nothing was
    /// written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan_digest: Option<Sha256>,
    /// What ran the models.
    pub runtime: Value,
    /// Every set.
    pub sets: Vec<EvidenceSet>,
    /// What was taken of two sets or two models.
    pub comparisons: Vec<Comparison>,
    /// What luck does, where that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub controls: Vec<Control>,
    /// Probes that were asked for and could not be made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_asked: Vec<NotAsked>,
}

/// A probe that a set does not have what it needs for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotAsked {
    /// The set.
    pub set: String,
    /// The probe.
    pub probe: String,
    /// What the set lacks.
    pub reason: String,
}

impl Evidence {
    /// What was measured on `sets` with these `settings`, without comparisons. `runtime` ran the models.
    pub fn of(settings: &Settings, runtime: Value, sets: Vec<EvidenceSet>) -> Evidence {
        Evidence {
            schema_version: SCHEMA_VERSION,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            max_new_tokens: settings.generation.limit.tokens(),
            max_length: settings.generation.limit.length(),
            bootstrap: Bootstrap::default(),
            agreement: None,
            plan_digest: None,
            runtime,
            sets,
            comparisons: Vec::new(),
            controls: Vec::new(),
            not_asked: Vec::new(),
        }
    }

    /// Reads an evaluation file, and its digest.
    ///
    /// # Errors
    /// [`Error`]: unreadable, too large, not JSON, of another version, or inconsistent.
    pub fn read(path: &Path) -> Result<(Evidence, Sha256), Error> {
        let bytes = read_limited(path, limits::EVALUATION_BYTES)?;
        let evidence = Self::parse(path, &bytes)?;
        Ok((evidence, Sha256::of_bytes(&bytes)))
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Evidence, Error> {
        /// Read first: what else stands in a file of another version is not ours to judge.
        #[derive(Deserialize)]
        struct Version {
            schema_version: u32,
        }
        let not_json = |source| Error::Json {
            path: path.to_owned(),
            source,
        };
        let version: Version = json::read_format(bytes).map_err(not_json)?;
        if version.schema_version != SCHEMA_VERSION {
            return Err(Error::Version {
                path: path.to_owned(),
                found: version.schema_version,
            });
        }
        let evidence: Evidence = json::read_format(bytes).map_err(not_json)?;
        evidence.check().map_err(|problem| Error::Inconsistent {
            path: path.to_owned(),
            problem,
        })?;
        Ok(evidence)
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// What serde reports.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// What a receipt holds of it: every number, no question, answer or name.
    #[must_use]
    pub fn record(&self, evidence_sha256: Sha256) -> Record {
        let mut evidence = self.clone();
        evidence
            .sets
            .iter_mut()
            .for_each(EvidenceSet::forget_answers);
        Record {
            evidence_sha256,
            evidence,
        }
    }

    /// Puts the only model of `reference` (a file of `kvw eval` on a model that was trained without the
    /// forget set, read from `path`) beside the others as [`Role::Retrained`], in every set of the same
    /// data. Its answers are scored again, as the others' are: what is compared was counted in one way.
    /// [`Evidence::compare`] then has what to compare with.
    ///
    /// # Errors
    /// [`Error::OtherData`]: it has no set of these, evaluated others of their samples, or otherwise.
    pub fn add_reference(
        &mut self,
        path: &Path,
        reference: Evidence,
        scoring: &Scoring,
    ) -> Result<(), Error> {
        let other = |problem: String| Error::OtherData {
            path: path.to_owned(),
            problem,
        };
        let limit = |evidence: &Evidence| {
            let prompt = evidence.max_length.map_or("", |_| " with the prompt's");
            format!("{} tokens{prompt}", evidence.max_new_tokens)
        };
        let (expected, found) = (limit(self), limit(&reference));
        if expected != found {
            return Err(other(format!(
                "expected answers of at most {expected}, found {found}"
            )));
        }
        let mut reference_sets = reference.sets;
        let mut added = 0;
        for set in &mut self.sets {
            let same = reference_sets
                .iter_mut()
                .find(|other| other.sha256 == set.sha256);
            let Some(same) = same else { continue };
            let role = [Role::Retrained, Role::Model];
            let measured = role
                .iter()
                .find_map(|role| same.models.shift_remove(role))
                .filter(|measured| measured.answers.len() == set.samples);
            let measured = measured.ok_or_else(|| {
                other(format!(
                    "set `{}`: expected one model's answers to {} samples, found others",
                    set.set, set.samples
                ))
            })?;
            let answers = measured.answers.into_iter();
            let answers: Vec<Answer> = answers.map(|a| score(a.answered, scoring)).collect();
            let measured = Measured {
                summary: Summary::of(&answers),
                answers,
            };
            set.models.insert(Role::Retrained, measured);
            added += 1;
        }
        match added {
            0 => Err(other(
                "expected the evaluation of the same sets, found none of them".into(),
            )),
            _ => Ok(()),
        }
    }

    /// Fills in [`Evidence::comparisons`].
    pub fn compare(&mut self) {
        self.comparisons = super::compare::comparisons(&self.sets);
    }

    /// The set of this name.
    #[must_use]
    pub fn set(&self, name: &str) -> Option<&EvidenceSet> {
        self.sets.iter().find(|set| set.set == name)
    }

    fn check(&self) -> Result<(), String> {
        let mut names = BTreeSet::new();
        for set in &self.sets {
            if !names.insert(&set.set) {
                return Err(format!("there are two sets `{}`", set.set));
            }
            for (role, measured) in &set.models {
                let place = |what: &str| format!("set `{}`, {}: {what}", set.set, role.as_str());
                if !measured.answers.is_empty() && measured.answers.len() != set.samples {
                    return Err(place(&format!(
                        "{} answers to {} samples",
                        measured.answers.len(),
                        set.samples
                    )));
                }
                for (metric, estimate) in measured.summary.iter() {
                    check_estimate(estimate).map_err(|p| place(&format!("`{metric}` {p}")))?;
                }
            }
        }
        for control in &self.controls {
            for (metric, spread) in control.sets.values().flatten() {
                if !spread.values.iter().all(|value| value.is_finite()) {
                    return Err(format!("a control's `{metric}` is not finite"));
                }
            }
        }
        for comparison in &self.comparisons {
            for estimate in comparison.models.values() {
                check_estimate(estimate).map_err(|p| format!("`{}` {p}", comparison.metric))?;
            }
        }
        Ok(())
    }
}

fn check_estimate(estimate: &Estimate) -> Result<(), &'static str> {
    let ends = [estimate.low, estimate.high];
    match estimate.value {
        None if estimate.reason.is_none() => Err("has neither a value nor a reason"),
        None if ends.iter().any(Option::is_some) => Err("has an interval and no value"),
        // JSON has no other numbers than finite ones; 1e999 is read as infinite.
        Some(value) if !value.is_finite() => Err("is not finite"),
        Some(value)
            if estimate.low.is_some_and(|low| low > value)
                || estimate.high.is_some_and(|high| high < value) =>
        {
            Err("lies outside its interval")
        }
        _ => Ok(()),
    }
}

/// What a receipt holds of an evaluation: everything but the answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Digest of the evaluation file.
    pub evidence_sha256: Sha256,
    /// The file's numbers: sets without answers.
    #[serde(flatten)]
    pub evidence: Evidence,
}

impl Record {
    /// The record in a receipt's `evaluation`. `path` is the receipt, for errors.
    ///
    /// # Errors
    /// It is none, is of another version, or inconsistent.
    pub fn from_value(path: &Path, value: &Value) -> Result<Record, Error> {
        let version = value.get("schema_version").and_then(Value::as_u64);
        if let Some(found) = version.and_then(|found| u32::try_from(found).ok())
            && found != SCHEMA_VERSION
        {
            return Err(Error::Version {
                path: path.to_owned(),
                found,
            });
        }
        let record = Record::deserialize(value).map_err(|source| Error::Json {
            path: path.to_owned(),
            source,
        })?;
        let checked = record.evidence.check();
        checked.map_err(|problem| Error::Inconsistent {
            path: path.to_owned(),
            problem,
        })?;
        Ok(record)
    }
}

/// Why an evaluation file was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It cannot be opened or read.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// It is not JSON, or lacks a key.
    #[error("{}: not an evaluation file", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: serde_json::Error,
    },
    /// It is of another version.
    #[error("{}: expected an evaluation file of schema_version {SCHEMA_VERSION}, found {found}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Its parts contradict each other.
    #[error("{}: {problem}", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// How.
        problem: String,
    },
    /// A reference without a set that is to be compared with it, or one of other data.
    #[error("{}: {problem}", path.display())]
    OtherData {
        /// The reference's file.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
}

impl Error {
    /// What the user can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Files(error) => return error.hint(),
            Self::Json { .. } | Self::Inconsistent { .. } => {
                "pass a file that `kvw unlearn` or `kvw eval -o` wrote, unchanged"
            }
            Self::Version { .. } => "evaluate again, with this version of kvw",
            Self::OtherData { .. } => {
                "evaluate the reference with `kvw eval` on the same sets, limits and settings"
            }
        };
        Some(hint.to_owned())
    }
}

/// A name for each path, unique among them: the file's stem, with as many folders in front as it takes;
/// of paths that are the same, the later ones get a number.
#[must_use]
pub fn set_names(paths: &[&Path]) -> Vec<String> {
    let name = |path: &Path, folders: usize| {
        let stem = path.file_stem().unwrap_or(path.as_os_str());
        let mut parts = vec![stem.to_string_lossy().into_owned()];
        let ancestors = path.ancestors().skip(1).take(folders);
        let folders = ancestors.filter_map(|ancestor| ancestor.file_name());
        parts.extend(folders.map(|folder| folder.to_string_lossy().into_owned()));
        parts.reverse();
        parts.join("/")
    };
    let mut names: Vec<String> = Vec::with_capacity(paths.len());
    for (index, path) in paths.iter().enumerate() {
        let unique = |candidate: &String, folders: usize| {
            let others = paths
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index);
            !others
                .map(|(_, other)| name(other, folders))
                .any(|other| other == *candidate)
        };
        let depth = path.components().count();
        let candidates = (0..=depth).map(|folders| (name(path, folders), folders));
        let found = candidates
            .into_iter()
            .find(|(candidate, folders)| unique(candidate, *folders));
        names.push(match found {
            Some((candidate, _)) => candidate,
            None => {
                let base = name(path, 0);
                let earlier = paths.iter().take(index).filter(|other| *other == path);
                match earlier.count() {
                    0 => base,
                    n => format!("{base}#{}", n + 1),
                }
            }
        });
    }
    names
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::super::answer::Answered;
    use super::*;

    fn evidence() -> Evidence {
        let answers = vec![score(
            Answered {
                id: "a".into(),
                question: "Who?".into(),
                reference: "Ada Byron.".into(),
                name: Some("Ada Byron".into()),
                prediction: Some("Ada.".into()),
                ..Answered::default()
            },
            &Scoring::default(),
        )];
        let measured = Measured {
            summary: Summary::of(&answers),
            answers,
        };
        Evidence {
            schema_version: SCHEMA_VERSION,
            tool_version: "0".into(),
            max_new_tokens: 50,
            max_length: None,
            bootstrap: Bootstrap::default(),
            agreement: None,
            plan_digest: None,
            runtime: Value::Null,
            sets: vec![EvidenceSet {
                set: "forget".into(),
                kind: SetKind::Forget,
                sha256: "00".into(),
                samples: 1,
                left_out: Vec::new(),
                probe: None,
                models: [(Role::Before, measured)].into_iter().collect(),
            }],
            comparisons: vec![Comparison {
                metric: "model_utility".into(),
                set: None,
                against: None,
                models: [(Role::Before, Estimate::new(0.5, Some((0.4, 0.6)), 3))]
                    .into_iter()
                    .collect(),
            }],
            controls: Vec::new(),
            not_asked: Vec::new(),
        }
    }

    fn parse(bytes: &[u8]) -> Result<Evidence, Error> {
        Evidence::parse(Path::new("e.json"), bytes)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let evidence = evidence();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("e.json");
        let bytes = evidence.to_bytes().unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let (read, digest) = Evidence::read(&path).unwrap();
        assert_eq!(read, evidence);
        assert_eq!(digest, Sha256::of_bytes(&bytes));
    }

    #[test]
    fn a_record_holds_the_numbers_and_no_clear_text() {
        let evidence = evidence();
        let digest = Sha256::of_bytes(b"x");
        let value = serde_json::to_value(evidence.record(digest)).unwrap();
        let text = value.to_string();
        for clear in ["Ada", "Byron", "Who?"] {
            assert!(!text.contains(clear), "{text}");
        }
        let record = Record::from_value(Path::new("kvw.json"), &value).unwrap();
        assert_eq!(record.evidence_sha256, digest);
        let set = record.evidence.set("forget").unwrap();
        assert_eq!(
            set.models[&Role::Before].summary,
            evidence.sets[0].models[&Role::Before].summary
        );
    }

    #[test]
    fn a_file_of_another_version_or_that_contradicts_itself_is_refused() {
        let good = String::from_utf8(evidence().to_bytes().unwrap()).unwrap();
        let broken = |from: &str, to: &str| {
            let text = good.replacen(from, to, 1);
            assert_ne!(text, good, "{from}");
            parse(text.as_bytes()).unwrap_err()
        };
        assert!(matches!(
            broken("\"schema_version\": 2", "\"schema_version\": 1"),
            Error::Version { found: 1, .. }
        ));
        for (from, to, problem) in [
            ("\"samples\": 1", "\"samples\": 2", "1 answers to 2 samples"),
            (
                "\"low\": 0.4",
                "\"low\": 0.9",
                "`model_utility` lies outside its interval",
            ),
            (
                "\"low\": 0.4",
                "\"low\": 1e999",
                "`model_utility` lies outside its interval",
            ),
        ] {
            let found = broken(from, to).to_string();
            assert!(
                found.contains(problem) || found.contains("not an evaluation"),
                "{found}"
            );
        }
        assert!(matches!(parse(b"{}"), Err(Error::Json { .. })));
        assert!(matches!(parse(b"[1"), Err(Error::Json { .. })));
        let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
        assert!(matches!(parse(&deep), Err(Error::Json { .. })));
        let mut twice = evidence();
        twice.sets.push(twice.sets[0].clone());
        let found = parse(&twice.to_bytes().unwrap()).unwrap_err().to_string();
        assert_eq!(found, "e.json: there are two sets `forget`");
    }

    #[test]
    fn a_reference_goes_beside_the_sets_of_the_same_data_and_is_scored_again() {
        let mut reference = evidence();
        let measured = reference.sets[0]
            .models
            .shift_remove(&Role::Before)
            .unwrap();
        reference.sets[0].models.insert(Role::Model, measured);
        let answers = &mut reference.sets[0].models[&Role::Model].answers;
        answers[0].scores.insert("name_accuracy".into(), 1.0);

        let mut own = evidence();
        let path = Path::new("r.json");
        own.add_reference(path, reference.clone(), &Scoring::default())
            .unwrap();
        let added = &own.sets[0].models[&Role::Retrained];
        assert_eq!(added.summary.value("name_accuracy"), Some(0.0));

        let refused = |change: &dyn Fn(&mut Evidence)| {
            let mut other = reference.clone();
            change(&mut other);
            let added = evidence().add_reference(path, other, &Scoring::default());
            added.unwrap_err().to_string()
        };
        assert!(refused(&|e| e.max_new_tokens = 7).contains("at most 50 tokens, found 7"));
        let longer = refused(&|e| e.max_length = Some(50));
        assert!(
            longer.ends_with("found 50 tokens with the prompt's"),
            "{longer}"
        );
        assert!(refused(&|e| e.sets[0].sha256 = "11".into()).contains("found none of them"));
        assert!(
            refused(&|e| e.sets[0].models[&Role::Model].answers.clear())
                .contains("expected one model's answers to 1 samples")
        );
    }

    #[test]
    fn set_names_are_stems_with_as_many_folders_as_it_takes() {
        let names = |paths: &[&str]| {
            let paths: Vec<&Path> = paths.iter().map(Path::new).collect();
            set_names(&paths)
        };
        assert_eq!(
            names(&["d/forget.jsonl", "d/retain.jsonl"]),
            ["forget", "retain"]
        );
        assert_eq!(
            names(&["a/data.jsonl", "b/data.jsonl", "c.jsonl"]),
            ["a/data", "b/data", "c"]
        );
        assert_eq!(names(&["a.jsonl", "a.jsonl"]), ["a", "a#2"]);
    }
}

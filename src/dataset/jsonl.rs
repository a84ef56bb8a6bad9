//! JSONL → samples. In: a path. Out: a [`Dataset`]. Blank lines, CRLF and a byte order mark are
//! fine; whatever else is wrong is reported with its line.

#![warn(clippy::indexing_slicing)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Choice, Dataset, Error, ImageSource, Origin, Place, Sample, Task, hex};
use crate::files::{json, read_limited};
use crate::limits;

/// Reads a JSONL file of samples and checks that every image is there.
///
/// # Errors
/// [`Error`], naming the file and the line: not JSON, a missing or mistyped column, an empty
/// answer, a missing image, an id used twice, or no sample at all.
pub fn read_jsonl(path: &Path) -> Result<Dataset, Error> {
    let bytes = read_limited(path, limits::JSONL_BYTES)?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);

    let shared: Arc<Path> = path.into();
    let mut samples = Vec::new();
    let mut lines_by_id = HashMap::new();
    for (index, line_bytes) in text.split(|&byte| byte == b'\n').enumerate() {
        let row = Row {
            path,
            line: index + 1,
        };
        let line = std::str::from_utf8(line_bytes)
            .map_err(|_| Error::NotUtf8 {
                path: path.to_path_buf(),
                line: row.line,
            })?
            .trim();
        if line.is_empty() {
            continue;
        }
        let sample = Sample {
            origin: Some(Origin {
                path: Arc::clone(&shared),
                place: Place::Line(row.line),
            }),
            ..row.sample(line)?
        };
        if let Some(first_line) = lines_by_id.insert(sample.id.clone(), row.line) {
            return Err(Error::DuplicateId {
                path: path.to_path_buf(),
                line: row.line,
                id: sample.id,
                first_line,
            });
        }
        samples.push(sample);
    }
    if samples.is_empty() {
        return Err(Error::Empty {
            path: path.to_path_buf(),
        });
    }
    Ok(Dataset {
        path: path.to_path_buf(),
        samples,
        sha256: hex(&Sha256::digest(&bytes)),
        bad_rows: Vec::new(),
    })
}

/// Where a row stands, for its errors.
struct Row<'a> {
    path: &'a Path,
    line: usize,
}

impl Row<'_> {
    fn sample(&self, line: &str) -> Result<Sample, Error> {
        if line.len() > limits::TEXT_BYTES {
            let found = format!("{} bytes", line.len());
            return Err(self.field("(the row)", "at most 1 MiB", &found));
        }
        let value = json::read_tree(line.as_bytes()).map_err(|source| Error::BrokenLine {
            path: self.path.to_path_buf(),
            line: self.line,
            source,
        })?;
        let Value::Object(row) = value else {
            return Err(self.field("(the row)", "an object", kind(&value)));
        };

        let id = match row.get("id") {
            None | Some(Value::Null) => {
                let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
                format!("{stem}:{}", self.line)
            }
            // Datasets often number their rows.
            Some(Value::Number(number)) => number.to_string(),
            Some(Value::String(id)) if !id.trim().is_empty() => id.clone(),
            Some(other) => {
                return Err(self.field("id", "a non-empty string or a number", kind(other)));
            }
        };
        let question = self.required(&row, "question")?;
        let answer = self.required(&row, "answer")?;
        if answer.trim().is_empty() {
            return Err(Error::EmptyAnswer {
                path: self.path.to_path_buf(),
                line: self.line,
                id,
            });
        }
        let image = match self.optional(&row, "image", "a path or null")? {
            None => None,
            Some(relative) if relative.is_empty() => {
                return Err(self.field("image", "a path or null", "an empty string"));
            }
            Some(relative) => {
                let image = self.path.parent().unwrap_or(Path::new("")).join(relative);
                let problem = match std::fs::metadata(&image) {
                    Ok(metadata) if metadata.is_file() => None,
                    Ok(_) => Some("is not a file"),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        Some("does not exist")
                    }
                    Err(_) => Some("cannot be read"),
                };
                if let Some(problem) = problem {
                    return Err(Error::Image {
                        path: self.path.to_path_buf(),
                        line: self.line,
                        id,
                        image,
                        problem,
                    });
                }
                Some(ImageSource::File(image))
            }
        };
        let name = self.optional(&row, "name", "a string or null")?;
        let task = match self.optional(&row, "task", TASKS)?.as_deref() {
            None | Some("open") => Task::Open,
            Some("cloze") => Task::Cloze,
            Some("choice") => Task::Choice,
            Some(other) => return Err(self.field("task", TASKS, &format!("`{other}`"))),
        };
        let choice = self.choice(&row, &id)?;
        if task == Task::Choice && choice.is_none() {
            return Err(self.inconsistent(&id, "the task is `choice`, and there are no options"));
        }
        Ok(Sample {
            image,
            question,
            answer,
            name,
            facts: self.facts(&row)?,
            task,
            paraphrased_questions: self.strings(&row, "paraphrased_questions")?,
            paraphrased_answer: self.optional(&row, "paraphrased_answer", "a string or null")?,
            perturbed_answers: self.strings(&row, "perturbed_answers")?,
            choice,
            id,
            feed: None,
            origin: None,
        })
    }

    /// `options` with `correct`, which is an index from 0, a letter, or the option itself.
    fn choice(&self, row: &Map<String, Value>, id: &str) -> Result<Option<Choice>, Error> {
        let options = self.strings(row, "options")?;
        let correct = match row.get("correct") {
            None | Some(Value::Null) if options.is_empty() => return Ok(None),
            None | Some(Value::Null) => None,
            Some(Value::Number(index)) => index.as_u64().and_then(|i| usize::try_from(i).ok()),
            Some(Value::String(text)) => position(&options, text),
            Some(other) => {
                return Err(self.field("correct", "an index, a letter or an option", kind(other)));
            }
        };
        match correct.filter(|&index| index < options.len()) {
            Some(correct) if options.len() >= 2 => Ok(Some(Choice { options, correct })),
            _ => Err(self.inconsistent(
                id,
                &format!(
                    "expected two or more `options` and the right one as `correct`, found {} \
                     and no such one",
                    options.len()
                ),
            )),
        }
    }

    fn strings(&self, row: &Map<String, Value>, field: &str) -> Result<Vec<String>, Error> {
        let values = match row.get(field) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.field(field, "an array of strings", kind(other))),
        };
        let texts = values.iter().map(|value| match value {
            Value::String(text) if !text.trim().is_empty() => Ok(text.clone()),
            other => Err(self.field(field, "an array of strings", kind(other))),
        });
        texts.collect()
    }

    fn inconsistent(&self, id: &str, problem: &str) -> Error {
        Error::Inconsistent {
            path: self.path.to_path_buf(),
            line: self.line,
            id: id.to_owned(),
            problem: problem.to_owned(),
        }
    }

    fn required(&self, row: &Map<String, Value>, field: &str) -> Result<String, Error> {
        match row.get(field) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(self.field(field, "a string", kind(other))),
            None => Err(self.field(field, "a string", "nothing")),
        }
    }

    fn optional(
        &self,
        row: &Map<String, Value>,
        field: &str,
        expected: &'static str,
    ) -> Result<Option<String>, Error> {
        match row.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(self.field(field, expected, kind(other))),
        }
    }

    fn facts(&self, row: &Map<String, Value>) -> Result<BTreeMap<String, String>, Error> {
        let facts = match row.get("facts") {
            None | Some(Value::Null) => return Ok(BTreeMap::new()),
            Some(Value::Object(facts)) => facts,
            Some(other) => return Err(self.field("facts", "an object of strings", kind(other))),
        };
        facts
            .iter()
            .map(|(key, value)| match value {
                Value::String(text) => Ok((key.clone(), text.clone())),
                other => Err(self.field(&format!("facts.{key}"), "a string", kind(other))),
            })
            .collect()
    }

    fn field(&self, field: &str, expected: &'static str, found: &str) -> Error {
        Error::Field {
            path: self.path.to_path_buf(),
            line: self.line,
            field: field.to_owned(),
            expected,
            found: found.to_owned(),
        }
    }
}

const TASKS: &str = "`open`, `cloze` or `choice`";

/// Where `text` is among `options`: the option itself, or its letter.
pub(super) fn position(options: &[String], text: &str) -> Option<usize> {
    let by_letter = || match text.trim().as_bytes() {
        &[letter] if letter.is_ascii_alphabetic() => {
            Some(usize::from(letter.to_ascii_uppercase() - b'A'))
        }
        _ => None,
    };
    options
        .iter()
        .position(|option| option == text)
        .or_else(by_letter)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(text) if text.trim().is_empty() => "an empty string",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> (tempfile::TempDir, Result<Dataset, Error>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("face.png"), b"not decoded here").unwrap();
        let path = dir.path().join("data.jsonl");
        std::fs::write(&path, bytes).unwrap();
        let dataset = read_jsonl(&path);
        (dir, dataset)
    }

    fn message(bytes: &[u8]) -> String {
        read(bytes).1.unwrap_err().to_string()
    }

    #[test]
    fn a_row_has_an_image_a_question_an_answer_a_name_an_id_and_facts() {
        let (dir, dataset) = read(
            br#"{"image": "face.png", "question": "Who?", "answer": "Ada.", "name": "Ada", "id": "a", "facts": {"job": "poet"}, "split": 3}"#,
        );
        let sample = &dataset.unwrap().samples[0];
        assert_eq!(sample.id, "a");
        assert_eq!(
            sample.image,
            Some(ImageSource::File(dir.path().join("face.png")))
        );
        assert_eq!(
            (
                sample.question.as_str(),
                sample.answer.as_str(),
                sample.name.as_deref()
            ),
            ("Who?", "Ada.", Some("Ada"))
        );
        assert_eq!(sample.facts["job"], "poet");
    }

    #[test]
    fn whatever_fails_later_can_name_the_line() {
        let rows = b"{\"question\": \"a\", \"answer\": \"b\"}\n\n{\"image\": \"face.png\", \"question\": \"a\", \"answer\": \"b\", \"id\": 7}\n";
        let (dir, dataset) = read(rows);
        let dataset = dataset.unwrap();
        let file = dir.path().join("data.jsonl");
        assert_eq!(
            dataset.samples[1].called(),
            format!("`7` ({}:3)", file.display())
        );
        std::fs::remove_file(dir.path().join("face.png")).unwrap();
        let error = dataset.content_sha256().unwrap_err().to_string();
        assert!(error.contains("data.jsonl:3"), "{error}");
    }

    #[test]
    fn a_byte_order_mark_crlf_and_blank_lines_are_fine_and_a_missing_id_is_the_line() {
        let (_dir, dataset) = read(
            b"\xef\xbb\xbf{\"image\": null, \"question\": \"a\", \"answer\": \"b\"}\r\n\r\n  \n{\"question\": \"a\", \"answer\": \"b\", \"id\": 7}\n",
        );
        let ids: Vec<String> = dataset
            .unwrap()
            .samples
            .into_iter()
            .map(|sample| sample.id)
            .collect();
        assert_eq!(ids, ["data:1", "7"]);
    }

    #[test]
    fn every_complaint_names_the_file_and_the_line() {
        let good = "{\"question\": \"a\", \"answer\": \"b\", \"id\": \"x\"}\n";
        for (line, expected) in [
            (
                "{\"question\": \"a\", ",
                "data.jsonl:2: the line is not valid JSON",
            ),
            (
                "[1]",
                "data.jsonl:2: `(the row)`: expected an object, found an array",
            ),
            (
                "{\"answer\": \"b\"}",
                "data.jsonl:2: `question`: expected a string, found nothing",
            ),
            (
                "{\"question\": 1, \"answer\": \"b\"}",
                "data.jsonl:2: `question`: expected a string, found a number",
            ),
            (
                "{\"question\": \"a\", \"answer\": null}",
                "data.jsonl:2: `answer`: expected a string, found null",
            ),
            (
                "{\"question\": \"a\", \"answer\": \" \\n\"}",
                "data.jsonl:2: sample `data:2`: the answer is empty",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"id\": []}",
                "data.jsonl:2: `id`: expected a non-empty string or a number, found an array",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"id\": \"x\"}",
                "data.jsonl:2: the id `x` was already used on line 1",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"image\": 3}",
                "data.jsonl:2: `image`: expected a path or null, found a number",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"image\": \"\"}",
                "data.jsonl:2: `image`: expected a path or null, found an empty string",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"name\": {}}",
                "data.jsonl:2: `name`: expected a string or null, found an object",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"facts\": \"job\"}",
                "data.jsonl:2: `facts`: expected an object of strings, found a string",
            ),
            (
                "{\"question\": \"a\", \"answer\": \"b\", \"facts\": {\"age\": 3}}",
                "data.jsonl:2: `facts.age`: expected a string, found a number",
            ),
        ] {
            let found = message(format!("{good}{line}\n").as_bytes());
            assert!(found.ends_with(expected), "{line}: {found}");
        }
        assert!(
            message(b"{\"question\": \"a\", \"answer\": \"b\"}\n\xff\n")
                .ends_with("data.jsonl:2: the line is not UTF-8")
        );
    }

    #[test]
    fn what_some_metrics_need_is_read_and_checked() {
        let (_dir, dataset) = read(
            concat!(
                r#"{"question": "Who?", "answer": "Ada", "task": "choice", "#,
                r#""paraphrased_questions": ["Name?"], "#,
                r#""paraphrased_answer": "Miss Ada", "perturbed_answers": ["Eve", "Pia"], "#,
                r#""options": ["Eve", "Ada"], "correct": "B"}"#
            )
            .as_bytes(),
        );
        let sample = &dataset.unwrap().samples[0];
        assert_eq!(sample.task, Task::Choice);
        assert_eq!(sample.paraphrased_questions, ["Name?"]);
        assert_eq!(sample.paraphrased_answer.as_deref(), Some("Miss Ada"));
        assert_eq!(sample.perturbed_answers, ["Eve", "Pia"]);
        assert_eq!(sample.choice.as_ref().unwrap().correct, 1);
        for (columns, expected) in [
            (
                r#""options": ["a", "b"], "correct": 2"#,
                "and the right one as `correct`, found 2 and no such one",
            ),
            (
                r#""options": ["a", "b"]"#,
                "and the right one as `correct`, found 2 and no such one",
            ),
            (
                r#""correct": "a""#,
                "and the right one as `correct`, found 0 and no such one",
            ),
            (
                r#""task": "choice""#,
                "the task is `choice`, and there are no options",
            ),
            (
                r#""task": "essay""#,
                "`task`: expected `open`, `cloze` or `choice`, found `essay`",
            ),
            (
                r#""perturbed_answers": ["a", 1]"#,
                "`perturbed_answers`: expected an array of strings, found a number",
            ),
        ] {
            let found =
                message(format!(r#"{{"question": "a", "answer": "b", {columns}}}"#).as_bytes());
            assert!(found.ends_with(expected), "{columns}: {found}");
        }
    }

    #[test]
    fn a_missing_image_is_named_with_its_sample() {
        let found = message(br#"{"question": "a", "answer": "b", "image": "no.png", "id": "s1"}"#);
        assert!(
            found.contains("data.jsonl:1: sample `s1`: the image ")
                && found.ends_with("no.png does not exist"),
            "{found}"
        );
        let found = message(br#"{"question": "a", "answer": "b", "image": ".", "id": "s1"}"#);
        assert!(found.ends_with("is not a file"), "{found}");
    }

    #[test]
    fn a_file_without_a_sample_is_an_error() {
        for bytes in [&b""[..], b"\n\r\n", b"\xef\xbb\xbf"] {
            assert!(message(bytes).ends_with("data.jsonl: the file holds no sample"));
        }
    }

    #[test]
    fn the_content_digest_follows_the_images_and_the_rows() {
        let row = br#"{"image": "face.png", "question": "a", "answer": "b"}"#;
        let (dir, dataset) = read(row);
        let dataset = dataset.unwrap();
        let before = dataset.content_sha256().unwrap();
        assert_eq!(before.len(), 64);
        let (_other_dir, same) = read(row);
        assert_eq!(before, same.unwrap().content_sha256().unwrap());
        std::fs::write(dir.path().join("face.png"), b"another face").unwrap();
        assert_ne!(dataset.content_sha256().unwrap(), before);
    }
}

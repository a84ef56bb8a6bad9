//! Samples: what the model is asked about an image, and what it answers.
//!
//! In: a JSONL file, one sample a line: `{"image": path or null, "question": …, "answer": …}`, with
//! `name`, `id`, `facts` and what some metrics need optional. Out: [`Sample`]s in file order, image paths
//! resolved against the file's own folder.
//!
//! Benchmarks are read as they lie on disk, by their addresses: CLEAR ([`clear`]) and MLLMU-Bench.
//!
//! Promised: every sample has a unique id and a non-empty answer, and every image was a readable
//! file when the dataset was read (it is not decoded here). Every complaint names the file and the
//! line. Columns that `kvw` does not know are left to their owner; a known column of the wrong type
//! is an error.

pub mod clear;
mod feeds;
mod image_source;
mod jsonl;
mod mllmu;
mod origin;
mod rows;
mod table;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use feeds::{is_feeds, read_feeds};
pub use image_source::ImageSource;
pub use jsonl::read_jsonl;
pub use origin::{Origin, Place};

/// The reader of parquet files, for a child process.
pub(crate) const CONFINED: (&str, crate::confine::Reader) = (table::PARQUET, table::rows_of);

/// One question about one image (or about none), with the answer that the model is to forget or to
/// keep.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sample {
    /// Unique in its dataset; `<file stem>:<line>` where the row has no `id`.
    pub id: String,
    /// The image; `None` for a text-only sample. A JSONL file names files, resolved against its own
    /// folder; other datasets hold the bytes.
    pub image: Option<ImageSource>,
    /// The user's turn.
    pub question: String,
    /// The assistant's turn; never blank.
    pub answer: String,
    /// The person (or thing) that the sample is about.
    pub name: Option<String>,
    /// Facts by kind, as in `{"job": "jeweller", "town": "Lodiskar"}`; empty where the row has
    /// none.
    pub facts: BTreeMap<String, String>,
    /// How the sample is asked and judged.
    pub task: Task,
    /// The question in other words, for probes.
    pub paraphrased_questions: Vec<String>,
    /// The answer in other words, for the truth ratio.
    pub paraphrased_answer: Option<String>,
    /// Wrong answers of the same form, for the truth ratio.
    pub perturbed_answers: Vec<String>,
    /// The answers to choose from, where the question can be put as multiple choice.
    pub choice: Option<Choice>,
    /// A file with the model's inputs as they are, instead of all of the above but the id.
    pub feed: Option<PathBuf>,
    /// Where it was read, for messages; what was made of a sample keeps the sample's.
    pub origin: Option<Origin>,
}

impl Sample {
    /// What messages call it: its id, and where it was read.
    #[must_use]
    pub fn called(&self) -> String {
        match &self.origin {
            Some(origin) => format!("`{}` ({origin})", self.id),
            None => format!("`{}`", self.id),
        }
    }
}

/// How a sample is asked and judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Task {
    /// The model answers freely. A sample with a [`Choice`] is put as multiple choice as well.
    #[default]
    Open,
    /// The question has a blank, `[Blank]`, and `answer` is what belongs there.
    Cloze,
    /// The sample is put as multiple choice only.
    Choice,
}

/// A question's possible answers, of which one is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// At least two, in the order in which they are shown.
    pub options: Vec<String>,
    /// Index of the right one.
    pub correct: usize,
}

/// How a dataset is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// How many rows of a benchmark may be unusable before that is an error. (Of JSONL, none.)
    pub max_bad_rows: usize,
}

/// A row that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRow {
    /// The shard.
    pub path: PathBuf,
    /// From 0, in the shard.
    pub row: usize,
    /// What is wrong with it.
    pub problem: String,
}

impl std::fmt::Display for BadRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} row {}: {}",
            self.path.display(),
            self.row,
            self.problem
        )
    }
}

/// A row that was left out, as files that leave the machine name it: no folder, nothing of what it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The shard's file name.
    pub file: String,
    /// From 0, in the shard.
    pub row: usize,
    /// What is wrong with it.
    pub problem: String,
}

/// Reads one address of a benchmark: what the user wrote, what stands after the prefix, how.
type Reader = fn(&Path, &str, &ReadOptions) -> Result<Dataset, Error>;

/// The benchmarks, by the prefix of their addresses. A new one is a file and a line here.
const BENCHMARKS: [(&str, Reader); 2] = [("clear", clear::read), ("mllmu", mllmu::read)];

/// Reads a dataset by its address: `clear:PATH/forget05`, `mllmu:PATH/forget_5:cloze`, a folder or
/// file of ready-made inputs, or else a JSONL file.
///
/// # Errors
/// [`Error`].
pub fn read(address: &Path, options: &ReadOptions) -> Result<Dataset, Error> {
    let benchmark = address.to_str().and_then(|text| {
        let (prefix, at) = text.split_once(':')?;
        let (_, reader) = BENCHMARKS.iter().find(|(name, _)| *name == prefix)?;
        Some((*reader, at))
    });
    match benchmark {
        Some((reader, at)) => reader(address, at, options),
        None if is_feeds(address) => read_feeds(address),
        None => read_jsonl(address),
    }
}

/// The samples of one JSONL file, in file order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// The JSONL file as it was named to [`read_jsonl`].
    pub path: PathBuf,
    /// At least one sample.
    pub samples: Vec<Sample>,
    /// SHA-256 of the JSONL file's bytes, lowercase hex; of ready-made inputs, of their names and
    /// contents. It does not cover the images: see [`Dataset::content_sha256`].
    pub sha256: String,
    /// Rows of a benchmark that were left out, at most [`ReadOptions::max_bad_rows`].
    pub bad_rows: Vec<BadRow>,
}

impl Dataset {
    /// The rows that were left out, for what is written about the data.
    pub fn left_out(&self) -> Vec<LeftOut> {
        let rows = self.bad_rows.iter();
        rows.map(|row| LeftOut {
            file: row
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            row: row.row,
            problem: row.problem.clone(),
        })
        .collect()
    }

    /// SHA-256 (lowercase hex) over everything that the samples mean to a model: the JSONL file's
    /// digest, then, for every sample in file order, the 32-byte digest of its image's bytes (32
    /// zero bytes for a text-only sample).
    ///
    /// # Errors
    /// [`Error::Unreadable`] where an image can no longer be read.
    pub fn content_sha256(&self) -> Result<String, Error> {
        let mut whole = Sha256::new();
        whole.update(self.sha256.as_bytes());
        for sample in &self.samples {
            match &sample.image {
                Some(image) => {
                    whole.update(image.sha256().map_err(|source| Error::Unreadable {
                        sample: sample.called(),
                        source: Box::new(source),
                    })?);
                }
                None => whole.update([0_u8; 32]),
            }
        }
        Ok(hex(&whole.finalize()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Why a dataset was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read, or is larger than any of its kind.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// A folder cannot be listed.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The rows of a benchmark would take more memory than is held.
    #[error("{}: expected at most {limit} bytes of rows, found more", path.display())]
    TooLarge {
        /// The shard.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A folder of ready-made inputs with more files than anybody makes.
    #[error("{}: expected at most {limit} files of ready-made inputs, found more", path.display())]
    TooManyFeeds {
        /// The folder.
        path: PathBuf,
        /// The limit.
        limit: usize,
    },
    /// No line of the file holds a sample.
    #[error("{}: the file holds no sample", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A shard is not parquet, or damaged.
    #[error("{}: expected a parquet file, found a damaged one: {message}", path.display())]
    DamagedShard {
        /// The shard.
        path: PathBuf,
        /// What the reader said.
        message: String,
    },
    /// A folder of shards is not complete, or not one split.
    #[error("{}: {problem}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An address names a part that the benchmark does not have.
    #[error("{}: expected generation, cloze or classification (with -image or -text), found `{found}`", address.display())]
    Part {
        /// The address.
        address: PathBuf,
        /// What stands after the last colon.
        found: String,
    },
    /// More rows are unusable than allowed.
    #[error("{}: {} unusable rows, more than the {limit} allowed:{}", path.display(), rows.len(), listed(rows))]
    BadRows {
        /// The address.
        path: PathBuf,
        /// How many were allowed.
        limit: usize,
        /// All of them.
        rows: Vec<BadRow>,
    },
    /// A line is not UTF-8.
    #[error("{}:{line}: the line is not UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// A line is not JSON.
    #[error("{}:{line}: the line is not valid JSON", path.display())]
    BrokenLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the JSON parser said; its own line number counts within the line.
        source: serde_json::Error,
    },
    /// A known column has another type than it must have, or is missing.
    #[error("{}:{line}: `{field}`: expected {expected}, found {found}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column; `facts.job` for a fact.
        field: String,
        /// What the column must hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
    /// The answer is blank: no token would count.
    #[error("{}:{line}: sample `{id}`: the answer is empty", path.display())]
    EmptyAnswer {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The sample.
        id: String,
    },
    /// Columns that belong together do not fit each other.
    #[error("{}:{line}: sample `{id}`: {problem}", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The sample.
        id: String,
        /// What does not fit.
        problem: String,
    },
    /// Two samples have one id.
    #[error("{}:{line}: the id `{id}` was already used on line {first_line}", path.display())]
    DuplicateId {
        /// The file.
        path: PathBuf,
        /// The later line, from 1.
        line: usize,
        /// The id.
        id: String,
        /// The line that had the id first.
        first_line: usize,
    },
    /// A sample's image cannot be read, although it was there.
    #[error("sample {sample}: its image cannot be read")]
    Unreadable {
        /// [`Sample::called`].
        sample: String,
        /// Why not.
        source: Box<Error>,
    },
    /// The image is not there, or is not a file.
    #[error("{}:{line}: sample `{id}`: the image {} {problem}", path.display(), image.display())]
    Image {
        /// The JSONL file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The sample.
        id: String,
        /// The resolved image path.
        image: PathBuf,
        /// `does not exist`, or what else is wrong.
        problem: &'static str,
    },
}

/// The first few, a line each.
fn listed(rows: &[BadRow]) -> String {
    let shown = rows.iter().take(5).map(|row| format!("\n  {row}"));
    let more = rows.len().saturating_sub(5);
    let rest = (more > 0).then(|| format!("\n  and {more} more"));
    shown.chain(rest).collect()
}

impl Error {
    /// What the user can do about it, where there is something to say.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "check the path"
            }
            Self::Read { .. } | Self::TooLarge { .. } | Self::TooManyFeeds { .. } => return None,
            Self::Empty { .. } => {
                r#"a sample is one line: {"image": "face.png", "question": "…", "answer": "…"}"#
            }
            Self::Files(error) => return error.hint(),
            Self::Unreadable { source, .. } => return source.hint(),
            Self::DamagedShard { .. } => "download the file again",
            Self::Folder { .. } => {
                "name the folder that holds one split's .parquet files, all of them, or one file"
            }
            Self::Part { .. } => "leave the part out for the rows' own question and answer",
            Self::BadRows { .. } => "allow them with --max-bad-rows, they are left out then",
            Self::NotUtf8 { .. } => "save the file as UTF-8 (a byte order mark is fine)",
            Self::BrokenLine { .. } => {
                "JSONL holds one whole JSON object a line, without commas between the lines"
            }
            Self::Field { .. } => {
                "a row needs `question` and `answer`; all other columns are optional (docs/formats.md)"
            }
            Self::Inconsistent { .. } => {
                "`options` needs two or more answers and `correct` the right one: the text itself, a letter or an index from 0"
            }
            Self::EmptyAnswer { .. } => {
                "remove the row, or give it the answer that the model is to forget or to keep"
            }
            Self::DuplicateId { .. } => {
                "leave `id` out to have one made from the file name and the line"
            }
            Self::Image { .. } => "image paths are relative to the folder of the JSONL file",
        };
        Some(hint.to_owned())
    }
}

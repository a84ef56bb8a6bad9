//! What can go wrong in a sweep.

use std::path::PathBuf;

use crate::{files, kvw, pipeline};

/// Why a sweep could not be run, read, or picked from.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    #[error(transparent)]
    Kvw(#[from] kvw::Error),
    #[error(transparent)]
    Files(#[from] files::Error),
    /// No point to run.
    #[error("the grid is empty: expected at least one value of {axis}")]
    EmptyGrid {
        /// The axis without values.
        axis: String,
    },
    /// Two sets have one name.
    #[error("two sets are called {name}: expected files with different names")]
    SameName {
        /// The name.
        name: String,
    },
    /// The file is no sweep.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What a sweep's file holds.
        expected: String,
        /// What this one holds.
        found: String,
    },
    /// The file is not JSON of this form.
    #[error("{} is not the file of a sweep", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its line.
        source: serde_json::Error,
    },
    /// The points in the file were made from something else.
    #[error("{}: its points belong to another {what}: expected {expected}, found {found}", path.display())]
    OtherSweep {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
        /// What this sweep is bound to.
        expected: String,
        /// What the file's points are bound to.
        found: String,
    },
    /// The objective asks for a metric that cannot be had.
    #[error("cannot choose by {metric} of the {set} set: {reason}")]
    NoMetric {
        /// The metric.
        metric: String,
        /// The set.
        set: String,
        /// Why not.
        reason: String,
    },
    /// No point does what was asked for.
    #[error("{0}")]
    TargetMissed(String),
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Pipeline(error) => error.hint(),
            Error::Kvw(error) => error.hint(),
            Error::Files(error) => error.hint(),
            Error::OtherSweep { .. } => {
                Some("choose another output, or begin this one anew with --force".into())
            }
            Error::NoMetric { .. } => {
                Some("choose another with --metric; `kvw eval` shows what the sets have".into())
            }
            Error::TargetMissed { .. } => Some(
                "widen the grid (`kvw sweep` with more of --gamma and --layers), or ask for less"
                    .into(),
            ),
            Error::Json { .. } | Error::Format { .. } => {
                Some("pass a file that `kvw sweep` wrote".into())
            }
            _ => None,
        }
    }
}

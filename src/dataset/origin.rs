//! Where a sample was read, so that whatever fails later can name it as the reader would have.
//!
//! In: a file, and a line or row of it. Out: a few words for a message. Promised: nothing of it goes into files that
//! are written, which name samples by their ids.

use std::path::Path;
use std::sync::Arc;

/// The file of a sample, and its place there. Cloning shares the path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub path: Arc<Path>,
    /// Where in it.
    pub place: Place,
}

/// A place in a file of samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A line of JSONL, from 1.
    Line(usize),
    /// A row of a parquet file, from 0.
    Row(usize),
}

impl std::fmt::Display for Origin {
    /// `retain.jsonl:3`, `forget.parquet row 2`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())?;
        match self.place {
            Place::Line(line) => write!(f, ":{line}"),
            Place::Row(row) => write!(f, " row {row}"),
        }
    }
}

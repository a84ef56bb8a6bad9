//! Whether a folder holds what a receipt says.
//!
//! In: the files of a folder, and a [`Receipt`]. Out: every file that the receipt names, with the
//! state of each of its ranges, by digest. Nothing is run, and nothing else is needed: neither the
//! original nor the plan. The receipt may come from anywhere: a range that the file does not have is
//! a state like any other. [`recheck_original`] does the same for the folder before the edit.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};

use rayon::prelude::*;

use super::Error;
use super::receipt::{EditedFile, EditedRange, Receipt};
use crate::bundle::{Entry, Tree};
use crate::files::Sha256;
use crate::onnx::ByteSpan;

/// What lies in a planned range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeState {
    /// What was written.
    Written,
    /// What was there before, where that is something else.
    Untouched,
    /// Neither of the two.
    Altered,
    /// The file ends before the range does.
    Absent,
}

/// A file that a receipt names, looked at again.
#[derive(Clone, Debug)]
pub struct RecheckedFile<'r> {
    /// What the receipt says.
    pub file: &'r EditedFile,
    /// Length in bytes; `None` where there is no such file.
    pub len: Option<u64>,
    /// Digest of the whole file, where the receipt has one to compare it with.
    pub sha256: Option<Sha256>,
    /// The multiplied ranges, in the receipt's order. Empty where there is no such file.
    pub ranges: Vec<(&'r EditedRange, RangeState)>,
    /// How many ranges that were inserted into the graph hold what was written.
    pub inserted: usize,
}

/// Looks at every file and range of `receipt` in the folder `tree` that it belongs to.
///
/// # Errors
/// A file that is there cannot be read.
pub fn recheck<'r>(tree: &Tree, receipt: &'r Receipt) -> Result<Vec<RecheckedFile<'r>>, Error> {
    each(tree, receipt, |entry, file| {
        let sha256 = match file.sha256_after {
            Some(_) => Some(Sha256::of_file(&entry.path)?),
            None => None,
        };
        let mut inserted = 0;
        for range in &file.inserted {
            let span = ByteSpan {
                offset: range.offset,
                len: range.len,
            };
            let found = digest(entry, span)?;
            inserted += usize::from(found == Some(range.sha256));
        }
        Ok(RecheckedFile {
            file,
            len: Some(entry.len),
            sha256,
            ranges: ranges(entry, file, EditedRange::span)?,
            inserted,
        })
    })
}

/// Looks at every range of `receipt` where it lies in the folder that was edited. All are
/// [`RangeState::Untouched`] there, or [`RangeState::Written`] where the edit changed nothing.
///
/// # Errors
/// A file that is there cannot be read.
pub fn recheck_original<'r>(
    tree: &Tree,
    receipt: &'r Receipt,
) -> Result<Vec<RecheckedFile<'r>>, Error> {
    each(tree, receipt, |entry, file| {
        Ok(RecheckedFile {
            file,
            len: Some(entry.len),
            sha256: None,
            ranges: ranges(entry, file, EditedRange::span_before)?,
            inserted: 0,
        })
    })
}

fn each<'r>(
    tree: &Tree,
    receipt: &'r Receipt,
    recheck: impl Fn(&Entry, &'r EditedFile) -> Result<RecheckedFile<'r>, Error> + Sync,
) -> Result<Vec<RecheckedFile<'r>>, Error> {
    receipt
        .files
        .par_iter()
        .map(|file| match tree.get(&file.path) {
            Some(entry) => recheck(entry, file),
            None => Ok(RecheckedFile {
                file,
                len: None,
                sha256: None,
                ranges: Vec::new(),
                inserted: 0,
            }),
        })
        .collect()
}

fn ranges<'r>(
    entry: &Entry,
    file: &'r EditedFile,
    span: fn(&EditedRange) -> ByteSpan,
) -> Result<Vec<(&'r EditedRange, RangeState)>, Error> {
    let state = |range: &'r EditedRange| {
        let state = match digest(entry, span(range))? {
            None => RangeState::Absent,
            Some(found) if found == range.sha256_after => RangeState::Written,
            Some(found) if found == range.sha256_before => RangeState::Untouched,
            Some(_) => RangeState::Altered,
        };
        Ok((range, state))
    };
    file.ranges.par_iter().map(state).collect()
}

/// The digest of a range; `None` where the file ends before it does.
fn digest(entry: &Entry, span: ByteSpan) -> Result<Option<Sha256>, Error> {
    let end = span.offset.checked_add(span.len);
    if end.is_none_or(|end| end > entry.len) {
        return Ok(None);
    }
    let read = || -> std::io::Result<Sha256> {
        let mut file = File::open(&entry.path)?;
        file.seek(SeekFrom::Start(span.offset))?;
        Sha256::of_reader(&mut file.take(span.len))
    };
    let found = read().map_err(crate::files::Error::io("read", &entry.path))?;
    Ok(Some(found))
}

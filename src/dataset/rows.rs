//! Rows of a benchmark → samples: what the formats share.
//!
//! In: rows, and what one row means. Out: a [`Dataset`]. Promise: a row that cannot be used is counted
//! and named; more of them than allowed are an error.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::table::{Cell, Row, read};
use super::{BadRow, Dataset, Error, ImageSource, Origin, ReadOptions, Sample, origin};

/// A row's place, for ids.
pub(super) struct Place<'a> {
    /// The folder's name.
    pub(super) set: &'a str,
    /// From 0, over all shards.
    pub(super) index: usize,
    row: &'a Row,
}

impl Place<'_> {
    /// `forget05:12`.
    pub(super) fn id(&self) -> String {
        format!("{}:{}", self.set, self.index)
    }

    /// An image struct `{bytes, path}`; `None` for null.
    pub(super) fn image(&self, cell: &Cell) -> Result<Option<ImageSource>, String> {
        let bytes = match cell {
            Cell::Null => return Ok(None),
            Cell::Bytes(bytes) => bytes,
            Cell::Struct(_) => match (cell.get("bytes"), cell.get("path")) {
                (Cell::Bytes(bytes), _) => bytes,
                (Cell::Null, Cell::Null) => return Ok(None),
                (Cell::Null, _) => return Err("the image is a path, and holds no bytes".into()),
                (other, _) => {
                    return Err(format!(
                        "`image.bytes`: expected bytes, found {}",
                        other.kind()
                    ));
                }
            },
            other => {
                return Err(format!(
                    "`image`: expected a struct, found {}",
                    other.kind()
                ));
            }
        };
        if bytes.is_empty() {
            return Err("the image is empty".into());
        }
        let path = cell.get("path").text().ok().flatten();
        let mut origin = self.row.shard.clone().into_os_string();
        origin.push(format!("#row {}", self.row.index));
        if let Some(path) = path {
            origin.push(format!("/{path}"));
        }
        Ok(Some(ImageSource::Bytes {
            origin: origin.into(),
            bytes: bytes.clone(),
        }))
    }
}

/// The samples of the shards at `folder`. `address` is how the user named them; `samples` makes a row's
/// samples, or says what is wrong with the row.
///
/// # Errors
/// [`Error`]: of [`read`]; too many bad rows; no sample.
pub(super) fn dataset(
    address: &Path,
    folder: &Path,
    options: &ReadOptions,
    samples: impl Fn(&Place<'_>, &Cell) -> Result<Vec<Sample>, String>,
) -> Result<Dataset, Error> {
    let (rows, sha256) = read(folder)?;
    let name = folder.file_stem().unwrap_or_default().to_string_lossy();
    let mut found = Vec::new();
    let mut ids = HashSet::new();
    let mut bad_rows = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let place = Place {
            set: &name,
            index,
            row,
        };
        match samples(&place, &row.cells) {
            Ok(samples) => {
                let path: Arc<Path> = row.shard.as_path().into();
                for mut sample in samples {
                    sample.origin = Some(Origin {
                        path: Arc::clone(&path),
                        place: origin::Place::Row(row.index),
                    });
                    if !ids.insert(sample.id.clone()) {
                        sample.id = format!("{}#{index}", sample.id);
                        ids.insert(sample.id.clone());
                    }
                    found.push(sample);
                }
            }
            Err(problem) => bad_rows.push(BadRow {
                path: row.shard.clone(),
                row: row.index,
                problem,
            }),
        }
    }
    if bad_rows.len() > options.max_bad_rows {
        return Err(Error::BadRows {
            path: address.to_owned(),
            limit: options.max_bad_rows,
            rows: bad_rows,
        });
    }
    if found.is_empty() {
        return Err(Error::Empty {
            path: address.to_owned(),
        });
    }
    Ok(Dataset {
        path: address.to_owned(),
        samples: found,
        sha256,
        bad_rows,
    })
}

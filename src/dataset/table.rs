//! Parquet folder → rows. In: a folder of shards (or one file). Out: every row as [`Cell`]s, in the
//! shards' order, and a digest of the shards.
//!
//! Promise: the `parquet` crate panics on damaged files; here that is an error that names the file. A
//! folder that lacks one of its numbered shards, or holds two splits, is refused. What is held in
//! memory stays under [`MAX_BYTES`].

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row as ParquetRow};
use sha2::{Digest, Sha256};

use super::{Error, hex};

/// The most bytes that a dataset's rows may hold, images included.
pub const MAX_BYTES: u64 = 8 << 30;

/// One value of a row.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    Null,
    Text(String),
    Bytes(Bytes),
    /// A number or a boolean, as text.
    Plain(String),
    List(Vec<Cell>),
    Struct(Vec<(String, Cell)>),
}

impl Cell {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Cell::Null => "null",
            Cell::Text(text) if text.trim().is_empty() => "an empty string",
            Cell::Text(_) => "a string",
            Cell::Bytes(_) => "bytes",
            Cell::Plain(_) => "a number or boolean",
            Cell::List(_) => "a list",
            Cell::Struct(_) => "a struct",
        }
    }

    /// The field of a struct; null where it has none.
    pub(super) fn get(&self, name: &str) -> &Cell {
        let fields = match self {
            Cell::Struct(fields) => fields.as_slice(),
            _ => &[],
        };
        let found = fields.iter().find(|(field, _)| field == name);
        found.map_or(&Cell::Null, |(_, cell)| cell)
    }

    /// Text; `None` for null and for what is blank.
    ///
    /// # Errors
    /// Something else, by its kind.
    pub(super) fn text(&self) -> Result<Option<&str>, String> {
        match self {
            Cell::Null => Ok(None),
            Cell::Text(text) | Cell::Plain(text) => {
                Ok(Some(text.as_str()).filter(|text| !text.trim().is_empty()))
            }
            other => Err(format!("expected a string, found {}", other.kind())),
        }
    }

    /// The texts of a list; none for null.
    pub(super) fn texts(&self) -> Result<Vec<String>, String> {
        let cells = match self {
            Cell::Null => return Ok(Vec::new()),
            Cell::List(cells) => cells,
            other => {
                return Err(format!(
                    "expected a list of strings, found {}",
                    other.kind()
                ));
            }
        };
        let texts = cells.iter().map(|cell| match cell.text()? {
            Some(text) => Ok(text.to_owned()),
            None => Err(format!(
                "expected a list of strings, found {} in it",
                cell.kind()
            )),
        });
        texts.collect()
    }

    /// The structs of a list of structs, or of a struct of lists (both are how `datasets` writes
    /// nested features); none for null.
    pub(super) fn records(&self) -> Result<Vec<Cell>, String> {
        match self {
            Cell::Null => Ok(Vec::new()),
            Cell::List(cells) => Ok(cells.clone()),
            Cell::Struct(fields) => {
                let mut records: Vec<Vec<(String, Cell)>> = Vec::new();
                for (name, cell) in fields {
                    let Cell::List(values) = cell else {
                        return Err(format!("expected lists, found {} in `{name}`", cell.kind()));
                    };
                    records.resize(records.len().max(values.len()), Vec::new());
                    for (record, value) in records.iter_mut().zip(values) {
                        record.push((name.clone(), value.clone()));
                    }
                }
                Ok(records.into_iter().map(Cell::Struct).collect())
            }
            other => Err(format!("expected a list, found {}", other.kind())),
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Cell::Null => 0,
            Cell::Text(text) | Cell::Plain(text) => text.len() as u64,
            Cell::Bytes(bytes) => bytes.len() as u64,
            Cell::List(cells) => cells.iter().map(Cell::bytes).sum(),
            Cell::Struct(fields) => fields.iter().map(|(_, cell)| cell.bytes()).sum(),
        }
    }
}

/// A row, and where it stands.
pub(super) struct Row {
    /// The shard.
    pub(super) shard: PathBuf,
    /// From 0, in the shard.
    pub(super) index: usize,
    /// Its columns: a [`Cell::Struct`].
    pub(super) cells: Cell,
}

/// Every row of the shards at `path`, and the lowercase hex SHA-256 over the shards' names and digests.
///
/// # Errors
/// [`Error`]: nothing there, a shard missing, two splits, damaged, too large.
pub(super) fn read(path: &Path) -> Result<(Vec<Row>, String), Error> {
    let shards = shards(path)?;
    let mut digest = Sha256::new();
    let mut rows = Vec::new();
    let mut held = 0;
    for shard in shards {
        let bytes = crate::files::Sha256::of_file(&shard).map_err(|source| Error::Shard {
            path: shard.clone(),
            source: Box::new(source),
        })?;
        digest.update(shard.file_name().unwrap_or_default().as_encoded_bytes());
        digest.update(bytes.to_string().as_bytes());
        let read = catch_unwind(AssertUnwindSafe(|| {
            read_shard(&shard, &mut rows, &mut held)
        }));
        read.unwrap_or_else(|payload| {
            Err(Error::DamagedShard {
                path: shard.clone(),
                message: message(payload.as_ref()),
            })
        })?;
    }
    Ok((rows, hex(&digest.finalize())))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied());
    text.unwrap_or("the reader panicked").to_owned()
}

fn read_shard(shard: &Path, rows: &mut Vec<Row>, held: &mut u64) -> Result<(), Error> {
    let damaged = |error: parquet::errors::ParquetError| Error::DamagedShard {
        path: shard.to_owned(),
        message: error.to_string(),
    };
    let file = std::fs::File::open(shard).map_err(|source| Error::Read {
        path: shard.to_owned(),
        source,
    })?;
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    // What the file says of itself, before anything is decompressed.
    let groups = reader.metadata().row_groups();
    let claimed = groups
        .iter()
        .map(|group| u64::try_from(group.total_byte_size()).unwrap_or(u64::MAX))
        .fold(0_u64, u64::saturating_add);
    let too_large = || Error::TooLarge {
        path: shard.to_owned(),
        limit: MAX_BYTES,
    };
    if claimed > MAX_BYTES {
        return Err(too_large());
    }
    for (index, row) in reader.get_row_iter(None).map_err(damaged)?.enumerate() {
        let cells = cells(row.map_err(damaged)?);
        *held += cells.bytes();
        if *held > MAX_BYTES {
            return Err(too_large());
        }
        rows.push(Row {
            shard: shard.to_owned(),
            index,
            cells,
        });
    }
    Ok(())
}

fn cells(row: ParquetRow) -> Cell {
    let columns = row.into_columns().into_iter();
    Cell::Struct(columns.map(|(name, field)| (name, cell(field))).collect())
}

fn cell(field: Field) -> Cell {
    match field {
        Field::Null => Cell::Null,
        Field::Str(text) => Cell::Text(text),
        Field::Bytes(bytes) => Cell::Bytes(Bytes::copy_from_slice(bytes.data())),
        Field::Group(row) => cells(row),
        Field::ListInternal(list) => {
            Cell::List(list.elements().iter().cloned().map(cell).collect())
        }
        Field::MapInternal(_) => Cell::Null,
        other => Cell::Plain(other.to_string()),
    }
}

/// The shards at `path`, in order.
fn shards(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let read = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    if std::fs::metadata(path).map_err(read)?.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(path).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "parquet")
        {
            shards.push(path);
        }
    }
    shards.sort();
    let unfit = |problem: String| Error::Folder {
        path: path.to_owned(),
        problem,
    };
    if shards.is_empty() {
        return Err(unfit("expected .parquet files, found none".into()));
    }
    let mut splits = BTreeSet::new();
    let mut numbered = Vec::new();
    for shard in &shards {
        let stem = shard.file_stem().unwrap_or_default().to_string_lossy();
        match number(&stem) {
            Some((split, index, of)) => {
                splits.insert(split.to_owned());
                numbered.push((index, of));
            }
            None => {
                splits.insert(stem.into_owned());
            }
        }
    }
    if splits.len() > 1 {
        let splits: Vec<String> = splits.into_iter().collect();
        return Err(unfit(format!(
            "expected one split, found {}",
            splits.join(", ")
        )));
    }
    if let Some(&(_, of)) = numbered.first() {
        let found: BTreeSet<usize> = numbered.iter().map(|&(index, _)| index).collect();
        if let Some(missing) = (0..of).find(|index| !found.contains(index)) {
            return Err(unfit(format!(
                "expected {of} shards, found {}: number {missing} is missing",
                found.len()
            )));
        }
    }
    Ok(shards)
}

/// `train-00001-of-00003` → (`train`, 1, 3).
fn number(stem: &str) -> Option<(&str, usize, usize)> {
    let (rest, of) = stem.rsplit_once("-of-")?;
    let (split, index) = rest.rsplit_once('-')?;
    Some((split, index.parse().ok()?, of.parse().ok()?))
}

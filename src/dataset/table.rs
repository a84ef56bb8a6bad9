//! Parquet folder → rows. In: a folder of shards (or one file). Out: every row as [`Cell`]s, in the
//! shards' order, and a digest of the shards.
//!
//! Promise: the `parquet` crate panics on damaged files, and a small file can unpack to gigabytes; so a shard
//! is read by a child process ([`confine`]), and what goes wrong there is an error that names the file. A
//! folder that lacks one of its numbered shards, or holds two splits, is refused. What is held in
//! memory stays under [`TABLE_BYTES`], and for a small file under far less ([`held_at_most`]).

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row as ParquetRow};
use parquet::schema::types::Type;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, hex};
use crate::confine::{self, Budget};
use crate::files::copy::open_regular;
use crate::limits::{
    CONFINED_BYTES, CONFINED_SECONDS, TABLE_ALLOWANCE, TABLE_AMPLIFICATION, TABLE_BYTES,
    TABLE_DEPTH, TEXT_BYTES,
};

/// One value of a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
            Cell::Text(text) | Cell::Plain(text) if text.len() > TEXT_BYTES => Err(format!(
                "expected a text of at most 1 MiB, found {} bytes",
                text.len()
            )),
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

    /// Memory that it takes, in bytes.
    fn memory(&self) -> u64 {
        let inner = match self {
            Cell::Null => 0,
            Cell::Text(text) | Cell::Plain(text) => text.len() as u64,
            Cell::Bytes(bytes) => bytes.len() as u64,
            Cell::List(cells) => cells.iter().map(Cell::memory).sum(),
            Cell::Struct(fields) => fields
                .iter()
                .map(|(name, cell)| (size_of::<String>() + name.len()) as u64 + cell.memory())
                .sum(),
        };
        inner + size_of::<Cell>() as u64
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
        let bytes = crate::files::Sha256::of_file(&shard)?;
        digest.update(shard.file_name().unwrap_or_default().as_encoded_bytes());
        digest.update(bytes.to_string().as_bytes());
        read_shard(&shard, &mut rows, &mut held)?;
    }
    Ok((rows, hex(&digest.finalize())))
}

/// Memory for the rows of a shard of so many bytes: text and repeated pictures can be packed well, not without
/// bound.
fn held_at_most(shard: u64) -> u64 {
    let most = shard.saturating_mul(TABLE_AMPLIFICATION);
    most.saturating_add(TABLE_ALLOWANCE).min(TABLE_BYTES)
}

fn read_shard(shard: &Path, rows: &mut Vec<Row>, held: &mut u64) -> Result<(), Error> {
    let (file, metadata) = open_regular(shard)?;
    let limit = held_at_most(metadata.len());
    let budget = Budget {
        memory: CONFINED_BYTES.saturating_add(metadata.len().saturating_mul(4)),
        seconds: CONFINED_SECONDS.saturating_add(metadata.len() >> 22),
    };
    let first = rows.len();
    let mut of_shard = 0;
    let mut too_large = false;
    let read = confine::read(PARQUET, rows_of, file, budget, &mut |item| {
        let cells: Cell = postcard::from_bytes(item).map_err(|error| error.to_string())?;
        of_shard += cells.memory();
        too_large = of_shard > limit || held.saturating_add(of_shard) > TABLE_BYTES;
        if too_large {
            return Err(String::new());
        }
        let index = rows.len() - first;
        rows.push(Row {
            shard: shard.to_owned(),
            index,
            cells,
        });
        Ok(())
    });
    *held += of_shard;
    if too_large {
        return Err(Error::TooLarge {
            path: shard.to_owned(),
            limit,
        });
    }
    read.map_err(|fault| Error::DamagedShard {
        path: shard.to_owned(),
        message: fault.to_string(),
    })
}

/// The name of [`rows_of`] among the confined readers.
pub(crate) const PARQUET: &str = "parquet";

/// The confined part: the rows of a parquet file, each as postcard's bytes of a [`Cell`].
pub(crate) fn rows_of(file: File, sink: confine::Sink<'_>) -> Result<(), String> {
    let reader = SerializedFileReader::new(file).map_err(|error| error.to_string())?;
    // What the file says of itself, before anything is decompressed.
    let groups = reader.metadata().row_groups();
    let claimed = groups
        .iter()
        .map(|group| u64::try_from(group.total_byte_size()).unwrap_or(u64::MAX))
        .fold(0_u64, u64::saturating_add);
    if claimed > TABLE_BYTES {
        return Err(format!(
            "it claims {claimed} bytes of rows, expected at most {TABLE_BYTES}"
        ));
    }
    let depth = reader
        .metadata()
        .file_metadata()
        .schema_descr()
        .root_schema();
    if levels(depth, 0) > TABLE_DEPTH {
        return Err(format!(
            "expected at most {TABLE_DEPTH} columns inside each other, found more"
        ));
    }
    for row in reader
        .get_row_iter(None)
        .map_err(|error| error.to_string())?
    {
        let cells = cells(row.map_err(|error| error.to_string())?);
        sink(&postcard::to_stdvec(&cells).map_err(|error| error.to_string())?)?;
    }
    Ok(())
}

/// How deep the columns of `schema` lie; counted no further than it matters.
fn levels(schema: &Type, above: usize) -> usize {
    if !schema.is_group() || above > TABLE_DEPTH {
        return above;
    }
    let fields = schema.get_fields().iter();
    let below = fields.map(|field| levels(field, above + 1)).max();
    below.unwrap_or(above)
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

//! Files changed where they lie, so that a crash leaves nothing that cannot be brought to its end.
//!
//! In: a folder, byte ranges of files in it with the bytes that they shall hold, and small files to be replaced or
//! removed with them. Out: all of it, or, after a crash, a journal in the folder from which the next run finishes.
//!
//! 1. [`begin`]: a *redo* journal, `.kvw-journal`: for each range its place, the digests of what is there and of what
//!    shall be there, and the new bytes. It is synced and then gets its name by a rename: that is the commit
//!    mark. Before it nothing has changed, after it nothing is lost.
//! 2. [`roll_forward`]: a range that holds the new bytes is skipped, one that holds the old bytes is written; one that
//!    holds neither stops everything before the first write, and is named.
//! 3. Sync, read everything back, compare; replace the small files by renames; remove the journal.
//!
//! A write that a power cut tears is neither old nor new. So ranges are written in windows of 16 MiB, and before each
//! a second file, `.kvw-journal.window`, keeps a short digest of every 512 bytes as they were: a range is torn, and may
//! be written again, only where each of its sectors is the new one or the old one.
//!
//! Room: the journal is as large as the changed bytes and 80 bytes for each range of at most 1 MiB, the window's file
//! at most 256 KiB, twice for a moment. Nothing is ever written through a symbolic link or to a file with two names. A
//! journal may come with a folder from a stranger: it names files of that folder only, and can do no more than
//! change them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::copy::{PatchTarget, open_regular};
use super::interrupt::Listed;
use super::lock::FolderLock;
use super::new_folder::{RECEIPT, StagedFile, VOUCHERS, remove_orphans, sync_folder, write_atomic};
use super::{Error, Sha256, Sha256Hasher, json};
use crate::limits::{JOURNAL_INDEX_BYTES, JOURNAL_RECORD_BYTES, JOURNAL_RECORDS};

/// The journal's name in its folder.
pub const JOURNAL: &str = ".kvw-journal";
/// What the sectors of the ranges under way were.
const WINDOW: &str = ".kvw-journal.window";

/// Bytes that may be torn at any one time.
const WINDOW_BYTES: u64 = 16 << 20;
/// What a disk writes whole.
const SECTOR: u64 = 512;

const MAGIC: &[u8; 16] = b"kvw journal 1\n\0\0";
const END: &[u8; 8] = b"kvw end\n";
const HEADER: u64 = 80;
const FOOTER: u64 = 56;

/// What a journal is about, beside the ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// The files with changed ranges, by their number in the records.
    pub files: Vec<JournalFile>,
    /// Files that are replaced as a whole (base64), or removed (`null`): the receipt, and what vouches for the
    /// model as it was.
    pub whole: BTreeMap<String, Option<String>>,
}

/// A file with changed ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalFile {
    /// Path relative to the folder.
    pub path: String,
    /// Its length, which does not change.
    pub bytes: u64,
}

impl Index {
    /// What is to become of a small file: these bytes, or its removal.
    pub fn set(&mut self, name: &str, bytes: Option<&[u8]>) {
        let bytes = bytes.map(|bytes| STANDARD.encode(bytes));
        self.whole.insert(name.to_owned(), bytes);
    }
}

/// A range: where it is, what was there, what shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Number of the file in [`Index::files`].
    pub file: usize,
    /// Bytes from the file's start.
    pub offset: u64,
    /// Digest of the bytes before.
    pub old: Sha256,
    /// Digest of the bytes after.
    pub new: Sha256,
}

/// Writes a journal, record by record. Files ascend, and offsets within a file.
pub struct JournalWriter<'w> {
    out: &'w mut StagedFile,
    hasher: Sha256Hasher,
    at: u64,
}

impl<'w> JournalWriter<'w> {
    /// Begins a journal.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`].
    pub fn begin(out: &'w mut StagedFile) -> Result<Self, Error> {
        let mut writer = JournalWriter {
            out,
            hasher: Sha256Hasher::default(),
            at: 0,
        };
        writer.covered(MAGIC)?;
        Ok(writer)
    }

    /// Adds a range with the bytes that it shall hold, at most [`JOURNAL_RECORD_BYTES`].
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`].
    pub fn record(&mut self, range: &Range, bytes: &[u8]) -> Result<(), Error> {
        let number = u32::try_from(range.file).unwrap_or(u32::MAX);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.covered(&number.to_le_bytes())?;
        self.covered(&len.to_le_bytes())?;
        self.covered(&range.offset.to_le_bytes())?;
        self.covered(range.old.as_bytes())?;
        self.covered(range.new.as_bytes())?;
        // The digest `new` covers these.
        self.at += u64::from(len);
        self.uncovered(bytes)
    }

    /// Ends the journal.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`].
    pub fn finish(mut self, index: &Index) -> Result<(), Error> {
        let at = self.at;
        let index = serde_json::to_vec(index);
        let index = index.map_err(|error| Error::io("write", self.out.path())(error.into()))?;
        if index.len() as u64 > JOURNAL_INDEX_BYTES {
            return Err(Error::Journal {
                path: self.out.path().to_owned(),
                found: format!("an index of {} bytes", index.len()),
            });
        }
        self.covered(&index)?;
        self.covered(&at.to_le_bytes())?;
        self.covered(&(index.len() as u64).to_le_bytes())?;
        let digest = std::mem::take(&mut self.hasher).finish();
        self.uncovered(digest.as_bytes())?;
        self.uncovered(END)
    }

    /// Writes bytes that the digest at the end covers.
    fn covered(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hasher.update(bytes);
        self.at += bytes.len() as u64;
        self.uncovered(bytes)
    }

    fn uncovered(&mut self, bytes: &[u8]) -> Result<(), Error> {
        (self.out.write_all(bytes)).map_err(Error::io("write", self.out.path()))
    }
}

/// Begins the journal of `folder`: its commit is the patch's. Removes what a run that did not come so far left.
///
/// # Errors
/// [`Error::Exists`] where a patch is pending; no room.
pub fn begin(folder: &Path, _lock: &FolderLock) -> Result<StagedFile, Error> {
    StagedFile::create(&folder.join(JOURNAL), false)
}

/// A journal that was read: its records, whose bytes stay in the file.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    files: Vec<JournalFile>,
    /// The small files and what they shall hold; `None`: they are removed.
    whole: Vec<(String, Option<Vec<u8>>)>,
    records: Vec<Record>,
}

#[derive(Clone, Copy, Debug)]
struct Record {
    range: Range,
    len: u64,
    /// Where the new bytes are in the journal.
    at: u64,
}

/// What a range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    New,
    Old,
    Neither,
}

impl Journal {
    /// Reads the journal or undo log at `path`.
    ///
    /// # Errors
    /// [`Error::Journal`] where it is none, or not whole.
    pub fn open(path: &Path) -> Result<Journal, Error> {
        let (file, metadata) = open_regular(path)?;
        let damaged = |found: String| Error::Journal {
            path: path.to_owned(),
            found,
        };
        let read = |at: u64, bytes: &mut [u8]| {
            (file.read_exact_at(bytes, at)).map_err(Error::io("read", path))
        };
        let len = metadata.len();
        let magic_len = MAGIC.len() as u64;
        if len < magic_len + FOOTER {
            return Err(damaged(format!("{len} bytes")));
        }
        let mut magic = [0; MAGIC.len()];
        read(0, &mut magic)?;
        if &magic != MAGIC {
            return Err(damaged("another kind of file".to_owned()));
        }
        let mut footer = [0; 56];
        read(len - FOOTER, &mut footer)?;
        let mut fields = footer.as_slice();
        let index_at = u64::from_le_bytes(take(&mut fields));
        let index_len = u64::from_le_bytes(take(&mut fields));
        let digest: [u8; 32] = take(&mut fields);
        if fields != END {
            return Err(damaged("no end".to_owned()));
        }
        let index_end = index_at.checked_add(index_len);
        if index_end != Some(len - FOOTER)
            || index_len > JOURNAL_INDEX_BYTES
            || index_at < magic_len
        {
            return Err(damaged(format!(
                "an index of {index_len} bytes at {index_at}"
            )));
        }
        let mut index_bytes = vec![0; usize::try_from(index_len).unwrap_or(usize::MAX)];
        read(index_at, &mut index_bytes)?;
        let index: Index = json::read_format(&index_bytes)
            .map_err(|error| damaged(format!("an index that is none: {error}")))?;
        let mut whole = Vec::new();
        for (name, content) in &index.whole {
            if name != RECEIPT && !VOUCHERS.contains(&name.as_str()) {
                return Err(damaged(format!("'{name}' to be replaced")));
            }
            // Now: what is found when it is written would leave the ranges changed and this file as it was.
            let content = content.as_ref().map(|content| STANDARD.decode(content));
            let content = content
                .transpose()
                .map_err(|error| damaged(format!("'{name}' that is no base64: {error}")))?;
            whole.push((name.clone(), content));
        }
        let mut hasher = Sha256Hasher::default();
        hasher.update(MAGIC);
        let (mut records, mut at, mut end) = (Vec::new(), magic_len, (0, 0));
        while at < index_at {
            let mut header = [0; 80];
            let left = index_at - at;
            if left <= HEADER || records.len() >= JOURNAL_RECORDS {
                return Err(damaged(format!("{left} bytes after the last record")));
            }
            read(at, &mut header)?;
            hasher.update(&header);
            let mut fields = header.as_slice();
            let number = u32::from_le_bytes(take(&mut fields));
            let len = u64::from(u32::from_le_bytes(take(&mut fields)));
            let offset = u64::from_le_bytes(take(&mut fields));
            let (old, new) = (take(&mut fields).into(), take(&mut fields).into());
            let file = usize::try_from(number).unwrap_or(usize::MAX);
            let range_end = offset.checked_add(len);
            let fits = index.files.get(file).zip(range_end);
            let fits = fits.is_some_and(|(file, end)| end <= file.bytes);
            let ascends = (number, offset) >= end;
            if !fits || !ascends || len == 0 || len > JOURNAL_RECORD_BYTES || len > left - HEADER {
                return Err(damaged(format!(
                    "a range of {len} bytes at {offset} of file {number}"
                )));
            }
            end = (number, offset + len);
            records.push(Record {
                range: Range {
                    file,
                    offset,
                    old,
                    new,
                },
                len,
                at: at + HEADER,
            });
            at += HEADER + len;
        }
        hasher.update(&index_bytes);
        hasher.update(&index_at.to_le_bytes());
        hasher.update(&index_len.to_le_bytes());
        match hasher.finish().as_bytes() == &digest {
            true => Ok(Journal {
                file,
                path: path.to_owned(),
                files: index.files,
                whole,
                records,
            }),
            false => Err(damaged("other bytes than were written".to_owned())),
        }
    }

    /// Bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.records.iter().map(|record| record.len).sum()
    }

    /// The files whose bytes change.
    pub fn files(&self) -> &[JournalFile] {
        &self.files
    }

    /// Opens the files of `folder` that the journal is about.
    ///
    /// # Errors
    /// One of them is missing, has another length or a second name, or is reached through a link.
    pub fn targets(&self, folder: &Path) -> Result<Targets, Error> {
        let open = |file: &JournalFile| {
            let target = open_target(folder, &file.path)?;
            match target.len() == file.bytes {
                true => Ok(target),
                false => Err(Error::Journal {
                    path: self.path.clone(),
                    found: format!(
                        "'{}' of {} bytes, where it is about one of {}",
                        file.path,
                        target.len(),
                        file.bytes
                    ),
                }),
            }
        };
        let files = self.files.iter().map(open);
        Ok(Targets {
            folder: folder.to_owned(),
            files: files.collect::<Result<_, _>>()?,
        })
    }

    /// Whether every range of `targets` holds what it held when the journal was written, or what it shall hold, and
    /// the journal's own bytes are those that were written. A torn range is told from a foreign one by the window's file.
    /// Returns which ranges are still to be written.
    ///
    /// # Errors
    /// [`Error::Neither`] with the first range that holds something else.
    fn check(&self, targets: &Targets) -> Result<Vec<State>, Error> {
        let (mut all, mut first) = (Vec::with_capacity(self.records.len()), 0);
        for window in self.windows() {
            let states = self.states(window, targets)?;
            let pending = window.par_iter().zip(&states);
            // A journal whose own bytes were damaged since must not be found out half way through.
            (pending.filter(|(_, state)| **state != State::New))
                .try_for_each_init(Vec::new, |bytes, (record, _)| self.new_bytes(record, bytes))?;
            self.check_torn(first, window, &states, targets)?;
            first += window.len();
            all.extend(states);
        }
        Ok(all)
    }

    /// Whether each range of `window`, whose first record is number `first`, that is neither old nor new was torn by
    /// a write that was under way.
    fn check_torn(
        &self,
        first: usize,
        window: &[Record],
        states: &[State],
        targets: &Targets,
    ) -> Result<(), Error> {
        if !states.contains(&State::Neither) {
            return Ok(());
        }
        let kept = Window::read(&targets.folder, first)?;
        for (record, state) in window.iter().zip(states) {
            if *state != State::Neither {
                continue;
            }
            if let Some(offset) = self.torn(record, window, targets, kept.as_ref())? {
                return Err(self.foreign(record, offset, targets));
            }
        }
        Ok(())
    }

    fn foreign(&self, record: &Record, offset: u64, targets: &Targets) -> Error {
        let file = self.files.get(record.range.file);
        Error::Neither {
            path: targets
                .folder
                .join(file.map_or("", |file| file.path.as_str())),
            offset,
        }
    }

    /// Runs of records that are written together.
    fn windows(&self) -> impl Iterator<Item = &[Record]> {
        let mut rest = self.records.as_slice();
        std::iter::from_fn(move || {
            let mut bytes = 0;
            let fits = |record: &&Record| {
                bytes += record.len;
                bytes <= WINDOW_BYTES
            };
            let count = rest.iter().take_while(fits).count();
            let (window, after) = rest.split_at_checked(count)?;
            rest = after;
            (!window.is_empty()).then_some(window)
        })
    }

    /// What a range holds, read into `bytes`.
    fn state(
        &self,
        record: &Record,
        targets: &Targets,
        bytes: &mut Vec<u8>,
    ) -> Result<State, Error> {
        targets.read(record, bytes)?;
        let found = Sha256::of_bytes(bytes);
        Ok(match found {
            found if found == record.range.new => State::New,
            found if found == record.range.old => State::Old,
            _ => State::Neither,
        })
    }

    /// What each range of `window` holds.
    fn states(&self, window: &[Record], targets: &Targets) -> Result<Vec<State>, Error> {
        (window.par_iter())
            .map_init(Vec::new, |bytes, record| self.state(record, targets, bytes))
            .collect()
    }

    /// The new bytes of a record, which must be those that were written, into `bytes`.
    fn new_bytes(&self, record: &Record, bytes: &mut Vec<u8>) -> Result<(), Error> {
        self.read(record, bytes)?;
        match Sha256::of_bytes(bytes) == record.range.new {
            true => Ok(()),
            false => Err(Error::Journal {
                path: self.path.clone(),
                found: format!("other bytes than were written, at {}", record.at),
            }),
        }
    }

    /// The same, as they are.
    fn read(&self, record: &Record, bytes: &mut Vec<u8>) -> Result<(), Error> {
        bytes.resize(usize::try_from(record.len).unwrap_or(usize::MAX), 0);
        (self.file.read_exact_at(bytes, record.at)).map_err(Error::io("read", &self.path))
    }

    /// Whether each sector of `record` is old or new; otherwise the offset of the first that is neither.
    fn torn(
        &self,
        record: &Record,
        window: &[Record],
        targets: &Targets,
        kept: Option<&Window>,
    ) -> Result<Option<u64>, Error> {
        let Some(old) = kept.and_then(|kept| kept.of(window, record)) else {
            return Ok(Some(record.range.offset));
        };
        let (mut found, mut new) = (Vec::new(), Vec::new());
        targets.read(record, &mut found)?;
        self.new_bytes(record, &mut new)?;
        let (offset, len) = (record.range.offset, record.len);
        let each = sectors(offset, len).zip(old);
        for ((start, end), old) in each {
            let (found, new) = (found.get(start..end), new.get(start..end));
            let is_old = found.is_some_and(|found| &short_digest(found) == old);
            if found != new && !is_old {
                return Ok(Some(offset + start as u64));
            }
        }
        Ok(None)
    }

    /// Writes every range that is not new yet, by the `states` that [`Journal::check`] found.
    fn redo(&self, states: &[State], targets: &Targets) -> Result<(), Error> {
        let (mut first, mut rest) = (0, states);
        for window in self.windows() {
            let number = first;
            first += window.len();
            let (states, after) = rest.split_at_checked(window.len()).unwrap_or_default();
            rest = after;
            if states.iter().all(|state| *state == State::New) {
                continue;
            }
            // A torn range's window's file is there, and must stay as it is.
            if !states.contains(&State::Neither) {
                Window::write(targets, window, number)?;
            }
            let pending: Vec<_> = (window.iter().zip(states))
                .filter(|(_, state)| **state != State::New)
                .map(|(record, _)| record)
                .collect();
            let mut bytes = Vec::new();
            for record in &pending {
                // Checked before the first write, and once more when the range is read back.
                self.read(record, &mut bytes)?;
                (targets.of(record)?).write_at(record.range.offset, &bytes)?;
            }
            let mut files: Vec<_> = pending.iter().map(|record| record.range.file).collect();
            files.dedup();
            for file in files {
                if let Some(target) = targets.files.get(file) {
                    target.sync()?;
                }
            }
        }
        Ok(())
    }

    /// Reads every range back.
    fn verify(&self, targets: &Targets) -> Result<(), Error> {
        (self.records.par_iter()).try_for_each_init(Vec::new, |bytes, record| {
            match self.state(record, targets, bytes)? {
                State::New => Ok(()),
                _ => Err(self.foreign(record, record.range.offset, targets)),
            }
        })
    }

    /// Replaces and removes the small files.
    fn finish(&self, folder: &Path) -> Result<(), Error> {
        for (name, content) in &self.whole {
            let path = folder.join(name);
            match content {
                Some(bytes) => write_atomic(&path, true, |file| file.write_all(bytes))?,
                None => remove_if_there(&path)?,
            }
        }
        sync_folder(folder)
    }
}

/// The first `N` bytes, taken off.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    match bytes.split_first_chunk() {
        Some((first, rest)) => {
            *bytes = rest;
            *first
        }
        None => [0; N],
    }
}

/// The files that a journal is about, open to be written.
#[derive(Debug)]
pub struct Targets {
    folder: PathBuf,
    files: Vec<PatchTarget>,
}

impl Targets {
    fn of(&self, record: &Record) -> Result<&PatchTarget, Error> {
        // `Journal::open` saw to it that there is one.
        self.files
            .get(record.range.file)
            .ok_or_else(|| Error::Journal {
                path: self.folder.join(JOURNAL),
                found: format!("no file {}", record.range.file),
            })
    }

    fn read(&self, record: &Record, bytes: &mut Vec<u8>) -> Result<(), Error> {
        bytes.resize(usize::try_from(record.len).unwrap_or(usize::MAX), 0);
        self.of(record)?.read_at(record.range.offset, bytes)
    }
}

/// Opens the file `relative` of `folder` to be written where it lies.
///
/// # Errors
/// [`Error::BadName`], [`Error::Linked`], and those of [`PatchTarget::open`].
pub fn open_target(folder: &Path, relative: &str) -> Result<PatchTarget, Error> {
    let plain = Path::new(relative)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if relative.is_empty() || !plain {
        return Err(Error::BadName {
            name: relative.to_owned(),
        });
    }
    let folder = folder.canonicalize().map_err(Error::io("open", folder))?;
    let path = folder.join(relative);
    let resolved = path.canonicalize().map_err(Error::io("open", &path))?;
    match resolved == path {
        true => PatchTarget::open(&path),
        false => Err(Error::Linked { path, resolved }),
    }
}

/// Short digests of the sectors of one window, as they were before it was written.
struct Window {
    digests: Vec<[u8; 8]>,
}

impl Window {
    /// Keeps what the ranges of `window` hold.
    fn write(targets: &Targets, window: &[Record], number: usize) -> Result<(), Error> {
        let digests = (window.par_iter())
            .map_init(Vec::new, |bytes, record| {
                targets.read(record, bytes)?;
                let sectors = sectors(record.range.offset, record.len);
                let digests = sectors.filter_map(|(start, end)| bytes.get(start..end));
                Ok(digests.flat_map(short_digest).collect::<Vec<u8>>())
            })
            .collect::<Result<Vec<_>, Error>>()?;
        write_atomic(&targets.folder.join(WINDOW), true, |file| {
            file.write_all(&(number as u64).to_le_bytes())?;
            digests
                .iter()
                .try_for_each(|digests| file.write_all(digests))
        })
    }

    /// The window's file, if it is that of the window that begins with record `number`.
    fn read(folder: &Path, number: usize) -> Result<Option<Window>, Error> {
        let path = folder.join(WINDOW);
        let (file, metadata) = match open_regular(&path) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            opened => opened?,
        };
        let mut bytes = Vec::new();
        // Sectors are cut at both ends of each range.
        let longest = 8 + 8 * (WINDOW_BYTES / SECTOR + 2 * JOURNAL_RECORDS as u64);
        (file
            .take(longest.min(metadata.len()))
            .read_to_end(&mut bytes))
        .map_err(Error::io("read", &path))?;
        let mut rest = bytes.as_slice();
        if u64::from_le_bytes(take(&mut rest)) != number as u64 {
            return Ok(None);
        }
        Ok(Some(Window {
            digests: rest.as_chunks().0.to_vec(),
        }))
    }

    /// The digests of the sectors of `record`, one of `window`.
    fn of(&self, window: &[Record], record: &Record) -> Option<&[[u8; 8]]> {
        let count = |record: &Record| sectors(record.range.offset, record.len).count();
        let before = window.iter().take_while(|other| other.at != record.at);
        let start: usize = before.map(count).sum();
        self.digests.get(start..start + count(record))
    }
}

/// The sectors, by the offsets of the file, that a range falls into: start and end within the range.
fn sectors(offset: u64, len: u64) -> impl Iterator<Item = (usize, usize)> {
    let first = offset / SECTOR;
    let last = (offset + len).div_ceil(SECTOR);
    (first..last).map(move |sector| {
        let within = |at: u64| {
            usize::try_from(at.clamp(offset, offset + len) - offset).unwrap_or(usize::MAX)
        };
        (within(sector * SECTOR), within((sector + 1) * SECTOR))
    })
}

fn short_digest(bytes: &[u8]) -> [u8; 8] {
    let digest = Sha256::of_bytes(bytes);
    take(&mut digest.as_bytes().as_slice())
}

fn remove_if_there(path: &Path) -> Result<(), Error> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Whether a patch of `folder` was begun and not finished.
pub fn is_pending(folder: &Path) -> bool {
    folder.join(JOURNAL).symlink_metadata().is_ok()
}

/// What was brought to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RolledForward {
    /// Bytes of all ranges.
    pub bytes: u64,
    /// Files that they lie in.
    pub files: usize,
}

/// Brings the pending patch of `folder` to its end, after it has removed what a killed run left there. `None`: no
/// patch is pending.
///
/// # Errors
/// [`Error::Neither`] before anything is written, where a range holds neither its old nor its new bytes;
/// [`Error::Journal`]; no room; a disk that fails. The patch then is still pending.
pub fn roll_forward(folder: &Path, _lock: &FolderLock) -> Result<Option<RolledForward>, Error> {
    for name in VOUCHERS.iter().chain([&JOURNAL, &WINDOW, &RECEIPT]) {
        remove_orphans(folder, name.as_ref());
    }
    if !is_pending(folder) {
        return Ok(None);
    }
    let _pending = Listed::pending(folder);
    let path = folder.join(JOURNAL);
    let journal = Journal::open(&path)?;
    let targets = journal.targets(folder)?;
    let states = journal.check(&targets)?;
    journal.redo(&states, &targets)?;
    journal.verify(&targets)?;
    journal.finish(folder)?;
    remove_if_there(&folder.join(WINDOW))?;
    remove_if_there(&path)?;
    sync_folder(folder)?;
    Ok(Some(RolledForward {
        bytes: journal.bytes(),
        files: journal.files().len(),
    }))
}

/// Takes the undo log `log` back into `folder`: a journal whose new bytes are the old ones.
///
/// # Errors
/// As [`roll_forward`]; nothing is written where the log does not fit the folder.
pub fn undo(folder: &Path, log: &Path, lock: &FolderLock) -> Result<RolledForward, Error> {
    let journal = Journal::open(log)?;
    let targets = journal.targets(folder)?;
    journal.check(&targets)?;
    super::space::require(folder, journal.bytes().saturating_add(ROOM))?;
    let (mut bytes, _) = open_regular(log)?;
    let mut copy = begin(folder, lock)?;
    io::copy(&mut bytes, &mut copy).map_err(Error::io("copy", log))?;
    copy.commit()?;
    Ok(roll_forward(folder, lock)?.unwrap_or(RolledForward { bytes: 0, files: 0 }))
}

/// Bytes that a patch needs beside the new bytes themselves: heads, index, receipt, window.
pub const ROOM: u64 = 1 << 20;

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use std::fs;

    use super::*;

    const FILE: &str = "onnx/weights";
    const RANGES: u64 = 40;

    /// A file of 41 ranges, and the journal that changes every byte but the last range's.
    struct Case {
        dir: tempfile::TempDir,
        old: Vec<u8>,
        new: Vec<u8>,
    }

    impl Case {
        fn new() -> Case {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("onnx")).unwrap();
            let old: Vec<u8> = (0..(RANGES + 1) * JOURNAL_RECORD_BYTES)
                .map(|at| (at % 251) as u8)
                .collect();
            let changed = (RANGES * JOURNAL_RECORD_BYTES) as usize;
            let mut new = old.clone();
            new[..changed].iter_mut().for_each(|byte| *byte ^= 0xff);
            fs::write(dir.path().join(FILE), &old).unwrap();
            fs::write(dir.path().join("SHA256SUMS"), "of the old bytes").unwrap();
            Case { dir, old, new }
        }

        fn folder(&self) -> &Path {
            self.dir.path()
        }

        fn begin(&self) -> FolderLock {
            let lock = FolderLock::take(self.folder()).unwrap();
            self.write(&self.folder().join(JOURNAL), &self.old, &self.new);
            lock
        }

        fn write(&self, path: &Path, old: &[u8], new: &[u8]) {
            let mut file = StagedFile::create(path, false).unwrap();
            let mut writer = JournalWriter::begin(&mut file).unwrap();
            for range in 0..RANGES {
                let offset = range * JOURNAL_RECORD_BYTES;
                let bytes = offset as usize..(offset + JOURNAL_RECORD_BYTES) as usize;
                let range = Range {
                    file: 0,
                    offset,
                    old: Sha256::of_bytes(&old[bytes.clone()]),
                    new: Sha256::of_bytes(&new[bytes.clone()]),
                };
                writer.record(&range, &new[bytes]).unwrap();
            }
            let mut index = Index {
                files: vec![JournalFile {
                    path: FILE.to_owned(),
                    bytes: self.old.len() as u64,
                }],
                whole: BTreeMap::new(),
            };
            index.set("kvw.json", Some(b"{}"));
            index.set("SHA256SUMS", None);
            writer.finish(&index).unwrap();
            file.commit().unwrap();
        }

        fn patch(&self, offset: u64, bytes: &[u8]) {
            super::super::patch_file(&self.folder().join(FILE), [(offset, bytes)]).unwrap();
        }

        fn holds(&self, bytes: &[u8]) -> bool {
            fs::read(self.folder().join(FILE)).unwrap() == bytes
        }

        fn names(&self) -> Vec<String> {
            let listed = fs::read_dir(self.folder()).unwrap();
            let names = listed.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            names
        }

        /// The journal, and its second window as if its write were under way.
        fn torn(&self) -> (FolderLock, u64) {
            let lock = self.begin();
            let journal = Journal::open(&self.folder().join(JOURNAL)).unwrap();
            let targets = journal.targets(self.folder()).unwrap();
            let window = journal.windows().nth(1).unwrap();
            let at = window[0].range.offset;
            self.patch(0, &self.new[..at as usize]);
            Window::write(&targets, window, 16).unwrap();
            // Half of a range, some sectors of the next, as a disk without order would have it.
            let half = at + JOURNAL_RECORD_BYTES / 2;
            self.patch(at, &self.new[at as usize..half as usize]);
            let scattered = at + JOURNAL_RECORD_BYTES + 7 * SECTOR;
            self.patch(
                scattered,
                &self.new[scattered as usize..][..SECTOR as usize],
            );
            (lock, at)
        }
    }

    #[test]
    fn a_committed_patch_is_carried_out_and_leaves_nothing_of_itself() {
        let case = Case::new();
        let lock = case.begin();
        assert!(is_pending(case.folder()) && case.holds(&case.old));
        let done = roll_forward(case.folder(), &lock).unwrap().unwrap();
        assert_eq!((done.bytes, done.files), (RANGES * JOURNAL_RECORD_BYTES, 1));
        assert!(case.holds(&case.new));
        assert_eq!(case.names(), ["kvw.json", "onnx"]);
        assert_eq!(roll_forward(case.folder(), &lock).unwrap(), None);
    }

    #[test]
    fn what_a_power_cut_tore_is_written_again() {
        let case = Case::new();
        let (lock, _) = case.torn();
        roll_forward(case.folder(), &lock).unwrap().unwrap();
        assert!(case.holds(&case.new));
        assert_eq!(case.names(), ["kvw.json", "onnx"]);
    }

    #[test]
    fn a_byte_that_somebody_else_wrote_stops_it_before_the_first_write() {
        // In a range that nothing was done to yet, in one that is done, and in a torn one.
        for (torn, at) in [
            (false, 20 * JOURNAL_RECORD_BYTES + 5),
            (true, 3),
            (true, 16 * JOURNAL_RECORD_BYTES + 600_000),
        ] {
            let case = Case::new();
            let lock = match torn {
                true => case.torn().0,
                false => case.begin(),
            };
            case.patch(at, b"x");
            let before = fs::read(case.folder().join(FILE)).unwrap();
            let error = roll_forward(case.folder(), &lock).unwrap_err();
            let Error::Neither { offset, .. } = error else {
                panic!("{error}")
            };
            assert!(offset <= at && at < offset + JOURNAL_RECORD_BYTES);
            assert!(case.holds(&before) && is_pending(case.folder()));
        }
    }

    #[test]
    fn an_undo_log_leads_back_to_every_byte() {
        let case = Case::new();
        let log = case.folder().join("undo");
        case.write(&log, &case.new, &case.old);
        let lock = case.begin();
        roll_forward(case.folder(), &lock).unwrap().unwrap();
        undo(case.folder(), &log, &lock).unwrap();
        assert!(case.holds(&case.old));
        // And once more changes nothing.
        undo(case.folder(), &log, &lock).unwrap();
        assert!(case.holds(&case.old));
    }

    #[test]
    fn a_journal_with_any_byte_changed_or_missing_is_refused() {
        let case = Case::new();
        let lock = case.begin();
        let path = case.folder().join(JOURNAL);
        let whole = fs::read(&path).unwrap();
        let index = whole.len() - 100;
        let places = [
            0,
            17,
            20,
            30,
            60,
            95,
            index,
            whole.len() - 50,
            whole.len() - 1,
        ];
        for at in places {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, &bytes).unwrap();
            assert!(Journal::open(&path).is_err(), "byte {at}");
        }
        for len in [0, 15, 71, 72, 5000, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(Journal::open(&path).is_err(), "{len} bytes");
        }
        // The bytes of a range are looked at when they are written.
        let mut bytes = whole.clone();
        bytes[5000] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let error = roll_forward(case.folder(), &lock).unwrap_err();
        assert!(matches!(error, Error::Journal { .. }), "{error}");
    }

    #[test]
    fn a_journal_whose_small_files_cannot_be_written_changes_no_range() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        // 'e15=': bits are set that no byte has.
        for content in ["e15=", "e", "{}"] {
            let mut file = StagedFile::create(&path, true).unwrap();
            let writer = JournalWriter::begin(&mut file).unwrap();
            let whole = [("kvw.json".to_owned(), Some(content.to_owned()))];
            let index = Index {
                files: Vec::new(),
                whole: whole.into(),
            };
            writer.finish(&index).unwrap();
            file.commit().unwrap();
            let error = Journal::open(&path).unwrap_err();
            assert!(error.to_string().contains("kvw.json"), "{error}");
        }
    }

    #[test]
    fn a_journal_past_its_limits_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let index = |bytes| Index {
            files: vec![JournalFile {
                path: FILE.to_owned(),
                bytes,
            }],
            whole: BTreeMap::new(),
        };
        let refused = |records: u64, len: u64| {
            let mut file = StagedFile::create(&path, true).unwrap();
            let mut writer = JournalWriter::begin(&mut file).unwrap();
            let (old, new) = ([0; 32].into(), [1; 32].into());
            let bytes = vec![0; len as usize];
            for record in 0..records {
                let offset = record * len;
                let range = Range {
                    file: 0,
                    offset,
                    old,
                    new,
                };
                writer.record(&range, &bytes).unwrap();
            }
            writer.finish(&index(u64::MAX)).unwrap();
            file.commit().unwrap();
            Journal::open(&path).is_err()
        };
        assert!(!refused(1, JOURNAL_RECORD_BYTES));
        assert!(refused(1, JOURNAL_RECORD_BYTES + 1));
        assert!(!refused(JOURNAL_RECORDS as u64, 1));
        assert!(refused(JOURNAL_RECORDS as u64 + 1, 1));
        let mut file = StagedFile::create(&path, true).unwrap();
        let mut large = index(0);
        large.set("kvw.json", Some(&vec![0; JOURNAL_INDEX_BYTES as usize]));
        let writer = JournalWriter::begin(&mut file).unwrap();
        assert!(writer.finish(&large).is_err());
    }

    #[test]
    fn a_journal_reaches_no_file_outside_its_folder() {
        let case = Case::new();
        let outside = case.dir.path().join("outside");
        fs::write(&outside, &case.old).unwrap();
        let inside = case.dir.path().join("model");
        fs::create_dir(&inside).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        std::os::unix::fs::symlink(case.dir.path(), inside.join("up")).unwrap();
        fs::write(inside.join("own"), "own").unwrap();
        fs::hard_link(inside.join("own"), inside.join("second")).unwrap();
        for name in [
            "../outside",
            "/etc/passwd",
            "link",
            "up/outside",
            "",
            ".",
            "own",
            "second",
        ] {
            assert!(open_target(&inside, name).is_err(), "{name}");
        }
    }

    #[test]
    fn the_second_writer_is_told() {
        let case = Case::new();
        let first = FolderLock::take(case.folder()).unwrap();
        assert!(matches!(
            FolderLock::take(case.folder()),
            Err(Error::Busy { .. })
        ));
        drop(first);
        FolderLock::take(case.folder()).unwrap();
    }
}

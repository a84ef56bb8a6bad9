//! A plan, applied where the model lies: for a disk without room for a second one.
//!
//! In: a [`Bundle`] that is a whole folder, and an [`EditPlan`] made for it that changes no graph. Out: the same bytes that
//! [`apply`](super::apply()) would write to a new folder, receipt included, in the folder itself.
//!
//! 1. [`preflight`]: what would be written, how much room that needs and how much there is, and what stands in the way: a
//!    changed graph (its file would change its length), a link, a file with two names, no room;
//! 2. [`prepare`]: the planned ranges are scaled into a journal ([`journal`]), which is synced and committed. Up to
//!    here nothing of the model has changed;
//! 3. [`resume`]: the journal is carried out, now or by the next run after a crash.
//!
//! What vouches for the model as it was (`SHA256SUMS`, a signature) is removed in the same patch: it would be
//! wrong. On request an undo log is written first: the old bytes, in a journal that leads back.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use super::Error;
use super::apply::{FileEdits, Meter, Options, Progress, Stage, by_file, receipt, scale, source};
use super::plan::{EditPlan, TensorEdit};
use super::read::{Source, blocks, short};
use super::receipt::Receipt;
use super::scale::Block;
use crate::bundle::{Bundle, Tree};
use crate::files::journal::{self, Index, JournalFile, JournalWriter, Range, RolledForward};
use crate::files::{
    FolderLock, RECEIPT, Sha256, Sha256Hasher, StagedFile, VOUCHERS, available_bytes, read_limited,
};
use crate::limits::SUMS_BYTES;
use crate::onnx::ByteSpan;

/// What a patch would do, before it does anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Preflight {
    /// The model folder.
    pub folder: PathBuf,
    /// The files whose bytes change.
    pub files: Vec<String>,
    /// The planned ranges in them.
    pub ranges: usize,
    /// Bytes in these ranges.
    pub changed_bytes: u64,
    /// Room that the patch needs for a while, in bytes: the journal.
    pub needed_bytes: u64,
    /// Room that there is.
    pub available_bytes: u64,
    /// Files that vouch for the model as it is, and would be removed.
    pub removed: Vec<String>,
}

/// Looks at everything that could stand in the way of applying `plan` to `bundle` where it lies, and takes the lock.
///
/// # Errors
/// [`Error::NotAFolder`], [`Error::GraphInPlace`]; a link, a file with two names, one that cannot be written to;
/// another process that writes there; no room. Whether the bytes are those that the plan was made for [`prepare`] finds
/// while it reads them, or [`EditPlan::check_bytes`].
pub fn preflight(
    bundle: &Bundle,
    plan: &EditPlan,
    undo_log: Option<&Path>,
) -> Result<(Preflight, FolderLock), Error> {
    let tree = bundle.tree();
    let folder = tree.canonical_folder();
    if !tree.is_whole_folder() {
        return Err(Error::NotAFolder {
            path: bundle.folder().to_owned(),
        });
    }
    if let Some(graph) = plan.graphs().first() {
        return Err(Error::GraphInPlace {
            file: graph.file.clone(),
            before: graph.bytes_before,
            after: graph.bytes_after,
        });
    }
    let lock = FolderLock::take(folder)?;
    let files = by_file(tree, plan)?;
    for file in &files {
        journal::open_target(folder, &file.entry.relative)?;
        source(file.entry)?;
    }
    let changed_bytes = plan.bytes();
    let needed_bytes = changed_bytes.saturating_add(journal::ROOM);
    let mut here = needed_bytes;
    if let Some(log) = undo_log {
        match same_disk(folder, log)? {
            true => here = here.saturating_add(needed_bytes),
            false => crate::files::space::require(log, needed_bytes)?,
        }
    }
    crate::files::space::require(folder, here)?;
    let preflight = Preflight {
        folder: bundle.folder().to_owned(),
        files: files
            .iter()
            .map(|file| file.entry.relative.clone())
            .collect(),
        ranges: plan.edits().len(),
        changed_bytes,
        needed_bytes: here,
        available_bytes: available_bytes(folder)?,
        removed: vouchers(tree),
    };
    Ok((preflight, lock))
}

/// What vouches for the folder as it is.
fn vouchers(tree: &Tree) -> Vec<String> {
    let there = VOUCHERS.iter().filter(|name| tree.get(name).is_some());
    there.map(|name| (*name).to_owned()).collect()
}

/// Whether the new file `log` would lie on the disk of `folder`.
fn same_disk(folder: &Path, log: &Path) -> Result<bool, Error> {
    let parent = match log.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let device = |path: &Path| {
        let metadata = std::fs::metadata(path).map_err(crate::files::Error::io("open", path))?;
        Ok::<_, Error>(metadata.dev())
    };
    Ok(device(folder)? == device(parent)?)
}

/// Writes the journal that turns the model of `bundle` into the model with `plan` applied, and commits it. With
/// `undo_log` the way back is written first, to a file that must not exist unless `options.force`. Nothing of the model
/// has changed yet; [`resume`] carries it out.
///
/// `progress` is called with [`Stage::Patch`].
///
/// # Errors
/// As [`apply`](super::apply()). Nothing is left then.
pub fn prepare(
    bundle: &Bundle,
    plan: &EditPlan,
    lock: &FolderLock,
    undo_log: Option<&Path>,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Receipt, Error> {
    let tree = bundle.tree();
    let files = by_file(tree, plan)?;
    let meter = Meter::new(Stage::Patch, plan.bytes(), progress);
    let folder = tree.canonical_folder();
    let mut redo = journal::begin(folder, lock)?;
    let undo = undo_log.map(|log| StagedFile::create(log, options.force));
    let mut undo = undo.transpose()?;
    let mut logs = Logs {
        redo: JournalWriter::begin(&mut redo)?,
        undo: undo.as_mut().map(JournalWriter::begin).transpose()?,
    };
    let digests = scaled(&files, &mut logs, &meter)?;
    let Some((before, after)) = digests else {
        return Err(Error::NothingToChange {
            folder: bundle.folder().to_owned(),
        });
    };
    let receipt = receipt(bundle, plan, options, &files, &before, &after)?;
    let text = receipt.to_bytes(&tree.canonical_folder().join(RECEIPT))?;
    let journal_files = files.iter().map(|file| JournalFile {
        path: file.entry.relative.clone(),
        bytes: file.entry.len,
    });
    let mut index = Index {
        files: journal_files.collect(),
        whole: BTreeMap::new(),
    };
    // What is there now, for the way back.
    let small = VOUCHERS.iter().chain([&RECEIPT]);
    for name in small.clone() {
        let there = tree
            .get(name)
            .map(|entry| read_limited(&entry.path, SUMS_BYTES));
        index.set(name, there.transpose()?.as_deref());
    }
    if let Some(undo) = logs.undo.take() {
        undo.finish(&index)?;
    }
    for name in small {
        index.set(name, (*name == RECEIPT).then_some(text.as_slice()));
    }
    logs.redo.finish(&index)?;
    // The way back is on the disk before the way forth is committed.
    undo.map(StagedFile::commit).transpose()?;
    if let Err(error) = redo.commit() {
        // Where only the folder's sync failed the patch is pending all the same, and the way back is needed.
        if let Some(log) = undo_log.filter(|_| !journal::is_pending(folder)) {
            // It leads nowhere. The first error is the one to report.
            let _ = std::fs::remove_file(log);
        }
        return Err(error.into());
    }
    Ok(receipt)
}

/// The journals that are written at the same time.
struct Logs<'w> {
    redo: JournalWriter<'w>,
    undo: Option<JournalWriter<'w>>,
}

/// Digests of every range, by file.
type Digests = Vec<Vec<Sha256>>;

/// Blocks of a range that are in memory at once, as they are and as they shall be.
const TOGETHER: usize = 8;

/// Scales every planned range into `logs`. Returns the digests of the ranges before and after; `None` where no byte
/// changes.
fn scaled(
    files: &[FileEdits<'_>],
    logs: &mut Logs<'_>,
    meter: &Meter<'_>,
) -> Result<Option<(Digests, Digests)>, Error> {
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut changed = false;
    for (number, file) in files.iter().enumerate() {
        let source = source(file.entry)?;
        let (mut file_before, mut file_after) = (Vec::new(), Vec::new());
        for edit in &file.edits {
            let (mut old, mut new) = (Sha256Hasher::default(), Sha256Hasher::default());
            let blocks: Vec<ByteSpan> = blocks(edit.span).collect();
            for some in blocks.chunks(TOGETHER) {
                let scaled = (some.par_iter())
                    .map(|block| ScaledBlock::of(edit, *block, &source))
                    .collect::<Result<Vec<_>, Error>>()?;
                let mut written = Ok(());
                rayon::scope(|scope| {
                    scope.spawn(|_| scaled.iter().for_each(|block| old.update(&block.before)));
                    scope.spawn(|_| {
                        scaled
                            .iter()
                            .for_each(|block| new.update(block.after.bytes()))
                    });
                    written = scaled.iter().try_for_each(|block| {
                        changed |= block.write(number, logs)?;
                        meter.add(block.span.len);
                        Ok::<_, Error>(())
                    });
                });
                written?;
            }
            let old = old.finish();
            edit.check(old)?;
            file_before.push(old);
            file_after.push(new.finish());
        }
        before.push(file_before);
        after.push(file_after);
    }
    Ok(changed.then_some((before, after)))
}

/// A block of a range, as it is and as it shall be.
struct ScaledBlock {
    span: ByteSpan,
    before: Vec<u8>,
    after: Block,
    /// Digests of the two, where they differ.
    digests: Option<(Sha256, Sha256)>,
}

impl ScaledBlock {
    fn of(edit: &TensorEdit, span: ByteSpan, source: &Source) -> Result<ScaledBlock, Error> {
        let mut before = vec![0; short(span.len)];
        source.read_at(span.offset, &mut before)?;
        let mut after = Block::with_capacity(short(span.len));
        after.resized(short(span.len)).copy_from_slice(&before);
        scale(edit, span.offset, &mut after)?;
        let differ = before != after.bytes();
        let digests = differ.then(|| (Sha256::of_bytes(&before), Sha256::of_bytes(after.bytes())));
        Ok(ScaledBlock {
            span,
            before,
            after,
            digests,
        })
    }

    /// Adds the block to the journals, if it changes anything.
    fn write(&self, file: usize, logs: &mut Logs<'_>) -> Result<bool, Error> {
        let Some((before, after)) = self.digests else {
            return Ok(false);
        };
        let offset = self.span.offset;
        let forth = Range {
            file,
            offset,
            old: before,
            new: after,
        };
        logs.redo.record(&forth, self.after.bytes())?;
        if let Some(undo) = &mut logs.undo {
            let back = Range {
                old: after,
                new: before,
                ..forth
            };
            undo.record(&back, &self.before)?;
        }
        Ok(true)
    }
}

/// Brings the pending patch of `folder` to its end, and removes what a run that was killed before it had committed one
/// left there. `None`: no patch was pending.
///
/// # Errors
/// Another process writes there; a range holds neither its old nor its new bytes; a damaged journal.
pub fn resume(folder: &Path, lock: &FolderLock) -> Result<Option<RolledForward>, Error> {
    Ok(journal::roll_forward(folder, lock)?)
}

/// Takes a patch back by its undo log: every byte is what it was, receipt and signatures included.
///
/// # Errors
/// The log is none, or not of this folder as it is now; as [`resume`].
pub fn undo(folder: &Path, log: &Path, lock: &FolderLock) -> Result<RolledForward, Error> {
    Ok(journal::undo(folder, log, lock)?)
}

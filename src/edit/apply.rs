//! A plan, applied: a new folder, complete, or none.
//!
//! In: a [`Bundle`] and an [`EditPlan`] made for it. Out: a folder with every file of the model, the
//! planned ranges scaled, the planned changes of graphs made, everything else byte for byte, and a
//! [`Receipt`].
//!
//! 1. refuse what cannot end well: no room, output inside input, the same plan applied before;
//! 2. copy every file into a staging folder: blocks shared where the file system can, else all bytes
//!    but the planned ranges; a file whose graph changes piece by piece, with the new bytes between;
//! 3. at the same time write the planned ranges there, scaled, block by block, hashing what they were;
//! 4. verify: compute the ranges again from the *input* and compare with what the staged files hold;
//! 5. write the receipt, sync, rename.
//!
//! Memory: a few blocks of 1 MiB for each thread and what is put into graphs, whatever the model's size.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde_json::Value;

use super::Error;
use super::plan::{EditPlan, GraphEdit, TensorEdit};
use super::read::{BLOCK, Source, blocks, short};
use super::receipt::{EditedFile, EditedRange, InsertedRange, Receipt, SCHEMA_VERSION};
use super::scale::{Block, NotFinite};
use super::splice;
use super::verify::verify;
use crate::bundle::{Bundle, Entry, Tree};
use crate::files::{
    BegunCopy, Method, PatchTarget, RECEIPT, Sha256, Sha256Hasher, StagedFolder, VOUCHERS,
};
use crate::onnx::ByteSpan;
use crate::onnx::splice::Piece;

/// How a plan is applied.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Replace an output that this tool wrote.
    pub force: bool,
    /// Put digests of whole files into the receipt. Reads every edited file twice more.
    pub checksums: bool,
    /// What made the plan, for the receipt: rule, parameters, data.
    pub plan: Value,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Files are being copied.
    Copy,
    /// Planned ranges are being scaled.
    Patch,
    /// Planned ranges are being compared with what was planned.
    Verify,
    /// Everything is being written to the disk.
    Sync,
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Bytes done of this stage.
    pub done: u64,
    /// Bytes of this stage; 0 where unknown.
    pub total: u64,
}

/// Counts the bytes of a stage.
pub(super) struct Meter<'p> {
    stage: Stage,
    total: u64,
    done: AtomicU64,
    report: &'p (dyn Fn(Progress) + Sync),
}

impl<'p> Meter<'p> {
    pub(super) fn new(stage: Stage, total: u64, report: &'p (dyn Fn(Progress) + Sync)) -> Self {
        report(Progress {
            stage,
            done: 0,
            total,
        });
        Meter {
            stage,
            total,
            done: AtomicU64::new(0),
            report,
        }
    }

    pub(super) fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.report)(Progress {
            stage: self.stage,
            done,
            total: self.total,
        });
    }
}

/// Writes the model of `bundle`, with `plan` applied, to the new folder `out`.
///
/// `progress` is called from several threads.
///
/// # Errors
/// `out` exists, lies inside the model folder or holds it; not enough room; the plan was applied to
/// this folder before; a file is not what the plan was made for; a product is not finite; the plan
/// changes no byte; the written bytes are not the planned ones. Nothing is left at `out` then.
pub fn apply(
    bundle: &Bundle,
    plan: &EditPlan,
    out: &Path,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Receipt, Error> {
    apply_if(bundle, plan, out, options, progress, &mut |_| Ok(None))
}

/// Judges a staged folder: an error keeps it from appearing. What it found goes into the receipt as
/// [`Receipt::evaluation`].
pub type Accept<'a> =
    dyn FnMut(&Path) -> Result<Option<Value>, Box<dyn std::error::Error + Send + Sync>> + 'a;

/// As [`apply`], but asks `accept` before the folder appears: it is shown the staged folder, whole
/// but for its receipt, may run it and add files, and where it says no nothing is left at `out`.
///
/// # Errors
/// As [`apply`]; [`Error::Rejected`] where `accept` fails.
pub fn apply_if(
    bundle: &Bundle,
    plan: &EditPlan,
    out: &Path,
    options: &Options,
    progress: &(dyn Fn(Progress) + Sync),
    accept: &mut Accept<'_>,
) -> Result<Receipt, Error> {
    let tree = bundle.tree();
    refuse_nesting(tree, out)?;
    let mut staged = StagedFolder::create(out, options.force)?;
    staged.require_space(tree.bytes().saturating_add(plan.growth()))?;

    let by_file = by_file(tree, plan)?;
    for file in &by_file {
        if let Some(edit) = file.graph {
            splice::write(file.entry, edit, &source(file.entry)?, &staged)?;
        }
    }
    let copies = begin_copies(tree, &staged, &by_file)?;
    let (copied, before) = rayon::join(
        || copy(&copies, &by_file, progress),
        || {
            let meter = Meter::new(Stage::Patch, plan.bytes(), progress);
            patch(&by_file, &copies, &staged, &meter)
        },
    );
    copied?;
    let before = before?;
    // The disk works while the processor verifies.
    for file in &by_file {
        staged.seal(&file.entry.relative)?;
    }
    let meter = Meter::new(Stage::Verify, plan.bytes(), progress);
    let after = verify(&by_file, &staged, &meter)?;
    if before == after && plan.graphs().is_empty() {
        return Err(Error::NothingToChange {
            folder: bundle.folder().to_owned(),
        });
    }
    let mut receipt = receipt(bundle, plan, options, &by_file, &before, &after)?;
    if options.checksums {
        for file in &mut receipt.files {
            let source = tree
                .get(&file.path)
                .map(|entry| Sha256::of_file(&entry.path));
            file.sha256_before = source.transpose()?;
            file.sha256_after = Some(Sha256::of_file(&staged.path().join(&file.path))?);
        }
    }
    receipt.evaluation = accept(staged.path()).map_err(|source| Error::Rejected {
        out: out.to_owned(),
        source,
    })?;
    write_receipt(&staged, &receipt)?;
    Meter::new(Stage::Sync, 0, progress).add(0);
    staged.commit()?;
    Ok(receipt)
}

/// The edits of one file.
pub(super) struct FileEdits<'e> {
    pub(super) entry: &'e Entry,
    /// Ranges to multiply, by offset.
    pub(super) edits: Vec<&'e TensorEdit>,
    /// How its graph changes, if it does.
    pub(super) graph: Option<&'e GraphEdit>,
}

impl FileEdits<'_> {
    /// Where a range that is multiplied is in the output.
    pub(super) fn moved(&self, edit: &TensorEdit) -> Result<ByteSpan, Error> {
        let moved = match self.graph {
            None => Some(edit.span),
            Some(graph) => graph.splice.moved(edit.span),
        };
        moved.ok_or_else(|| Error::Overlap {
            data: edit.file.clone(),
            span: edit.span,
            tensor: edit.tensor.clone(),
            other: "a part of the graph that is replaced".to_owned(),
        })
    }
}

pub(super) fn by_file<'e>(tree: &'e Tree, plan: &'e EditPlan) -> Result<Vec<FileEdits<'e>>, Error> {
    let mut files: BTreeMap<&str, FileEdits<'e>> = BTreeMap::new();
    let graphs = plan.graphs().iter();
    let ranges = plan.edits().iter();
    let named = graphs
        .map(|graph| (graph.file.as_str(), graph.bytes_before))
        .chain(ranges.map(|edit| {
            let end = edit.span.offset.saturating_add(edit.span.len);
            (edit.file.as_str(), end)
        }));
    for (file, expected) in named {
        let entry = tree.get(file).ok_or_else(|| Error::Changed {
            file: file.to_owned(),
            expected,
            found: 0,
        })?;
        files.entry(file).or_insert_with(|| FileEdits {
            entry,
            edits: plan
                .edits()
                .iter()
                .filter(|edit| edit.file == file)
                .collect(),
            graph: plan.graphs().iter().find(|graph| graph.file == file),
        });
    }
    Ok(files.into_values().collect())
}

/// Whether `out` may be written: asked before long work, so that it is not done in vain. Also removes
/// what an interrupted run left there.
///
/// # Errors
/// [`Error::Nested`]; something else is at `out`; there is no room for the model.
pub fn check_output(bundle: &Bundle, out: &Path, force: bool) -> Result<(), Error> {
    refuse_nesting(bundle.tree(), out)?;
    StagedFolder::create(out, force)?.require_space(bundle.tree().bytes())?;
    Ok(())
}

/// Refuses an output in the input, and an input in the output: with `--force`, the one would be
/// deleted for the other.
fn refuse_nesting(tree: &Tree, out: &Path) -> Result<(), Error> {
    let folder = tree.canonical_folder();
    let absolute = absolute(out);
    let inside = absolute.starts_with(folder) && tree.is_whole_folder();
    if inside || folder.starts_with(&absolute) {
        return Err(Error::Nested {
            out: out.to_owned(),
            folder: folder.to_owned(),
        });
    }
    Ok(())
}

/// Where `out` will be, links resolved as far as it exists.
fn absolute(out: &Path) -> PathBuf {
    if let Ok(resolved) = out.canonicalize() {
        return resolved;
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    match (parent.canonicalize(), out.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        // `StagedFolder::create` refuses it.
        _ => out.to_owned(),
    }
}

/// Every file of the output whose graph stays, with its length. What vouches for the input vouches for no
/// other folder, and is left behind.
fn begin_copies<'t>(
    tree: &'t Tree,
    staged: &StagedFolder,
    files: &[FileEdits<'_>],
) -> Result<Vec<(&'t Entry, BegunCopy)>, Error> {
    let spliced = |entry: &Entry| {
        let mut files = files.iter().filter(|file| file.graph.is_some());
        files.any(|file| file.entry.relative == entry.relative)
    };
    let left_behind = |name: &str| name == RECEIPT || VOUCHERS.contains(&name);
    tree.entries()
        .filter(|entry| !left_behind(&entry.relative) && !spliced(entry))
        .map(|entry| {
            let copy = staged.begin_copy(&entry.path, &entry.relative)?;
            match copy.copied().bytes == entry.len {
                true => Ok((entry, copy)),
                false => Err(Error::Changed {
                    file: entry.relative.clone(),
                    expected: entry.len,
                    found: copy.copied().bytes,
                }),
            }
        })
        .collect()
}

/// Copies what is not planned.
fn copy(
    copies: &[(&Entry, BegunCopy)],
    files: &[FileEdits<'_>],
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(), Error> {
    let total = copies.iter().map(|(entry, _)| entry.len).sum();
    let meter = Meter::new(Stage::Copy, total, progress);
    copies.par_iter().try_for_each(|(entry, copy)| {
        let edits = files
            .iter()
            .filter(|edited| edited.entry.relative == entry.relative)
            .flat_map(|edited| &edited.edits);
        let holes: Vec<_> = edits
            .map(|edit| edit.span.offset..edit.span.offset.saturating_add(edit.span.len))
            .collect();
        copy.fill_around(&holes)?;
        meter.add(entry.len);
        Ok(())
    })
}

/// Writes the planned ranges of the staged copies. Returns the digests of what the input has there.
fn patch(
    files: &[FileEdits<'_>],
    copies: &[(&Entry, BegunCopy)],
    staged: &StagedFolder,
    meter: &Meter<'_>,
) -> Result<Vec<Vec<Sha256>>, Error> {
    files
        .par_iter()
        .map(|file| {
            let target = staged.patch(&file.entry.relative)?;
            let source = source(file.entry)?;
            // A spliced file has all its bytes, and a copy with shared blocks too.
            let whole = copies
                .iter()
                .find(|(copied, _)| copied.relative == file.entry.relative)
                .is_none_or(|(_, copy)| copy.copied().method == Method::Reflink);
            (file.edits.par_iter())
                .map(|edit| {
                    let at = file.moved(edit)?.offset;
                    patch_tensor(edit, &source, &target, at, whole, meter)
                })
                .collect()
        })
        .collect()
}

fn patch_tensor(
    edit: &TensorEdit,
    source: &Source,
    target: &PatchTarget,
    at: u64,
    whole: bool,
    meter: &Meter<'_>,
) -> Result<Sha256, Error> {
    let mut hasher = Sha256Hasher::default();
    let mut block = Block::with_capacity(short(BLOCK.min(edit.span.len)));
    for part in blocks(edit.span) {
        source.read_at(part.offset, block.resized(short(part.len)))?;
        hasher.update(block.bytes());
        if scale(edit, part.offset, &mut block)? || !whole {
            target.write_at(at + (part.offset - edit.span.offset), block.bytes())?;
        }
        meter.add(part.len);
    }
    let before = hasher.finish();
    edit.check(before)?;
    Ok(before)
}

/// Scales a block of `edit` that begins at byte `offset` of the file.
pub(super) fn scale(edit: &TensorEdit, offset: u64, block: &mut Block) -> Result<bool, Error> {
    let size = edit.dtype.bytes(1).unwrap_or(1);
    let start = (offset - edit.span.offset) / size;
    let not_finite = |fault: NotFinite| Error::NotFinite {
        file: edit.file.clone(),
        tensor: edit.tensor.clone(),
        element: start.saturating_add(fault.index as u64),
        found: fault.found,
        gate: fault.gate,
        dtype: edit.dtype,
    };
    let first = usize::try_from(start).unwrap_or(usize::MAX);
    edit.scaling().apply(first, block).map_err(not_finite)
}

fn edited_files(
    files: &[FileEdits<'_>],
    before: &[Vec<Sha256>],
    after: &[Vec<Sha256>],
) -> Result<Vec<EditedFile>, Error> {
    let digests = before.iter().zip(after);
    files
        .iter()
        .zip(digests)
        .map(|(file, (before, after))| {
            let ranges = (file.edits.iter())
                .zip(before.iter().zip(after))
                .map(|(edit, (&sha256_before, &sha256_after))| {
                    let moved = file.moved(edit)?;
                    Ok(EditedRange {
                        tensor: edit.tensor.clone(),
                        layer: edit.layer,
                        form: edit.form,
                        dtype: edit.dtype,
                        offset: moved.offset,
                        len: edit.span.len,
                        offset_before: (moved != edit.span).then_some(edit.span.offset),
                        sha256_before,
                        sha256_after,
                    })
                })
                .collect::<Result<_, Error>>()?;
            let bytes = file.graph.map_or(file.entry.len, |graph| graph.bytes_after);
            Ok(EditedFile {
                path: file.entry.relative.clone(),
                bytes,
                bytes_before: (bytes != file.entry.len).then_some(file.entry.len),
                sha256_before: None,
                sha256_after: None,
                ranges,
                inserted: file.graph.map_or_else(Vec::new, inserted),
                graph: file
                    .graph
                    .map_or_else(Vec::new, |graph| graph.changes.clone()),
            })
        })
        .collect()
}

/// What was done, as far as it is known while it is done.
pub(super) fn receipt(
    bundle: &Bundle,
    plan: &EditPlan,
    options: &Options,
    files: &[FileEdits<'_>],
    before: &[Vec<Sha256>],
    after: &[Vec<Sha256>],
) -> Result<Receipt, Error> {
    Ok(Receipt {
        schema_version: SCHEMA_VERSION,
        tool: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        plan_digest: plan.digest(),
        plan: options.plan.clone(),
        edits: plan.mlps().to_vec(),
        files: edited_files(files, before, after)?,
        evaluation: None,
        previous: Receipt::of(bundle.tree())?.map(Box::new),
    })
}

fn inserted(graph: &GraphEdit) -> Vec<InsertedRange> {
    let pieces = graph.splice.pieces();
    pieces
        .filter_map(|piece| match piece {
            Piece::Kept { .. } => None,
            Piece::New { bytes, from, to } => Some(InsertedRange {
                offset: to,
                len: bytes.len() as u64,
                offset_before: from.offset,
                len_before: from.len,
                sha256: Sha256::of_bytes(bytes),
            }),
        })
        .collect()
}

fn write_receipt(staged: &StagedFolder, receipt: &Receipt) -> Result<(), Error> {
    let text = receipt.to_bytes(&staged.path().join(RECEIPT))?;
    Ok(staged.write(RECEIPT, &text)?)
}

/// A source file of the plan, opened again.
pub(super) fn source(entry: &Entry) -> Result<Source, Error> {
    let source = Source::open(&entry.path)?;
    match source.len() == entry.len {
        true => Ok(source),
        false => Err(Error::Changed {
            file: entry.relative.clone(),
            expected: entry.len,
            found: source.len(),
        }),
    }
}

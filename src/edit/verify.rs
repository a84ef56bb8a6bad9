//! What was written is what was planned.
//!
//! In: the input files, the plan, and the staged copies. Out: the digest of every planned range as
//! the copies hold it. A file whose graph changed is compared as a whole ([`splice`]). The ranges are computed once more, from the input, and compared byte by byte
//! with what is read back: the second computation shares nothing with the first but the arithmetic.

use rayon::prelude::*;

use super::Error;
use super::apply::{FileEdits, Meter, scale, source};
use super::plan::TensorEdit;
use super::read::{BLOCK, Source, blocks, short};
use super::scale::Block;
use super::splice;
use crate::files::{PatchTarget, Sha256, Sha256Hasher, StagedFolder};

/// Compares every planned range of the staged files with the plan applied to the input.
///
/// # Errors
/// [`Error::Verification`] with the first byte that differs.
pub(super) fn verify(
    files: &[FileEdits<'_>],
    staged: &StagedFolder,
    meter: &Meter<'_>,
) -> Result<Vec<Vec<Sha256>>, Error> {
    files
        .par_iter()
        .map(|file| {
            let target = staged.patch(&file.entry.relative)?;
            let source = source(file.entry)?;
            if let Some(graph) = file.graph {
                let multiplied: Vec<_> = file.edits.iter().map(|edit| edit.span).collect();
                splice::verify(file.entry, graph, &source, staged, &multiplied)?;
            }
            (file.edits.par_iter())
                .map(|edit| verify_tensor(edit, &source, &target, file.moved(edit)?.offset, meter))
                .collect()
        })
        .collect()
}

fn verify_tensor(
    edit: &TensorEdit,
    source: &Source,
    target: &PatchTarget,
    at: u64,
    meter: &Meter<'_>,
) -> Result<Sha256, Error> {
    let capacity = short(BLOCK.min(edit.span.len));
    let mut hasher = Sha256Hasher::default();
    let (mut expected, mut found) = (Block::with_capacity(capacity), vec![0; capacity]);
    for part in blocks(edit.span) {
        source.read_at(part.offset, expected.resized(short(part.len)))?;
        scale(edit, part.offset, &mut expected)?;
        found.resize(short(part.len), 0);
        let moved = at + (part.offset - edit.span.offset);
        target.read_at(moved, &mut found)?;
        hasher.update(&found);
        if expected.bytes() != found {
            let equal = expected
                .bytes()
                .iter()
                .zip(&found)
                .take_while(|(a, b)| a == b);
            return Err(Error::Verification {
                file: edit.file.clone(),
                tensor: edit.tensor.clone(),
                offset: moved.saturating_add(equal.count() as u64),
            });
        }
        meter.add(part.len);
    }
    Ok(hasher.finish())
}

//! A file whose graph changes, written and checked.
//!
//! In: an input file and a [`GraphEdit`] of it. Out: the staged file: the kept stretches copied a block
//! at a time, the new ones between them, the multiplied ranges left to [`apply`](super::apply()). Checked
//! two ways: the bytes against the input's, and what the file decodes to against the input's model with
//! the same changes.

use std::fs::Permissions;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use super::Error;
use super::plan::GraphEdit;
use super::read::{Source, blocks, short};
use super::rewrite;
use crate::bundle::Entry;
use crate::files::{PatchTarget, StagedFolder};
use crate::onnx::schema::{AttributeProto, GraphProto, ModelProto, TensorProto};
use crate::onnx::splice::Piece;
use crate::onnx::{ByteSpan, Limits, ModelFile};

/// Writes the staged file of `edit`, its multiplied ranges as the input has them.
pub(super) fn write(
    entry: &Entry,
    edit: &GraphEdit,
    source: &Source,
    staged: &StagedFolder,
) -> Result<(), Error> {
    let path = staged.place(&entry.relative)?;
    let mut file = staged.create_file(&entry.relative)?;
    let failed = |error| crate::files::Error::io("write", &path)(error);
    let mode = std::fs::metadata(&entry.path).map_err(failed)?.mode();
    // As for any copy: the source's mode, writable for its owner.
    file.set_permissions(Permissions::from_mode((mode & 0o777) | 0o200))
        .map_err(failed)?;
    let mut bytes = Vec::new();
    for piece in edit.splice.pieces() {
        match piece {
            Piece::New { bytes, .. } => file.write_all(bytes).map_err(failed)?,
            Piece::Kept { from, .. } => {
                for block in blocks(from) {
                    bytes.resize(short(block.len), 0);
                    source.read_at(block.offset, &mut bytes)?;
                    file.write_all(&bytes).map_err(failed)?;
                }
            }
        }
    }
    Ok(())
}

/// Checks the staged file of `edit` outside of `multiplied`, ranges of the input.
pub(super) fn verify(
    entry: &Entry,
    edit: &GraphEdit,
    source: &Source,
    staged: &StagedFolder,
    multiplied: &[ByteSpan],
) -> Result<(), Error> {
    let target = staged.patch(&entry.relative)?;
    let differs = |offset| Error::GraphVerification {
        file: entry.relative.clone(),
        found: format!("other bytes at byte {offset}"),
    };
    if target.len() != edit.bytes_after {
        return Err(differs(target.len().min(edit.bytes_after)));
    }
    for piece in edit.splice.pieces() {
        match piece {
            Piece::New { bytes, to, .. } => {
                let mut found = vec![0; bytes.len()];
                target.read_at(to, &mut found)?;
                if found != bytes {
                    return Err(differs(to));
                }
            }
            Piece::Kept { from, to } => {
                for part in around(from, multiplied) {
                    let moved = to + (part.offset - from.offset);
                    if !same(source, part, &target, moved)? {
                        return Err(differs(moved));
                    }
                }
            }
        }
    }
    let before = ModelFile::open(&entry.path, &Limits::default())?;
    let after = ModelFile::open(&staged.path().join(&entry.relative), &Limits::default())?;
    let expected = rewrite::expected(before.proto(), &edit.list);
    match without_weights(expected) == without_weights(after.proto().clone()) {
        true => Ok(()),
        false => Err(Error::GraphVerification {
            file: entry.relative.clone(),
            found: "another graph".to_owned(),
        }),
    }
}

/// Whether `part` of the source is what the target has at `at`.
fn same(source: &Source, part: ByteSpan, target: &PatchTarget, at: u64) -> Result<bool, Error> {
    let (mut expected, mut found) = (Vec::new(), Vec::new());
    for block in blocks(part) {
        expected.resize(short(block.len), 0);
        found.resize(short(block.len), 0);
        source.read_at(block.offset, &mut expected)?;
        target.read_at(at + (block.offset - part.offset), &mut found)?;
        if expected != found {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What of `span` lies outside `holes`, which are sorted.
fn around(span: ByteSpan, holes: &[ByteSpan]) -> Vec<ByteSpan> {
    let end = span.offset.saturating_add(span.len);
    let mut parts = Vec::new();
    let mut at = span.offset;
    for hole in holes.iter().filter(|hole| hole.overlaps(span)) {
        if hole.offset > at {
            parts.push(ByteSpan {
                offset: at,
                len: hole.offset - at,
            });
        }
        at = at.max(hole.offset.saturating_add(hole.len));
    }
    if at < end {
        parts.push(ByteSpan {
            offset: at,
            len: end - at,
        });
    }
    parts
}

/// The model and the lengths of its tensors: their bytes were compared where they lie.
fn without_weights(mut model: ModelProto) -> (ModelProto, Vec<usize>) {
    let mut lengths = Vec::new();
    if let Some(graph) = &mut model.graph {
        empty_graph(graph, &mut lengths);
    }
    (model, lengths)
}

fn empty_graph(graph: &mut GraphProto, lengths: &mut Vec<usize>) {
    for tensor in &mut graph.initializer {
        empty_tensor(tensor, lengths);
    }
    for attribute in graph.node.iter_mut().flat_map(|node| &mut node.attribute) {
        let AttributeProto {
            t,
            tensors,
            g,
            graphs,
            ..
        } = attribute;
        for tensor in t.as_deref_mut().into_iter().chain(tensors) {
            empty_tensor(tensor, lengths);
        }
        for graph in g.as_deref_mut().into_iter().chain(graphs) {
            empty_graph(graph, lengths);
        }
    }
}

fn empty_tensor(tensor: &mut TensorProto, lengths: &mut Vec<usize>) {
    lengths.push(tensor.raw_data.take().map_or(0, |raw| raw.len()));
    lengths.push(std::mem::take(&mut tensor.float_data).len());
}

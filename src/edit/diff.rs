//! What differs between two models, and whether that was planned.
//!
//! In: two folders, or two `.onnx` files. Out: a [`DiffReport`]: files that only one of them has, and
//! for the others every differing stretch, by tensor. Where the second one has a receipt, each
//! differing byte is checked to lie in a planned range.
//!
//! Both files are cut at the borders of tensors and planned ranges, so no stretch mixes what is
//! planned with what is not. Files of other lengths, whose graph changed, are first laid side by side
//! (`align`): by the receipt, or else by the names of their tensors. Memory: a stretch's numbers each, and two blocks for each thread.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use super::Error;
use super::align::{Alignment, Kept};
use super::plan::place;
use super::read::{Source, blocks, short};
use super::receipt::{EditedFile, EditedRange, Receipt};
use super::scale::Block;
use crate::bundle::Tree;
use crate::files::{RECEIPT, VOUCHERS};
use crate::graph::LayerId;
use crate::onnx::{ByteSpan, DataType, Limits, ModelFile, tensors};

/// The version of the report's format.
pub const SCHEMA_VERSION: u32 = 1;

/// Two models, compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DiffReport {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Files that only the second model has. Its receipt is not listed.
    pub added: Vec<String>,
    /// Files that only the first model has. Its receipt is not listed.
    pub removed: Vec<String>,
    /// Files in both that differ.
    pub changed: Vec<FileDiff>,
    /// How many files are identical.
    pub identical_files: usize,
    /// Whether the second model has a receipt.
    pub receipt: bool,
    /// With a receipt: whether every difference lies in its planned ranges.
    pub only_planned_ranges_changed: Option<bool>,
    /// Planned ranges in which no byte differs, though the receipt says so.
    pub unchanged_planned_ranges: Vec<PlannedRange>,
}

/// One file that differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileDiff {
    /// Path relative to both folders.
    pub path: String,
    /// Length of the first, in bytes.
    pub bytes_a: u64,
    /// Length of the second, in bytes.
    pub bytes_b: u64,
    /// Bytes that differ, of those that both files have.
    pub changed_bytes: u64,
    /// Where.
    pub ranges: Vec<RangeDiff>,
}

/// Differing bytes of one tensor, or of what is no tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RangeDiff {
    /// First differing byte.
    pub offset: u64,
    /// Bytes from the first to the last differing one.
    pub len: u64,
    /// Bytes that differ.
    pub changed_bytes: u64,
    /// The tensors that the bytes belong to; none for the graph itself.
    pub tensors: Vec<String>,
    /// Elements that differ, for float32, float16 and bfloat16.
    pub changed_elements: Option<u64>,
    /// The largest difference of two elements, for the same.
    pub max_abs_change: Option<f64>,
    /// The first byte in the second file, where its offset is another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset_b: Option<u64>,
    /// Bytes there, where their number is another one: something was put in or taken out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub len_b: Option<u64>,
    /// With a receipt: whether the bytes lie in a planned range.
    pub planned: Option<bool>,
}

/// A planned range of the receipt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PlannedRange {
    /// Path relative to the folder.
    pub path: String,
    /// The tensor's name.
    pub tensor: String,
    /// Decoder layer.
    pub layer: LayerId,
    /// The bytes.
    #[serde(flatten)]
    pub span: ByteSpan,
}

impl DiffReport {
    /// Whether no file differs.
    pub fn is_identical(&self) -> bool {
        self.changed.is_empty() && self.added.is_empty() && self.removed.is_empty()
    }

    /// Whether nothing differs, or exactly what the second model's receipt planned: the same files, of
    /// the planned length, differing in planned ranges only, and in each that the receipt calls changed.
    pub fn is_as_planned(&self) -> bool {
        self.is_identical()
            || (self.only_planned_ranges_changed == Some(true)
                && self.unchanged_planned_ranges.is_empty())
    }
}

/// Compares two model folders, or two `.onnx` files with their external data.
///
/// # Errors
/// A file that cannot be read; a folder against a file; a receipt that is none.
pub fn diff(a: &Path, b: &Path) -> Result<DiffReport, Error> {
    for path in [a, b] {
        std::fs::metadata(path).map_err(crate::files::Error::io("open", path))?;
    }
    let (a, b) = match (a.is_dir(), b.is_dir()) {
        (true, true) => (Side::folder(a)?, Side::folder(b)?),
        (false, false) => (Side::model(a)?, Side::model(b)?),
        _ => {
            return Err(Error::Incomparable {
                a: a.to_owned(),
                b: b.to_owned(),
            });
        }
    };
    let receipt = match b.tree.is_whole_folder() {
        true => Receipt::of(&b.tree)?,
        false => None,
    };
    let mut planned: BTreeMap<&str, &EditedFile> = BTreeMap::new();
    for file in receipt.iter().flat_map(|receipt| &receipt.files) {
        planned.insert(&file.path, file);
    }
    let (names_a, names_b) = (a.names(), b.names());
    let (tensors_a, tensors_b) = (a.tensors(), b.tensors());
    let (mut changed, mut lengths_as_planned) = (Vec::new(), true);
    let mut unchanged_planned_ranges = Vec::new();
    for name in names_a.intersection(&names_b) {
        let planned = receipt
            .as_ref()
            .map(|_| planned.get(name.as_str()).copied());
        let none = Vec::new();
        let tensors = [&tensors_a, &tensors_b].map(|side| side.get(name.as_str()).unwrap_or(&none));
        let found = compare(name, (&a, &b), tensors, planned)?;
        unchanged_planned_ranges.extend(found.unchanged);
        lengths_as_planned &= found.length_as_planned;
        changed.extend(found.diff);
    }
    let missing = |from: &BTreeSet<String>, other: &BTreeSet<String>| -> Vec<String> {
        from.difference(other).cloned().collect()
    };
    let (added, removed) = (missing(&names_b, &names_a), missing(&names_a, &names_b));
    let only_planned = added.is_empty()
        && removed.is_empty()
        && lengths_as_planned
        && (changed.iter())
            .all(|file: &FileDiff| file.ranges.iter().all(|range| range.planned == Some(true)));
    Ok(DiffReport {
        schema_version: SCHEMA_VERSION,
        identical_files: names_a.intersection(&names_b).count() - changed.len(),
        added,
        removed,
        changed,
        receipt: receipt.is_some(),
        only_planned_ranges_changed: receipt.is_some().then_some(only_planned),
        unchanged_planned_ranges,
    })
}

/// A tensor's place in a file.
struct Placed {
    span: ByteSpan,
    name: String,
    dtype: Option<DataType>,
}

impl Placed {
    fn named(&self) -> (&str, ByteSpan) {
        (&self.name, self.span)
    }
}

/// One of the two models.
struct Side {
    tree: Tree,
    /// The model file's name, where a file is compared: the other one may be called differently.
    main: Option<String>,
}

/// What a compared model file is called in the report.
const MAIN: &str = "model";

impl Side {
    fn folder(path: &Path) -> Result<Side, Error> {
        let tree = Tree::of_folder(path)?;
        Ok(Side { tree, main: None })
    }

    fn model(path: &Path) -> Result<Side, Error> {
        let tree = Tree::of_model(path)?;
        let main = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        Ok(Side { tree, main })
    }

    fn names(&self) -> BTreeSet<String> {
        self.tree
            .entries()
            .map(|entry| entry.relative.as_str())
            .filter(|&name| name != RECEIPT && !VOUCHERS.contains(&name))
            .map(|name| self.label(name).to_owned())
            .collect()
    }

    /// The name in the report of the file `name`.
    fn label<'n>(&self, name: &'n str) -> &'n str {
        match self.main.as_deref() == Some(name) {
            true => MAIN,
            false => name,
        }
    }

    fn open(&self, label: &str) -> Result<Source, Error> {
        let name = match (&self.main, label) {
            (Some(main), MAIN) => main.as_str(),
            (_, label) => label,
        };
        match self.tree.get(name) {
            Some(entry) => Source::open(&entry.path),
            None => Source::open(&self.tree.folder().join(name)),
        }
    }

    /// Where every tensor lies, by label. A file that is no model has none: its bytes are compared
    /// all the same.
    fn tensors(&self) -> BTreeMap<String, Vec<Placed>> {
        let mut found: BTreeMap<String, Vec<Placed>> = BTreeMap::new();
        for entry in self.tree.onnx() {
            let path = self.tree.folder().join(&entry.relative);
            let model = match ModelFile::open(&path, &Limits::default()) {
                Ok(model) => model,
                Err(error) => {
                    tracing::warn!("differences are not attributed to tensors: {error}");
                    continue;
                }
            };
            for tensor in tensors(model.proto()) {
                let storage = match model.storage(tensor) {
                    Ok(storage) => storage,
                    Err(error) => {
                        tracing::warn!("differences are not attributed to a tensor: {error}");
                        continue;
                    }
                };
                if let Some((data, span)) = place(&entry.relative, &storage) {
                    found
                        .entry(self.label(&data).to_owned())
                        .or_default()
                        .push(Placed {
                            span,
                            name: tensor.name().to_owned(),
                            dtype: model.data_type(tensor).ok(),
                        });
                }
            }
        }
        for tensors in found.values_mut() {
            tensors.sort_by(|a, b| (a.span, &a.name).cmp(&(b.span, &b.name)));
            tensors.dedup_by(|a, b| a.span == b.span && a.name == b.name);
        }
        found
    }
}

/// What came of one file.
struct Compared {
    diff: Option<FileDiff>,
    length_as_planned: bool,
    unchanged: Vec<PlannedRange>,
}

/// A stretch of a file that no border of a tensor or planned range divides.
struct Stretch<'t> {
    span: ByteSpan,
    /// Where it begins in the second file.
    at_b: u64,
    tensors: Vec<&'t Placed>,
    planned: Option<bool>,
}

/// Compares one file; `planned` is what the receipt tells of it, where there is one.
fn compare(
    name: &str,
    (a, b): (&Side, &Side),
    [tensors, tensors_b]: [&Vec<Placed>; 2],
    planned: Option<Option<&EditedFile>>,
) -> Result<Compared, Error> {
    let (file_a, file_b) = (a.open(name)?, b.open(name)?);
    let (len_a, len_b) = (file_a.len(), file_b.len());
    let edited = planned.flatten();
    let by_receipt = edited.and_then(|edited| Alignment::by_receipt(edited, len_a, len_b));
    let length_as_planned = by_receipt.is_some() || len_a == len_b;
    let alignment = match by_receipt {
        Some(alignment) => alignment,
        None if len_a != len_b && !tensors.is_empty() => {
            let a = tensors.iter().map(Placed::named).collect();
            let b = tensors_b.iter().map(Placed::named).collect();
            Alignment::by_tensors(a, b, len_a, len_b)
        }
        None => Alignment::by_position(len_a, len_b),
    };
    let ranges = edited.map_or(&[][..], |edited| edited.ranges.as_slice());
    let stretches: Vec<Stretch<'_>> = alignment
        .kept
        .iter()
        .flat_map(|kept| stretches(*kept, tensors, planned.map(|_| ranges)))
        .collect();
    let parts: Vec<(&Stretch<'_>, ByteSpan)> = stretches
        .iter()
        .flat_map(|stretch| blocks(stretch.span).map(move |part| (stretch, part)))
        .collect();
    let found = parts
        .par_iter()
        .map(|(stretch, part)| {
            let at_b = stretch.at_b + (part.offset - stretch.span.offset);
            let counted = count(&file_a, &file_b, *part, at_b, stretch.element())?;
            Ok(counted.map(|counted| (stretch.span.offset, counted)))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    let mut totals: BTreeMap<u64, Counted> = BTreeMap::new();
    for (stretch, counted) in found.into_iter().flatten() {
        totals
            .entry(stretch)
            .and_modify(|total| total.add(&counted))
            .or_insert(counted);
    }
    let mut differing: Vec<RangeDiff> = stretches
        .iter()
        .filter_map(|stretch| Some(totals.get(&stretch.span.offset)?.report(stretch)))
        .collect();
    let unchanged = ranges
        .iter()
        .filter(|range| range.sha256_before != range.sha256_after)
        .filter(|range| {
            !differing.iter().any(|found| {
                range.span_before().overlaps(ByteSpan {
                    offset: found.offset,
                    len: found.len,
                })
            })
        })
        .map(|range| PlannedRange {
            path: name.to_owned(),
            tensor: range.tensor.clone(),
            layer: range.layer,
            span: range.span(),
        })
        .collect();
    for gap in &alignment.gaps {
        if gap.is_same(&file_a, &file_b)? {
            continue;
        }
        let planned = match planned {
            Some(_) => Some(gap.is_planned(&file_b)?.unwrap_or(false)),
            None => None,
        };
        differing.push(RangeDiff {
            offset: gap.a.offset,
            len: gap.a.len,
            changed_bytes: gap.a.len.max(gap.b.len),
            tensors: Vec::new(),
            changed_elements: None,
            max_abs_change: None,
            offset_b: (gap.b.offset != gap.a.offset).then_some(gap.b.offset),
            len_b: (gap.b.len != gap.a.len).then_some(gap.b.len),
            planned,
        });
    }
    differing.sort_by_key(|range| range.offset);
    let same = differing.is_empty() && len_a == len_b;
    let diff = (!same).then(|| FileDiff {
        path: name.to_owned(),
        bytes_a: len_a,
        bytes_b: len_b,
        changed_bytes: differing.iter().map(|range| range.changed_bytes).sum(),
        ranges: differing,
    });
    Ok(Compared {
        diff,
        length_as_planned,
        unchanged,
    })
}

/// Cuts a kept stretch at every border.
fn stretches<'t>(
    kept: Kept,
    tensors: &'t [Placed],
    planned: Option<&[EditedRange]>,
) -> Vec<Stretch<'t>> {
    let (start, end) = (kept.a, kept.a.saturating_add(kept.len));
    let spans = tensors.iter().map(|tensor| tensor.span);
    let planned_spans: Vec<ByteSpan> = planned
        .unwrap_or_default()
        .iter()
        .map(EditedRange::span_before)
        .collect();
    let mut borders = BTreeSet::from([start, end]);
    for span in spans.chain(planned_spans.iter().copied()) {
        let ends = [span.offset, span.end().unwrap_or(end)];
        borders.extend(ends.map(|border| border.clamp(start, end)));
    }
    let borders: Vec<u64> = borders.into_iter().collect();
    // Tensors by start, swept along with the borders; the open ones are those that reach here.
    let mut waiting = tensors.iter().peekable();
    let mut open: Vec<&Placed> = Vec::new();
    borders
        .windows(2)
        .filter_map(|pair| match pair {
            &[offset, end] => Some((offset, end)),
            _ => None,
        })
        .map(|(offset, end)| {
            let span = ByteSpan {
                offset,
                len: end - offset,
            };
            while let Some(tensor) = waiting.next_if(|tensor| tensor.span.offset < end) {
                open.push(tensor);
            }
            open.retain(|tensor| tensor.span.overlaps(span));
            Stretch {
                span,
                at_b: kept.b + (offset - kept.a),
                tensors: open.clone(),
                planned: planned.map(|_| planned_spans.iter().any(|p| p.overlaps(span))),
            }
        })
        .collect()
}

impl Stretch<'_> {
    /// The element type, where all bytes belong to whole elements of one float tensor.
    fn element(&self) -> Option<DataType> {
        match self.tensors.as_slice() {
            [tensor] if tensor.span == self.span => {
                tensor.dtype.filter(|dtype| dtype.is_scalable_float())
            }
            _ => None,
        }
    }
}

/// Differences in a part of a stretch.
struct Counted {
    first: u64,
    last: u64,
    bytes: u64,
    elements: Option<u64>,
    max_abs: Option<f64>,
}

impl Counted {
    fn add(&mut self, other: &Counted) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.elements = self.elements.zip(other.elements).map(|(a, b)| a + b);
        self.max_abs = self.max_abs.zip(other.max_abs).map(|(a, b)| a.max(b));
    }

    fn report(&self, stretch: &Stretch<'_>) -> RangeDiff {
        let names: BTreeSet<&str> = stretch.tensors.iter().map(|t| t.name.as_str()).collect();
        RangeDiff {
            offset: self.first,
            len: self.last - self.first + 1,
            changed_bytes: self.bytes,
            tensors: names.into_iter().map(str::to_owned).collect(),
            changed_elements: self.elements,
            max_abs_change: self.max_abs,
            offset_b: (stretch.at_b != stretch.span.offset)
                .then_some(stretch.at_b + (self.first - stretch.span.offset)),
            len_b: None,
            planned: stretch.planned,
        }
    }
}

/// Compares one part, which begins at an element of type `element` if there is one.
fn count(
    a: &Source,
    b: &Source,
    part: ByteSpan,
    at_b: u64,
    element: Option<DataType>,
) -> Result<Option<Counted>, Error> {
    let len = short(part.len);
    let (mut block_a, mut block_b) = (Block::with_capacity(len), Block::with_capacity(len));
    a.read_at(part.offset, block_a.resized(len))?;
    b.read_at(at_b, block_b.resized(len))?;
    if block_a.bytes() == block_b.bytes() {
        return Ok(None);
    }
    let differing = || {
        let pairs = block_a.bytes().iter().zip(block_b.bytes());
        (part.offset..).zip(pairs).filter(|(_, (a, b))| a != b)
    };
    let Some((first, _)) = differing().next() else {
        return Ok(None);
    };
    let mut counted = Counted {
        first,
        last: differing()
            .map(|(offset, _)| offset)
            .last()
            .unwrap_or(first),
        bytes: differing().count() as u64,
        elements: None,
        max_abs: None,
    };
    if let Some(dtype) = element {
        let mut values = Vec::with_capacity(len / 2);
        block_a.widened(dtype, |_, value| values.push(value));
        let (mut elements, mut max_abs) = (0u64, 0f64);
        block_b.widened(dtype, |index, b| {
            let a = values.get(index).copied().unwrap_or(b);
            if a.to_bits() != b.to_bits() {
                elements += 1;
                max_abs = max_abs.max((f64::from(a) - f64::from(b)).abs());
            }
        });
        (counted.elements, counted.max_abs) = (Some(elements), Some(max_abs));
    }
    Ok(Some(counted))
}

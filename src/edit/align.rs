//! Which stretch of one file corresponds to which of another.
//!
//! In: two versions of a file, what a receipt tells of bytes that were put in, or where each has its
//! tensors. Out: an [`Alignment`]: kept stretches, each with its place in both, and the gaps between
//! them, where one file has other bytes than the other. A file whose graph changed has its weights at
//! other offsets; compared by position, everything would differ.

use std::collections::BTreeMap;

use super::Error;
use super::read::{Source, blocks, short};
use super::receipt::EditedFile;
use crate::files::{Sha256, Sha256Hasher};
use crate::onnx::ByteSpan;

/// A stretch that both files have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Where, in the first.
    pub(super) a: u64,
    /// Where, in the second.
    pub(super) b: u64,
    /// Length in bytes.
    pub(super) len: u64,
}

/// What lies between two kept stretches, or before and behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gap {
    /// In the first file; may be empty.
    pub(super) a: ByteSpan,
    /// In the second file; may be empty.
    pub(super) b: ByteSpan,
    /// The digest that a receipt tells for the second.
    pub(super) sha256: Option<Sha256>,
}

/// Two files, stretch by stretch.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Alignment {
    pub(super) kept: Vec<Kept>,
    pub(super) gaps: Vec<Gap>,
}

impl Alignment {
    /// By position: what both have, and the rest of the longer one.
    pub(super) fn by_position(len_a: u64, len_b: u64) -> Alignment {
        let len = len_a.min(len_b);
        Alignment::between(&[Kept { a: 0, b: 0, len }], len_a, len_b)
    }

    /// As a receipt tells; `None` where what it tells does not fit the files.
    pub(super) fn by_receipt(edited: &EditedFile, len_a: u64, len_b: u64) -> Option<Alignment> {
        if edited.bytes != len_b || edited.bytes_before.unwrap_or(edited.bytes) != len_a {
            return None;
        }
        let mut alignment = Alignment::default();
        let (mut a, mut b) = (0u64, 0u64);
        for range in &edited.inserted {
            let len = range.offset.checked_sub(b)?;
            if range.offset_before.checked_sub(a)? != len {
                return None;
            }
            alignment.kept.push(Kept { a, b, len });
            let gap = Gap {
                a: ByteSpan {
                    offset: range.offset_before,
                    len: range.len_before,
                },
                b: ByteSpan {
                    offset: range.offset,
                    len: range.len,
                },
                sha256: Some(range.sha256),
            };
            (a, b) = (gap.a.end()?, gap.b.end()?);
            alignment.gaps.push(gap);
        }
        let len = len_b.checked_sub(b)?;
        if len_a.checked_sub(a)? != len {
            return None;
        }
        alignment.kept.push(Kept { a, b, len });
        Some(alignment)
    }

    /// By the tensors that both files have under one name, at the same length and in the same order.
    pub(super) fn by_tensors<'n>(
        mut a: Vec<(&'n str, ByteSpan)>,
        b: Vec<(&'n str, ByteSpan)>,
        len_a: u64,
        len_b: u64,
    ) -> Alignment {
        let mut places: BTreeMap<&str, Vec<ByteSpan>> = BTreeMap::new();
        for (name, span) in b {
            places.entry(name).or_default().push(span);
        }
        a.sort_by_key(|&(name, span)| (span, name));
        let mut kept = Vec::new();
        let (mut reached_a, mut reached_b) = (0u64, 0u64);
        for (name, span) in a {
            let Some(&[other]) = places.get(name).map(Vec::as_slice) else {
                continue;
            };
            let ahead = span.offset >= reached_a && other.offset >= reached_b;
            let fits = span.end().is_some_and(|end| end <= len_a)
                && other.end().is_some_and(|end| end <= len_b);
            if other.len == span.len && ahead && fits {
                (reached_a, reached_b) = (span.offset + span.len, other.offset + other.len);
                let (a, b, len) = (span.offset, other.offset, span.len);
                kept.push(Kept { a, b, len });
            }
        }
        Alignment::between(&kept, len_a, len_b)
    }

    fn between(kept: &[Kept], len_a: u64, len_b: u64) -> Alignment {
        let mut alignment = Alignment::default();
        let (mut a, mut b) = (0u64, 0u64);
        let end = Kept {
            a: len_a,
            b: len_b,
            len: 0,
        };
        for &kept in kept.iter().chain([&end]) {
            let gap = Gap {
                a: ByteSpan {
                    offset: a,
                    len: kept.a - a,
                },
                b: ByteSpan {
                    offset: b,
                    len: kept.b - b,
                },
                sha256: None,
            };
            if gap.a.len > 0 || gap.b.len > 0 {
                alignment.gaps.push(gap);
            }
            if kept.len > 0 {
                alignment.kept.push(kept);
            }
            (a, b) = (kept.a + kept.len, kept.b + kept.len);
        }
        alignment
    }
}

impl Gap {
    /// Whether both files have the same bytes there.
    pub(super) fn is_same(&self, a: &Source, b: &Source) -> Result<bool, Error> {
        Ok(self.a.len == self.b.len && digest(a, self.a)? == digest(b, self.b)?)
    }

    /// Whether the second file has what the receipt tells; `None` without one.
    pub(super) fn is_planned(&self, b: &Source) -> Result<Option<bool>, Error> {
        match self.sha256 {
            Some(expected) => Ok(Some(digest(b, self.b)? == expected)),
            None => Ok(None),
        }
    }
}

fn digest(source: &Source, span: ByteSpan) -> Result<Sha256, Error> {
    let mut hasher = Sha256Hasher::default();
    let mut bytes = Vec::new();
    for block in blocks(span) {
        bytes.resize(short(block.len), 0);
        source.read_at(block.offset, &mut bytes)?;
        hasher.update(&bytes);
    }
    Ok(hasher.finish())
}

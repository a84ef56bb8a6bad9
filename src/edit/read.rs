//! Stored bytes, read in blocks.
//!
//! In: a file and a byte span. Out: its bytes, a few megabytes at a time, by `pread`: a page of a
//! memory map counts as this process's memory, and a model's weights may be larger than that.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::Error;
use crate::files::Error as FilesError;
use crate::onnx::ByteSpan;

/// Bytes in one block. A multiple of every element size.
pub(super) const BLOCK: u64 = 1 << 20;

/// A regular file, open to be read at any offset.
pub(super) struct Source {
    file: File,
    path: PathBuf,
    len: u64,
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Source, Error> {
        let (file, metadata) = crate::files::copy::open_regular(path)?;
        Ok(Source {
            file,
            path: path.to_owned(),
            len: metadata.len(),
        })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(FilesError::io("read", &self.path))
            .map_err(Error::from)
    }
}

/// The blocks that `span` falls into.
pub(super) fn blocks(span: ByteSpan) -> impl Iterator<Item = ByteSpan> {
    (0..span.len.div_ceil(BLOCK)).map(move |block| {
        let start = block * BLOCK;
        ByteSpan {
            offset: span.offset.saturating_add(start),
            len: BLOCK.min(span.len - start),
        }
    })
}

/// A length that is at most [`BLOCK`].
pub(super) fn short(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

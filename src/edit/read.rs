//! A stored matrix, read in blocks.
//!
//! In: a file and a byte span. Out: its bytes, a few megabytes at a time, by `pread`: a page of a
//! memory map counts as this process's memory, and a model's weights may be larger than that.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::Error;
use super::form::Target;
use super::scale::Block;
use crate::files::Error as FilesError;
use crate::onnx::{ByteSpan, DataType, ModelFile, Storage};

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

/// A float matrix where it lies.
pub(super) struct Matrix {
    source: Source,
    pub(super) span: ByteSpan,
    pub(super) dtype: DataType,
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// The stored axis along the neurons.
    pub(super) axis: usize,
}

impl Matrix {
    /// Opens the matrix of `target`, a tensor of `model`; `None` where it has no bytes of its own.
    pub(super) fn open(model: &ModelFile, target: &Target<'_>) -> Result<Option<Matrix>, Error> {
        let (path, span) = match &target.storage {
            Storage::Inline(span) => (model.canonical_path(), *span),
            Storage::External { file, span, .. } => (file.as_path(), *span),
            Storage::Typed => return Ok(None),
        };
        let sizes = usize::try_from(target.rows)
            .ok()
            .zip(usize::try_from(target.columns).ok());
        let Some((rows, columns)) = sizes else {
            return Ok(None);
        };
        Ok(Some(Matrix {
            source: Source::open(path)?,
            span,
            dtype: target.dtype,
            rows,
            columns,
            axis: target.axis,
        }))
    }

    /// The number of neurons: the length of the axis that the gates run along.
    pub(super) fn neurons(&self) -> usize {
        match self.axis {
            0 => self.rows,
            _ => self.columns,
        }
    }

    /// Calls `each` with every block's first element and its bytes.
    pub(super) fn for_each_block(
        &self,
        mut each: impl FnMut(usize, &mut Block),
    ) -> Result<(), Error> {
        let size = self.dtype.bytes(1).unwrap_or(1);
        let mut block = Block::with_capacity(short(BLOCK.min(self.span.len)));
        for part in blocks(self.span) {
            self.source
                .read_at(part.offset, block.resized(short(part.len)))?;
            let start = (part.offset - self.span.offset) / size;
            each(usize::try_from(start).unwrap_or(usize::MAX), &mut block);
        }
        Ok(())
    }

    /// Calls `each` with the elements of stored row `row` in the columns `wanted`, which ascend.
    pub(super) fn for_each_in_row(
        &self,
        row: usize,
        wanted: &[usize],
        mut each: impl FnMut(f32),
    ) -> Result<(), Error> {
        let size = self.dtype.bytes(1).unwrap_or(1);
        let len = size.saturating_mul(self.columns as u64);
        let start = (row as u64).saturating_mul(len);
        let span = ByteSpan {
            offset: self.span.offset.saturating_add(start),
            len,
        };
        let mut block = Block::with_capacity(short(BLOCK.min(len)));
        let mut wanted = wanted.iter().peekable();
        for part in blocks(span) {
            self.source
                .read_at(part.offset, block.resized(short(part.len)))?;
            let first = short((part.offset - span.offset) / size);
            while let Some(value) = wanted
                .peek()
                .and_then(|&&column| block.value(self.dtype, column.checked_sub(first)?))
            {
                each(value);
                wanted.next();
            }
        }
        Ok(())
    }
}

//! Where an image's bytes are: in a file, or in the dataset itself.
//!
//! In: a path, or the bytes that a row of a parquet file holds. Out: what
//! [`crate::preprocess::image::read`] reads, and a digest. Promise: the digest is of the image
//! file's bytes, wherever they are kept, so the same picture has the same digest.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::Error;

/// An encoded image (PNG, JPEG or WebP).
#[derive(Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// A file.
    File(PathBuf),
    /// Bytes that the dataset holds: Hugging Face's image struct `{bytes, path}`.
    Bytes {
        /// Where they came from, for messages: `FILE#row 3/face.png`. It need not exist.
        origin: PathBuf,
        /// The encoded image. Cloning shares them.
        bytes: Bytes,
    },
}

impl ImageSource {
    /// The file, or where the bytes came from: for messages.
    #[must_use]
    pub fn origin(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Bytes { origin, .. } => origin,
        }
    }

    /// SHA-256 of the encoded image.
    ///
    /// # Errors
    /// [`Error::Files`] where the file can no longer be read.
    pub fn sha256(&self) -> Result<[u8; 32], Error> {
        let path = match self {
            Self::Bytes { bytes, .. } => return Ok(Sha256::digest(bytes).into()),
            Self::File(path) => path,
        };
        Ok(*crate::files::Sha256::of_file(path)?.as_bytes())
    }
}

impl std::fmt::Debug for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kept = match self {
            Self::File(_) => "a file".to_owned(),
            Self::Bytes { bytes, .. } => format!("{} bytes", bytes.len()),
        };
        write!(f, "{} ({kept})", self.origin().display())
    }
}

impl From<PathBuf> for ImageSource {
    fn from(path: PathBuf) -> Self {
        Self::File(path)
    }
}

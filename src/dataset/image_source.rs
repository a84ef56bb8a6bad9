//! Where an image's bytes are: in a file, or in the dataset itself.
//!
//! In: a path, or the bytes that a row of a parquet file holds. Out: what
//! [`crate::preprocess::image::read`] reads, and a digest. Promise: the digest is of the image
//! file's bytes, wherever they are kept, so the same picture has the same digest.

use std::io::Read;
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
    /// [`Error::Read`] where the file can no longer be read.
    pub fn sha256(&self) -> Result<[u8; 32], Error> {
        let path = match self {
            Self::Bytes { bytes, .. } => return Ok(Sha256::digest(bytes).into()),
            Self::File(path) => path,
        };
        let read = |source| Error::Read {
            path: path.clone(),
            source,
        };
        let mut file = std::fs::File::open(path).map_err(read)?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0_u8; 1 << 16];
        loop {
            let count = file.read(&mut buffer).map_err(read)?;
            let Some(chunk) = buffer.get(..count).filter(|chunk| !chunk.is_empty()) else {
                break;
            };
            digest.update(chunk);
        }
        Ok(digest.finalize().into())
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

//! Ready-made model inputs as a dataset: one file per sample.
//!
//! In: a `.safetensors` or `.npz` file, or a folder of them. Out: a [`Dataset`], the files in the order
//! of their names; what is in them is read when it is needed
//! ([`Feed`](crate::preprocess::Feed)).

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Dataset, Error, ImageSource, Sample, hex};
use crate::limits::FEED_FILES;

/// Whether `path` is to be read as feeds: by its name, or, a folder, by the names in it.
pub fn is_feeds(path: &Path) -> bool {
    if !path.is_dir() {
        return is_feed(path);
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|path| is_feed(&path))
}

fn is_feed(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    matches!(extension, Some("safetensors" | "npz"))
}

/// The feeds in a folder, at most `limit`.
fn list(path: &Path, limit: usize) -> Result<Vec<PathBuf>, Error> {
    let read = |source| Error::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(read)? {
        let file = entry.map_err(read)?.path();
        files.extend(Some(file).filter(|file| is_feed(file)));
        if files.len() > limit {
            return Err(Error::TooManyFeeds {
                path: path.to_path_buf(),
                limit,
            });
        }
    }
    Ok(files)
}

/// Lists the feeds at `path`.
///
/// # Errors
/// The folder cannot be listed, or holds none.
pub fn read_feeds(path: &Path) -> Result<Dataset, Error> {
    let mut files = match path.is_dir() {
        true => list(path, FEED_FILES)?,
        false => vec![path.to_path_buf()],
    };
    files.sort();
    if files.is_empty() {
        return Err(Error::Empty {
            path: path.to_path_buf(),
        });
    }
    let mut digest = Sha256::new();
    let mut samples = Vec::with_capacity(files.len());
    for file in files {
        let id = file.file_name().unwrap_or_default();
        let id = id.to_string_lossy().into_owned();
        digest.update(id.as_bytes());
        digest.update([0]);
        digest.update(ImageSource::File(file.clone()).sha256()?);
        samples.push(Sample {
            id,
            feed: Some(file),
            ..Sample::default()
        });
    }
    Ok(Dataset {
        path: path.to_path_buf(),
        samples,
        sha256: hex(&digest.finalize()),
        bad_rows: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_more_feeds_than_allowed_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.npz", "b.safetensors", "c.npz", "notes.txt"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(list(folder.path(), 3).unwrap().len(), 3);
        let error = list(folder.path(), 2).unwrap_err();
        assert!(error.to_string().contains("at most 2 files"), "{error}");
    }
}

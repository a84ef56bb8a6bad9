//! Room on a disk, asked for before anything is written.
//!
//! In: a path that exists or will exist. Out: bytes that this user may still write there.

use std::path::Path;

use super::Error;

/// How many bytes an ordinary user may still write to the file system that holds `path`.
///
/// `path` need not exist: the nearest existing folder above it answers.
///
/// # Errors
/// [`Error::Io`] where the file system does not answer.
pub fn available_bytes(path: &Path) -> Result<u64, Error> {
    let absolute = std::path::absolute(path).map_err(|source| Error::Io {
        action: "resolve",
        path: path.to_owned(),
        source,
    })?;
    let existing = absolute
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing).map_err(|e| Error::Io {
        action: "ask for the free space of",
        path: existing.to_owned(),
        source: e.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Refuses to begin what the disk cannot hold.
///
/// # Errors
/// [`Error::DiskFull`] when fewer than `needed` bytes are available.
pub fn require(path: &Path, needed: u64) -> Result<(), Error> {
    let available = available_bytes(path)?;
    if available < needed {
        return Err(Error::DiskFull {
            path: path.to_owned(),
            needed: Some(needed),
            available,
        });
    }
    Ok(())
}

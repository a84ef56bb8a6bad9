//! A file overwritten before it is removed.
//!
//! In: a file that must not be read again. Out: zeros in its place, once, synced, and then no file. What this cannot
//! promise: flash translation layers, copy-on-write file systems, journals, snapshots and backups may keep the old
//! blocks, and whatever was read of the file may be in a swap space. Where that matters, the file belongs on an
//! encrypted disk, or in memory (tmpfs), from the start.

use std::path::Path;

use super::Error;
use super::copy::PatchTarget;
use super::new_folder::sync_folder;

/// Whether `path` can be shredded: a regular file with one name, that may be written to.
///
/// # Errors
/// [`Error::NotRegular`], [`Error::HardLinked`], [`Error::Io`].
pub fn check(path: &Path) -> Result<(), Error> {
    PatchTarget::open(path).map(|_| ())
}

/// Overwrites the file `path` with zeros and removes it.
///
/// # Errors
/// Those of [`check`]; the disk fails. The file may then be partly overwritten, and is still there.
pub fn shred(path: &Path) -> Result<(), Error> {
    let target = PatchTarget::open(path)?;
    let zeros = vec![0; 1 << 16];
    let mut at = 0;
    while at < target.len() {
        let left = usize::try_from(target.len() - at).unwrap_or(usize::MAX);
        let block = zeros.get(..left.min(zeros.len())).unwrap_or_default();
        target.write_at(at, block)?;
        at += block.len() as u64;
    }
    target.sync()?;
    std::fs::remove_file(path).map_err(Error::io("remove", path))?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => sync_folder(Path::new(".")),
    }
}

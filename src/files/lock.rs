//! One writer at a time in one folder.
//!
//! In: a folder. Out: an advisory lock on it (`flock`), held until it is dropped or the process ends, however it
//! ends. A file system without such locks (some network ones) is used without: nothing else could be asked there.

use std::fs::{File, TryLockError};
use std::path::Path;

use super::Error;

/// A folder that this process alone writes to.
#[derive(Debug)]
pub struct FolderLock {
    _folder: File,
}

impl FolderLock {
    /// Locks `folder`, without waiting.
    ///
    /// # Errors
    /// [`Error::Busy`] where another process holds it, [`Error::Io`] where there is no such folder.
    pub fn take(folder: &Path) -> Result<FolderLock, Error> {
        let opened = File::open(folder).map_err(Error::io("open", folder))?;
        match opened.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Busy {
                    folder: folder.to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => {
                tracing::warn!("no lock on {}: {error}", folder.display());
            }
            Ok(()) => {}
        }
        Ok(FolderLock { _folder: opened })
    }
}

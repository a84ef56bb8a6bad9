//! Files, never half written.
//!
//! In: paths that a user named, and bytes to put there. Out: folders and files that are either
//! absent or whole, at any moment of a crash.
//!
//! - [`new_folder`]: an output folder, staged beside its destination and renamed once; single
//!   files likewise.
//! - [`journal`]: files changed where they lie, resumable after a crash.
//! - [`lock`]: one writer at a time in one folder.
//! - [`interrupt`]: what an interrupted run takes away with it.
//! - [`copy`]: one file copied, by sharing its blocks where the file system can, and byte ranges
//!   of a copy overwritten.
//! - [`contain`]: the one function that opens a file which a *model* named.
//! - [`hash`]: the one place for digests.
//! - [`map`]: memory maps.
//! - [`read`]: whole files, within a limit; [`json`], [`safetensors`]: what is measured in them before
//!   anything is built.
//! - [`shred`]: a file overwritten before it is removed.
//! - [`space`]: whether there is room, asked before anything is written.

pub mod contain;
pub mod copy;
pub mod hash;
pub mod interrupt;
pub mod journal;
pub mod json;
pub mod lock;
pub mod map;
pub mod new_folder;
pub mod read;
pub mod safetensors;
pub mod shred;
pub mod space;

use std::io;
use std::path::{Path, PathBuf};

pub use contain::{Contained, Root, open_beneath};
pub use copy::{BegunCopy, Copied, Method, PatchTarget, copy_file, patch_file};
pub use hash::{Sha256, Sha256Hasher};
pub use lock::FolderLock;
pub use new_folder::{RECEIPT, StagedFile, StagedFolder, VOUCHERS, write_atomic};
pub use read::{read_limited, read_text};
pub use space::available_bytes;

/// What can go wrong while a file is read, copied or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system said no.
    #[error("cannot {action} `{}`", path.display())]
    Io {
        /// What was tried, as in "cannot … `path`".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The output is there already, and nobody asked for it to be replaced.
    #[error("`{}` already exists", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// `--force` replaces what this tool wrote, and nothing else.
    #[error("will not replace `{}`: expected an empty folder or one that holds `{RECEIPT}`, found {found}", path.display())]
    Foreign {
        /// The output.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The folder that would hold the output is missing.
    #[error("the folder `{}`, which would hold the output, does not exist", parent.display())]
    NoParent {
        /// The missing folder.
        parent: PathBuf,
    },
    /// A path without a last component (`/`, `..`) cannot name an output.
    #[error("`{}` does not name a file or folder to create", path.display())]
    NoName {
        /// The path as given.
        path: PathBuf,
    },
    /// A name inside a staged folder must be relative, without `..`.
    #[error("`{name}` is not a relative path inside the output folder")]
    BadName {
        /// The name as given.
        name: String,
    },
    /// A regular file was expected.
    #[error("expected a regular file at `{}`, found {found}", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// Another process writes to the folder.
    #[error("another run of kvw is writing to `{}`", folder.display())]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
    /// A journal or undo log that is none, is not whole, or is of another folder.
    #[error("{}: expected a whole journal of kvw, found {found}", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// A range that a journal is about was changed by somebody else.
    #[error("`{}`: expected the bytes before or after the patch, found others at byte {offset}", path.display())]
    Neither {
        /// The file.
        path: PathBuf,
        /// The first byte of the range or sector that is neither.
        offset: u64,
    },
    /// A file to be written to is reached through a symbolic link.
    #[error("will not write to `{}` through a symbolic link, to `{}`", path.display(), resolved.display())]
    Linked {
        /// The file as it is named.
        path: PathBuf,
        /// The file that it is.
        resolved: PathBuf,
    },
    /// More bytes than any file of its kind has ([`crate::limits`]).
    #[error("{}: expected at most {limit} bytes, found {found}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit, in bytes.
        limit: u64,
        /// The file's length, or how much of it was read.
        found: u64,
    },
    /// Text is UTF-8.
    #[error("{}: expected UTF-8 text, found other bytes at byte {offset}", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// The first byte that is not UTF-8.
        offset: usize,
    },
    /// The file has other names: writing to it would change files that nobody asked to change.
    #[error("will not write to `{}`: the file has {links} names (hard links)", path.display())]
    HardLinked {
        /// The file.
        path: PathBuf,
        /// How many names it has.
        links: u64,
    },
    /// A patch reaches past the end of the file.
    #[error("`{}` has {len} bytes, but a patch covers {count} bytes at offset {offset}", path.display())]
    PatchOutOfRange {
        /// The file.
        path: PathBuf,
        /// The length of the file.
        len: u64,
        /// Where the patch begins.
        offset: u64,
        /// The length of the patch.
        count: u64,
    },
    /// The disk is full, or would be.
    #[error("not enough room for `{}`: {}, {available} bytes available", path.display(), needed_text(*.needed))]
    DiskFull {
        /// What was to be written.
        path: PathBuf,
        /// How many bytes are needed, where that is known.
        needed: Option<u64>,
        /// How many bytes this user may still write there.
        available: u64,
    },
    /// A digest is 64 hexadecimal digits.
    #[error("`{found}` is not a sha256 digest (64 hexadecimal digits)")]
    BadDigest {
        /// The text.
        found: String,
    },
}

fn needed_text(needed: Option<u64>) -> String {
    match needed {
        Some(bytes) => format!("{bytes} bytes needed"),
        None => "more is needed".to_owned(),
    }
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Exists { .. } => {
                Some("choose another output, or replace this one with --force".to_owned())
            }
            Error::Foreign { .. } => {
                Some("remove it by hand if it is not needed, or choose another output".to_owned())
            }
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Some("check the path".to_owned())
            }
            Error::NoParent { parent } => Some(format!("mkdir -p {}", parent.display())),
            Error::HardLinked { .. } | Error::Linked { .. } => {
                Some("write a new folder with -o instead of changing this file".to_owned())
            }
            Error::Busy { .. } => Some("wait until it is done".to_owned()),
            Error::Journal { path, .. } if path.ends_with(journal::JOURNAL) => Some(
                "the disk is at fault, or the folder was changed meanwhile: restore the model from a copy, then delete the journal"
                    .to_owned(),
            ),
            Error::Neither { .. } => Some(
                "something else wrote to the model: restore the file from a copy, and run again"
                    .to_owned(),
            ),
            Error::DiskFull {
                needed, available, ..
            } => Some(match needed {
                Some(needed) => format!(
                    "free at least {} more bytes there, or choose an output on another disk",
                    needed.saturating_sub(*available)
                ),
                None => "free some room there, or choose an output on another disk".to_owned(),
            }),
            _ => None,
        }
    }

    /// Wraps an I/O error; a full disk or an exhausted quota becomes [`Error::DiskFull`].
    pub(crate) fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull {
                path: path.to_owned(),
                needed: None,
                available: available_bytes(path).unwrap_or(0),
            },
            _ => Error::Io {
                action,
                path: path.to_owned(),
                source,
            },
        }
    }
}

/// What kind of thing a path is, for messages.
pub(crate) fn kind_of(kind: std::fs::FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt as _;
    match kind {
        k if k.is_file() => "a regular file",
        k if k.is_dir() => "a folder",
        k if k.is_symlink() => "a symbolic link",
        k if k.is_fifo() => "a named pipe",
        k if k.is_socket() => "a socket",
        k if k.is_block_device() || k.is_char_device() => "a device",
        _ => "something else",
    }
}

//! The one function that opens a file which a *model* named.
//!
//! In: a model folder, and a relative location out of a model file (`external_data`, wherever it
//! hangs). Out: an open regular file that lies inside. A model is somebody else's data, and a
//! location in it is an attack until proved otherwise (CVE-2022-25882, CVE-2024-27318,
//! CVE-2024-5187 and their successors): so
//!
//! 1. the text is checked first: relative, no `..` that climbs out, no backslash, drive, URL, control
//!    character or memory marker;
//! 2. then every link is resolved, and the result must lie inside the boundary: the model folder, or
//!    the `models--…` folder when the model lies in a Hugging Face cache, whose files are links into
//!    `blobs/`;
//! 3. then the *resolved* path is opened without following any link (`openat2`,
//!    `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`), so that nothing can be swapped in between;
//! 4. what was opened must be a regular file.
//!
//! Known limits: a hard link to a file outside looks like any file, so it can be read; its
//! [`Contained::links`] says so, and nothing with two names is ever written to. Kernels before
//! 5.6 have no `openat2`: there the file opened is compared with the file resolved.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::kind_of;
use crate::limits;

/// Why a location was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text of the location is not acceptable, whatever lies on the disk.
    #[error("location {location:?}: expected a relative path, found {found}")]
    Text {
        /// The location, shortened.
        location: String,
        /// What is wrong with it.
        found: &'static str,
    },
    /// The location leads out of the model folder.
    #[error("location {location:?} leads out of `{}`, to `{}`", root.display(), resolved.display())]
    Escapes {
        /// The location.
        location: String,
        /// The boundary.
        root: PathBuf,
        /// Where it leads.
        resolved: PathBuf,
    },
    /// There is no such file.
    #[error("location {location:?}: no such file in `{}`", root.display())]
    Missing {
        /// The location.
        location: String,
        /// The folder in which it was sought.
        root: PathBuf,
    },
    /// It is no regular file.
    #[error("location {location:?}: expected a regular file, found {found}")]
    NotRegular {
        /// The location.
        location: String,
        /// What is there.
        found: &'static str,
    },
    /// The file changed while it was being opened.
    #[error("`{}` was replaced while it was being opened", path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// The operating system said no.
    #[error("cannot open `{}`", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Text { .. } => Some(
                "the model names a file that it must not name: get it from a source you trust"
                    .to_owned(),
            ),
            Error::Escapes { .. } => Some(
                "copy the linked files into the model folder (cp -rL), and use that copy"
                    .to_owned(),
            ),
            Error::Missing { .. } => {
                Some("the model's weights lie in that file: download it too".to_owned())
            }
            _ => None,
        }
    }
}

/// A file that was opened inside its boundary.
#[derive(Debug)]
pub struct Contained {
    /// The open file, to read.
    pub file: File,
    /// Its path, all links resolved.
    pub path: PathBuf,
    /// Its length in bytes.
    pub len: u64,
    /// How many names it has. More than one: it may be read, and must not be written to.
    pub links: u64,
}

/// A model folder and the boundary that no file of it may cross.
#[derive(Debug, Clone)]
pub struct Root {
    folder: PathBuf,
    boundary: PathBuf,
}

impl Root {
    /// The boundary of the model folder `folder`.
    ///
    /// # Errors
    /// [`Error::Io`] when it is not there, [`Error::NotRegular`] when it is no folder.
    pub fn of(folder: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io {
            path: folder.to_owned(),
            source,
        };
        let canonical = folder.canonicalize().map_err(io)?;
        if !canonical.is_dir() {
            return Err(io(io::ErrorKind::NotADirectory.into()));
        }
        let boundary = cache_entry(&canonical).unwrap_or(&canonical).to_owned();
        Ok(Root {
            folder: canonical,
            boundary,
        })
    }

    /// The model folder, all links resolved.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What no file may lie outside of: the model folder or the Hugging Face cache's entry.
    pub fn boundary(&self) -> &Path {
        &self.boundary
    }

    /// Opens `location`, relative to the model folder.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(&self, location: &str) -> Result<Contained, Error> {
        self.open_from("", location)
    }

    /// Opens `location` as a model file in the subfolder `base` of the model folder names it: `..` may
    /// climb as far as the model folder.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open_from(&self, base: &str, location: &str) -> Result<Contained, Error> {
        check_text(base, location)?;
        let named = self.folder.join(base).join(location);
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::Missing {
                location: location.to_owned(),
                root: self.folder.clone(),
            },
            _ => Error::Io {
                path: named.clone(),
                source,
            },
        };
        let resolved = named.canonicalize().map_err(io)?;
        let Ok(inside) = resolved.strip_prefix(&self.boundary) else {
            return Err(Error::Escapes {
                location: location.to_owned(),
                root: self.boundary.clone(),
                resolved,
            });
        };
        let regular = |metadata: &Metadata| match metadata.is_file() {
            true => Ok(()),
            false => Err(Error::NotRegular {
                location: location.to_owned(),
                found: kind_of(metadata.file_type()),
            }),
        };
        // Asked before opening, because opening a device can itself do something.
        let expected = resolved.symlink_metadata().map_err(io)?;
        regular(&expected)?;
        let file = self.open_resolved(inside, &resolved)?;
        let metadata = file.metadata().map_err(io)?;
        regular(&metadata)?;
        if (metadata.dev(), metadata.ino()) != (expected.dev(), expected.ino()) {
            return Err(Error::Replaced { path: resolved });
        }
        Ok(Contained {
            file,
            path: resolved,
            len: metadata.len(),
            links: metadata.nlink(),
        })
    }

    /// Opens a path without links. `inside` is `resolved`, relative to the boundary.
    fn open_resolved(&self, inside: &Path, resolved: &Path) -> Result<File, Error> {
        // A named pipe put there a moment ago must not make us wait.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let io = |path: &Path, e: Errno| Error::Io {
            path: path.to_owned(),
            source: e.into(),
        };
        #[cfg(target_os = "linux")]
        {
            let beneath =
                ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
            let root = File::open(&self.boundary).map_err(|source| Error::Io {
                path: self.boundary.clone(),
                source,
            })?;
            match rustix::fs::openat2(&root, inside, flags, Mode::empty(), beneath) {
                Ok(file) => return Ok(file.into()),
                Err(Errno::LOOP | Errno::XDEV | Errno::AGAIN) => {
                    return Err(Error::Replaced {
                        path: resolved.to_owned(),
                    });
                }
                // An old kernel, or a sandbox that does not know the call.
                Err(Errno::NOSYS | Errno::PERM | Errno::INVAL) => {}
                Err(e) => return Err(io(resolved, e)),
            }
        }
        rustix::fs::open(resolved, flags | OFlags::NOFOLLOW, Mode::empty())
            .map(File::from)
            .map_err(|e| io(resolved, e))
    }
}

/// Opens the file that a model in `root` calls `relative`. See [`Root::open`].
///
/// # Errors
/// See [`Error`].
pub fn open_beneath(root: &Path, relative: &str) -> Result<Contained, Error> {
    Root::of(root)?.open(relative)
}

/// The `models--…` folder of a Hugging Face cache, when `folder` lies in one of its `snapshots`.
fn cache_entry(folder: &Path) -> Option<&Path> {
    folder.ancestors().find(|entry| {
        let named = entry
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().starts_with(b"models--"));
        let snapshot = folder.strip_prefix(entry).is_ok_and(|rest| {
            rest.components().next() == Some(Component::Normal("snapshots".as_ref()))
                && rest.components().count() >= 2
        });
        named && snapshot
    })
}

/// Checks what can be checked without looking at the disk.
fn check_text(base: &str, location: &str) -> Result<(), Error> {
    let refuse = |found| {
        Err(Error::Text {
            location: location.chars().take(200).collect(),
            found,
        })
    };
    let drive = |s: &str| {
        s.as_bytes().get(1) == Some(&b':')
            && s.as_bytes().first().is_some_and(u8::is_ascii_alphabetic)
    };
    if location.is_empty() {
        return refuse("nothing");
    }
    if location.len() > limits::LOCATION_BYTES {
        return refuse("too long a path");
    }
    if location.contains('\0') {
        return refuse("a NUL character");
    }
    if location.chars().any(char::is_control) {
        return refuse("a control character");
    }
    // ONNX Runtime takes `*/_ORT_MEM_ADDR_/*` for an address in its own memory.
    if location.contains("_ORT_MEM_ADDR_") || location.starts_with('*') {
        return refuse("ONNX Runtime's marker of an address in memory");
    }
    if location.starts_with('/') {
        return refuse("an absolute path");
    }
    if location.contains('\\') {
        return refuse("a backslash");
    }
    if drive(location) {
        return refuse("a drive letter");
    }
    if location.contains("://") {
        return refuse("a URL");
    }
    if location.ends_with('/') {
        return refuse("a folder");
    }
    let mut depth = 0usize;
    for part in base.split('/').chain(location.split('/')) {
        match part {
            "" | "." => {}
            ".." => match depth.checked_sub(1) {
                Some(up) => depth = up,
                None => return refuse("`..` that climbs out of the model folder"),
            },
            _ => depth += 1,
        }
    }
    if depth == 0 || location.ends_with("/..") || location.ends_with("/.") {
        return refuse("a folder");
    }
    Ok(())
}

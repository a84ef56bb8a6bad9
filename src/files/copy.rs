//! One file copied, and byte ranges of a copy overwritten.
//!
//! In: a source file, symbolic links followed (a Hugging Face cache is made of them). Out: a new
//! regular file with the same bytes. Where the file system can, the blocks are shared (a reflink),
//! so that a copy costs nothing until it is patched; elsewhere the bytes are copied, a block at a
//! time.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::{Error, kind_of};

/// How the bytes came to the new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The blocks are shared with the source until one of the two is written to.
    Reflink,
    /// The bytes were copied.
    Copied,
}

/// What [`copy_file`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// The length of the file.
    pub bytes: u64,
    /// How its bytes were copied.
    pub method: Method,
}

/// Copies the regular file `source` to `dest`, which must not exist. The mode is the source's,
/// writable for its owner: a cache's blob may be read-only, and the copy is there to be patched.
///
/// The copy is not yet on the disk: [`super::StagedFolder::commit`] sees to that.
///
/// # Errors
/// [`Error::NotRegular`] for a folder, pipe or device; [`Error::Exists`], [`Error::DiskFull`],
/// [`Error::Io`]. After an error no file is left at `dest` unless it was there before.
pub fn copy_file(source: &Path, dest: &Path) -> Result<Copied, Error> {
    let copy = BegunCopy::begin(source, dest)?;
    if let Err(e) = copy.fill_around(&[]) {
        // The first error is the one to report; what remains lies in a staging folder anyway.
        let _ = std::fs::remove_file(dest);
        return Err(e);
    }
    Ok(copy.copied())
}

/// A copy that has its length, and either all its bytes (shared blocks) or none yet (zeros).
#[derive(Debug)]
pub struct BegunCopy {
    from: File,
    to: File,
    dest: PathBuf,
    copied: Copied,
}

impl BegunCopy {
    /// Begins to copy `source` to `dest`, as [`copy_file`] does.
    ///
    /// # Errors
    /// Those of [`copy_file`].
    pub fn begin(source: &Path, dest: &Path) -> Result<Self, Error> {
        let (from, metadata) = open_regular(source)?;
        let mode = (metadata.mode() & 0o777) | 0o200;
        let to = match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(dest)
        {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists {
                    path: dest.to_owned(),
                });
            }
            Err(e) => return Err(Error::io("create", dest)(e)),
        };
        let bytes = metadata.len();
        let begun = || {
            // The umask was applied at creation; the source's mode is wanted.
            to.set_permissions(Permissions::from_mode(mode))
                .map_err(Error::io("set mode of", dest))?;
            if reflink_copy::reflink_file(&from, &to).is_ok() {
                return Ok(Method::Reflink);
            }
            to.set_len(bytes).map_err(Error::io("write", dest))?;
            Ok(Method::Copied)
        };
        match begun() {
            Ok(method) => Ok(BegunCopy {
                from,
                to,
                dest: dest.to_owned(),
                copied: Copied { bytes, method },
            }),
            Err(e) => {
                let _ = std::fs::remove_file(dest);
                Err(e)
            }
        }
    }

    /// The length, and how the bytes come to the new file.
    pub fn copied(&self) -> Copied {
        self.copied
    }

    /// Copies every byte outside `holes`, ranges in ascending order that somebody else writes, maybe at
    /// this moment. Where blocks are shared, there is nothing to do.
    ///
    /// # Errors
    /// [`Error::DiskFull`], [`Error::Io`]; the source has another length now.
    pub fn fill_around(&self, holes: &[Range<u64>]) -> Result<(), Error> {
        let Copied { bytes: len, method } = self.copied;
        if method == Method::Reflink {
            return Ok(());
        }
        let mut block = vec![0; BLOCK];
        let mut at = 0;
        for hole in holes.iter().chain([&(len..len)]) {
            self.fill(at..hole.start.min(len), &mut block)?;
            at = at.max(hole.end);
        }
        let now = self.from.metadata();
        let now = now.map_err(Error::io("read", &self.dest))?.len();
        if now != len {
            let changed =
                io::Error::other(format!("{now} bytes, {len} before: the source has changed"));
            return Err(Error::io("copy", &self.dest)(changed));
        }
        Ok(())
    }

    /// Not by `copy_file_range`: on ext4 it was seen to move 2 kB a call. Nor by several threads: writers
    /// of one file wait for one another there.
    fn fill(&self, range: Range<u64>, block: &mut [u8]) -> Result<(), Error> {
        let mut at = range.start;
        while at < range.end {
            let wanted = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let wanted = wanted.min(block.len());
            let bytes = block.get_mut(..wanted).unwrap_or_default();
            self.from
                .read_exact_at(bytes, at)
                .map_err(Error::io("read the source of", &self.dest))?;
            self.to
                .write_all_at(bytes, at)
                .map_err(Error::io("write", &self.dest))?;
            at += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Bytes copied at a time: what stays in a processor's own cache.
const BLOCK: usize = 256 << 10;

/// Opens a regular file to read, never hanging on a named pipe.
pub(crate) fn open_regular(path: &Path) -> Result<(File, Metadata), Error> {
    let refuse = |metadata: &Metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(Error::NotRegular {
            path: path.to_owned(),
            found: kind_of(metadata.file_type()),
        }),
    };
    // Asked before opening, because opening a device can itself do something.
    refuse(&std::fs::metadata(path).map_err(Error::io("open", path))?)?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags(OFlags::NONBLOCK | OFlags::NOCTTY))
        .open(path)
        .map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("open", path))?;
    refuse(&metadata)?;
    Ok((file, metadata))
}

/// `O_…` flags as [`OpenOptionsExt::custom_flags`](std::os::unix::fs::OpenOptionsExt) takes them.
fn flags(flags: OFlags) -> i32 {
    flags.bits().cast_signed()
}

/// A file opened to have byte ranges overwritten. Ranges may be written from several threads; the
/// file never grows.
#[derive(Debug)]
pub struct PatchTarget {
    file: File,
    path: PathBuf,
    len: u64,
}

impl PatchTarget {
    /// Opens `path`, which must be a regular file with one name: no symbolic link, no hard links.
    ///
    /// # Errors
    /// [`Error::NotRegular`], [`Error::HardLinked`], [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let not_regular = |metadata: &Metadata| Error::NotRegular {
            path: path.to_owned(),
            found: kind_of(metadata.file_type()),
        };
        let before = std::fs::symlink_metadata(path).map_err(Error::io("open", path))?;
        if !before.is_file() {
            return Err(not_regular(&before));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags(OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY))
            .open(path)
            .map_err(Error::io("open for writing", path))?;
        let metadata = file.metadata().map_err(Error::io("open", path))?;
        if !metadata.is_file() {
            return Err(not_regular(&metadata));
        }
        if metadata.nlink() > 1 {
            return Err(Error::HardLinked {
                path: path.to_owned(),
                links: metadata.nlink(),
            });
        }
        Ok(PatchTarget {
            file,
            path: path.to_owned(),
            len: metadata.len(),
        })
    }

    /// The length of the file, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn check(&self, offset: u64, count: usize) -> Result<(), Error> {
        let count = u64::try_from(count).unwrap_or(u64::MAX);
        match offset.checked_add(count) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::PatchOutOfRange {
                path: self.path.clone(),
                len: self.len,
                offset,
                count,
            }),
        }
    }

    /// Fills `bytes` from the file at `offset`.
    ///
    /// # Errors
    /// [`Error::PatchOutOfRange`], [`Error::Io`].
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
        self.check(offset, bytes.len())?;
        self.file
            .read_exact_at(bytes, offset)
            .map_err(Error::io("read", &self.path))
    }

    /// Overwrites the bytes at `offset`.
    ///
    /// # Errors
    /// [`Error::PatchOutOfRange`], [`Error::DiskFull`] (shared blocks need room of their own once
    /// they differ), [`Error::Io`].
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.check(offset, bytes.len())?;
        self.file
            .write_all_at(bytes, offset)
            .map_err(Error::io("write", &self.path))
    }

    /// Returns once every byte is on the disk.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::DiskFull`]. The file must then be given up: a second sync would
    /// report success for pages that were lost.
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

/// Overwrites byte ranges of a file, in their order, and returns how many bytes were written.
///
/// # Errors
/// Those of [`PatchTarget`].
pub fn patch_file<B: AsRef<[u8]>>(
    path: &Path,
    patches: impl IntoIterator<Item = (u64, B)>,
) -> Result<u64, Error> {
    let target = PatchTarget::open(path)?;
    let mut written = 0;
    for (offset, bytes) in patches {
        let bytes = bytes.as_ref();
        target.write_at(offset, bytes)?;
        written += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    }
    Ok(written)
}

//! An output that is either absent or whole.
//!
//! In: a destination, and files to put there. Out: the destination, in one rename. Until then
//! everything lies in a sibling folder `.{name}.kvw-partial-{pid}-{random}` on the same file system.
//! Promises, at any moment of a crash or a power cut:
//!
//! 1. the destination is absent, or what it was before, or complete: every file and folder is
//!    synced before the rename, and the parent folder after it;
//! 2. nothing that this tool did not write is ever deleted: `--force` replaces an empty folder or
//!    one with our receipt in it;
//! 3. what a dead process left behind is removed by the next run for the same destination. Its owner
//!    holds an `flock` on it, and its name carries the owner's process number: both must be gone.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;
use std::thread::JoinHandle;

use rayon::prelude::*;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;

use super::copy::{BegunCopy, Copied, PatchTarget, copy_file};
use super::interrupt::Listed;
use super::{Error, kind_of, space};

/// The receipt that every output folder of this tool carries: what was done, to what, with what.
pub const RECEIPT: &str = "kvw.json";

/// What `kvw sign` writes into a folder: digests, statement, bill of materials, signature. It vouches for
/// the model's bytes, and is no part of them.
pub const VOUCHERS: [&str; 4] = [
    "SHA256SUMS",
    "kvw.intoto.jsonl",
    "bom.cdx.json",
    "model.sig",
];

const PARTIAL: &str = ".kvw-partial-";
const REPLACED: &str = ".kvw-replaced-";

/// A folder under construction. Dropped without [`commit`](Self::commit), it is removed.
#[derive(Debug)]
pub struct StagedFolder {
    dest: PathBuf,
    staging: tempfile::TempDir,
    listed: Listed,
    /// Holds the `flock` that tells other runs that this folder is alive.
    _lock: File,
    force: bool,
    /// Syncs that began early, so that the disk works while the next file is computed.
    syncs: Vec<JoinHandle<Result<(), Error>>>,
}

impl StagedFolder {
    /// Begins the folder `dest`, whose parent must exist.
    ///
    /// With `force`, an existing `dest` is replaced when the folder is committed, provided that
    /// it is empty or holds [`RECEIPT`].
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Foreign`], [`Error::NoParent`], [`Error::NoName`], [`Error::Io`].
    pub fn create(dest: &Path, force: bool) -> Result<Self, Error> {
        let (parent, name) = parent_and_name(dest)?;
        let dest = parent.join(&name);
        check_replaceable(&dest, force)?;
        // A folder between its creation and its lock must not look orphaned to a sibling thread.
        let _creating = CREATING.lock();
        remove_orphans(&parent, &name);
        let staging = tempfile::Builder::new()
            .prefix(&partial_prefix(&name))
            .permissions(Permissions::from_mode(0o777))
            .tempdir_in(&parent)
            .map_err(Error::io("create a folder in", &parent))?;
        let listed = Listed::temporary(staging.path());
        let lock = File::open(staging.path()).map_err(Error::io("open", staging.path()))?;
        try_lock(&lock);
        Ok(StagedFolder {
            dest,
            staging,
            listed,
            _lock: lock,
            force,
            syncs: Vec::new(),
        })
    }

    /// The destination, absolute.
    pub fn dest(&self) -> &Path {
        &self.dest
    }

    /// The folder under construction. Files put there by other means are committed as well.
    pub fn path(&self) -> &Path {
        self.staging.path()
    }

    /// Refuses to begin what the disk cannot hold.
    ///
    /// # Errors
    /// [`Error::DiskFull`] when fewer than `bytes` bytes are available.
    pub fn require_space(&self, bytes: u64) -> Result<(), Error> {
        space::require(&self.dest, bytes)
    }

    /// The path of `name` inside the folder under construction; folders in between are made.
    ///
    /// # Errors
    /// [`Error::BadName`] unless `name` is relative and free of `..`; [`Error::Io`].
    pub fn place(&self, name: &str) -> Result<PathBuf, Error> {
        let relative = Path::new(name);
        let plain = relative
            .components()
            .all(|c| matches!(c, Component::Normal(_)));
        if name.is_empty() || !plain || name.ends_with('/') || name.contains('\0') {
            return Err(Error::BadName {
                name: name.to_owned(),
            });
        }
        let path = self.path().join(relative);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        Ok(path)
    }

    /// Copies the file `source`, its links followed, to `name`.
    ///
    /// # Errors
    /// Those of [`copy_file`] and [`Self::place`].
    pub fn copy(&self, source: &Path, name: &str) -> Result<Copied, Error> {
        copy_file(source, &self.place(name)?)
    }

    /// Begins to copy the file `source`, its links followed, to `name`.
    ///
    /// # Errors
    /// Those of [`BegunCopy::begin`] and [`Self::place`].
    pub fn begin_copy(&self, source: &Path, name: &str) -> Result<BegunCopy, Error> {
        BegunCopy::begin(source, &self.place(name)?)
    }

    /// Opens the file `name`, put there before, to have byte ranges overwritten.
    ///
    /// # Errors
    /// Those of [`PatchTarget::open`] and [`Self::place`].
    pub fn patch(&self, name: &str) -> Result<PatchTarget, Error> {
        PatchTarget::open(&self.place(name)?)
    }

    /// Creates the file `name`, to be written by the caller.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Io`], and those of [`Self::place`].
    pub fn create_file(&self, name: &str) -> Result<File, Error> {
        let path = self.place(name)?;
        match File::create_new(&path) {
            Ok(file) => Ok(file),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(Error::Exists { path }),
            Err(e) => Err(Error::io("create", &path)(e)),
        }
    }

    /// Writes `bytes` to the new file `name`.
    ///
    /// # Errors
    /// Those of [`Self::create_file`], [`Error::DiskFull`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        self.create_file(name)?
            .write_all(bytes)
            .map_err(Error::io("write", &self.path().join(name)))
    }

    /// Begins to sync `name` in the background: nothing more will be written to it. Optional; what
    /// is not sealed is synced by [`commit`](Self::commit).
    ///
    /// # Errors
    /// [`Error::Io`]. A sync that fails is reported by [`commit`](Self::commit).
    pub fn seal(&mut self, name: &str) -> Result<(), Error> {
        let path = self.place(name)?;
        let file = File::open(&path).map_err(Error::io("open", &path))?;
        self.syncs.push(std::thread::spawn(move || {
            file.sync_all().map_err(Error::io("sync", &path))
        }));
        Ok(())
    }

    /// Syncs everything and renames the folder to its destination.
    ///
    /// # Errors
    /// [`Error::Exists`] when the destination came into being meanwhile, [`Error::DiskFull`],
    /// [`Error::Io`], [`Error::NotRegular`] for a link or a device in the folder. The
    /// destination is then what it was before, and the staged folder is gone; or, where only the
    /// parent's sync or the removal of the replaced folder failed, it is complete.
    pub fn commit(mut self) -> Result<(), Error> {
        for sync in self.syncs.drain(..) {
            match sync.join() {
                Ok(synced) => synced?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        sync_tree(self.staging.path())?;
        check_replaceable(&self.dest, self.force)?;
        let publish = || publish(self.staging.path(), &self.dest, self.force);
        // Where the old output now bears the staging name, that is still a temporary.
        let exchanged = self
            .listed
            .settle(publish, |done| matches!(done, Ok(false)))?;
        sync_folder(parent_of(&self.dest))?;
        if exchanged {
            // The old output now bears the staging name; should deleting it be interrupted, it
            // is an orphan like any other.
            let replaced = self.staging.path().to_owned();
            let closed = self.staging.close();
            return closed.map_err(Error::io("remove the replaced output, now", &replaced));
        }
        // The staged folder is the destination now.
        let _ = self.staging.keep();
        Ok(())
    }
}

/// One orphan hunt and creation at a time in this process.
static CREATING: Mutex<()> = Mutex::new(());

/// A file under construction, beside its destination. Dropped without [`commit`](Self::commit), it is removed.
#[derive(Debug)]
pub struct StagedFile {
    dest: PathBuf,
    parent: PathBuf,
    staging: io::BufWriter<tempfile::NamedTempFile>,
    listed: Listed,
    force: bool,
}

impl StagedFile {
    /// Begins the file `path`. With `force` an existing one is replaced when this is committed; a symbolic link is
    /// replaced, not followed.
    ///
    /// # Errors
    /// [`Error::Exists`] unless `force`, [`Error::NotRegular`] when a folder or device is there, [`Error::Io`].
    pub fn create(path: &Path, force: bool) -> Result<StagedFile, Error> {
        let (parent, name) = parent_and_name(path)?;
        let dest = parent.join(&name);
        match fs::symlink_metadata(&dest) {
            Ok(_) if !force => return Err(Error::Exists { path: dest }),
            Ok(found) if !found.is_file() && !found.is_symlink() => {
                return Err(Error::NotRegular {
                    found: kind_of(found.file_type()),
                    path: dest,
                });
            }
            _ => {}
        }
        let _creating = CREATING.lock();
        remove_orphans(&parent, &name);
        let file = tempfile::Builder::new()
            .prefix(&partial_prefix(&name))
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(&parent)
            .map_err(Error::io("create a file in", &parent))?;
        let listed = Listed::temporary(file.path());
        try_lock(file.as_file());
        Ok(StagedFile {
            dest,
            parent,
            staging: io::BufWriter::with_capacity(1 << 16, file),
            listed,
            force,
        })
    }

    /// The destination, absolute.
    pub fn path(&self) -> &Path {
        &self.dest
    }

    /// Syncs the file and renames it to its destination.
    ///
    /// # Errors
    /// [`Error::Exists`] when the destination came into being meanwhile, [`Error::DiskFull`], [`Error::Io`]. The
    /// destination is then what it was before; or, where only the parent's sync failed, it is complete.
    pub fn commit(self) -> Result<(), Error> {
        let path = self.dest;
        let file =
            (self.staging.into_inner()).map_err(|e| Error::io("write", &path)(e.into_error()))?;
        (file.as_file().sync_all()).map_err(Error::io("sync", &path))?;
        let persist = || match self.force {
            true => file.persist(&path),
            false => file.persist_noclobber(&path),
        };
        match self.listed.settle(persist, Result::is_ok) {
            Ok(_) => sync_folder(&self.parent),
            Err(e) if e.error.kind() == io::ErrorKind::AlreadyExists => Err(Error::Exists { path }),
            Err(e) => Err(Error::io("rename a file to", &path)(e.error)),
        }
    }
}

impl Write for StagedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.staging.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.staging.flush()
    }
}

/// Writes the file `path` as a whole or not at all: `write` fills a [`StagedFile`], which is then committed.
///
/// # Errors
/// Those of [`StagedFile`], and what `write` reports.
pub fn write_atomic(
    path: &Path,
    force: bool,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let mut file = StagedFile::create(path, force)?;
    write(&mut file).map_err(Error::io("write", &file.dest))?;
    file.commit()
}

/// The canonical parent and the last component of an output's path.
fn parent_and_name(path: &Path) -> Result<(PathBuf, OsString), Error> {
    let Some(name) = path.file_name() else {
        return Err(Error::NoName {
            path: path.to_owned(),
        });
    };
    let parent = parent_of(path);
    match parent.canonicalize() {
        Ok(parent) => Ok((parent, name.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::NoParent {
            parent: parent.to_owned(),
        }),
        Err(e) => Err(Error::io("open", parent)(e)),
    }
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn check_replaceable(dest: &Path, force: bool) -> Result<(), Error> {
    let found = match fs::symlink_metadata(dest) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("open", dest)(e)),
    };
    if !force {
        return Err(Error::Exists {
            path: dest.to_owned(),
        });
    }
    let foreign = |found| {
        Err(Error::Foreign {
            path: dest.to_owned(),
            found,
        })
    };
    if !found.is_dir() {
        return foreign(kind_of(found));
    }
    let receipt = fs::symlink_metadata(dest.join(RECEIPT)).is_ok_and(|m| m.is_file());
    let mut entries = fs::read_dir(dest).map_err(Error::io("list", dest))?;
    match receipt || entries.next().is_none() {
        true => Ok(()),
        false => foreign("a folder without that receipt"),
    }
}

/// Renames `staged` to `dest`. True: `dest` existed, and now bears the name of `staged`.
fn publish(staged: &Path, dest: &Path, force: bool) -> Result<bool, Error> {
    let exists = || Error::Exists {
        path: dest.to_owned(),
    };
    let failed = |e: Errno| Error::io("rename the finished folder to", dest)(e.into());
    match rustix::fs::renameat_with(CWD, staged, CWD, dest, RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(false),
        Err(Errno::EXIST) if force => {}
        Err(Errno::EXIST) => return Err(exists()),
        Err(e) if unsupported(e) => return publish_plainly(staged, dest, force),
        Err(e) => return Err(failed(e)),
    }
    match rustix::fs::renameat_with(CWD, staged, CWD, dest, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(e) if unsupported(e) => publish_plainly(staged, dest, force),
        Err(e) => Err(failed(e)),
    }
}

/// For file systems without `RENAME_NOREPLACE` and `RENAME_EXCHANGE`. A plain rename never
/// replaces a folder that holds files; the old output is moved aside under a name that no
/// orphan hunt deletes, so that a crash in between leaves it to be found.
fn publish_plainly(staged: &Path, dest: &Path, force: bool) -> Result<bool, Error> {
    let failed = Error::io("rename the finished folder to", dest);
    if fs::symlink_metadata(dest).is_err() {
        return fs::rename(staged, dest).map(|()| false).map_err(failed);
    }
    if !force {
        return Err(Error::Exists {
            path: dest.to_owned(),
        });
    }
    let mut aside = OsString::from(".");
    aside.push(dest.file_name().unwrap_or_default());
    aside.push(REPLACED);
    aside.push(std::process::id().to_string());
    let aside = dest.with_file_name(aside);
    fs::rename(dest, &aside).map_err(Error::io("move aside", dest))?;
    if let Err(e) = fs::rename(staged, dest) {
        // Put back what was there; the first error is the one to report.
        let _ = fs::rename(&aside, dest);
        return Err(failed(e));
    }
    sync_folder(parent_of(dest))?;
    fs::remove_dir_all(&aside).map_err(Error::io("remove", &aside))?;
    Ok(false)
}

fn unsupported(e: Errno) -> bool {
    matches!(e, Errno::INVAL | Errno::NOSYS | Errno::NOTSUP)
}

/// Syncs every file and folder below `folder`, and `folder` itself.
fn sync_tree(folder: &Path) -> Result<(), Error> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    let mut next = 0;
    while let Some(folder) = folders.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let entry = entry.map_err(Error::io("list", &folder))?;
            let kind = entry.file_type().map_err(Error::io("list", &folder))?;
            match kind {
                k if k.is_dir() => folders.push(entry.path()),
                k if k.is_file() => files.push(entry.path()),
                k => {
                    return Err(Error::NotRegular {
                        path: entry.path(),
                        found: kind_of(k),
                    });
                }
            }
        }
    }
    files.par_iter().try_for_each(|path| {
        let file = File::open(path).map_err(Error::io("open", path))?;
        file.sync_all().map_err(Error::io("sync", path))
    })?;
    // Deepest first, so that a folder is synced after what it names.
    folders
        .iter()
        .rev()
        .try_for_each(|folder| sync_folder(folder))
}

pub(super) fn sync_folder(folder: &Path) -> Result<(), Error> {
    let opened = File::open(folder).map_err(Error::io("open", folder))?;
    match opened.sync_all() {
        // Some file systems have nothing to sync for a folder, and say so this way.
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        synced => synced.map_err(Error::io("sync", folder)),
    }
}

fn partial_prefix(name: &OsStr) -> OsString {
    let mut prefix = partial_stem(name);
    prefix.push(format!("{}-", std::process::id()));
    prefix
}

fn partial_stem(name: &OsStr) -> OsString {
    let mut stem = OsString::from(".");
    stem.push(name);
    stem.push(PARTIAL);
    stem
}

/// Best effort: on a file system without locks nothing is locked, and so nothing is ever hunted.
fn try_lock(file: &File) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// Removes what dead processes left of earlier attempts at `name`. Whatever cannot be removed
/// stays: it is not in the way.
pub(super) fn remove_orphans(parent: &Path, name: &OsStr) {
    let stem = partial_stem(name);
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let Some(rest) = file_name
            .as_encoded_bytes()
            .strip_prefix(stem.as_encoded_bytes())
        else {
            continue;
        };
        let Some(pid) = std::str::from_utf8(rest)
            .ok()
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(pid, _)| pid.parse().ok())
            .and_then(rustix::process::Pid::from_raw)
        else {
            continue;
        };
        // In a container every run may have the same number, so one's own says nothing: the
        // lock decides. A number that is somebody else's is left alone.
        let own = pid == rustix::process::getpid();
        let alive = rustix::process::test_kill_process(pid) != Err(Errno::SRCH);
        let kind = entry.file_type();
        let plain = kind.as_ref().is_ok_and(|k| k.is_dir() || k.is_file());
        if (alive && !own) || !plain {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else {
            continue;
        };
        if !try_lock(&file) {
            continue;
        }
        let path = entry.path();
        let removed = match kind.is_ok_and(|k| k.is_dir()) {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        match removed {
            Ok(()) => tracing::info!(path = %path.display(), "removed what a dead run left behind"),
            Err(e) => tracing::warn!(path = %path.display(), "cannot remove a leftover: {e}"),
        }
    }
}

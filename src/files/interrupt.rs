//! What an interrupted run takes away with it, and what it must say.
//!
//! In: the temporary folders and files of this process, each for as long as it is one, and the folders in which
//! a patch is half done. Out: on SIGINT, SIGTERM or SIGHUP every temporary is removed, then the caller's closure
//! is told which patches wait to be resumed, and ends the process.
//!
//! Promises: what was renamed to its place is never taken for a temporary; a rename that is under way is waited for.
//! A process that is killed outright runs none of this: what it leaves is removed by the next run for the same
//! destination ([`new_folder`](super::new_folder)).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// What an interrupt meets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Removed.
    Temporary,
    /// Named: its journal brings it to its end.
    Pending,
}

static MET: Mutex<Vec<(PathBuf, Kind)>> = Mutex::new(Vec::new());

fn met() -> MutexGuard<'static, Vec<(PathBuf, Kind)>> {
    // A panic elsewhere leaves a list that is as good as before.
    MET.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a path on the list for as long as it lives.
#[derive(Debug)]
pub(crate) struct Listed {
    path: PathBuf,
    kind: Kind,
}

impl Listed {
    /// A file or folder that is worth nothing when this process ends early.
    pub(crate) fn temporary(path: &Path) -> Listed {
        Listed::of(path, Kind::Temporary)
    }

    /// A folder in which a patch is under way.
    pub(crate) fn pending(folder: &Path) -> Listed {
        Listed::of(folder, Kind::Pending)
    }

    fn of(path: &Path, kind: Kind) -> Listed {
        let path = path.to_owned();
        met().push((path.clone(), kind.clone()));
        Listed { path, kind }
    }

    /// Does what makes a temporary more than that (a rename), and takes it off the list where `settled` says that
    /// it did. No interrupt comes in between.
    pub(crate) fn settle<T>(&self, settling: impl FnOnce() -> T, settled: fn(&T) -> bool) -> T {
        let mut met = met();
        let done = settling();
        if settled(&done) {
            remove(&mut met, self);
        }
        done
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        remove(&mut met(), self);
    }
}

fn remove(met: &mut Vec<(PathBuf, Kind)>, listed: &Listed) {
    let found = met
        .iter()
        .position(|(path, kind)| (path, kind) == (&listed.path, &listed.kind));
    if let Some(found) = found {
        met.swap_remove(found);
    }
}

/// How a run was interrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interrupted {
    /// The signal's number: 2 for Ctrl-C, 15 for SIGTERM, 1 for a terminal that was closed.
    pub signal: i32,
    /// Folders whose patch is half done, and is resumed by the next run that writes there.
    pub pending: Vec<PathBuf>,
}

/// From now on an interrupt removes this process's temporaries and then calls `end`, which ends the process. A signal that
/// whoever started this process had it ignore (`nohup`, a job in the background) stays ignored.
///
/// # Errors
/// The signals cannot be had.
pub fn listen(end: impl Fn(Interrupted) + Send + 'static) -> io::Result<()> {
    let ignored = ignored();
    let heard = [SIGINT, SIGTERM, SIGHUP].into_iter();
    let mut signals = Signals::new(heard.filter(|signal| ignored >> (signal - 1) & 1 == 0))?;
    let wait = move || {
        for signal in signals.forever() {
            // Held to the end, so that nothing is renamed or begun any more.
            let met = met();
            let mut pending = Vec::new();
            for (path, kind) in met.iter() {
                match kind {
                    Kind::Temporary => take_away(path),
                    Kind::Pending => pending.push(path.clone()),
                }
            }
            end(Interrupted { signal, pending });
        }
    };
    std::thread::Builder::new()
        .name("interrupts".to_owned())
        .spawn(wait)
        .map(|_| ())
}

/// The signals that this process ignores, a bit each, as Linux tells; elsewhere none.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

/// Other threads may still be putting files there: again until it is gone.
fn take_away(path: &Path) {
    for _ in 0..50 {
        let gone = match path.symlink_metadata() {
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
            Ok(_) => std::fs::remove_file(path),
            Err(_) => return,
        };
        if gone.is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_or_dropped_is_on_the_list_no_more() {
        let on = |path: &str| met().iter().any(|(p, _)| p == Path::new(path));
        let kept = Listed::temporary(Path::new("interrupt-test-kept"));
        let failed = kept.settle(|| Err::<(), ()>(()), Result::is_ok);
        assert!(failed.is_err() && on("interrupt-test-kept"));
        assert!(kept.settle(|| Ok::<(), ()>(()), Result::is_ok).is_ok());
        assert!(!on("interrupt-test-kept"));
        let pending = Listed::pending(Path::new("interrupt-test-pending"));
        assert!(on("interrupt-test-pending"));
        drop(pending);
        assert!(!on("interrupt-test-pending"));
    }
}

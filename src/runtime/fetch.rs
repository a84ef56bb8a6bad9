//! Fetches ONNX Runtime's library with the machine's own `pip`, once.
//!
//! In: which package, and this tool's cache folder. Out: the path of the library in the cache. `pip`
//! is used because it already knows the machine's mirrors, proxies and certificates. The wheel
//! is pinned by version and sha256 per platform, so what arrives is what was tested, wherever it
//! came from. Two processes may fetch at once: the first to finish wins, the other uses its result.
//!
//! The wheel's Python version does not matter: nothing of it runs in Python.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::files::{self, RECEIPT, Sha256, StagedFolder};

use super::locate::{library_in, on_path, run_with_timeout};

/// Which build of ONNX Runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Package {
    /// `onnxruntime`.
    Cpu,
    /// `onnxruntime-gpu`: CUDA 13 and cuDNN 9, which it does not bring along.
    Gpu,
}

/// A wheel, pinned.
#[derive(Debug)]
pub struct Pin {
    /// The name on the package index.
    pub name: &'static str,
    /// The version.
    pub version: &'static str,
    /// The platform, as the cache's folder calls it.
    pub platform: &'static str,
    /// The platform, as `pip --platform` calls it.
    tags: &'static [&'static str],
    /// The digest of the wheel.
    sha256: &'static str,
    /// The size of the download, in bytes.
    pub bytes: u64,
    /// What it takes unpacked, in bytes.
    unpacked: u64,
}

/// Digests of the wheels as the package index served them in November 2026 (Python tag cp312).
const PINS: &[(Package, &str, &str, Pin)] = &[
    (
        Package::Cpu,
        "linux",
        "x86_64",
        Pin {
            name: "onnxruntime",
            version: "1.32.0",
            platform: "linux-x86_64",
            tags: &["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"],
            sha256: "99e1074c4b2197accd5073052a465361be17b89c093b8ffb6e6bd8f986c52df8",
            bytes: 27_780_211,
            unpacked: 34_839_312,
        },
    ),
    (
        Package::Cpu,
        "linux",
        "aarch64",
        Pin {
            name: "onnxruntime",
            version: "1.32.0",
            platform: "linux-aarch64",
            tags: &["manylinux_2_28_aarch64", "manylinux_2_27_aarch64"],
            sha256: "e36c187006e7a7c8b8d6d57f1a209dd63f52430dca6c282b177718ad6b841054",
            bytes: 23_196_724,
            unpacked: 27_364_728,
        },
    ),
    (
        Package::Cpu,
        "macos",
        "aarch64",
        Pin {
            name: "onnxruntime",
            version: "1.32.0",
            platform: "macos-aarch64",
            tags: &["macosx_14_0_arm64"],
            sha256: "d52510bbbcc880c13b826f7d75cdf33ac5cf0bb864d960000fc29ce73f0cb83e",
            bytes: 22_519_308,
            unpacked: 35_272_344,
        },
    ),
    (
        Package::Gpu,
        "linux",
        "x86_64",
        Pin {
            name: "onnxruntime-gpu",
            version: "1.31.1",
            platform: "linux-x86_64-cuda13",
            tags: &["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"],
            sha256: "05d548956197b9d01f59b625de740e0d6be3593f874e241a12dc0362650ecdf7",
            bytes: 255_569_273,
            unpacked: 313_451_216,
        },
    ),
];

/// Why nothing was fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No wheel is pinned for this machine.
    #[error("no ONNX Runtime wheel is pinned for {package:?} on {os}-{arch}")]
    NoPin {
        /// The package asked for.
        package: Package,
        /// The operating system.
        os: &'static str,
        /// The processor.
        arch: &'static str,
    },
    /// Neither `KVW_CACHE_DIR` nor `XDG_CACHE_HOME` nor `HOME` is set.
    #[error("cannot name a cache folder: KVW_CACHE_DIR, XDG_CACHE_HOME and HOME are all unset")]
    NoCacheDir,
    /// No working `pip`.
    #[error("no working pip; tried: {}", tried.join(", "))]
    NoPip {
        /// The commands that were tried.
        tried: Vec<String>,
    },
    /// `pip` ran, and failed.
    #[error("`{command}` failed: {said}")]
    Pip {
        /// The command.
        command: String,
        /// The end of what it said.
        said: String,
    },
    /// `pip` brought something else than one wheel.
    #[error("expected one wheel of {name} {version}, found {found} files")]
    NotOneWheel {
        /// The package.
        name: &'static str,
        /// The version.
        version: &'static str,
        /// How many files there are.
        found: usize,
    },
    /// The wheel is not the pinned one.
    #[error("`{}` has sha256 {found}, expected {expected}", wheel.display())]
    Digest {
        /// The wheel.
        wheel: PathBuf,
        /// The pinned digest.
        expected: &'static str,
        /// The digest of what arrived.
        found: Sha256,
    },
    /// The wheel cannot be unpacked.
    #[error("cannot unpack `{}`", wheel.display())]
    Unpack {
        /// The wheel.
        wheel: PathBuf,
        /// Why.
        source: zip::result::ZipError,
    },
    /// The wheel does not hold the library.
    #[error("`{}` holds no libonnxruntime", wheel.display())]
    NoLibrary {
        /// The wheel.
        wheel: PathBuf,
    },
    /// The cache cannot be written.
    #[error("cannot use the cache `{}`", cache.display())]
    Cache {
        /// The cache's folder.
        cache: PathBuf,
        /// Why.
        source: files::Error,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NoPip { .. } => {
                Some("install pip (python3 -m ensurepip, or apt install python3-pip)".to_owned())
            }
            Error::Pip { .. } => Some(
                "check that pip can reach its package index (pip config list, proxies)".to_owned(),
            ),
            Error::Digest { .. } => Some(
                "the package index served another file than the one tested: do not use it"
                    .to_owned(),
            ),
            Error::NoCacheDir => Some("set KVW_CACHE_DIR to a folder".to_owned()),
            Error::Cache { source, .. } => source
                .hint()
                .or_else(|| Some("set KVW_CACHE_DIR to another folder".to_owned())),
            _ => None,
        }
    }
}

/// This tool's cache: `KVW_CACHE_DIR`, else `XDG_CACHE_HOME/kvw`, else `~/.cache/kvw`. Not created.
///
/// # Errors
/// [`Error::NoCacheDir`].
pub fn cache_dir() -> Result<PathBuf, Error> {
    let var = |name| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    var("KVW_CACHE_DIR")
        .or_else(|| {
            var("XDG_CACHE_HOME")
                .filter(|p| p.is_absolute())
                .map(|p| p.join("kvw"))
        })
        .or_else(|| var("HOME").map(|home| home.join(".cache/kvw")))
        .ok_or(Error::NoCacheDir)
}

/// The wheel for this machine.
///
/// # Errors
/// [`Error::NoPin`].
pub fn pin(package: Package) -> Result<&'static Pin, Error> {
    let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
    // The wheels are built against glibc; they do not load into a musl process.
    let loads = os != "linux" || cfg!(target_env = "gnu");
    PINS.iter()
        .find(|(p, o, a, _)| loads && *p == package && *o == os && *a == arch)
        .map(|(_, _, _, pin)| pin)
        .ok_or(Error::NoPin { package, os, arch })
}

/// The library in the cache, if it was fetched before.
pub fn cached(package: Package, cache: &Path) -> Option<PathBuf> {
    let folder = folder(pin(package).ok()?, cache);
    // The receipt is written last; a folder without it was put there by somebody else.
    folder
        .join(RECEIPT)
        .is_file()
        .then(|| library_in(&folder))
        .flatten()
}

fn folder(pin: &Pin, cache: &Path) -> PathBuf {
    cache.join("ort").join(pin.version).join(pin.platform)
}

/// Fetches the package into the cache, unless it is there, and returns the library's path.
///
/// `pythons` are interpreters whose `pip` may be used, in this order; then `pip3` and `pip` on
/// `PATH`. `say` hears what is fetched before it is.
///
/// # Errors
/// See [`Error`]. Nothing half fetched is left in the cache.
pub fn install(
    package: Package,
    cache: &Path,
    pythons: &[PathBuf],
    say: &dyn Fn(&str),
) -> Result<PathBuf, Error> {
    let pin = pin(package)?;
    if let Some(library) = cached(package, cache) {
        return Ok(library);
    }
    let pip = find_pip(pythons)?;
    let in_cache = |source| Error::Cache {
        cache: cache.to_owned(),
        source,
    };
    let dest = folder(pin, cache);
    if let Some(parent) = dest.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|e| in_cache(files::Error::io("create", parent)(e)))?;
    }
    // Forced: a folder with our receipt but without the library is a broken one, to be replaced.
    let staged = StagedFolder::create(&dest, true).map_err(in_cache)?;
    staged
        .require_space(pin.bytes + pin.unpacked)
        .map_err(in_cache)?;
    say(&format!(
        "fetching {} {} ({} MB) with `{}` into {}",
        pin.name,
        pin.version,
        pin.bytes.div_ceil(1_000_000),
        pip.join(" "),
        dest.display()
    ));
    let wheel = download(pin, &pip, &staged).map_err(|e| e.into_error(in_cache))?;
    let found = Sha256::of_file(&wheel).map_err(in_cache)?;
    if found.to_string() != pin.sha256 {
        return Err(Error::Digest {
            wheel,
            expected: pin.sha256,
            found,
        });
    }
    unpack(&wheel, &staged).map_err(|e| e.into_error(in_cache))?;
    let downloads = staged.path().join(DOWNLOADS);
    std::fs::remove_dir_all(&downloads)
        .map_err(|e| in_cache(files::Error::io("remove", &downloads)(e)))?;
    let receipt = serde_json::json!({
        "package": pin.name, "version": pin.version, "platform": pin.platform,
        "wheel_sha256": pin.sha256,
    });
    staged
        .write(RECEIPT, format!("{receipt:#}\n").as_bytes())
        .map_err(in_cache)?;
    // Somebody else may have been faster; what they installed has the same digest.
    if let Some(library) = cached(package, cache) {
        return Ok(library);
    }
    match staged.commit() {
        Ok(()) | Err(files::Error::Exists { .. }) => {}
        Err(e) => return Err(in_cache(e)),
    }
    cached(package, cache).ok_or(Error::NoLibrary { wheel })
}

/// Inside the staged folder, so that an interrupted download is cleaned up with it.
const DOWNLOADS: &str = "download";

/// An error on the way, before it is known which cache it belongs to.
enum Failed {
    Known(Error),
    Files(files::Error),
}

impl Failed {
    fn into_error(self, in_cache: impl Fn(files::Error) -> Error) -> Error {
        match self {
            Failed::Known(error) => error,
            Failed::Files(source) => in_cache(source),
        }
    }
}

impl From<files::Error> for Failed {
    fn from(error: files::Error) -> Self {
        Failed::Files(error)
    }
}

/// The first `pip` that answers, as the words of its command.
///
/// # Errors
/// [`Error::NoPip`], with everything that was tried.
pub fn find_pip(pythons: &[PathBuf]) -> Result<Vec<String>, Error> {
    let modules = pythons.iter().filter_map(|python| {
        Some(vec![
            python.to_str()?.to_owned(),
            "-m".to_owned(),
            "pip".to_owned(),
        ])
    });
    let programs = ["pip3", "pip"]
        .iter()
        .filter_map(|name| on_path(name).and_then(|path| Some(vec![path.to_str()?.to_owned()])));
    let mut tried = Vec::new();
    for words in modules.chain(programs) {
        let answers = command(&words).is_some_and(|mut command| {
            // The root folder holds no `pip` of somebody else's that Python would prefer.
            let version = command.arg("--version").current_dir("/");
            run_with_timeout(version, Duration::from_secs(30)).is_some()
        });
        if answers {
            return Ok(words);
        }
        tried.push(words.join(" "));
    }
    if tried.is_empty() {
        tried.push("python3, pip3 and pip (none is on PATH)".to_owned());
    }
    Err(Error::NoPip { tried })
}

fn command(words: &[String]) -> Option<Command> {
    let (program, arguments) = words.split_first()?;
    let mut command = Command::new(program);
    command.args(arguments);
    Some(command)
}

fn download(pin: &Pin, pip: &[String], staged: &StagedFolder) -> Result<PathBuf, Failed> {
    let downloads = staged.path().join(DOWNLOADS);
    std::fs::create_dir(&downloads).map_err(files::Error::io("create", &downloads))?;
    let requirement = format!("{}=={}", pin.name, pin.version);
    let failed = |said: String| {
        let command = format!("{} download {requirement}", pip.join(" "));
        Failed::Known(Error::Pip { command, said })
    };
    let mut command = command(pip).ok_or_else(|| failed("no command".to_owned()))?;
    command.args([
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
    ]);
    command.args(["--only-binary=:all:", "--python-version", "3.12"]);
    command.args(["--implementation", "cp", "--abi", "cp312"]);
    for tag in pin.tags {
        command.args(["--platform", tag]);
    }
    command.arg("--dest").arg(&downloads).arg(&requirement);
    let output = command
        .current_dir(&downloads)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
        return Err(failed(
            lines
                .get(lines.len().saturating_sub(3)..)
                .unwrap_or_default()
                .join(" / "),
        ));
    }
    let entries = std::fs::read_dir(&downloads).map_err(files::Error::io("list", &downloads))?;
    let mut wheels: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    match (wheels.pop(), wheels.is_empty()) {
        (Some(wheel), true) => Ok(wheel),
        (wheel, _) => Err(Failed::Known(Error::NotOneWheel {
            name: pin.name,
            version: pin.version,
            found: wheels.len() + usize::from(wheel.is_some()),
        })),
    }
}

/// Unpacks the libraries of a wheel whose digest was checked.
fn unpack(wheel: &Path, staged: &StagedFolder) -> Result<(), Failed> {
    let failed = |source| {
        Failed::Known(Error::Unpack {
            wheel: wheel.to_owned(),
            source,
        })
    };
    let file = File::open(wheel).map_err(files::Error::io("open", wheel))?;
    let mut archive = zip::ZipArchive::new(file).map_err(failed)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(failed)?;
        let whole = entry.name().map_err(failed)?.into_owned();
        let Some(name) = whole.strip_prefix("onnxruntime/capi/") else {
            continue;
        };
        // The core, what the providers share, and CUDA; TensorRT is of no use here.
        let wanted = name.starts_with("libonnxruntime.")
            || name == "libonnxruntime_providers_shared.so"
            || name == "libonnxruntime_providers_cuda.so";
        if !wanted {
            continue;
        }
        let path = staged.path().join(name);
        let mut out = staged.create_file(name)?;
        let size = entry.size();
        let written = std::io::copy(&mut entry.by_ref().take(size), &mut out)
            .map_err(files::Error::io("write", &path))?;
        if written != size {
            return Err(failed(zip::result::ZipError::FileNotFound));
        }
    }
    match library_in(staged.path()) {
        Some(_) => Ok(()),
        None => Err(Failed::Known(Error::NoLibrary {
            wheel: wheel.to_owned(),
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pin_is_a_digest_and_no_two_share_a_folder() {
        let mut folders = std::collections::BTreeSet::new();
        for (_, _, _, pin) in PINS {
            assert!(pin.sha256.parse::<Sha256>().is_ok(), "{pin:?}");
            assert!(folders.insert(folder(pin, Path::new("c"))), "{pin:?}");
            assert!(
                pin.version
                    .parse::<super::super::locate::Version>()
                    .unwrap()
                    >= super::super::locate::OLDEST
            );
        }
    }

    #[test]
    fn without_any_pip_the_error_names_what_was_tried_and_what_to_do() {
        let error = Error::NoPip {
            tried: vec!["/usr/bin/python3 -m pip".to_owned()],
        };
        assert_eq!(
            error.to_string(),
            "no working pip; tried: /usr/bin/python3 -m pip"
        );
        assert!(error.hint().unwrap().contains("ensurepip"));
    }
}

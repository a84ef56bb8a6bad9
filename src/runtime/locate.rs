//! Finds ONNX Runtime's shared library, or has it fetched.
//!
//! In: what the user said (`--ort-lib`, `--offline`, the device) and the environment. Out: one
//! library that loads and is new enough, and how it was found. The order:
//!
//! 1. `--ort-lib`, then `ORT_DYLIB_PATH`: what the user named is used, or is an error;
//! 2. beside the executable;
//! 3. this tool's cache;
//! 4. the `onnxruntime` or `onnxruntime-gpu` package of the active Python environment;
//! 5. the system's loader;
//! 6. the pinned wheel, fetched with the machine's own `pip` ([`super::fetch`]), unless offline.
//!
//! What is found in places 2–5 and does not serve is passed over, and listed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::device::Device;
use super::{dylib, fetch};

/// The oldest ONNX Runtime that serves: the first whose CPU wheels carry the library.
pub const OLDEST: Version = Version {
    major: 1,
    minor: 19,
    patch: 0,
};

/// How long a Python interpreter may take to say where its packages are.
const PYTHON_TIMEOUT: Duration = Duration::from_secs(20);

/// A version of ONNX Runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "String")]
pub struct Version {
    /// The `1` of `1.32.0`.
    pub major: u32,
    /// The `32` of `1.32.0`, which is also the number of the C API.
    pub minor: u32,
    /// The `0` of `1.32.0`.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.to_string()
    }
}

impl FromStr for Version {
    type Err = ();

    /// Reads `1.32.0`, `1.32` and `1.32.0-rc1`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split('.').map(|part| {
            let digits = part
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(part.len());
            part.get(..digits)
                .unwrap_or_default()
                .parse::<u32>()
                .map_err(|_| ())
        });
        Ok(Version {
            major: parts.next().ok_or(())??,
            minor: parts.next().ok_or(())??,
            patch: parts.next().unwrap_or(Ok(0))?,
        })
    }
}

/// Where a library was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "how", content = "where")]
#[non_exhaustive]
pub enum Source {
    /// `--ort-lib`.
    Option,
    /// `ORT_DYLIB_PATH`.
    Variable,
    /// The folder of this executable.
    Executable,
    /// This tool's cache.
    Cache,
    /// The package of a Python environment; holds the interpreter.
    Python(PathBuf),
    /// The system's loader.
    System,
    /// Fetched just now.
    Fetched,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Option => f.write_str("--ort-lib"),
            Source::Variable => f.write_str("ORT_DYLIB_PATH"),
            Source::Executable => f.write_str("beside the executable"),
            Source::Cache => f.write_str("the cache"),
            Source::Python(python) => write!(f, "the packages of {}", python.display()),
            Source::System => f.write_str("the system's loader"),
            Source::Fetched => f.write_str("fetched with pip"),
        }
    }
}

/// A library that loads, and is new enough.
#[derive(Debug, Clone, Serialize)]
pub struct Located {
    /// The library.
    pub path: PathBuf,
    /// How it was found.
    pub source: Source,
    /// What it says its version is.
    pub version: Version,
    /// Whether its CUDA provider lies beside it. That the provider *starts* is another matter:
    /// see [`Device::apply`].
    pub cuda_provider: bool,
    /// Folders with NVIDIA's own libraries, from the `nvidia-…` packages of Python.
    pub cuda_folders: Vec<PathBuf>,
    /// Places where nothing was found, or nothing that serves, each with the reason.
    pub passed_over: Vec<String>,
}

/// Why there is no library to use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// CUDA was asked for where no NVIDIA driver is loaded: the GPU package would be of no use.
    #[error(
        "--device cuda: no NVIDIA driver is loaded (expected the device file /dev/nvidiactl, found none)"
    )]
    NoDriver,
    /// The user named a file that is not there.
    #[error("the ONNX Runtime library `{}` ({named_by}) does not exist", path.display())]
    Missing {
        /// The path as named.
        path: PathBuf,
        /// Who named it.
        named_by: Source,
    },
    /// A folder without the library in it, or something that is no file.
    #[error("expected the ONNX Runtime library at `{}` ({named_by}), found {found}", path.display())]
    NotAFile {
        /// The path as named.
        path: PathBuf,
        /// Who named it.
        named_by: Source,
        /// What is there.
        found: &'static str,
    },
    /// The dynamic loader refused the file.
    #[error("`{}` does not load as a shared library", path.display())]
    NotLoadable {
        /// The file.
        path: PathBuf,
        /// The loader's reason.
        source: libloading::Error,
    },
    /// A shared library, but another one.
    #[error("`{}` is not ONNX Runtime: it has no usable `OrtGetApiBase`", path.display())]
    NotOnnxRuntime {
        /// The file.
        path: PathBuf,
    },
    /// An ONNX Runtime before 1.19, or one whose version cannot be read.
    #[error("`{}` is ONNX Runtime {found}, expected {OLDEST} or newer", path.display())]
    TooOld {
        /// The library.
        path: PathBuf,
        /// Its version.
        found: String,
    },
    /// Nothing was found, and nothing may be fetched.
    #[error("no ONNX Runtime {OLDEST} or newer found, and fetching is off (--offline); looked at: {}", searched.join("; "))]
    Offline {
        /// Every place, with what was wrong with it.
        searched: Vec<String>,
    },
    /// Nothing was found, and fetching failed.
    #[error("no ONNX Runtime {OLDEST} or newer found, and it could not be fetched; looked at: {}", searched.join("; "))]
    NotFetched {
        /// Every place, with what was wrong with it.
        searched: Vec<String>,
        /// Why it could not be fetched.
        source: fetch::Error,
    },
    /// There is no folder for the cache.
    #[error("no folder for the cache")]
    Cache {
        /// Why.
        source: fetch::Error,
    },
    /// A process can load one ONNX Runtime.
    #[error("this process has loaded `{}`, and cannot load `{}` as well", loaded.display(), asked.display())]
    OtherLoaded {
        /// The one in use.
        loaded: PathBuf,
        /// The one asked for.
        asked: PathBuf,
    },
    /// ONNX Runtime did not start.
    #[error("ONNX Runtime at `{}` did not start: {reason}", path.display())]
    NotStarted {
        /// The library.
        path: PathBuf,
        /// Its own words.
        reason: String,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        const NAME_ONE: &str = "pip install onnxruntime, or name a library with --ort-lib or \
                                ORT_DYLIB_PATH";
        match self {
            Error::Missing {
                named_by: Source::Variable,
                ..
            } => Some("correct ORT_DYLIB_PATH, or unset it to have the library found".to_owned()),
            Error::Missing { .. } | Error::NotAFile { .. } => {
                Some("name the file itself, such as …/libonnxruntime.so.1.32.0".to_owned())
            }
            Error::NotLoadable { .. } | Error::NotOnnxRuntime { .. } => Some(format!(
                "expected a libonnxruntime for {}-{}: {NAME_ONE}",
                std::env::consts::OS,
                std::env::consts::ARCH
            )),
            Error::TooOld { .. } => Some(
                "pip install -U onnxruntime, or leave the choice of the library to kvw".to_owned(),
            ),
            Error::Offline { .. } => Some(format!("{NAME_ONE}; or run once without --offline")),
            Error::NotFetched { source, .. } => {
                let first = source
                    .hint()
                    .map(|hint| format!("{hint}; or "))
                    .unwrap_or_default();
                Some(format!("{first}{NAME_ONE}"))
            }
            Error::NoDriver => Some(
                "install NVIDIA's driver (nvidia-smi must list the device), or use --device cpu"
                    .to_owned(),
            ),
            Error::Cache { source } => source.hint(),
            _ => None,
        }
    }
}

/// Where to look. [`Options::from_env`] gives the documented order.
#[derive(Debug, Clone)]
pub struct Options {
    /// `--ort-lib`.
    pub library: Option<PathBuf>,
    /// `ORT_DYLIB_PATH`.
    pub variable: Option<PathBuf>,
    /// The folder of the executable.
    pub beside: Option<PathBuf>,
    /// This tool's cache.
    pub cache: PathBuf,
    /// Python interpreters to ask, in this order; the first that has `pip` also fetches.
    pub pythons: Vec<PathBuf>,
    /// Whether to ask the system's loader.
    pub system: bool,
    /// Never fetch.
    pub offline: bool,
    /// Pass over libraries without a CUDA provider, and fetch the GPU package.
    pub need_cuda: bool,
}

impl Options {
    /// The places that the environment names.
    ///
    /// # Errors
    /// [`Error::Cache`] when no folder for the cache can be named.
    pub fn from_env(
        library: Option<PathBuf>,
        device: Device,
        offline: bool,
    ) -> Result<Self, Error> {
        let variable = std::env::var_os("ORT_DYLIB_PATH")
            .filter(|value| !value.is_empty())
            .map(PathBuf::from);
        let cache = match fetch::cache_dir() {
            // A library that is named needs no cache.
            Err(_) if library.is_some() || variable.is_some() => PathBuf::new(),
            cache => cache.map_err(|source| Error::Cache { source })?,
        };
        Ok(Options {
            library,
            variable,
            beside: std::env::current_exe()
                .ok()
                .and_then(|exe| exe.parent().map(Path::to_owned)),
            cache,
            pythons: pythons(),
            system: true,
            offline,
            need_cuda: matches!(device, Device::Cuda(_)),
        })
    }
}

/// Finds a library, or has it fetched; `say` hears about that before it begins.
///
/// The library found is loaded into this process (to ask for its version), and stays so.
///
/// # Errors
/// See [`Error`].
pub fn locate(options: &Options, say: &dyn Fn(&str)) -> Result<Located, Error> {
    let mut search = Search {
        options,
        passed_over: Vec::new(),
        asked: None,
    };
    for (path, source) in [
        (&options.library, Source::Option),
        (&options.variable, Source::Variable),
    ] {
        if let Some(path) = path {
            return search.named(path, source);
        }
        search.passed_over.push(format!("{source}: not given"));
    }
    if let Some(found) = search.places() {
        return Ok(found);
    }
    if options.offline {
        return Err(Error::Offline {
            searched: search.passed_over,
        });
    }
    let package = if options.need_cuda {
        if !Path::new("/dev/nvidiactl").exists() && !Path::new("/dev/dxg").exists() {
            return Err(Error::NoDriver);
        }
        fetch::Package::Gpu
    } else {
        fetch::Package::Cpu
    };
    match fetch::install(package, &options.cache, &options.pythons, say) {
        Ok(library) => search.accept(&library, Source::Fetched),
        Err(source) => Err(Error::NotFetched {
            searched: search.passed_over,
            source,
        }),
    }
}

struct Search<'a> {
    options: &'a Options,
    passed_over: Vec<String>,
    asked: Option<Vec<Python>>,
}

impl Search<'_> {
    /// What the user named: used, or an error.
    fn named(&mut self, path: &Path, source: Source) -> Result<Located, Error> {
        let Ok(metadata) = std::fs::metadata(path) else {
            return Err(Error::Missing {
                path: path.to_owned(),
                named_by: source,
            });
        };
        let library = match metadata.is_dir() {
            true => library_in(path),
            false => Some(path.to_owned()),
        };
        let not_a_file = |found| Error::NotAFile {
            path: path.to_owned(),
            named_by: source.clone(),
            found,
        };
        let library = library.ok_or_else(|| not_a_file("a folder without it"))?;
        if !library.is_file() {
            return Err(not_a_file("no regular file"));
        }
        // `ort` takes a relative path for one beside the executable.
        let library = library.canonicalize().unwrap_or(library);
        self.accept(&library, source)
    }

    /// Places 2–5, in order.
    fn places(&mut self) -> Option<Located> {
        let options = self.options;
        let beside = options.beside.as_deref().and_then(library_in);
        if let Some(found) = self.consider(beside, Source::Executable) {
            return Some(found);
        }
        // The GPU's library also serves the CPU, but only who asks for it pays its start.
        let packages = match options.need_cuda {
            true => [fetch::Package::Gpu, fetch::Package::Cpu],
            false => [fetch::Package::Cpu, fetch::Package::Gpu],
        };
        for package in packages {
            let cached = fetch::cached(package, &options.cache);
            if let Some(found) = self.consider(cached, Source::Cache) {
                return Some(found);
            }
        }
        if options.pythons.is_empty() {
            self.passed_over
                .push("Python: no interpreter on PATH".to_owned());
        }
        for python in self.pythons().to_vec() {
            let library = python
                .onnxruntime
                .iter()
                .find_map(|dir| library_in(&dir.join("capi")));
            let source = Source::Python(python.executable.clone());
            if let Some(found) = self.consider(library, source) {
                return Some(found);
            }
        }
        if options.system {
            return self.system();
        }
        None
    }

    fn consider(&mut self, library: Option<PathBuf>, source: Source) -> Option<Located> {
        let Some(library) = library else {
            let nothing = format!("{source}: nothing there");
            if !self.passed_over.contains(&nothing) {
                self.passed_over.push(nothing);
            }
            return None;
        };
        if self.options.need_cuda && !has_cuda_provider(&library) {
            let path = library.display();
            self.passed_over
                .push(format!("{source}: `{path}` has no CUDA provider beside it"));
            return None;
        }
        match self.accept(&library, source.clone()) {
            Ok(found) => Some(found),
            Err(e) => {
                self.passed_over.push(format!("{source}: {e}"));
                None
            }
        }
    }

    fn system(&mut self) -> Option<Located> {
        let names: &[&str] = match cfg!(target_os = "macos") {
            true => &["libonnxruntime.dylib"],
            false => &["libonnxruntime.so.1", "libonnxruntime.so"],
        };
        let before = mapped_libraries();
        for name in names {
            if dylib::version_of(OsStr::new(name)).is_err() {
                continue;
            }
            // The loader does not say which file it took, but the kernel does.
            let path = mapped_libraries().difference(&before).next().cloned();
            let library = path.unwrap_or_else(|| PathBuf::from(name));
            if let Some(found) = self.consider(Some(library), Source::System) {
                return Some(found);
            }
        }
        self.consider(None, Source::System)
    }

    fn accept(&mut self, library: &Path, source: Source) -> Result<Located, Error> {
        let version = version_of(library)?;
        Ok(Located {
            path: library.to_owned(),
            cuda_provider: has_cuda_provider(library),
            cuda_folders: match has_cuda_provider(library) {
                true => self
                    .pythons()
                    .iter()
                    .flat_map(|p| p.nvidia_folders())
                    .collect(),
                false => Vec::new(),
            },
            source,
            version,
            passed_over: std::mem::take(&mut self.passed_over),
        })
    }

    fn pythons(&mut self) -> &[Python] {
        self.asked
            .get_or_insert_with(|| ask_pythons(&self.options.pythons))
    }
}

/// The version of the library at `path`, if it is an ONNX Runtime that serves.
///
/// # Errors
/// [`Error::NotLoadable`], [`Error::NotOnnxRuntime`], [`Error::TooOld`].
pub fn version_of(path: &Path) -> Result<Version, Error> {
    let found = dylib::version_of(path.as_os_str()).map_err(|failure| match failure {
        dylib::Failure::Open(source) => Error::NotLoadable {
            path: path.to_owned(),
            source,
        },
        dylib::Failure::NotOnnxRuntime => Error::NotOnnxRuntime {
            path: path.to_owned(),
        },
    })?;
    match found.parse::<Version>() {
        Ok(version) if version >= OLDEST => Ok(version),
        _ => Err(Error::TooOld {
            path: path.to_owned(),
            found,
        }),
    }
}

/// Loads the library for the whole process and starts ONNX Runtime. Later calls with the same library
/// return the same environment. Its telemetry is off.
///
/// # Errors
/// [`Error::OtherLoaded`], [`Error::NotStarted`].
pub fn load(located: &Located) -> Result<ort::environment::Environment, Error> {
    static LOADED: Mutex<Option<(PathBuf, ort::environment::Environment)>> = Mutex::new(None);
    let mut loaded = LOADED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some((path, environment)) = loaded.as_ref() {
        return match *path == located.path {
            true => Ok(environment.clone()),
            false => Err(Error::OtherLoaded {
                loaded: path.clone(),
                asked: located.path.clone(),
            }),
        };
    }
    let not_started = |reason: String| Error::NotStarted {
        path: located.path.clone(),
        reason,
    };
    let environment = ort::init_from(&located.path)
        .map_err(|e| not_started(e.to_string()))?
        .with_name("kvw")
        .with_telemetry(false)
        .build()
        .map_err(|e| not_started(e.to_string()))?;
    *loaded = Some((located.path.clone(), environment.clone()));
    Ok(environment)
}

/// The newest `libonnxruntime` in a folder, by the version in its name.
pub(crate) fn library_in(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?;
    let mut found: Vec<(Option<Version>, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            let rest = name.strip_prefix("libonnxruntime.")?;
            let version = match rest.strip_prefix("so") {
                Some("") => None,
                Some(version) => version.strip_prefix('.')?.parse().ok(),
                None => rest
                    .strip_suffix("dylib")?
                    .strip_suffix('.')
                    .and_then(|v| v.parse().ok()),
            };
            entry.path().is_file().then(|| (version, entry.path()))
        })
        .collect();
    found.sort();
    found.pop().map(|(_, path)| path)
}

fn has_cuda_provider(library: &Path) -> bool {
    library
        .with_file_name("libonnxruntime_providers_cuda.so")
        .is_file()
}

/// The ONNX Runtime libraries that this process has mapped, as Linux lists them.
fn mapped_libraries() -> BTreeSet<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    maps.lines()
        .filter_map(|line| line.find('/').and_then(|at| line.get(at..)))
        .map(PathBuf::from)
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            name.starts_with(b"libonnxruntime.")
        })
        .collect()
}

/// What a Python interpreter says about itself.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Python {
    /// Its own path.
    pub executable: PathBuf,
    /// The environment that it belongs to, which `python` and `python3` share.
    pub prefix: PathBuf,
    /// Its version.
    pub version: String,
    /// The folders of its `onnxruntime` package.
    pub onnxruntime: Vec<PathBuf>,
    /// The folders of its `nvidia` namespace package, in which CUDA's wheels put their libraries.
    pub nvidia: Vec<PathBuf>,
}

impl Python {
    /// `nvidia/cu13/lib`, `nvidia/cudnn/lib`, `nvidia/cublas/lib` …, those that exist.
    fn nvidia_folders(&self) -> Vec<PathBuf> {
        let mut folders: Vec<PathBuf> = self
            .nvidia
            .iter()
            .filter_map(|root| std::fs::read_dir(root).ok())
            .flat_map(|entries| entries.flatten())
            .map(|entry| entry.path().join("lib"))
            .filter(|folder| folder.is_dir())
            .collect();
        folders.sort();
        folders
    }
}

/// The interpreter of the environment that this program was installed into, the active environment's, then those
/// on `PATH`.
pub fn pythons() -> Vec<PathBuf> {
    // pip puts a wheel's programs beside the environment's interpreter.
    let own = std::env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.join("python")));
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(std::env::var_os)
        .map(|root| PathBuf::from(root).join("bin/python"));
    let mut found: Vec<PathBuf> = own
        .into_iter()
        .chain(active)
        .filter(|python| python.is_file())
        .chain(
            ["python3", "python"]
                .iter()
                .filter_map(|name| on_path(name)),
        )
        .collect();
    found.dedup();
    found
}

/// The program `name` on `PATH`.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// Asks interpreters for their packages; the first of each environment answers for it.
pub fn ask_pythons(pythons: &[PathBuf]) -> Vec<Python> {
    let mut answers: Vec<Python> = Vec::new();
    for answer in pythons.iter().filter_map(|path| ask_python(path)) {
        if !answers.iter().any(|other| other.prefix == answer.prefix) {
            answers.push(answer);
        }
    }
    answers
}

/// Asks an interpreter for its packages, without importing any of them.
pub fn ask_python(python: &Path) -> Option<Python> {
    // The first entry of the path is the current folder, which may be somebody else's model.
    const SCRIPT: &str = r#"
import sys
sys.path = [p for p in sys.path if p]
import importlib.util, json
def folders(name):
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec else []
print(json.dumps({
    "executable": sys.executable,
    "prefix": sys.prefix,
    "version": "%d.%d.%d" % sys.version_info[:3],
    "onnxruntime": folders("onnxruntime"),
    "nvidia": folders("nvidia"),
}))
"#;
    let output = run_with_timeout(Command::new(python).args(["-c", SCRIPT]), PYTHON_TIMEOUT)?;
    serde_json::from_slice(&output).ok()
}

/// The standard output of a program that succeeds in time.
pub(crate) fn run_with_timeout(command: &mut Command, limit: Duration) -> Option<Vec<u8>> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    // Read beside the wait: a program that fills the pipe would otherwise never end.
    let mut stdout = child.stdout.take()?;
    let reader = std::thread::spawn(move || {
        let mut output = Vec::new();
        std::io::Read::read_to_end(&mut stdout, &mut output).map(|_| output)
    });
    let began = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return reader.join().ok()?.ok(),
            Ok(None) if began.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            Ok(Some(_)) => return None,
            Ok(None) | Err(_) => {
                // Too slow: nothing more is expected of it.
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers_and_tolerate_suffixes() {
        let v = |text: &str| text.parse::<Version>().unwrap();
        assert!(v("1.9.0") < v("1.19.0") && v("1.19") == OLDEST && v("1.32.0-rc1") > OLDEST);
        for text in ["", "1", "one.two", "1.x"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_newest_library_of_a_folder_is_taken_and_providers_are_not_mistaken_for_it() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(library_in(dir.path()), None);
        for name in [
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.23.2",
            "libonnxruntime.so",
            "libonnxruntime_providers_shared.so",
        ] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        assert_eq!(
            library_in(dir.path()),
            Some(dir.path().join("libonnxruntime.so.1.23.2"))
        );
    }
}

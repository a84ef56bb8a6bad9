//! What this machine has, for `kvw doctor`.
//!
//! In: where to look for ONNX Runtime, and the folder that would hold an output. Out: a report of
//! checks that can be printed or serialized. A check that fails is a line in the report, never
//! an error: the report exists to explain errors.

use std::path::{Path, PathBuf};

use ort::ep::ExecutionProvider;
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use serde::Serialize;

use crate::files::{Method, available_bytes, copy_file};

use super::device::Device;
use super::fetch;
use super::locate::{self, Located, Python};

/// The version of the report's form.
const SCHEMA_VERSION: u32 = 1;

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Something will be slower, or will not be possible.
    Warn,
    /// Commands that need this will fail.
    Fail,
}

/// One thing looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// A stable kebab-case code.
    pub name: &'static str,
    /// How it went.
    pub status: Status,
    /// What was found.
    pub message: String,
    /// What the user can do about it.
    pub hint: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The version of this form.
    pub schema_version: u32,
    /// This tool's version.
    pub tool_version: &'static str,
    /// The operating system and processor, as in `linux-x86_64`.
    pub platform: String,
    /// Logical processors that this process may use.
    pub cores: usize,
    /// Total and available memory in bytes, where the system says.
    pub memory_bytes: Option<(u64, u64)>,
    /// The library in use.
    pub library: Option<Located>,
    /// How the library was built, in its own words.
    pub build: Option<String>,
    /// Execution providers that were compiled in. Whether one starts is another question.
    pub providers: Vec<&'static str>,
    /// Python interpreters found.
    pub pythons: Vec<Python>,
    /// This tool's cache.
    pub cache_dir: Option<PathBuf>,
    /// The checks, in the order in which they depend on each other.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether no check failed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.status != Status::Fail)
    }

    fn add(&mut self, name: &'static str, status: Status, message: String, hint: Option<String>) {
        self.checks.push(Check {
            name,
            status,
            message,
            hint,
        });
    }
}

/// Looks at everything. `output` is a folder that would hold an output. Nothing is fetched if
/// `options.offline`; a few bytes are written to `output` for a moment to learn whether it shares
/// blocks.
pub fn diagnose(options: &locate::Options, output: &Path, say: &dyn Fn(&str)) -> Report {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut report = Report {
        schema_version: SCHEMA_VERSION,
        tool_version: env!("CARGO_PKG_VERSION"),
        platform: format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH),
        cores,
        memory_bytes: super::memory::total().zip(super::memory::available()),
        library: None,
        build: None,
        providers: Vec::new(),
        pythons: locate::ask_pythons(&options.pythons),
        cache_dir: Some(options.cache.clone()),
        checks: Vec::new(),
    };
    check_machine(&mut report);
    check_python(&mut report, options);
    check_library(&mut report, options, say);
    check_cache(&mut report, &options.cache);
    check_output(&mut report, output);
    report
}

fn check_machine(report: &mut Report) {
    let memory = match report.memory_bytes {
        Some((total, available)) => format!(
            "{} of memory, {} available",
            gigabytes(total),
            gigabytes(available)
        ),
        None => "memory unknown".to_owned(),
    };
    let message = format!("{}, {} cores, {memory}", report.platform, report.cores);
    report.add("machine", Status::Ok, message, None);
}

fn check_python(report: &mut Report, options: &locate::Options) {
    let found: Vec<String> = report
        .pythons
        .iter()
        .map(|p| format!("{} ({})", p.executable.display(), p.version))
        .collect();
    match found.is_empty() {
        // Needed for nothing but finding and fetching the library.
        true => report.add("python", Status::Warn, "no Python found".to_owned(), None),
        false => report.add("python", Status::Ok, found.join(", "), None),
    }
    match fetch::find_pip(&options.pythons) {
        Ok(words) => report.add("pip", Status::Ok, words.join(" "), None),
        Err(e) => report.add("pip", Status::Warn, e.to_string(), e.hint()),
    }
}

fn check_library(report: &mut Report, options: &locate::Options, say: &dyn Fn(&str)) {
    let located = match locate::locate(options, say) {
        Ok(located) => located,
        Err(e) => {
            report.add("onnxruntime", Status::Fail, explain(&e), e.hint());
            return;
        }
    };
    let message = format!(
        "{} at {} ({})",
        located.version,
        located.path.display(),
        located.source
    );
    let loaded = locate::load(&located);
    report.library = Some(located.clone());
    let environment = match loaded {
        Ok(environment) => environment,
        Err(e) => {
            report.add("onnxruntime", Status::Fail, explain(&e), e.hint());
            return;
        }
    };
    report.build = Some(ort::info().to_owned());
    report.providers = compiled_in();
    match session(Session::builder(&environment), Device::Cpu, &located) {
        Ok(_) => report.add("onnxruntime", Status::Ok, message, None),
        Err((why, hint)) => {
            report.add(
                "onnxruntime",
                Status::Fail,
                format!("{message}: {why}"),
                hint,
            );
        }
    }
    match session(Session::builder(&environment), Device::Cuda(0), &located) {
        Ok(device) => report.add("cuda", Status::Ok, format!("{device} starts"), None),
        // A machine without a GPU is whole: without one, nothing is wrong.
        Err((why, hint)) => {
            let status = if options.need_cuda {
                Status::Fail
            } else {
                Status::Warn
            };
            report.add("cuda", status, why, hint);
        }
    }
}

/// Makes a session of one `Identity` node on a device, because a provider may register and still
/// not start.
fn session(
    builder: ort::Result<SessionBuilder>,
    device: Device,
    located: &Located,
) -> Result<String, (String, Option<String>)> {
    /// ONNX IR 8, opset 13: `y = Identity(x)`, both float `[1]`.
    const IDENTITY: &[u8] = b"\x08\x08:7\n\x10\n\x01x\x12\x01y\"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r";
    let builder = builder.map_err(|e| (e.message().to_owned(), None))?;
    let (mut builder, placement) = device
        .apply(builder, located)
        .map_err(|e| (e.to_string(), e.hint()))?;
    builder
        .commit_from_memory(IDENTITY)
        .map_err(|e| (e.message().to_owned(), None))?;
    Ok(placement.device)
}

/// The providers that the loaded library was built with, of those that matter here.
fn compiled_in() -> Vec<&'static str> {
    macro_rules! built_with {
        ($($provider:ident),*) => {{
            $(
                struct $provider;
                // Only asked whether it is there; never registered.
                impl ExecutionProvider for $provider {
                    const NAME: &'static str = stringify!($provider);
                    fn register(&self, _: &mut SessionBuilder) -> ort::Result<()> {
                        Err(ort::Error::new("not registered through this type"))
                    }
                }
            )*
            let mut found = Vec::new();
            $(if $provider::is_available().unwrap_or(false) { found.push($provider::NAME); })*
            found
        }};
    }
    built_with!(
        TensorrtExecutionProvider,
        CUDAExecutionProvider,
        ROCMExecutionProvider,
        MIGraphXExecutionProvider,
        OpenVINOExecutionProvider,
        QNNExecutionProvider,
        CoreMLExecutionProvider,
        XnnpackExecutionProvider,
        DnnlExecutionProvider,
        CPUExecutionProvider
    )
}

fn check_cache(report: &mut Report, cache: &Path) {
    let holds = [fetch::Package::Cpu, fetch::Package::Gpu]
        .iter()
        .filter_map(|package| fetch::cached(*package, cache))
        .count();
    let message = format!("{}, {holds} of 2 libraries in it", cache.display());
    report.add("cache", Status::Ok, message, None);
}

fn check_output(report: &mut Report, output: &Path) {
    match available_bytes(output) {
        Ok(bytes) => {
            let message = format!("{} available at {}", gigabytes(bytes), output.display());
            report.add("disk", Status::Ok, message, None);
        }
        Err(e) => report.add("disk", Status::Warn, explain(&e), e.hint()),
    }
    match shares_blocks(output) {
        Ok(true) => {
            let message = "copies share their blocks (reflink)".to_owned();
            report.add("reflink", Status::Ok, message, None);
        }
        Ok(false) => report.add(
            "reflink",
            Status::Ok,
            "copies take room and time: this file system does not share blocks".to_owned(),
            Some("btrfs, and xfs with reflink=1, do".to_owned()),
        ),
        Err(e) => report.add("reflink", Status::Warn, explain(&e), e.hint()),
    }
}

fn shares_blocks(folder: &Path) -> Result<bool, crate::files::Error> {
    let failed = crate::files::Error::io("write to", folder);
    let probe = tempfile::Builder::new()
        .prefix(".kvw-probe-")
        .tempdir_in(folder)
        .map_err(&failed)?;
    let source = probe.path().join("source");
    std::fs::write(&source, [1; 4096]).map_err(&failed)?;
    Ok(copy_file(&source, &probe.path().join("copy"))?.method == Method::Reflink)
}

fn gigabytes(bytes: u64) -> String {
    let tenths = bytes / 100_000_000;
    format!("{}.{} GB", tenths / 10, tenths % 10)
}

/// An error with its causes, on one line.
fn explain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

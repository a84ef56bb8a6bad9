//! `kvw doctor` and `kvw runtime`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::arguments::RuntimeArguments;
use super::outcome::Outcome;
use super::printer::{Printer, table};
use crate::pipeline::Error;
use crate::runtime::diagnose::{Status, diagnose};
use crate::runtime::fetch::{self, Package};
use crate::runtime::{self, Located, locate};

/// Check this machine: ONNX Runtime, providers, disk, Python
///
/// Exit code 0: the tool can run here; 1: a check failed.
#[derive(Args)]
pub(super) struct Doctor {
    /// A folder where outputs would go
    #[arg(long, default_value = ".", value_name = "FOLDER")]
    output: PathBuf,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

impl Doctor {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let options = self.runtime.locate_options()?;
        let report = diagnose(&options, &self.output, &|line| printer.note(line));
        printer.result("doctor", &report, || {
            let rows = report.checks.iter().map(|check| {
                let status = match check.status {
                    Status::Ok => "ok",
                    Status::Warn => "warn",
                    Status::Fail => "FAIL",
                };
                vec![
                    status.to_owned(),
                    check.name.to_owned(),
                    check.message.clone(),
                ]
            });
            let mut text = table(&["", "check", "found"], rows) + "\n";
            for hint in report.checks.iter().filter_map(|check| check.hint.as_ref()) {
                text += &format!("hint: {hint}\n");
            }
            text
        })?;
        Ok(if report.passed() {
            Outcome::Done
        } else {
            Outcome::Failed
        })
    }
}

/// Show which ONNX Runtime is used, or fetch one
///
/// Order: --ort-lib, ORT_DYLIB_PATH, beside the executable, this tool's cache, the active Python's
/// onnxruntime package, the system loader; if none, the pinned wheel is fetched with pip and checked
/// against its sha256.
#[derive(Args)]
pub(super) struct Runtime {
    /// Fetch this package into the cache now, whatever else is installed
    #[arg(long, value_enum, value_name = "PACKAGE")]
    install: Option<Fetch>,
    #[command(flatten)]
    runtime: RuntimeArguments,
}

#[derive(Clone, Copy, ValueEnum)]
enum Fetch {
    /// onnxruntime
    Cpu,
    /// onnxruntime-gpu
    Gpu,
}

#[derive(Serialize)]
struct Found {
    library: Located,
}

impl Runtime {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let mut options = self.runtime.locate_options()?;
        let say = |line: &str| printer.note(line);
        if let Some(package) = self.install {
            let package = match package {
                Fetch::Cpu => Package::Cpu,
                Fetch::Gpu => Package::Gpu,
            };
            let library = fetch::install(package, &options.cache, &options.pythons, &say).map_err(
                |source| anyhow::Error::new(source).context("cannot fetch ONNX Runtime"),
            )?;
            options.library = Some(library);
        }
        let library = locate::locate(&options, &say)
            .map_err(|error| Error::from(runtime::Error::from(error)))?;
        let found = Found { library };
        printer.result("runtime", &found, || {
            let library = &found.library;
            format!(
                "ONNX Runtime {} at {}",
                library.version,
                library.path.display()
            )
        })?;
        Ok(Outcome::Done)
    }
}

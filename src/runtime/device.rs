//! Where a session runs.
//!
//! In: `--device auto|cpu|cuda[:n]` and a session builder. Out: the builder with the execution
//! provider that it will really use, and a line about what happened. `cuda` is strict: it runs on CUDA
//! or fails. `auto` tries, and says why it did not.
//!
//! ONNX Runtime's own answers are of little use here: `is_available()` only says "compiled in", and a
//! provider that fails to register is logged and forgotten.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use ort::ep::{CUDA, ExecutionProvider as _};
use ort::session::builder::SessionBuilder;
use serde::Serialize;

use super::locate::Located;

/// The device that the user asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// CUDA where it starts, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index, or an error.
    Cuda(i32),
}

/// Where a session will run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// `cpu` or `cuda:0`.
    pub device: String,
    /// Why it is not another, where somebody may have expected that.
    pub note: Option<String>,
}

/// What can be wrong with a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not a device's name.
    #[error("`{found}` is not a device: expected auto, cpu, cuda or cuda:N")]
    Name {
        /// The text.
        found: String,
    },
    /// The library was built without CUDA.
    #[error("--device {device}: ONNX Runtime at `{}` was built without CUDA", library.display())]
    NotCompiledIn {
        /// The device asked for.
        device: Device,
        /// The library.
        library: PathBuf,
    },
    /// CUDA is compiled in and did not start.
    #[error("--device {device}: CUDA did not start: {reason}")]
    NotStarted {
        /// The device asked for.
        device: Device,
        /// ONNX Runtime's own words.
        reason: String,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Name { .. } => None,
            Error::NotCompiledIn { .. } => Some(
                "pip install onnxruntime-gpu, or `kvw runtime` fetches it; unset ORT_DYLIB_PATH"
                    .to_owned(),
            ),
            Error::NotStarted { .. } => Some(
                "nvidia-smi must list the device, and CUDA and cuDNN must be installed, also by \
                 pip install \"onnxruntime-gpu[cuda,cudnn]\"; or use --device cpu"
                    .to_owned(),
            ),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .filter(|index| index.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|index| index.parse().ok())
                .map(Device::Cuda)
                .ok_or_else(|| Error::Name {
                    found: text.chars().take(40).collect(),
                }),
        }
    }
}

impl Device {
    /// Gives the builder the execution provider of this device.
    ///
    /// `located` must be the library that this process has loaded. The CPU provider is always there and
    /// takes the nodes that CUDA does not.
    ///
    /// # Errors
    /// [`Error::NotCompiledIn`], [`Error::NotStarted`], for [`Device::Cuda`] only.
    pub fn apply(
        self,
        builder: SessionBuilder,
        located: &Located,
    ) -> Result<(SessionBuilder, Placement), Error> {
        let index = match self {
            Device::Cpu => {
                return Ok((
                    builder,
                    Placement {
                        device: "cpu".to_owned(),
                        note: None,
                    },
                ));
            }
            Device::Auto => 0,
            Device::Cuda(index) => index,
        };
        let (builder, error) = start_cuda(builder, self, index, located);
        match error {
            None => {
                let device = Device::Cuda(index).to_string();
                Ok((builder, Placement { device, note: None }))
            }
            Some(error) if self == Device::Auto => {
                let why = match error {
                    Error::NotStarted { reason, .. } => format!("CUDA did not start: {reason}"),
                    _ => "this ONNX Runtime was built without CUDA".to_owned(),
                };
                Ok((
                    builder,
                    Placement {
                        device: "cpu".to_owned(),
                        note: Some(why),
                    },
                ))
            }
            Some(error) => Err(error),
        }
    }
}

fn start_cuda(
    builder: SessionBuilder,
    device: Device,
    index: i32,
    located: &Located,
) -> (SessionBuilder, Option<Error>) {
    if !CUDA::is_available().unwrap_or(false) {
        let error = Error::NotCompiledIn {
            device,
            library: located.path.clone(),
        };
        return (builder, Some(error));
    }
    preload_cuda(located);
    // ONNX Runtime's own default is TF32, which rounds float32 factors to 11 bits: coefficients would differ from
    // the CPU's by a thousandth.
    let cuda = CUDA::default()
        .with_device_id(index)
        .with_tf32(false)
        .build()
        .error_on_failure();
    match builder.with_execution_providers([cuda]) {
        Ok(builder) => (builder, None),
        Err(e) => {
            let error = Error::NotStarted {
                device,
                reason: one_line(e.message()),
            };
            // Without this, a builder that failed to take CUDA would be lost; it still takes the CPU.
            (e.recover(), Some(error))
        }
    }
}

/// ONNX Runtime's messages end in line breaks, and begin with the place in its own source code.
fn one_line(message: &str) -> String {
    let message = match message.split_once("[ONNXRuntimeError] : ") {
        Some((_, said)) => said,
        None => message,
    };
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Loads NVIDIA's libraries out of Python's packages, in the order of their dependencies, so that
/// the CUDA provider finds them. Best effort: what is missing here may be installed on the
/// system, and if it is not, ONNX Runtime names it.
pub fn preload_cuda(located: &Located) {
    const STEMS: [&str; 15] = [
        "libcudart.so.",
        "libnvrtc.so.",
        "libcublasLt.so.",
        "libcublas.so.",
        "libcurand.so.",
        "libnvJitLink.so.",
        "libcufft.so.",
        "libcudnn.so.",
        "libcudnn_graph.so.",
        "libcudnn_ops.so.",
        "libcudnn_heuristic.so.",
        "libcudnn_adv.so.",
        "libcudnn_cnn.so.",
        "libcudnn_engines_precompiled.so.",
        "libcudnn_engines_runtime_compiled.so.",
    ];
    let files: Vec<PathBuf> = located
        .cuda_folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.flatten())
        .map(|entry| entry.path())
        .collect();
    for stem in STEMS {
        for file in &files {
            let name = file
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if name.starts_with(stem)
                && let Err(e) = ort::util::preload_dylib(file)
            {
                tracing::debug!(path = %file.display(), "not preloaded: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_one_line_without_the_place_in_the_source() {
        let said = "/onnxruntime_src/x.cc:20 F() [ONNXRuntimeError] : 1 : FAIL : no libcublas\n";
        assert_eq!(one_line(said), "1 : FAIL : no libcublas");
        assert_eq!(one_line(" two\nlines "), "two lines");
    }

    #[test]
    fn devices_parse_print_and_refuse_everything_else() {
        for (text, device) in [
            ("auto", Device::Auto),
            ("cpu", Device::Cpu),
            ("cuda", Device::Cuda(0)),
            ("cuda:0", Device::Cuda(0)),
            ("cuda:11", Device::Cuda(11)),
        ] {
            assert_eq!(text.parse::<Device>().unwrap(), device);
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        for text in [
            "",
            "CPU",
            "gpu",
            "cuda:",
            "cuda:-1",
            "cuda:+1",
            "cuda:x",
            "cuda:99999999999",
        ] {
            let error = text.parse::<Device>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}

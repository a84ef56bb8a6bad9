//! What can be wrong with an ONNX file.

use std::path::PathBuf;

use super::ByteSpan;

/// Why an ONNX file could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file could not be opened or mapped.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The folder that external data must stay inside could not be opened.
    #[error("cannot open the folder of {}", path.display())]
    Folder {
        /// The model file.
        path: PathBuf,
        /// Why not.
        source: crate::files::contain::Error,
    },
    /// The protobuf wire format ends early or breaks its own rules.
    #[error("{}: not a whole ONNX file: {found} at byte {offset} of {size}, in {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Byte offset of the fault.
        offset: usize,
        /// File size in bytes.
        size: usize,
        /// The innermost ONNX message that holds the fault.
        message: &'static str,
        /// What was found.
        found: String,
    },
    /// Decoding would take more memory than the limit.
    #[error("{}: decoding its graph would take more than {limit} bytes of memory (weights not counted)", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// The file is valid protobuf, but not a model.
    #[error("{}: expected an ONNX model, found {found}", path.display())]
    NotAModel {
        /// The file.
        path: PathBuf,
        /// What is missing.
        found: String,
    },
    /// A tensor contradicts itself.
    #[error("{}: tensor '{tensor}': expected {expected}, found {found}", path.display())]
    Tensor {
        /// The model file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What the format asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// An external data reference that must not be followed, or leads nowhere.
    #[error("{}: tensor '{tensor}': external data '{location}' cannot be opened", path.display())]
    External {
        /// The model file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The reference as written in the file.
        location: String,
        /// Why not.
        source: crate::files::contain::Error,
    },
    /// An external data file that is shorter than the tensors in it.
    #[error("{}: tensor '{tensor}' lies at {span} of external data '{location}', which has {size} bytes", path.display())]
    ExternalTooShort {
        /// The model file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The reference as written in the file.
        location: String,
        /// Where the tensor should be.
        span: ByteSpan,
        /// The data file's size in bytes.
        size: u64,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "check the path".into()
            }
            Error::Malformed { .. } => {
                "the file is truncated or damaged: compare its size and checksum with the original's"
                    .into()
            }
            Error::NotAModel { .. } => "pass a .onnx file, or a folder that holds some".into(),
            Error::External { source, .. } => return source.hint(),
            Error::ExternalTooShort { .. } => {
                "the data file is truncated or belongs to another model: fetch both files again"
                    .into()
            }
            _ => return None,
        })
    }
}

//! What can be wrong with a model folder.

use std::path::PathBuf;

/// Why a model folder could not be understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be reached.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// An ONNX file could not be read.
    #[error(transparent)]
    Onnx(#[from] crate::onnx::Error),
    /// No known layout.
    #[error("{}: expected {looked_for}; found {found}", path.display())]
    UnknownLayout {
        /// The path as given.
        path: PathBuf,
        /// What every layout looks for.
        looked_for: String,
        /// The ONNX files there.
        found: String,
    },
    /// A file that the model cannot run without is missing.
    #[error("{}: no '{looked_for}', which '{needed_by}' needs", folder.display())]
    MissingSibling {
        /// The model folder.
        folder: PathBuf,
        /// The pattern that was looked for.
        looked_for: String,
        /// The file that needs it.
        needed_by: String,
    },
    /// A patch in place was begun here and not finished.
    #[error("{}: a patch in place is half done here", folder.display())]
    Pending {
        /// The model folder.
        folder: PathBuf,
    },
    /// A link in the folder that leads nowhere or out of it, or a file that is no regular file.
    #[error("{}: '{relative}' is not a file of this folder", folder.display())]
    Entry {
        /// The model folder.
        folder: PathBuf,
        /// The entry's path in it.
        relative: String,
        /// What is wrong with it.
        source: crate::files::contain::Error,
    },
    /// An entry of a kind that is never copied or read.
    #[error("{}: '{relative}': expected a file or a folder, found {found}", folder.display())]
    Kind {
        /// The model folder.
        folder: PathBuf,
        /// The entry's path in it.
        relative: String,
        /// What is there.
        found: &'static str,
    },
    /// More entries or deeper nesting than any model has.
    #[error("{}: expected at most {limit}, found more", folder.display())]
    TooMany {
        /// The model folder.
        folder: PathBuf,
        /// The limit, in words.
        limit: String,
    },
    /// A file that is not the JSON it should be.
    #[error("{}: not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key whose value makes no sense.
    #[error("{}: '{key}': expected {expected}, found {found}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key, with dots.
        key: String,
        /// What was expected.
        expected: &'static str,
        /// What is there, shortened.
        found: String,
    },
    /// A model of a known layout in a form that cannot be worked on.
    #[error("{}: '{key}': expected {expected}, found {found}", path.display())]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// The key, with dots.
        key: String,
        /// What can be worked on.
        expected: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// An ONNX file has more or fewer external data files than `config.json` says.
    #[error(
        "{}: {file}: expected {expected} external data files (config.json, \
         transformers.js_config.use_external_data_format), found {found}",
        folder.display()
    )]
    Chunks {
        /// The model folder.
        folder: PathBuf,
        /// The ONNX file.
        file: String,
        /// What config.json says.
        expected: u64,
        /// How many there are, counted without a gap.
        found: u64,
    },
    /// Files of two models in one folder.
    #[error("{}: {file}: expected {what} {expected}, as {by} has it, found {found}", folder.display())]
    Mixed {
        /// The model folder.
        folder: PathBuf,
        /// The file that does not fit.
        file: String,
        /// Of what.
        what: &'static str,
        /// What the others have.
        expected: u64,
        /// Where that was read.
        by: String,
        /// What this file has.
        found: u64,
    },
    /// The variant that was asked for does not exist.
    #[error("{}: no decoder of variant '{wanted}', found {}", folder.display(), available.join(", "))]
    Variant {
        /// The model folder.
        folder: PathBuf,
        /// The variant.
        wanted: String,
        /// Those that exist.
        available: Vec<String>,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Files(source) => source.hint(),
            Error::Onnx(source) => source.hint(),
            Error::UnknownLayout { .. } => {
                Some("pass the decoder's .onnx file itself to work on that file alone, or the folder below that holds the model".to_owned())
            }
            Error::MissingSibling { looked_for, .. } => {
                Some(format!("download {looked_for} of the same model too"))
            }
            Error::Entry { source, .. } => source.hint(),
            Error::Pending { folder } => Some(format!("finish it: kvw apply {} --resume", folder.display())),
            Error::Unsupported { .. } => Some(
                "build the model without that option, in the exporter's default form".to_owned(),
            ),
            Error::Chunks { file, .. } => Some(format!(
                "download every {file}_data, {file}_data_1, … of the same model, or correct the count"
            )),
            Error::Mixed { .. } => {
                Some("take all files from one export of one model".to_owned())
            }
            Error::Kind { .. } => Some("remove it from the model folder".to_owned()),
            Error::Variant { available, .. } => available
                .first()
                .map(|variant| format!("for example --variant {variant}")),
            _ => None,
        }
    }
}

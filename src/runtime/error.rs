//! What can go wrong in running a model.

use std::path::PathBuf;

/// Why a model could not be opened or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// ONNX Runtime itself could not be found or started.
    #[error(transparent)]
    Locate(#[from] super::locate::Error),
    /// The device that was asked for cannot be had.
    #[error(transparent)]
    Device(#[from] super::device::Error),
    /// ONNX Runtime refused the model.
    #[error("ONNX Runtime cannot load {}", model.display())]
    Session {
        /// The model file.
        model: PathBuf,
        /// What it said.
        source: ort::Error,
    },
    /// The model failed while it ran.
    #[error("ONNX Runtime failed to run {}", model.display())]
    Run {
        /// The model file.
        model: PathBuf,
        /// What it said.
        source: ort::Error,
    },
    /// The model's inputs or outputs are not those of its role.
    #[error("{}: expected {expected}, found {found}", model.display())]
    Interface {
        /// The model file.
        model: PathBuf,
        /// What a model of this role has.
        expected: String,
        /// What this one has.
        found: String,
    },
    /// Samples cannot be prepared for this model.
    #[error("this model's inputs cannot be made of (image, question, answer) here")]
    NoFamily {
        /// Why.
        source: std::sync::Arc<crate::preprocess::Error>,
    },
    /// A file of ready-made inputs is not one.
    #[error(transparent)]
    Feed(#[from] crate::preprocess::FeedError),
    /// A tensor that a sample brings does not fit the input of its name.
    #[error("{sample}: '{tensor}': expected {expected}, found {found}")]
    Input {
        /// The sample: a file's name, where it is one.
        sample: String,
        /// The input.
        tensor: String,
        /// What the graph takes.
        expected: String,
        /// What the sample has.
        found: String,
    },
    /// A sample has an image, and nothing in the model takes one.
    #[error(
        "{model}: expected a vision encoder beside it, because a sample has an image, found none"
    )]
    NoVision {
        /// A file of the model.
        model: String,
    },
    /// The vision encoder is measured or weakened, and a sample does without it.
    #[error(
        "{sample}: expected a picture for the vision encoder, found ready-made inputs of the decoder"
    )]
    ReadyFeatures {
        /// The sample.
        sample: String,
    },
    /// The prompts of this model cannot be computed in two parts.
    #[error(
        "{}: expected a decoder that sums the same whether a prompt is run at once or in two parts, found {found}",
        model.display()
    )]
    Divided {
        /// The model file.
        model: PathBuf,
        /// Why it cannot be, or what came out.
        found: String,
    },
    /// A picture that was not there when all were encoded.
    #[error(
        "{}: expected only the pictures that there were when the job began, found another",
        model.display()
    )]
    NewPicture {
        /// The vision encoder's file.
        model: PathBuf,
    },
    /// A prompt leaves no room for an answer.
    #[error(
        "{sample}: expected a prompt of fewer than {limit} tokens (max_length in \
         generation_config.json or genai_config.json), found {tokens}"
    )]
    LongPrompt {
        /// The sample.
        sample: String,
        /// Tokens of its prompt.
        tokens: usize,
        /// Most tokens of prompt and answer.
        limit: usize,
    },
    /// The folder of kept image features, or a file to be digested for it, cannot be used.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// A sample could not be prepared.
    #[error(transparent)]
    Preprocess(#[from] crate::preprocess::Error),
    /// The graph could not be understood or instrumented.
    #[error(transparent)]
    Graph(#[from] crate::graph::Error),
    /// A scratch file that an old ONNX Runtime needs could not be written.
    #[error("cannot write a scratch copy of the graph of {}", model.display())]
    Scratch {
        /// The model file.
        model: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Locate(source) => return source.hint(),
            Error::Device(source) => return source.hint(),
            Error::Session { source, .. } if source.message().contains("NOT_IMPLEMENTED") => {
                "this build of ONNX Runtime lacks an operator for the model's type (bfloat16 does not run on CPU): choose another --variant or --device"
                    .into()
            }
            Error::NoFamily { source } => return source.hint(),
            Error::Feed(source) => return source.hint(),
            Error::Files(source) => return source.hint(),
            Error::Input { .. } => {
                "-1 stands for a dimension that the model leaves open".into()
            }
            Error::NoVision { .. } => {
                "leave `image` out of the samples, or add the vision encoder to the model's folder"
                    .into()
            }
            Error::ReadyFeatures { .. } => {
                "ready-made inputs go with --tower language: what the vision encoder did is in them already".into()
            }
            Error::NewPicture { .. } => {
                "a picture file was changed while the job ran: start it again".into()
            }
            Error::Divided { .. } => {
                "leave out --share-prefix: what this model computes of a token depends on those after it, or on \
                 all of them together"
                    .into()
            }
            Error::LongPrompt { .. } => {
                "give the longest answer with --max-new-tokens, which does not count the prompt"
                    .into()
            }
            Error::Interface { .. } => "`kvw inspect` shows the files and their roles".into(),
            Error::Preprocess(source) => return source.hint(),
            Error::Graph(source) => return source.hint(),
            _ => return None,
        })
    }
}

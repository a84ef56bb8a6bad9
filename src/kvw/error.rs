//! What can go wrong in the method.

use crate::graph::LayerId;
use std::path::PathBuf;

/// Why coefficients or a plan could not be made, or a file of them not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model could not be run.
    #[error("cannot run the model on {samples}")]
    Forward {
        /// The samples of the batch.
        samples: String,
        /// The runtime's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A set without samples.
    #[error("the {set} set is empty")]
    Empty {
        /// `retain` or `forget`.
        set: &'static str,
    },
    /// No position predicts an answer token.
    #[error("{samples}: expected at least one answer token, found none")]
    NoAnswerToken {
        /// The samples.
        samples: String,
    },
    /// The layers that are measured were run over nothing.
    #[error("{samples}: expected a picture, found none: the vision encoder sees nothing else")]
    NoPosition {
        /// The samples.
        samples: String,
    },
    /// An activation is NaN or infinite.
    #[error(
        "{samples}: layer {layer}, neuron {neuron}: expected a finite activation, found {found}"
    )]
    NonFinite {
        /// The samples.
        samples: String,
        /// Decoder layer.
        layer: LayerId,
        /// Index in `d_ff`.
        neuron: usize,
        /// The value.
        found: f64,
    },
    /// A rule returned something that is no gate.
    #[error("layer {layer}, neuron {neuron}: expected a finite gate, found {found}")]
    BadGate {
        /// Decoder layer.
        layer: LayerId,
        /// Index in `d_ff`.
        neuron: usize,
        /// The value.
        found: f64,
    },
    /// The requested layers are not in the model.
    #[error("expected layers {requested}, found {found}")]
    NoSuchLayer {
        /// What was asked for.
        requested: String,
        /// What the model has.
        found: String,
    },
    /// The retain coefficients do not fit the model or the rule.
    #[error("the retain coefficients do not fit: expected {expected}, found {found}")]
    Coefficients {
        /// What the model or rule needs.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A file that holds some of a job's samples, and not those that are wanted.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Part {
        /// The file.
        path: PathBuf,
        /// What is wanted.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// Every gate came out as 1.
    #[error("nothing was weakened: after {steps} steps every gate of layers {layers} is 1")]
    NothingWeakened {
        /// Steps taken.
        steps: usize,
        /// Layers that were looked at.
        layers: String,
    },
    /// An option outside its range.
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// Its range.
        expected: &'static str,
        /// What was given.
        found: String,
    },
    /// No rule has this name.
    #[error("no rule is called {name}: expected one of {}", known.join(", "))]
    NoSuchRule {
        /// What was asked for.
        name: String,
        /// The rules that there are.
        known: Vec<&'static str>,
    },
    /// A rule was given parameters that are not its own.
    #[error("the rule {rule} takes {expected}, found {}", if found.is_empty() { "nothing" } else { found })]
    Parameters {
        /// The rule.
        rule: &'static str,
        /// Names of its parameters.
        expected: String,
        /// Names that were given.
        found: String,
    },
    /// A plan that does not say what it was made with.
    #[error("the plan does not say what the rule {rule} was run with: {reason}")]
    UnknownSetting {
        /// The plan's rule.
        rule: String,
        /// What is missing.
        reason: String,
    },
    /// A coefficients or plan file that is not one.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the format asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: crate::files::Error,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::NonFinite { .. } => {
                "float16 activations may overflow: collect on a float32 variant of the model".into()
            }
            Error::NothingWeakened { .. } => {
                "raise --gamma, widen --layers, and check that the forget set is not part of the retain set"
                    .into()
            }
            Error::NoPosition { .. } => {
                "leave out samples without a picture, or use --tower language or all".into()
            }
            Error::NoSuchLayer { .. } => "`kvw inspect` lists the model's layers".into(),
            Error::Coefficients { .. } => {
                "collect them again with this version, on this model".into()
            }
            Error::Empty { .. } => "check the JSONL file".into(),
            Error::Part { .. } => {
                "`kvw merge` makes one file of all the parts that `kvw collect --shard` wrote".into()
            }
            Error::Format { .. } => {
                "pass a file that `kvw collect` (coefficients) or `kvw weaken` (plan) wrote".into()
            }
            Error::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                "check the path".into()
            }
            Error::Write { source, .. } => return source.hint(),
            _ => return None,
        })
    }
}

//! What can go wrong in understanding a graph.

use std::path::PathBuf;

/// Why a graph could not be understood or instrumented.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file itself is at fault.
    #[error(transparent)]
    Onnx(#[from] crate::onnx::Error),
    /// The layers that the graph shows are not those that a caller needs.
    #[error("{}: expected {expected}, found {found}", path.display())]
    Layers {
        /// The model file.
        path: PathBuf,
        /// What was needed.
        expected: String,
        /// What the graph has.
        found: String,
    },
    /// An MLP that was found, but whose activations cannot be read here.
    #[error(
        "{}: the MLP{} at node '{node}' cannot be instrumented: {reason}",
        path.display(),
        layer.map_or(String::new(), |layer| format!(" of layer {layer}"))
    )]
    Instrument {
        /// The model file.
        path: PathBuf,
        /// Decoder layer, where a name tells it.
        layer: Option<super::LayerId>,
        /// The down projection's node.
        node: String,
        /// Why not.
        reason: String,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Onnx(source) => source.hint(),
            Error::Layers { .. } => Some("`kvw inspect` lists the MLPs that were found".into()),
            Error::Instrument { .. } => Some(
                "take a decoder file that holds its MLPs in the main graph (decoder_model.onnx)"
                    .into(),
            ),
        }
    }
}

//! What can go wrong in an edit.

use std::path::PathBuf;

use super::identity::Mismatch;
use crate::graph::LayerId;
use crate::onnx::ByteSpan;

/// Why a plan was not made, or not applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The staged folder was not accepted.
    #[error("{} was not written: the edited model was not accepted", out.display())]
    Rejected {
        /// The output.
        out: PathBuf,
        /// Why not.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The model folder is at fault.
    #[error(transparent)]
    Bundle(#[from] crate::bundle::Error),
    /// An ONNX file is at fault.
    #[error(transparent)]
    Onnx(#[from] crate::onnx::Error),
    /// Reading or writing failed.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// A gate that is no number to multiply with.
    #[error("gate of layer {layer}, neuron {neuron}: expected a finite number, found {found}")]
    Gate {
        /// Decoder layer.
        layer: LayerId,
        /// Index of the knowledge vector.
        neuron: usize,
        /// The gate.
        found: f32,
    },
    /// As many gates as the layer has neurons were expected.
    #[error("{file}: layer {layer}: expected {expected} gates (d_ff), found {found}")]
    GateCount {
        /// The decoder file.
        file: String,
        /// Decoder layer.
        layer: LayerId,
        /// `d_ff`.
        expected: u64,
        /// The number of gates.
        found: usize,
    },
    /// The layers of a file are not those of the model.
    #[error("{file}: expected {expected}, found {found}")]
    Layers {
        /// The decoder file.
        file: String,
        /// What was expected, and according to what.
        expected: String,
        /// What the graph shows.
        found: String,
    },
    /// The plan is for another model.
    #[error("{file}: not the model that the plan was made for: {mismatch}")]
    OtherModel {
        /// The decoder file.
        file: String,
        /// Where they differ.
        mismatch: Mismatch,
    },
    /// A file of coefficients or gates that does not say which model it was made for.
    #[error("{} does not say which model it was made for", path.display())]
    NoIdentity {
        /// The file.
        path: PathBuf,
        /// What is wrong with its provenance.
        source: serde_json::Error,
    },
    /// A layer that no form of edit fits.
    #[error(
        "{file}: layer {layer} cannot be edited at node '{node}' (weight '{tensor}'): {reason}"
    )]
    NotEditable {
        /// The decoder file.
        file: String,
        /// Decoder layer.
        layer: LayerId,
        /// The down projection's node.
        node: String,
        /// Its weight.
        tensor: String,
        /// Why not.
        reason: String,
    },
    /// Bytes that the plan would change belong to something else as well.
    #[error("{data}: {span} of '{tensor}' would change, but {other} lies there too")]
    Overlap {
        /// The file that holds the bytes.
        data: String,
        /// The planned range.
        span: ByteSpan,
        /// The tensor that is to change.
        tensor: String,
        /// File and name of the other tensor.
        other: String,
    },
    /// A file that is not a decoder by its name, yet holds the weights to be changed.
    #[error(
        "{file}: holds the weights of layer {layer} ('{tensor}'), but is no decoder file of this layout"
    )]
    Uncovered {
        /// The file.
        file: String,
        /// Decoder layer.
        layer: LayerId,
        /// The weight.
        tensor: String,
    },
    /// The model has no decoder file.
    #[error("{}: expected a decoder, found none", folder.display())]
    NoDecoder {
        /// The model folder.
        folder: PathBuf,
    },
    /// Every gate is 1, or so near that rounding leaves every stored value as it was.
    #[error("the plan changes no byte of {}", folder.display())]
    NothingToChange {
        /// The model folder.
        folder: PathBuf,
    },
    /// The folder was made by applying this very plan.
    #[error("{}: plan {digest} is already applied here", folder.display())]
    AlreadyApplied {
        /// The model folder.
        folder: PathBuf,
        /// The plan's digest.
        digest: String,
    },
    /// The output would lie in the input or the other way round.
    #[error("the output {} and the model folder {} lie in one another", out.display(), folder.display())]
    Nested {
        /// The output.
        out: PathBuf,
        /// The model folder.
        folder: PathBuf,
    },
    /// A gate of 0 that would leave its knowledge vector in the file.
    #[error(
        "{file}: layer {layer}: a gate of 0 would not remove its knowledge vector, in the form '{form}'"
    )]
    NotRemoved {
        /// The decoder file.
        file: String,
        /// Decoder layer.
        layer: LayerId,
        /// The form of the edit.
        form: super::EditForm,
    },
    /// A patch is of a whole model folder, or every decoder file would not be covered.
    #[error("{}: expected a model folder to change in place, found a file", path.display())]
    NotAFolder {
        /// The model.
        path: PathBuf,
    },
    /// A file whose length would change.
    #[error(
        "{file}: cannot be changed in place: its graph changes, from {before} to {after} bytes"
    )]
    GraphInPlace {
        /// The file.
        file: String,
        /// Its length in bytes.
        before: u64,
        /// The length that it would have.
        after: u64,
    },
    /// A product that the stored type cannot hold, or a stored value that is no number.
    #[error(
        "{file}: '{tensor}', element {element}: {found} times gate {gate} is not a finite {dtype}"
    )]
    NotFinite {
        /// The file that holds the bytes.
        file: String,
        /// The weight.
        tensor: String,
        /// Position in the stored tensor.
        element: u64,
        /// The stored value.
        found: f32,
        /// The gate.
        gate: f32,
        /// The element type.
        dtype: crate::onnx::DataType,
    },
    /// A file changed while it was being copied.
    #[error("{file}: expected {expected} bytes, as when the plan was made, found {found}")]
    Changed {
        /// The file.
        file: String,
        /// Its length when the folder was listed.
        expected: u64,
        /// Its length now.
        found: u64,
    },
    /// The staged copy does not hold what was planned.
    #[error("{file}: '{tensor}': the written bytes differ from the planned ones at byte {offset}")]
    Verification {
        /// The file.
        file: String,
        /// The weight.
        tensor: String,
        /// The first byte that differs, from the file's start.
        offset: u64,
    },
    /// A graph that cannot be changed where it lies.
    #[error("{file}: its graph cannot be changed: {reason}")]
    Graph {
        /// The decoder file.
        file: String,
        /// What was expected, and what was found.
        reason: String,
    },
    /// The staged file of a changed graph is not what was planned.
    #[error("{file}: the written file is not the planned one: {found}")]
    GraphVerification {
        /// The file.
        file: String,
        /// What is there instead.
        found: String,
    },
    /// A receipt that a later version wrote.
    #[error("{}: expected a receipt of schema_version {} or lower, found {found}", path.display(), super::receipt::SCHEMA_VERSION)]
    ReceiptVersion {
        /// The receipt.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Two things that cannot be compared.
    #[error("cannot compare {} with {}: one is a folder, the other a file", a.display(), b.display())]
    Incomparable {
        /// One.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::Bundle(source) => return source.hint(),
            Error::Onnx(source) => return source.hint(),
            Error::Files(source) => return source.hint(),
            Error::NotEditable { .. } => {
                "every decoder file is edited or none: `kvw inspect` lists which can be, and how. \
                 --edit mul fits most; a folder without the other variants can be edited too"
                    .to_owned()
            }
            Error::NoIdentity { .. } => {
                "pass a file that `kvw collect` or `kvw weaken` wrote".to_owned()
            }
            Error::ReceiptVersion { .. } => "use the version of kvw that wrote it".to_owned(),
            Error::OtherModel { .. } => {
                "apply the plan to the model that it was computed on, or compute one for this model"
                    .to_owned()
            }
            Error::Layers { .. } => "`kvw inspect` lists the MLPs that were found".to_owned(),
            Error::Uncovered { file, .. } => {
                format!("remove {file} from the folder, or the original weights stay in the output")
            }
            Error::NothingToChange { .. } => {
                "a larger γ, more samples or other layers give smaller gates".to_owned()
            }
            Error::AlreadyApplied { .. } => {
                "this folder is the result; apply the plan to the original model only".to_owned()
            }
            Error::NotRemoved { .. } => {
                "only columns of a float W_down are removed for good: leave out --zero-below, or keep only float files in the folder"
                    .to_owned()
            }
            Error::NotAFolder { .. } => "name the folder that holds the file".to_owned(),
            Error::GraphInPlace { .. } => {
                "write a new folder with -o; --edit columns or --edit scales changes no graph where it fits"
                    .to_owned()
            }
            Error::Nested { .. } => "choose an output beside the model folder".to_owned(),
            Error::Changed { .. } => "let nothing write to the model folder meanwhile".to_owned(),
            Error::Verification { .. } | Error::GraphVerification { .. } => {
                "the disk or the memory is at fault; nothing was published".to_owned()
            }
            _ => return None,
        })
    }
}

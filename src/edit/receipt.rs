//! `kvw.json`: what was done to a model folder.
//!
//! In: the plan and the digests that were computed while it was applied. Out: a [`Receipt`], written
//! into the output folder and read back by [`diff`](mod@super::diff). It holds no time and no
//! absolute path: the same inputs give the same bytes.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{EditForm, Error, MlpEdit};
use crate::bundle::{Tree, read_json};
use crate::files::{RECEIPT, Sha256};
use crate::graph::LayerId;
use crate::onnx::{ByteSpan, DataType};

/// The version of the receipt's format.
pub const SCHEMA_VERSION: u32 = 2;

/// What was done, to which bytes, by which plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the tool.
    pub tool: String,
    /// Version of the tool.
    pub version: String,
    /// Digest of the gates ([`EditPlan::digest`](super::EditPlan::digest)).
    pub plan_digest: Sha256,
    /// What made the plan (rule, parameters, data), as the caller tells it.
    pub plan: Value,
    /// How each MLP of each decoder file was weakened. Version 1 did not tell.
    #[serde(default)]
    pub edits: Vec<MlpEdit>,
    /// Every file that changed.
    pub files: Vec<EditedFile>,
    /// What was measured before the folder appeared, without a question, answer or name, as the
    /// caller tells it (an [`crate::eval::Record`]). Absent where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Value>,
    /// The receipt that was in the input folder: this is not the first edit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Box<Receipt>>,
}

/// One file that changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EditedFile {
    /// Path relative to the folder.
    pub path: String,
    /// Length in bytes of the written file.
    pub bytes: u64,
    /// Length of the input file, where its graph changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_before: Option<u64>,
    /// Digest of the whole input file, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256_before: Option<Sha256>,
    /// Digest of the whole output file, where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256_after: Option<Sha256>,
    /// The ranges whose values were multiplied, by offset.
    pub ranges: Vec<EditedRange>,
    /// Where the graph changed: new bytes, and what they replaced, by offset.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inserted: Vec<InsertedRange>,
    /// The changes of the graph, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub graph: Vec<String>,
}

/// New bytes in a file whose graph changed. All bytes that are neither in such a range nor in an
/// [`EditedRange`] are the input's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InsertedRange {
    /// Bytes from the start of the written file.
    pub offset: u64,
    /// Length in bytes; 0 where something was only taken out.
    pub len: u64,
    /// Bytes from the start of the input file.
    pub offset_before: u64,
    /// Length of what was replaced; 0 where nothing was.
    pub len_before: u64,
    /// Digest of the new bytes.
    pub sha256: Sha256,
}

/// One planned range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EditedRange {
    /// The tensor's name.
    pub tensor: String,
    /// Decoder layer.
    pub layer: LayerId,
    /// The form of the edit.
    pub form: EditForm,
    /// Element type.
    pub dtype: DataType,
    /// Bytes from the start of the written file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Bytes from the start of the input file, where that is another number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset_before: Option<u64>,
    /// Digest of the range before.
    pub sha256_before: Sha256,
    /// Digest of the range after.
    pub sha256_after: Sha256,
}

impl EditedRange {
    /// The range in the input file.
    pub fn span_before(&self) -> ByteSpan {
        ByteSpan {
            offset: self.offset_before.unwrap_or(self.offset),
            len: self.len,
        }
    }

    /// The range in the written file.
    pub fn span(&self) -> ByteSpan {
        ByteSpan {
            offset: self.offset,
            len: self.len,
        }
    }
}

impl Receipt {
    /// The receipt of the folder `tree`, if it has one.
    ///
    /// # Errors
    /// A file of that name that is no receipt of this tool.
    pub fn of(tree: &Tree) -> Result<Option<Receipt>, Error> {
        match tree.get(RECEIPT) {
            Some(entry) => Ok(Some(Receipt::read(&entry.path)?)),
            None => Ok(None),
        }
    }

    /// Reads a receipt.
    ///
    /// # Errors
    /// The file is too large, no receipt of this tool, or of a later version.
    pub fn read(path: &Path) -> Result<Receipt, Error> {
        let receipt: Receipt = read_json(path)?;
        match receipt.schema_version {
            0..=SCHEMA_VERSION => Ok(receipt),
            found => Err(Error::ReceiptVersion {
                path: path.to_owned(),
                found,
            }),
        }
    }

    /// The receipt as it is written to the file `path`.
    ///
    /// # Errors
    /// What the caller told of the plan is no JSON.
    pub fn to_bytes(&self, path: &Path) -> Result<Vec<u8>, Error> {
        let text = serde_json::to_vec_pretty(self);
        Ok(text.map_err(|source| crate::files::Error::io("write", path)(source.into()))?)
    }

    /// Whether this plan is among those that made the folder.
    pub fn names(&self, plan: Sha256) -> bool {
        std::iter::successors(Some(self), |receipt| receipt.previous.as_deref())
            .any(|receipt| receipt.plan_digest == plan)
    }
}

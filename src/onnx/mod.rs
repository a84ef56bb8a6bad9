//! The ONNX file format: what is in a `.onnx` file, and at which bytes.
//!
//! In: a path. Out: a [`ModelFile`], the decoded protobuf over a memory map, and for every
//! tensor its [`Storage`]: the exact byte range, in the `.onnx` file or in an external data file.
//!
//! Promises:
//! - nothing is read but the file itself and external data inside the model folder;
//! - a hostile file costs no more memory than [`Limits`] allows: the protobuf wire format is
//!   scanned, and its decoded size estimated, before anything is decoded;
//! - weights are never copied: `raw_data` is a slice of the map, so its address *is* its offset.

pub mod anatomy;
#[allow(missing_docs)]
pub mod compact;
mod dtype;
mod error;
mod external;
mod functions;
mod model;
mod span;
pub mod splice;
mod wire;

pub use compact::{List, Text};
pub use dtype::DataType;
pub use error::Error;
pub use model::{ModelFile, Storage, attribute, graphs, int_attribute, tensors};
pub use span::ByteSpan;
pub use wire::Limits;

/// The protobuf types of ONNX, generated from its own schema (IR version 14).
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod schema {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

//! The ONNX file format.

/// The protobuf types of ONNX, generated from its own schema (IR version 14).
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod schema {
    include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
}

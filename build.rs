//! Generates the ONNX protobuf types from ONNX's own schema (`src/onnx/schema/onnx-ml.proto`),
//! with a pure-Rust protobuf compiler, so that no `protoc` is needed on the building machine.

use std::io::Result;

fn main() -> Result<()> {
    const SCHEMA: &str = "src/onnx/schema/onnx-ml.proto";
    println!("cargo:rerun-if-changed={SCHEMA}");
    let descriptors =
        protox::compile([SCHEMA], ["src/onnx/schema"]).map_err(std::io::Error::other)?;
    prost_build::Config::new()
        // Weights stay slices of the memory map that the model was decoded from.
        .bytes([".onnx.TensorProto.raw_data"])
        // The schema's prose is not rustdoc: its indentation would be taken for code to test.
        .disable_comments(["."])
        // Its strings and vectors take one word each, and are counted when they are decoded.
        .prost_path("crate::onnx::compact")
        // An attribute holds at most one of these; boxed, an attribute is a third as large.
        .boxed(".onnx.AttributeProto.t")
        .boxed(".onnx.AttributeProto.g")
        .boxed(".onnx.AttributeProto.sparse_tensor")
        .boxed(".onnx.AttributeProto.tp")
        // Nobody writes it.
        .boxed(".onnx.TensorProto.segment")
        .compile_fds(descriptors)
}

//! ONNX Runtime: found or fetched, loaded once, asked for a device.

pub mod device;
pub mod diagnose;
mod dylib;
pub mod fetch;
pub mod locate;

pub use device::{Device, Placement};
pub use locate::{Located, locate};

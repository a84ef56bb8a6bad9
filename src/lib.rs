//! `kvw`: unlearning for vision-language models that are already ONNX.
//!
//! The pipeline, in the order in which a model passes through it:
//!
//! ```text
//!  model folder ──bundle──► decoder .onnx ──onnx──► initializers and their byte spans
//!                                │                           │
//!                              graph: find the MLPs,         │
//!                              tap coefficients, add gates   │
//!                                │                           │
//!  samples ──dataset──► preprocess ──► runtime: forward      │
//!                                          │                 │
//!                                         kvw: coefficients → gates → plan
//!                                                            │
//!                            edit: plan × initializers → bytes → a new folder, with a receipt
//!                                                            │
//!                                          eval: before and after, in numbers
//! ```
//!
//! Arrows run one way: `cli` → `report` → {`check`, `sweep`, `probe`, `provenance`} → `pipeline` → {`kvw`, `edit`,
//! `eval`} → {`runtime`, `bundle`, `dataset`, `preprocess`} → `graph` → `onnx` → `files`.
//!
//! The feature `runtime`, on by default, is everything that runs a model, reads a data set or reports. Without it
//! what remains is small enough for a device: a plan is read, applied, compared and verified.

pub mod bundle;
#[cfg(feature = "runtime")]
pub mod check;
pub mod cli;
#[cfg(feature = "runtime")]
pub mod confine;
#[cfg(feature = "runtime")]
pub mod dataset;
pub mod edit;
#[cfg(feature = "runtime")]
pub mod eval;
pub mod files;
pub mod graph;
pub mod kvw;
pub mod limits;
pub mod onnx;
#[cfg(feature = "runtime")]
pub mod pipeline;
#[cfg(feature = "runtime")]
pub mod preprocess;
#[cfg(feature = "runtime")]
pub mod probe;
pub mod provenance;
#[cfg(feature = "runtime")]
pub mod report;
#[cfg(feature = "runtime")]
pub mod runtime;
#[cfg(feature = "runtime")]
pub mod sweep;

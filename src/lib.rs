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

pub mod bundle;
pub mod check;
pub mod cli;
pub mod dataset;
pub mod edit;
pub mod eval;
pub mod files;
pub mod graph;
pub mod kvw;
pub mod onnx;
pub mod pipeline;
pub mod preprocess;
pub mod probe;
pub mod provenance;
pub mod report;
pub mod runtime;
pub mod sweep;

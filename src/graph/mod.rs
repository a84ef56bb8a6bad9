//! What a graph means: producers and consumers, where the MLPs are, and how to look inside them.
//!
//! In: a decoded model ([`crate::onnx::ModelFile`]). Out, in this order:
//! 1. [`Index`]: who produces and who reads each value, subgraphs included;
//! 2. [`Linear`]: matrix products with a constant weight, whatever the operator;
//! 3. [`mlp::find`]: the MLPs, by topology;
//! 4. [`Patch`]: added outputs (coefficients) and inputs (gates), as a value that is checked, printed
//!    and only then applied;
//! 5. [`session`]: the patched model as a few kilobytes that refer to the weights where they lie;
//!    [`widen`]: where those are float16 and many, converted one at a time.
//!
//! Promised: nothing here changes a file, and a graph that is not understood is left out or refused
//! by name, never guessed at.

mod branch;
mod bypass;
mod early_rows;
mod element_type;
mod encoding;
mod error;
mod index;
mod layer;
mod linear;
pub mod mlp;
mod patch;
mod rename;
pub mod session;
pub mod widen;

pub use bypass::{Bias, Rounding, Up};
pub use element_type::of_hidden as hidden_type;
pub use encoding::{
    Bnb4, Bnb4Type, Dequantizer, Encoding, IntegerScale, NBits, NoSlices, QLinear, Slices, Stored,
};
pub use error::Error;
pub use index::{Index, NodeId, Origin, ScopeId};
pub use layer::LayerId;
pub use linear::{Linear, Linears, Weight};
pub use mlp::{Gating, Hidden, Mlp, Refused, Site, Survey, Tower};
pub use patch::{
    ANSWER_MASK, Moment, Outputs, Patch, VISION_MASK, gate_name, hidden_name, positions_name,
    sum_name,
};

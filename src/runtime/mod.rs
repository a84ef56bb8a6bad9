//! ONNX Runtime: found or fetched, loaded once, asked for a device, and run.
//!
//! In: a model folder's files, samples, gates. Out: coefficient sums, logits, generated answers.
//!
//! - [`mod@locate`], [`fetch`], [`diagnose`]: which library, from where;
//! - [`device`], [`Engine`]: where and how sessions run;
//! - [`Towers`]: token embeddings and image features, an image encoded once;
//! - [`Decoder`]: the instrumented decoder, gates as inputs;
//! - [`Collector`]: the decoder as the method's [`crate::kvw::Forward`];
//! - [`generate`]: greedy answers;
//! - [`memory`]: what the machine has and the process holds.

mod collector;
mod decoder;
pub mod device;
pub mod diagnose;
mod dylib;
mod engine;
mod error;
pub mod fetch;
pub mod generate;
mod kept_features;
pub mod locate;
pub mod memory;
mod part;
mod prefetch;
mod prefix;
mod tensor;
mod towers;

use std::collections::BTreeMap;

use ndarray::{Array1, Array3};

pub use collector::{Ahead, Collector, Embed, Lvlm, Window};
pub use decoder::{Cache, Decoder, Token};
pub use device::{Device, Placement};
pub use engine::{Engine, Work};
pub use error::Error;
pub use locate::{Located, locate};
pub use towers::Towers;

use crate::graph::LayerId;
use crate::preprocess::{DecoderInput, PositionIds};

/// A sample as the decoder takes it.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// What messages call the sample.
    pub name: String,
    /// `[T]`.
    pub input_ids: Vec<i64>,
    /// Float32 `[1, T, d_model]`, image features in place; `None` where the decoder takes the ids.
    pub inputs_embeds: Option<Array3<f32>>,
    /// Position ids of the `T` tokens.
    pub position_ids: PositionIds,
    /// `[T]`: the weight of each position in the statistics.
    pub answer_mask: Vec<f32>,
    /// How many of the first tokens other samples about the same picture are likely to begin with: those up
    /// to the last image token; 0 without one.
    pub prefix: usize,
    /// Position id of the first token after these.
    pub next_position: i64,
    /// What the decoder takes besides, by name; a decoder that does not ask for one is not given it.
    pub decoder_inputs: Vec<DecoderInput>,
    /// What the vision encoder's layers were summed to on the sample's image, where they are measured and it
    /// has one.
    pub vision: BTreeMap<LayerId, VisionSum>,
}

/// A layer of the vision encoder, summed over an image's positions.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionSum {
    /// Float32 `[d_ff]`.
    pub sum: Array1<f32>,
    /// Sum of the positions' weights.
    pub weight: f64,
}

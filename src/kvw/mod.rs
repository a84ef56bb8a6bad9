//! The method: coefficients → gates → plan. Pure ndarray; no files, no runtime.
//!
//! In: a [`Forward`], which can tell the moments of the hidden activations over some samples under
//! given gates; the samples; a [`Rule`]. Out: [`Coefficients`] (over the retain set), then a
//! [`Plan`]: one cumulative gate per neuron of each weakened layer.
//!
//! ```text
//!   retain samples ──Forward──► Coefficients KC_r           (once, gates = 1)
//!   forget samples ──Forward──► KC_f ──Rule──► gates ──┐    (batch by batch)
//!                       ▲                              │
//!                       └── cumulative gates ◄─────────┘
//! ```
//!
//! Source: Knowledge Vector Weakening (Kim, Hwang, Cha, Choe 2026, arXiv 2601.21794), §3. KVW's
//! formula is one [`Rule`]; the loop, the plan, the edit and the evaluation know nothing of it.
//!
//! Promises: the same inputs give the same bytes; sums do not depend on the order of addition
//! ([`FixedSum`]); a run that saw no answer token, met a non-finite activation or changed nothing
//! fails and says so.

mod coefficients;
mod draw;
mod error;
mod file;
mod fixed;
mod forward;
mod layers;
mod plan;
mod rule;
mod rules;
mod setting;
mod shard;
mod weaken;

pub use coefficients::{Coefficients, LayerCoefficients, add_batch, collect};
pub use draw::Draws;
pub use error::Error;
pub use file::{load_coefficients, load_part, load_plan, save_coefficients, save_part, save_plan};
pub use fixed::FixedSum;
pub use forward::{Forward, Gates, Sums};
pub use layers::{LayerRange, Layers, TowerChoice};
pub use plan::{Plan, PlanSummary};
pub use rule::{KnowledgeVectorWeakening, Rule, TokenWeights};
pub use rules::{Parameters, RULES, RuleKind};
pub use setting::Setting;
pub use shard::{Part, PartFile, Shard, merge};
pub use weaken::{Options, Order, Step, weaken};

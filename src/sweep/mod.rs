//! The trade-off: what is forgotten against what is kept, over a grid of a rule's parameters and of
//! layers.
//!
//! In: a model, a forget and a retain set, a [`Grid`], an [`Objective`]. Out: a [`Sweep`]: per point
//! what its plan does and how every set was answered under it, the Pareto front, and a [`Pick`] by a
//! stated rule. No file of the model is touched: gates are inputs.
//!
//! Promises: the retain set is measured once; every finished point is kept at once, and a sweep that
//! was killed goes on where it stopped; a file of points is bound to the model, the data, the rule
//! and everything else that its numbers depend on, and is refused where one of them differs; the same
//! inputs give the same file, whatever the number of jobs and however often it was interrupted. Knows no
//! rule's formula: a rule is its name and named numbers ([`crate::kvw::RuleKind`]).

mod error;
mod grid;
mod objective;
mod record;
mod run;

pub use error::Error;
pub use grid::{Grid, Point};
pub use objective::{Measure, Objective, Pick, Tradeoff};
pub use record::{Binding, Finished, Sweep};
pub use run::{Event, Job, named, run};

//! What the model still says, and what it still knows, in numbers.
//!
//! In: a model under gates (or an edited one), and samples. Out: an [`Evaluation`]: the greedy
//! answer and the loss of the true one for each sample, scored by [`text`], and their summary.

mod run;
pub mod text;

pub use run::{Evaluation, evaluate};

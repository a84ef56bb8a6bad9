//! From a plan to bytes: gates folded into the weights of a model folder.
//!
//! In: a [`Bundle`](crate::bundle::Bundle), gates per layer (`[d_ff]` each, float32), and the
//! [`ModelIdentity`] of the model that they were computed on. Out: a new folder, and a receipt.
//!
//! 1. [`inspect`](mod@inspect): what can be weakened, in which form, and why not;
//! 2. [`identity`](mod@identity): which model this is, whatever its precision;
//! 3. [`EditPlan`]: the byte ranges to multiply and the changes of graphs, as a value that was checked
//!    and can be printed;
//! 4. [`apply`](mod@apply): copy, patch, verify, rename;
//!    or [`in_place`], where the model lies: journal, patch, verify;
//! 5. [`diff`](mod@diff): what differs between two folders, and whether that was planned;
//! 6. [`recheck`](mod@recheck): whether a folder still holds what its receipt says.
//!
//! Promises: no byte outside the planned ranges changes, and of a graph nothing but what is planned; a gate of 1 changes nothing; every decoder
//! file of the folder is edited, or none; stored values are rounded once, to nearest even; a run
//! that would change nothing is an error.
//!
//! A form of edit is one file (as [`columns`](self)) and one line in `form.rs`.

mod align;
pub mod apply;
mod columns;
pub mod diff;
mod error;
mod form;
pub mod identity;
pub mod in_place;
pub mod inspect;
mod multiply;
mod norms;
mod plan;
mod read;
pub mod receipt;
pub mod recheck;
mod recipe;
mod rewrite;
mod scale;
mod scales;
mod splice;
mod tolerance;
mod verify;
mod weights;

pub use apply::{Accept, Options, Progress, Stage, apply, apply_if, check_output};
pub use diff::{DiffReport, diff};
pub use error::Error;
pub use form::{Cost, EditForm, FormChoice};
pub use identity::{
    LayerIdentity, Match, Mismatch, ModelIdentity, check, identity, identity_in, identity_of,
};
pub use inspect::{FileReport, Inspection, MlpReport, check_layers, check_vision, inspect, mlps};
pub use norms::column_norms;
pub use plan::{EditPlan, GraphEdit, MlpEdit, TensorEdit, gates_digest};
pub use receipt::Receipt;
pub use recheck::{RangeState, RecheckedFile, recheck, recheck_original};
pub use tolerance::tolerance;

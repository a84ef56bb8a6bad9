//! What the model still says, and what it still knows, in numbers.
//!
//! In: a model under gates (or an edited one), and samples. Out: for each sample the greedy answer and
//! the likelihood of given ones ([`Answered`]), its scores ([`score()`]), a set's [`Summary`], and all of
//! it as an [`Evidence`] file, whose [`Record`] a receipt holds.
//!
//! ```text
//!   samples ──run──► Answered ──score──► Answer ──► Summary ──┐
//!                        │                  │                 ├──► Evidence ──► Record
//!                     text, likelihood   [`METRICS`]       Estimate
//! ```
//!
//! **A new metric** is one entry of [`METRICS`] and one line in `answer.rs`.
//!
//! ```
//! use kvw::eval::{Answered, Scoring, Summary, score};
//! use kvw::eval::text::Leak;
//!
//! let answer = score(
//!     Answered {
//!         id: "portrait-7".into(),
//!         question: "Who is the person in this picture?".into(),
//!         reference: "This is Maria Rossi, a baker.".into(),
//!         name: Some("Maria Rossi".into()),
//!         facts: [("job".to_owned(), "baker".to_owned())].into(),
//!         prediction: Some("The picture shows Maria.".into()),
//!         ..Answered::default()
//!     },
//!     &Scoring::default(),
//! );
//! assert_eq!(answer.scores["name_accuracy"], 0.0);
//! assert_eq!(answer.leaks, [Leak::FirstName]);
//!
//! let summary = Summary::of(&[answer]);
//! assert_eq!(summary.value("leak_any"), Some(1.0));
//! assert_eq!(summary.value("probability"), None);
//! ```

mod agreement;
mod answer;
mod compare;
mod control;
pub mod distribution;
mod estimate;
mod evidence;
pub mod likelihood;
mod registry;
mod run;
mod set;
mod summary;
pub mod text;

pub use agreement::Agreement;
pub use answer::{Answer, Answered, Chosen, Scores, Scoring, score};
pub use compare::comparisons;
pub use control::{Control, ControlKind, Spread};
pub use estimate::{Bootstrap, CONFIDENCE, Estimate, RESAMPLES, SEED};
pub use evidence::{
    Comparison, Error, Evidence, EvidenceSet, Measured, NotAsked, Record, Role, SCHEMA_VERSION,
    SetKind, set_names,
};
pub use likelihood::{AnswerLoss, MinK, TokenLog};
pub use registry::{Better, Direction, Level, METRICS, Metric, metric, title};
pub use run::{Settings, evaluate};
pub use set::EvaluatedSet;
pub use summary::Summary;

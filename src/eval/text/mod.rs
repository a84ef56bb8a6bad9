//! Metrics of the answers that a model gives, from text alone.
//!
//! **In:** an [`Answered`] sample: question, reference answer, what is known of the person (name and
//! facts), the model's greedy answer and, where a forward pass measured it, the loss of the
//! reference answer. **Out:** [`SampleScores`] for each, and one [`Summary`] of many. **Promised:**
//! pure functions that never panic; ROUGE equal to Google's `rouge-score` 0.1.2; a metric that a
//! sample cannot have (no name, an empty reference) is absent there and is not counted as zero.
//!
//! | metric | module | source |
//! |---|---|---|
//! | name accuracy | [`name`] | Knowledge Vector Weakening's own evaluation (arXiv 2601.21794) |
//! | ROUGE-1, -2, -L | [`rouge`], [`stemmer`] | Lin 2004, as Google's `rouge-score` computes it |
//! | leaks of name and facts | [`leak`] | ours |
//! | degenerate repetition | [`repetition`] | Welleck et al. 2019 (arXiv 1908.04319), and a stated rule |
//! | loss and probability of the reference | [`sample`] | CLEAR (loss = mean over answer tokens, probability = exp(−loss)) |
//!
//! ```
//! use kvw::eval::text::{Answered, Leak, score, summarize};
//!
//! let sample = Answered {
//!     id: "portrait-7".into(),
//!     question: "Who is the person in this picture?".into(),
//!     reference: "This is Maria Rossi, a baker.".into(),
//!     name: Some("Maria Rossi".into()),
//!     facts: [("job".to_owned(), "baker".to_owned())].into(),
//!     prediction: "The picture shows Maria.".into(),
//!     loss: None,
//! };
//! let scores = score(&sample);
//! assert_eq!(scores.name_is_in, Some(false));
//! assert_eq!(scores.leaks, [Leak::FirstName]);
//!
//! let summary = summarize(&[scores]);
//! assert_eq!(summary.name_accuracy.value, Some(0.0));
//! assert_eq!(summary.leak_any.value, Some(1.0));
//! assert_eq!(summary.probability.value, None);
//! ```

pub mod leak;
pub mod name;
pub mod repetition;
pub mod rouge;
pub mod sample;
pub mod stemmer;
pub mod summary;
mod words;

pub use leak::{Leak, leakable, leaks};
pub use name::{name_is_checkable, name_is_in};
pub use repetition::{is_degenerate, seq_rep};
pub use rouge::{Score, rouge_l, rouge_n};
pub use sample::{AnswerLoss, Answered, SampleScores, score};
pub use summary::{Metric, Summary, summarize};

//! Metrics of the answers that a model gives, from text alone.
//!
//! **In:** a question, a reference answer, what is known of the person (name and facts), the model's
//! answer. **Out:** yes or no, or a number. **Promised:** pure functions that never panic; ROUGE equal
//! to Google's `rouge-score` 0.1.2.
//!
//! | metric | module | source |
//! |---|---|---|
//! | name accuracy | [`name`] | Knowledge Vector Weakening's own evaluation (arXiv 2601.21794) |
//! | ROUGE-1, -2, -L | [`rouge`], [`stemmer`] | Lin 2004, as Google's `rouge-score` computes it |
//! | BLEU | [`mod@bleu`] | Papineni et al. 2002, as NLTK and MLLMU-Bench compute it |
//! | multiple choice, blanks | [`choice`] | MLLMU-Bench, Knowledge Vector Weakening |
//! | leaks of name and facts | [`leak`] | ours |
//! | degenerate repetition | [`repetition`] | Welleck et al. 2019 (arXiv 1908.04319), and a stated rule |

pub mod bleu;
pub mod choice;
pub mod leak;
pub mod name;
pub mod repetition;
pub mod rouge;
pub mod stemmer;
mod words;

pub use bleu::bleu;
pub use choice::{choice_prompt, fills_blank, is_choice};
pub use leak::{Leak, leakable, leaks, names_another};
pub use name::{name_is_checkable, name_is_in};
pub use repetition::{is_degenerate, seq_rep};
pub use rouge::{Score, rouge_l, rouge_n};

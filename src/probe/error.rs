//! What can go wrong in a probe.

use crate::{kvw, pipeline};

/// Why a probe or a control could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Error {
    #[error(transparent)]
    Pipeline(#[from] pipeline::Error),
    #[error(transparent)]
    Kvw(#[from] kvw::Error),
    /// Nobody said whom to draw from.
    #[error("expected a retain set to draw other people from, found none")]
    NoRetainSet,
    /// There is nobody to draw.
    #[error(
        "cannot draw other people: expected names in the forget set and more other people in the \
         retain set, found {forget} and {retain}"
    )]
    TooFewPeople {
        /// People in the forget set.
        forget: usize,
        /// Other people in the retain set.
        retain: usize,
    },
}

impl Error {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Pipeline(error) => error.hint(),
            Error::Kvw(error) => error.hint(),
            Error::NoRetainSet => Some("give --retain, or leave out --control other-people".into()),
            Error::TooFewPeople { .. } => {
                Some("give the samples of both sets a `name` (docs/formats.md)".into())
            }
        }
    }
}

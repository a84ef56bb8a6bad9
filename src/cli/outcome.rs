//! Exit codes, and which error gets which.

use std::process::ExitCode;

use crate::edit;

/// One error of a chain.
type Cause = dyn std::error::Error + 'static;

/// Returns the hint of the first of these types that `$cause` is.
macro_rules! first_of {
    ($cause:expr, $($error:ty),+ $(,)?) => {
        $(if let Some(error) = $cause.downcast_ref::<$error>() { return error.hint(); })+
    };
}

#[cfg(feature = "runtime")]
pub(super) mod runs;

/// No run, no error of one.
#[cfg(not(feature = "runtime"))]
mod runs {
    use super::Cause;

    pub(super) fn failed(_: &Cause) -> bool {
        false
    }

    pub(super) fn hint(_: &Cause) -> Option<String> {
        None
    }
}

/// How a verb ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Done, or passed.
    Done,
    /// A verification failed.
    Failed,
    /// Usage or bad input.
    BadInput,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> ExitCode {
        ExitCode::from(match outcome {
            Outcome::Done => 0,
            Outcome::Failed => 1,
            Outcome::BadInput => 2,
        })
    }
}

/// Input that cannot be used is 2; a job that ran and whose result does not hold is 1.
pub(super) fn of_error(error: &anyhow::Error) -> Outcome {
    let failed = error.chain().any(|cause| {
        let edit = cause.downcast_ref::<edit::Error>();
        edit.is_some_and(verification) || runs::failed(cause)
    });
    match failed {
        true => Outcome::Failed,
        false => Outcome::BadInput,
    }
}

fn verification(error: &edit::Error) -> bool {
    matches!(
        error,
        edit::Error::Verification { .. } | edit::Error::NothingToChange { .. }
    )
}

/// What the user can do about an error: the hints along its chain.
pub(super) fn hints(error: &anyhow::Error) -> Vec<String> {
    let mut hints: Vec<String> = error.chain().filter_map(hint).collect();
    hints.dedup();
    hints
}

fn hint(cause: &Cause) -> Option<String> {
    first_of!(
        cause,
        crate::bundle::Error,
        crate::edit::Error,
        crate::files::Error,
        crate::files::contain::Error,
        crate::graph::Error,
        crate::kvw::Error,
        crate::onnx::Error,
        crate::provenance::Error,
    );
    runs::hint(cause)
}

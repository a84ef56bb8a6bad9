//! Exit codes, and which error gets which.

use std::process::ExitCode;

use crate::{edit, eval, kvw, pipeline, sweep};

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

/// The edited model does not compute what the gated one computes.
#[derive(Debug, thiserror::Error)]
#[error(
    "the edited model is not the gated one: logits differ by {:.3e}, expected at most {:.0e} of the largest ({:.3e}) and a tenth of what the gates change ({:.3e})",
    .0.max_difference, .0.tolerance, .0.max_logit, .0.effect
)]
pub(super) struct Disagreement(pub(super) eval::Agreement);

/// Input that cannot be used is 2; a job that ran and whose result does not hold is 1.
pub(super) fn of_error(error: &anyhow::Error) -> Outcome {
    let failed = error.chain().any(|cause| {
        cause.is::<Disagreement>()
            || cause
                .downcast_ref::<pipeline::Error>()
                .is_some_and(|error| match error {
                    pipeline::Error::Edit(error) => verification(error),
                    pipeline::Error::Kvw(error) => nothing(error),
                    _ => false,
                })
            || cause
                .downcast_ref::<edit::Error>()
                .is_some_and(verification)
            || cause.downcast_ref::<kvw::Error>().is_some_and(nothing)
            || matches!(
                cause.downcast_ref::<sweep::Error>(),
                Some(sweep::Error::TargetMissed { .. })
            )
    });
    if failed {
        Outcome::Failed
    } else {
        Outcome::BadInput
    }
}

fn verification(error: &edit::Error) -> bool {
    matches!(
        error,
        edit::Error::Verification { .. } | edit::Error::NothingToChange { .. }
    )
}

fn nothing(error: &kvw::Error) -> bool {
    matches!(error, kvw::Error::NothingWeakened { .. })
}

/// What the user can do about an error: the hints along its chain.
pub(super) fn hints(error: &anyhow::Error) -> Vec<String> {
    let mut hints: Vec<String> = error.chain().filter_map(hint).collect();
    hints.dedup();
    hints
}

fn hint(cause: &(dyn std::error::Error + 'static)) -> Option<String> {
    macro_rules! first_of {
        ($($error:ty),+ $(,)?) => {
            $(if let Some(error) = cause.downcast_ref::<$error>() { return error.hint(); })+
        };
    }
    first_of!(
        pipeline::Error,
        crate::bundle::Error,
        crate::check::Error,
        crate::dataset::Error,
        crate::edit::Error,
        crate::eval::Error,
        crate::files::Error,
        crate::files::contain::Error,
        crate::graph::Error,
        crate::kvw::Error,
        crate::onnx::Error,
        crate::preprocess::Error,
        crate::probe::Error,
        crate::report::Error,
        crate::provenance::Error,
        crate::runtime::Error,
        crate::runtime::device::Error,
        crate::runtime::fetch::Error,
        crate::runtime::locate::Error,
        crate::sweep::Error,
    );
    None
}

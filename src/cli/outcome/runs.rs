//! The errors of verbs that run a model, read a data set or report.

use super::{Cause, verification};
use crate::{eval, kvw, pipeline, sweep};

/// The edited model does not compute what the gated one computes.
#[derive(Debug, thiserror::Error)]
#[error(
    "the edited model is not the gated one: logits differ by {:.3e}, expected at most {:.0e} of the largest ({:.3e}) and a tenth of what the gates change ({:.3e})",
    .0.max_difference, .0.tolerance, .0.max_logit, .0.effect
)]
pub(crate) struct Disagreement(pub(crate) eval::Agreement);

/// Whether the job ran, and its result does not hold.
pub(super) fn failed(cause: &Cause) -> bool {
    let nothing = |error: &kvw::Error| matches!(error, kvw::Error::NothingWeakened { .. });
    let run = match cause.downcast_ref::<pipeline::Error>() {
        Some(pipeline::Error::Edit(error)) => verification(error),
        Some(pipeline::Error::Kvw(error)) => nothing(error),
        _ => false,
    };
    run || cause.is::<Disagreement>()
        || cause.downcast_ref::<kvw::Error>().is_some_and(nothing)
        || matches!(
            cause.downcast_ref::<sweep::Error>(),
            Some(sweep::Error::TargetMissed { .. })
        )
}

/// What the user can do about it.
pub(super) fn hint(cause: &Cause) -> Option<String> {
    first_of!(
        cause,
        pipeline::Error,
        crate::check::Error,
        crate::dataset::Error,
        crate::eval::Error,
        crate::preprocess::Error,
        crate::probe::Error,
        crate::report::Error,
        crate::runtime::Error,
        crate::runtime::device::Error,
        crate::runtime::fetch::Error,
        crate::runtime::locate::Error,
        crate::sweep::Error,
    );
    None
}

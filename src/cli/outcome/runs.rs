//! The errors of verbs that run a model, read a data set or report.

use super::{Cause, verification};
use crate::{eval, kvw, pipeline, sweep};

/// The edited model does not compute what the gated one computes, or both what the original does.
#[derive(Debug)]
pub(crate) struct Disagreement(pub(crate) eval::Agreement);

impl std::error::Error for Disagreement {}

impl std::fmt::Display for Disagreement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let eval::Agreement {
            max_difference,
            effect,
            max_logit,
            tolerance,
            positions,
            ..
        } = self.0;
        if self.0.is_untouched() {
            return write!(
                f,
                "nothing was unlearned: the gates change no logit at any of {positions} positions"
            );
        }
        write!(
            f,
            "the edited model is not the gated one: logits differ by {max_difference:.3e}, expected at most \
             {tolerance:.0e} of the largest ({max_logit:.3e}) and a tenth of what the gates change \
             ({effect:.3e})"
        )
    }
}

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

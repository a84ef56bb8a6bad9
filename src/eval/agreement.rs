//! Whether the written model is the planned one.

use serde::{Deserialize, Serialize};

/// How far two models' logits are apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Largest absolute difference of a logit.
    pub max_difference: f64,
    /// Largest absolute difference that the gates make to a logit: the gated model against itself with
    /// gates of 1.
    pub effect: f64,
    /// Largest absolute logit of the gated model.
    pub max_logit: f64,
    /// Share of positions whose most likely token is the same.
    pub same_argmax: f64,
    /// Positions compared.
    pub positions: usize,
    /// What `max_difference / max_logit` may be, for the weights' type.
    pub tolerance: f64,
}

impl Agreement {
    /// Whether the two models are the same: within the rounding of the stored weights, and at least ten
    /// times closer to each other than to the original. Without the second condition weak gates would
    /// pass for any edit, none included.
    pub fn holds(&self) -> bool {
        self.max_difference <= self.tolerance * self.max_logit
            && self.max_difference <= 0.1 * self.effect
            && !self.is_untouched()
    }

    /// Whether the gates change no logit: a vision encoder's, say, of a model that does not look. Whatever was
    /// written, it answers as before.
    pub fn is_untouched(&self) -> bool {
        self.effect <= 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::Agreement;

    #[test]
    fn two_models_that_agree_with_the_original_too_were_not_unlearned() {
        let mut agreement = Agreement {
            max_difference: 0.0,
            effect: 1e-3,
            max_logit: 1.0,
            same_argmax: 1.0,
            positions: 1,
            tolerance: 1e-5,
        };
        assert!(agreement.holds() && !agreement.is_untouched());
        agreement.effect = 0.0;
        assert!(!agreement.holds() && agreement.is_untouched());
    }
}

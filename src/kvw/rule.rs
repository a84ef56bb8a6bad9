//! The seam between statistics and gates.

use ndarray::{Array1, ArrayView1, Zip};

use super::Error;
use crate::graph::{LayerId, Moment};

/// Which tokens the statistics are taken over, and how heavily each counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenWeights {
    /// Every position that predicts an answer token counts 1, every other 0.
    Answer,
}

/// From the statistics of a batch of the forget set, and those of the retain set, to gates.
///
/// A rule is stateless arithmetic on one layer at a time. A new method is a new implementation:
/// nothing else changes.
pub trait Rule {
    /// The method's short name, kept in the plan.
    fn name(&self) -> &'static str;

    /// The method's parameters, kept in the plan.
    fn parameters(&self) -> serde_json::Value;

    /// The function of the hidden activation whose token mean the rule wants.
    fn moment(&self) -> Moment {
        Moment::Absolute
    }

    /// The tokens that the mean is taken over.
    fn token_weights(&self) -> TokenWeights {
        TokenWeights::Answer
    }

    /// The gates of one layer for one step: `forget` and `retain` are the token means, `[d_ff]`.
    /// Any finite value is a gate; 1 changes nothing.
    fn gates(
        &self,
        layer: LayerId,
        forget: ArrayView1<'_, f64>,
        retain: ArrayView1<'_, f64>,
    ) -> Array1<f64>;

    /// Whether the same batch shall be weakened once more, after `repeats` steps on it: a stop
    /// condition per batch. The method of the paper takes one step.
    fn again(&self, repeats: usize) -> bool {
        let _ = repeats;
        false
    }
}

/// Knowledge Vector Weakening: `g = exp(−γ · max(0, ln(KC_f + ε) − ln(KC_r + ε)))`, ε = 1e-12.
///
/// Source: arXiv 2601.21794, equations 5–7, and the authors' implementation. Gates lie in (0, 1]: a
/// neuron that fires no more on the forget batch than on the retain set is left alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnowledgeVectorWeakening {
    /// Weakening strength γ ≥ 0. It must fit the number of steps: γ · steps of about 7 to 18 forgets
    /// on the models measured; the authors' 0.02 belongs to some hundreds of steps.
    pub gamma: f64,
}

/// Keeps the logarithm of a dead neuron finite. The authors' value.
const EPSILON: f64 = 1e-12;

impl KnowledgeVectorWeakening {
    /// The rule's name.
    pub const NAME: &'static str = "kvw";
    /// The name of its parameter γ.
    pub const GAMMA: &'static str = "gamma";

    /// The rule with this γ.
    ///
    /// # Errors
    /// γ is not a number > 0.
    pub fn new(gamma: f64) -> Result<KnowledgeVectorWeakening, Error> {
        if gamma.is_finite() && gamma > 0.0 {
            return Ok(KnowledgeVectorWeakening { gamma });
        }
        Err(Error::Option {
            option: Self::GAMMA,
            expected: "a number > 0",
            found: gamma.to_string(),
        })
    }
}

impl Rule for KnowledgeVectorWeakening {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn parameters(&self) -> serde_json::Value {
        serde_json::json!({ Self::GAMMA: self.gamma })
    }

    fn gates(
        &self,
        _layer: LayerId,
        forget: ArrayView1<'_, f64>,
        retain: ArrayView1<'_, f64>,
    ) -> Array1<f64> {
        Zip::from(forget)
            .and(retain)
            .map_collect(|&forget, &retain| {
                let excess = (forget + EPSILON).ln() - (retain + EPSILON).ln();
                (-self.gamma * excess.max(0.0)).exp()
            })
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;

    use super::{KnowledgeVectorWeakening, Rule};

    #[test]
    fn gates_follow_the_closed_form() {
        // KC_f / KC_r = e → g = e^−γ; KC_f = KC_r → 1; KC_f < KC_r → 1; both dead → 1.
        let rule = KnowledgeVectorWeakening { gamma: 0.5 };
        let forget = array![std::f64::consts::E, 1.0, 0.5, 0.0];
        let retain = array![1.0, 1.0, 1.0, 0.0];
        let gates = rule.gates(0.into(), forget.view(), retain.view());
        assert!((gates[0] - (-0.5f64).exp()).abs() < 1e-12);
        assert_eq!(gates.as_slice().unwrap()[1..], [1.0, 1.0, 1.0]);
    }

    proptest! {
        #[test]
        fn gates_lie_in_zero_to_one(forget in 0.0f64..1e6, retain in 0.0f64..1e6, gamma in 0.0f64..4.0) {
            let gates = KnowledgeVectorWeakening { gamma }
                .gates(0.into(), array![forget].view(), array![retain].view());
            prop_assert!(gates[0] > 0.0 && gates[0] <= 1.0);
        }
    }
}

//! A plan: what is to be weakened, and by how much.

use super::TowerChoice;
use crate::graph::LayerId;
use std::collections::BTreeMap;

/// Gates per neuron, with all that is needed to know what they are for and how they were made.
///
/// A plan belongs to neurons, not to bytes: it applies to every precision of the same model.
/// Together with the unlearned model it gives back the original (the gates can be divided out), so
/// it is as sensitive as the original model.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Cumulative gates by layer, float32 `[d_ff]`.
    pub gates: BTreeMap<LayerId, Vec<f32>>,
    /// Name of the rule that made them.
    pub rule: String,
    /// The rule's parameters and the loop's options.
    pub parameters: serde_json::Value,
    /// Steps taken.
    pub steps: u64,
}

/// What a plan does, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PlanSummary {
    /// Layers with at least one gate below or above 1.
    pub layers: usize,
    /// Neurons with a gate other than 1.
    pub neurons: usize,
    /// All neurons of the planned layers.
    pub of_neurons: usize,
    /// Smallest gate.
    pub min_gate: f32,
    /// Mean gate over all neurons of the planned layers.
    pub mean_gate: f64,
}

impl Plan {
    /// The towers that the plan is about.
    pub fn towers(&self) -> TowerChoice {
        TowerChoice::of(self.gates.keys().copied())
    }

    /// Makes every gate whose magnitude is below `threshold` exactly 0, and says how many neurons that leaves
    /// without their knowledge vector. Such a gate cannot be divided out again.
    pub fn zero_below(&mut self, threshold: f32) -> usize {
        let mut zeroed = 0;
        for gate in self.gates.values_mut().flatten() {
            if gate.abs() < threshold {
                *gate = 0.0;
                zeroed += 1;
            }
        }
        zeroed
    }

    /// The plan in numbers.
    pub fn summary(&self) -> PlanSummary {
        let all = || self.gates.values().flatten();
        let of_neurons = all().count();
        PlanSummary {
            layers: self
                .gates
                .values()
                .filter(|gates| gates.iter().any(|&g| g != 1.0))
                .count(),
            neurons: all().filter(|&&gate| gate != 1.0).count(),
            of_neurons,
            min_gate: all().copied().fold(f32::INFINITY, f32::min),
            mean_gate: all().map(|&gate| f64::from(gate)).sum::<f64>() / of_neurons.max(1) as f64,
        }
    }
}

//! Does it hold? The same knowledge asked for in other ways, and controls for luck.
//!
//! In: the sets of an evaluation, a model, a plan. Out: more sets, made of their columns
//! ([`PROBES`]), and [`Controls`]: the same gates on other neurons ([`permuted`]), the same settings
//! on other people ([`people`]). Everything is evaluated as the sets themselves are.
//!
//! Promises: a set without what a probe needs gives the reason; every draw has a seed.

mod ask;
mod controls;
mod derive;
mod error;
pub mod people;

use ndarray::Array1;

pub use ask::{Asked, Asking, questions};
pub use controls::{Controls, Wanted, check_controls};
pub use derive::{Material, PROBES, Probe};
pub use error::Error;

use crate::kvw::{Draws, Gates, Plan};

/// The plan's gates, dealt out anew among the neurons of each layer: as much weakening as the plan,
/// at other places. If that forgets as well, the choice of neurons has no part in the result.
pub fn permuted(plan: &Plan, seed: u64) -> Gates {
    let mut draws = Draws::new(seed);
    let mut permuted = Gates::new();
    for (&layer, gates) in &plan.gates {
        let order = draws.permutation(gates.len());
        let dealt: Array1<f64> = order
            .iter()
            .filter_map(|&index| gates.get(index).map(|&gate| f64::from(gate)))
            .collect();
        permuted.insert(layer, dealt);
    }
    permuted
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::permuted;
    use crate::graph::LayerId;
    use crate::kvw::Plan;

    #[test]
    fn a_permutation_keeps_every_layers_gates_and_moves_them() {
        let gates: Vec<f32> = (0u8..50).map(f32::from).collect();
        let plan = Plan {
            gates: BTreeMap::from([(0.into(), gates.clone()), (3.into(), gates.clone())]),
            rule: "kvw".into(),
            parameters: serde_json::Value::Null,
            steps: 1,
        };
        let dealt = permuted(&plan, 1);
        assert_eq!(dealt, permuted(&plan, 1));
        assert_ne!(dealt, permuted(&plan, 2));
        assert_ne!(dealt[&LayerId::language(0)], dealt[&LayerId::language(3)]);
        for layer in [0, 3].map(LayerId::language) {
            let mut sorted = dealt[&layer].to_vec();
            assert_ne!(
                sorted,
                gates.iter().map(|&g| f64::from(g)).collect::<Vec<_>>()
            );
            sorted.sort_by(f64::total_cmp);
            assert_eq!(
                sorted,
                gates.iter().map(|&g| f64::from(g)).collect::<Vec<_>>()
            );
        }
    }
}

//! What a plan was made with, so that it can be done again to other samples.
//!
//! In: a [`Plan`], which keeps the rule's name and every parameter. Out: the rule and the loop's
//! options.

use std::collections::BTreeMap;

use ndarray::Array1;
use serde::Deserialize;

use super::{
    Error, LayerRange, Layers, Options, Order, Parameters, Plan, Rule, RuleKind, TowerChoice,
};
use crate::graph::LayerId;

/// A rule and how the loop goes with it.
pub struct Setting {
    /// The rule.
    pub rule: Box<dyn Rule>,
    /// Layers to weaken.
    pub layers: Layers,
    /// Samples per step.
    pub batch_size: usize,
    /// Passes over the forget set.
    pub epochs: usize,
    /// Order within an epoch.
    pub order: Order,
    /// Whether each layer's matrix is given its old norm back after every step.
    pub keep_norm: bool,
}

/// As `weaken` writes it into a plan.
#[derive(Deserialize)]
struct Stored {
    #[serde(default)]
    tower: TowerChoice,
    layers: LayerRange,
    batch_size: usize,
    epochs: usize,
    order: String,
    seed: Option<u64>,
    keep_norm: bool,
    #[serde(flatten)]
    rule: Parameters,
}

impl Setting {
    /// What `plan` was made with.
    ///
    /// # Errors
    /// The plan names a rule or parameters that are not known here.
    pub fn of(plan: &Plan) -> Result<Setting, Error> {
        let unknown = |reason: String| Error::UnknownSetting {
            rule: plan.rule.clone(),
            reason,
        };
        let stored = Stored::deserialize(&plan.parameters).map_err(|e| unknown(e.to_string()))?;
        let order = match (stored.order.parse().map_err(unknown)?, stored.seed) {
            (Order::Shuffle { .. }, Some(seed)) => Order::Shuffle { seed },
            (order, _) => order,
        };
        Ok(Setting {
            rule: RuleKind::named(&plan.rule)?.make(&stored.rule)?,
            layers: Layers {
                towers: stored.tower,
                range: stored.layers,
            },
            batch_size: stored.batch_size,
            epochs: stored.epochs,
            order,
            keep_norm: stored.keep_norm,
        })
    }

    /// The loop's options; `norms` are the column norms of [`Options::keep_norm`], which are left out
    /// where the setting does not ask for them.
    pub fn options(&self, norms: BTreeMap<LayerId, Array1<f64>>) -> Options {
        Options {
            layers: self.layers.range,
            batch_size: self.batch_size,
            epochs: self.epochs,
            order: self.order,
            keep_norm: self.keep_norm.then_some(norms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(rule: &str, parameters: serde_json::Value) -> Plan {
        Plan {
            gates: BTreeMap::new(),
            rule: rule.into(),
            parameters,
            steps: 1,
        }
    }

    #[test]
    fn a_plans_setting_is_what_it_was_made_with() {
        let setting = Setting::of(&plan(
            "kvw",
            serde_json::json!({
                "gamma": 0.4, "layers": "0-2", "batch_size": 2, "epochs": 3, "order": "shuffle",
                "seed": 7, "keep_norm": false,
            }),
        ))
        .unwrap();
        assert_eq!(setting.rule.parameters(), serde_json::json!({"gamma": 0.4}));
        assert_eq!(setting.order, Order::Shuffle { seed: 7 });
        let options = setting.options(BTreeMap::new());
        assert_eq!((options.batch_size, options.epochs), (2, 3));
        assert_eq!(options.layers, LayerRange::Inclusive { start: 0, end: 2 });
        assert_eq!(options.keep_norm, None);
    }

    #[test]
    fn a_plan_of_an_unknown_rule_or_without_its_parameters_is_refused() {
        let whole = serde_json::json!({
            "layers": "all", "batch_size": 1, "epochs": 1, "order": "file", "keep_norm": false,
        });
        assert!(matches!(
            Setting::of(&plan("kvw", serde_json::json!({"gamma": 1.0}))),
            Err(Error::UnknownSetting { .. })
        ));
        assert!(matches!(
            Setting::of(&plan("kvw", whole.clone())),
            Err(Error::Parameters { .. })
        ));
        assert!(matches!(
            Setting::of(&plan("other", whole)),
            Err(Error::NoSuchRule { .. })
        ));
    }
}

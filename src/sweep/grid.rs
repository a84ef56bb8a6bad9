//! The points of a grid.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::kvw::{LayerRange, Parameters, RuleKind};

/// Values of each of a rule's parameters, and layer ranges: every combination is a point.
pub struct Grid {
    /// The rule.
    pub rule: &'static RuleKind,
    /// Values by parameter.
    pub axes: BTreeMap<String, Vec<f64>>,
    /// Layers to weaken.
    pub layers: Vec<LayerRange>,
}

/// One setting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The rule's parameters.
    pub parameters: Parameters,
    /// The layers that are weakened.
    pub layers: LayerRange,
}

/// Two values of a parameter closer than this, relatively, are one: decimals written and read back
/// may move by a last bit.
const SAME: f64 = 1e-12;

impl Point {
    /// Whether both are the same setting.
    pub fn is(&self, other: &Point) -> bool {
        let same = |(a, b): (&f64, &f64)| (a - b).abs() <= SAME * a.abs().max(b.abs());
        self.layers == other.layers
            && self.parameters.keys().eq(other.parameters.keys())
            && self
                .parameters
                .values()
                .zip(other.parameters.values())
                .all(same)
    }

    /// The order of points in files and tables: by layers, then by parameters, whatever the order in
    /// which they were asked for or finished.
    pub fn order(&self, other: &Point) -> std::cmp::Ordering {
        let parameters = self.parameters.values().zip(other.parameters.values());
        self.layers.cmp(&other.layers).then_with(|| {
            parameters
                .map(|(a, b)| a.total_cmp(b))
                .find(|order| order.is_ne())
                .unwrap_or(std::cmp::Ordering::Equal)
        })
    }
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (name, value) in &self.parameters {
            write!(f, "{name} {value}, ")?;
        }
        write!(f, "layers {}", self.layers)
    }
}

impl Grid {
    /// Every combination once, in the order of [`Point::order`].
    ///
    /// # Errors
    /// An axis without values, or values that the rule refuses.
    pub fn points(&self) -> Result<Vec<Point>, Error> {
        if self.layers.is_empty() {
            return Err(Error::EmptyGrid {
                axis: "layers".into(),
            });
        }
        let mut settings = vec![Parameters::new()];
        for (name, values) in &self.axes {
            if values.is_empty() {
                return Err(Error::EmptyGrid { axis: name.clone() });
            }
            let with = |setting: &Parameters, &value: &f64| {
                let mut setting = setting.clone();
                setting.insert(name.clone(), value);
                setting
            };
            settings = settings
                .iter()
                .flat_map(|setting| values.iter().map(move |value| with(setting, value)))
                .collect();
        }
        let mut points: Vec<Point> = Vec::new();
        for &layers in &self.layers {
            for parameters in &settings {
                self.rule.make(parameters)?;
                let point = Point {
                    parameters: parameters.clone(),
                    layers,
                };
                if !points.iter().any(|other| other.is(&point)) {
                    points.push(point);
                }
            }
        }
        points.sort_by(Point::order);
        Ok(points)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(gammas: &[f64], layers: &[&str]) -> Grid {
        Grid {
            rule: RuleKind::named("kvw").unwrap(),
            axes: BTreeMap::from([("gamma".to_owned(), gammas.to_vec())]),
            layers: layers.iter().map(|range| range.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_grid_is_every_combination_once_in_one_order() {
        let shown = |grid: Grid| -> Vec<String> {
            grid.points()
                .unwrap()
                .iter()
                .map(Point::to_string)
                .collect()
        };
        let expected = [
            "gamma 0.2, layers 0-2",
            "gamma 0.4, layers 0-2",
            "gamma 0.2, layers all",
            "gamma 0.4, layers all",
        ];
        assert_eq!(shown(grid(&[0.2, 0.4], &["0-2", "all"])), expected);
        assert_eq!(shown(grid(&[0.4, 0.2, 0.2], &["all", "0-2"])), expected);
    }

    #[test]
    fn an_empty_axis_and_a_value_out_of_range_are_refused() {
        assert!(matches!(
            grid(&[], &["0-2"]).points(),
            Err(Error::EmptyGrid { axis }) if axis == "gamma"
        ));
        assert!(matches!(
            grid(&[0.1], &[]).points(),
            Err(Error::EmptyGrid { axis }) if axis == "layers"
        ));
        assert!(grid(&[-1.0], &["0"]).points().is_err());
    }
}

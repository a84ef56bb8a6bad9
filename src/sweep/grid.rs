//! The points of a grid.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Error;
use crate::kvw::{KnowledgeVectorWeakening, LayerRange, Parameters, RuleKind};

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

impl Point {
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

/// γ · steps of the default grid: around the 7 to 18 that forgot on the models measured (docs/method.md).
const GAMMA_STEPS: [f64; 5] = [5.0, 7.0, 10.0, 14.0, 20.0];

impl Grid {
    /// The grid of Knowledge Vector Weakening over `gammas` and `layers`. Where they are empty: what
    /// forgot elsewhere in as many `steps`, and the first third, half and two thirds of the layers, of
    /// which the model says that it has `of_layers`, and all.
    ///
    /// # Errors
    /// The rule is not there.
    pub fn of_gammas(
        gammas: &[f64],
        layers: &[LayerRange],
        of_layers: Option<usize>,
        steps: usize,
    ) -> Result<Grid, Error> {
        let gammas = match gammas {
            [] => GAMMA_STEPS.iter().map(|sum| sum / steps as f64).collect(),
            given => given.to_vec(),
        };
        let first = |count: usize| LayerRange::Inclusive {
            start: 0,
            end: count.saturating_sub(1),
        };
        let parts = of_layers.into_iter().flat_map(|layers| {
            let parts = [
                layers.div_ceil(3),
                layers.div_ceil(2),
                (2 * layers).div_ceil(3),
            ];
            parts.map(first)
        });
        Ok(Grid {
            rule: RuleKind::named(KnowledgeVectorWeakening::NAME)?,
            axes: BTreeMap::from([(KnowledgeVectorWeakening::GAMMA.to_owned(), gammas)]),
            layers: match layers {
                [] => parts.chain([LayerRange::All]).collect(),
                given => given.to_vec(),
            },
        })
    }

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
                if !points.contains(&point) {
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
    fn the_default_grid_fits_the_steps_and_the_layers() {
        let grid = Grid::of_gammas(&[], &[], Some(6), 20).unwrap();
        let gammas = &grid.axes[KnowledgeVectorWeakening::GAMMA];
        assert_eq!(gammas, &[0.25, 0.35, 0.5, 0.7, 1.0]);
        let layers: Vec<String> = grid.layers.iter().map(LayerRange::to_string).collect();
        assert_eq!(layers, ["0-1", "0-2", "0-3", "all"]);
        // Of one layer, every part is that one.
        let grid = Grid::of_gammas(&[0.4], &[], Some(1), 20).unwrap();
        let points: Vec<String> = grid
            .points()
            .unwrap()
            .iter()
            .map(Point::to_string)
            .collect();
        assert_eq!(points, ["gamma 0.4, layers 0-0", "gamma 0.4, layers all"]);
        let unknown = Grid::of_gammas(&[0.4], &[], None, 20).unwrap();
        assert_eq!(unknown.layers, [LayerRange::All]);
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

//! Which layers are weakened: of which towers, and which of each.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::graph::{LayerId, Tower};

/// An inclusive range of layers within a tower, or all of them. Written `1-25`, `3` or `all`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LayerRange {
    /// `start..=end`.
    Inclusive {
        /// First layer.
        start: usize,
        /// Last layer, included.
        end: usize,
    },
    /// Every layer that the model has.
    All,
}

impl LayerRange {
    /// The smallest range that covers both.
    pub fn union(self, other: LayerRange) -> LayerRange {
        match (self, other) {
            (
                LayerRange::Inclusive { start: a, end: b },
                LayerRange::Inclusive { start: c, end: d },
            ) => LayerRange::Inclusive {
                start: a.min(c),
                end: b.max(d),
            },
            _ => LayerRange::All,
        }
    }

    /// Whether `layer` is in the range, by its number.
    pub fn contains(self, layer: LayerId) -> bool {
        match self {
            LayerRange::All => true,
            LayerRange::Inclusive { start, end } => (start..=end).contains(&layer.number()),
        }
    }

    /// Checks that each tower that `layers` are of has all layers of the range. Some there must be.
    ///
    /// # Errors
    /// What there is, to finish "found …".
    pub fn check(self, layers: impl IntoIterator<Item = LayerId>) -> Result<(), String> {
        let mut towers: BTreeMap<Tower, BTreeSet<usize>> = BTreeMap::new();
        for layer in layers {
            towers
                .entry(layer.tower())
                .or_default()
                .insert(layer.number());
        }
        let all_there = |numbers: &BTreeSet<usize>| match self {
            LayerRange::All => true,
            LayerRange::Inclusive { start, end } => {
                // Not one by one: a range may be as long as it likes.
                let last = numbers.last().copied().unwrap_or_default();
                end <= last && (start..=end).all(|layer| numbers.contains(&layer))
            }
        };
        if !towers.is_empty() && towers.values().all(all_there) {
            return Ok(());
        }
        let found = towers.iter().filter_map(|(tower, numbers)| {
            let (first, last) = (numbers.first()?, numbers.last()?);
            Some(match tower {
                Tower::Vision => format!("vision layers {first}-{last}"),
                _ => format!("layers {first}-{last}"),
            })
        });
        let found: Vec<String> = found.collect();
        Err(match found.is_empty() {
            true => "no layer".into(),
            false => found.join(", "),
        })
    }
}

impl FromStr for LayerRange {
    type Err = String;

    fn from_str(text: &str) -> Result<LayerRange, String> {
        if text == "all" {
            return Ok(LayerRange::All);
        }
        let number = |part: &str| {
            part.parse::<usize>().map_err(|_| {
                format!("expected 'all', a layer or an inclusive range like 1-25, found '{text}'")
            })
        };
        let (start, end) = match text.split_once('-') {
            Some((start, end)) => (number(start)?, number(end)?),
            None => (number(text)?, number(text)?),
        };
        if start > end {
            return Err(format!("expected first ≤ last, found '{text}'"));
        }
        Ok(LayerRange::Inclusive { start, end })
    }
}

impl TryFrom<String> for LayerRange {
    type Error = String;

    fn try_from(text: String) -> Result<LayerRange, String> {
        text.parse()
    }
}

impl From<LayerRange> for String {
    fn from(range: LayerRange) -> String {
        range.to_string()
    }
}

impl fmt::Display for LayerRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerRange::All => f.write_str("all"),
            LayerRange::Inclusive { start, end } => write!(f, "{start}-{end}"),
        }
    }
}

/// Of which towers layers are measured and weakened. Written `language`, `vision` or `all`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TowerChoice {
    /// The decoder: the method's own.
    #[default]
    Language,
    /// The vision encoder.
    Vision,
    /// Both.
    All,
}

impl TowerChoice {
    /// Whether `tower` is chosen.
    pub fn contains(self, tower: Tower) -> bool {
        match tower {
            Tower::Language => self != TowerChoice::Vision,
            Tower::Vision => self != TowerChoice::Language,
            Tower::Projector => false,
        }
    }

    /// How many layers each chosen tower is known to have, if the language model has `language`.
    pub fn known_layers(self, language: Option<usize>) -> Option<usize> {
        language.filter(|_| self == TowerChoice::Language)
    }

    /// The choice that `layers` are the result of; `Language` for none.
    pub fn of(layers: impl IntoIterator<Item = LayerId>) -> TowerChoice {
        let towers: BTreeSet<Tower> = layers.into_iter().map(LayerId::tower).collect();
        match (
            towers.contains(&Tower::Language),
            towers.contains(&Tower::Vision),
        ) {
            (true, true) => TowerChoice::All,
            (false, true) => TowerChoice::Vision,
            (_, false) => TowerChoice::Language,
        }
    }
}

impl FromStr for TowerChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<TowerChoice, String> {
        match text {
            "language" => Ok(TowerChoice::Language),
            "vision" => Ok(TowerChoice::Vision),
            "all" => Ok(TowerChoice::All),
            _ => Err(format!("expected language, vision or all, found '{text}'")),
        }
    }
}

impl fmt::Display for TowerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TowerChoice::Language => "language",
            TowerChoice::Vision => "vision",
            TowerChoice::All => "all",
        })
    }
}

/// Which layers are measured and weakened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layers {
    /// Of which towers.
    pub towers: TowerChoice,
    /// Which of each.
    pub range: LayerRange,
}

impl Layers {
    /// Every layer of these towers.
    pub fn all_of(towers: TowerChoice) -> Layers {
        Layers {
            towers,
            range: LayerRange::All,
        }
    }

    /// Whether `layer` is one of them.
    pub fn contains(self, layer: LayerId) -> bool {
        self.towers.contains(layer.tower()) && self.range.contains(layer)
    }
}

/// Layers of the language model.
impl From<LayerRange> for Layers {
    fn from(range: LayerRange) -> Layers {
        Layers {
            towers: TowerChoice::Language,
            range,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LayerRange, Layers, TowerChoice};
    use crate::graph::LayerId;

    #[test]
    fn a_range_counts_in_each_tower() {
        let language = (0..6).map(LayerId::language);
        let vision = (0..3).map(LayerId::vision);
        let both = || language.clone().chain(vision.clone());
        let range: LayerRange = "1-2".parse().unwrap();
        assert_eq!(range.check(both()), Ok(()));
        let range: LayerRange = "1-4".parse().unwrap();
        assert_eq!(range.check(language.clone()), Ok(()));
        assert_eq!(
            range.check(both()),
            Err("layers 0-5, vision layers 0-2".into())
        );
        assert_eq!(LayerRange::All.check([]), Err("no layer".into()));
        let huge = LayerRange::Inclusive {
            start: 0,
            end: usize::MAX,
        };
        assert!(huge.check(both()).is_err());
    }

    #[test]
    fn towers_are_what_they_say() {
        for towers in [TowerChoice::Language, TowerChoice::Vision, TowerChoice::All] {
            assert_eq!(towers.to_string().parse(), Ok(towers));
            let layers = [LayerId::language(1), LayerId::vision(1)];
            let chosen = layers.into_iter();
            let chosen = chosen.filter(|&layer| Layers::all_of(towers).contains(layer));
            assert_eq!(TowerChoice::of(chosen), towers);
        }
        assert!("both".parse::<TowerChoice>().is_err());
    }

    #[test]
    fn ranges_are_inclusive() {
        let range: LayerRange = "1-25".parse().unwrap();
        assert!(
            range.contains(1.into())
                && range.contains(25.into())
                && !range.contains(26.into())
                && !range.contains(0.into())
        );
        assert_eq!(range.to_string(), "1-25");
        assert_eq!("7".parse(), Ok(LayerRange::Inclusive { start: 7, end: 7 }));
        assert_eq!("all".parse(), Ok(LayerRange::All));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "5-1", "a-b", "-1", "1-", "1..3"] {
            assert!(text.parse::<LayerRange>().is_err(), "{text}");
        }
    }
}

//! Which layers are weakened.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An inclusive range of decoder layers, or all of them. Written `1-25`, `3` or `all`.
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

    /// Whether `layer` is in the range.
    pub fn contains(self, layer: usize) -> bool {
        match self {
            LayerRange::All => true,
            LayerRange::Inclusive { start, end } => (start..=end).contains(&layer),
        }
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

#[cfg(test)]
mod tests {
    use super::LayerRange;

    #[test]
    fn ranges_are_inclusive() {
        let range: LayerRange = "1-25".parse().unwrap();
        assert!(
            range.contains(1) && range.contains(25) && !range.contains(26) && !range.contains(0)
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

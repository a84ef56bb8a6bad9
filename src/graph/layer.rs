//! What a layer is called, in gates, files and messages.
//!
//! In: the tower and the number that a graph's names tell. Out: a [`LayerId`]. A layer of the language
//! model is written as its number alone, `3`, one of the vision encoder as `vision.3`: what is made of
//! the first only reads as if there were no other.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::Tower;

/// One layer of a model: a number within a tower. Language layers come first in order, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId {
    vision: bool,
    number: usize,
}

/// How a layer of the vision encoder is written.
const VISION: &str = "vision.";

impl LayerId {
    /// Layer `number` of the language model.
    pub const fn language(number: usize) -> LayerId {
        LayerId {
            vision: false,
            number,
        }
    }

    /// Layer `number` of the vision encoder.
    pub const fn vision(number: usize) -> LayerId {
        LayerId {
            vision: true,
            number,
        }
    }

    /// Layer `number` of `tower`; a projector has no layers.
    pub fn of(tower: Tower, number: usize) -> Option<LayerId> {
        match tower {
            Tower::Language => Some(LayerId::language(number)),
            Tower::Vision => Some(LayerId::vision(number)),
            Tower::Projector => None,
        }
    }

    /// The number, counted from 0 within the tower.
    pub const fn number(self) -> usize {
        self.number
    }

    /// The tower.
    pub const fn tower(self) -> Tower {
        match self.vision {
            false => Tower::Language,
            true => Tower::Vision,
        }
    }
}

/// A layer of the language model.
impl From<usize> for LayerId {
    fn from(number: usize) -> LayerId {
        LayerId::language(number)
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.vision {
            f.write_str(VISION)?;
        }
        write!(f, "{}", self.number)
    }
}

impl FromStr for LayerId {
    type Err = String;

    fn from_str(text: &str) -> Result<LayerId, String> {
        let (vision, number) = match text.strip_prefix(VISION) {
            Some(number) => (true, number),
            None => (false, text),
        };
        match number.parse() {
            // No sign, no leading zero: one layer has one name.
            Ok(found) if number == usize::to_string(&found) => Ok(LayerId {
                vision,
                number: found,
            }),
            _ => Err(format!(
                "expected a layer like 3 or {VISION}3, found '{text}'"
            )),
        }
    }
}

/// A number for a layer of the language model, else text.
impl Serialize for LayerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.vision {
            false => self.number.serialize(serializer),
            true => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for LayerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LayerId, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = LayerId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a layer's number, or text like {VISION}3")
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<LayerId, E> {
                usize::try_from(number)
                    .map(LayerId::language)
                    .map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<LayerId, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::LayerId;

    #[test]
    fn language_layers_are_numbers_and_vision_layers_are_text() {
        let layers = [
            LayerId::language(0),
            LayerId::language(11),
            LayerId::vision(2),
        ];
        assert!(layers.is_sorted());
        let json = serde_json::to_string(&layers).unwrap();
        assert_eq!(json, r#"[0,11,"vision.2"]"#);
        assert_eq!(serde_json::from_str::<[LayerId; 3]>(&json).unwrap(), layers);
        let by_layer = BTreeMap::from(layers.map(|layer| (layer, ())));
        let json = serde_json::to_string(&by_layer).unwrap();
        assert_eq!(json, r#"{"0":null,"11":null,"vision.2":null}"#);
        assert_eq!(
            serde_json::from_str::<BTreeMap<LayerId, ()>>(&json).unwrap(),
            by_layer
        );
    }

    #[test]
    fn a_layer_has_one_name() {
        for layer in [LayerId::language(7), LayerId::vision(7)] {
            assert_eq!(layer.to_string().parse(), Ok(layer));
        }
        for text in [
            "",
            "-1",
            "+1",
            "01",
            "vision",
            "vision.",
            "vision.-1",
            "text.1",
        ] {
            assert!(text.parse::<LayerId>().is_err(), "{text}");
        }
    }
}

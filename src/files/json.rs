//! JSON from somebody else, measured before it is built.
//!
//! In: bytes. Out: a value, or [`serde_json::Error`] with line and column. Refused, beside what is not
//! JSON: a key twice in one object (readers disagree on which of them counts, so a file could mean one
//! thing here and another elsewhere), and a tree that would take more memory than
//! [`limits::allowed_memory`]: two bytes (`0,`) become 72 in a [`serde_json::Value`]. Depth is bounded by
//! serde_json ([`limits::JSON_DEPTH`]).

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::mem::size_of;

use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::limits;

/// Reads a tree of any shape: a configuration, a row. What it may cost is measured first.
///
/// # Errors
/// No JSON, a key twice, too deep, or too much for its size.
pub fn read_tree(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    scan(bytes, limits::allowed_memory(length))?;
    serde_json::from_slice(bytes)
}

/// Reads a format of fixed shape, whose fields cost about what they take in the file.
///
/// # Errors
/// No JSON, a key twice, too deep, or not of the format.
pub fn read_format<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    scan(bytes, u64::MAX)?;
    serde_json::from_slice(bytes)
}

/// Whether `bytes` are one JSON value without a key twice, of which a tree takes at most `memory` bytes.
///
/// # Errors
/// What is wrong, and where.
pub fn scan(bytes: &[u8], memory: u64) -> Result<(), serde_json::Error> {
    let mut left = memory;
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    Scan { left: &mut left }.deserialize(&mut deserializer)?;
    deserializer.end()
}

/// One value of a list, or a member of an object with its key and hash.
const ITEM: usize = size_of::<Value>();
const MEMBER: usize = size_of::<(u64, String, Value)>() + 2 * size_of::<usize>();
/// A list or object that holds anything has room for this many.
const LEAST: usize = 4;
/// The heap's own, for each block.
const BLOCK: usize = 16;

struct Scan<'a> {
    left: &'a mut u64,
}

impl Scan<'_> {
    fn charge<E: serde::de::Error>(&mut self, bytes: usize) -> Result<(), E> {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        *self.left = self.left.checked_sub(bytes).ok_or_else(|| {
            E::custom("a tree that takes many times the memory that the file takes on disk")
        })?;
        Ok(())
    }

    /// The `index`th thing of `size` bytes in a list or object.
    fn thing<E: serde::de::Error>(&mut self, index: usize, size: usize) -> Result<(), E> {
        match index {
            0 => self.charge(BLOCK + LEAST * size),
            1..LEAST => Ok(()),
            _ => self.charge(size),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Scan<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Scan<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: serde::de::Error>(mut self, text: &str) -> Result<(), E> {
        self.charge(BLOCK + text.len())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<(), A::Error> {
        let mut index = 0;
        while items.next_element_seed(Scan { left: self.left })?.is_some() {
            self.thing(index, ITEM)?;
            index += 1;
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut members: A) -> Result<(), A::Error> {
        let mut keys = HashSet::new();
        while let Some(Key(key)) = members.next_key()? {
            self.thing(keys.len(), MEMBER)?;
            self.charge(BLOCK + key.len())?;
            if keys.contains(&key) {
                let key: String = key.chars().take(80).collect();
                return Err(A::Error::custom(format_args!("the key {key:?} twice")));
            }
            keys.insert(key);
            members.next_value_seed(Scan { left: self.left })?;
        }
        Ok(())
    }
}

/// An object's key, borrowed where it needs no unescaping.
struct Key<'de>(Cow<'de, str>);

impl<'de> serde::Deserialize<'de> for Key<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, key: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(key)))
            }

            fn visit_str<E>(self, key: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(key.to_owned())))
            }
        }
        from.deserialize_str(KeyVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> String {
        read_tree(bytes).unwrap_err().to_string()
    }

    #[test]
    fn what_is_accepted_is_what_serde_json_reads() {
        let text = r#"{"a": [1, -2, 3.5, null, true, "\u00e9"], "b": {"a": {}}, "": []}"#;
        let expected: Value = serde_json::from_str(text).unwrap();
        assert_eq!(read_tree(text.as_bytes()).unwrap(), expected);
        assert_eq!(read_format::<Value>(text.as_bytes()).unwrap(), expected);
    }

    #[test]
    fn json_past_a_limit_is_refused_by_name() {
        assert_eq!(
            refusal(b"{\"a\": 1,\n \"b\": {\"c\": 1, \"\\u0063\": 2}}"),
            "the key \"c\" twice at line 2 column 23"
        );
        let nested = |depth: usize| [b"[".repeat(depth), b"]".repeat(depth)].concat();
        assert!(read_tree(&nested(limits::JSON_DEPTH)).is_ok());
        for depth in [limits::JSON_DEPTH + 1, 1_000_000] {
            assert!(refusal(&nested(depth)).contains("recursion limit"));
        }
        // Two bytes become 72: a megabyte of them is let pass, 15 are not.
        let zeros = |count: usize| format!("[0{}]", ",0".repeat(count)).into_bytes();
        assert!(read_tree(&zeros(250_000)).is_ok());
        for bomb in [
            zeros(7 << 20),
            format!("[0{}]", ",[0]".repeat(4 << 20)).into_bytes(),
        ] {
            assert!(refusal(&bomb).contains("many times the memory"));
        }
        // A format of fixed shape holds what it holds.
        assert!(read_format::<Vec<u8>>(&zeros(7 << 20)).is_ok());
    }

    #[test]
    fn what_follows_the_value_is_refused() {
        for bytes in [&b"{} x"[..], b"", b"{", b"\xff", b"{\"a\":1,}", b"NaN"] {
            assert!(read_tree(bytes).is_err(), "{bytes:?}");
        }
    }

    /// The charge is what a tree really takes, within a factor of two.
    #[test]
    fn a_member_is_charged_at_least_what_it_takes() {
        let mut map = serde_json::Map::new();
        map.insert("k".into(), Value::Null);
        assert!(MEMBER >= size_of::<(u64, String, Value)>());
        assert_eq!(ITEM, size_of::<Value>());
    }
}

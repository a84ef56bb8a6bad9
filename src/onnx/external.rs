//! External data references: `TensorProto.external_data`.
//!
//! In: a tensor's key-value pairs. Out: a [`Reference`], checked for form. Which file it may name
//! is decided in one place, [`crate::files::contain`]. Source: ONNX, `docs/ExternalData.md`.

use super::schema::TensorProto;

/// One tensor's reference into an external data file, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Path relative to the model file's folder.
    pub(super) location: String,
    /// Byte offset in that file; 0 where the model does not say.
    pub(super) offset: u64,
    /// Length in bytes, where the model says.
    pub(super) length: Option<u64>,
}

impl Reference {
    /// Reads the pairs, or says what was expected and what was found.
    pub(super) fn parse(tensor: &TensorProto) -> Result<Reference, (String, String)> {
        let mut location = None;
        let mut offset = None;
        let mut length = None;
        for entry in &tensor.external_data {
            let value = entry.value();
            let number = |value: &str| {
                value.parse::<u64>().map_err(|_| {
                    (
                        format!("a byte count as external_data '{}'", entry.key()),
                        format!("'{value}'"),
                    )
                })
            };
            let again = match entry.key() {
                "location" => location.replace(value.to_owned()).is_some(),
                "offset" => offset.replace(number(value)?).is_some(),
                "length" => length.replace(number(value)?).is_some(),
                // `checksum` is ONNX's; the others are written by exporters and mean nothing here.
                "checksum" | "basepath" | "prepacked" => false,
                key => {
                    return Err((
                        "external_data keys location, offset, length, checksum".into(),
                        format!("'{key}'"),
                    ));
                }
            };
            if again {
                return Err((
                    "each external_data key once".into(),
                    format!("'{}' twice", entry.key()),
                ));
            }
        }
        let location = location.ok_or_else(|| {
            (
                "external_data with a 'location'".to_owned(),
                "none".to_owned(),
            )
        })?;
        Ok(Reference {
            location,
            offset: offset.unwrap_or(0),
            length,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Reference;
    use crate::onnx::schema::{StringStringEntryProto, TensorProto};

    fn tensor(pairs: &[(&str, &str)]) -> TensorProto {
        TensorProto {
            external_data: pairs
                .iter()
                .map(|(key, value)| StringStringEntryProto {
                    key: Some((*key).into()),
                    value: Some((*value).into()),
                })
                .collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_whole_reference_is_read() {
        let reference = Reference::parse(&tensor(&[
            ("location", "w.data"),
            ("offset", "8"),
            ("length", "4"),
        ]));
        let expected = Reference {
            location: "w.data".into(),
            offset: 8,
            length: Some(4),
        };
        assert_eq!(reference, Ok(expected));
    }

    #[test]
    fn hostile_pairs_are_refused() {
        for pairs in [
            &[("offset", "0")][..],
            &[("location", "w"), ("offset", "-1")],
            &[("location", "w"), ("length", "18446744073709551616")],
            &[("location", "w"), ("offset", "0x10")],
            &[("location", "w"), ("location", "v")],
            &[("location", "w"), ("__class__", "v")],
        ] {
            assert!(Reference::parse(&tensor(pairs)).is_err(), "{pairs:?}");
        }
    }
}

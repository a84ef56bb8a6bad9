//! The header of a safetensors file, checked before a library reads it.
//!
//! In: a file's bytes. Out: nothing, or what is wrong. The `safetensors` crate checks that the tensors
//! cover the buffer without gap or overlap and that sizes fit; what it does not is checked here: a header
//! of more than [`limits::SAFETENSORS_HEADER_BYTES`] or past the file's end, a tensor or metadata key
//! twice (it keeps the last), a header that takes many times its size in memory, sizes beyond 64 bits.

use serde::Deserialize as _;
use serde_json::Value;

use super::json;
use crate::limits;

/// Checks the header of the safetensors file whose bytes are `bytes`.
///
/// # Errors
/// What was expected, and what was found.
pub fn check_header(bytes: &[u8]) -> Result<(), (String, String)> {
    let fault = |expected: &str, found: String| Err((expected.to_owned(), found));
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return fault("a safetensors file", "fewer than 8 bytes".to_owned());
    };
    let length = u64::from_le_bytes(*length);
    if length > limits::SAFETENSORS_HEADER_BYTES {
        let expected = format!(
            "a safetensors header of at most {} bytes",
            limits::SAFETENSORS_HEADER_BYTES
        );
        return Err((expected, format!("one of {length}")));
    }
    let header = usize::try_from(length).ok().and_then(|end| rest.get(..end));
    let Some(header) = header else {
        let expected = format!("a safetensors header of {length} bytes");
        return Err((expected, format!("a file of {}", bytes.len())));
    };
    let tree = json::read_tree(header);
    let Value::Object(entries) = tree.map_err(|error| {
        let expected = "a safetensors header in JSON";
        (expected.to_owned(), error.to_string())
    })?
    else {
        return fault("a safetensors header", "no JSON object".to_owned());
    };
    for (name, entry) in entries.iter().filter(|(name, _)| *name != "__metadata__") {
        let shape = Vec::<u64>::deserialize(entry.get("shape").unwrap_or(&Value::Null));
        let elements = shape.ok().and_then(|shape| {
            let product = |all: u128, &dim: &u64| all.checked_mul(u128::from(dim));
            shape.iter().try_fold(1, product)
        });
        // No element of the format takes more than 16 bytes.
        let fits = elements.is_some_and(|elements| elements <= u128::from(u64::MAX / 16));
        if !fits {
            let name: String = name.chars().take(80).collect();
            let found = entry.get("shape").map_or("none".to_owned(), |shape| {
                shape.to_string().chars().take(80).collect()
            });
            return Err((format!("a shape of '{name}' that fits in 64 bits"), found));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn a_header_that_safetensors_writes_is_accepted() {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2], &[0; 8]);
        let bytes = safetensors::serialize([("a", view.unwrap())], None).unwrap();
        assert_eq!(check_header(&bytes), Ok(()));
    }

    #[test]
    fn a_safetensors_header_past_its_limits_is_refused() {
        let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let again = r#"{"dtype":"I32","shape":[1],"data_offsets":[0,4]}"#;
        let huge = r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}"#;
        let mut too_long = (limits::SAFETENSORS_HEADER_BYTES + 1)
            .to_le_bytes()
            .to_vec();
        too_long.resize(64, b' ');
        for (bytes, expected, found) in [
            (vec![1, 2], "a safetensors file", "fewer than 8 bytes"),
            (too_long, "at most 16777216 bytes", "one of 16777217"),
            (u64::MAX.to_le_bytes().to_vec(), "at most", "one of"),
            (
                100u64.to_le_bytes().to_vec(),
                "header of 100 bytes",
                "a file of 8",
            ),
            // The crate keeps the last of the two: the same bytes as other numbers.
            (
                file(&format!(r#"{{"a":{entry},"a":{again}}}"#), 4),
                "in JSON",
                "\"a\" twice",
            ),
            (
                file(&format!(r#"{{"a":{huge}}}"#), 4),
                "fits in 64 bits",
                "[4294967296",
            ),
            (file(r#"{"a":{}}"#, 0), "fits in 64 bits", "none"),
            (file("[]", 0), "a safetensors header", "no JSON object"),
            (file("\u{0}", 0), "in JSON", "expected value"),
        ] {
            let (e, f) = check_header(&bytes).unwrap_err();
            assert!(e.contains(expected) && f.contains(found), "{e}; {f}");
        }
    }
}

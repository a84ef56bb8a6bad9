//! DSSE: an envelope around a payload of a named type, signed.
//!
//! Source: secure-systems-lab/dsse, protocol v1.0. What is signed is the pre-authentication encoding
//! `DSSEv1 <length of type> <type> <length of payload> <payload>`, so that a payload cannot be taken for
//! one of another type.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::key::{PrivateKey, PublicKey};

/// The payload type of in-toto statements.
pub const IN_TOTO: &str = "application/vnd.in-toto+json";

/// A signed payload.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Envelope {
    /// Base64.
    payload: String,
    payload_type: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EnvelopeSignature {
    /// Base64 of the signature's DER.
    sig: String,
    #[serde(default)]
    keyid: String,
}

impl Envelope {
    /// An in-toto statement, signed by `key`; without one the envelope has no signature.
    pub fn seal(statement: &serde_json::Value, key: Option<&PrivateKey>) -> Envelope {
        let payload = statement.to_string().into_bytes();
        let signature = key.map(|key| EnvelopeSignature {
            sig: STANDARD.encode(key.sign(&pre_authentication(IN_TOTO, &payload))),
            keyid: String::new(),
        });
        Envelope {
            payload: STANDARD.encode(&payload),
            payload_type: IN_TOTO.to_owned(),
            signatures: signature.into_iter().collect(),
        }
    }

    /// The statement, whoever signed it.
    ///
    /// # Errors
    /// What is not as it should be: another payload type, no base64, no JSON.
    pub fn statement(&self) -> Result<serde_json::Value, String> {
        if self.payload_type != IN_TOTO {
            return Err(format!("payload type '{}'", self.payload_type));
        }
        let payload = STANDARD
            .decode(&self.payload)
            .map_err(|error| format!("a payload that is no base64: {error}"))?;
        crate::files::json::read_tree(&payload)
            .map_err(|error| format!("a payload that is no JSON: {error}"))
    }

    /// Whether there is a signature, and `key` made one.
    pub fn is_signed_by(&self, key: &PublicKey) -> bool {
        let Ok(payload) = STANDARD.decode(&self.payload) else {
            return false;
        };
        let message = pre_authentication(&self.payload_type, &payload);
        self.signatures.iter().any(|signature| {
            STANDARD
                .decode(&signature.sig)
                .is_ok_and(|signature| key.verifies(&message, &signature))
        })
    }
}

fn pre_authentication(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    )
    .into_bytes();
    message.extend_from_slice(payload);
    message
}

#[cfg(test)]
mod tests {
    use super::pre_authentication;

    #[test]
    fn the_encoding_is_that_of_the_protocol() {
        // The example of the DSSE specification.
        assert_eq!(
            pre_authentication("http://example.com/HelloWorld", b"hello world"),
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }
}

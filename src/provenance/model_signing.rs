//! OpenSSF Model Signing v1.0: `model.sig`, a Sigstore bundle over every file of a folder.
//!
//! Source: the specification of sigstore/model-transparency (predicate
//! `https://model_signing/signature/v1.0`) and its implementation, PyPI's model-signing 1.1, which verifies
//! what is written here (`tools/provenance/check.py`). Sigstore bundle v0.3; the key is named by the digest
//! of its PEM.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::dsse::Envelope;
use super::key::{PrivateKey, PublicKey};
use super::{Error, Resource, SIGNATURE};
use crate::files::{Sha256, Sha256Hasher};

const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const PREDICATE: &str = "https://model_signing/signature/v1.0";

/// The bundle. What it holds beside the signed payload is not signed: so nothing is let in that is not
/// understood.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Bundle {
    media_type: String,
    verification_material: VerificationMaterial,
    dsse_envelope: Envelope,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct VerificationMaterial {
    public_key: KeyIdentifier,
    /// Entries of a transparency log: Sigstore's keyless signing has them, a key has none.
    #[serde(default)]
    tlog_entries: Vec<Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyIdentifier {
    hint: String,
}

/// What a signature vouches for.
#[derive(Debug)]
pub struct Manifest {
    /// The model's name when it was signed.
    pub model: String,
    /// Every file, by name.
    pub resources: Vec<Resource>,
    envelope: Envelope,
    key_hint: String,
}

/// The signature of `key` over `resources`, sorted by name, of the model called `model`.
///
/// # Errors
/// The key cannot be encoded.
pub fn sign(model: &str, resources: &[Resource], key: &PrivateKey) -> Result<String, Error> {
    let statement = json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": model, "digest": {"sha256": root(resources)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": false,
                "ignore_paths": [SIGNATURE],
            },
            "resources": resources.iter().map(|resource| json!({
                "name": resource.name,
                "algorithm": "sha256",
                "digest": resource.sha256,
            })).collect::<Vec<_>>(),
        },
    });
    let bundle = Bundle {
        media_type: MEDIA_TYPE.to_owned(),
        verification_material: VerificationMaterial {
            public_key: KeyIdentifier {
                hint: key.public().hint()?,
            },
            tlog_entries: Vec::new(),
        },
        dsse_envelope: Envelope::seal(&statement, Some(key)),
    };
    Ok(json!(bundle).to_string())
}

/// The digest of the whole: sha256 over the files' digests, in the order of their names.
fn root(resources: &[Resource]) -> Sha256 {
    let mut hasher = Sha256Hasher::default();
    for resource in resources {
        hasher.update(resource.sha256.as_bytes());
    }
    hasher.finish()
}

/// Reads a signature. What it says is not yet known to be signed by anyone.
///
/// # Errors
/// No bundle of this form, a predicate of another version, a digest of the whole that is not that of its
/// parts.
pub fn read(path: &Path) -> Result<Manifest, Error> {
    let wrong = |expected: &str, found: String| Error::Format {
        path: path.to_owned(),
        expected: expected.to_owned(),
        found,
    };
    let bundle: Bundle = crate::bundle::read_json(path)?;
    if bundle.media_type != MEDIA_TYPE {
        return Err(wrong(MEDIA_TYPE, bundle.media_type));
    }
    let statement = bundle
        .dsse_envelope
        .statement()
        .map_err(|found| wrong("a signed in-toto statement", found))?;
    let text = |pointer: &str| statement.pointer(pointer).and_then(Value::as_str);
    if text("/predicateType") != Some(PREDICATE) {
        let found = text("/predicateType").unwrap_or("none").to_owned();
        return Err(wrong(PREDICATE, found));
    }
    if text("/predicate/serialization/method") != Some("files") {
        let found = text("/predicate/serialization/method").unwrap_or("none");
        return Err(wrong("digests of whole files", found.to_owned()));
    }
    let resources = statement.pointer("/predicate/resources").cloned();
    #[derive(Deserialize)]
    struct Signed {
        name: String,
        algorithm: String,
        digest: Sha256,
    }
    let resources: Vec<Signed> =
        serde_json::from_value(resources.unwrap_or_default()).map_err(|error| {
            wrong(
                "resources with name, algorithm and digest",
                error.to_string(),
            )
        })?;
    if let Some(other) = resources.iter().find(|signed| signed.algorithm != "sha256") {
        return Err(wrong("sha256 digests", other.algorithm.clone()));
    }
    let resources: Vec<Resource> = resources
        .into_iter()
        .map(|signed| Resource {
            name: signed.name,
            sha256: signed.digest,
        })
        .collect();
    let whole = root(&resources).to_string();
    if text("/subject/0/digest/sha256") != Some(&whole) {
        let found = text("/subject/0/digest/sha256")
            .unwrap_or("none")
            .to_owned();
        return Err(wrong(&format!("the digest of its parts, {whole}"), found));
    }
    Ok(Manifest {
        model: text("/subject/0/name").unwrap_or_default().to_owned(),
        key_hint: bundle.verification_material.public_key.hint,
        envelope: bundle.dsse_envelope,
        resources,
    })
}

impl Manifest {
    /// Whether `key` signed it.
    ///
    /// # Errors
    /// The key cannot be encoded.
    pub fn is_signed_by(&self, key: &PublicKey) -> Result<bool, Error> {
        Ok(self.key_hint == key.hint()? && self.envelope.is_signed_by(key))
    }
}

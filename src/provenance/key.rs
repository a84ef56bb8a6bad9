//! P-256 keys in PEM files: a private one (PKCS #8 or SEC 1) to sign with, a public one
//! (SubjectPublicKeyInfo) to verify with.
//!
//! Signatures are ECDSA over SHA-256, DER encoded, deterministic (RFC 6979): no random numbers, and the same
//! bytes every time.

use std::path::Path;

use p256::SecretKey;
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{Signature, SigningKey, VerifyingKey};
use p256::elliptic_curve::pkcs8::{
    DecodePrivateKey as _, DecodePublicKey as _, EncodePublicKey as _, LineEnding,
};

use super::Error;
use crate::files::{Sha256, read_text};
use crate::limits;

/// A private key.
pub struct PrivateKey(SigningKey);

/// A public key.
pub struct PublicKey(VerifyingKey);

impl PrivateKey {
    /// Reads a PEM file: PKCS #8 (`BEGIN PRIVATE KEY`) or SEC 1 (`BEGIN EC PRIVATE KEY`), not encrypted.
    ///
    /// # Errors
    /// [`Error::Key`] for any other key.
    pub fn read(path: &Path) -> Result<PrivateKey, Error> {
        let pem = read_text(path, limits::KEY_BYTES)?;
        let wrong = |found: String| Error::Key {
            path: path.to_owned(),
            expected: "an unencrypted P-256 private key in PEM",
            found,
        };
        if pem.contains("ENCRYPTED") {
            return Err(wrong("an encrypted one".into()));
        }
        let key = SecretKey::from_pkcs8_pem(&pem)
            .map_err(|error| error.to_string())
            .or_else(|first| SecretKey::from_sec1_pem(&pem).map_err(|_| first));
        Ok(PrivateKey(SigningKey::from(key.map_err(wrong)?)))
    }

    /// The signature over `message`, DER encoded.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature: Signature = self.0.sign(message);
        signature.to_der().as_bytes().to_vec()
    }

    /// The key that verifies what this one signs.
    pub fn public(&self) -> PublicKey {
        PublicKey(*self.0.verifying_key())
    }
}

impl PublicKey {
    /// Reads a PEM file (`BEGIN PUBLIC KEY`).
    ///
    /// # Errors
    /// [`Error::Key`] for any other key.
    pub fn read(path: &Path) -> Result<PublicKey, Error> {
        let pem = read_text(path, limits::KEY_BYTES)?;
        let key = VerifyingKey::from_public_key_pem(&pem).map_err(|error| Error::Key {
            path: path.to_owned(),
            expected: "a P-256 public key in PEM",
            found: error.to_string(),
        })?;
        Ok(PublicKey(key))
    }

    /// Whether `signature`, DER encoded, is this key's over `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_der(signature)
            .is_ok_and(|signature| self.0.verify(message, &signature).is_ok())
    }

    /// What signatures call the key: the digest of its PEM file as OpenSSL writes it, as model-signing 1.1
    /// does.
    ///
    /// # Errors
    /// The key cannot be encoded: it was read, so that does not happen.
    pub fn hint(&self) -> Result<String, Error> {
        let pem = self
            .0
            .to_public_key_pem(LineEnding::LF)
            .map_err(|error| Error::Key {
                path: "public key".into(),
                expected: "a key that PEM can hold",
                found: error.to_string(),
            })?;
        Ok(Sha256::of_bytes(pem.as_bytes()).to_string())
    }
}

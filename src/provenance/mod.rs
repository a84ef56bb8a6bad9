//! Where a model folder comes from, in the forms that others verify.
//!
//! In: a folder that was written by an edit, its receipt, a private key. Out: files beside the model, and
//! later the answer to whether the folder is still that one.
//!
//! - [`sums`]: `SHA256SUMS`, for `sha256sum -c`;
//! - [`model_signing`]: `model.sig`, OpenSSF Model Signing v1.0: a signature over every file;
//! - [`slsa`]: `kvw.intoto.jsonl`, an in-toto statement of what was done, as SLSA provenance v1;
//! - [`cyclonedx`]: `bom.cdx.json`, a CycloneDX 1.6 bill of materials;
//! - [`key`], [`dsse`]: P-256 keys, and the envelope that is signed;
//! - [`sign()`], [`verify()`]: all of them.
//!
//! Promises: the same folder and key give the same bytes (RFC 6979 signatures, no time); nothing that was
//! verified rests on a file that was not read; what could not be checked is said.

pub mod cyclonedx;
pub mod dsse;
mod error;
pub mod key;
pub mod model_signing;
mod sign;
pub mod slsa;
pub mod sums;
mod verify;

pub use error::Error;
pub use sign::{SignOptions, Signed, sign};
pub use verify::{Finding, Verification, verify};

use crate::files::VOUCHERS;

/// Digests of every file that is there to be vouched for.
pub const SUMS: &str = VOUCHERS[0];
/// The statement of what was done.
pub const STATEMENT: &str = VOUCHERS[1];
/// The bill of materials.
pub const BOM: &str = VOUCHERS[2];
/// The signature over the folder.
pub const SIGNATURE: &str = VOUCHERS[3];
/// One file of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Path relative to the folder, with `/`.
    pub name: String,
    /// Digest of its bytes.
    pub sha256: crate::files::Sha256,
}

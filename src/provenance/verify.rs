//! Whether a folder is still what was vouched for.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::dsse::Envelope;
use super::key::PublicKey;
use super::sign::digests;
use super::{Error, Resource, SIGNATURE, STATEMENT, SUMS, model_signing, sums};
use crate::bundle::Tree;
use crate::files::{Sha256, read_text};
use crate::limits;

/// One thing that is not as it was vouched for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of thing, for programs.
    pub code: &'static str,
    /// The file that is not as it should be.
    pub file: String,
    /// In words.
    pub message: String,
}

/// The result of a verification.
#[derive(Debug, Serialize)]
pub struct Verification {
    /// Nothing was found, and everything that was asked for was there.
    pub passed: bool,
    /// What was compared with what is there, by name of the file that vouches.
    pub checked: BTreeMap<&'static str, usize>,
    /// Whether signatures were checked against a key.
    pub signature_checked: bool,
    /// What is wrong.
    pub findings: Vec<Finding>,
}

/// Compares every file of `folder` with `SHA256SUMS` and `model.sig`, and with a `key` the signatures.
///
/// # Errors
/// Neither is there; a file that cannot be read or is not of its format.
pub fn verify(folder: &Path, key: Option<&PublicKey>) -> Result<Verification, Error> {
    let tree = Tree::of_folder(folder)?;
    let mut findings = Vec::new();
    let mut checked = BTreeMap::new();
    let present: BTreeMap<String, Sha256> = digests(&tree, |name| name != SIGNATURE)?
        .into_iter()
        .map(|Resource { name, sha256 }| (name, sha256))
        .collect();
    if let Some(entry) = tree.get(SUMS) {
        let text = read_text(&entry.path, limits::SUMS_BYTES)?;
        let resources = sums::decode(&entry.path, &text)?;
        checked.insert(SUMS, resources.len());
        let files = present.iter().filter(|(name, _)| sums::covers(name));
        compare(SUMS, &resources, files, &mut findings);
    }
    if let Some(entry) = tree.get(SIGNATURE) {
        let manifest = model_signing::read(&entry.path)?;
        checked.insert(SIGNATURE, manifest.resources.len());
        compare(
            SIGNATURE,
            &manifest.resources,
            present.iter(),
            &mut findings,
        );
        if let Some(key) = key
            && !manifest.is_signed_by(key)?
        {
            findings.push(Finding {
                code: "signature-invalid",
                file: SIGNATURE.to_owned(),
                message: "not signed by this key".to_owned(),
            });
        }
    } else if key.is_some() {
        findings.push(Finding {
            code: "signature-missing",
            file: SIGNATURE.to_owned(),
            message: "a key was given, and there is no signature".to_owned(),
        });
    }
    if let (Some(entry), Some(key)) = (tree.get(STATEMENT), key) {
        let envelope: Envelope = crate::bundle::read_json(&entry.path)?;
        if !envelope.is_signed_by(key) {
            findings.push(Finding {
                code: "statement-signature-invalid",
                file: STATEMENT.to_owned(),
                message: "not signed by this key".to_owned(),
            });
        }
    }
    if checked.is_empty() {
        return Err(Error::Format {
            path: folder.to_owned(),
            expected: format!("{SUMS} or {SIGNATURE}"),
            found: "neither".to_owned(),
        });
    }
    Ok(Verification {
        passed: findings.is_empty(),
        checked,
        signature_checked: key.is_some() && tree.get(SIGNATURE).is_some(),
        findings,
    })
}

/// Compares what `by` vouches for with the files that are there.
fn compare<'a>(
    by: &str,
    expected: &[Resource],
    present: impl Iterator<Item = (&'a String, &'a Sha256)>,
    findings: &mut Vec<Finding>,
) {
    let mut present: BTreeMap<&str, &Sha256> = present
        .map(|(name, sha256)| (name.as_str(), sha256))
        .collect();
    let mut find = |code, file: &str, message: String| {
        findings.push(Finding {
            code,
            file: file.to_owned(),
            message,
        });
    };
    for Resource { name, sha256 } in expected {
        match present.remove(name.as_str()) {
            Some(found) if found == sha256 => {}
            Some(found) => find(
                "file-changed",
                name,
                format!("{by} says sha256 {sha256}, found {found}"),
            ),
            None => find("file-missing", name, format!("{by} names it")),
        }
    }
    for name in present.into_keys() {
        find("file-unexpected", name, format!("{by} does not name it"));
    }
}

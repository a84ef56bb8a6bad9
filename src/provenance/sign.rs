//! Writes what vouches for a folder.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::dsse::Envelope;
use super::key::PrivateKey;
use super::{
    BOM, Error, Resource, SIGNATURE, STATEMENT, SUMS, cyclonedx, model_signing, slsa, sums,
};
use crate::bundle::{Bundle, Tree};
use crate::edit::{self, Receipt};
use crate::files::{FolderLock, RECEIPT, Sha256, VOUCHERS, write_atomic};

/// How a folder is signed.
#[derive(Default)]
pub struct SignOptions<'a> {
    /// Signs; without it only digests and an unsigned statement are written.
    pub key: Option<&'a PrivateKey>,
    /// What the folder was made from: compared with it, and named in the statement.
    pub original: Option<&'a Path>,
    /// Write a bill of materials too.
    pub bill: bool,
}

/// What was written.
#[derive(Debug, Serialize)]
pub struct Signed {
    /// The folder.
    pub folder: PathBuf,
    /// The files that were written in it.
    pub written: Vec<String>,
    /// Files that are vouched for.
    pub files: usize,
    /// Whether there is a signature.
    pub signed: bool,
    /// Whether the original was there to be compared.
    pub compared: bool,
}

/// Writes `SHA256SUMS`, the statement, on request the bill of materials, and with a key the signature.
/// What an earlier call wrote is replaced; the signature, which covers the others, comes last.
///
/// # Errors
/// A folder without a receipt; an original that the receipt does not fit; a file that cannot be read or
/// written.
pub fn sign(folder: &Path, options: &SignOptions<'_>) -> Result<Signed, Error> {
    let _lock = FolderLock::take(folder)?;
    let bundle = Bundle::open(folder)?;
    let receipt = Receipt::of(bundle.tree())?.ok_or_else(|| Error::NoReceipt {
        folder: folder.to_owned(),
    })?;
    if let Some(original) = options.original {
        compare(original, folder)?;
    }
    // A signature of what was there before must not stay beside what is there now.
    for name in VOUCHERS {
        match std::fs::remove_file(folder.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(crate::files::Error::io("remove", &folder.join(name))(error).into());
            }
            _ => {}
        }
    }
    let model = digests(&Tree::of_folder(folder)?, |_| true)?;
    let original = options
        .original
        .map(|original| digests(&Tree::of_folder(original)?, |_| true))
        .transpose()?;
    let mut written = Vec::new();
    let mut write = |name: &str, text: String| -> Result<(), Error> {
        write_atomic(&folder.join(name), true, |file| {
            file.write_all(text.as_bytes())
        })?;
        written.push(name.to_owned());
        Ok(())
    };
    let statement = slsa::statement(&receipt, &model, original.as_deref());
    let envelope = serde_json::json!(Envelope::seal(&statement, options.key));
    write(STATEMENT, format!("{envelope}\n"))?;
    let name = name_of(folder);
    if options.bill {
        let original = options.original.map(name_of);
        let bill = cyclonedx::bill(&name, &bundle, &receipt, &model, original.as_deref());
        write(BOM, format!("{bill:#}\n"))?;
    }
    let vouched = digests(&Tree::of_folder(folder)?, sums::covers)?;
    write(SUMS, sums::encode(folder, &vouched)?)?;
    if let Some(key) = options.key {
        let all = digests(&Tree::of_folder(folder)?, |name| name != SIGNATURE)?;
        write(SIGNATURE, model_signing::sign(&name, &all, key)?)?;
    }
    Ok(Signed {
        folder: folder.to_owned(),
        written,
        files: vouched.len(),
        signed: options.key.is_some(),
        compared: options.original.is_some(),
    })
}

/// Whether `folder` is `original` with what its receipt says, and nothing else.
fn compare(original: &Path, folder: &Path) -> Result<(), Error> {
    let report = edit::diff(original, folder)?;
    let other = |file: &str| Error::OtherOriginal {
        folder: original.to_owned(),
        file: file.to_owned(),
    };
    if let Some(file) = report.added.first().or(report.removed.first()) {
        return Err(other(file));
    }
    if let Some(range) = report.unchanged_planned_ranges.first() {
        return Err(other(&range.path));
    }
    let unplanned =
        |file: &&edit::diff::FileDiff| file.ranges.iter().any(|range| range.planned != Some(true));
    match report.changed.iter().find(unplanned) {
        Some(file) => Err(other(&file.path)),
        None if report.changed.is_empty() => Err(other(RECEIPT)),
        None => Ok(()),
    }
}

/// The digests of the files of `tree`, by name, of those that `wanted` asks for.
pub(super) fn digests(tree: &Tree, wanted: impl Fn(&str) -> bool) -> Result<Vec<Resource>, Error> {
    let entries: Vec<_> = tree
        .entries()
        .filter(|entry| wanted(&entry.relative))
        .collect();
    let paths: Vec<&Path> = entries.iter().map(|entry| entry.path.as_path()).collect();
    let digests = Sha256::of_files(&paths)?;
    let resources = entries.iter().zip(digests).map(|(entry, sha256)| Resource {
        name: entry.relative.clone(),
        sha256,
    });
    Ok(resources.collect())
}

/// The last component of a folder's path.
fn name_of(folder: &Path) -> String {
    let resolved = folder.canonicalize();
    let folder = resolved.as_deref().unwrap_or(folder);
    folder.file_name().map_or_else(
        || "model".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

//! `kvw verify`.

use std::path::PathBuf;

use clap::Args;

use super::outcome::Outcome;
use super::printer::Printer;
use crate::provenance::key::PublicKey;
use crate::provenance::{Verification, verify};

/// Check that a model folder is what was vouched for
///
/// Compares every file with SHA256SUMS and model.sig: none may be changed, missing or added. With
/// --public-key the signatures are checked too. Exit code 1 where anything is found.
#[derive(Args)]
#[command(after_help = "Example: kvw verify OUT --public-key public.pem")]
pub(super) struct Verify {
    /// A folder that `kvw sign` was run on
    folder: PathBuf,
    /// P-256 public key (PEM) that must have signed it
    #[arg(long, value_name = "FILE")]
    public_key: Option<PathBuf>,
}

impl Verify {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let key = self
            .public_key
            .as_deref()
            .map(PublicKey::read)
            .transpose()?;
        let verification = verify(&self.folder, key.as_ref())?;
        printer.result("verify", &verification, || human(&verification))?;
        Ok(match verification.passed {
            true => Outcome::Done,
            false => Outcome::Failed,
        })
    }
}

fn human(verification: &Verification) -> String {
    let mut text = String::new();
    for finding in &verification.findings {
        text += &format!("{}: {}: {}\n", finding.code, finding.file, finding.message);
    }
    for (by, files) in &verification.checked {
        text += &format!("{by}: {files} files\n");
    }
    text + match (verification.passed, verification.signature_checked) {
        (true, true) => "verified, and signed by this key",
        (true, false) => "verified; no signature was checked (--public-key)",
        (false, _) => "NOT what was vouched for",
    }
}

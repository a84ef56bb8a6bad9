//! `kvw sign`.

use std::path::PathBuf;

use clap::Args;

use super::outcome::Outcome;
use super::printer::Printer;
use crate::provenance::key::PrivateKey;
use crate::provenance::{SignOptions, sign};

/// Vouch for an unlearned model: digests, a statement of what was done, a signature
///
/// Writes into the folder: SHA256SUMS; kvw.intoto.jsonl (an in-toto statement with SLSA provenance: which bytes
/// were made from which, by which plan); with --key also model.sig (OpenSSF Model Signing v1.0, which PyPI's
/// model-signing verifies); with --bill bom.cdx.json (CycloneDX 1.6). What an earlier call wrote is replaced.
#[derive(Args)]
#[command(after_help = "Example: kvw sign OUT --key key.pem --original MODEL")]
pub(super) struct Sign {
    /// A folder that kvw wrote
    folder: PathBuf,
    /// P-256 private key (PEM, not encrypted)
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The folder that it was made from: compared first, and named in the statement with every digest
    #[arg(long, value_name = "FOLDER")]
    original: Option<PathBuf>,
    /// Write a CycloneDX bill of materials too
    #[arg(long)]
    bill: bool,
}

impl Sign {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let key = self.key.as_deref().map(PrivateKey::read).transpose()?;
        let signed = sign(
            &self.folder,
            &SignOptions {
                key: key.as_ref(),
                original: self.original.as_deref(),
                bill: self.bill,
            },
        )?;
        printer.result("sign", &signed, || {
            format!(
                "{}: {} files vouched for in {}{}",
                signed.folder.display(),
                signed.files,
                signed.written.join(", "),
                if signed.signed {
                    ""
                } else {
                    " (no key: not signed)"
                },
            )
        })?;
        Ok(Outcome::Done)
    }
}

//! `kvw man`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, CommandFactory};

use super::outcome::Outcome;
use super::printer::Printer;
use super::verbs::Cli;

/// Write the manual pages, one for each verb, into a folder
///
/// The folder is made if it is not there; pages of the same name are replaced. For the pages of one user:
/// `kvw man ~/.local/share/man/man1`.
#[derive(Args)]
pub(super) struct Man {
    /// Where to write kvw.1, kvw-apply.1, …
    folder: PathBuf,
}

impl Man {
    pub(super) fn run(&self, printer: &Printer) -> anyhow::Result<Outcome> {
        let failed = || format!("{}: cannot write manual pages", self.folder.display());
        std::fs::create_dir_all(&self.folder).with_context(failed)?;
        clap_mangen::generate_to(Cli::command(), &self.folder).with_context(failed)?;
        printer.note(&format!("manual pages are in {}", self.folder.display()));
        Ok(Outcome::Done)
    }
}

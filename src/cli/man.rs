//! `kvw man`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory};

use super::outcome::Outcome;
use super::printer::Printer;
use super::verbs::Cli;
use crate::files::write_atomic;

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
        std::fs::create_dir_all(&self.folder)
            .with_context(|| format!("{}: cannot write manual pages", self.folder.display()))?;
        let mut program = Cli::command().disable_help_subcommand(true);
        program.build();
        let verbs = program.get_subcommands().filter(|verb| !verb.is_hide_set());
        for command in [&program].into_iter().chain(verbs) {
            let page = clap_mangen::Man::new(command.clone());
            let mut text = Vec::new();
            page.render(&mut text)?;
            let path = self.folder.join(page.get_filename());
            write_atomic(&path, true, |file| file.write_all(&text))?;
        }
        printer.note(&format!("manual pages are in {}", self.folder.display()));
        Ok(Outcome::Done)
    }
}

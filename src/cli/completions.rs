//! `kvw completions`.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::outcome::Outcome;
use super::verbs::Cli;

/// Print a shell's completions on standard output
///
/// Bash: `kvw completions bash > ~/.local/share/bash-completion/completions/kvw`. Zsh: a file `_kvw` in a folder of
/// `$fpath`. Fish: `~/.config/fish/completions/kvw.fish`.
#[derive(Args)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(super) fn run(&self) -> anyhow::Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "kvw", &mut script);
        std::io::stdout().lock().write_all(&script)?;
        Ok(Outcome::Done)
    }
}

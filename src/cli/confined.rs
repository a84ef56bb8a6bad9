//! A child process that reads one file for its parent: see [`crate::confine`]. Not a verb: nobody types it.

use std::process::ExitCode;

use crate::{confine, dataset, preprocess};

/// Where this process is such a child, does its work and says how it ended. Else its own readers may run in
/// children from now on.
pub(super) fn begin() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let Some((name, budget)) = confine::asked(&arguments) else {
        if let Ok(program) = std::env::current_exe() {
            confine::enable(program);
        }
        return None;
    };
    let served = preprocess::CONFINED
        .into_iter()
        .chain([dataset::CONFINED])
        .find(|(known, _)| *known == name)
        .map(|(_, reader)| confine::serve(reader, budget));
    Some(match served {
        Some(Ok(())) => ExitCode::SUCCESS,
        _ => ExitCode::from(3),
    })
}

//! The `kvw` command: parse → run → exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    kvw::cli::main()
}

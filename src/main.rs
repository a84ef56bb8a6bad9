//! The `kvw` command.

fn main() {}

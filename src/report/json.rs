//! A verdict for programs.

use serde::Serialize;

use crate::check::Verdict;

/// The version of this form.
const SCHEMA_VERSION: u32 = 1;

#[derive(Serialize)]
struct Versioned<'v> {
    schema_version: u32,
    verb: &'static str,
    #[serde(flatten)]
    verdict: &'v Verdict,
}

/// The verdict as it is, with its `schema_version`.
pub(super) fn render(verdict: &Verdict) -> String {
    let versioned = Versioned {
        schema_version: SCHEMA_VERSION,
        verb: "check",
        verdict,
    };
    // A verdict holds strings, numbers and lists: it always serializes.
    serde_json::to_string_pretty(&versioned).unwrap_or_default()
}

//! What was done and found, for people and programs.
//!
//! In: a [`Verdict`], or a whole [`Subject`]. Out: text. A verdict is printed for a terminal, as JSON,
//! Markdown, JUnit XML, or annotations of a continuous-integration service; a subject becomes one HTML
//! page ([`page()`]) or a block for a model card ([`model_card()`]). Promise: whatever comes from a
//! file is escaped for the form that it is put into.
//!
//! A form of verdicts is one file with a `render` function, and one line in [`VERDICTS`].

mod error;
mod github;
mod human;
mod json;
mod junit;
mod limits;
mod markdown;
mod model_card;
mod number;
mod page;
mod pictures;
mod plot;
mod robustness;
mod sources;
mod subject;

pub use error::Error;
pub use model_card::model_card;
pub use page::page;
pub use pictures::Pictures;
pub use sources::Sources;
pub use subject::Subject;

use crate::check::Verdict;

/// A form that a verdict is printed in.
pub struct Renderer {
    /// Its name, as in `--format NAME`.
    pub name: &'static str,
    /// What it is for.
    pub description: &'static str,
    /// The verdict in this form.
    pub render: fn(&Verdict) -> String,
}

/// Every form.
pub const VERDICTS: &[Renderer] = &[
    Renderer {
        name: "human",
        description: "For people, on a terminal",
        render: human::render,
    },
    Renderer {
        name: "json",
        description: "One JSON object with a `schema_version`",
        render: json::render,
    },
    Renderer {
        name: "markdown",
        description: "For a job summary or a comment",
        render: markdown::render,
    },
    Renderer {
        name: "junit",
        description: "JUnit XML, one test case per check",
        render: junit::render,
    },
    Renderer {
        name: "github",
        description: "Annotations of GitHub Actions",
        render: github::render,
    },
];

/// The form called `name`.
pub fn renderer(name: &str) -> Option<&'static Renderer> {
    VERDICTS.iter().find(|renderer| renderer.name == name)
}

/// The verdict in a line.
fn headline(verdict: &Verdict) -> String {
    let count = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    format!(
        "{}: {}, {}, {}, {}",
        if verdict.passed { "PASSED" } else { "FAILED" },
        count(verdict.checks.len(), "check"),
        count(verdict.errors, "error"),
        count(verdict.warnings, "warning"),
        count(verdict.notes, "note"),
    )
}

//! The one place that prints.

use std::io::{self, Write};

use anstyle::{AnsiColor, Style};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::outcome;

/// The name of the form that results are printed in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Format(pub(super) String);

/// What every verb can print.
const FORMATS: [(&str, &str); 2] = [
    ("human", "For people"),
    ("json", "One JSON object with a `schema_version`"),
];

impl Format {
    /// Takes `human` and `json`.
    pub(super) fn parser() -> impl TypedValueParser<Value = Format> {
        Format::one_of(FORMATS)
    }

    /// Takes these names; a verb that has forms of its own overrides `--format` with it.
    pub(super) fn one_of(
        known: impl IntoIterator<Item = (&'static str, &'static str)>,
    ) -> impl TypedValueParser<Value = Format> {
        let values = known
            .into_iter()
            .map(|(name, help)| PossibleValue::new(name).help(help));
        PossibleValuesParser::new(values).map(Format)
    }

    fn is_json(&self) -> bool {
        self.0 == "json"
    }
}

/// Version of the JSON that the verbs print.
const SCHEMA_VERSION: u32 = 1;

pub(super) struct Printer {
    format: Format,
}

impl Printer {
    pub(super) fn new(format: Format) -> Printer {
        Printer { format }
    }

    /// Prints a verb's result on standard output. A reader that has gone away is not an error.
    pub(super) fn result(
        &self,
        verb: &str,
        value: &impl Serialize,
        human: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        self.text(match self.format.is_json() {
            false => human(),
            true => serde_json::to_string_pretty(&versioned(verb, serde_json::to_value(value)?))?,
        })
    }

    /// Prints a result that has its form already. A reader that has gone away is not an error.
    pub(super) fn text(&self, mut text: String) -> anyhow::Result<()> {
        if !text.ends_with('\n') {
            text.push('\n');
        }
        match anstream::stdout().write_all(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// A line on standard error. Nothing can be done where that fails.
    pub(super) fn note(&self, line: &str) {
        let _ = writeln!(anstream::stderr(), "{line}");
    }

    /// An error, its causes and hints, on standard error.
    pub(super) fn error(&self, error: &anyhow::Error) {
        let red = Style::new().bold().fg_color(Some(AnsiColor::Red.into()));
        let cyan = Style::new().bold().fg_color(Some(AnsiColor::Cyan.into()));
        let mut lines = format!("{red}error{red:#}: {error}\n");
        for cause in error.chain().skip(1) {
            lines += &format!("  caused by: {cause}\n");
        }
        for hint in outcome::hints(error) {
            lines += &format!("{cyan}hint{cyan:#}: {hint}\n");
        }
        let _ = anstream::stderr().write_all(lines.as_bytes());
    }
}

/// `value` with the version of its form and the verb in front. A value that has a version of its own
/// (a form that is also a file) keeps it.
fn versioned(verb: &str, value: serde_json::Value) -> serde_json::Value {
    let mut object = serde_json::Map::new();
    object.insert("schema_version".into(), SCHEMA_VERSION.into());
    object.insert("verb".into(), verb.into());
    if let serde_json::Value::Object(fields) = value {
        object.extend(fields);
    }
    object.into()
}

/// A table without lines, as wide as it needs.
pub(super) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row);
    }
    table.trim_fmt()
}

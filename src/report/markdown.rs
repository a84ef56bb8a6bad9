//! A verdict for a job summary or a comment.

use crate::check::Verdict;

/// A headline and a table.
pub(super) fn render(verdict: &Verdict) -> String {
    let mut text = format!(
        "### kvw check: {}\n\n`{}`",
        escape(&super::headline(verdict)),
        code(&verdict.folder)
    );
    if !verdict.policy.is_empty() {
        text += &format!(" against `{}`", code(&verdict.policy));
    }
    text += "\n\n| | check | |\n|---|---|---|\n";
    for check in &verdict.checks {
        let state = check
            .severity()
            .map_or_else(|| "ok".to_owned(), |severity| format!("**{severity}**"));
        let mut cell = escape(&check.summary);
        for judged in &check.findings {
            cell += &format!(
                "<br>`{}`: {}",
                judged.finding.code,
                escape(&judged.finding.message)
            );
        }
        text += &format!("| {state} | {} | {cell} |\n", escape(&check.check));
    }
    text
}

/// Text in which no character of Markdown, or of the HTML in it, means anything, on one line.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            '\\' | '`' | '*' | '_' | '{' | '}' | '[' | ']' | '#' | '|' | '~' | '!' | '@' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Text between backticks: it must have none, nor end the table's cell.
pub(super) fn code(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '`' | '|' => '\'',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}

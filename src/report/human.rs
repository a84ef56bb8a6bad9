//! A verdict for a terminal.

use anstyle::{AnsiColor, Style};

use crate::check::{Severity, Verdict};

/// One line per check, and below it what it found. The style goes away where it is not wanted.
pub(super) fn render(verdict: &Verdict) -> String {
    let mut text = String::new();
    let width = verdict
        .checks
        .iter()
        .map(|check| check.check.chars().count())
        .max()
        .unwrap_or(0);
    for check in &verdict.checks {
        let state = check.severity();
        let style = style(state);
        let word = state.map_or_else(|| "ok".to_owned(), |severity| severity.to_string());
        text += &format!(
            "{style}{word:7}{style:#}  {:width$}  {}\n",
            check.check,
            line(&check.summary)
        );
        for judged in &check.findings {
            text += &format!(
                "         {:width$}  {}: {}\n",
                "",
                judged.finding.code,
                line(&judged.finding.message)
            );
        }
    }
    let bold = style_of_end(verdict.passed);
    text + &format!("\n{bold}{}{bold:#}\n", super::headline(verdict))
}

/// What a file says must not move the cursor.
fn line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn style(severity: Option<Severity>) -> Style {
    let color = match severity {
        None => AnsiColor::Green,
        Some(Severity::Error) => AnsiColor::Red,
        Some(Severity::Warning) => AnsiColor::Yellow,
        Some(Severity::Note | Severity::Off) => AnsiColor::Cyan,
    };
    Style::new().fg_color(Some(color.into()))
}

fn style_of_end(passed: bool) -> Style {
    let color = match passed {
        true => AnsiColor::Green,
        false => AnsiColor::Red,
    };
    Style::new().bold().fg_color(Some(color.into()))
}

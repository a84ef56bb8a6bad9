//! A verdict as annotations of GitHub Actions.
//!
//! One [workflow command](https://docs.github.com/actions/reference/workflow-commands-for-github-actions)
//! a finding. A finding that a line of the policy asked for is put there.

use crate::check::{Severity, Verdict};

/// The commands, and a headline that is none.
pub(super) fn render(verdict: &Verdict) -> String {
    let mut text = String::new();
    for (check, judged) in verdict.findings() {
        let command = match judged.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Note | Severity::Off => "notice",
        };
        let mut properties = Vec::new();
        if let Some(line) = judged.finding.policy_line {
            properties.push(format!("file={}", property(&verdict.policy)));
            properties.push(format!("line={line}"));
        }
        let code = judged.finding.code;
        properties.push(format!("title={}", property(&format!("kvw {code}"))));
        text += &format!(
            "::{command} {}::{} ({})\n",
            properties.join(","),
            data(&judged.finding.message),
            data(&check.check)
        );
    }
    text + &format!("kvw check {}\n", data(&super::headline(verdict)))
}

fn data(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

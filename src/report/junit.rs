//! A verdict as JUnit XML: one test case per check.

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};

use crate::check::{Severity, Verdict};

/// A check with an error is a failed test case; warnings and notes go to its output.
pub(super) fn render(verdict: &Verdict) -> String {
    let mut suite = TestSuite::new(format!("kvw check {}", verdict.folder));
    for check in &verdict.checks {
        let lines = |error: bool| -> Vec<String> {
            check
                .findings
                .iter()
                .filter(|judged| (judged.severity == Severity::Error) == error)
                .map(|judged| {
                    format!(
                        "{}: {}: {}",
                        judged.severity, judged.finding.code, judged.finding.message
                    )
                })
                .collect()
        };
        let errors = lines(true);
        let mut status = match errors.is_empty() {
            true => TestCaseStatus::success(),
            false => TestCaseStatus::non_success(NonSuccessKind::Failure),
        };
        if let Some(first) = check
            .findings
            .iter()
            .find(|judged| judged.severity == Severity::Error)
        {
            status
                .set_type(first.finding.code.as_str())
                .set_message(first.finding.message.as_str())
                .set_description(errors.join("\n"));
        }
        let name = format!("{}: {}", check.check, check.summary);
        let mut case = TestCase::new(name, status);
        case.set_classname("kvw.check");
        let others = lines(false);
        if !others.is_empty() {
            case.set_system_out(others.join("\n"));
        }
        suite.add_test_case(case);
    }
    let mut report = Report::new("kvw");
    report.add_test_suite(suite);
    // Writing to memory does not fail.
    report.to_string().unwrap_or_default()
}

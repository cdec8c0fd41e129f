//! `aitools ci`.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use serde_json::json;

use crate::base::fs;
use crate::cli::args;
use crate::cli::exit;
use crate::cli::failure::ErrorReport;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::Failure;
use crate::ops::ci::{self, Check, Stage};
use crate::ops::test::Outcome;

/// # Errors
/// When a report cannot be written, or the user asked to stop. A check that fails does not stop those that can go on.
pub fn run(ask: &args::Ci, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let checks = ci::run(&host, &project, ask.reproduce, &mut |check| tell(check, output))?;
    let count = |outcome| checks.iter().filter(|check| check.outcome == outcome).count();
    let (passed, failed, skipped) = (count(Outcome::Passed), count(Outcome::Failed), count(Outcome::Skipped));
    output.say(&format!("{passed} passed, {failed} failed, {skipped} skipped"));
    if let Some(path) = &ask.junit {
        fs::write_atomic(&session.cwd.join(path), junit(&checks).as_bytes())?;
    }
    if let Some(path) = &ask.markdown {
        fs::append(&session.cwd.join(path), markdown(&checks).as_bytes())?;
    }
    output.result("ci", failed == 0, &json!({ "checks": checks }));
    Ok(checks.iter().find(|check| check.outcome == Outcome::Failed).map_or(exit::DONE, code))
}

/// The exit code of a check that failed: that of the command of its stage.
fn code(check: &Check) -> u8 {
    match (&check.failure, check.stage) {
        (Some(failure), _) => ErrorReport::of(failure).exit_code,
        (None, Stage::Reproduce) => exit::NOT_REPRODUCED,
        (None, _) => exit::CONDITION,
    }
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed => "FAILED",
        Outcome::Skipped => "skipped",
    }
}

fn tell(check: &Check, output: &Output) {
    let Check { stage, name, outcome, seconds, reasons, failure } = check;
    output.say(&format!("{} {name}: {} ({seconds:.1} s)", stage.as_str(), word(*outcome)));
    match failure {
        Some(failure) => output.say(ErrorReport::of(failure).to_text(false).trim_end()),
        None => reasons.iter().for_each(|reason| output.say(&format!("  {reason}"))),
    }
}

/// The report that CI systems show: one suite for each stage.
fn junit(checks: &[Check]) -> String {
    let mut report = Report::new("aitools");
    for stage in checks.iter().map(|check| check.stage).collect::<Vec<_>>().chunk_by(|one, other| one == other) {
        let mut suite = TestSuite::new(stage[0].as_str());
        for check in checks.iter().filter(|check| check.stage == stage[0]) {
            let why = check.reasons.join("\n");
            let mut status = match check.outcome {
                Outcome::Passed => TestCaseStatus::success(),
                Outcome::Failed => TestCaseStatus::non_success(NonSuccessKind::Failure),
                Outcome::Skipped => TestCaseStatus::skipped(),
            };
            if !why.is_empty() {
                status.set_message(why);
            }
            let mut case = TestCase::new(check.name.as_str(), status);
            case.set_classname(format!("aitools.{}", check.stage.as_str()));
            case.set_time(Duration::from_secs_f64(check.seconds));
            suite.add_test_case(case);
        }
        report.add_test_suite(suite);
    }
    report.to_string().unwrap_or_default()
}

/// A table for a pipeline's summary page.
fn markdown(checks: &[Check]) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ").replace('<', "&lt;");
    let row = |check: &Check| {
        let Check { stage, name, outcome, seconds, reasons, .. } = check;
        let why = cell(&reasons.join("; "));
        format!("| {} | {} | {} | {seconds:.1} | {why} |\n", stage.as_str(), cell(name), word(*outcome))
    };
    let head = "| check | of | outcome | seconds | why |\n|---|---|---|---:|---|\n";
    std::iter::once(head.to_owned()).chain(checks.iter().map(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(stage: Stage, name: &str, outcome: Outcome, reason: &str) -> Check {
        let reasons = if reason.is_empty() { Vec::new() } else { vec![reason.to_owned()] };
        Check { stage, name: name.to_owned(), outcome, seconds: 1.5, reasons, failure: None }
    }

    #[test]
    fn reports_hold_every_check_and_nothing_breaks_out_of_them() {
        let hostile = "the answer lacks \"a\": \"<b> | & ]]>\"\nx";
        let checks = [
            check(Stage::Lock, "default", Outcome::Passed, ""),
            check(Stage::Test, "p", Outcome::Failed, hostile),
            check(Stage::Test, "q", Outcome::Skipped, "it has no `smoke`"),
        ];
        let xml = junit(&checks);
        assert!(xml.contains("<testsuite name=\"test\" tests=\"2\"") && xml.contains("failures=\"1\""), "{xml}");
        assert!(xml.contains("&lt;b&gt;") && !xml.contains("<b>"), "{xml}");
        let table = markdown(&checks);
        assert_eq!(table.lines().count(), 5, "{table}");
        assert!(table.contains("&lt;b> \\| & ]]>"), "{table}");
        assert_eq!((code(&checks[1]), code(&check(Stage::Reproduce, "e", Outcome::Failed, ""))), (1, 6));
    }
}

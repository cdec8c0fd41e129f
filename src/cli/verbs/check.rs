//! `aitools check`.

use serde_json::json;

use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::cli::args;
use crate::cli::failure::Problem;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::lock;
use crate::ops::{Failure, check};

/// # Errors
/// Every problem of every policy at once, or a lockfile that is out of date.
pub fn run(ask: &args::Check, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let mut project = super::load(session, output)?;
    let asked = ask.policies.iter().map(|asked| project.include(asked, &session.cwd));
    let policies = asked.collect::<Result<Vec<_>, _>>()?;
    let host = session.host(&project.root, None)?;
    let checked = check::run(&host, &project, &policies)?;
    let problems: Vec<Diagnostic> = checked.iter().flat_map(|policy| policy.problems.clone()).collect();
    let problems = Diagnostics(problems);
    if problems.has_errors() {
        return Err(problems.into());
    }
    output.warnings(&problems.0);
    for policy in &checked {
        let depth =
            if policy.weights_checked { "model file checked" } else { "model not downloaded: run `aitools sync`" };
        output.say(&format!("policy {}: OK ({depth})", policy.policy));
    }
    lock::require_current(&host, &project)?;
    if checked.is_empty() {
        output.say("the manifest and its lockfile are OK; the manifest includes no policies");
    }
    let warnings: Vec<Problem> = problems.0.iter().map(Problem::from).collect();
    output.result("check", true, &json!({ "policies": checked, "warnings": warnings }));
    Ok(0)
}

//! `aitools test`.

use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::failure::ErrorReport;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::Failure;
use crate::ops::test::{self, Golden, Outcome, Tested};

/// # Errors
/// See [`test::run`]. A policy that fails does not stop the others.
pub fn run(ask: &args::Test, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let mut project = super::load(session, output)?;
    let asked = ask.policies.iter().map(|asked| project.include(asked, &session.cwd));
    let policies = asked.collect::<Result<Vec<_>, _>>()?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let golden = match (ask.golden, ask.record_golden) {
        (true, _) => Golden::Compare,
        (_, true) => Golden::Record,
        (false, false) => Golden::Ignore,
    };
    let tested = test::run(&host, &project, &policies, golden, &mut |tested| tell(tested, output))?;
    let count = |outcome| tested.iter().filter(|tested| tested.outcome == outcome).count();
    let (passed, failed, skipped) = (count(Outcome::Passed), count(Outcome::Failed), count(Outcome::Skipped));
    output.say(&format!("{passed} passed, {failed} failed, {skipped} skipped"));
    let ok = failed == 0 && passed > 0;
    if passed + failed == 0 {
        output.say("no policy has a `smoke`: see `docs/policy.md`");
    }
    output.result("test", ok, &json!({ "policies": tested }));
    // That of the first policy that gave no answer, or of a condition that is false.
    let first = tested.iter().find_map(|tested| tested.failure.as_ref());
    let failed = first.map_or(exit::CONDITION, |failure| ErrorReport::of(failure).exit_code);
    Ok(if ok { exit::DONE } else { failed })
}

fn tell(tested: &Tested, output: &Output) {
    let name = &tested.policy;
    match tested.outcome {
        Outcome::Passed => {
            let metrics = tested.metrics.as_ref();
            let seconds = metrics.map_or(0.0, |metrics| metrics.total_ms / 1000.0);
            let rate = metrics.and_then(|metrics| metrics.tokens_per_second);
            let rate = rate.map_or(String::new(), |rate| format!(", {rate:.1} tokens/s"));
            output.say(&format!("policy {name}: passed ({seconds:.1} s{rate})"));
        }
        Outcome::Skipped => output.say(&format!("policy {name}: skipped: {}", tested.reasons.join(", "))),
        Outcome::Failed => output.say(&format!("policy {name}: FAILED")),
    }
    match &tested.failure {
        Some(failure) => output.say(ErrorReport::of(failure).to_text(false).trim_end()),
        None if tested.outcome == Outcome::Failed => {
            tested.reasons.iter().for_each(|reason| output.say(&format!("  {reason}")));
        }
        None => {}
    }
    if let Some(path) = &tested.recorded {
        output.say(&format!("  wrote `{}`", path.display()));
    }
}

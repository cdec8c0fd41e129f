//! `aitools status`.

use crate::cli::args;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{differences, proven, size, stale_line, step_line};
use crate::ops::status::{self, Status, Why, WhyBuild, WhyDerived};
use crate::ops::{Failure, project};

/// # Errors
/// See [`status::run`] and [`status::why`].
pub fn run(ask: &args::Status, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    if let Some(engine) = &ask.why {
        let why = status::why(&host, &project, engine)?;
        output.text(&why.iter().map(why_text).collect::<String>());
        output.result("status", true, &why);
        return Ok(0);
    }
    let status = status::run(&host, &project)?;
    host.store.save_records()?;
    output.text(&output.complete(&text(&status, &project)));
    output.result("status", true, &status);
    Ok(0)
}

fn entries(count: usize) -> String {
    if count == 1 { "1 entry".to_owned() } else { format!("{count} entries") }
}

fn text(status: &Status, project: &project::Project) -> String {
    let mut text = format!("manifest  {}\n", project::shown(&status.manifest, &project.root));
    match &status.stale {
        None => text += "lockfile  missing: run `aitools lock`\n",
        Some(stale) if stale.is_empty() => text += "lockfile  up to date\n",
        Some(stale) => {
            text += &format!("lockfile  out of date ({}): run `aitools lock`\n", entries(stale.len()));
            text.extend(stale.iter().map(|entry| format!("            {}\n", stale_line(entry))));
        }
    }
    for engine in &status.engines {
        let built = if engine.built { "built" } else { "not built" };
        let fingerprint = engine.fingerprint.short();
        text +=
            &format!("engine    {} ({}) {built}, {fingerprint}, from {}\n", engine.name, engine.variant, engine.source);
    }
    for model in &status.models {
        let main = model.main.as_deref().unwrap_or("source for derived models");
        let size = if model.files == 0 { "size unknown".to_owned() } else { size(model.size_bytes) };
        text += &format!("model     {} {}, {size}, {main}\n", model.name, model.state.as_str());
    }
    for policy in &status.policies {
        let state = if policy.ready { "ready" } else { "not ready" };
        text += &format!("policy    {} {state}, on {}\n", policy.name, policy.engine);
        text += &proven(&policy.proven);
    }
    if !status.steps.is_empty() {
        text += "to do     run `aitools sync` to\n";
        text.extend(status.steps.iter().map(|step| format!("            {}\n", step_line(step))));
    }
    text
}

fn why_text(why: &Why) -> String {
    match why {
        Why::Build(why) => why_built(why),
        Why::Derived(why) => why_derived(why),
    }
}

fn why_built(why: &WhyBuild) -> String {
    let mut text = format!("engine {} ({}), {}\n", why.engine, why.variant, why.fingerprint.short());
    match (why.built, &why.other) {
        (true, None) => text += "  built; nothing has changed\n",
        (true, Some(other)) => {
            text += &format!("  built; the project still uses {}, which had these inputs:\n", other.short())
        }
        (false, None) => text += "  never built on this machine\n",
        (false, Some(other)) => {
            text += &format!("  must be built; changes since the last build ({}):\n", other.short())
        }
    }
    text + &differences(&why.differences)
}

fn why_derived(why: &WhyDerived) -> String {
    let mut text = format!("model {}, {}\n", why.model, why.fingerprint.short());
    match (why.derived, &why.other) {
        (true, _) => text += "  derived; nothing has changed\n",
        (false, None) => text += "  never derived on this machine\n",
        (false, Some(other)) => {
            text += &format!("  must be derived; changes since the last derivation ({}):\n", other.short())
        }
    }
    text + &differences(&why.differences)
}

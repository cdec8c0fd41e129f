//! `aitools sync`.

use crate::cli::args;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{counted, step_line};
use crate::ops::sync::{self, Ask, Synced};
use crate::ops::{Failure, project};

/// # Errors
/// See [`sync::run`].
pub fn run(ask: &args::Sync, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let mode = session.lock_mode(&ask.lock, &project.root)?.value;
    let synced = sync::run(&host, &project, &Ask { policies: &ask.policies, mode, dry_run: ask.dry_run })?;
    tell(&synced, &project, output);
    output.result("sync", true, &synced);
    Ok(0)
}

/// Prints what was done, or would be done.
pub fn tell(synced: &Synced, project: &project::Project, output: &Output) {
    if let Some(locked) = &synced.locked {
        super::lock::tell(locked, &project::shown(&project.lock_path, &project.root), output);
    }
    if synced.plan.is_empty() {
        output.say("everything is up to date");
    } else if synced.dry_run {
        for step in &synced.plan.steps {
            output.say(&format!("would {}", step_line(step)));
        }
    } else {
        output.say(&format!("synced ({})", counted(synced.plan.steps.len(), "step")));
    }
}

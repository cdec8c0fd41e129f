//! `aitools sync`.

use crate::cli::args;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::sync::{self, Ask, Synced};
use crate::ops::{Failure, project};
use crate::plan::{Reason, Step};

use super::size;

/// # Errors
/// See [`sync::run`].
pub fn run(ask: &args::Sync, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = session.project(output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let mode = session.lock_mode(&ask.lock, &session.settings(&project.root)?);
    let synced = sync::run(&host, &project, &Ask { policies: &ask.policies, mode, dry_run: ask.dry_run })?;
    tell(&synced, &project, output);
    output.result("sync", true, &synced);
    Ok(0)
}

/// Says what was done, or would be.
pub fn tell(synced: &Synced, project: &project::Project, output: &Output) {
    if let Some(locked) = &synced.locked {
        super::lock::tell(locked, &project::shown(&project.lock_path, &project.root), output);
    }
    if synced.plan.is_empty() {
        output.say("everything is in place");
    } else if synced.dry_run {
        for step in &synced.plan.steps {
            output.say(&format!("would {}", step_line(step)));
        }
    } else {
        output.say(&format!("synced: {} steps", synced.plan.steps.len()));
    }
}

/// A step as a phrase: `build llama-cpp (cpu)`.
pub fn step_line(step: &Step) -> String {
    let files = |count: usize| if count == 1 { "1 file".to_owned() } else { format!("{count} files") };
    match step {
        Step::FetchTool { name, .. } => format!("fetch tool {name}"),
        Step::FetchSource { engine, .. } => format!("fetch the source of {engine}"),
        Step::Build { engine, variant, .. } => format!("build {engine} ({variant})"),
        Step::LinkBuild { engine, .. } => format!("link build/{engine}"),
        Step::Hash { model, files: which, bytes, .. } => {
            format!("hash {} of {model} ({})", files(which.len()), size(*bytes))
        }
        Step::FetchWeights { model, files: which, bytes, .. } => {
            format!("fetch {} of {model} ({})", files(which.len()), size(*bytes))
        }
        Step::Place { model, files: which, reason, .. } => {
            let why = if *reason == Reason::NotLinked { " in this project" } else { "" };
            format!("place {} of {model}{why}", files(which.len()))
        }
        Step::Derive { model, from, engine, how, .. } => {
            let from: Vec<&str> = from.iter().map(|name| name.as_str()).collect();
            format!("derive {model} from {} ({how}, with {engine})", from.join(" and "))
        }
    }
}

//! `aitools lock`.

use serde_json::json;

use crate::cli::args;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::lock::{self, Change, Locked, Upgrade};
use crate::ops::{Failure, project};

/// # Errors
/// See [`lock::run`].
pub fn run(ask: &args::Lock, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let shown = project::shown(&project.lock_path, &project.root);
    let host = session.host(&project.root, None)?;
    if ask.check {
        lock::require_current(&host, &project)?;
        output.say(&format!("`{shown}` is up to date"));
        output.result("lock", true, &json!({ "lockfile": shown, "changes": [], "written": false }));
        return Ok(0);
    }
    let upgrade = match &ask.upgrade {
        None => Upgrade::None,
        Some(names) if names.is_empty() => Upgrade::All,
        Some(names) => Upgrade::Names(names.iter().cloned().collect()),
    };
    let locked = lock::run(&host, &project, &upgrade, ask.resolve_conflicts)?;
    host.store.save_records()?;
    tell(&locked, &shown, output);
    output.result("lock", true, &json!({ "lockfile": shown, "changes": locked.changes, "written": locked.written }));
    Ok(0)
}

/// Prints what changed in the lockfile.
pub fn tell(locked: &Locked, shown: &str, output: &Output) {
    for change in &locked.changes {
        output.say(&line(change));
    }
    if locked.written {
        output.say(&format!("wrote `{shown}`"));
    } else {
        output.say(&format!("`{shown}` is up to date"));
    }
}

fn line(Change { kind, name, from, to }: &Change) -> String {
    let kind = kind.as_str();
    match (from, to) {
        (None, Some(to)) => format!("+ {kind} {name} {to}"),
        (Some(from), None) => format!("- {kind} {name} {from}"),
        (Some(from), Some(to)) => format!("~ {kind} {name} {from} -> {to}"),
        (None, None) => format!("  {kind} {name}"),
    }
}

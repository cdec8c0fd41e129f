//! Installs an engine whose source and tools are in the store: an artifact with its receipt.

use std::time::Instant;

use crate::base::fs;
use crate::format::lockfile::Origin;
use crate::format::receipt::{self, Receipt};
use crate::source::{SourceError, git};

use super::demand::EngineDemand;
use super::install::Folders;
use super::{Failure, Host, Outcome, Project};

/// Gives the project's own submodule of an engine, when it has one, the commit that was built. It is for people to read: the
/// build does not need it, so its trouble is a warning.
///
/// # Errors
/// When the user asked to stop.
pub fn populate_submodule(host: &Host, project: &Project, engine: &EngineDemand<'_>) -> Result<(), Failure> {
    let Origin::Git { request, pin } = &engine.entry.origin else { return Ok(()) };
    let Some(submodule) = &request.submodule else { return Ok(()) };
    let dest = submodule.under(&project.root);
    match git::populate_submodule(&host.world(project), request, pin, &dest) {
        Ok(_) => Ok(()),
        Err(SourceError::Cancelled(error)) => Err(error.into()),
        Err(error) => {
            host.task.warn(format!("`{submodule}` is not checked out: {error}"));
            Ok(())
        }
    }
}

/// Builds an engine and installs it, unless somebody else did meanwhile. Outdated when its source or a tool of it is damaged
/// in the store.
///
/// # Errors
/// The build's or the store's; nothing is half-installed then.
pub fn build(host: &Host, engine: &EngineDemand<'_>) -> Result<Outcome, Failure> {
    let (required, task) = (&engine.required, &host.task);
    let waiting = || task.waiting(format!("another aitools is building `{}`", required.name));
    let _held = host.store.lock(&format!("build-{}", required.fingerprint.hex()), task.cancel(), waiting)?;
    host.store.reload_records();
    if host.store.artifact(&required.fingerprint)?.is_some() {
        return Ok(Outcome::Done);
    }
    let Some(tree) = host.store.confirm_tree(&required.tree, task.cancel())? else {
        host.store.remove_tree(&required.tree)?;
        return Ok(Outcome::Outdated);
    };
    let (work, prefix, logs) = (host.store.stage()?, host.store.stage()?, host.store.logs());
    fs::create_dir_all(&logs)?;
    let log = logs.join(format!("{}-{}-{}.log", required.name, required.variant, required.fingerprint.short()));
    let folders = Folders { source: &tree, work: work.path(), prefix: prefix.path(), log: &log, again: false };
    let began = Instant::now();
    let label = format!("{} ({})", required.name, required.variant);
    let Some(built) = engine.installation.install(host, &label, &folders)? else { return Ok(Outcome::Outdated) };
    for warning in &built.warnings {
        task.warn(format!("engine `{}`: {warning}", required.name));
    }
    let mut notes = built.notes;
    notes.insert("seconds".to_owned(), began.elapsed().as_secs().to_string());
    let receipt = Receipt {
        version: receipt::VERSION,
        engine: required.name.clone(),
        variant: required.variant,
        fingerprint: required.fingerprint,
        inputs: engine.inputs.clone(),
        files: built.files,
        notes,
    };
    host.store.install(&prefix, &receipt)?;
    host.store.save_records()?;
    Ok(Outcome::Done)
}

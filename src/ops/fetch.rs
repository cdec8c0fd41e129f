//! Brings what is locked into the store: sources, tools, weights. The only place of `ops` that asks a source for bytes.

use std::path::PathBuf;

use crate::base::digest::Digest;
use crate::base::lock::Lock;
use crate::base::name::Name;
use crate::format::lockfile::{FilePin, FilesOrigin, ModelPin};
use crate::format::manifest::Kind;
use crate::plan::PackageRequirement;
use crate::report::{Task, Unit, Verb};
use crate::source::{self, Fetched, SourceError, World};
use crate::store::StoreError;

use super::demand::{EngineDemand, ModelDemand};
use super::{Failure, Host, Project};

/// Brings a package of `[tools]` into the store, unless somebody else did meanwhile.
///
/// # Errors
/// The source's or the store's.
pub fn package(host: &Host, project: &Project, required: &PackageRequirement) -> Result<(), Failure> {
    let PackageRequirement { name, request, package } = required;
    let _held = hold(host, "tool", &package.sha256, &format!("tool `{name}`"))?;
    if host.store.tool(&package.sha256, true, host.task.cancel())?.is_some() {
        return Ok(());
    }
    let staging = host.store.stage()?;
    let fetched = fetch(host, project, &host.task, (Kind::Tool, name), |world| {
        request.fetch_package(world, package, staging.path())
    })?;
    host.store.admit_tool(&staging, &fetched.modes, &package.sha256, host.task.cancel())?;
    Ok(())
}

/// Brings the source tree of an engine into the store, unless somebody else did meanwhile.
///
/// # Errors
/// The source's or the store's.
pub fn tree(host: &Host, project: &Project, engine: &EngineDemand<'_>) -> Result<(), Failure> {
    let (name, tree) = (&engine.required.name, engine.required.tree);
    let _held = hold(host, "tree", &tree, &format!("source of `{name}`"))?;
    if host.store.confirm_tree(&tree, host.task.cancel())?.is_some() {
        return Ok(());
    }
    let staging = host.store.stage()?;
    let fetched = fetch(host, project, &host.task, (Kind::Engine, name), |world| {
        source::fetch_tree(&engine.entry.origin, world, &tree, staging.path())
    })?;
    let progress = host.task.start(Verb::Verify, format!("{name} source"), None, Unit::None);
    let (modes, what) = (&fetched.modes, format!("source of engine `{name}`"));
    let admitted = host.store.admit_tree(&staging, modes, &tree, &what, host.task.cancel());
    admitted.map_err(|error| mismatch(project, Kind::Engine, name, error))?;
    progress.finish("");
    Ok(())
}

/// Brings files of a model into the store and places them, unless somebody else did meanwhile. `files` are positions in the
/// list of the model's files.
///
/// # Errors
/// The source's or the store's.
pub fn weights(
    host: &Host,
    project: &Project,
    model: &ModelDemand<'_>,
    task: &Task,
    files: &[usize],
) -> Result<(), Failure> {
    let name = &model.required.name;
    let (origin, first) = fetched_from(model)?;
    let _held = hold(host, "weights", first, &format!("weights of `{name}`"))?;
    // Somebody else may have fetched them while this process waited. What is there is hashed before it is fetched again.
    host.store.reload_records();
    let mut missing: Vec<&FilePin> = Vec::new();
    for pin in files.iter().map(|index| &model.required.files[*index]) {
        if !host.store.confirm(&host.store.blob_path(&pin.sha256), pin, &mut host.stopping())? {
            missing.push(pin);
        }
    }
    if !missing.is_empty() {
        let staging = host.store.stage()?;
        fetch(host, project, task, (Kind::Model, name), |world| {
            source::fetch_files(origin, world, &missing, staging.path())
        })?;
        for pin in missing {
            let what = format!("weights file `{}`", pin.path);
            let admitted = host.store.admit_blob(&pin.path.under(staging.path()), pin, &what, &mut host.stopping());
            admitted.map_err(|error| mismatch(project, Kind::Model, name, error))?;
        }
        host.store.save_records()?;
    }
    files.iter().try_for_each(|index| place(host, project, model, *index))
}

/// Files of other caches that a later fetch of this model may use, each with what it should be.
pub fn copies(host: &Host, project: &Project, model: &ModelDemand<'_>) -> Vec<(PathBuf, FilePin)> {
    let ModelPin::Files { origin, .. } = &model.entry.pin else { return Vec::new() };
    let files: Vec<&FilePin> = model.required.files.iter().collect();
    source::copies(origin, &host.world(project), &files)
}

/// Where the files of a model are fetched from, and the digest of the first. The plan fetches no files of a derived model.
fn fetched_from<'a>(model: &ModelDemand<'a>) -> Result<(&'a FilesOrigin, &'a Digest), Failure> {
    match &model.entry.pin {
        ModelPin::Files { origin, files } if !files.is_empty() => Ok((origin, &files[0].sha256)),
        ModelPin::Files { .. } | ModelPin::Derived { .. } => {
            let what = format!("model `{}` has no files that can be fetched", model.required.name);
            Err(Failure::Usage { what, hint: Some("run `aitools lock`".to_owned()) })
        }
    }
}

/// Puts a file of a model, which is in the store, where the project has it.
///
/// # Errors
/// The store's.
pub fn place(host: &Host, project: &Project, model: &ModelDemand<'_>, index: usize) -> Result<(), Failure> {
    let pin = &model.required.files[index];
    let to = model.required.places[index].under(&project.root);
    Ok(host.store.place(&host.store.blob_path(&pin.sha256), &to, pin.sha256)?)
}

/// Where fetching those files of a model takes space, and how much in bytes.
///
/// # Errors
/// The source's.
pub fn space(world: &World, model: &ModelDemand<'_>, files: &[usize]) -> Result<(PathBuf, u64), Failure> {
    let files: Vec<&FilePin> = files.iter().map(|index| &model.required.files[*index]).collect();
    let space = source::space(fetched_from(model)?.0, world, &files);
    space.map_err(|error| Failure::source(Kind::Model, &model.required.name, error, None))
}

/// Lets a source bring what is pinned; an error gets the line of the entry in the lockfile.
fn fetch(
    host: &Host,
    project: &Project,
    task: &Task,
    (kind, name): (Kind, &Name),
    bring: impl FnOnce(&World) -> Result<Fetched, SourceError>,
) -> Result<Fetched, Failure> {
    let fetched = bring(&World { task: task.clone(), ..host.world(project) });
    let fetched = fetched.map_err(|error| Failure::source(kind, name, error, project.lock_line(name)))?;
    fetched.hashed.iter().for_each(|hashed| host.store.records().learn(hashed));
    Ok(fetched)
}

/// Holds the lock for what a digest names.
fn hold(host: &Host, what: &str, digest: &Digest, shown: &str) -> Result<Lock, Failure> {
    let waiting = || host.task.waiting(format!("another aitools is working on the {shown}"));
    Ok(host.store.lock(&format!("{what}-{}", digest.hex()), host.task.cancel(), waiting)?)
}

/// What was fetched is not what the lockfile says.
fn mismatch(project: &Project, kind: Kind, name: &Name, error: StoreError) -> Failure {
    Failure::Integrity { kind, name: name.clone(), error, lock_line: project.lock_line(name) }
}

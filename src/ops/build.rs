//! The engine side of `sync`: tools and source into the store, a build, an artifact with its receipt.

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::base::fs;
use crate::base::name::Name;
use crate::build::{self, BuildRequest, Built};
use crate::format::lockfile::{FilePin, Origin};
use crate::format::manifest::Kind;
use crate::format::receipt::{self, Receipt};
use crate::report::Unit;
use crate::source::{self, SourceError, git};

use super::demand::{Demand, EngineDemand, located};
use super::sync::{fetch, hold, integrity};
use super::{Failure, Host, Project};

/// Brings a build tool's package for this platform into the store, unless somebody else did meanwhile.
///
/// # Errors
/// What the source or the store said.
pub fn fetch_tool(host: &Host, project: &Project, demand: &Demand<'_>, name: &Name) -> Result<(), Failure> {
    let mut packages = demand.engines.iter().flat_map(|engine| &engine.wish.tools);
    let Some((_, package)) = packages.find(|(tool, _)| tool == name) else { return Ok(()) };
    fetch_package(host, project, name, package).map(drop)
}

/// Brings one package of `[tools]` into the store, unless it is there, and gives the folder that it is unpacked in.
///
/// # Errors
/// What the source or the store said.
pub fn fetch_package(host: &Host, project: &Project, name: &Name, package: &FilePin) -> Result<PathBuf, Failure> {
    let _held = hold(host, "tool", &package.sha256, &format!("tool `{name}`"))?;
    if let Some(folder) = host.store.tool(&package.sha256, true, host.task.cancel())? {
        return Ok(folder);
    }
    let spec = project.manifest.value.tools.get(name);
    let spec = spec.ok_or_else(|| Failure::NoLock { path: project.lock_path.clone() })?;
    let staging = host.store.stage()?;
    let fetched = fetch(host, project, &host.task, (Kind::Tool, name), |world| {
        spec.fetch_package(world, package, staging.path())
    })?;
    Ok(host.store.admit_tool(&staging, &fetched.modes, &package.sha256, host.task.cancel())?)
}

/// Brings an engine's source tree into the store, unless somebody else did meanwhile.
///
/// # Errors
/// What the source or the store said.
pub fn fetch_source(host: &Host, project: &Project, engine: &EngineDemand<'_>) -> Result<(), Failure> {
    let (name, tree) = (&engine.wish.name, engine.wish.tree);
    let _held = hold(host, "tree", &tree, &format!("source of `{name}`"))?;
    if host.store.confirm_tree(&tree, host.task.cancel())?.is_some() {
        return Ok(());
    }
    let staging = host.store.stage()?;
    let fetched = fetch(host, project, &host.task, (Kind::Engine, name), |world| {
        source::fetch_tree(&engine.entry.origin, world, &tree, staging.path())
    })?;
    let progress = host.task.start("verifying", format!("source of {name}"), None, Unit::None);
    let modes = &fetched.modes;
    let admitted =
        host.store.admit_tree(&staging, modes, &tree, &format!("source of engine `{name}`"), host.task.cancel());
    admitted.map_err(|error| integrity(project, Kind::Engine, name, error))?;
    progress.finish("right");
    Ok(())
}

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

/// Builds an engine and installs it, unless somebody else did meanwhile.
///
/// # Errors
/// What the build or the store said; nothing is half-installed then.
pub fn build(host: &Host, project: &Project, engine: &EngineDemand<'_>) -> Result<(), Failure> {
    let (wish, task) = (&engine.wish, &host.task);
    let waiting = || task.waiting(format!("another aitools is building `{}`", wish.name));
    let _held = host.store.lock(&format!("build-{}", wish.fingerprint.hex()), task.cancel(), waiting)?;
    host.store.reload_records();
    if host.store.artifact(&wish.fingerprint)?.is_some() {
        return Ok(());
    }
    let tree = match host.store.confirm_tree(&wish.tree, task.cancel())? {
        Some(tree) => tree,
        None => {
            fetch_source(host, project, engine)?;
            host.store.tree_path(&wish.tree)
        }
    };
    let (work, prefix) = (host.store.stage()?, host.store.stage()?);
    let began = Instant::now();
    let built = compile(host, engine, &tree, work.path(), prefix.path())?;
    for warning in &built.warnings {
        task.warn(format!("engine `{}`: {warning}", wish.name));
    }
    let mut notes = built.notes;
    notes.insert("seconds".to_owned(), began.elapsed().as_secs().to_string());
    let receipt = Receipt {
        version: receipt::VERSION,
        engine: wish.name.clone(),
        variant: wish.variant,
        fingerprint: wish.fingerprint,
        inputs: engine.inputs.clone(),
        files: built.files,
        notes,
    };
    host.store.install(&prefix, &receipt)?;
    Ok(host.store.save_records()?)
}

fn compile(host: &Host, engine: &EngineDemand<'_>, tree: &Path, work: &Path, prefix: &Path) -> Result<Built, Failure> {
    let wish = &engine.wish;
    let source = work.join("src");
    fs::copy_tree(tree, &source)?;
    let logs = host.store.logs();
    fs::create_dir_all(&logs)?;
    let of = |error| Failure::Build { engine: wish.name.clone(), error };
    let cmake = located(host, engine, &engine.cmake, "cmake")?;
    let ninja = engine.ninja.as_ref().map(|ninja| located(host, engine, ninja, "ninja")).transpose()?;
    let request = BuildRequest {
        driver: host.driver.clone(),
        source,
        folder: work.join("build"),
        prefix: prefix.to_owned(),
        recipe: engine.recipe.clone(),
        cmake,
        ninja,
        compilers: engine.toolchain.clone(),
        jobs: host.jobs,
        env: host.os_env(),
        log: logs.join(format!("{}-{}-{}.log", wish.name, wish.variant, wish.fingerprint.short())),
        label: format!("{} ({})", wish.name, wish.variant),
    };
    build::run(&request, &host.task).map_err(of)
}

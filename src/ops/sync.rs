//! `sync`: brings this machine to what the lockfile says. Plan first, then carry out, engines and models side by side.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::Name;
use crate::format::lockfile::{FilePin, Lockfile, ModelPin};
use crate::format::manifest::Kind;
use crate::plan::{self, Plan, Step};
use crate::report::{Task, Unit};
use crate::source::{self, Fetched, SourceError, World};
use crate::store::blobs::Presence;

use super::demand::{Demand, ModelDemand, demand};
use super::lock::{self, Locked, Upgrade};
use super::survey::survey;
use super::{Failure, Host, Project, build, derive};

/// How the lockfile is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Resolve what is missing or changed, write it.
    Update,
    /// Fail when it is missing or would change.
    Locked,
    /// Use it as it is.
    Frozen,
}

#[derive(Debug)]
pub struct Ask<'a> {
    /// Policies; the whole manifest when empty.
    pub policies: &'a [String],
    pub mode: LockMode,
    pub dry_run: bool,
}

/// What `sync` did, or would do.
#[derive(Debug, serde::Serialize)]
pub struct Synced {
    pub plan: Plan,
    #[serde(skip)]
    pub lockfile: Lockfile,
    pub locked: Option<Locked>,
    pub dry_run: bool,
}

/// # Errors
/// The first thing that went wrong; what was done before stays done.
pub fn run(host: &Host, project: &Project, ask: &Ask<'_>) -> Result<Synced, Failure> {
    let (lockfile, locked) = lockfile(host, project, ask)?;
    if !ask.dry_run {
        host.store.sweep()?;
    }
    let plan = {
        let demand = demand(host, project, &lockfile, ask.policies)?;
        let plan = plan_for(host, project, &demand)?;
        if !ask.dry_run && !plan.is_empty() {
            carry_out(host, project, &demand, &plan)?;
        }
        plan
    };
    host.store.save_records()?;
    Ok(Synced { plan, lockfile, locked, dry_run: ask.dry_run })
}

fn lockfile(host: &Host, project: &Project, ask: &Ask<'_>) -> Result<(Lockfile, Option<Locked>), Failure> {
    match ask.mode {
        LockMode::Frozen => Ok((lock::require(project)?, None)),
        LockMode::Locked => Ok((lock::require_current(project)?, None)),
        LockMode::Update => match lock::require_current(project) {
            Ok(current) => Ok((current, None)),
            Err(error @ (Failure::NoLock { .. } | Failure::Stale { .. })) if ask.dry_run => Err(error),
            Err(Failure::NoLock { .. } | Failure::Stale { .. }) => {
                let locked = lock::run(host, project, &Upgrade::None, false)?;
                Ok((locked.lockfile.clone(), Some(locked)))
            }
            Err(other) => Err(other),
        },
    }
}

/// What is missing for a demand.
///
/// # Errors
/// When the store cannot be read.
pub fn plan_for(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Plan, Failure> {
    let engines: Vec<_> = demand.engines.iter().map(|engine| engine.wish.clone()).collect();
    let models: Vec<_> = demand.models.iter().map(|model| model.wish.clone()).collect();
    Ok(plan::plan(&engines, &models, &survey(host, project, demand)?))
}

/// Engines and models have nothing in common, so a download goes on while a compiler works.
fn carry_out(host: &Host, project: &Project, demand: &Demand<'_>, plan: &Plan) -> Result<(), Failure> {
    check_space(host, project, demand, plan)?;
    let (derived, others): (Vec<&Step>, Vec<&Step>) =
        plan.steps.iter().partition(|step| matches!(step, Step::Derive { .. }));
    let (engines, models): (Vec<&Step>, Vec<&Step>) = others.into_iter().partition(|step| is_engine_step(step));
    // The first failure ends the other lane soon, so that it is told in seconds rather than after a build.
    let lane = |steps: &[&Step], step: &dyn Fn(&Step) -> Result<(), Failure>| {
        let done = steps.iter().try_for_each(|due| step(due));
        if done.is_err() {
            host.task.cancel().cancel();
        }
        done
    };
    let (built, fetched) = std::thread::scope(|scope| {
        let built = scope.spawn(|| lane(&engines, &|step| engine_step(host, project, demand, step)));
        let task = match weights_to_fetch(plan) {
            (0 | 1, _) => host.task.clone(),
            (files, bytes) => host.task.summed("fetching", format!("{files} files of weights"), bytes),
        };
        let fetched = lane(&models, &|step| model_step(host, project, demand, &task, step));
        (built.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), fetched)
    });
    match (built, fetched) {
        (Err(consequence), Err(cause)) if consequence.is_interruption() => Err(cause),
        (built, fetched) => built.and(fetched),
    }?;
    // What is derived needs both.
    lane(&derived, &|step| model_step(host, project, demand, &host.task, step))
}

fn is_engine_step(step: &Step) -> bool {
    match step {
        Step::FetchTool { .. } | Step::FetchSource { .. } | Step::Build { .. } | Step::LinkBuild { .. } => true,
        Step::Hash { .. } | Step::FetchWeights { .. } | Step::Place { .. } | Step::Derive { .. } => false,
    }
}

/// How many files, and their bytes.
fn weights_to_fetch(plan: &Plan) -> (usize, u64) {
    plan.steps.iter().fold((0, 0), |(count, sum), step| match step {
        Step::FetchWeights { files, bytes, .. } => (count + files.len(), bytes.saturating_add(sum)),
        _ => (count, sum),
    })
}

/// All weights together must fit, on each disk that takes some of them, before the first byte.
fn check_space(host: &Host, project: &Project, demand: &Demand<'_>, plan: &Plan) -> Result<(), Failure> {
    let world = host.world(project);
    let mut disks: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for step in &plan.steps {
        let (at, bytes) = space(&world, demand, step)?.unwrap_or_else(|| (host.store.root().to_owned(), 0));
        let disk = disks.entry(fs::volume(&at)?).or_insert((at, 0));
        disk.1 = disk.1.saturating_add(bytes);
    }
    for (at, bytes) in disks.into_values() {
        let (needed, available) = (bytes.saturating_add(bytes / 20), fs::available_bytes(&at)?);
        if needed > available {
            let what = "not enough space for the weights".to_owned();
            return Err(Failure::NoSpace { what, needed, available, at });
        }
    }
    Ok(())
}

/// Where a step takes space, and how much; none for what is small.
fn space(world: &World, demand: &Demand<'_>, step: &Step) -> Result<Option<(PathBuf, u64)>, Failure> {
    let (Step::FetchWeights { model, .. } | Step::Derive { model, .. }) = step else { return Ok(None) };
    let Some(model) = demand.find(model) else { return Ok(None) };
    match (step, &model.entry.pin) {
        (Step::FetchWeights { files, .. }, ModelPin::Files { origin, .. }) => {
            let files: Vec<&FilePin> = files.iter().map(|index| &model.wish.files[*index]).collect();
            let space = source::space(origin, world, &files);
            space.map(Some).map_err(|error| Failure::source(Kind::Model, &model.wish.name, error, None))
        }
        _ => Ok(model.derive.as_ref().map(|derive| (world.scratch.clone(), derive.size_bytes))),
    }
}

fn engine_step(host: &Host, project: &Project, demand: &Demand<'_>, step: &Step) -> Result<(), Failure> {
    host.task.check()?;
    let find = |name: &Name| demand.engines.iter().find(|engine| engine.wish.name == *name);
    match step {
        Step::FetchTool { name, .. } => build::fetch_tool(host, project, demand, name),
        Step::FetchSource { engine, .. } => {
            find(engine).map_or(Ok(()), |engine| build::fetch_source(host, project, engine))
        }
        Step::Build { fingerprint, .. } => {
            let found = demand.engines.iter().find(|engine| engine.wish.fingerprint == *fingerprint);
            found.map_or(Ok(()), |engine| build::build(host, project, engine))
        }
        Step::LinkBuild { engine, fingerprint, .. } => {
            let target = host.store.artifact_path(fingerprint);
            fs::link_dir(&target, &super::survey::build_link(project, engine))?;
            find(engine).map_or(Ok(()), |engine| build::populate_submodule(host, project, engine))
        }
        _ => Ok(()),
    }
}

fn model_step(host: &Host, project: &Project, demand: &Demand<'_>, task: &Task, step: &Step) -> Result<(), Failure> {
    host.task.check()?;
    let (name, files) = match step {
        Step::Derive { model, .. } => return derive::derive(host, project, demand, model),
        Step::Hash { model, files, .. }
        | Step::FetchWeights { model, files, .. }
        | Step::Place { model, files, .. } => (model, files),
        _ => return Ok(()),
    };
    let Some(model) = demand.find(name) else { return Ok(()) };
    match step {
        Step::Place { .. } => files.iter().try_for_each(|index| place(host, project, model, *index)),
        Step::Hash { .. } => {
            let wrong = hash(host, project, model, files)?;
            if model.derive.is_some() && !wrong.is_empty() {
                return derive::derive(host, project, demand, name);
            }
            fetch_weights(host, project, model, task, &wrong)
        }
        _ => fetch_weights(host, project, model, task, files),
    }
}

/// Hashes files that are there already; those that turn out right are adopted. Gives the others.
fn hash(host: &Host, project: &Project, model: &ModelDemand<'_>, files: &[usize]) -> Result<Vec<usize>, Failure> {
    let total = files.iter().map(|index| model.wish.files[*index].size).sum();
    let progress = host.task.start("hashing", model.wish.name.as_str(), Some(total), Unit::Bytes);
    let mut wrong = Vec::new();
    let mut passed = 0;
    for index in files {
        let mut seen = |more| {
            progress.add(more);
            progress.check().map_err(std::io::Error::other)
        };
        let pin = &model.wish.files[*index];
        let blob = host.store.blob_path(&pin.sha256);
        let at = model.wish.places[*index].under(&project.root);
        if host.store.confirm(&blob, pin, &mut seen)? {
            place(host, project, model, *index)?;
        } else if host.store.confirm(&at, pin, &mut seen)? {
            host.store.place(&at, &blob, pin.sha256)?;
        } else {
            wrong.push(*index);
        }
        passed += pin.size;
        progress.set(passed, None, None);
    }
    progress.finish(if wrong.is_empty() { "all right".to_owned() } else { format!("{} to fetch", wrong.len()) });
    Ok(wrong)
}

fn place(host: &Host, project: &Project, model: &ModelDemand<'_>, index: usize) -> Result<(), Failure> {
    let pin = &model.wish.files[index];
    let to = model.wish.places[index].under(&project.root);
    host.store.place(&host.store.blob_path(&pin.sha256), &to, pin.sha256)?;
    Ok(())
}

/// Brings files of a model into the store and places them, unless somebody else did meanwhile.
///
/// # Errors
/// What the source or the store said.
pub fn fetch_weights(
    host: &Host,
    project: &Project,
    model: &ModelDemand<'_>,
    task: &Task,
    files: &[usize],
) -> Result<(), Failure> {
    if files.is_empty() {
        return Ok(());
    }
    let name = &model.wish.name;
    let ModelPin::Files { origin, files: locked } = &model.entry.pin else { return Ok(()) };
    let Some(first) = locked.first() else { return Ok(()) };
    let _held = hold(host, "weights", &first.sha256, &format!("weights of `{name}`"))?;
    let absent = |index: &usize| {
        let pin = &model.wish.files[*index];
        host.store.presence(&host.store.blob_path(&pin.sha256), pin) != Presence::Verified
    };
    // Somebody else may have fetched them while this process waited.
    host.store.reload_records();
    let missing: Vec<usize> = files.iter().copied().filter(absent).collect();
    if !missing.is_empty() {
        let staging = host.store.stage()?;
        let pins: Vec<&FilePin> = missing.iter().map(|index| &model.wish.files[*index]).collect();
        fetch(host, project, task, (Kind::Model, name), |world| {
            source::fetch_files(origin, world, &pins, staging.path())
        })?;
        for index in &missing {
            let pin = &model.wish.files[*index];
            let what = format!("weights file `{}`", pin.path);
            let staged = pin.path.under(staging.path());
            let admitted = host.store.admit_blob(&staged, pin, &what, &mut host.stopping());
            admitted.map_err(|error| integrity(project, Kind::Model, name, error))?;
        }
        host.store.save_records()?;
    }
    files.iter().try_for_each(|index| place(host, project, model, *index))
}

/// Lets a source bring what is pinned.
///
/// # Errors
/// The source's, with the entry and its line in the lockfile.
pub fn fetch(
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
///
/// # Errors
/// When the user asked to stop.
pub fn hold(host: &Host, what: &str, digest: &Digest, shown: &str) -> Result<crate::base::lock::Lock, Failure> {
    let waiting = || host.task.waiting(format!("another aitools is at the {shown}"));
    Ok(host.store.lock(&format!("{what}-{}", digest.hex()), host.task.cancel(), waiting)?)
}

/// A mismatch with where the lockfile says so.
pub fn integrity(project: &Project, kind: Kind, name: &Name, error: crate::store::StoreError) -> Failure {
    Failure::Integrity { kind, name: name.clone(), error, lock_line: project.lock_line(name) }
}

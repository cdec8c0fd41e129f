//! `sync`: brings this machine to what the lockfile says. Plan first, then carry out, engines and models side by side.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::format::lockfile::{self, Lockfile};
use crate::format::manifest::Permission;
use crate::plan::{self, Lane, Plan, Step};
use crate::report::{Task, Unit, Verb};
use crate::source::World;
use crate::source::download::RESERVE_BYTES;
use crate::store::roots::Root;

use super::demand::{Demand, ModelDemand, demand};
use super::failure::{Staleness, Why};
use super::install::Purpose;
use super::lock::{self, Locked, Upgrade};
use super::survey::survey;
use super::{Failure, Host, Outcome, Project, build, derive, fetch};

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

/// What to bring up to date, and how.
#[derive(Debug)]
pub struct Ask<'a> {
    /// Policies; the whole manifest when empty.
    pub policies: &'a [String],
    /// How the lockfile is treated.
    pub mode: LockMode,
    /// Change nothing, and report what would be done.
    pub dry_run: bool,
}

/// What `sync` did, or would do.
#[derive(Debug, serde::Serialize)]
pub struct Synced {
    /// The steps that were done, or would be.
    pub plan: Plan,
    /// The lockfile that was used.
    #[serde(skip)]
    pub lockfile: Lockfile,
    /// What changed in the lockfile; None when it was not written.
    pub locked: Option<Locked>,
    /// Whether nothing was changed.
    pub dry_run: bool,
}

/// How often a plan is made again because something that it relied on turned out to be damaged.
const MAX_ROUNDS: usize = 4;

/// Brings this machine to what the lockfile says.
///
/// # Errors
/// The first thing that went wrong; what was done before stays done.
pub fn run(host: &Host, project: &Project, ask: &Ask<'_>) -> Result<Synced, Failure> {
    let (lockfile, locked) = lockfile(host, project, ask)?;
    if !ask.dry_run {
        host.store.sweep()?;
    }
    let mut done = Plan::default();
    for round in 0.. {
        let demand = demand(host, project, &lockfile, ask.policies, Purpose::Install)?;
        if !ask.dry_run {
            register(host, project, &demand)?;
        }
        let plan = plan_for(host, project, &demand)?;
        if round == MAX_ROUNDS {
            return Err(Failure::NotSynced { steps: plan.steps });
        }
        if !ask.dry_run && round == 0 {
            announce(host, &demand, &plan);
        }
        let ends = ask.dry_run || plan.is_empty() || {
            let outcome = carry_out(host, project, &demand, &plan);
            tell_what_was_kept(host, project);
            outcome? == Outcome::Done
        };
        done.steps.extend(plan.steps);
        if ends {
            break;
        }
    }
    host.store.save_records()?;
    Ok(Synced { plan: done, lockfile, locked, dry_run: ask.dry_run })
}

/// Tells the store what this project needs, before it is looked for there.
fn register(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<(), Failure> {
    let bytes = fs::read_bounded(&project.lock_path, lockfile::MAX_BYTES as u64)?;
    let derived = demand.models.iter().filter_map(|model| model.required.derive.as_ref());
    let root = Root {
        lockfile: fs::canonical(&project.lock_path)?,
        digest: Digest::of(&bytes),
        artifacts: demand.engines.iter().map(|engine| engine.required.fingerprint).collect(),
        derived: derived.map(|derive| derive.fingerprint).collect(),
        unnamed: false,
    };
    let waiting = || host.task.waiting(lock::REMOVING);
    Ok(host.store.register(root, host.task.cancel(), waiting)?)
}

/// Files of the user's that were in the way have other names now, also when something failed later.
fn tell_what_was_kept(host: &Host, project: &Project) {
    for (place, backup) in host.store.take_kept() {
        let (place, backup) = (super::project::shown(&place, &project.root), backup.display());
        host.task.warn(format!("`{place}` was not placed by aitools: the file is kept as `{backup}`"));
    }
}

fn lockfile(host: &Host, project: &Project, ask: &Ask<'_>) -> Result<(Lockfile, Option<Locked>), Failure> {
    match ask.mode {
        LockMode::Frozen => Ok((lock::require(project)?, None)),
        LockMode::Locked => Ok((lock::require_current(host, project)?, None)),
        LockMode::Update => match lock::require_current(host, project) {
            Ok(current) => Ok((current, None)),
            // Fetching compares them, and shows both digests. What was locked may be in the store already.
            Err(Failure::Stale { entries, .. }) if entries.iter().all(|entry| entry.why == Why::Differs) => {
                for Staleness { kind, name, .. } in entries {
                    let what =
                        format!("{} `{name}`: the files at its `path` are not those that were locked", kind.as_str());
                    host.task.warn(format!("{what}; to lock them, run `aitools lock --upgrade {name}`"));
                }
                Ok((lock::require(project)?, None))
            }
            Err(error @ (Failure::NoLock { .. } | Failure::Stale { .. })) if ask.dry_run => Err(error),
            Err(Failure::NoLock { .. } | Failure::Stale { .. }) => {
                let locked = lock::run(host, project, &Upgrade::None, false)?;
                Ok((locked.lockfile.clone(), Some(locked)))
            }
            Err(other) => Err(other),
        },
    }
}

/// Names the code that is about to be compiled or run, and where it comes from.
fn announce(host: &Host, demand: &Demand<'_>, plan: &Plan) {
    for step in &plan.steps {
        match step {
            Step::Build { at, engine, .. } => {
                let entry = demand.engine_at(*at).entry;
                let network =
                    if entry.allow.contains(&Permission::Network) { ", with access to the network" } else { "" };
                let origin = entry.origin.in_words();
                host.task.note(format!(
                    "engine `{engine}`: compiling code from {origin}{network}, which later runs with your rights"
                ));
            }
            Step::Derive { at, model, how, .. } => {
                let Some(derive) = &demand.model_at(*at).derive else { continue };
                let origin = demand.engine_at(derive.engine).entry.origin.in_words();
                host.task.note(format!("model `{model}`: running code from {origin} ({how})"));
            }
            _ => {}
        }
    }
}

/// What is missing for a demand.
///
/// # Errors
/// When the store cannot be read.
pub fn plan_for(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Plan, Failure> {
    let engines: Vec<_> = demand.engines.iter().map(|engine| engine.required.clone()).collect();
    let models: Vec<_> = demand.models.iter().map(|model| model.required.clone()).collect();
    Ok(plan::plan(&engines, &models, &survey(host, project, demand)?))
}

/// What the named policies need, when all of it is here and verified.
///
/// # Errors
/// [`Failure::NotSynced`] when something is missing.
pub fn require_synced<'a>(
    host: &Host,
    project: &'a Project,
    lockfile: &'a Lockfile,
    policies: &[String],
) -> Result<Demand<'a>, Failure> {
    let demand = demand(host, project, lockfile, policies, Purpose::Install)?;
    let plan = plan_for(host, project, &demand)?;
    if plan.is_empty() { Ok(demand) } else { Err(Failure::NotSynced { steps: plan.steps }) }
}

/// Engines and models have nothing in common, so a download goes on while a compiler works.
fn carry_out(host: &Host, project: &Project, demand: &Demand<'_>, plan: &Plan) -> Result<Outcome, Failure> {
    check_space(host, project, demand, plan)?;
    let weights = match weights_to_fetch(plan) {
        (0 | 1, _) => host.task.clone(),
        (files, bytes) => host.task.summed(Verb::Fetch, format!("{files} files of weights"), bytes),
    };
    let lane = |which: Lane| {
        let mut steps = plan.steps.iter().filter(|step| step.lane() == which);
        let done =
            steps.try_fold(Outcome::Done, |so_far, due| Ok(so_far.and(step(host, project, demand, &weights, due)?)));
        // The first failure ends the other lane soon, so that it is told in seconds rather than after a build.
        done.inspect_err(|_: &Failure| host.task.cancel().cancel())
    };
    let (built, fetched) = std::thread::scope(|scope| {
        let built = scope.spawn(|| lane(Lane::Engines));
        let fetched = lane(Lane::Models);
        (built.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), fetched)
    });
    let outcome = match (built, fetched) {
        (Err(consequence), Err(cause)) if consequence.is_interruption() => Err(cause),
        (built, fetched) => built.and_then(|built| Ok(built.and(fetched?))),
    }?;
    // What is derived needs both.
    if outcome == Outcome::Done { lane(Lane::Derivations) } else { Ok(outcome) }
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
        let Some((at, bytes)) = space(&world, demand, step)? else { continue };
        let disk = disks.entry(fs::volume(&at)?).or_insert((at, 0));
        disk.1 = disk.1.saturating_add(bytes);
    }
    for (at, needed) in disks.into_values().filter(|(_, bytes)| *bytes > 0) {
        let (reserve, available) = (RESERVE_BYTES, fs::available_bytes(&at)?);
        if needed.saturating_add(reserve) > available {
            let what = "not enough space for the weights".to_owned();
            return Err(Failure::NoSpace { what, needed, reserve, available, at });
        }
    }
    Ok(())
}

/// Where a step takes space, and how many bytes; none for what is small.
fn space(world: &World, demand: &Demand<'_>, step: &Step) -> Result<Option<(PathBuf, u64)>, Failure> {
    match step {
        Step::FetchWeights { files, at, .. } => fetch::space(world, demand.model_at(*at), files).map(Some),
        Step::Derive { at, .. } => {
            let derive = demand.model_at(*at).derive.as_ref();
            Ok(derive.map(|derive| (world.scratch.clone(), derive.size_bytes)))
        }
        Step::FetchTool { .. }
        | Step::FetchSource { .. }
        | Step::Build { .. }
        | Step::LinkBuild { .. }
        | Step::Hash { .. }
        | Step::Place { .. } => Ok(None),
    }
}

/// Carries out one step; `weights` shows the progress of all weights together.
fn step(host: &Host, project: &Project, demand: &Demand<'_>, weights: &Task, step: &Step) -> Result<Outcome, Failure> {
    host.task.check()?;
    match step {
        Step::FetchTool { required, .. } => fetch::package(host, project, required)?,
        Step::FetchSource { at, .. } => fetch::tree(host, project, demand.engine_at(*at))?,
        Step::Build { at, .. } => return build::build(host, demand.engine_at(*at)),
        Step::LinkBuild { engine, fingerprint, at, .. } => {
            let target = host.store.artifact_path(fingerprint);
            fs::link_dir(&target, &project.build_link(engine))?;
            build::populate_submodule(host, project, demand.engine_at(*at))?;
        }
        Step::Hash { files, at, .. } => return hash(host, project, demand.model_at(*at), files),
        Step::FetchWeights { files, at, .. } => fetch::weights(host, project, demand.model_at(*at), weights, files)?,
        Step::Place { files, at, .. } => {
            files.iter().try_for_each(|index| fetch::place(host, project, demand.model_at(*at), *index))?;
        }
        Step::Derive { at, .. } => return derive::derive(host, project, demand, *at),
    }
    Ok(Outcome::Done)
}

/// Hashes files that are there already, and adopts those that match. The others count as missing from now on.
fn hash(host: &Host, project: &Project, model: &ModelDemand<'_>, files: &[usize]) -> Result<Outcome, Failure> {
    let total = files.iter().map(|index| model.required.files[*index].size).sum();
    let progress = host.task.start(Verb::Hash, model.required.name.as_str(), Some(total), Unit::Bytes);
    let (mut wrong, mut passed) = (0, 0);
    for index in files {
        let mut seen = |more| {
            progress.add(more);
            progress.check().map_err(std::io::Error::other)
        };
        let pin = &model.required.files[*index];
        let blob = host.store.blob_path(&pin.sha256);
        let at = model.required.places[*index].under(&project.root);
        if host.store.confirm(&blob, pin, &mut seen)? {
            fetch::place(host, project, model, *index)?;
        } else if host.store.confirm(&at, pin, &mut seen)? {
            host.store.place(&at, &blob, pin.sha256)?;
        } else {
            wrong += 1;
        }
        passed += pin.size;
        progress.set(passed, None, None);
    }
    progress.finish(if wrong == 0 { String::new() } else { format!("{wrong} to fetch") });
    Ok(if wrong == 0 { Outcome::Done } else { Outcome::Outdated })
}

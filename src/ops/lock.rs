//! `lock`: turns what the manifest asks for into pins. Incremental: an entry whose request did not change keeps its pin.

use std::collections::BTreeSet;

use crate::base::fs;
use crate::base::name::Name;
use crate::format::lockfile::{self, Entry, Kind, Lockfile, Pin};
use crate::format::manifest::{Manifest, Request, SourceSpec};
use crate::report::Unit;
use crate::source::{self, World};

use super::failure::{Staleness, Why};
use super::project::MAX_LOCK_BYTES;
use super::{Failure, Host, Project};

/// Which entries to resolve anew though their request did not change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Upgrade {
    #[default]
    None,
    All,
    Names(BTreeSet<Name>),
}

impl Upgrade {
    fn covers(&self, name: &Name) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Names(names) => names.contains(name),
        }
    }
}

/// What `lock` did.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Locked {
    #[serde(skip)]
    pub lockfile: Lockfile,
    pub changes: Vec<Change>,
    /// Whether the file on disk changed.
    pub written: bool,
}

/// One entry that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Change {
    pub kind: Kind,
    pub name: Name,
    /// What the old pin was, in a few letters; none when it is new.
    pub from: Option<String>,
    /// What the new pin is; none when it was removed.
    pub to: Option<String>,
}

/// What the manifest asks for, nothing before what it is derived from.
pub fn requests(manifest: &Manifest) -> Vec<(Kind, Name, Request)> {
    let tools =
        manifest.tools.iter().map(|(name, spec)| (Kind::Tool, name.clone(), SourceSpec::Pypi(spec.clone()).into()));
    let engines = manifest.engines.iter().map(|(name, spec)| (Kind::Engine, name.clone(), spec.source.clone().into()));
    let request = |name: &Name| Some((Kind::Model, name.clone(), manifest.models.get(name)?.request()?));
    let models = manifest.models_in_order().into_iter().filter_map(request);
    tools.chain(engines).chain(models).collect()
}

/// Where lockfile and manifest differ; empty when the lockfile answers the manifest.
pub fn staleness(manifest: &Manifest, lock: &Lockfile) -> Vec<Staleness> {
    let mut stale = Vec::new();
    let requests = requests(manifest);
    for (kind, name, request) in &requests {
        let why = match lock.get(*kind, name) {
            None => Why::Added,
            Some(entry) if entry.request != *request => {
                Why::Changed { manifest: in_words(request), lock: in_words(&entry.request) }
            }
            Some(Entry { request: Request::Derive(spec), pin, .. }) if pin.inputs != lock.inputs(spec) => Why::Inputs,
            Some(_) => continue,
        };
        stale.push(Staleness { kind: *kind, name: name.clone(), why });
    }
    for kind in Kind::ALL {
        for entry in lock.entries(kind) {
            if !requests.iter().any(|(k, name, _)| *k == kind && *name == entry.name) {
                stale.push(Staleness { kind, name: entry.name.clone(), why: Why::Removed });
            }
        }
    }
    stale
}

/// A request as one line of JSON: what differs shows.
fn in_words(request: &Request) -> String {
    serde_json::to_string(request).unwrap_or_default()
}

/// A pin in a few letters.
fn pin_in_words(pin: &Pin) -> String {
    let digest = pin
        .tree
        .or(pin.inputs)
        .or(pin.downloads.first().map(|file| file.sha256))
        .or(pin.files.first().map(|file| file.sha256));
    match (&pin.commit, digest) {
        (Some(commit), _) => commit.chars().take(12).collect(),
        (None, Some(digest)) => source::short(&digest),
        (None, None) => "nothing".to_owned(),
    }
}

/// The lockfile, required to answer the manifest.
///
/// # Errors
/// [`Failure::NoLock`], [`Failure::Stale`].
pub fn require_current(project: &Project) -> Result<Lockfile, Failure> {
    let lock = require(project)?;
    let entries = staleness(&project.manifest.value, &lock);
    if entries.is_empty() { Ok(lock) } else { Err(Failure::Stale { path: project.lock_path.clone(), entries }) }
}

/// The lockfile as it is.
///
/// # Errors
/// [`Failure::NoLock`].
pub fn require(project: &Project) -> Result<Lockfile, Failure> {
    project.lockfile()?.ok_or_else(|| Failure::NoLock { path: project.lock_path.clone() })
}

/// Resolves what is new, changed, asked for anew or in conflict, and writes the lockfile when it differs.
///
/// # Errors
/// When something cannot be resolved; the old lockfile then stays.
pub fn run(host: &Host, project: &Project, upgrade: &Upgrade, resolve_conflicts: bool) -> Result<Locked, Failure> {
    let name =
        format!("lock-{}", crate::base::digest::Digest::of(project.lock_path.as_os_str().as_encoded_bytes()).hex());
    let waiting = || host.task.waiting("another aitools is locking this project");
    let _held = host.store.lock(&name, host.task.cancel(), waiting)?;
    check_names(project, upgrade)?;
    super::demand::check_derivations(host, project)?;
    let old = previous(project, resolve_conflicts)?;
    let lockfile = resolve(host, project, &old, upgrade)?;
    let written = fs::write_if_changed(&project.lock_path, lockfile.to_text().as_bytes())?;
    Ok(Locked { changes: changes(&old, &lockfile), lockfile, written })
}

fn check_names(project: &Project, upgrade: &Upgrade) -> Result<(), Failure> {
    let Upgrade::Names(names) = upgrade else { return Ok(()) };
    let requests = requests(&project.manifest.value);
    let known = || requests.iter().map(|(_, name, _)| name.as_str());
    match names.iter().find(|name| !known().any(|known| known == name.as_str())) {
        None => Ok(()),
        Some(unknown) => {
            let hint = crate::base::diagnostic::nearest(unknown.as_str(), known());
            let what = format!("the manifest has no tool, engine or model `{unknown}`");
            Err(Failure::Usage { what, hint: hint.map(|near| format!("did you mean `{near}`?")) })
        }
    }
}

fn previous(project: &Project, resolve_conflicts: bool) -> Result<Lockfile, Failure> {
    if resolve_conflicts {
        let bytes = fs::read_bounded(&project.lock_path, MAX_LOCK_BYTES)?;
        let shown = super::project::shown(&project.lock_path, &project.root);
        return Ok(lockfile::parse_conflicted(&shown, &bytes)?.agreed);
    }
    Ok(project.lockfile()?.unwrap_or_default())
}

fn resolve(host: &Host, project: &Project, old: &Lockfile, upgrade: &Upgrade) -> Result<Lockfile, Failure> {
    let world = host.world(project);
    let mut lockfile = Lockfile::default();
    for (kind, name, request) in requests(&project.manifest.value) {
        let kept = old.get(kind, &name).filter(|entry| entry.request == request && !upgrade.covers(&name));
        let mut pin = match (&request, kept) {
            (Request::Derive(spec), _) => Pin { inputs: lockfile.inputs(spec), ..Pin::default() },
            (Request::Source(_), Some(entry)) => entry.pin.clone(),
            (Request::Source(source), None) => resolve_one(&world, kind, &name, source)?,
        };
        // What is derived from it is locked by its text.
        pin.sort();
        let entry = Entry { name, request, pin };
        match kind {
            Kind::Tool => lockfile.tools.push(entry),
            Kind::Engine => lockfile.engines.push(entry),
            Kind::Model => lockfile.models.push(entry),
        }
    }
    lockfile.sort();
    Ok(lockfile)
}

fn resolve_one(world: &World, kind: Kind, name: &Name, request: &SourceSpec) -> Result<Pin, Failure> {
    world.task.check()?;
    let progress = world.task.start("locking", name.as_str(), None, Unit::None);
    let pin = source::of(request).resolve(world, kind);
    let pin = pin.map_err(|error| Failure::source(kind, name, error, None))?;
    progress.finish(pin_in_words(&pin));
    Ok(pin)
}

fn changes(old: &Lockfile, new: &Lockfile) -> Vec<Change> {
    let mut changes = Vec::new();
    for kind in Kind::ALL {
        let names: BTreeSet<&Name> =
            old.entries(kind).iter().chain(new.entries(kind)).map(|entry| &entry.name).collect();
        for name in names {
            let (from, to) = (old.get(kind, name), new.get(kind, name));
            if from != to {
                let words = |entry: Option<&Entry>| entry.map(|entry| pin_in_words(&entry.pin));
                changes.push(Change { kind, name: name.clone(), from: words(from), to: words(to) });
            }
        }
    }
    changes
}

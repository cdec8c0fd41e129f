//! `lock`: turns what the manifest asks for into pins. Incremental: an entry whose request did not change keeps its pin.

use std::collections::BTreeSet;

use crate::base::fs;
use crate::base::name::Name;
use crate::format::lockfile::{self, EngineEntry, Entry, Lockfile, ModelEntry, ModelPin, ToolEntry};
use crate::format::manifest::{Kind, Manifest, Permission, PypiSpec, Request, SourceSpec};
use crate::report::{Unit, Verb};
use crate::source::{self, SourceError, World};

use super::failure::{Staleness, Why};
use super::{Failure, Host, Project, edited};

/// Which entries to resolve again although their request did not change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Upgrade {
    /// None: only entries whose request changed.
    #[default]
    None,
    /// Every entry.
    All,
    /// The entries with these names.
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
    /// The lockfile as it is now.
    #[serde(skip)]
    pub lockfile: Lockfile,
    /// The entries that changed.
    pub changes: Vec<Change>,
    /// Whether the file on disk changed.
    pub written: bool,
}

/// One entry that changed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Change {
    /// What the entry is for.
    pub kind: Kind,
    /// Its name in the manifest.
    pub name: Name,
    /// What the old pin was, in a few letters; none when it is new.
    pub from: Option<String>,
    /// What the new pin is; none when it was removed.
    pub to: Option<String>,
}

/// What those who need something of the store wait for.
pub const REMOVING: &str = "another aitools is removing files from the cache";

/// What the manifest asks for, nothing before what it is derived from.
pub fn requests(manifest: &Manifest) -> Vec<(Kind, Name, Request)> {
    let tools =
        manifest.tools.iter().map(|(name, spec)| (Kind::Tool, name.clone(), SourceSpec::Pypi(spec.clone()).into()));
    let engines = manifest.engines.iter().map(|(name, spec)| (Kind::Engine, name.clone(), spec.source.clone().into()));
    let request = |name: &Name| Some((Kind::Model, name.clone(), manifest.models.get(name)?.request()?));
    let models = manifest.models_in_order().into_iter().filter_map(request);
    tools.chain(engines).chain(models).collect()
}

/// Where lockfile and manifest differ; empty when the lockfile is up to date.
pub fn staleness(manifest: &Manifest, lock: &Lockfile) -> Vec<Staleness> {
    let mut stale = Vec::new();
    let requests = requests(manifest);
    for (kind, name, request) in &requests {
        let why = match lock.get(*kind, name) {
            None => Why::Added,
            Some(entry) if entry.request() != *request => {
                Why::Changed { manifest: in_words(request), lock: in_words(&entry.request()) }
            }
            Some(Entry::Engine(entry)) if entry.allow != manifest.engines[name].allow => {
                Why::Changed { manifest: permissions(&manifest.engines[name].allow), lock: permissions(&entry.allow) }
            }
            Some(Entry::Model(ModelEntry { pin: ModelPin::Derived { request, inputs }, .. }))
                if lock.inputs(request) != Some(*inputs) =>
            {
                Why::Inputs
            }
            Some(_) => continue,
        };
        stale.push(Staleness { kind: *kind, name: name.clone(), why });
    }
    for entry in lock.entries() {
        if !requests.iter().any(|(kind, name, _)| *kind == entry.kind() && name == entry.name()) {
            stale.push(Staleness { kind: entry.kind(), name: entry.name().clone(), why: Why::Removed });
        }
    }
    stale
}

fn permissions(allow: &BTreeSet<Permission>) -> String {
    serde_json::json!({ "allow": allow }).to_string()
}

/// A request as one line of JSON: what differs shows.
fn in_words(request: &Request) -> String {
    serde_json::to_string(request).unwrap_or_default()
}

/// The lockfile, which must be up to date.
///
/// # Errors
/// [`Failure::NoLock`], [`Failure::Stale`].
pub fn require_current(host: &Host, project: &Project) -> Result<Lockfile, Failure> {
    let lock = require(project)?;
    let mut entries = staleness(&project.manifest.value, &lock);
    entries.extend(edited(host, project, &lock, &entries)?);
    host.store.save_records()?;
    if entries.is_empty() { Ok(lock) } else { Err(Failure::Stale { path: project.lock_path.clone(), entries }) }
}

/// The entries whose `path` source was edited and that are not stale for another reason.
///
/// # Errors
/// As for [`edited::edited`].
pub fn edited(host: &Host, project: &Project, lock: &Lockfile, stale: &[Staleness]) -> Result<Vec<Staleness>, Failure> {
    edited::edited(host, project, lock, |kind, name| {
        !stale.iter().any(|entry| entry.kind == kind && entry.name == *name)
    })
}

/// The lockfile as it is.
///
/// # Errors
/// [`Failure::NoLock`].
pub fn require(project: &Project) -> Result<Lockfile, Failure> {
    project.lockfile()?.ok_or_else(|| Failure::NoLock { path: project.lock_path.clone() })
}

/// Resolves entries that are new, changed, in conflict or named by `upgrade`, and writes the lockfile if it differs.
///
/// # Errors
/// When something cannot be resolved; the old lockfile then stays.
pub fn run(host: &Host, project: &Project, upgrade: &Upgrade, resolve_conflicts: bool) -> Result<Locked, Failure> {
    let name =
        format!("lock-{}", crate::base::digest::Digest::of(project.lock_path.as_os_str().as_encoded_bytes()).hex());
    require_inside(project)?;
    let waiting = || host.task.waiting("another aitools is locking this project");
    let _held = host.store.lock(&name, host.task.cancel(), waiting)?;
    // What is fetched to be locked belongs to nobody until the lockfile names it.
    let _kept = host.store.beside_others(host.task.cancel(), || host.task.waiting(REMOVING))?;
    check_names(project, upgrade)?;
    super::demand::check_derivations(host, project)?;
    let old = previous(project, resolve_conflicts)?;
    let stale = edited(host, project, &old, &staleness(&project.manifest.value, &old))?;
    let before = edited::fingerprints(host, project);
    let lockfile =
        resolve(host, project, &old, &|kind, name| upgrade.covers(name) || is_there(&stale, kind, name, &Why::Edited))?;
    edited::remember(host, project, (&old, &lockfile), &before, |kind, name| {
        !upgrade.covers(name) && is_there(&stale, kind, name, &Why::Differs)
    });
    super::demand::check_layouts(project, &lockfile)?;
    host.store.save_records()?;
    let written = fs::write_if_changed(&project.lock_path, lockfile.to_text().as_bytes())?;
    Ok(Locked { changes: changes(&old, &lockfile), lockfile, written })
}

fn is_there(stale: &[Staleness], kind: Kind, name: &Name, why: &Why) -> bool {
    stale.iter().any(|entry| entry.why == *why && entry.kind == kind && entry.name == *name)
}

/// A stranger's project may have a link in place of its `manifests` folder: nothing is written through it.
fn require_inside(project: &Project) -> Result<(), Failure> {
    let folder = fs::canonical(fs::parent(&project.lock_path))?;
    if folder.starts_with(fs::canonical(&project.root)?) {
        return Ok(());
    }
    let what = format!("the lockfile would be written outside the project, to `{}`", folder.display());
    Err(Failure::Usage { what, hint: Some("replace the link `manifests` by the folder itself".to_owned()) })
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
        let bytes = fs::read_bounded(&project.lock_path, lockfile::MAX_BYTES as u64)?;
        let shown = super::project::shown(&project.lock_path, &project.root);
        return Ok(lockfile::parse_conflicted(&shown, &bytes)?.agreed);
    }
    Ok(project.lockfile()?.unwrap_or_default())
}

/// `again`: the entries to resolve anew though their request did not change.
fn resolve(
    host: &Host,
    project: &Project,
    old: &Lockfile,
    again: &dyn Fn(Kind, &Name) -> bool,
) -> Result<Lockfile, Failure> {
    let world = host.world(project);
    let manifest = &project.manifest.value;
    let mut lockfile = Lockfile::default();
    for (name, request) in &manifest.tools {
        let kept = old.tool(name).filter(|entry| entry.request == *request && !again(Kind::Tool, name));
        let entry = kept.cloned().map_or_else(|| resolve_tool(&world, name, request), Ok)?;
        lockfile.tools.push(entry);
    }
    for (name, spec) in &manifest.engines {
        let kept = old.engine(name).filter(|entry| entry.origin.request() == spec.source && !again(Kind::Engine, name));
        let entry = kept.cloned().map_or_else(|| resolve_engine(&world, name, &spec.source), Ok)?;
        lockfile.engines.push(EngineEntry { allow: spec.allow.clone(), ..entry });
    }
    for name in manifest.models_in_order() {
        let Some(request) = manifest.models[name].request() else { continue };
        let pin = match (request, old.model(name)) {
            (Request::Derive(request), _) => {
                // What it is derived from is locked by its text.
                lockfile.sort();
                let inputs = lockfile.inputs(&request).ok_or_else(|| outdated_inputs(project, name))?;
                ModelPin::Derived { request, inputs }
            }
            (request @ Request::Source(_), Some(entry)) if entry.request() == request && !again(Kind::Model, name) => {
                entry.pin.clone()
            }
            (Request::Source(source), _) => resolve_model(&world, name, &source)?,
        };
        lockfile.models.push(ModelEntry { name: name.clone(), pin });
    }
    lockfile.sort();
    Ok(lockfile)
}

/// The parser of manifests refuses derivations of what is not there.
fn outdated_inputs(project: &Project, model: &Name) -> Failure {
    let entries = vec![Staleness { kind: Kind::Model, name: model.clone(), why: Why::Inputs }];
    Failure::Stale { path: project.lock_path.clone(), entries }
}

fn resolve_tool(world: &World, name: &Name, request: &PypiSpec) -> Result<ToolEntry, Failure> {
    let entry = |packages| ToolEntry { name: name.clone(), request: request.clone(), packages };
    resolve_one(world, Kind::Tool, name, || request.resolve_packages(world).map(entry), |entry| Entry::Tool(entry))
}

fn resolve_engine(world: &World, name: &Name, request: &SourceSpec) -> Result<EngineEntry, Failure> {
    let entry = |(origin, tree)| EngineEntry { name: name.clone(), origin, tree, allow: BTreeSet::new() };
    let resolve = || source::resolve_tree(request, world).map(entry);
    resolve_one(world, Kind::Engine, name, resolve, |entry| Entry::Engine(entry))
}

fn resolve_model(world: &World, name: &Name, request: &SourceSpec) -> Result<ModelPin, Failure> {
    let entry = |(origin, files)| ModelEntry { name: name.clone(), pin: ModelPin::Files { origin, files } };
    let resolve = || source::resolve_files(request, world).map(entry);
    Ok(resolve_one(world, Kind::Model, name, resolve, |entry| Entry::Model(entry))?.pin)
}

fn resolve_one<T>(
    world: &World,
    kind: Kind,
    name: &Name,
    resolve: impl FnOnce() -> Result<T, SourceError>,
    shown: impl for<'e> FnOnce(&'e T) -> Entry<'e>,
) -> Result<T, Failure> {
    world.task.check()?;
    let progress = world.task.start(Verb::Lock, name.as_str(), None, Unit::None);
    let entry = resolve().map_err(|error| Failure::source(kind, name, error, None))?;
    progress.finish(shown(&entry).short_pin());
    Ok(entry)
}

fn changes(old: &Lockfile, new: &Lockfile) -> Vec<Change> {
    let mut things: BTreeSet<(Kind, &Name)> = BTreeSet::new();
    things.extend(old.entries().chain(new.entries()).map(|entry| (entry.kind(), entry.name())));
    let change = |(kind, name): (Kind, &Name)| {
        let (from, to) = (old.get(kind, name), new.get(kind, name));
        (from != to).then(|| Change {
            kind,
            name: name.clone(),
            from: from.map(Entry::short_pin),
            to: to.map(Entry::short_pin),
        })
    };
    things.into_iter().filter_map(change).collect()
}

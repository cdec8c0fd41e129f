//! `path` sources that were edited since they were locked. Sizes and times are compared on every command
//! ([`PathSpec::fingerprint`]); only when they differ, the files are hashed.
//!
//! A source that is gone was not edited: what was locked may be in the store still. One that never was what the lockfile says
//! was not edited either: the lockfile may be somebody else's or damaged, so nobody but the user replaces its pin.

use std::collections::BTreeMap;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::Name;
use crate::format::lockfile::{FilePin, FilesOrigin, Lockfile, ModelPin, Origin};
use crate::format::manifest::{Kind, PathSpec, SourceSpec};
use crate::source::{Source as _, SourceError, TreeSource as _, World};
use crate::store::records::PathState;

use super::failure::{Staleness, Why};
use super::{Failure, Host, Project};

/// An entry of the lockfile with a `path` source.
struct PathEntry<'a> {
    kind: Kind,
    name: &'a Name,
    request: &'a PathSpec,
    /// Of what is locked.
    content: Digest,
}

/// Fingerprints of `path` sources, by entry.
pub type Fingerprints = BTreeMap<(Kind, Name), Digest>;

/// The entries that `wanted` names and whose source is not what was locked.
///
/// # Errors
/// When a source cannot be read, or the user asked to stop.
pub fn edited(
    host: &Host,
    project: &Project,
    lock: &Lockfile,
    wanted: impl Fn(Kind, &Name) -> bool,
) -> Result<Vec<Staleness>, Failure> {
    let world = host.world(project);
    let mut found = Vec::new();
    for entry in entries(lock).into_iter().filter(|entry| wanted(entry.kind, entry.name)) {
        let failed = |error| Failure::source(entry.kind, entry.name, error, project.lock_line(entry.name));
        if let Some(why) = difference(host, &world, &entry).map_err(failed)? {
            found.push(Staleness { kind: entry.kind, name: entry.name.clone(), why });
        }
    }
    Ok(found)
}

fn difference(host: &Host, world: &World, entry: &PathEntry<'_>) -> Result<Option<Why>, SourceError> {
    if !fs::exists(&world.project.join(&entry.request.path)) {
        return Ok(None);
    }
    let (source, content) = (source_of(world, entry), entry.content);
    let before = entry.request.fingerprint(world)?;
    let last = host.store.records().path_state(&source);
    let is_last = |fingerprint| last.is_some_and(|last| (last.fingerprint, last.content) == (fingerprint, content));
    if before.is_some() && is_last(before) {
        return Ok(None);
    }
    let found = match hashed(world, entry) {
        // The files that were locked are not there any more.
        Err(SourceError::Missing { .. } | SourceError::Disagreement { .. }) => None,
        found => Some(found?),
    };
    if found != Some(content) {
        let was_locked = last.is_some_and(|last| last.content == content || last.earlier == Some(content));
        return Ok(Some(if was_locked { Why::Edited } else { Why::Differs }));
    }
    let fingerprint = if before == entry.request.fingerprint(world)? { before } else { None };
    if !is_last(fingerprint) {
        host.store.records().learn_path(&source, PathState { fingerprint, content, earlier: None });
    }
    Ok(None)
}

fn hashed(world: &World, entry: &PathEntry<'_>) -> Result<Digest, SourceError> {
    match entry.kind {
        Kind::Model => entry.request.resolve_files(world).map(|((), files)| digest_of(&files)),
        Kind::Engine | Kind::Tool => entry.request.resolve_tree(world).map(|((), tree)| tree),
    }
}

/// The fingerprints of all `path` sources of a manifest, as far as they prove anything.
pub fn fingerprints(host: &Host, project: &Project) -> Fingerprints {
    let world = host.world(project);
    let manifest = &project.manifest.value;
    let engines = manifest.engines.iter().map(|(name, spec)| (Kind::Engine, name, Some(&spec.source)));
    let models = manifest.models.iter().map(|(name, spec)| (Kind::Model, name, spec.source.as_ref()));
    let of = |(kind, name, source): (Kind, &Name, Option<&SourceSpec>)| match source {
        Some(SourceSpec::Path(request)) => Some(((kind, name.clone()), request.fingerprint(&world).ok()??)),
        _ => None,
    };
    engines.chain(models).filter_map(of).collect()
}

/// Remembers what is about to replace the lockfile `old`, with the fingerprints that sources have now as before. Entries that
/// `differing` names were kept although their source is something else: nothing is remembered of them.
pub fn remember(
    host: &Host,
    project: &Project,
    (old, lock): (&Lockfile, &Lockfile),
    before: &Fingerprints,
    differing: impl Fn(Kind, &Name) -> bool,
) {
    let (world, after, old) = (host.world(project), fingerprints(host, project), entries(old));
    for entry in entries(lock).into_iter().filter(|entry| !differing(entry.kind, entry.name)) {
        let key = (entry.kind, entry.name.clone());
        let fingerprint = after.get(&key).filter(|after| before.get(&key) == Some(after)).copied();
        let earlier = old.iter().find(|old| (old.kind, old.name) == (entry.kind, entry.name)).map(|old| old.content);
        let state = PathState { fingerprint, content: entry.content, earlier };
        host.store.records().learn_path(&source_of(&world, &entry), state);
    }
}

fn entries(lock: &Lockfile) -> Vec<PathEntry<'_>> {
    let engines = lock.engines.iter().filter_map(|entry| match &entry.origin {
        Origin::Path { request } => {
            Some(PathEntry { kind: Kind::Engine, name: &entry.name, request, content: entry.tree })
        }
        _ => None,
    });
    let models = lock.models.iter().filter_map(|entry| match &entry.pin {
        ModelPin::Files { origin: FilesOrigin::Other(Origin::Path { request }), files } => {
            Some(PathEntry { kind: Kind::Model, name: &entry.name, request, content: digest_of(files) })
        }
        _ => None,
    });
    engines.chain(models).collect()
}

/// The source's name: the same request in another project is another source.
fn source_of(world: &World, entry: &PathEntry<'_>) -> Digest {
    let request = serde_json::to_string(entry.request).unwrap_or_default();
    Digest::of(format!("{:?} {} {request}", world.project, entry.kind.as_str()).as_bytes())
}

fn digest_of(files: &[FilePin]) -> Digest {
    let mut lines: Vec<String> =
        files.iter().map(|file| format!("{} {} {}\n", file.sha256, file.size, file.path)).collect();
    lines.sort();
    Digest::of(lines.concat().as_bytes())
}

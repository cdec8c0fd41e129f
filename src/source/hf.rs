//! Weights from the Hugging Face Hub: a revision becomes a commit, globs become files with size and SHA-256, and what is
//! fetched goes through the cache that every Hugging Face tool shares ([`super::hub_cache`]).
//!
//! At lock nothing is downloaded but small files outside large file storage, for which the Hub tells no SHA-256; they stay in
//! the cache for the fetch after it.
//! The `hf-hub` crate gives names and cache discovery; asking and downloading are ours (`hf/hub.rs`,
//! [`super::download`]), because it neither tells digests nor checks bytes.

mod hub;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::hashed::Hashed;
use crate::base::name::RelPath;
use crate::base::parallel;
use crate::format::gguf::PartName;
use crate::format::lockfile::FilePin;
use crate::format::manifest::HfSpec;
use crate::report::Task;

use self::hub::{Hub, Listed, Revision};
use super::download::{Download, RESERVE_BYTES, download, missing_bytes, require_space, sweep_parts};
use super::globs::Globs;
use super::hub_cache::HubCache;
use super::{Fetched, Source, SourceError, World};

const MAIN: &str = "main";
const GGUF: &str = ".gguf";
/// Files outside large file storage are hashed at lock up to this size. (The Hub takes none over 10 MB.)
const MAX_SMALL_BYTES: u64 = 32 << 20;

/// Files up to this size are brought several at a time, as many as the Python client's.
const SMALL_BYTES: u64 = 1 << 20;
const FILES_AT_ONCE: usize = 8;

impl Source for HfSpec {
    type Pin = Commit;

    fn resolve_files(&self, world: &World) -> Result<(Commit, Vec<FilePin>), SourceError> {
        let globs = Globs::new(&self.files)?;
        let hub = Hub::new(world, &self.hf)?;
        let asked = self.rev.as_deref().unwrap_or(MAIN);
        let revision = hub.revision(asked)?;
        let cache = HubCache::new(&hub.settings.cache, &self.hf, &revision.commit.to_string());
        if let Some(name) = revision.unusable.first() {
            let (what, count) = (hub.what(), revision.unusable.len());
            world.task.warn(format!(
                "{what}: {count} files with names that are not valid here are skipped, such as {name:?}"
            ));
        }
        let there: Vec<&RelPath> = revision.files.keys().collect();
        let chosen = globs.select(&hub.what(), &there)?.into_iter().cloned().collect();
        let chosen = with_all_parts(&hub.what(), chosen, &revision.files)?;
        let chosen: Vec<RelPath> = chosen.into_iter().collect();
        let files = parallel::map(FILES_AT_ONCE, &chosen, |path| pin(&hub, &cache, &revision, path))?;
        cache.note_locked(asked, &revision.commit.to_string());
        Ok((revision.commit, files))
    }

    fn fetch_files(
        &self,
        world: &World,
        commit: &Commit,
        files: &[&FilePin],
        staging: &Path,
    ) -> Result<Fetched, SourceError> {
        let hub = Hub::new(world, &self.hf)?;
        let cache = HubCache::new(&hub.settings.cache, &self.hf, &commit.to_string());
        let (mut fetched, mut missing) = (Fetched::default(), Vec::new());
        for pin in files.iter().copied() {
            match cache.find(pin, &world.task)? {
                Some(file) => fetched.hashed.extend(file.placed(&pin.path.under(staging))?),
                None => missing.push(pin),
            }
        }
        let revision = self.rev.as_deref().unwrap_or(MAIN);
        let Some(first) = missing.first() else {
            // A cache that may only be read is good enough.
            let _ = cache.note_revision(revision, &commit.to_string());
            return Ok(fetched);
        };
        hub.require_online(&format!("`{}` of {}", first.path, hub.what()))?;
        let (parts, connections) = (cache.parts(), world.connections());
        sweep_parts(&parts);
        let bringing = Bringing { parts, hub, cache, commit: *commit, task: &world.task, connections };
        require_space(&bringing.parts, missing.iter().map(|pin| missing_bytes(&bringing.parts, pin)).sum())?;
        // A large file has several connections of its own; of a small one most is the wait for an answer.
        let (small, large): (Vec<_>, Vec<_>) = missing.into_iter().partition(|pin| pin.size <= SMALL_BYTES);
        for (files, at_once) in [(small, FILES_AT_ONCE), (large, 1)] {
            let placed = parallel::map(at_once, &files, |pin| -> Result<_, SourceError> {
                Ok(bringing.bring(pin)?.placed(&pin.path.under(staging))?)
            })?;
            fetched.hashed.extend(placed.into_iter().flatten());
        }
        bringing.cache.note_revision(revision, &commit.to_string())?;
        Ok(fetched)
    }

    fn copies(&self, world: &World, commit: &Commit, files: &[&FilePin]) -> Vec<(PathBuf, FilePin)> {
        let Ok(hub) = Hub::new(world, &self.hf) else { return Vec::new() };
        let cache = HubCache::new(&hub.settings.cache, &self.hf, &commit.to_string());
        let of = |pin: &&FilePin| cache.copies(pin).into_iter().map(|path| (path, (*pin).clone())).collect::<Vec<_>>();
        files.iter().flat_map(of).collect()
    }

    /// Files that the cache seems to have take no space; they are verified when they are fetched.
    fn space(&self, world: &World, commit: &Commit, files: &[&FilePin]) -> Result<(PathBuf, u64), SourceError> {
        let cache = HubCache::new(&Hub::new(world, &self.hf)?.settings.cache, &self.hf, &commit.to_string());
        let parts = cache.parts();
        let missing = files.iter().filter(|pin| !cache.seems_to_have(pin));
        let needed = missing.map(|pin| missing_bytes(&parts, pin)).fold(0, u64::saturating_add);
        Ok((parts, needed))
    }
}

/// Bytes that unfinished downloads and files set aside take in this user's cache; 0 when nothing says where it is.
pub fn leftover_bytes(env: &BTreeMap<String, String>) -> (u64, u64) {
    hub::Settings::of(env).map_or((0, 0), |settings| super::hub_cache::leftover_bytes(&settings.cache))
}

/// The work of fetching one entry.
struct Bringing<'a> {
    hub: Hub<'a>,
    cache: HubCache,
    parts: PathBuf,
    commit: Commit,
    task: &'a Task,
    connections: usize,
}

impl Bringing<'_> {
    fn transfer<'b>(
        &'b self,
        pin: &'b FilePin,
        urls: &'b [String],
        headers: &'b [(&'b str, &'b str)],
        to: &'b Path,
    ) -> Download<'b> {
        Download {
            what: pin.path.as_str(),
            urls,
            headers,
            size_bytes: Some(pin.size),
            sha256: Some(pin.sha256),
            parts: &self.parts,
            to,
            streams: self.connections,
            reserve_bytes: RESERVE_BYTES,
        }
    }

    /// Into the cache. The Hub's answer for the file leads to another host, which gets no token; when that link expires,
    /// the download asks the Hub for a new one.
    fn bring(&self, pin: &FilePin) -> Result<Hashed, SourceError> {
        let name = self.hub.look(&self.commit, pin)?;
        let url = self.hub.file_url(&self.commit, &pin.path);
        let bearer = self.hub.authorization(&url);
        let headers: Vec<(&str, &str)> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
        self.cache.obtain(&name, pin, self.task, &mut |to| {
            let ask = self.transfer(pin, std::slice::from_ref(&url), &headers, to);
            download(&self.hub.http, self.task, &ask)
        })
    }
}

fn pin(hub: &Hub<'_>, cache: &HubCache, revision: &Revision, path: &RelPath) -> Result<FilePin, SourceError> {
    let listed = &revision.files[path];
    let sha256 = match listed.sha256 {
        Some(sha256) => sha256,
        None if listed.size <= MAX_SMALL_BYTES => return small(hub, cache, revision, path),
        None => {
            return Err(SourceError::Hostile {
                what: format!("`{path}` of {}", hub.what()),
                why: "the Hub reports no digest for it, and it is too large to be hashed while locking".to_owned(),
            });
        }
    };
    Ok(FilePin { path: path.clone(), size: listed.size, sha256 })
}

/// The pin of a file for which the Hub tells git's name alone: from the cache when it is there, else fetched and kept.
fn small(hub: &Hub<'_>, cache: &HubCache, revision: &Revision, path: &RelPath) -> Result<FilePin, SourceError> {
    let listed = &revision.files[path];
    let of = |bytes: &[u8]| FilePin { path: path.clone(), size: listed.size, sha256: Digest::of(bytes) };
    let blob = listed.git_blob.as_deref();
    let there = blob.and_then(|blob| cache.small(blob, listed.size)).filter(|bytes| listed.is(bytes));
    if let Some(bytes) = there {
        let pin = of(&bytes);
        cache.keep(blob.unwrap_or_default(), &pin, &bytes, hub.task());
        return Ok(pin);
    }
    let bytes = hub.small_file(&revision.commit, path, listed)?;
    let pin = of(&bytes);
    cache.keep(blob.unwrap_or(&pin.sha256.hex()), &pin, &bytes, hub.task());
    Ok(pin)
}

/// All parts of a split file are fetched: one part alone cannot be used.
fn with_all_parts(
    what: &str,
    mut chosen: BTreeSet<RelPath>,
    there: &BTreeMap<RelPath, Listed>,
) -> Result<BTreeSet<RelPath>, SourceError> {
    let parts = chosen.iter().filter_map(|path| PartName::of(path.as_str())).filter(|part| part.ending == GGUF);
    let sets: BTreeSet<(String, u32)> = parts.map(|part| (part.stem.to_owned(), part.count)).collect();
    for (stem, count) in &sets {
        for number in 1..=*count {
            let name = PartName { stem, number, count: *count, ending: GGUF }.to_string();
            match name.parse::<RelPath>().ok().filter(|path| there.contains_key(path)) {
                Some(path) => drop(chosen.insert(path)),
                None => {
                    return Err(SourceError::Missing {
                        what: what.to_owned(),
                        why: format!("`{name}` is missing, and the other parts cannot be used without it"),
                        hint: Some("try another revision, or ask its owners".to_owned()),
                    });
                }
            }
        }
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests;

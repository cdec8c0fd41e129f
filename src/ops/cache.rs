//! `cache`: what the cache holds, which projects need it, and the removal of the rest.
//!
//! A project registers when `sync` prepares it ([`crate::store::roots`]) and counts until its lockfile is gone. It needs what its
//! lockfile pins, and the engines and derived models that were made under that lockfile.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::base::digest::Digest;
use crate::base::fs::{self, Footprint};
use crate::base::platform::Platform;
use crate::format::lockfile::{self, Lockfile, ModelPin};
use crate::report::{Unit, Verb};
use crate::store::usage::{Item, Kind};

use super::demand::demand;
use super::install::Purpose;
use super::{Failure, Host, Project, lock};

/// Unfinished downloads, git mirrors and logs stay this long: a later run may go on with them.
const MIN_AGE: Duration = Duration::from_secs(24 * 3600);

/// What the things of one kind take.
#[derive(Debug, Serialize)]
pub struct Usage {
    /// Which kind.
    pub kind: Kind,
    /// How many there are.
    pub count: usize,
    /// What they take of the disk.
    #[serde(flatten)]
    pub footprint: Footprint,
}

/// A thing in the cache, and who needs it.
#[derive(Debug, Serialize)]
pub struct Listed {
    /// The thing.
    #[serde(flatten)]
    pub item: Item,
    /// What it is, as far as that is known.
    pub name: String,
    /// The lockfiles of the projects that need it.
    pub needed_by: BTreeSet<PathBuf>,
}

/// What to remove.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ask {
    /// Change nothing, and report what would be removed.
    pub dry_run: bool,
    /// Leave what was put there or linked within this time.
    pub older_than: Option<Duration>,
    /// Remove, the oldest first, only until the cache takes no more bytes than this.
    pub max_bytes: Option<u64>,
}

/// What was removed, or would be.
#[derive(Debug, Default, Serialize)]
pub struct Removed {
    /// Number of things.
    pub count: usize,
    /// Bytes that are free now.
    pub freed_bytes: u64,
    /// Bytes of files that have further names (hard links), in projects or in other caches, which keep them on the disk.
    pub shared_bytes: u64,
    /// What the cache takes afterwards, in bytes.
    pub left_bytes: u64,
    /// Lockfiles of projects that are gone.
    pub gone: Vec<PathBuf>,
    /// What was removed, by kind and name.
    pub items: Vec<Listed>,
    /// Whether nothing was changed.
    pub dry_run: bool,
}

/// What the cache takes, by kind.
pub fn size(host: &Host) -> Vec<Usage> {
    let mut all: Vec<Usage> =
        Kind::ALL.map(|kind| Usage { kind, count: 0, footprint: Footprint::default() }).into_iter().collect();
    for item in host.store.items() {
        if let Some(usage) = all.iter_mut().find(|usage| usage.kind == item.kind) {
            usage.count += 1;
            usage.footprint += item.footprint;
        }
    }
    all.retain(|usage| usage.count > 0);
    all
}

/// Everything in the cache, and who needs it.
///
/// # Errors
/// When it cannot be told what a registered project needs.
pub fn list(host: &Host) -> Result<Vec<Listed>, Failure> {
    Ok(Needs::read(host)?.listed(host))
}

/// Removes what no registered project needs.
///
/// # Errors
/// When it cannot be told what a registered project needs; then nothing is removed.
pub fn prune(host: &Host, ask: Ask) -> Result<Removed, Failure> {
    // Who only looks writes nothing, not even a lock.
    let _alone = (!ask.dry_run).then(|| alone(host)).transpose()?;
    if !ask.dry_run {
        host.store.sweep()?;
    }
    let needs = Needs::read(host)?;
    let listed = needs.listed(host);
    let all_bytes = bytes_of(&listed);
    let age = |kind: Kind| {
        let asked = ask.older_than.unwrap_or_default();
        if matches!(kind, Kind::Scratch | Kind::Log) { asked.max(MIN_AGE) } else { asked }
    };
    let is_due = |listed: &Listed| {
        let age = age(listed.item.kind);
        listed.needed_by.is_empty() && (age.is_zero() || fs::is_older_than(&listed.item.path, age))
    };
    let mut due: Vec<Listed> = listed.into_iter().filter(is_due).collect();
    if let Some(max_bytes) = ask.max_bytes {
        let mut total = all_bytes;
        due.sort_by_key(|listed| listed.item.touched_ns);
        due.retain(|listed| {
            let over = total > max_bytes;
            if over {
                total -= listed.item.footprint.bytes;
            }
            over
        });
    }
    if !ask.dry_run {
        for (path, _) in &needs.gone {
            fs::remove_file(path)?;
        }
    }
    let gone = needs.gone.into_iter().map(|(_, lockfile)| lockfile).collect();
    remove(host, due, gone, all_bytes, ask.dry_run)
}

/// Removes everything, whoever needs it.
///
/// # Errors
/// When another process is using the cache.
pub fn clean(host: &Host, dry_run: bool) -> Result<Removed, Failure> {
    let _alone = (!dry_run).then(|| alone(host)).transpose()?;
    if !dry_run && host.store.is_in_use()? {
        let what = "another aitools is using the cache".to_owned();
        return Err(Failure::Usage { what, hint: Some("wait until it has ended, or stop it".to_owned()) });
    }
    // What is needed is shown, too; a lockfile that cannot be read does not keep its cache from being cleaned.
    let needs = Needs::read(host).unwrap_or_default();
    let all = needs.listed(host);
    let all_bytes = bytes_of(&all);
    if !dry_run {
        for (root, _) in host.store.roots()? {
            fs::remove_file(&root)?;
        }
    }
    let removed = remove(host, all, Vec::new(), all_bytes, dry_run)?;
    if !dry_run {
        for memory in ["records.json", "proofs.json", "tools.json"] {
            fs::remove_file(&host.store.root().join(memory))?;
        }
    }
    Ok(removed)
}

fn alone(host: &Host) -> Result<crate::base::lock::Lock, Failure> {
    if !host.store.is_ours() {
        let what = format!("`{}` is not a cache of aitools: it has no `CACHEDIR.TAG`", host.store.root().display());
        return Err(Failure::Usage { what, hint: Some("name the cache's folder with `--cache-dir`".to_owned()) });
    }
    let waiting = || host.task.waiting("another aitools is locking a project or removing files from the cache");
    Ok(host.store.alone(host.task.cancel(), waiting)?)
}

fn bytes_of(listed: &[Listed]) -> u64 {
    listed.iter().map(|listed| listed.item.footprint.bytes).sum()
}

/// Removes what is due of a cache that takes `all_bytes`.
fn remove(
    host: &Host,
    due: Vec<Listed>,
    gone: Vec<PathBuf>,
    all_bytes: u64,
    dry_run: bool,
) -> Result<Removed, Failure> {
    let total = bytes_of(&due);
    let mut removed = Removed { gone, dry_run, left_bytes: all_bytes - total, ..Removed::default() };
    let progress = (!dry_run && !due.is_empty())
        .then(|| host.task.start(Verb::Remove, "files of the cache", Some(total), Unit::Bytes));
    let mut count = |item: &Item| {
        if let Some(progress) = &progress {
            progress.add(item.footprint.bytes);
        }
        removed.count += 1;
        removed.shared_bytes += item.footprint.shared_bytes;
        removed.freed_bytes += item.footprint.bytes - item.footprint.shared_bytes;
    };
    let items: Vec<&Item> = due.iter().map(|listed| &listed.item).collect();
    if dry_run {
        items.into_iter().for_each(&mut count);
    } else {
        host.store.remove(&items, &mut count)?;
    }
    if let Some(progress) = progress {
        progress.finish("");
    }
    removed.items = due;
    Ok(removed)
}

/// What registered projects need, by kind and digest.
#[derive(Debug, Default)]
struct Needs {
    by: BTreeMap<(Kind, Digest), (String, BTreeSet<PathBuf>)>,
    /// Files that register projects that are gone, and the lockfiles that these had.
    gone: Vec<(PathBuf, PathBuf)>,
}

impl Needs {
    fn read(host: &Host) -> Result<Self, Failure> {
        let mut needs = Self::default();
        for (file, root) in host.store.roots()? {
            let Some(root) = root else {
                let why = "it cannot be read".to_owned();
                return Err(unknown(&file, why));
            };
            if root.unnamed {
                let why = format!("the path of its project, `{}`, is not Unicode", root.lockfile.display());
                return Err(unknown(&file, why));
            }
            let bytes = match fs::read_bounded(&root.lockfile, lockfile::MAX_BYTES as u64) {
                Ok(bytes) => bytes,
                Err(error) if is_gone(&error) => {
                    needs.gone.push((file, root.lockfile));
                    continue;
                }
                Err(error) => return Err(unknown(&file, error.to_string())),
            };
            let shown = root.lockfile.display().to_string();
            let lock = lockfile::parse(&shown, &bytes).map_err(|problems| {
                let first = problems.0.first().map_or_else(String::new, |problem| problem.message.clone());
                unknown(&file, format!("`{shown}` cannot be read: {first}"))
            })?;
            needs.add_pinned(&lock.0.value, &root.lockfile);
            for fingerprint in &root.artifacts {
                needs.add(Kind::Artifact, *fingerprint, "", &root.lockfile);
            }
            for fingerprint in &root.derived {
                needs.add(Kind::Derived, *fingerprint, "", &root.lockfile);
                let receipt = host.store.derived(fingerprint);
                for (path, file) in receipt.iter().flat_map(|receipt| &receipt.files) {
                    needs.add(Kind::Blob, file.sha256, path.as_str(), &root.lockfile);
                }
            }
        }
        Ok(needs)
    }

    fn add_pinned(&mut self, lock: &Lockfile, lockfile: &Path) {
        for tool in &lock.tools {
            for package in &tool.packages {
                self.add(Kind::Tool, package.sha256, tool.name.as_str(), lockfile);
            }
        }
        for engine in &lock.engines {
            self.add(Kind::Tree, engine.tree, engine.name.as_str(), lockfile);
        }
        for model in &lock.models {
            let ModelPin::Files { files, .. } = &model.pin else { continue };
            for file in files {
                self.add(Kind::Blob, file.sha256, file.path.as_str(), lockfile);
            }
        }
    }

    fn add(&mut self, kind: Kind, digest: Digest, name: &str, lockfile: &Path) {
        let (known, by) = self.by.entry((kind, digest)).or_default();
        if known.is_empty() {
            name.clone_into(known);
        }
        by.insert(lockfile.to_owned());
    }

    /// Everything in the cache, and who needs it.
    fn listed(&self, host: &Host) -> Vec<Listed> {
        host.store.items().into_iter().map(|item| self.of(host, item)).collect()
    }

    fn of(&self, host: &Host, item: Item) -> Listed {
        let found = item.digest.and_then(|digest| self.by.get(&(item.kind, digest)));
        let (mut name, needed_by) = found.cloned().unwrap_or_default();
        if let (Kind::Artifact | Kind::Derived, Some(digest)) = (item.kind, item.digest) {
            let receipt = match item.kind {
                Kind::Artifact => host.store.receipt_of(&digest).map(|artifact| artifact.receipt),
                _ => host.store.derived(&digest),
            };
            name = receipt.map_or(name, |receipt| format!("{} ({})", receipt.engine, receipt.variant));
        }
        Listed { item, name, needed_by }
    }
}

fn is_gone(error: &fs::FsError) -> bool {
    error.is_not_found() || error.source.kind() == std::io::ErrorKind::NotADirectory
}

/// What is needed cannot be told, so that everything is.
fn unknown(root: &Path, why: String) -> Failure {
    let what = format!("nothing was removed, because `{}` does not say what its project needs: {why}", root.display());
    let hint = "run `aitools sync` in that project, or delete the first file if the project is no longer needed";
    Failure::Usage { what, hint: Some(hint.to_owned()) }
}

/// The key of a pipeline's cache.
#[derive(Debug, Serialize)]
pub struct Key {
    /// Changes when the lockfile or anything that decides how engines are built changes.
    pub key: String,
    /// The beginning that all keys of this project's platform have: an older cache is better than none.
    pub prefix: String,
}

/// The key under which a pipeline should keep the cache of a project.
///
/// # Errors
/// When the lockfile is missing, or an engine cannot be built here.
pub fn key(host: &Host, project: &Project) -> Result<Key, Failure> {
    let lock = lock::require(project)?;
    let demand = demand(host, project, &lock, &[], Purpose::Install)?;
    let mut parts = vec![Digest::of(lock.to_text().as_bytes()).hex()];
    parts.extend(demand.engines.iter().map(|engine| engine.required.fingerprint.hex()));
    parts[1..].sort();
    let platform = Platform::HOST;
    let prefix = format!("aitools-{}-{}-", platform.os, platform.arch);
    Ok(Key { key: format!("{prefix}{}", Digest::of(parts.join("\n").as_bytes()).short()), prefix })
}

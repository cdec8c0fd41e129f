//! `verify`: hashes everything that may be used again, against lockfile, listings and receipts: placed weights, the store's
//! own files, those of the Hugging Face cache, engines, their sources and tools. Needs no network, and ignores the records that make `sync` quick.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::hashed::Hashed;
use crate::base::parallel;
use crate::report::{Progress, Unit, Verb};
use crate::store::StoreError;
use crate::store::artifacts::Artifact;
use crate::store::damage::Damage;
use crate::store::proofs::Claim;

use super::demand::{Demand, demand};
use super::failure::Damaged;
use super::install::Purpose;
use super::{Failure, Host, Project, fetch, lock};

/// Files hashed at a time: two keep a disk and a core busy, more only help when files are many.
const MAX_THREADS: usize = 8;

/// What `verify` found.
#[derive(Debug, serde::Serialize)]
pub struct Verified {
    /// Number of files and folders that were hashed.
    pub files: usize,
    /// Bytes of the files that were hashed one by one.
    pub size_bytes: u64,
    /// What is not as recorded.
    pub damages: Vec<Damaged>,
}

/// One thing to hash.
struct Target {
    kind: Kind,
    /// The file, or the folder with everything in it.
    path: PathBuf,
    what: String,
    /// The lockfile's line, or what else says how it should be.
    recorded_in: String,
}

enum Kind {
    File {
        expected: Digest,
        size_bytes: u64,
    },
    /// A file of a cache that other programs use, too.
    Copy {
        expected: Digest,
        size_bytes: u64,
    },
    Artifact(Artifact),
    Tree(Digest),
    Tool(Digest),
}

/// Hashes everything that the policies need and that is on this machine; of that, what `only` names when it names something.
///
/// # Errors
/// When the project cannot be read, or the user asked to stop. Damage is a result, not an error.
pub fn run(host: &Host, project: &Project, names: &[String], only: &[Damaged]) -> Result<Verified, Failure> {
    let targets = targets_of(host, project, names, only)?;
    let size = |target: &Target| match target.kind {
        Kind::File { size_bytes, .. } | Kind::Copy { size_bytes, .. } => size_bytes,
        Kind::Artifact(_) | Kind::Tree(_) | Kind::Tool(_) => 0,
    };
    let size_bytes = targets.iter().map(size).sum();
    let progress = host.task.start(Verb::Verify, format!("{} files", targets.len()), None, Unit::Bytes);
    let damages = hash_all(host, &targets, &progress)?;
    host.store.add_proofs(targets.iter().filter_map(|target| proof_of(target, &damages)))?;
    progress.finish(if damages.is_empty() { String::new() } else { format!("{} damaged", damages.len()) });
    host.store.save_records()?;
    Ok(Verified { files: targets.len(), size_bytes, damages })
}

/// What hashing a target proved, whichever way it ended.
fn proof_of(target: &Target, damages: &[Damaged]) -> Option<(Claim, Digest, bool)> {
    let holds = !damages.iter().any(|damage| is_in(target, damage));
    match &target.kind {
        Kind::File { expected, .. } => Some((Claim::Weights, *expected, holds)),
        Kind::Artifact(artifact) => Some((Claim::Engine, artifact.receipt.fingerprint, holds)),
        Kind::Tree(digest) => Some((Claim::Source, *digest, holds)),
        Kind::Copy { .. } | Kind::Tool(_) => None,
    }
}

fn is_in(target: &Target, damage: &Damaged) -> bool {
    damage.path.starts_with(&target.path) || damage.what == target.what
}

/// Removes damaged files of the store and damaged trees and tools, so that `sync` makes again what is needed of them. Files
/// in the project stay until their replacements are there.
///
/// # Errors
/// When the project cannot be read, or something cannot be removed.
pub fn discard(host: &Host, project: &Project, names: &[String], damages: &[Damaged]) -> Result<(), Failure> {
    for target in targets_of(host, project, names, damages)? {
        match target.kind {
            Kind::File { .. } if target.path.starts_with(host.store.root()) => fs::remove_file(&target.path)?,
            Kind::Tree(digest) => host.store.remove_tree(&digest)?,
            Kind::Tool(package) => host.store.remove_tool(&package)?,
            // Whoever needs it fetches it again.
            Kind::Copy { .. } => fs::remove_file(&target.path)?,
            // `sync` replaces both, and keeps a file that it did not place.
            Kind::File { .. } | Kind::Artifact(_) => {}
        }
    }
    Ok(())
}

fn targets_of(host: &Host, project: &Project, names: &[String], only: &[Damaged]) -> Result<Vec<Target>, Failure> {
    let lockfile = lock::require(project)?;
    let demand = demand(host, project, &lockfile, names, Purpose::Install)?;
    let mut targets = weights(host, project, &demand)?;
    targets.extend(engines(host, project, &demand)?);
    targets.retain(|target| only.is_empty() || only.iter().any(|damage| is_in(target, damage)));
    Ok(targets)
}

/// The placed files of the models, and those of the store and of the Hugging Face cache where these are other files.
fn weights(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Vec<Target>, Failure> {
    let mut targets = Vec::new();
    let mut inodes = BTreeSet::new();
    for model in demand.models.iter().filter(|model| model.required.wanted) {
        if model.required.files.is_empty() {
            return Err(Failure::NotSynced { steps: super::sync::plan_for(host, project, demand)?.steps });
        }
        let line = project.lock_line(&model.required.name).unwrap_or_default();
        for (index, (pin, place)) in model.required.files.iter().zip(&model.required.places).enumerate() {
            let made = model.derive.is_some() && model.layout.parts.contains(&index);
            let recorded_in = if made { "its record".to_owned() } else { line.clone() };
            let kind = || Kind::File { expected: pin.sha256, size_bytes: pin.size };
            let place = place.under(&project.root);
            let mut is_other = |path: &Path| {
                fs::stamp(path).map_or(true, |stamp| stamp.inode == 0 || inodes.insert((stamp.device, stamp.inode)))
            };
            // A place that is missing is damage; a missing file of the store is none.
            let blob = Some(host.store.blob_path(&pin.sha256)).filter(|blob| fs::exists(blob));
            let (at_place, in_store) = (is_other(&place), blob.filter(|blob| is_other(blob)));
            if at_place {
                let what = format!("weights file `{}`", pin.path);
                targets.push(Target { kind: kind(), path: place, what, recorded_in: recorded_in.clone() });
            }
            if let Some(path) = in_store {
                let what = format!("cached weights file `{}`", pin.path);
                targets.push(Target { kind: kind(), path, what, recorded_in });
            }
        }
        for (path, pin) in fetch::copies(host, project, model) {
            let is_other =
                fs::stamp(&path).is_ok_and(|stamp| stamp.inode == 0 || inodes.insert((stamp.device, stamp.inode)));
            if is_other {
                let what = format!("file `{}` in the Hugging Face cache", pin.path);
                let kind = Kind::Copy { expected: pin.sha256, size_bytes: pin.size };
                targets.push(Target { kind, path, what, recorded_in: line.clone() });
            }
        }
    }
    Ok(targets)
}

/// The engines that are installed, and the sources and tools that are here.
fn engines(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Vec<Target>, Failure> {
    let mut targets: Vec<Target> = Vec::new();
    for engine in demand.engines.iter().filter(|engine| engine.required.wanted) {
        let name = &engine.required.name;
        let Some(artifact) = host.store.receipt_of(&engine.required.fingerprint) else {
            return Err(Failure::NotSynced { steps: super::sync::plan_for(host, project, demand)?.steps });
        };
        let mut add = |kind, path: PathBuf, what: String, recorded_in: String| {
            if fs::exists(&path) && !targets.iter().any(|other| other.path == path) {
                targets.push(Target { kind, path, what, recorded_in });
            }
        };
        let receipt = "its receipt".to_owned();
        add(Kind::Artifact(artifact.clone()), artifact.path, format!("file of engine `{name}`"), receipt);
        let tree = engine.required.tree;
        let line = project.lock_line(name).unwrap_or_default();
        add(Kind::Tree(tree), host.store.tree_path(&tree), format!("source file of engine `{name}`"), line);
        for tool in &engine.required.tools {
            let (package, what) = (tool.package.sha256, format!("file of tool `{}`", tool.name));
            add(Kind::Tool(package), host.store.tool_path(&package), what, "its listing".to_owned());
        }
    }
    Ok(targets)
}

fn hash_all(host: &Host, targets: &[Target], progress: &Progress) -> Result<Vec<Damaged>, Failure> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get).min(MAX_THREADS);
    let looked_at = parallel::map(threads, targets, |target| hash_one(host, target, progress))?;
    let mut damages: Vec<Damaged> = looked_at.into_iter().flatten().collect();
    damages.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(damages)
}

fn hash_one(host: &Host, target: &Target, progress: &Progress) -> Result<Vec<Damaged>, Failure> {
    let (cancel, mut seen) = (host.task.cancel(), |bytes| progress.add(bytes));
    let found: Result<Vec<Damage>, StoreError> = match &target.kind {
        Kind::File { expected, .. } | Kind::Copy { expected, .. } => {
            return Ok(Vec::from_iter(hash_file(host, target, *expected, progress)?));
        }
        Kind::Artifact(artifact) => host.store.artifact_damages(artifact, cancel, &mut seen),
        Kind::Tree(digest) => host.store.tree_damages(digest, cancel, &mut seen).map(Option::unwrap_or_default),
        Kind::Tool(package) => host.store.tool_damages(package, cancel, &mut seen).map(Option::unwrap_or_default),
    };
    let size = |path: &Path| fs::symlink_metadata(path).ok().map(|meta| meta.len());
    let damaged = |damage: Damage| Damaged {
        what: target.what.clone(),
        expected: damage.expected.map_or_else(|| "no such file".to_owned(), |digest| digest.to_string()),
        computed: damage.computed.map(|digest| digest.to_string()),
        size_bytes: damage.computed.and_then(|_| size(&damage.path)),
        recorded_in: target.recorded_in.clone(),
        path: damage.path,
    };
    Ok(found?.into_iter().map(damaged).collect())
}

fn hash_file(host: &Host, target: &Target, expected: Digest, progress: &Progress) -> Result<Option<Damaged>, Failure> {
    let damaged = |computed: Option<Digest>, size_bytes| Damaged {
        path: target.path.clone(),
        what: target.what.clone(),
        expected: expected.to_string(),
        computed: computed.map(|digest| digest.to_string()),
        size_bytes,
        recorded_in: target.recorded_in.clone(),
    };
    let hashed = Hashed::of_file(&target.path, |bytes| {
        progress.add(bytes);
        host.task.check().map_err(std::io::Error::other)
    });
    host.task.check()?;
    // A disk that cannot read the whole file is damage, too.
    let Ok(hashed) = hashed else {
        host.store.records().learn_unreadable(&target.path);
        return Ok(Some(damaged(None, None)));
    };
    host.store.records().learn(&hashed);
    let computed = hashed.sha256();
    Ok((computed != expected).then(|| damaged(Some(computed), Some(hashed.size_bytes()))))
}

//! `verify`: hashes weights and installed engines again, against lockfile and receipts, without a network and without the
//! records that make `sync` quick.

use std::path::PathBuf;

use crate::base::digest::Digest;
use crate::base::hashed::Hashed;
use crate::base::parallel;
use crate::report::{Progress, Unit};

use super::demand::{Demand, demand};
use super::failure::Damaged;
use super::{Failure, Host, Project, lock};

/// Files hashed at a time: two keep a disk and a core busy, more only help when files are many.
const MAX_THREADS: usize = 8;

#[derive(Debug, serde::Serialize)]
pub struct Verified {
    pub files: usize,
    pub size_bytes: u64,
    pub damages: Vec<Damaged>,
}

struct Target {
    path: PathBuf,
    what: String,
    expected: Digest,
    size_bytes: u64,
    recorded_in: String,
}

/// Hashes everything that the policies need and that is on this machine; of that, the files of `only` when it has any.
///
/// # Errors
/// When the project cannot be read, or the user asked to stop. Damage is a result, not an error.
pub fn run(host: &Host, project: &Project, names: &[String], only: &[Damaged]) -> Result<Verified, Failure> {
    let lockfile = lock::require(project)?;
    let demand = demand(host, project, &lockfile, names, Purpose::Install)?;
    let mut targets = targets(host, project, &demand)?;
    targets.retain(|target| only.is_empty() || only.iter().any(|damage| damage.path == target.path));
    let size_bytes = targets.iter().map(|target| target.size_bytes).sum();
    let progress = host.task.start("verifying", format!("{} files", targets.len()), Some(size_bytes), Unit::Bytes);
    let damages = hash_all(host, &targets, &progress)?;
    progress.finish(if damages.is_empty() { "all right".to_owned() } else { format!("{} wrong", damages.len()) });
    host.store.save_records()?;
    Ok(Verified { files: targets.len(), size_bytes, damages })
}

fn targets(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Vec<Target>, Failure> {
    let mut targets = Vec::new();
    for model in demand.models.iter().filter(|model| model.wish.wanted) {
        if model.wish.files.is_empty() {
            return Err(Failure::NotSynced { steps: super::sync::plan_for(host, project, demand)?.steps });
        }
        let line = project.lock_line(&model.wish.name).unwrap_or_default();
        for (index, (pin, place)) in model.wish.files.iter().zip(&model.wish.places).enumerate() {
            let made = model.derive.is_some() && model.layout.parts.contains(&index);
            let recorded_in = if made { "its record".to_owned() } else { line.clone() };
            let path = place.under(&project.root);
            let what = "weights file".to_owned();
            targets.push(Target { path, what, expected: pin.sha256, size_bytes: pin.size, recorded_in });
        }
    }
    for engine in demand.engines.iter().filter(|engine| engine.wish.wanted) {
        let name = &engine.wish.name;
        let Some(artifact) = host.store.receipt_of(&engine.wish.fingerprint) else {
            return Err(Failure::NotSynced { steps: super::sync::plan_for(host, project, demand)?.steps });
        };
        for (file, installed) in &artifact.receipt.files {
            targets.push(Target {
                path: file.under(&artifact.path),
                what: format!("file of engine `{name}`"),
                expected: installed.sha256,
                size_bytes: installed.size,
                recorded_in: "its receipt".to_owned(),
            });
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

fn hash_one(host: &Host, target: &Target, progress: &Progress) -> Result<Option<Damaged>, Failure> {
    let damaged = |computed: Option<Digest>, size_bytes| Damaged {
        path: target.path.clone(),
        what: target.what.clone(),
        expected: target.expected.to_string(),
        computed: computed.map(|digest| digest.to_string()),
        size_bytes,
        recorded_in: target.recorded_in.clone(),
    };
    let hashed = Hashed::of_file(&target.path, |bytes| {
        progress.add(bytes);
        host.task.check().map_err(std::io::Error::other)
    });
    host.task.check()?;
    // A disk that cannot read it all is damage, too.
    let Ok(hashed) = hashed else {
        host.store.records().learn_unreadable(&target.path);
        return Ok(Some(damaged(None, None)));
    };
    host.store.records().learn(&hashed);
    let computed = hashed.sha256();
    Ok((computed != target.expected).then(|| damaged(Some(computed), Some(hashed.size_bytes()))))
}

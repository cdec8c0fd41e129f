//! `bundle`: moves what a project needs from one machine to another, in one OCI layout: a folder, a tar archive, or a
//! repository of a registry. What is in it, and what of it is believed, is in `docs/bundle.md`.
//!
//! Invariant: an import admits everything that it takes from a bundle, or nothing.

mod admit;
mod collect;

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::platform::Platform;
use crate::format::oci::{Bundle, Config, Layer, Reference};
use crate::report::{Unit, Verb};
use crate::source::World;
use crate::source::oci::layout::{self, Layout};
use crate::source::oci::registry::Registry;
use crate::source::oci::{Source, Target};
use crate::store::StoreError;

use super::{Failure, Host, Project};

pub use admit::{Imported, LeftOut, Why};
use collect::Collected;

/// What was written.
#[derive(Debug, Serialize)]
pub struct Exported {
    /// The digest of the manifest: it decides every byte of the bundle.
    pub manifest: Digest,
    /// Number of blobs, without manifest and configuration.
    pub blobs: usize,
    /// Size of them together, in bytes.
    pub size_bytes: u64,
}

/// Writes what the policies need to a new folder, or to a tar archive when the name ends in `.tar`.
///
/// # Errors
/// [`Failure::NotSynced`] when something is missing on this machine, or when the place cannot be written; nothing has the
/// name then.
pub fn export(host: &Host, project: &Project, policies: &[String], output: &Path) -> Result<Exported, Failure> {
    let target = layout::create(output, &host.task).map_err(Failure::Bundle)?;
    let collected = collect::collect(host, project, policies)?;
    write(host, project, &collected, target)
}

/// Writes what the policies need to a registry.
///
/// # Errors
/// As [`export`], and when the registry cannot be reached or refuses something.
pub fn push(host: &Host, project: &Project, policies: &[String], to: &Reference) -> Result<Exported, Failure> {
    let registry = Registry::new(to, &host.world(project), true).map_err(Failure::Bundle)?;
    let collected = collect::collect(host, project, policies)?;
    write(host, project, &collected, Box::new(registry))
}

fn write(
    host: &Host,
    project: &Project,
    collected: &Collected,
    mut target: Box<dyn Target>,
) -> Result<Exported, Failure> {
    let lockfile = project.lock_path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let config = Config::new(Platform::HOST.to_string(), lockfile);
    let layers: Vec<Layer> = collected.pieces.iter().map(|piece| piece.layer.clone()).collect();
    let (blobs, size_bytes) = (layers.len(), layers.iter().map(|layer| layer.blob.size_bytes).sum());
    let progress = host.task.start(Verb::Export, format!("{blobs} blobs"), Some(size_bytes), Unit::Bytes);
    let mut put_already = BTreeSet::new();
    for piece in &collected.pieces {
        host.task.check()?;
        if !put_already.insert(piece.layer.blob.digest) {
            continue;
        }
        let mut put = || target.put(&piece.layer.blob, &piece.file, &progress);
        if piece.is_ours {
            // A hard link changes the file's status, and nothing else.
            let hashed = host.store.records().prove(&piece.file, &mut host.stopping()).map_err(StoreError::from)?;
            let hashed = hashed.through(&piece.file, put).map_err(Failure::Bundle)?;
            host.store.records().learn(&hashed);
        } else {
            put().map_err(Failure::Bundle)?;
        }
    }
    let bundle = Bundle { config, layers };
    let scratch = host.store.stage()?;
    let (bytes, file) = (bundle.config.to_bytes(), scratch.path().join("config"));
    fs::write_atomic(&file, &bytes)?;
    target.put(&Bundle::blob_of(&bytes), &file, &progress).map_err(Failure::Bundle)?;
    let manifest = bundle.to_manifest();
    target.finish(&manifest).map_err(Failure::Bundle)?;
    progress.finish("");
    host.store.save_records()?;
    Ok(Exported { manifest: Digest::of(&manifest), blobs, size_bytes })
}

/// Takes a bundle from a folder or a tar archive into the store. With `trust`, engines and derived models are believed
/// whoever sealed their receipts.
///
/// # Errors
/// When the bundle is damaged or is not one, or when the store cannot be written; nothing is admitted then.
pub fn import(host: &Host, path: &Path, trust: bool) -> Result<Imported, Failure> {
    let layout = Layout::open(path, &host.task).map_err(Failure::Bundle)?;
    take(host, &layout, trust)
}

/// Takes a bundle from a registry into the store, as [`import`] does.
///
/// # Errors
/// As [`import`], and when the registry cannot be reached.
pub fn pull(host: &Host, root: &Path, from: &Reference, trust: bool) -> Result<Imported, Failure> {
    let world = World {
        task: host.task.clone(),
        project: root.to_owned(),
        scratch: host.store.scratch(),
        offline: host.offline,
        mirrors: Vec::new(),
        env: host.env.clone(),
    };
    let registry = Registry::new(from, &world, false).map_err(Failure::Bundle)?;
    take(host, &registry, trust)
}

fn take(host: &Host, source: &dyn Source, trust: bool) -> Result<Imported, Failure> {
    let imported = admit::import(host, source, trust)?;
    host.store.save_records()?;
    Ok(imported)
}

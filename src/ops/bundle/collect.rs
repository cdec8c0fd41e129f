//! What goes into a bundle: everything that the policies need, verified.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::base::digest::{self, Digest};
use crate::base::fs::{self, FsError};
use crate::base::tree::Listing;
use crate::format::lockfile::{self, FilePin, Lockfile, ModelPin};
use crate::format::manifest::Kind;
use crate::format::oci::{Blob, Content, Layer};
use crate::ops::demand::{Demand, EngineDemand, ModelDemand, made};
use crate::ops::failure::Damaged;
use crate::ops::{Failure, Host, Project, fetch, lock, python, sync};
use crate::plan::PackageRequirement;
use crate::report::{Unit, Verb};
use crate::source::archive::pack;
use crate::source::pypi::Held;
use crate::store::Staging;
use crate::store::artifacts::listing_of;
use crate::store::damage::Damage;

/// A blob of a bundle, and the file that has its bytes.
#[derive(Debug)]
pub(super) struct Piece {
    /// What the manifest will say.
    pub layer: Layer,
    /// The file.
    pub file: PathBuf,
    /// Whether it is a file of the store, or one that is placed in the project.
    pub is_ours: bool,
}

/// The blobs of a bundle. Temporary files among them go when it is dropped.
#[derive(Debug)]
pub(super) struct Collected {
    /// In the order of the manifest: small ones first.
    pub pieces: Vec<Piece>,
    _staging: Staging,
    _packages: Vec<Held>,
}

/// Finds everything that the policies need, and packs what is a folder. Sources and packages that this machine does not need
/// any more, because the engine is built, are fetched again.
///
/// # Errors
/// [`Failure::NotSynced`] when something is missing, [`Failure::Damaged`] when something is damaged.
pub(super) fn collect(host: &Host, project: &Project, policies: &[String]) -> Result<Collected, Failure> {
    let locked = lock::require_current(host, project)?;
    let demand = sync::require_synced(host, project, &locked, policies)?;
    let staging = host.store.stage()?;
    let (pieces, packages) = (Vec::new(), Vec::new());
    let mut collector = Collector { host, project, staging, pieces, packages };
    let name = project.lock_path.file_name().unwrap_or_default().to_string_lossy();
    collector.text(Content::Lockfile, &name, &fs::read_bounded(&project.lock_path, lockfile::MAX_BYTES as u64)?)?;
    for engine in &demand.engines {
        collector.engine(engine)?;
    }
    for package in packages_of(host, &locked, &demand)? {
        collector.package(&package)?;
    }
    for model in &demand.models {
        collector.model(model)?;
    }
    let Collector { mut pieces, staging, packages, .. } = collector;
    pieces.sort_by_key(|piece| matches!(piece.layer.content, Content::Weights { .. }));
    Ok(Collected { pieces, _staging: staging, _packages: packages })
}

/// The packages that builds and conversions on a machine like this one need.
fn packages_of(host: &Host, locked: &Lockfile, demand: &Demand<'_>) -> Result<Vec<PackageRequirement>, Failure> {
    let mut packages: Vec<PackageRequirement> =
        demand.engines.iter().flat_map(|engine| engine.required.tools.clone()).collect();
    for model in &demand.models {
        let ModelPin::Derived { request, .. } = &model.entry.pin else { continue };
        let entries: Vec<_> = request.packages().iter().filter_map(|name| locked.tool(name)).collect();
        if entries.is_empty() {
            continue;
        }
        match python::find(host, &entries) {
            Ok(python) => packages.extend(python.packages),
            Err(error) => {
                host.task.check()?;
                host.task.warn(format!("model `{}`: its Python packages are left out: {error}", model.required.name));
            }
        }
    }
    Ok(packages)
}

struct Collector<'a> {
    host: &'a Host,
    project: &'a Project,
    staging: Staging,
    pieces: Vec<Piece>,
    packages: Vec<Held>,
}

impl Collector<'_> {
    fn add(&mut self, layer: Layer, file: PathBuf, is_ours: bool) {
        // Two engines may have the same bytes: one blob, in two layers.
        if !self.pieces.iter().any(|piece| piece.layer.blob == layer.blob && piece.layer.content == layer.content) {
            self.pieces.push(Piece { layer, file, is_ours });
        }
    }

    /// A new temporary file.
    fn temporary(&self) -> PathBuf {
        self.staging.path().join(self.pieces.len().to_string())
    }

    fn text(&mut self, content: Content, title: &str, bytes: &[u8]) -> Result<(), Failure> {
        let file = self.temporary();
        fs::write_atomic(&file, bytes)?;
        self.add_file(content, title, file)
    }

    fn add_file(&mut self, content: Content, title: &str, file: PathBuf) -> Result<(), Failure> {
        let (digest, size_bytes) = digest::of_file(&file)?;
        let layer = Layer { blob: Blob { digest, size_bytes }, content, title: title.to_owned() };
        self.add(layer, file, false);
        Ok(())
    }

    fn pack(&mut self, content: Content, title: &str, root: PathBuf, listing: &Listing) -> Result<(), Failure> {
        let file = self.temporary();
        let into = std::io::BufWriter::with_capacity(1 << 20, fs::create_new(&file)?);
        pack(&root, listing, into, &self.host.task).map_err(Failure::Bundle)?;
        self.add_file(content, title, file)
    }

    fn engine(&mut self, engine: &EngineDemand<'_>) -> Result<(), Failure> {
        let (host, required) = (self.host, &engine.required);
        let title = format!("engine {} ({})", required.name, required.variant);
        fetch::tree(host, self.project, engine)?;
        if let Some(listing) = host.store.tree_listing(&required.tree)? {
            let root = host.store.tree_path(&required.tree);
            self.pack(Content::Tree(required.tree), &format!("source of engine {}", required.name), root, &listing)?;
        }
        // One that is only there to derive models may be gone.
        let Some(artifact) = host.store.artifact(&required.fingerprint)? else { return Ok(()) };
        let progress = host.task.start(Verb::Verify, title.clone(), None, Unit::None);
        let damages = host.store.artifact_damages(&artifact, host.task.cancel(), &mut |_| {})?;
        if !damages.is_empty() {
            let damages = damages.into_iter().map(|damage| damaged(damage, &title)).collect();
            return Err(Failure::Damaged { damages });
        }
        progress.finish("");
        let sealed = host.store.sealed_receipt(&required.fingerprint)?;
        self.text(Content::Receipt(required.fingerprint), &title, &sealed)?;
        self.pack(Content::Engine(required.fingerprint), &title, artifact.path, &listing_of(&artifact.receipt))
    }

    fn package(&mut self, required: &PackageRequirement) -> Result<(), Failure> {
        let PackageRequirement { name, request, package } = required;
        let is_package = |piece: &Piece| piece.layer.content == Content::Package;
        if self.pieces.iter().any(|piece| is_package(piece) && piece.layer.blob.digest == package.sha256) {
            return Ok(());
        }
        let held = request.package(&self.host.world(self.project), package);
        let line = self.project.lock_line(name);
        let held = held.map_err(|error| Failure::source(Kind::Tool, name, error, line))?;
        let blob = Blob { digest: package.sha256, size_bytes: package.size };
        let layer = Layer { blob, content: Content::Package, title: package.path.file_name().to_owned() };
        self.add(layer, held.path.clone(), false);
        self.packages.push(held);
        Ok(())
    }

    fn model(&mut self, model: &ModelDemand<'_>) -> Result<(), Failure> {
        let (host, name) = (self.host, &model.required.name);
        let fingerprint = model.required.derive.as_ref().map(|derive| derive.fingerprint);
        let receipt = fingerprint.and_then(|fingerprint| host.store.derived(&fingerprint));
        let from_here: BTreeSet<Digest> = receipt.iter().flat_map(made).map(|file| file.sha256).collect();
        let mut found = Vec::new();
        for (pin, place) in model.required.files.iter().zip(&model.required.places) {
            let places = [host.store.blob_path(&pin.sha256), place.under(&self.project.root)];
            match self.verified(pin, &places)? {
                Some(path) => found.push((pin, path)),
                None if model.required.wanted => return Err(self.missing(model, pin, &places[1])),
                None => {
                    host.task
                        .warn(format!("model `{name}`, which others are derived from, is not here: it is left out"));
                    return Ok(());
                }
            }
        }
        if let (Some(fingerprint), Some(_)) = (fingerprint, &receipt) {
            let sealed = host.store.sealed_derived(&fingerprint)?;
            self.text(Content::Derived(fingerprint), &format!("model {name}"), &sealed)?;
        }
        for (pin, path) in found {
            let derived_by = fingerprint.filter(|_| from_here.contains(&pin.sha256));
            let blob = Blob { digest: pin.sha256, size_bytes: pin.size };
            let layer = Layer { blob, content: Content::Weights { derived_by }, title: pin.path.to_string() };
            self.add(layer, path, true);
        }
        Ok(())
    }

    /// The first of the places that has the file.
    fn verified(&self, pin: &FilePin, places: &[PathBuf]) -> Result<Option<PathBuf>, Failure> {
        for path in places {
            if self.host.store.confirm(path, pin, &mut self.host.stopping())? {
                return Ok(Some(path.clone()));
            }
        }
        Ok(None)
    }

    fn missing(&self, model: &ModelDemand<'_>, pin: &FilePin, place: &std::path::Path) -> Failure {
        let found: Result<_, FsError> = digest::of_file(place);
        let (computed, size_bytes) =
            found.map_or((None, None), |(digest, size)| (Some(digest.to_string()), Some(size)));
        let what = format!("weights file `{}`", pin.path);
        let recorded_in = self.project.lock_line(&model.required.name).unwrap_or_default();
        let (path, expected) = (place.to_owned(), pin.sha256.to_string());
        Failure::Damaged { damages: vec![Damaged { path, what, expected, computed, size_bytes, recorded_in }] }
    }
}

fn damaged(damage: Damage, engine: &str) -> Damaged {
    Damaged {
        what: format!("file of {engine}"),
        expected: damage.expected.map_or_else(|| "no such file".to_owned(), |digest| digest.to_string()),
        computed: damage.computed.map(|digest| digest.to_string()),
        size_bytes: fs::metadata(&damage.path).ok().map(|meta| meta.len()),
        path: damage.path,
        recorded_in: "its receipt".to_owned(),
    }
}

//! Takes a bundle into the store: first everything is brought to staging folders and verified, then all of it is admitted.
//!
//! Weights, sources and packages prove themselves: their digests are in the lockfile of whoever uses them. Engines and derived
//! models cannot: they are believed when their receipts were sealed with the key of this machine, or when the user says so.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::base::digest::{self, Digest};
use crate::base::fs;
use crate::base::lock::Lock;
use crate::base::name::RelPath;
use crate::base::platform::Platform;
use crate::base::tree::{Listing, MAX_FILES, Modes};
use crate::build::fingerprint::fingerprint;
use crate::format::lockfile::FilePin;
use crate::format::oci::{Blob, Bundle, Content, Layer};
use crate::format::receipt::{self, Receipt};
use crate::ops::{Failure, Host, lock};
use crate::report::{Progress, Unit, Verb};
use crate::source::SourceError;
use crate::source::archive::{Archive, Limits, Select};
use crate::source::download::RESERVE_BYTES;
use crate::source::oci::{self, Source};
use crate::source::pypi::package_place;
use crate::store::artifacts::listing_of;
use crate::store::{Staging, seal};

/// What became of a bundle.
#[derive(Debug, Serialize)]
pub struct Imported {
    /// The digest of its manifest.
    pub manifest: Digest,
    /// The file name of the lockfile that it was made from.
    pub lockfile: String,
    /// What was admitted, by its name in the bundle.
    pub admitted: Vec<String>,
    /// Number of things that were here already.
    pub present: usize,
    /// Bytes that were read.
    pub size_bytes: u64,
    /// What was not taken.
    pub left_out: Vec<LeftOut>,
}

/// Something that was not taken from a bundle.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// The engine or derived model.
    pub what: String,
    /// Why.
    pub why: Why,
}

/// Why something was not taken from a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Its receipt was sealed with the key of another machine.
    SealedElsewhere,
    /// It was built for another platform.
    OtherPlatform,
}

/// Something that was verified and waits in a staging folder.
enum Waiting {
    File(Staging, FilePin),
    Package(Staging, Digest, String),
    Tree(Staging, Modes, Digest),
    Engine(Staging, Receipt),
    Derived(Receipt),
}

/// # Errors
/// When the bundle is damaged, or the store cannot be written; nothing is admitted then.
pub(super) fn import(host: &Host, source: &dyn Source, trust: bool) -> Result<Imported, Failure> {
    let (bundle, manifest) = oci::read(source).map_err(Failure::Bundle)?;
    let _beside = host.store.beside_others(host.task.cancel(), || host.task.waiting(lock::REMOVING))?;
    host.store.sweep()?;
    let mut importer = Importer { host, source, trust, receipts: BTreeMap::new(), left_out: Vec::new() };
    importer.receipts(&bundle)?;
    let (due, present) = importer.due(&bundle)?;
    let size_bytes = due.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.blob.size_bytes));
    importer.check_space(&due, size_bytes)?;
    let progress = host.task.start(Verb::Import, source.what(), Some(size_bytes), Unit::Bytes);
    let mut waiting = Vec::new();
    for layer in due {
        host.task.check()?;
        waiting.push((layer.title.clone(), importer.bring(layer, &progress)?));
    }
    progress.finish("");
    let mut admitted = Vec::new();
    // Files first: a receipt comes after what it vouches for.
    waiting.sort_by_key(|(_, thing)| !matches!(thing, Waiting::File(..)));
    for (title, thing) in waiting {
        importer.admit(thing)?;
        admitted.push(title);
    }
    let lockfile = bundle.config.lockfile;
    Ok(Imported { manifest, lockfile, admitted, present, size_bytes, left_out: importer.left_out })
}

struct Importer<'a> {
    host: &'a Host,
    source: &'a dyn Source,
    trust: bool,
    /// Receipts that are believed, by fingerprint.
    receipts: BTreeMap<Digest, Receipt>,
    left_out: Vec<LeftOut>,
}

impl Importer<'_> {
    fn refused(&self, layer: &Layer, why: impl Into<String>) -> Failure {
        let what = format!("`{}` ({}) of {}", layer.title, layer.blob.digest, self.source.what());
        Failure::Bundle(SourceError::Hostile { what, why: why.into() })
    }

    /// Brings a blob to a new staging folder, verified.
    fn receive(&self, layer: &Layer, progress: &Progress) -> Result<Staging, Failure> {
        let staging = self.host.store.stage()?;
        let to = staging.path().join("blob");
        let hashed = oci::receive(self.source, layer, &to, &self.host.task, progress).map_err(Failure::Bundle)?;
        self.host.store.records().learn(&hashed);
        Ok(staging)
    }

    /// Reads all receipts, and decides which are believed.
    fn receipts(&mut self, bundle: &Bundle) -> Result<(), Failure> {
        let other = bundle.config.platform != Platform::HOST.to_string();
        for layer in &bundle.layers {
            let (Content::Receipt(id) | Content::Derived(id)) = &layer.content else { continue };
            if other && matches!(layer.content, Content::Receipt(_)) {
                self.left_out.push(LeftOut { what: layer.title.clone(), why: Why::OtherPlatform });
                continue;
            }
            let limit_bytes = receipt::MAX_BYTES as u64 + 4096;
            if layer.blob.size_bytes > limit_bytes {
                return Err(self.refused(layer, format!("it is larger than {limit_bytes} bytes")));
            }
            let progress = self.host.task.start(Verb::Verify, layer.title.clone(), None, Unit::None);
            let staging = self.receive(layer, &progress)?;
            progress.finish("");
            let sealed = fs::read_bounded(&staging.path().join("blob"), limit_bytes)?;
            let ours = match layer.content {
                Content::Receipt(_) => self.host.store.open_receipt(id, &sealed),
                _ => self.host.store.open_derived(id, &sealed),
            };
            let believed = match ours {
                None if self.trust => Some(self.trusted(layer, *id, &sealed)?),
                ours => ours,
            };
            match believed {
                Some(receipt) => drop(self.receipts.insert(*id, receipt)),
                None => self.left_out.push(LeftOut { what: layer.title.clone(), why: Why::SealedElsewhere }),
            }
        }
        Ok(())
    }

    /// A receipt that somebody else sealed. It has to agree with itself.
    fn trusted(&self, layer: &Layer, id: Digest, sealed: &[u8]) -> Result<Receipt, Failure> {
        let inside = seal::inside(sealed).ok_or_else(|| self.refused(layer, "it is not a sealed receipt"))?;
        let receipt = Receipt::parse(inside).map_err(|error| self.refused(layer, error.to_string()))?;
        if receipt.fingerprint != id || fingerprint(&receipt.inputs) != id {
            return Err(self.refused(layer, "its fingerprint is not that of its inputs"));
        }
        Ok(receipt)
    }

    /// The layers that are taken and are not here, and how many are here.
    fn due<'b>(&self, bundle: &'b Bundle) -> Result<(Vec<&'b Layer>, usize), Failure> {
        let (host, store, cancel) = (self.host, &self.host.store, self.host.task.cancel());
        let (mut due, mut present): (Vec<&Layer>, usize) = (Vec::new(), 0);
        for layer in &bundle.layers {
            let is_here = match &layer.content {
                Content::Lockfile | Content::Receipt(_) => continue,
                Content::Engine(id) | Content::Derived(id) | Content::Weights { derived_by: Some(id) }
                    if !self.receipts.contains_key(id) =>
                {
                    continue;
                }
                Content::Weights { .. } => {
                    let pin = pin_of(layer);
                    store.confirm(&store.blob_path(&pin.sha256), &pin, &mut host.stopping())?
                }
                Content::Package => {
                    let place = package_place(&store.scratch(), &layer.blob.digest, self.file_name(layer)?);
                    let same = |path| digest::of_file(path).is_ok_and(|(digest, _)| digest == layer.blob.digest);
                    store.tool(&layer.blob.digest, false, cancel)?.is_some() || same(&place)
                }
                Content::Tree(id) => store.confirm_tree(id, cancel)?.is_some(),
                Content::Engine(id) => store.artifact(id)?.is_some(),
                Content::Derived(id) => store.derived(id).is_some(),
            };
            if is_here {
                present += 1;
            } else if !due.iter().any(|other| other.blob == layer.blob && other.content == layer.content) {
                due.push(layer);
            }
        }
        Ok((due, present))
    }

    /// The name under which a package is looked for.
    fn file_name<'l>(&self, layer: &'l Layer) -> Result<&'l str, Failure> {
        let is_name = layer.title.parse::<RelPath>().is_ok() && !layer.title.contains('/');
        // Other names have other meanings in that folder.
        let is_package = [".whl", ".tar.gz", ".tgz", ".zip"].iter().any(|ending| layer.title.ends_with(ending));
        if is_name && is_package {
            return Ok(&layer.title);
        }
        Err(self.refused(layer, "its title is not the file name of a package"))
    }

    fn check_space(&self, due: &[&Layer], size_bytes: u64) -> Result<(), Failure> {
        // An archive and what comes out of it are there at the same time, one after the other.
        let is_tar = |layer: &&&Layer| matches!(layer.content, Content::Tree(_) | Content::Engine(_));
        let largest = due.iter().filter(is_tar).map(|layer| layer.blob.size_bytes).max().unwrap_or(0);
        let at = self.host.store.root().to_owned();
        let (needed, available) = (size_bytes.saturating_add(largest), fs::available_bytes(&at)?);
        if needed > 0 && needed.saturating_add(RESERVE_BYTES) > available {
            let what = "not enough space for the bundle".to_owned();
            return Err(Failure::NoSpace { what, needed, reserve: RESERVE_BYTES, available, at });
        }
        Ok(())
    }

    /// Brings a layer to a staging folder, and compares it with what it should be.
    fn bring(&self, layer: &Layer, progress: &Progress) -> Result<Waiting, Failure> {
        if let Content::Derived(id) = &layer.content {
            let receipt = self.receipts.get(id).ok_or_else(|| self.refused(layer, "it has no receipt"))?;
            return Ok(Waiting::Derived(receipt.clone()));
        }
        let blob = self.receive(layer, progress)?;
        match &layer.content {
            Content::Tree(id) => {
                let (staging, modes, listing) = self.unpack(layer, &blob)?;
                if listing.digest() != *id {
                    return Err(self.refused(layer, format!("its files are tree {}, not {id}", listing.digest())));
                }
                Ok(Waiting::Tree(staging, modes, *id))
            }
            Content::Engine(id) => {
                let receipt = self.receipts.get(id).ok_or_else(|| self.refused(layer, "it has no receipt"))?;
                let (staging, _, listing) = self.unpack(layer, &blob)?;
                let wrong = listing_of(receipt).differences(&listing, 3);
                if !wrong.is_empty() {
                    return Err(
                        self.refused(layer, format!("its files are not those of its receipt: {}", wrong.join(", ")))
                    );
                }
                Ok(Waiting::Engine(staging, receipt.clone()))
            }
            Content::Package => Ok(Waiting::Package(blob, layer.blob.digest, self.file_name(layer)?.to_owned())),
            _ => Ok(Waiting::File(blob, pin_of(layer))),
        }
    }

    /// Unpacks an archive that was received, and lists what is in it.
    fn unpack(&self, layer: &Layer, blob: &Staging) -> Result<(Staging, Modes, Listing), Failure> {
        let (host, file) = (self.host, blob.path().join("blob"));
        let staging = host.store.stage()?;
        // What is not compressed cannot become larger.
        let limits = Limits { total_bytes: layer.blob.size_bytes, files: MAX_FILES };
        let what = format!("{} of {}", layer.title, self.source.what());
        let archive = Archive::open(&file, &what, &Select::default(), limits, &host.task).map_err(Failure::Bundle)?;
        let modes = archive.unpack(staging.path(), &|_| true).map_err(Failure::Bundle)?.modes;
        fs::remove_file(&file)?;
        let listing = Listing::scan(staging.path(), &modes, host.task.cancel());
        let listing = listing.map_err(|error| Failure::Bundle(error.into()))?;
        Ok((staging, modes, listing))
    }

    fn hold(&self, what: &str, digest: &Digest) -> Result<Lock, Failure> {
        let waiting = || self.host.task.waiting("another aitools that works on the same thing");
        Ok(self.host.store.lock(&format!("{what}-{}", digest.hex()), self.host.task.cancel(), waiting)?)
    }

    fn admit(&self, thing: Waiting) -> Result<(), Failure> {
        let (store, cancel) = (&self.host.store, self.host.task.cancel());
        match thing {
            Waiting::File(staging, pin) => {
                let what = format!("file {}", pin.sha256);
                store.admit_blob(&staging.path().join("blob"), &pin, &what, &mut self.host.stopping())?;
            }
            Waiting::Package(staging, digest, name) => {
                let place = package_place(&store.scratch(), &digest, &name);
                fs::create_dir_all(fs::parent(&place))?;
                fs::rename(&staging.path().join("blob"), &place)?;
            }
            Waiting::Tree(staging, modes, id) => {
                let _held = self.hold("tree", &id)?;
                store.admit_tree(&staging, &modes, &id, "the source of an engine", cancel)?;
            }
            Waiting::Engine(staging, receipt) => {
                let _held = self.hold("build", &receipt.fingerprint)?;
                store.install(&staging, &receipt)?;
            }
            Waiting::Derived(receipt) => store.record_derived(&receipt)?,
        }
        Ok(())
    }
}

/// What the store is told of a file: its name does not matter there.
fn pin_of(layer: &Layer) -> FilePin {
    let Blob { digest, size_bytes } = layer.blob;
    FilePin { path: RelPath::of_digest(&digest), size: size_bytes, sha256: digest }
}

//! Finished engine installs by the fingerprint of their inputs.

use std::path::{Path, PathBuf};

use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::tree::{Entry, Listing, Mode};
use crate::format::receipt::{self, InstalledFile, Receipt};

use super::damage::{self, Damage};
use super::{Staging, Store, StoreError};

const RECEIPT: &str = "receipt.json";
/// A receipt and its seal.
const MAX_RECEIPT_BYTES: u64 = receipt::MAX_BYTES as u64 + 4096;

/// An engine install whose receipt was sealed here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The folder of the installation.
    pub path: PathBuf,
    /// Its receipt.
    pub receipt: Receipt,
}

impl Store {
    /// Where the installation with this fingerprint is, or would be.
    pub fn artifact_path(&self, fingerprint: &Digest) -> PathBuf {
        self.root.join("artifacts").join(fingerprint.hex())
    }

    /// The artifact, if its receipt was sealed here and its folder holds exactly the files of the receipt: the verified ones,
    /// or ones that are hashed now and match. A forged, foreign or damaged artifact counts as missing, and one with extra
    /// files is damaged: programs find libraries by their names.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn artifact(&self, fingerprint: &Digest) -> Result<Option<Artifact>, StoreError> {
        let Some(artifact) = self.receipt_of(fingerprint) else { return Ok(None) };
        if !damage::has_shape(&artifact.path, &listing_of(&artifact.receipt), &[RECEIPT])? {
            return Ok(None);
        }
        for (path, file) in &artifact.receipt.files {
            if self.records.prove(&path.under(&artifact.path), &mut |_| Ok(()))?.sha256() != file.sha256 {
                return Ok(None);
            }
        }
        Ok(Some(artifact))
    }

    /// The artifact by its sealed receipt alone: for showing and verifying, not for running.
    pub fn receipt_of(&self, fingerprint: &Digest) -> Option<Artifact> {
        let path = self.artifact_path(fingerprint);
        let sealed = fs::read_bounded(&path.join(RECEIPT), MAX_RECEIPT_BYTES).ok()?;
        let receipt = self.open_receipt(fingerprint, &sealed)?;
        Some(Artifact { path, receipt })
    }

    /// The sealed receipt of an artifact, as it is kept.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sealed_receipt(&self, fingerprint: &Digest) -> Result<Vec<u8>, StoreError> {
        Ok(fs::read_bounded(&self.artifact_path(fingerprint).join(RECEIPT), MAX_RECEIPT_BYTES)?)
    }

    /// A receipt that came from elsewhere, when it was sealed with the key of this machine.
    pub fn open_receipt(&self, fingerprint: &Digest, sealed: &[u8]) -> Option<Receipt> {
        let receipt = Receipt::parse(self.key.open(&purpose(fingerprint), sealed)?).ok()?;
        (receipt.fingerprint == *fingerprint).then_some(receipt)
    }

    /// Every artifact here whose receipt was sealed here.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn artifacts(&self) -> Result<Vec<Artifact>, StoreError> {
        let folder = self.root.join("artifacts");
        if !fs::exists(&folder) {
            return Ok(Vec::new());
        }
        let names = fs::read_dir(&folder)?;
        let digest = |path: &Path| Digest::from_hex(path.file_name()?.to_str()?).ok();
        Ok(names.iter().filter_map(|path| self.receipt_of(&digest(path)?)).collect())
    }

    /// Everything in an artifact's folder that is not what the receipt says, extra files included. Every file is hashed, and
    /// `seen` gets its size in bytes.
    ///
    /// # Errors
    /// When the folder cannot be listed, or the user asked to stop.
    pub fn artifact_damages(
        &self,
        artifact: &Artifact,
        cancel: &Cancel,
        seen: &mut dyn FnMut(u64),
    ) -> Result<Vec<Damage>, StoreError> {
        let damages = damage::damages(&artifact.path, &listing_of(&artifact.receipt), &[RECEIPT], cancel, seen)?;
        for damage in &damages {
            self.records.learn_unreadable(&damage.path);
        }
        Ok(damages)
    }

    /// Moves a staged install in and writes its receipt, last. Replaces a damaged one.
    ///
    /// # Errors
    /// When the folder cannot be moved or written.
    pub fn install(&self, staging: &Staging, receipt: &Receipt) -> Result<Artifact, StoreError> {
        let path = self.artifact_path(&receipt.fingerprint);
        fs::remove_file(&path.join(RECEIPT))?;
        self.replace_dir(staging.path(), &path)?;
        for (file, installed) in &receipt.files {
            let hashed = self.records.prove(&file.under(&path), &mut |_| Ok(()))?;
            if hashed.sha256() != installed.sha256 {
                return Err(StoreError::Mismatch {
                    what: format!("`{file}` of the finished build"),
                    expected: installed.sha256,
                    computed: hashed.sha256(),
                    expected_bytes: Some(installed.size),
                    computed_bytes: hashed.size_bytes(),
                });
            }
        }
        fs::write_atomic(
            &path.join(RECEIPT),
            &self.key.seal(&purpose(&receipt.fingerprint), receipt.to_text().as_bytes()),
        )?;
        Ok(Artifact { path, receipt: receipt.clone() })
    }
}

/// The files of a receipt as a listing.
pub fn listing_of(receipt: &Receipt) -> Listing {
    let mode = |executable| if executable { Mode::Executable } else { Mode::File };
    let entry =
        |file: &InstalledFile| Entry { mode: mode(file.executable), size_bytes: file.size, digest: file.sha256 };
    Listing(receipt.files.iter().map(|(path, file)| (path.clone(), entry(file))).collect())
}

fn purpose(fingerprint: &Digest) -> String {
    format!("receipt {fingerprint}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::base::platform::Variant;
    use crate::store::seal::Key;

    fn install(store: &Store, bytes: &[u8]) -> Artifact {
        let staging = store.stage().unwrap();
        fs::write_atomic(&staging.path().join("bin/x"), bytes).unwrap();
        let file = InstalledFile { size: bytes.len() as u64, sha256: Digest::of(bytes), executable: false };
        let receipt = Receipt {
            version: 1,
            engine: "e".parse().unwrap(),
            variant: Variant::Cpu,
            fingerprint: Digest::of(b"inputs"),
            inputs: BTreeMap::new(),
            files: BTreeMap::from([("bin/x".parse().unwrap(), file)]),
            notes: BTreeMap::new(),
        };
        store.install(&staging, &receipt).unwrap()
    }

    #[test]
    fn forged_foreign_and_damaged_artifacts_count_as_missing() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("here")).unwrap();
        let fingerprint = Digest::of(b"inputs");
        let built = install(&store, b"good");
        assert_eq!(store.artifact(&fingerprint).unwrap(), Some(built.clone()));

        fs::write_atomic(&built.path.join("bin/x"), b"evil").unwrap();
        assert_eq!(store.artifact(&fingerprint).unwrap(), None, "a damaged file of the right size");
        let damages = |artifact| store.artifact_damages(artifact, &Cancel::default(), &mut |_| {}).unwrap();
        assert_eq!(damages(&built).len(), 1);

        let elsewhere = Store::open(root.path(), Key::from_secret("elsewhere")).unwrap();
        install(&elsewhere, b"evil");
        assert!(elsewhere.artifact(&fingerprint).unwrap().is_some());
        assert_eq!(store.artifact(&fingerprint).unwrap(), None, "a consistent artifact that was sealed elsewhere");

        assert_eq!(install(&store, b"good"), built);
        assert_eq!(store.artifact(&fingerprint).unwrap(), Some(built));
    }

    #[test]
    fn h2_an_extra_library_beside_an_engine_is_damage() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("here")).unwrap();
        let fingerprint = Digest::of(b"inputs");
        let built = install(&store, b"good");
        let damages = || store.artifact_damages(&built, &Cancel::default(), &mut |_| {}).unwrap();
        let usable = || store.artifact(&fingerprint).unwrap().is_some();
        assert!(usable() && damages().is_empty());

        let extra = built.path.join("bin/libm.so.6");
        fs::write_atomic(&extra, b"evil").unwrap();
        assert!(!usable(), "an extra file");
        assert_eq!(damages(), [Damage { path: extra.clone(), expected: None, computed: Some(Digest::of(b"evil")) }]);
        fs::remove_file(&extra).unwrap();
        assert!(usable());

        #[cfg(unix)]
        {
            fs::symlink(Path::new("/bin/sh"), &extra).unwrap();
            assert!(!usable(), "an extra link");
            fs::remove_file(&extra).unwrap();
            fs::set_executable(&built.path.join("bin/x")).unwrap();
            assert!(!usable(), "a changed mode");
            assert_eq!(damages().len(), 1);
        }
        install(&store, b"good");
        fs::remove_file(&built.path.join("bin/x")).unwrap();
        assert!(!usable(), "a missing file");
        assert_eq!(damages().len(), 1);
    }
}

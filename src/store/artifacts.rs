//! Finished engine installs by the fingerprint of their inputs.

use std::path::{Path, PathBuf};

use crate::base::digest::Digest;
use crate::base::fs;
use crate::format::receipt::{self, Receipt};

use super::{Staging, Store, StoreError};

const RECEIPT: &str = "receipt.json";
/// A receipt and its seal.
const MAX_RECEIPT_BYTES: u64 = receipt::MAX_BYTES as u64 + 4096;

/// An engine install whose receipt was sealed here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    pub path: PathBuf,
    pub receipt: Receipt,
}

/// A file of an artifact that is not what the receipt says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    pub path: PathBuf,
    pub expected: Digest,
    /// None when the file is missing or unreadable.
    pub computed: Option<Digest>,
}

impl Store {
    pub fn artifact_path(&self, fingerprint: &Digest) -> PathBuf {
        self.root.join("artifacts").join(fingerprint.hex())
    }

    /// The artifact, when its receipt is ours and its files are the ones that were hashed (or are hashed now and right).
    /// A forged, foreign or damaged one counts as missing.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn artifact(&self, fingerprint: &Digest) -> Result<Option<Artifact>, StoreError> {
        let Some(artifact) = self.receipt_of(fingerprint) else { return Ok(None) };
        for (path, file) in &artifact.receipt.files {
            let full = path.under(&artifact.path);
            let right = fs::metadata(&full).is_ok_and(|meta| meta.len() == file.size)
                && self.records.prove(&full, &mut |_| Ok(()))?.sha256() == file.sha256;
            if !right {
                return Ok(None);
            }
        }
        Ok(Some(artifact))
    }

    /// The artifact by its sealed receipt alone: for showing and verifying, not for running.
    pub fn receipt_of(&self, fingerprint: &Digest) -> Option<Artifact> {
        let path = self.artifact_path(fingerprint);
        let sealed = fs::read_bounded(&path.join(RECEIPT), MAX_RECEIPT_BYTES).ok()?;
        let bytes = self.key.open(&purpose(fingerprint), &sealed)?;
        let receipt = Receipt::parse(bytes).ok()?;
        (receipt.fingerprint == *fingerprint).then_some(Artifact { path, receipt })
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

    /// Hashes every file of an artifact. `seen` is told the bytes of each file.
    pub fn damages(&self, artifact: &Artifact, mut seen: impl FnMut(u64)) -> Vec<Damage> {
        let mut damages = Vec::new();
        for (path, file) in &artifact.receipt.files {
            let full = path.under(&artifact.path);
            let computed = crate::base::digest::of_file(&full).ok().map(|(digest, _)| digest);
            if computed != Some(file.sha256) {
                damages.push(Damage { path: full, expected: file.sha256, computed });
            }
            seen(file.size);
        }
        damages
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

fn purpose(fingerprint: &Digest) -> String {
    format!("receipt {fingerprint}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::base::platform::Variant;
    use crate::format::receipt::InstalledFile;
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
        assert_eq!(store.damages(&built, |_| {}).len(), 1);

        let elsewhere = Store::open(root.path(), Key::from_secret("elsewhere")).unwrap();
        install(&elsewhere, b"evil");
        assert!(elsewhere.artifact(&fingerprint).unwrap().is_some());
        assert_eq!(store.artifact(&fingerprint).unwrap(), None, "a consistent artifact that was sealed elsewhere");

        assert_eq!(install(&store, b"good"), built);
        assert_eq!(store.artifact(&fingerprint).unwrap(), Some(built));
    }
}

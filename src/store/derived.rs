//! What came out of derivations, by the fingerprint of their inputs: sealed receipts whose files are blobs.

use std::path::{Path, PathBuf};

use crate::base::digest::Digest;
use crate::base::fs;
use crate::format::lockfile::FilePin;
use crate::format::receipt::{self, Receipt};

use super::{Seen, Store, StoreError};

/// A receipt and its seal.
const MAX_RECEIPT_BYTES: u64 = receipt::MAX_BYTES as u64 + 4096;

impl Store {
    fn derived_path(&self, fingerprint: &Digest) -> PathBuf {
        self.root.join("derived").join(format!("{}.json", fingerprint.hex()))
    }

    /// The receipt of a derivation, when it was sealed here. Its blobs may be gone.
    pub fn derived(&self, fingerprint: &Digest) -> Option<Receipt> {
        self.open_derived(fingerprint, &self.sealed_derived(fingerprint).ok()?)
    }

    /// The sealed receipt of a derivation, as it is kept.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sealed_derived(&self, fingerprint: &Digest) -> Result<Vec<u8>, StoreError> {
        Ok(fs::read_bounded(&self.derived_path(fingerprint), MAX_RECEIPT_BYTES)?)
    }

    /// A receipt that came from elsewhere, when it was sealed with the key of this machine.
    pub fn open_derived(&self, fingerprint: &Digest, sealed: &[u8]) -> Option<Receipt> {
        let receipt = Receipt::parse(self.key.open(&purpose(fingerprint), sealed)?).ok()?;
        (receipt.fingerprint == *fingerprint).then_some(receipt)
    }

    /// Every derivation's receipt that was sealed here, the latest first.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn all_derived(&self) -> Result<Vec<Receipt>, StoreError> {
        let folder = self.root.join("derived");
        if !fs::exists(&folder) {
            return Ok(Vec::new());
        }
        let when = |path: &Path| fs::metadata(path).ok().and_then(|meta| meta.modified().ok());
        let mut paths = fs::read_dir(&folder)?;
        paths.sort_by_key(|path| std::cmp::Reverse(when(path)));
        let digest = |path: &Path| Digest::from_hex(path.file_stem()?.to_str()?).ok();
        Ok(paths.iter().filter_map(|path| self.derived(&digest(path)?)).collect())
    }

    /// Takes in a file that was derived, whatever its bytes, and gives its pin. It is hashed here.
    ///
    /// # Errors
    /// When it cannot be read or moved, or `seen` says so.
    pub fn admit_derived(
        &self,
        staged: &Path,
        pin: impl FnOnce(u64, Digest) -> FilePin,
        seen: Seen<'_>,
    ) -> Result<FilePin, StoreError> {
        let hashed = self.records.prove(staged, seen)?;
        let pin = pin(hashed.size_bytes(), hashed.sha256());
        self.admit_blob(staged, &pin, pin.path.as_str(), &mut |_| Ok(()))?;
        Ok(pin)
    }

    /// Writes a derivation's receipt, once its files are blobs.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn record_derived(&self, receipt: &Receipt) -> Result<(), StoreError> {
        let sealed = self.key.seal(&purpose(&receipt.fingerprint), receipt.to_text().as_bytes());
        Ok(fs::write_atomic(&self.derived_path(&receipt.fingerprint), &sealed)?)
    }
}

fn purpose(fingerprint: &Digest) -> String {
    format!("derived {fingerprint}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::base::platform::Variant;
    use crate::format::receipt::InstalledFile;
    use crate::store::seal::Key;

    #[test]
    fn a_record_that_was_not_sealed_here_for_this_is_none() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("here")).unwrap();
        let staging = store.stage().unwrap();
        fs::write_atomic(&staging.path().join("o"), b"made").unwrap();
        let pin = |size, sha256| FilePin { path: "é x.gguf".parse().unwrap(), size, sha256 };
        let pin = store.admit_derived(&staging.path().join("o"), pin, &mut |_| Ok(())).unwrap();
        assert!(fs::exists(&store.blob_path(&Digest::of(b"made"))));
        let (one, two) = (Digest::of(b"one"), Digest::of(b"two"));
        let receipt = Receipt {
            version: 1,
            engine: "e".parse().unwrap(),
            variant: Variant::Cpu,
            fingerprint: one,
            inputs: BTreeMap::new(),
            files: [(pin.path, InstalledFile { size: pin.size, sha256: pin.sha256, executable: false })].into(),
            notes: BTreeMap::new(),
        };
        store.record_derived(&receipt).unwrap();
        assert_eq!(store.derived(&one), Some(receipt.clone()));
        assert_eq!(store.all_derived().unwrap(), [receipt]);
        // The record of another derivation, an artifact's receipt, a record from elsewhere, a changed one.
        fs::copy(&store.derived_path(&one), &store.derived_path(&two)).unwrap();
        assert_eq!(store.derived(&two), None);
        let elsewhere = Store::open(root.path(), Key::from_secret("elsewhere")).unwrap();
        assert_eq!(elsewhere.derived(&one), None);
        let mut bytes = fs::read_bounded(&store.derived_path(&one), 1 << 20).unwrap();
        let at = bytes.windows(2).position(|pair| pair == b"4,").unwrap();
        bytes[at] = b'5';
        fs::write_atomic(&store.derived_path(&one), &bytes).unwrap();
        assert_eq!(store.derived(&one), None);
    }
}

//! Verified files by their SHA-256, and their links in projects.

use std::path::{Path, PathBuf};

use crate::base::digest::Digest;
use crate::base::fs::{self, Placed};
use crate::format::lockfile::FilePin;

use super::{Seen, Store, StoreError};

/// What a path holds, compared with a pin, without reading the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    /// It was hashed here and not touched since.
    Verified,
    /// It has the right size; its content is not known.
    Unverified,
    /// It is not there, or cannot be right.
    Missing,
}

impl Store {
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    /// How a file stands to its pin, from the file system's own words and the records.
    pub fn presence(&self, path: &Path, pin: &FilePin) -> Presence {
        match fs::metadata(path) {
            Ok(meta) if meta.is_file() && meta.len() == pin.size => match self.records.known(path) {
                Some(digest) if digest == pin.sha256 => Presence::Verified,
                Some(_) => Presence::Missing,
                None => Presence::Unverified,
            },
            _ => Presence::Missing,
        }
    }

    /// Whether the file is what the pin says, hashing it when that is not known. Remembers the outcome.
    ///
    /// # Errors
    /// When it cannot be read, or `seen` says so.
    pub fn confirm(&self, path: &Path, pin: &FilePin, seen: Seen<'_>) -> Result<bool, StoreError> {
        match self.presence(path, pin) {
            Presence::Verified => Ok(true),
            Presence::Missing => Ok(false),
            Presence::Unverified => Ok(self.records.digest_of(path, seen)?.0 == pin.sha256),
        }
    }

    /// Moves a staged file in when it is what the pin says. What was there under this digest is replaced.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] when it is something else; it then stays where it is.
    pub fn admit_blob(&self, staged: &Path, pin: &FilePin, what: &str, seen: Seen<'_>) -> Result<PathBuf, StoreError> {
        let (computed, computed_bytes) = self.records.digest_of(staged, seen)?;
        if computed != pin.sha256 || computed_bytes != pin.size {
            return Err(StoreError::Mismatch {
                what: what.to_owned(),
                expected: pin.sha256,
                computed,
                expected_bytes: Some(pin.size),
                computed_bytes,
            });
        }
        let path = self.blob_path(&pin.sha256);
        fs::create_dir_all(fs::parent(&path))?;
        if !fs::symlink_metadata(staged)?.is_symlink() {
            fs::sync_file(staged)?;
            // Foreign caches keep their own permissions: only a file that is ours alone is made read-only.
            if fs::names(staged)? == 1 {
                fs::set_read_only(staged, true)?;
            }
        }
        fs::rename(staged, &path)?;
        fs::sync_dir(fs::parent(&path))?;
        self.records.carry(&path, Some(computed));
        Ok(path)
    }

    /// Puts a verified file where people and engines look for it.
    ///
    /// # Errors
    /// When the place cannot be written.
    pub fn place(&self, from: &Path, to: &Path, digest: Digest) -> Result<Placed, StoreError> {
        let known = self.records.known(from);
        let how = fs::place(from, to)?;
        // Linking changes the inode's time of change; a reflink or a copy has an inode of its own.
        self.records.carry(from, known);
        if known == Some(digest) {
            self.records.carry(to, known);
        }
        Ok(how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::seal::Key;

    fn pin(bytes: &[u8]) -> FilePin {
        FilePin { path: "w".parse().unwrap(), size: bytes.len() as u64, sha256: Digest::of(bytes) }
    }

    #[test]
    fn only_the_pinned_bytes_enter_and_links_stay_known() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("la cache"), Key::from_secret("k")).unwrap();
        let staging = store.stage().unwrap();
        let staged = staging.path().join("f");
        fs::write_atomic(&staged, b"wrong").unwrap();
        let refused = store.admit_blob(&staged, &pin(b"right"), "weights `w`", &mut |_| Ok(()));
        assert!(matches!(refused, Err(StoreError::Mismatch { .. })), "{refused:?}");
        fs::write_atomic(&staged, b"right").unwrap();
        let blob = store.admit_blob(&staged, &pin(b"right"), "weights `w`", &mut |_| Ok(())).unwrap();
        assert_eq!(store.presence(&blob, &pin(b"right")), Presence::Verified);
        let place = root.path().join("models/m/w é");
        store.place(&blob, &place, pin(b"right").sha256).unwrap();
        assert_eq!(store.presence(&place, &pin(b"right")), Presence::Verified);
        assert_eq!(store.presence(&blob, &pin(b"right")), Presence::Verified);
        store.save_records().unwrap();
        let again = Store::open(store.root(), Key::from_secret("k")).unwrap();
        assert_eq!(again.presence(&place, &pin(b"right")), Presence::Verified);
        let restored = Store::open(store.root(), Key::from_secret("other machine")).unwrap();
        assert_eq!(restored.presence(&blob, &pin(b"right")), Presence::Unverified);
        fs::remove_file(&blob).unwrap();
        fs::write_atomic(&blob, b"forge").unwrap();
        assert_eq!(again.presence(&blob, &pin(b"right")), Presence::Unverified);
        assert!(!again.confirm(&blob, &pin(b"right"), &mut |_| Ok(())).unwrap());
    }

    #[test]
    fn a_file_that_others_have_too_keeps_its_permissions() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("cache"), Key::from_secret("k")).unwrap();
        let staging = store.stage().unwrap();
        let (foreign, staged) = (root.path().join("blob"), staging.path().join("f"));
        for (bytes, shared) in [(b"right", true), (b"alone", false)] {
            fs::write_atomic(&foreign, bytes).unwrap();
            fs::place(&foreign, &staged).unwrap();
            if !shared {
                fs::remove_file(&foreign).unwrap();
            }
            let shared = fs::names(&staged).unwrap() > 1;
            let blob = store.admit_blob(&staged, &pin(bytes), "w", &mut |_| Ok(())).unwrap();
            assert_eq!(fs::metadata(&blob).unwrap().permissions().readonly(), !shared);
        }
    }

    #[test]
    fn leftovers_of_killed_runs_go_and_those_in_use_stay() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("k")).unwrap();
        let live = store.stage().unwrap();
        let dead = root.path().join("staging/dead");
        fs::write_atomic(&dead.join("x"), b"1").unwrap();
        let lone = root.path().join("staging/lone.lock");
        fs::write_atomic(&lone, b"").unwrap();
        store.sweep().unwrap();
        assert!(fs::exists(live.path()) && !fs::exists(&dead) && !fs::exists(&lone));
        drop(live);
        assert!(fs::read_dir(&root.path().join("staging")).unwrap().is_empty());
    }
}

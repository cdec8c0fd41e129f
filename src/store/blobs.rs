//! Verified files by their SHA-256, and their links in projects.
//!
//! Invariant: a file is recorded as verified only by a proof ([`Hashed`]) that was made from its bytes and still holds
//! under its final name.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::hashed::Hashed;
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
    /// It is missing, or has the wrong size.
    Missing,
}

impl Store {
    /// Where the file with this digest is, or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    /// What a path holds, compared with a pin, from file system metadata and the records.
    pub fn presence(&self, path: &Path, pin: &FilePin) -> Presence {
        let Some(stamp) = fs::stamp(path).ok().filter(|stamp| stamp.size_bytes == pin.size) else {
            return Presence::Missing;
        };
        match self.records.known_at(path, &stamp) {
            Some(hashed) if hashed.sha256() == pin.sha256 => Presence::Verified,
            Some(_) => Presence::Missing,
            // Only regular files are ever hashed, so that one without a proof may be something else.
            None if !fs::metadata(path).is_ok_and(|meta| meta.is_file()) => Presence::Missing,
            None if self.records.is_unreadable(path) => Presence::Missing,
            None => Presence::Unverified,
        }
    }

    /// Whether the file is what the pin says, hashing it when that is not known. Remembers the outcome. A file that cannot
    /// be read is not.
    ///
    /// # Errors
    /// When `seen` stops the work.
    pub fn confirm(&self, path: &Path, pin: &FilePin, seen: Seen<'_>) -> Result<bool, StoreError> {
        match self.presence(path, pin) {
            Presence::Verified => Ok(true),
            Presence::Missing => Ok(false),
            Presence::Unverified => match self.records.prove(path, seen).map_err(StoreError::from) {
                Ok(hashed) => Ok(hashed.sha256() == pin.sha256),
                Err(StoreError::Cancelled(cancelled)) => Err(cancelled.into()),
                Err(_) => {
                    self.records.learn_unreadable(path);
                    Ok(false)
                }
            },
        }
    }

    /// The proof that a file has this digest; the file is hashed unless that is known.
    fn prove(&self, path: &Path, expected: Digest, what: &str, seen: Seen<'_>) -> Result<Hashed, StoreError> {
        let hashed = self.records.prove(path, seen)?;
        if hashed.sha256() == expected { Ok(hashed) } else { Err(mismatch(what, expected, None, &hashed)) }
    }

    /// Moves a staged file into the store when it is what the pin says, and gives its path there. A verified file that the
    /// store has under this digest stays; any other is replaced.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] when it is something else, or becomes so meanwhile; it is not in the store then.
    pub fn admit_blob(&self, staged: &Path, pin: &FilePin, what: &str, seen: Seen<'_>) -> Result<PathBuf, StoreError> {
        let path = self.blob_path(&pin.sha256);
        let mut hashed = self.prove(staged, pin.sha256, what, seen)?;
        if hashed.size_bytes() != pin.size {
            return Err(mismatch(what, pin.sha256, Some(pin.size), &hashed));
        }
        if let Some(there) = self.records.known(&path).filter(|there| there.sha256() == pin.sha256) {
            // Both may be names of one file, whose status changes when one goes.
            self.records.learn(&there.through(&path, || fs::remove_file(staged))?);
            return Ok(path);
        }
        fs::create_dir_all(fs::parent(&path))?;
        if !fs::symlink_metadata(staged)?.is_symlink() {
            fs::sync_file(staged)?;
            // Foreign caches keep their own permissions: only a file that is ours alone is made read-only.
            if fs::names(staged)? == 1 {
                hashed = hashed.through(staged, || fs::set_read_only(staged, true))?;
            }
        }
        if !hashed.is_current() {
            hashed = self.prove(staged, pin.sha256, what, seen)?;
        }
        hashed = hashed.through(&path, || fs::rename(staged, &path))?;
        fs::sync_dir(fs::parent(&path))?;
        if !hashed.is_current() {
            // Another name of the file was used meanwhile: to link it, or to write to it.
            hashed = self.prove(&path, pin.sha256, what, seen).inspect_err(|_| drop(fs::rename(&path, staged)))?;
        }
        self.records.learn(&hashed);
        Ok(path)
    }

    /// Puts a verified file where people and engines look for it. What is not known to be verified is hashed first. A file
    /// of somebody else's that has the place is kept under another name: see [`Store::take_kept`].
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] when the file is not what `digest` says, [`StoreError::Occupied`] when a folder has the
    /// place, or when the place cannot be written.
    pub fn place(&self, from: &Path, to: &Path, digest: Digest) -> Result<(), StoreError> {
        let what = format!("`{}`", from.display());
        let hashed = self.prove(from, digest, &what, &mut |_| Ok(()))?;
        self.sweep_project_folder(fs::parent(to));
        // A wrong file in the store itself is not the user's own.
        let occupant = if to.starts_with(&self.root) { Occupant::Ours } else { self.occupant(to, digest)? };
        match occupant {
            Occupant::None | Occupant::Ours => {}
            Occupant::Wanted => return Ok(()),
            Occupant::Foreign => {
                let backup = fs::backup_name(to)?;
                fs::rename(to, &backup)?;
                self.kept.lock().unwrap_or_else(PoisonError::into_inner).push((to.to_owned(), backup));
            }
        }
        let placed = match hashed.placed(to)? {
            Some(placed) => placed,
            // A copy, or a file that another process linked meanwhile.
            None => self.prove(to, digest, &what, &mut |_| Ok(()))?,
        };
        self.records.learn(&placed);
        Ok(())
    }

    /// Files that had a place and were not placed by this program, with the names that they have now; each is told once.
    pub fn take_kept(&self) -> Vec<(PathBuf, PathBuf)> {
        std::mem::take(&mut self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What has a place already. A file is ours when the store has its bytes, too, and a link when it leads there.
    fn occupant(&self, place: &Path, wanted: Digest) -> Result<Occupant, StoreError> {
        let Ok(meta) = fs::symlink_metadata(place) else { return Ok(Occupant::None) };
        if meta.is_symlink() {
            let ours = fs::read_link(place).is_ok_and(|target| target.starts_with(self.root.join("blobs")));
            return Ok(if ours { Occupant::Ours } else { Occupant::Foreign });
        }
        if meta.is_dir() {
            return Err(StoreError::Occupied { path: place.to_owned() });
        }
        let Ok(hashed) = self.records.prove(place, &mut |_| Ok(())) else { return Ok(Occupant::Foreign) };
        Ok(match hashed.sha256() {
            digest if digest == wanted => Occupant::Wanted,
            digest if fs::exists(&self.blob_path(&digest)) => Occupant::Ours,
            _ => Occupant::Foreign,
        })
    }
}

/// What has a place in a project.
enum Occupant {
    None,
    /// The very bytes that are to be placed.
    Wanted,
    /// Placed by this program earlier.
    Ours,
    Foreign,
}

fn mismatch(what: &str, expected: Digest, expected_bytes: Option<u64>, computed: &Hashed) -> StoreError {
    StoreError::Mismatch {
        what: what.to_owned(),
        expected,
        computed: computed.sha256(),
        expected_bytes,
        computed_bytes: computed.size_bytes(),
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

    fn write_in_place(path: &Path, bytes: &[u8]) {
        let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
    }

    #[test]
    fn h3_changed_bytes_are_never_recorded_as_verified() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("cache"), Key::from_secret("k")).unwrap();
        let staging = store.stage().unwrap();
        let (foreign, staged) = (root.path().join("hub blob"), staging.path().join("f"));
        fs::write_atomic(&foreign, &[b'a'; 3 << 20]).unwrap();
        std::fs::hard_link(&foreign, &staged).unwrap();
        let pin = pin(&[b'a'; 3 << 20]);
        // Overwritten through its other name after its bytes were read.
        let mut pieces = 0;
        let mut seen = |_| {
            pieces += 1;
            if pieces == 3 {
                write_in_place(&foreign, b"b");
            }
            Ok(())
        };
        assert!(store.admit_blob(&staged, &pin, "w", &mut seen).is_err());
        let blob = store.blob_path(&pin.sha256);
        assert!(!fs::exists(&blob));

        // Overwritten between two proofs: what is placed then is hashed again.
        write_in_place(&foreign, b"a");
        store.admit_blob(&staged, &pin, "w", &mut |_| Ok(())).unwrap();
        write_in_place(&foreign, b"b");
        let place = root.path().join("place");
        let refused = store.place(&blob, &place, pin.sha256);
        assert!(matches!(refused, Err(StoreError::Mismatch { .. })), "{refused:?}");
        assert_ne!(store.presence(&blob, &pin), Presence::Verified);
        assert!(!fs::exists(&place));
    }

    #[test]
    fn m2_two_equal_files_of_one_repository_stay_known() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("cache"), Key::from_secret("k")).unwrap();
        let staging = store.stage().unwrap();
        let foreign = root.path().join("hub blob");
        fs::write_atomic(&foreign, b"right").unwrap();
        let (one, two) = (staging.path().join("1"), staging.path().join("2"));
        for staged in [&one, &two] {
            std::fs::hard_link(&foreign, staged).unwrap();
        }
        for staged in [&one, &two] {
            let blob = store.admit_blob(staged, &pin(b"right"), "w", &mut |_| Ok(())).unwrap();
            assert!(!fs::exists(staged));
            store
                .place(&blob, &root.path().join("models").join(staged.file_name().unwrap()), pin(b"right").sha256)
                .unwrap();
        }
        drop(staging);
        store.save_records().unwrap();
        let again = Store::open(store.root(), Key::from_secret("k")).unwrap();
        assert_eq!(again.presence(&again.blob_path(&pin(b"right").sha256), &pin(b"right")), Presence::Verified);
        assert_eq!(again.presence(&root.path().join("models/2"), &pin(b"right")), Presence::Verified);
    }

    #[test]
    fn m2_a_file_that_others_linked_is_hashed_once_and_known_again() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("cache"), Key::from_secret("k")).unwrap();
        let staging = store.stage().unwrap();
        let staged = staging.path().join("f");
        fs::write_atomic(&staged, b"right").unwrap();
        let blob = store.admit_blob(&staged, &pin(b"right"), "w", &mut |_| Ok(())).unwrap();
        std::fs::hard_link(&blob, root.path().join("a link of somebody else")).unwrap();
        if cfg!(unix) {
            assert_eq!(store.presence(&blob, &pin(b"right")), Presence::Unverified);
        }
        assert!(store.confirm(&blob, &pin(b"right"), &mut |_| Ok(())).unwrap());
        assert_eq!(store.presence(&blob, &pin(b"right")), Presence::Verified);
    }

    #[test]
    fn m5_a_file_of_the_users_own_is_kept_under_another_name() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("cache"), Key::from_secret("k")).unwrap();
        let staging = store.stage().unwrap();
        let admit = |bytes: &[u8]| {
            let staged = staging.path().join("f");
            fs::write_atomic(&staged, bytes).unwrap();
            store.admit_blob(&staged, &pin(bytes), "w", &mut |_| Ok(())).unwrap()
        };
        let place = root.path().join("models/w.gguf");
        let put = |bytes: &[u8]| store.place(&store.blob_path(&pin(bytes).sha256), &place, pin(bytes).sha256).unwrap();
        let read = |path: &Path| fs::read_bounded(path, 99).unwrap();
        admit(b"first");
        admit(b"later");

        fs::write_atomic(&place, b"mine!").unwrap();
        put(b"first");
        let [(kept, backup)] = &store.take_kept()[..] else { panic!("one file is kept") };
        assert_eq!((kept, read(&place), read(backup)), (&place, b"first".to_vec(), b"mine!".to_vec()));
        // What this program placed makes way for the next version, and the same bytes stay.
        put(b"later");
        put(b"later");
        assert_eq!(read(&place), b"later");
        fs::remove_file(&place).unwrap();
        fs::write_atomic(&place, b"later").unwrap();
        put(b"later");
        assert_eq!(store.take_kept(), [], "the user's own copy of the same bytes");

        fs::remove_file(&place).unwrap();
        fs::write_atomic(&place.join("x"), b"a folder").unwrap();
        let refused = store.place(&store.blob_path(&pin(b"first").sha256), &place, pin(b"first").sha256);
        assert!(matches!(refused, Err(StoreError::Occupied { .. })), "{refused:?}");
        assert!(place.join("x").exists());
    }

    #[test]
    fn m6_with_nothing_to_write_nothing_is_locked() {
        let root = tempfile::tempdir().unwrap();
        drop(Store::open(root.path(), Key::from_secret("k")).unwrap());
        // Neither locks nor staging can be made here, whoever runs this.
        fs::write_atomic(&root.path().join("locks"), b"").unwrap();
        fs::write_atomic(&root.path().join("staging"), b"").unwrap();
        let store = Store::open(root.path(), Key::from_secret("k")).unwrap();
        store.save_records().unwrap();
        assert!(store.stage().is_err());
    }
}

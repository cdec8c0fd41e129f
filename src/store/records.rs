//! What was hashed: the digest of a file, remembered under what identifies the file without reading it ([`Stamp`]).
//!
//! A record counts only while device, inode, size and both times are what they were. It makes a `sync` with nothing to do
//! free of hashing; `verify` never looks at it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;
use crate::base::fs::{self, FsError, Stamp};
use crate::base::hashed::Hashed;

use super::Seen;
use super::seal::Key;

/// More records than files on any machine that fits one; older ones go first.
const MAX_RECORDS: usize = 200_000;
const MAX_BYTES: u64 = 256 << 20;
const PURPOSE: &str = "records";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    stamp: Stamp,
    digest: Digest,
}

#[derive(Debug, Default)]
struct State {
    by_file: BTreeMap<String, Record>,
    changed: bool,
}

/// Shared by threads; other processes see it after [`Records::save`].
#[derive(Debug, Default)]
pub struct Records(Mutex<State>);

/// A file's name here: its inode where there is one, so that all hard links share a record; else its path.
fn name_of(path: &Path, stamp: &Stamp) -> String {
    if stamp.inode == 0 { path.display().to_string() } else { format!("{}:{}", stamp.device, stamp.inode) }
}

impl Records {
    /// The records in `path`, or none when there is no such file, or it was not sealed here.
    pub fn load(path: &Path, key: &Key) -> Self {
        Self(Mutex::new(State { by_file: read(path, key), changed: false }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The digest of a file that was hashed before and not touched since. Follows a symbolic link.
    pub fn known(&self, path: &Path) -> Option<Digest> {
        let stamp = fs::stamp(path).ok()?;
        let state = self.state();
        let record = state.by_file.get(&name_of(path, &stamp))?;
        (record.stamp == stamp).then_some(record.digest)
    }

    /// Remembers what hashing has shown, unless the file was touched since.
    pub fn learn(&self, hashed: &Hashed) {
        if hashed.is_current() {
            self.state().insert(hashed.path(), *hashed.stamp(), hashed.sha256());
        }
    }

    /// Carries a digest over an operation of ours that changes a file's times but not its content (linking, renaming,
    /// changing permissions): `known` is what [`Records::known`] said just before.
    pub fn carry(&self, path: &Path, known: Option<Digest>) {
        let (Some(digest), Ok(stamp)) = (known, fs::stamp(path)) else { return };
        self.state().insert(path, stamp, digest);
    }

    /// Remembers that a file cannot be read, so that it counts as a wrong one until it is replaced.
    pub fn learn_unreadable(&self, path: &Path) {
        self.carry(path, Some(Digest::of(b"unreadable")));
    }

    /// The digest of the file, from the records or by hashing it now; `seen` as for [`Hashed::of_file`].
    ///
    /// # Errors
    /// When it cannot be read, or `seen` says so.
    pub fn digest_of(&self, path: &Path, seen: Seen<'_>) -> Result<(Digest, u64), FsError> {
        let before = fs::stamp(path)?;
        if let Some(digest) = self.known(path) {
            return Ok((digest, before.size_bytes));
        }
        let hashed = Hashed::of_file(path, seen)?;
        self.learn(&hashed);
        Ok((hashed.sha256(), hashed.size_bytes()))
    }

    /// Adds what others wrote, where nothing newer is known here.
    pub fn merge(&self, path: &Path, key: &Key) {
        let others = read(path, key);
        let mut state = self.state();
        for (name, record) in others {
            let newer = state.by_file.get(&name).is_none_or(|own| own.stamp.changed_ns < record.stamp.changed_ns);
            if newer {
                state.by_file.insert(name, record);
            }
        }
    }

    /// Writes what is new, merged with what other processes wrote meanwhile. The caller holds the lock `records`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, key: &Key) -> Result<(), FsError> {
        let mut state = self.state();
        if !state.changed {
            return Ok(());
        }
        let mut merged = read(path, key);
        merged.extend(state.by_file.iter().map(|(name, record)| (name.clone(), *record)));
        while merged.len() > MAX_RECORDS {
            merged.pop_first();
        }
        let text = serde_json::to_vec(&merged)
            .map_err(|error| FsError::new("write", path, std::io::Error::other(error.to_string())))?;
        fs::write_atomic(path, &key.seal(PURPOSE, &text))?;
        state.changed = false;
        Ok(())
    }
}

impl State {
    fn insert(&mut self, path: &Path, stamp: Stamp, digest: Digest) {
        let record = Record { stamp, digest };
        let old = self.by_file.insert(name_of(path, &stamp), record);
        self.changed |= old != Some(record);
    }
}

fn read(path: &Path, key: &Key) -> BTreeMap<String, Record> {
    let Ok(sealed) = fs::read_bounded(path, MAX_BYTES) else { return BTreeMap::new() };
    key.open(PURPOSE, &sealed).and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touched_file_is_unknown_and_a_foreign_record_is_none() {
        let root = tempfile::tempdir().unwrap();
        let (file, saved) = (root.path().join("é f"), root.path().join("records.json"));
        let key = Key::from_secret("here");
        fs::write_atomic(&file, b"1").unwrap();
        let records = Records::load(&saved, &key);
        assert_eq!(records.known(&file), None);
        let (digest, size) = records.digest_of(&file, &mut |_| Ok(())).unwrap();
        assert_eq!((digest, size), (Digest::of(b"1"), 1));
        records.save(&saved, &key).unwrap();
        assert_eq!(Records::load(&saved, &key).known(&file), Some(digest));
        assert_eq!(Records::load(&saved, &Key::from_secret("elsewhere")).known(&file), None);
        fs::write_atomic(&file, b"2").unwrap();
        assert_eq!(Records::load(&saved, &key).known(&file), None);
    }
}

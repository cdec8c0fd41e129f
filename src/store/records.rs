//! What was hashed: the digest of each file, bound to what identifies the file's content without reading it; and what `path`
//! sources were when they were hashed.
//!
//! A record counts only while device, inode, size and both times are what they were when the file was hashed
//! ([`hashed::Record`]). It makes a `sync` with nothing to do free of hashing; `verify` hashes regardless.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;
use crate::base::fs::{self, FsError, Stamp};
use crate::base::hashed::{self, Hashed, Record};

use super::Seen;
use super::seal::Key;

/// More records than files on any machine that fits one; older ones go first.
const MAX_RECORDS: usize = 200_000;
/// Bytes of the file with the records at most.
const MAX_BYTES: u64 = 256 << 20;
const PURPOSE: &str = "records";

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Known {
    Hashed(Record),
    /// The file could not be read while it had this stamp.
    Unreadable {
        unreadable: Stamp,
    },
    Path(PathState),
}

/// What a `path` source was when it was hashed last. Without it, files are hashed, and a source that was edited looks like one
/// that never was what the lockfile says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathState {
    /// Of names, sizes and times; none where these proved nothing.
    pub fingerprint: Option<Digest>,
    /// Of the content that was locked.
    pub content: Digest,
    /// Of the content that was locked before: the lockfile still has it when the program was killed before writing it.
    pub earlier: Option<Digest>,
}

type ByFile = BTreeMap<String, Known>;

#[derive(Debug, Default)]
struct State {
    /// What the file with the records said when it was read.
    saved: ByFile,
    /// What this process learnt: only this is written.
    learnt: ByFile,
    /// Proofs that are not settled, by the same names: they count in this process alone.
    fresh: BTreeMap<String, Hashed>,
}

/// Shared by threads; other processes see what was learnt after [`Records::save`].
#[derive(Debug, Default)]
pub struct Records(Mutex<State>);

/// A file's name in the records: its inode where there is one, so that all hard links share a record; else its path.
fn name_of(path: &Path, stamp: &Stamp) -> String {
    if stamp.inode == 0 { path.display().to_string() } else { format!("{}:{}", stamp.device, stamp.inode) }
}

fn path_name(source: &Digest) -> String {
    format!("path:{source}")
}

impl Records {
    /// The records in `path`, or none when there is no such file, or it was not sealed here.
    pub fn load(path: &Path, key: &Key) -> Self {
        Self(Mutex::new(State { saved: read(path, key), ..State::default() }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The proof for a file that was hashed before and not touched since. Follows a symbolic link.
    pub fn known(&self, path: &Path) -> Option<Hashed> {
        self.known_at(path, &fs::stamp(path).ok()?)
    }

    /// The same for a file whose stamp has just been read: many files are looked at when there is nothing to do.
    pub fn known_at(&self, path: &Path, now: &Stamp) -> Option<Hashed> {
        let name = name_of(path, now);
        let state = self.state();
        if let Some(fresh) = state.fresh.get(&name) {
            return fresh.clone().through(path, || Ok::<_, FsError>(())).ok().filter(Hashed::is_current);
        }
        match state.get(&name)? {
            Known::Hashed(record) => record.prove(path, now),
            Known::Unreadable { .. } | Known::Path(_) => None,
        }
    }

    /// Whether the file could not be read when it was last hashed, and was not touched since.
    pub fn is_unreadable(&self, path: &Path) -> bool {
        let Ok(stamp) = fs::stamp(path) else { return false };
        let (name, state) = (name_of(path, &stamp), self.state());
        state.get(&name) == Some(&Known::Unreadable { unreadable: stamp })
    }

    /// Remembers what hashing has shown, unless the file was touched since.
    pub fn learn(&self, hashed: &Hashed) {
        if !hashed.is_current() {
            return;
        }
        let name = name_of(hashed.path(), hashed.stamp());
        let mut state = self.state();
        match hashed.record() {
            Some(record) => {
                state.fresh.remove(&name);
                state.learn(name, Known::Hashed(record));
            }
            None => drop(state.fresh.insert(name, hashed.clone())),
        }
    }

    /// Remembers that a file cannot be read, so that it counts as damaged until it is replaced.
    pub fn learn_unreadable(&self, path: &Path) {
        if let Ok(unreadable) = fs::stamp(path) {
            self.state().learn(name_of(path, &unreadable), Known::Unreadable { unreadable });
        }
    }

    /// The state in which a `path` source was hashed last, if it was hashed here. `source` is a digest of its name.
    pub fn path_state(&self, source: &Digest) -> Option<PathState> {
        match self.state().get(&path_name(source))? {
            Known::Path(state) => Some(*state),
            Known::Hashed(_) | Known::Unreadable { .. } => None,
        }
    }

    /// Remembers the state of a `path` source.
    pub fn learn_path(&self, source: &Digest, path: PathState) {
        self.state().learn(path_name(source), Known::Path(path));
    }

    /// The proof for the file, from the records or by hashing it now; `seen` as for [`Hashed::of_file`].
    ///
    /// # Errors
    /// When it cannot be read, or `seen` stops the work.
    pub fn prove(&self, path: &Path, seen: Seen<'_>) -> Result<Hashed, FsError> {
        if let Some(known) = self.known(path) {
            return Ok(known);
        }
        let hashed = Hashed::of_file(path, seen)?;
        self.learn(&hashed);
        Ok(hashed)
    }

    /// Takes in what other processes have written since.
    pub fn merge(&self, path: &Path, key: &Key) {
        let others = read(path, key);
        self.state().saved = others;
    }

    /// Whether there is something to write.
    pub fn is_changed(&self) -> bool {
        let state = self.state();
        !state.learnt.is_empty() || !state.fresh.is_empty()
    }

    /// Writes what this process learnt, beside what other processes wrote meanwhile. The caller holds the lock `records`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, key: &Key) -> Result<(), FsError> {
        self.settle();
        let mut state = self.state();
        if state.learnt.is_empty() {
            return Ok(());
        }
        let mut merged = read(path, key);
        merged.extend(std::mem::take(&mut state.learnt));
        while merged.len() > MAX_RECORDS {
            merged.pop_first();
        }
        let text = serde_json::to_vec(&merged)
            .map_err(|error| FsError::new("write", path, std::io::Error::other(error.to_string())))?;
        state.saved = merged;
        fs::write_atomic(path, &key.seal(PURPOSE, &text))
    }

    /// Hashes small files with proofs that were not settled once more, when the tick of the clock is over. Larger ones
    /// stay unknown to other processes.
    fn settle(&self) {
        let fresh = std::mem::take(&mut self.state().fresh);
        if fresh.is_empty() {
            return;
        }
        std::thread::sleep(fs::CLOCK_TICK);
        let paths: Vec<PathBuf> = fresh
            .into_values()
            .filter(|hashed| hashed.size_bytes() <= hashed::SMALL_BYTES && hashed.is_current())
            .map(|hashed| hashed.path().to_owned())
            .collect();
        for hashed in paths.iter().filter_map(|path| Hashed::of_file(path, |_| Ok(())).ok()) {
            if hashed.is_settled() {
                self.learn(&hashed);
            }
        }
    }
}

impl State {
    fn get(&self, name: &str) -> Option<&Known> {
        self.learnt.get(name).or_else(|| self.saved.get(name))
    }

    fn learn(&mut self, name: String, known: Known) {
        if self.get(&name) != Some(&known) {
            self.learnt.insert(name, known);
        }
    }
}

fn read(path: &Path, key: &Key) -> ByFile {
    let Ok(sealed) = fs::read_bounded(path, MAX_BYTES) else { return ByFile::new() };
    key.open(PURPOSE, &sealed).and_then(|bytes| serde_json::from_slice(bytes).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(records: &Records, path: &Path) -> Option<Digest> {
        records.known(path).map(|hashed| hashed.sha256())
    }

    #[test]
    fn a_touched_file_is_unknown_and_a_foreign_record_is_none() {
        let root = tempfile::tempdir().unwrap();
        let (file, saved) = (root.path().join("é f"), root.path().join("records.json"));
        let key = Key::from_secret("here");
        fs::write_atomic(&file, b"1").unwrap();
        let records = Records::load(&saved, &key);
        assert_eq!(records.known(&file), None);
        let hashed = records.prove(&file, &mut |_| Ok(())).unwrap();
        assert_eq!((hashed.sha256(), hashed.size_bytes()), (Digest::of(b"1"), 1));
        records.save(&saved, &key).unwrap();
        assert_eq!(digest(&Records::load(&saved, &key), &file), Some(Digest::of(b"1")));
        assert_eq!(digest(&Records::load(&saved, &Key::from_secret("elsewhere")), &file), None);
        fs::write_atomic(&file, b"2").unwrap();
        assert_eq!(digest(&Records::load(&saved, &key), &file), None);
    }

    #[test]
    fn two_processes_that_save_keep_what_both_learnt() {
        let root = tempfile::tempdir().unwrap();
        let (a, b, saved) = (root.path().join("a"), root.path().join("b"), root.path().join("records.json"));
        let key = Key::from_secret("here");
        fs::write_atomic(&a, b"old").unwrap();
        Records::load(&saved, &key).prove(&a, &mut |_| Ok(())).unwrap();
        let first = Records::load(&saved, &key);
        first.prove(&a, &mut |_| Ok(())).unwrap();
        first.save(&saved, &key).unwrap();
        // The second one has the first one's record of `a`, and writes after a third one knows `a` newer.
        let second = Records::load(&saved, &key);
        let third = Records::load(&saved, &key);
        fs::append(&a, b" and new").unwrap();
        third.prove(&a, &mut |_| Ok(())).unwrap();
        third.save(&saved, &key).unwrap();
        fs::write_atomic(&b, b"b").unwrap();
        second.prove(&b, &mut |_| Ok(())).unwrap();
        second.save(&saved, &key).unwrap();
        let all = Records::load(&saved, &key);
        assert_eq!(digest(&all, &a), Some(Digest::of(b"old and new")), "an older record replaced a newer one");
        assert_eq!(digest(&all, &b), Some(Digest::of(b"b")));
    }

    #[test]
    fn h3_a_proof_that_is_not_settled_is_not_written_down() {
        let root = tempfile::tempdir().unwrap();
        let (file, saved) = (root.path().join("f"), root.path().join("records.json"));
        let key = Key::from_secret("here");
        fs::write_atomic(&file, b"1").unwrap();
        // Modified in a tick that is not over yet.
        let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(100);
        fs::open(&file).unwrap().set_modified(soon).unwrap();
        let records = Records::load(&saved, &key);
        records.prove(&file, &mut |_| Ok(())).unwrap();
        assert_eq!(digest(&records, &file), Some(Digest::of(b"1")), "known to the process that hashed it");
        records.save(&saved, &key).unwrap();
        assert_eq!(digest(&Records::load(&saved, &key), &file), None);
    }
}

//! What `path` sources were when they were hashed last: a fingerprint of sizes and times, and a digest of the content that was
//! locked. Sealed. Without such a file, files are hashed, and a source that was edited looks like one that never was what the
//! lockfile says.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;
use crate::base::fs;

use super::Store;

const MAX_BYTES: u64 = 4096;
const PURPOSE: &str = "path";

/// A state of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathState {
    /// Of names, sizes and times; none where these proved nothing.
    pub fingerprint: Option<Digest>,
    /// Of the content.
    pub content: Digest,
    /// Of the content that was locked before: the lockfile still has it when the program was killed before writing it.
    #[serde(default)]
    pub earlier: Option<Digest>,
}

impl Store {
    fn path_file(&self, source: &Digest) -> PathBuf {
        self.root().join("paths").join(source.hex())
    }

    /// The state in which a source was last what the lockfile says, if it was hashed here. `source` is a digest of its name.
    pub fn path_state(&self, source: &Digest) -> Option<PathState> {
        let sealed = fs::read_bounded(&self.path_file(source), MAX_BYTES).ok()?;
        serde_json::from_slice(self.key.open(&format!("{PURPOSE} {source}"), &sealed)?).ok()
    }

    /// Remembers the state of a source, unless it is known. Where nothing can be written, and in a cache that is not there yet, nothing is.
    pub fn remember_path(&self, source: &Digest, state: &PathState) {
        let Ok(text) = serde_json::to_vec(state) else { return };
        if fs::exists(self.root()) && self.path_state(source) != Some(*state) {
            let _ = fs::write_atomic(&self.path_file(source), &self.key.seal(&format!("{PURPOSE} {source}"), &text));
        }
    }
}

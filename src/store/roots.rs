//! Which projects use the store, and what each of them needs of it: what is not needed may be removed.
//!
//! Nothing here is believed beyond that: a forged root keeps files from being removed, a lost one costs a download.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::lock::{self, Lock};

use super::{Store, StoreError};

/// The lock that those who remove hold alone, and those who start to need something hold together.
const LOCK: &str = "removal";
const MAX_ROOT_BYTES: u64 = 16 << 20;

/// A project that uses the store. What its lockfile pins is needed, and so is what this names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The absolute path of its lockfile. The project is gone when there is no such file.
    pub lockfile: PathBuf,
    /// The SHA-256 of the lockfile that the rest belongs to.
    pub digest: Digest,
    /// Fingerprints of the engines that were needed under this lockfile: a machine may use several variants.
    pub artifacts: BTreeSet<Digest>,
    /// Fingerprints of derivations; their files are needed, too.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub derived: BTreeSet<Digest>,
    /// The path is not Unicode, so that `lockfile` only resembles it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unnamed: bool,
}

impl Store {
    fn root_path(&self, lockfile: &Path) -> PathBuf {
        let name = Digest::of(lockfile.as_os_str().as_encoded_bytes()).hex();
        self.root.join("roots").join(format!("{name}.json"))
    }

    /// Writes down what a project needs, before it relies on it. With nothing new, nothing is locked or written. In a cache
    /// that is read-only nothing can be removed, so that this is no error.
    ///
    /// # Errors
    /// When the user asked to stop, or the file cannot be written.
    pub fn register(&self, mut root: Root, cancel: &Cancel, waiting: impl FnOnce()) -> Result<(), StoreError> {
        let path = self.root_path(&root.lockfile);
        if root.lockfile.to_str().is_none() {
            // It has no place in JSON.
            (root.unnamed, root.lockfile) = (true, root.lockfile.to_string_lossy().into_owned().into());
        }
        let known = read(&path);
        if let Some(known) = known.as_ref().filter(|known| known.digest == root.digest) {
            root.artifacts.extend(&known.artifacts);
            root.derived.extend(&known.derived);
        }
        if known.as_ref() == Some(&root) {
            return Ok(());
        }
        let text = serde_json::to_vec_pretty(&root).unwrap_or_default();
        let written = self
            .beside_others(cancel, waiting)
            .and_then(|_held| Ok(fs::create_dir_all(fs::parent(&path)).and_then(|()| fs::write_atomic(&path, &text))?));
        match written {
            Err(StoreError::Fs(error)) if error.is_read_only() => Ok(()),
            written => written,
        }
    }

    /// Keeps others from removing anything, for those who make things that no root names yet.
    ///
    /// # Errors
    /// As for [`Store::lock`].
    pub fn beside_others(&self, cancel: &Cancel, waiting: impl FnOnce()) -> Result<Lock, StoreError> {
        self.make()?;
        Ok(lock::acquire_beside_others(&self.root.join("locks").join(LOCK), cancel, waiting)?)
    }

    /// Keeps others from registering, and from removing.
    ///
    /// # Errors
    /// As for [`Store::lock`].
    pub fn alone(&self, cancel: &Cancel, waiting: impl FnOnce()) -> Result<Lock, StoreError> {
        self.lock(LOCK, cancel, waiting)
    }

    /// Every project that was registered, with the file that says so; none where that file cannot be read.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn roots(&self) -> Result<Vec<(PathBuf, Option<Root>)>, StoreError> {
        let folder = self.root.join("roots");
        if !fs::exists(&folder) {
            return Ok(Vec::new());
        }
        let is_root = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "json");
        Ok(fs::read_dir(&folder)?.into_iter().filter(is_root).map(|path| (path.clone(), read(&path))).collect())
    }
}

fn read(path: &Path) -> Option<Root> {
    serde_json::from_slice(&fs::read_bounded(path, MAX_ROOT_BYTES).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::seal::Key;

    #[test]
    fn needs_add_up_until_the_lockfile_changes() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), Key::from_secret("k")).unwrap();
        let lockfile = folder.path().join("a project/é.lock");
        let register = |lock: &[u8], artifact: &[u8]| {
            let (artifacts, derived) = ([Digest::of(artifact)].into(), BTreeSet::new());
            let (lockfile, digest) = (lockfile.clone(), Digest::of(lock));
            let root = Root { lockfile, digest, artifacts, derived, unnamed: false };
            store.register(root, &Cancel::default(), || panic!("nobody removes")).unwrap();
            let [(_, Some(root))] = &store.roots().unwrap()[..] else { panic!("one project") };
            root.artifacts.clone()
        };
        assert_eq!(register(b"1", b"cpu").len(), 1);
        assert_eq!(register(b"1", b"cuda").len(), 2);
        let alone = store.alone(&Cancel::default(), || {}).unwrap();
        // With nothing new to say nobody waits for anybody.
        assert_eq!(register(b"1", b"cpu").len(), 2);
        drop(alone);
        assert_eq!(register(b"2", b"cpu").len(), 1);
    }
}

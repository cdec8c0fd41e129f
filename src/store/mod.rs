//! Layer 2: owns what is on disk. Nothing enters unverified, nothing that was good leaves before its replacement is in.
//!
//! ```text
//! CACHEDIR.TAG
//! blobs/<sha256>                verified files
//! trees/<tree digest>/          engine sources, exported; trees/<tree digest>.list is the listing its name is the digest of
//! tools/<package sha256>/       build tools, unpacked; tools/<package sha256>.list is their sealed listing
//! artifacts/<fingerprint>/      engine installs; receipt.json in it is written last, sealed
//! derived/<fingerprint>.json    which blobs came out of a derivation: a sealed receipt
//! records.json                  what was hashed, by inode and times, and what `path` sources were then: sealed
//! proofs.json                   what was verified, built again and tested, and when: sealed
//! roots/<path digest>.json      a project (by its lockfile's path) and what it needs of the store
//! locks/                        lock files; never deleted
//! scratch/                      partial downloads and git mirrors: nothing in it is trusted
//! staging/                      what is being made; leftovers of killed runs go when nobody holds them
//! logs/                         full build logs
//! ```
//!
//! *Sealed* means that a file carries a message authentication code under a key that lies outside the cache
//! ([`seal`]). A cache that was restored from elsewhere, with whatever records came along, is therefore a cache without
//! records: blobs and trees are hashed again before they are used, tools and artifacts are made again.

pub mod artifacts;
pub mod blobs;
pub mod damage;
pub mod derived;
pub mod proofs;
pub mod records;
pub mod roots;
pub mod seal;
pub mod trees;
pub mod usage;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::base::cancel::{Cancel, Cancelled};
use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::lock::{self, Lock, LockError};
use crate::base::tree::TreeError;

use records::Records;
use seal::Key;

/// The verified files of this machine.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    key: Key,
    records: Records,
    /// Folders of projects where leftovers were looked for.
    swept: Mutex<BTreeSet<PathBuf>>,
    /// What [`Store::place`] moved out of the way, and where to.
    kept: Mutex<Vec<(PathBuf, PathBuf)>>,
}

/// Why an operation of the store failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum StoreError {
    #[error(transparent)]
    Fs(FsError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A folder has the place of a file.
    #[error("`{}` is a folder, where a file belongs", path.display())]
    Occupied { path: PathBuf },
    /// The staged file does not match the lockfile.
    #[error("{what} does not match the lockfile")]
    Mismatch { what: String, expected: Digest, computed: Digest, expected_bytes: Option<u64>, computed_bytes: u64 },
}

/// Called with the size in bytes of each piece that was hashed; an error, such as [`Cancelled`], stops the work.
pub type Seen<'a> = &'a mut (dyn FnMut(u64) -> std::io::Result<()> + Send);

impl From<FsError> for StoreError {
    fn from(error: FsError) -> Self {
        match error.source.get_ref() {
            Some(inner) if inner.is::<Cancelled>() => Self::Cancelled(Cancelled),
            _ => Self::Fs(error),
        }
    }
}

impl From<LockError> for StoreError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Fs(error) => error.into(),
            LockError::Cancelled(error) => error.into(),
        }
    }
}

/// A folder in `staging/`, removed when dropped. Its lock tells other processes that it is in use.
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    lock_path: PathBuf,
    lock: Option<Lock>,
}

impl Staging {
    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        drop(self.lock.take());
        let _ = fs::remove_file(&self.lock_path);
    }
}

const STAGING_LOCK: &str = "staging";
const TAG_FILE: &str = "CACHEDIR.TAG";
const CACHE_TAG: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
    # This folder holds what aitools fetched and built; everything in it can be made again.\n\
    # For information about cache directory tags see https://bford.info/cachedir/\n";

impl Store {
    /// Opens the store below `root`. A folder that is not there is made when something is written.
    ///
    /// # Errors
    /// When something else than a folder has the name.
    pub fn open(root: &Path, key: Key) -> Result<Self, StoreError> {
        if fs::metadata(root).is_ok_and(|meta| !meta.is_dir()) {
            return Err(FsError::new("open", root, std::io::ErrorKind::NotADirectory.into()).into());
        }
        let records = Records::load(&root.join("records.json"), &key);
        Ok(Self { root: root.to_owned(), key, records, swept: Mutex::default(), kept: Mutex::default() })
    }

    /// The cache folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where sources keep partial downloads and mirrors.
    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    /// Where full build logs go.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// What was hashed before.
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// Takes in what other processes learnt since this store was opened.
    pub fn reload_records(&self) {
        self.records.merge(&self.root.join("records.json"), &self.key);
    }

    /// Writes what was learnt about files. Call once at the end of a command; losing it costs only hashing, so a cache that
    /// is read-only is no error. With nothing to write, and in a cache that is not there yet, nothing is made.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_records(&self) -> Result<(), StoreError> {
        if !self.records.is_changed() || !fs::exists(&self.root) {
            return Ok(());
        }
        let saved = self
            .lock("records", &Cancel::default(), || {})
            .and_then(|_guard| Ok(self.records.save(&self.root.join("records.json"), &self.key)?));
        match saved {
            Err(StoreError::Fs(error)) if error.is_read_only() => Ok(()),
            saved => saved,
        }
    }

    /// Makes the store's folder and the key, which every write needs. Commands that only look make neither.
    fn make(&self) -> Result<(), StoreError> {
        let tag = self.root.join(TAG_FILE);
        if !fs::exists(&tag) {
            let was_there = fs::exists(&self.root);
            let tagged = fs::create_dir_all(&self.root).and_then(|()| fs::write_atomic(&tag, CACHE_TAG.as_bytes()));
            tagged.or_else(|error| if was_there && error.is_read_only() { Ok(()) } else { Err(error) })?;
        }
        Ok(self.key.make()?)
    }

    /// Holds the named lock until the guard is dropped. `waiting` is called when somebody else has it.
    ///
    /// # Errors
    /// When the user asked to stop, or the lock file cannot be made.
    pub fn lock(&self, name: &str, cancel: &Cancel, waiting: impl FnOnce()) -> Result<Lock, StoreError> {
        self.make()?;
        Ok(lock::acquire(&self.root.join("locks").join(name), cancel, waiting)?)
    }

    /// An empty folder on the store's file system.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn stage(&self) -> Result<Staging, StoreError> {
        let folder = self.root.join("staging");
        fs::create_dir_all(&folder)?;
        // A folder and its lock come together, as far as `sweep` can see.
        let _making = self.lock(STAGING_LOCK, &Cancel::default(), || {})?;
        for _ in 0..100 {
            let id = random_hex()?;
            let (path, lock_path) = (folder.join(&id), folder.join(format!("{id}.lock")));
            if fs::exists(&path) {
                continue;
            }
            let lock = lock::acquire(&lock_path, &Cancel::default(), || {})?;
            fs::create_dir_all(&path)?;
            return Ok(Staging { path, lock_path, lock: Some(lock) });
        }
        let why = std::io::Error::other("no free name after 100 tries");
        Err(FsError::new("create a folder in", &folder, why).into())
    }

    /// Removes what killed runs left in a folder of a project, once for each folder.
    fn sweep_project_folder(&self, folder: &Path) {
        if self.swept.lock().unwrap_or_else(PoisonError::into_inner).insert(folder.to_owned()) {
            fs::remove_leftovers(folder);
        }
    }

    /// Removes what killed runs left in `staging/`: every folder, and lock, that nobody holds.
    ///
    /// # Errors
    /// When a leftover cannot be removed.
    pub fn sweep(&self) -> Result<(), StoreError> {
        let folder = self.root.join("staging");
        if !fs::exists(&folder) || fs::read_dir(&folder)?.is_empty() {
            return Ok(());
        }
        let _sweeping = match self.lock(STAGING_LOCK, &Cancel::default(), || {}) {
            Err(StoreError::Fs(error)) if error.is_read_only() => return Ok(()),
            lock => lock?,
        };
        for path in fs::read_dir(&folder)? {
            // A lock may be all that is left.
            let (path, lock_path) = (path.with_extension(""), path.with_extension("lock"));
            if let Some(guard) = lock::try_acquire(&lock_path)? {
                fs::remove_dir_all(&path)?;
                fs::remove_file(&lock_path)?;
                drop(guard);
            }
        }
        Ok(())
    }
}

/// 16 random hexadecimal digits.
fn random_hex() -> Result<String, StoreError> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| {
        let why = std::io::Error::other(error.to_string());
        FsError::new("get randomness from", Path::new("the system"), why)
    })?;
    Ok(crate::base::digest::hex(&bytes))
}

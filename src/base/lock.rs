//! Locks between processes: an advisory lock on a file that stays where it is (deleting it would let two holders in).
//!
//! A lock only avoids double work. Nothing is believed because a lock was held: on file systems where it does nothing,
//! every file still enters the store by rename after its digest was checked.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use super::cancel::{Cancel, Cancelled};
use super::fs::{self, FsError};

/// Held until dropped; the system releases it when the process dies.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "holding the file open holds the lock")] File, bool);

impl Lock {
    /// False on file systems without locks, where several holders may believe to be alone.
    pub fn excludes(&self) -> bool {
        self.1
    }
}

/// Why a lock could not be taken.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum LockError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// How often a waiter looks again.
const POLL: Duration = Duration::from_millis(50);

/// Waits for the lock; `waiting` is called once when somebody else holds it.
///
/// # Errors
/// When the file cannot be opened, or the user asked to stop.
pub fn acquire(path: &Path, cancel: &Cancel, waiting: impl FnOnce()) -> Result<Lock, LockError> {
    fs::create_dir_all(fs::parent(path))?;
    hold(fs::open_or_create(path)?, File::try_lock, path, cancel, waiting)
}

/// As [`acquire`], beside any number of others that call this.
///
/// # Errors
/// As [`acquire`].
pub fn acquire_beside_others(path: &Path, cancel: &Cancel, waiting: impl FnOnce()) -> Result<Lock, LockError> {
    fs::create_dir_all(fs::parent(path))?;
    hold(fs::open_or_create(path)?, File::try_lock_shared, path, cancel, waiting)
}

/// As [`acquire`], for a lock that programs of other users wait for, too.
///
/// # Errors
/// As [`acquire`].
pub fn acquire_shared(path: &Path, cancel: &Cancel, waiting: impl FnOnce()) -> Result<Lock, LockError> {
    fs::create_dir_all(fs::parent(path))?;
    hold(fs::open_or_create_shared(path)?, File::try_lock, path, cancel, waiting)
}

fn hold(
    file: File,
    try_lock: fn(&File) -> Result<(), TryLockError>,
    path: &Path,
    cancel: &Cancel,
    waiting: impl FnOnce(),
) -> Result<Lock, LockError> {
    let mut waiting = Some(waiting);
    loop {
        match try_lock(&file) {
            Ok(()) => return Ok(Lock(file, true)),
            Err(TryLockError::WouldBlock) => {
                if let Some(tell) = waiting.take() {
                    tell();
                }
                cancel.check()?;
                std::thread::sleep(POLL);
            }
            // A file system without locks: go on without, as the head of this file says.
            Err(TryLockError::Error(error)) if is_unsupported(&error) => return Ok(Lock(file, false)),
            Err(TryLockError::Error(error)) => return Err(FsError::new("lock", path, error).into()),
        }
    }
}

/// The lock, when nobody holds it.
///
/// # Errors
/// When the file cannot be opened.
pub fn try_acquire(path: &Path) -> Result<Option<Lock>, FsError> {
    fs::create_dir_all(fs::parent(path))?;
    let file = fs::open_or_create(path)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(Lock(file, true))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) if is_unsupported(&error) => Ok(None),
        Err(TryLockError::Error(error)) => Err(FsError::new("lock", path, error)),
    }
}

/// Whether the file system has no locks. NFS says ENOLCK when its lock service cannot be reached.
fn is_unsupported(error: &std::io::Error) -> bool {
    #[cfg(unix)]
    if rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::NOLCK) {
        return true;
    }
    error.kind() == std::io::ErrorKind::Unsupported
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_without_locks_is_no_error() {
        use rustix::io::Errno;
        for without in [Errno::NOLCK, Errno::NOTSUP, Errno::NOSYS] {
            assert!(is_unsupported(&without.into()), "{without}");
        }
        assert!(!is_unsupported(&Errno::IO.into()));
    }
}

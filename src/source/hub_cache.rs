//! The Hugging Face cache, shared with the Python client and every other tool that keeps its layout:
//!
//! ```text
//! models--<org>--<name>/blobs/<etag>              the bytes; the etag is the SHA-256, or git's name for a small file
//!                       snapshots/<commit>/<path> a relative link to a blob (where links need a privilege: a second name)
//!                       refs/<revision>           the commit that a branch or tag was
//!                       .aitools/                 our parts, while they come
//! .locks/models--<org>--<name>/<etag>.lock        held by whoever writes the blob
//! ```
//!
//! Others put bytes in unverified, so nothing found here is believed: it is hashed before it is used, and a wrong blob is
//! set aside (`.bad`) and fetched again. Names and folders come from `hf-hub`; its downloads are not used (they check
//! neither size nor digest, and do not go on where they stopped).

use std::io;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

use crate::base::digest;
use crate::base::fs::{self, FsError};
use crate::base::lock;
use crate::base::name::RelPath;
use crate::format::lockfile::FilePin;
use crate::report::{Task, Unit};

use super::SourceError;

/// The part of the cache for one repository at one commit.
#[derive(Debug)]
pub struct HubCache {
    repo: PathBuf,
    snapshot: PathBuf,
    locks: PathBuf,
}

impl HubCache {
    /// `cache` is the folder that holds `models--…`; `commit` has 40 hexadecimal digits.
    pub fn new(cache: &Path, repo: &str, commit: &str) -> Self {
        let repo = Repo::with_revision(repo.to_owned(), RepoType::Model, commit.to_owned());
        let folder = repo.folder_name();
        Self {
            repo: cache.join(&folder),
            locks: cache.join(".locks").join(&folder),
            snapshot: Cache::new(cache.to_owned()).repo(repo).pointer_path(commit),
        }
    }

    /// Where parts lie while they come.
    pub fn parts(&self) -> PathBuf {
        self.repo.join(".aitools")
    }

    fn blob(&self, name: &str) -> PathBuf {
        self.repo.join("blobs").join(name)
    }

    /// A file of the cache that is what the pin says, after hashing it; none when there is none.
    ///
    /// # Errors
    /// When a file cannot be read, or the user asked to stop.
    pub fn find(&self, pin: &FilePin, task: &Task) -> Result<Option<PathBuf>, SourceError> {
        let pointer = pin.path.under(&self.snapshot);
        if is_right(&pointer, pin, task)? {
            return Ok(Some(fs::canonical(&pointer)?));
        }
        let blob = self.blob(&pin.sha256.hex());
        let same = fs::read_link(&pointer).is_ok_and(|target| target.file_name() == blob.file_name());
        if same || !is_right(&blob, pin, task)? {
            return Ok(None);
        }
        // A cache that may only be read is good enough.
        let _ = self.point(pin, &blob);
        Ok(Some(fs::canonical(&blob)?))
    }

    /// Has `bring` put the verified file at the path it is given, unless somebody else has done so meanwhile, and links
    /// it into the snapshot. Gives the blob. Processes of every tool wait for one another here.
    ///
    /// # Errors
    /// What `bring` says, or [`SourceError::Fs`].
    pub fn obtain(
        &self,
        name: &str,
        pin: &FilePin,
        task: &Task,
        bring: &mut dyn FnMut(&Path) -> Result<(), SourceError>,
    ) -> Result<PathBuf, SourceError> {
        let waiting = || task.waiting(format!("another program, which is fetching `{}`", pin.path));
        let _lock = lock::acquire(&self.locks.join(format!("{name}.lock")), task.cancel(), waiting)?;
        let blob = self.blob(name);
        if !is_right(&blob, pin, task)? {
            if fs::exists(&blob) {
                task.warn(format!(
                    "`{}` in the Hugging Face cache is damaged: it is set aside as `.bad`",
                    blob.display()
                ));
                fs::rename(&blob, &blob.with_extension("bad"))?;
            }
            bring(&blob)?;
            fs::sync_file(&blob)?;
            fs::set_read_only(&blob, true)?;
            fs::sync_dir(fs::parent(&blob))?;
        }
        self.point(pin, &blob)?;
        Ok(fs::canonical(&blob)?)
    }

    /// Makes the snapshot's name for a blob, replacing a former one.
    fn point(&self, pin: &FilePin, blob: &Path) -> Result<(), FsError> {
        let pointer = pin.path.under(&self.snapshot);
        let folder = fs::parent(&pointer);
        fs::create_dir_all(folder)?;
        // From the file's folder to the repository's: the path's own folders, the commit, `snapshots`.
        let up = pin.path.as_str().split('/').count() + 1;
        let target: PathBuf = std::iter::repeat_n("..", up).chain(["blobs"]).collect();
        let target = target.join(blob.file_name().unwrap_or_default());
        if fs::read_link(&pointer).is_ok_and(|old| old == target) {
            return Ok(());
        }
        match fs::replace_by_symlink(&target, &pointer) {
            // Links need a privilege there.
            Err(_) if cfg!(windows) => fs::place(blob, &pointer).map(drop),
            result => result,
        }
    }

    /// Records what a branch or tag was, unless something is recorded: another tool may know it newer.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note_revision(&self, revision: &str, commit: &str) -> Result<(), FsError> {
        // Branches may be called what no file can be called: those stay unrecorded.
        let Ok(name) = revision.parse::<RelPath>() else { return Ok(()) };
        let path = name.under(&self.repo.join("refs"));
        if revision != commit && !fs::exists(&path) {
            fs::write_atomic(&path, commit.as_bytes())?;
        }
        Ok(())
    }
}

/// Whether the file is there and is what the pin says: by size first, then by digest.
fn is_right(path: &Path, pin: &FilePin, task: &Task) -> Result<bool, SourceError> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() && meta.len() == pin.size => {}
        Err(error) if !error.is_not_found() => return Err(error.into()),
        _ => return Ok(false),
    }
    let progress = task.start("checking", pin.path.as_str(), Some(pin.size), Unit::Bytes);
    let seen = |count| {
        progress.add(count);
        progress.check().map_err(io::Error::other)
    };
    let hashed = digest::of_reader(fs::open(path)?, seen);
    progress.check()?;
    let (computed, _) = hashed.map_err(|error| FsError::new("read", path, error))?;
    progress.finish("");
    Ok(computed == pin.sha256)
}

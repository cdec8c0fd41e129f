//! The Hugging Face cache, shared with the Python client and every other tool that keeps its layout:
//!
//! ```text
//! models--<org>--<name>/blobs/<etag>              the bytes; the etag is the SHA-256, or git's name for a small file
//!                       snapshots/<commit>/<path> a relative link to a blob (where links need a privilege: a second name)
//!                       refs/<revision>           the commit that a branch or tag was
//!                       .aitools/                 our parts, while they come
//!                       .aitools/refs/<revision>  which commit of it was locked last, and which one we wrote to `refs`
//! .locks/models--<org>--<name>/<etag>.lock        held by whoever writes the blob
//! ```
//!
//! Others put bytes in unverified, so nothing found here is believed: it is hashed before it is used, and a wrong blob is
//! set aside (`.bad`) and fetched again. Names and folders come from `hf-hub`; its downloads are not used (they check
//! neither size nor digest, and do not go on where they stopped).

use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};
use serde::{Deserialize, Serialize};

use crate::base::fs::{self, FsError};
use crate::base::hashed::Hashed;
use crate::base::lock;
use crate::base::name::RelPath;
use crate::format::lockfile::FilePin;
use crate::report::Task;

use super::SourceError;
use super::download::hash;

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
    pub fn find(&self, pin: &FilePin, task: &Task) -> Result<Option<Hashed>, SourceError> {
        let pointer = pin.path.under(&self.snapshot);
        if let Ok(file) = fs::canonical(&pointer)
            && let Some(right) = right(&file, pin, task)?
        {
            return Ok(Some(right));
        }
        let blob = self.blob(&pin.sha256.hex());
        let same = fs::read_link(&pointer).is_ok_and(|target| target.file_name() == blob.file_name());
        let Some(right) = (if same { None } else { right(&blob, pin, task)? }) else { return Ok(None) };
        // A cache that may only be read is good enough.
        let _ = self.point(pin, &blob);
        Ok(Some(right))
    }

    /// Whether a file of the right size is there.
    pub fn seems_to_have(&self, pin: &FilePin) -> bool {
        let sized = |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == pin.size);
        sized(&pin.path.under(&self.snapshot)) || sized(&self.blob(&pin.sha256.hex()))
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
        bring: &mut dyn FnMut(&Path) -> Result<Hashed, SourceError>,
    ) -> Result<Hashed, SourceError> {
        let waiting = || task.waiting(format!("another program, which is fetching `{}`", pin.path));
        let _lock = lock::acquire_shared(&self.locks.join(format!("{name}.lock")), task.cancel(), waiting)?;
        let blob = self.blob(name);
        let there = match right(&blob, pin, task)? {
            Some(there) => there,
            None => {
                self.set_aside(&blob, task)?;
                let came = bring(&blob)?.through(&blob, || fs::set_read_only(&blob, true))?;
                fs::sync_dir(fs::parent(&blob))?;
                came
            }
        };
        self.point(pin, &blob)?;
        Ok(there)
    }

    fn set_aside(&self, blob: &Path, task: &Task) -> Result<(), FsError> {
        if !fs::exists(blob) {
            return Ok(());
        }
        task.warn(format!("`{}` in the Hugging Face cache is damaged: it is renamed to `.bad`", blob.display()));
        rename_aside(blob)
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
        if fs::symlink_metadata(&pointer).is_ok_and(|meta| meta.is_dir()) {
            rename_aside(&pointer)?;
        }
        match fs::replace_by_symlink(&target, &pointer) {
            // Links need a privilege on Windows, and not every file system has them.
            Err(_) => fs::place(blob, &pointer).map(drop),
            Ok(()) => Ok(()),
        }
    }

    /// Notes what a branch or tag is now, for [`HubCache::note_revision`]. Where nothing can be written, nothing is noted.
    pub fn note_locked(&self, revision: &str, commit: &str) {
        let Some(path) = self.note_path(revision).filter(|_| revision != commit) else { return };
        let note = Note { locked: commit.to_owned(), ..read_note(&path) };
        let _ = write_note(&path, &note);
    }

    /// Records what a branch or tag was. A record of another tool stays: that tool may know it newer. Our own is moved on,
    /// but only to what the branch was when it was locked last: an older lockfile does not take it back.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note_revision(&self, revision: &str, commit: &str) -> Result<(), FsError> {
        // Branches may be called what no file can be called: those stay unrecorded.
        let (Ok(name), Some(note_path)) = (revision.parse::<RelPath>(), self.note_path(revision)) else {
            return Ok(());
        };
        let path = name.under(&self.repo.join("refs"));
        let note = read_note(&note_path);
        let there = fs::read_bounded(&path, MAX_NOTE_BYTES).ok();
        let there = there.and_then(|there| String::from_utf8(there).ok()).unwrap_or_default();
        if revision == commit || there == commit {
            return Ok(());
        }
        let ours = !there.is_empty() && [&note.written, &note.earlier].contains(&&there);
        if !fs::exists(&path) || (ours && note.locked == commit) {
            let note = Note { written: commit.to_owned(), earlier: there, ..note };
            write_note(&note_path, &note)?;
            fs::write_atomic(&path, commit.as_bytes())?;
            write_note(&note_path, &Note { earlier: String::new(), ..note })?;
        }
        Ok(())
    }

    fn note_path(&self, revision: &str) -> Option<PathBuf> {
        Some(revision.parse::<RelPath>().ok()?.under(&self.parts().join("refs")))
    }

    /// A small file by git's name for its content, if it is here. The caller compares it with that name.
    pub fn small(&self, git_blob: &str, limit_bytes: u64) -> Option<Vec<u8>> {
        fs::read_bounded(&self.blob(git_blob), limit_bytes).ok()
    }

    /// Keeps a small file that was fetched to learn its digest, so that it need not be fetched again. `name` is that of its
    /// blob. Where nothing can be written, nothing is kept.
    pub fn keep(&self, name: &str, pin: &FilePin, bytes: &[u8], task: &Task) {
        let kept = self.obtain(name, pin, task, &mut |to| {
            fs::create_dir_all(fs::parent(to))?;
            fs::write_atomic(to, bytes)?;
            hash(task, pin.path.as_str(), to)
        });
        drop(kept);
    }

    /// The files of the cache that may be used for a pin: what the snapshot leads to, and the blob.
    pub fn copies(&self, pin: &FilePin) -> Vec<PathBuf> {
        let paths = [pin.path.under(&self.snapshot), self.blob(&pin.sha256.hex())];
        let mut files: Vec<PathBuf> = paths.iter().filter_map(|path| fs::canonical(path).ok()).collect();
        files.dedup();
        files
    }
}

/// Bytes in a cache that are of no use to anybody else: our parts, and files that were renamed to `.bad`.
pub fn leftover_bytes(cache: &Path) -> (u64, u64) {
    let (mut parts, mut bad) = (0, 0);
    for repo in fs::read_dir(cache).unwrap_or_default() {
        parts += fs::size_below(&repo.join(".aitools"));
        let blobs = fs::read_dir(&repo.join("blobs")).unwrap_or_default();
        let is_bad = |path: &&PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".bad"));
        bad += blobs
            .iter()
            .filter(is_bad)
            .filter_map(|path| fs::symlink_metadata(path).ok())
            .map(|meta| meta.len())
            .sum::<u64>();
    }
    (parts, bad)
}

/// Bytes of a commit, or of a [`Note`].
const MAX_NOTE_BYTES: u64 = 1024;

/// What is known of a branch or tag.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Note {
    /// The commit that it was when it was locked last.
    locked: String,
    /// The commit that we wrote to `refs`.
    written: String,
    /// What we had written there before, until `written` is there: the program may be killed in between.
    earlier: String,
}

fn read_note(path: &Path) -> Note {
    let bytes = fs::read_bounded(path, MAX_NOTE_BYTES).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn write_note(path: &Path, note: &Note) -> Result<(), FsError> {
    let text = serde_json::to_vec(note).map_err(|error| FsError::new("write", path, error.into()))?;
    fs::write_atomic(path, &text)
}

/// Renames an unusable file or folder to `<name>.bad`, or `<name>.bad-<number>` where that is taken by a folder.
fn rename_aside(path: &Path) -> Result<(), FsError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names = std::iter::once(format!("{name}.bad")).chain((1..100).map(|number| format!("{name}.bad-{number}")));
    let is_folder = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let free = names.map(|name| path.with_file_name(name)).find(|free| !is_folder(free));
    fs::rename(path, &free.unwrap_or_else(|| path.with_extension("bad")))
}

/// The file, when it is there and is what the pin says: by size first, then by digest. A link is followed. One that cannot be
/// read (its permissions, a link to itself) is not it.
fn right(path: &Path, pin: &FilePin, task: &Task) -> Result<Option<Hashed>, SourceError> {
    if !fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == pin.size) {
        return Ok(None);
    }
    match fs::canonical(path).map_err(SourceError::from).and_then(|path| hash(task, pin.path.as_str(), &path)) {
        Ok(hashed) => Ok((hashed.sha256() == pin.sha256).then_some(hashed)),
        Err(SourceError::Fs(error)) if error.source.kind() == std::io::ErrorKind::PermissionDenied => Ok(None),
        Err(error) => Err(error),
    }
}

//! Whole folders compared with what was verified: missing files, changed ones, changed modes and links, and files that do
//! not belong there. A program finds libraries by their names, so an extra file can be as harmful as a changed one.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::{Path, PathBuf};

use crate::base::cancel::Cancel;
use crate::base::digest::{self, Digest};
use crate::base::fs;
use crate::base::tree::{Entry, Listing, MAX_DEPTH, MAX_FILES, Mode, TreeError};

use super::StoreError;

/// A file that is not what was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file or folder.
    pub path: PathBuf,
    /// None when the file does not belong there.
    pub expected: Option<Digest>,
    /// None when the file is missing, unreadable, or not of the expected kind (mode, link, size).
    pub computed: Option<Digest>,
}

/// Whether the folder holds exactly the files of the listing, with their sizes, modes and link targets. No file is read.
pub(super) fn has_shape(root: &Path, expected: &Listing, ignored: &[&str]) -> Result<bool, StoreError> {
    let actual = files_below(root, ignored)?;
    Ok(actual.len() == expected.0.len()
        && expected.0.iter().all(|(path, entry)| {
            let path = path.under(root);
            actual.get(&path).is_some_and(|meta| is_of_kind(&path, meta, entry))
        }))
}

/// Everything below the folder that differs from the listing. Every file is read; `seen` gets its size in bytes.
pub(super) fn damages(
    root: &Path,
    expected: &Listing,
    ignored: &[&str],
    cancel: &Cancel,
    seen: &mut dyn FnMut(u64),
) -> Result<Vec<Damage>, StoreError> {
    let mut actual = files_below(root, ignored)?;
    let mut damages = Vec::new();
    for (path, entry) in &expected.0 {
        cancel.check()?;
        let path = path.under(root);
        let meta = actual.remove(&path).filter(|meta| is_of_kind(&path, meta, entry));
        let computed = meta.and_then(|_| digest_of(&path, entry.mode));
        if computed != Some(entry.digest) {
            damages.push(Damage { path, expected: Some(entry.digest), computed });
        }
        seen(entry.size_bytes);
    }
    damages.extend(actual.into_keys().map(|path| {
        let computed = digest_of(&path, Mode::File);
        Damage { path, expected: None, computed }
    }));
    Ok(damages)
}

/// Everything below a folder that is not a folder, by path; links are not followed. `ignored` are names in the folder itself.
fn files_below(root: &Path, ignored: &[&str]) -> Result<BTreeMap<PathBuf, Metadata>, StoreError> {
    let mut files = BTreeMap::new();
    let mut folders = vec![(root.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        for path in fs::read_dir(&folder)? {
            if depth == 0 && ignored.iter().any(|name| path.ends_with(name)) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                folders.push((path, depth + 1));
            } else {
                files.insert(path, meta);
            }
        }
        if depth > MAX_DEPTH || files.len() > MAX_FILES {
            return Err(TreeError::TooLarge.into());
        }
    }
    Ok(files)
}

/// Mode, size and link target. Windows knows no permission to execute, and may hold a link as a file with its target.
fn is_of_kind(path: &Path, meta: &Metadata, entry: &Entry) -> bool {
    if entry.mode == Mode::Symlink && (cfg!(unix) || meta.is_symlink()) {
        return meta.is_symlink() && digest_of(path, entry.mode) == Some(entry.digest);
    }
    let executable = cfg!(not(unix)) || fs::is_executable(meta) == (entry.mode == Mode::Executable);
    meta.is_file() && meta.len() == entry.size_bytes && executable
}

fn digest_of(path: &Path, mode: Mode) -> Option<Digest> {
    if mode == Mode::Symlink
        && let Ok(target) = fs::read_link(path)
    {
        return Some(Digest::of(target.to_str()?.replace('\\', "/").as_bytes()));
    }
    digest::of_file(path).ok().map(|(digest, _)| digest)
}

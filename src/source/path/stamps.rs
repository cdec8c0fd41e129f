//! Whether a path changed since it was hashed, told by sizes and times, without reading a file: as cargo does for path
//! dependencies.

use std::path::{Path, PathBuf};

use crate::base::digest::Digest;
use crate::base::fs::{self, Stamp};
use crate::base::tree::{MAX_DEPTH, MAX_FILES};
use crate::format::manifest::PathSpec;

use super::super::{SourceError, World};

impl PathSpec {
    /// A digest of names, sizes and times of everything at the path, `.git` left out. It changes at least when the files
    /// change that are locked. None when it would prove nothing: a file was written in this very moment, there are too many
    /// files, or there is nothing at the path.
    ///
    /// # Errors
    /// When a folder cannot be read, or the user asked to stop.
    pub fn fingerprint(&self, world: &World) -> Result<Option<Digest>, SourceError> {
        let root = world.project.join(&self.path);
        let mut text = String::new();
        let (mut folders, mut count) = (vec![(root.clone(), 0)], 0);
        if !fs::metadata(&root).is_ok_and(|meta| meta.is_dir()) {
            folders.clear();
            if !add(&root, fs::read_link(&root).ok(), &mut text) {
                return Ok(None);
            }
        }
        while let Some((folder, depth)) = folders.pop() {
            world.task.check()?;
            let mut entries = fs::read_dir_kinds(&folder)?;
            entries.retain(|(path, _)| path.file_name().is_none_or(|name| name != ".git"));
            for (path, kind) in entries {
                count += 1;
                if count > MAX_FILES || depth > MAX_DEPTH {
                    return Ok(None);
                }
                if kind.is_dir() {
                    folders.push((path, depth + 1));
                } else if !add(&path, kind.is_symlink().then(|| fs::read_link(&path).ok()).flatten(), &mut text) {
                    return Ok(None);
                }
            }
        }
        Ok(Some(Digest::of(text.as_bytes())))
    }
}

/// Adds a line for a file, or for a link with its text; false when its times prove nothing.
fn add(path: &Path, link: Option<PathBuf>, text: &mut String) -> bool {
    use std::fmt::Write as _;
    let stamp = match fs::stamp(path) {
        Ok(stamp) if stamp.is_recent() => return false,
        Ok(stamp) => Some(stamp),
        // A link to nothing has no times, but its text.
        Err(_) if link.is_some() => None,
        Err(_) => return false,
    };
    let times = |Stamp { device, inode, size_bytes, modified_ns, changed_ns }: Stamp| {
        format!("{device} {inode} {size_bytes} {modified_ns} {changed_ns}")
    };
    writeln!(text, "{path:?} {link:?} {}", stamp.map(times).unwrap_or_default()).is_ok()
}

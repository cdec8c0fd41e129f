//! The digest of a folder: what was exported, independent of where it lies, when, and how it travelled.
//!
//! It is the SHA-256 of one line per file, sorted by path in byte order: `<mode> <size> <sha256> <path>\n`,
//! with mode `100644`, `100755` or `120000` (a symbolic link, whose content is its target), as git has them.
//! Empty folders do not count. The lines themselves are the listing.

use std::collections::BTreeMap;
use std::path::Path;

use super::cancel::{Cancel, Cancelled};
use super::digest::{self, Digest};
use super::fs::{self, FsError};
use super::name::{RelPath, RelPathError};

/// More files than any engine has; a hostile archive stops here.
pub const MAX_FILES: usize = 200_000;
/// Deeper than any engine nests.
pub const MAX_DEPTH: usize = 64;

/// What kind of file an entry is, as git tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// A file without the permission to execute it.
    File,
    /// A file with the permission to execute it.
    Executable,
    /// A symbolic link.
    Symlink,
}

impl Mode {
    /// Six octal digits, as in git's trees.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "100644",
            Self::Executable => "100755",
            Self::Symlink => "120000",
        }
    }
}

/// The modes of what is not a plain file: what a file system may not be able to tell.
pub type Modes = BTreeMap<RelPath, Mode>;

/// One file of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What kind of file it is.
    pub mode: Mode,
    /// Of a link: of its target's text.
    pub size_bytes: u64,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// Every file of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing(pub BTreeMap<RelPath, Entry>);

/// Why a folder has no listing.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum TreeError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Path(#[from] RelPathError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error("`{0}` is neither a file, a folder nor a symbolic link")]
    Special(String),
    #[error("a file name in `{0}` is not Unicode")]
    NotUnicode(String),
    #[error("the tree has more than {MAX_FILES} files or {MAX_DEPTH} levels")]
    TooLarge,
}

impl Listing {
    /// The digest of the whole tree.
    pub fn digest(&self) -> Digest {
        Digest::of(self.to_text().as_bytes())
    }

    /// Sum of the sizes of all files, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.values().map(|entry| entry.size_bytes).sum()
    }

    /// The lines that the digest is taken over.
    pub fn to_text(&self) -> String {
        use std::fmt::Write as _;
        self.0.iter().fold(String::new(), |mut text, (path, entry)| {
            let _ = writeln!(text, "{} {} {} {path}", entry.mode.as_str(), entry.size_bytes, entry.digest.hex());
            text
        })
    }

    /// Reads the lines that [`Listing::to_text`] writes; none when they are anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let line = |line: &str| {
            let mut parts = line.splitn(4, ' ');
            let written = parts.next()?;
            let mode =
                [Mode::File, Mode::Executable, Mode::Symlink].into_iter().find(|mode| mode.as_str() == written)?;
            let (size_bytes, digest) = (parts.next()?.parse().ok()?, Digest::from_hex(parts.next()?).ok()?);
            Some((parts.next()?.parse().ok()?, Entry { mode, size_bytes, digest }))
        };
        text.lines().map(line).collect::<Option<_>>().map(Self)
    }

    /// Hashes everything below `root`. Where files have no permission to be run and links are written as files (Windows),
    /// `modes` says which are which; elsewhere it is not consulted.
    ///
    /// # Errors
    /// On unreadable files, names that other platforms cannot hold, special files, and trees over the limits.
    pub fn scan(root: &Path, modes: &Modes, cancel: &Cancel) -> Result<Self, TreeError> {
        let told = |path: &RelPath| modes.get(path).copied().unwrap_or(Mode::File);
        Self::scan_where(root, &|_| true, &told, cancel)
    }

    /// [`Listing::scan`] of what `keep` wants; a folder that it does not want is not looked into.
    ///
    /// # Errors
    /// As [`Listing::scan`].
    pub fn scan_where(
        root: &Path,
        keep: &dyn Fn(&RelPath) -> bool,
        told: &dyn Fn(&RelPath) -> Mode,
        cancel: &Cancel,
    ) -> Result<Self, TreeError> {
        let mut listing = Self::default();
        let mut folders = vec![(root.to_owned(), String::new(), 0)];
        while let Some((folder, prefix, depth)) = folders.pop() {
            cancel.check()?;
            if depth > MAX_DEPTH {
                return Err(TreeError::TooLarge);
            }
            for path in fs::read_dir(&folder)? {
                let name = path.file_name().and_then(|name| name.to_str());
                let name = name.ok_or_else(|| TreeError::NotUnicode(folder.display().to_string()))?;
                let full = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
                let relative: RelPath = full.parse()?;
                if !keep(&relative) {
                    continue;
                }
                let meta = fs::symlink_metadata(&path)?;
                if meta.is_dir() {
                    folders.push((path, full, depth + 1));
                    continue;
                }
                let entry = scan_entry(&path, &relative, &meta, told)?;
                listing.0.insert(relative, entry);
                if listing.0.len() > MAX_FILES {
                    return Err(TreeError::TooLarge);
                }
            }
        }
        Ok(listing)
    }

    /// The entries that are not plain files.
    pub fn modes(&self) -> Modes {
        let special = self.0.iter().filter(|(_, entry)| entry.mode != Mode::File);
        special.map(|(path, entry)| (path.clone(), entry.mode)).collect()
    }

    /// What differs from `actual`, as lines for people: `missing x`, `added y`, `changed z`; at most `limit`.
    pub fn differences(&self, actual: &Self, limit: usize) -> Vec<String> {
        let missing = self.0.iter().filter_map(|(path, entry)| match actual.0.get(path) {
            None => Some(format!("missing {path}")),
            Some(other) if other != entry => Some(format!("changed {path}")),
            Some(_) => None,
        });
        let added = actual.0.keys().filter(|path| !self.0.contains_key(*path)).map(|path| format!("added {path}"));
        missing.chain(added).take(limit).collect()
    }
}

fn scan_entry(
    path: &Path,
    relative: &RelPath,
    meta: &std::fs::Metadata,
    told: &dyn Fn(&RelPath) -> Mode,
) -> Result<Entry, TreeError> {
    if meta.is_symlink() {
        let target = fs::read_link(path)?;
        let target = target.to_str().ok_or_else(|| TreeError::NotUnicode(path.display().to_string()))?;
        let target = target.replace('\\', "/");
        let size_bytes = target.len() as u64;
        return Ok(Entry { mode: Mode::Symlink, size_bytes, digest: Digest::of(target.as_bytes()) });
    }
    if !meta.is_file() {
        return Err(TreeError::Special(path.display().to_string()));
    }
    let mode = match fs::is_executable(meta) {
        _ if cfg!(not(unix)) => told(relative),
        true => Mode::Executable,
        false => Mode::File,
    };
    let (digest, size_bytes) = digest::of_file(path)?;
    Ok(Entry { mode, size_bytes, digest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_covers_path_mode_and_bytes() -> Result<(), Box<dyn std::error::Error>> {
        let root = tempfile::tempdir()?;
        let scan = || Listing::scan(root.path(), &Modes::default(), &Cancel::default());
        fs::write_atomic(&root.path().join("b/é x"), b"1")?;
        fs::write_atomic(&root.path().join("a"), b"2")?;
        let first = scan()?;
        assert_eq!(first.to_text().lines().count(), 2);
        assert_eq!(Listing::parse(&first.to_text()), Some(first.clone()));
        assert_eq!(Listing::parse("100644 1 abc a"), None);
        assert_eq!(first.digest(), scan()?.digest());
        fs::write_atomic(&root.path().join("a"), b"3")?;
        let second = scan()?;
        assert_ne!(first.digest(), second.digest());
        assert_eq!(first.differences(&second, 9), ["changed a"]);
        #[cfg(unix)]
        {
            fs::set_executable(&root.path().join("a"))?;
            assert_ne!(second.digest(), scan()?.digest());
        }
        Ok(())
    }
}

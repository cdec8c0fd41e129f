//! Folders: engine sources by their tree digest, and unpacked build tools by their package's digest.

use std::path::{Path, PathBuf};

use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::RelPath;
use crate::base::tree::{Listing, Mode, Modes};

use super::{Staging, Store, StoreError};

const TOOL: &str = "tool";
const MAX_LISTING_BYTES: u64 = 64 << 20;

impl Store {
    pub fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("trees").join(digest.hex())
    }

    /// The tree, hashed now: a build is rare and long, so its source is never taken on trust. None when it is not there
    /// or damaged; the damaged one stays until its replacement is in.
    ///
    /// # Errors
    /// When it cannot be read, or the user asked to stop.
    pub fn confirm_tree(&self, digest: &Digest, cancel: &Cancel) -> Result<Option<PathBuf>, StoreError> {
        let path = self.tree_path(digest);
        let list = path.with_extension("list");
        if !fs::exists(&list) || !fs::exists(&path) {
            return Ok(None);
        }
        let text = fs::read_bounded(&list, MAX_LISTING_BYTES)?;
        let modes = modes_of(&String::from_utf8_lossy(&text));
        let listing = Listing::scan(&path, &modes, cancel)?;
        Ok((listing.digest() == *digest).then_some(path))
    }

    /// Moves a staged tree in when it is the pinned one.
    ///
    /// # Errors
    /// [`StoreError::Mismatch`] when it is another.
    pub fn admit_tree(
        &self,
        staging: &Staging,
        modes: &Modes,
        expected: &Digest,
        what: &str,
        cancel: &Cancel,
    ) -> Result<PathBuf, StoreError> {
        let listing = Listing::scan(staging.path(), modes, cancel)?;
        let computed = listing.digest();
        if computed != *expected {
            return Err(StoreError::Mismatch {
                what: what.to_owned(),
                expected: *expected,
                computed,
                expected_bytes: None,
                computed_bytes: listing.size_bytes(),
            });
        }
        let path = self.tree_path(expected);
        self.replace_dir(staging.path(), &path)?;
        fs::write_atomic(&path.with_extension("list"), listing.to_text().as_bytes())?;
        Ok(path)
    }

    fn tool_path(&self, package: &Digest) -> PathBuf {
        self.root.join("tools").join(package.hex())
    }

    /// The unpacked package, when this machine unpacked and sealed it. `full` hashes every file; otherwise the seal and
    /// the files' being there are enough.
    ///
    /// # Errors
    /// When it cannot be read, or the user asked to stop.
    pub fn tool(&self, package: &Digest, full: bool, cancel: &Cancel) -> Result<Option<PathBuf>, StoreError> {
        let path = self.tool_path(package);
        let Ok(sealed) = fs::read_bounded(&path.with_extension("list"), MAX_LISTING_BYTES) else { return Ok(None) };
        let Some(text) = self.key.open(&format!("{TOOL} {package}"), &sealed) else { return Ok(None) };
        let text = String::from_utf8_lossy(text).into_owned();
        if !fs::exists(&path) {
            return Ok(None);
        }
        if full {
            let listing = Listing::scan(&path, &modes_of(&text), cancel)?;
            return Ok((listing.to_text() == text).then_some(path));
        }
        Ok(Some(path))
    }

    /// Moves in what was unpacked from a package whose digest the source has compared with the pin; the package itself is
    /// hashed here once more, because a source cannot bless its own bytes.
    ///
    /// # Errors
    /// When the folder cannot be read or moved.
    pub fn admit_tool(
        &self,
        staging: &Staging,
        modes: &Modes,
        package: &Digest,
        cancel: &Cancel,
    ) -> Result<PathBuf, StoreError> {
        let listing = Listing::scan(staging.path(), modes, cancel)?;
        let path = self.tool_path(package);
        self.replace_dir(staging.path(), &path)?;
        let sealed = self.key.seal(&format!("{TOOL} {package}"), listing.to_text().as_bytes());
        fs::write_atomic(&path.with_extension("list"), &sealed)?;
        Ok(path)
    }

    /// Puts a staged folder in place of another. The listing or receipt that vouches for the old one goes first, so that a
    /// kill in between leaves a folder that counts as missing.
    pub(super) fn replace_dir(&self, staged: &Path, to: &Path) -> Result<(), StoreError> {
        fs::create_dir_all(fs::parent(to))?;
        if fs::exists(to) {
            fs::remove_file(&to.with_extension("list"))?;
            let old = self.stage()?;
            fs::rename(to, &old.path().join("old"))?;
        }
        fs::sync_tree(staged)?;
        fs::rename(staged, to)?;
        fs::sync_dir(fs::parent(to))?;
        Ok(())
    }
}

/// The modes in a listing's text, for file systems that cannot tell.
fn modes_of(text: &str) -> Modes {
    let special = |line: &str| {
        let mut parts = line.splitn(4, ' ');
        let written = parts.next()?;
        let mode = [Mode::Executable, Mode::Symlink].into_iter().find(|mode| mode.as_str() == written)?;
        Some((parts.nth(2)?.parse::<RelPath>().ok()?, mode))
    };
    text.lines().filter_map(special).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::seal::Key;

    #[test]
    fn a_damaged_tree_is_not_used_and_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("k")).unwrap();
        let cancel = Cancel::default();
        let fill = || {
            let staging = store.stage().unwrap();
            fs::write_atomic(&staging.path().join("src/é.c"), b"int x;").unwrap();
            staging
        };
        let digest = Listing::scan(fill().path(), &Modes::default(), &cancel).unwrap().digest();
        assert!(store.confirm_tree(&digest, &cancel).unwrap().is_none());
        let path = store.admit_tree(&fill(), &Modes::default(), &digest, "source of `e`", &cancel).unwrap();
        assert_eq!(store.confirm_tree(&digest, &cancel).unwrap(), Some(path.clone()));
        fs::write_atomic(&path.join("src/é.c"), b"int y;").unwrap();
        assert!(store.confirm_tree(&digest, &cancel).unwrap().is_none());
        store.admit_tree(&fill(), &Modes::default(), &digest, "source of `e`", &cancel).unwrap();
        assert!(store.confirm_tree(&digest, &cancel).unwrap().is_some());
        let other = store.admit_tree(&fill(), &Modes::default(), &Digest::of(b"x"), "source of `e`", &cancel);
        assert!(matches!(other, Err(StoreError::Mismatch { .. })));
    }

    #[test]
    fn a_tool_sealed_elsewhere_is_no_tool() {
        let root = tempfile::tempdir().unwrap();
        let (here, there) = (Key::from_secret("here"), Key::from_secret("there"));
        let (cancel, package) = (Cancel::default(), Digest::of(b"wheel"));
        let store = Store::open(root.path(), there).unwrap();
        let staging = store.stage().unwrap();
        fs::write_atomic(&staging.path().join("bin/ninja"), b"#!").unwrap();
        let path = store.admit_tool(&staging, &Modes::default(), &package, &cancel).unwrap();
        assert!(store.tool(&package, true, &cancel).unwrap().is_some());
        assert!(Store::open(root.path(), here).unwrap().tool(&package, false, &cancel).unwrap().is_none());
        fs::write_atomic(&path.join("bin/ninja"), b"#?").unwrap();
        assert!(store.tool(&package, true, &cancel).unwrap().is_none());
    }
}

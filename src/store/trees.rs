//! Folders: engine sources by their tree digest, and unpacked build tools by their package's digest.

use std::path::{Path, PathBuf};

use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::tree::{Listing, Modes};

use super::damage::{self, Damage};
use super::{Staging, Store, StoreError};

const TOOL: &str = "tool";
/// The ending of the file beside a folder that lists it.
const LIST: &str = "list";
const MAX_LISTING_BYTES: u64 = 64 << 20;

impl Store {
    /// Where the tree with this digest is, or would be.
    pub fn tree_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("trees").join(digest.hex())
    }

    /// The tree, hashed now: a build is rare and long, so its source is hashed each time. None when it is missing or damaged;
    /// a damaged one stays until its replacement is in.
    ///
    /// # Errors
    /// When it cannot be read, or the user asked to stop.
    pub fn confirm_tree(&self, digest: &Digest, cancel: &Cancel) -> Result<Option<PathBuf>, StoreError> {
        let whole = self.tree_damages(digest, cancel, &mut |_| {})?.is_some_and(|damages| damages.is_empty());
        Ok(whole.then(|| self.tree_path(digest)))
    }

    /// Everything in a tree's folder that is not what its listing says, extra files included; none when there is no such
    /// tree. Every file is hashed, and `seen` gets its size in bytes.
    ///
    /// # Errors
    /// When the folder cannot be listed, or the user asked to stop.
    pub fn tree_damages(
        &self,
        digest: &Digest,
        cancel: &Cancel,
        seen: &mut dyn FnMut(u64),
    ) -> Result<Option<Vec<Damage>>, StoreError> {
        let path = self.tree_path(digest);
        let list = path.with_extension(LIST);
        if !fs::exists(&list) || !fs::exists(&path) {
            return Ok(None);
        }
        let text = fs::read_bounded(&list, MAX_LISTING_BYTES)?;
        let listing = listing_with(digest, &text);
        let Some(listing) = listing else {
            return Ok(Some(vec![Damage { path: list, expected: Some(*digest), computed: Some(Digest::of(&text)) }]));
        };
        Ok(Some(damage::damages(&path, &listing, &[], cancel, seen)?))
    }

    /// The listing of a tree; none when there is no such tree, or its listing is damaged.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tree_listing(&self, digest: &Digest) -> Result<Option<Listing>, StoreError> {
        let list = self.tree_path(digest).with_extension(LIST);
        if !fs::exists(&list) {
            return Ok(None);
        }
        Ok(listing_with(digest, &fs::read_bounded(&list, MAX_LISTING_BYTES)?))
    }

    /// Removes a tree, so that it counts as missing.
    ///
    /// # Errors
    /// When it cannot be moved out of the way.
    pub fn remove_tree(&self, digest: &Digest) -> Result<(), StoreError> {
        self.remove_dir(&self.tree_path(digest))
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
        fs::write_atomic(&path.with_extension(LIST), listing.to_text().as_bytes())?;
        Ok(path)
    }

    /// Where the unpacked package with this digest is, or would be.
    pub fn tool_path(&self, package: &Digest) -> PathBuf {
        self.root.join("tools").join(package.hex())
    }

    /// The unpacked package, if this machine unpacked and sealed it and its folder holds exactly the files of its listing.
    /// `full` hashes every file; otherwise paths, sizes, modes and links are compared. A damaged one counts as missing from
    /// then on, so that it is fetched again.
    ///
    /// # Errors
    /// When it cannot be read, or the user asked to stop.
    pub fn tool(&self, package: &Digest, full: bool, cancel: &Cancel) -> Result<Option<PathBuf>, StoreError> {
        let path = self.tool_path(package);
        let Some(listing) = self.tool_listing(package) else { return Ok(None) };
        if !damage::has_shape(&path, &listing, &[])? {
            return Ok(None);
        }
        if full && !damage::damages(&path, &listing, &[], cancel, &mut |_| {})?.is_empty() {
            fs::remove_file(&path.with_extension(LIST))?;
            return Ok(None);
        }
        Ok(Some(path))
    }

    /// Everything in a tool's folder that is not what its listing says, extra files included; none when there is no such
    /// tool. Every file is hashed, and `seen` gets its size in bytes.
    ///
    /// # Errors
    /// When the folder cannot be listed, or the user asked to stop.
    pub fn tool_damages(
        &self,
        package: &Digest,
        cancel: &Cancel,
        seen: &mut dyn FnMut(u64),
    ) -> Result<Option<Vec<Damage>>, StoreError> {
        let Some(listing) = self.tool_listing(package) else { return Ok(None) };
        damage::damages(&self.tool_path(package), &listing, &[], cancel, seen).map(Some)
    }

    /// Removes a tool, so that it counts as missing.
    ///
    /// # Errors
    /// When it cannot be moved out of the way.
    pub fn remove_tool(&self, package: &Digest) -> Result<(), StoreError> {
        self.remove_dir(&self.tool_path(package))
    }

    /// The sealed listing of a tool whose folder is there.
    fn tool_listing(&self, package: &Digest) -> Option<Listing> {
        let path = self.tool_path(package);
        let sealed = fs::read_bounded(&path.with_extension(LIST), MAX_LISTING_BYTES).ok()?;
        let text = self.key.open(&format!("{TOOL} {package}"), &sealed)?;
        fs::exists(&path).then(|| Listing::parse(&String::from_utf8_lossy(text)))?
    }

    /// Moves in what was unpacked from a package whose digest the source has compared with the pin, and seals its listing.
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
        fs::write_atomic(&path.with_extension(LIST), &sealed)?;
        Ok(path)
    }

    /// Puts a staged folder in place of another. The listing or receipt that vouches for the old one goes first, so that a
    /// kill in between leaves a folder that counts as missing.
    pub(super) fn replace_dir(&self, staged: &Path, to: &Path) -> Result<(), StoreError> {
        fs::create_dir_all(fs::parent(to))?;
        self.remove_dir(to)?;
        fs::sync_tree(staged)?;
        fs::rename(staged, to)?;
        fs::sync_dir(fs::parent(to))?;
        Ok(())
    }

    /// Removes a folder in one step, after the listing that vouches for it.
    fn remove_dir(&self, path: &Path) -> Result<(), StoreError> {
        if fs::exists(path) {
            fs::remove_file(&path.with_extension(LIST))?;
            let old = self.stage()?;
            fs::rename(path, &old.path().join("old"))?;
        }
        Ok(())
    }
}

/// The digest of a tree is that of its listing, which therefore needs no seal.
fn listing_with(digest: &Digest, text: &[u8]) -> Option<Listing> {
    (Digest::of(text) == *digest).then(|| Listing::parse(&String::from_utf8_lossy(text)))?
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

    #[test]
    fn h2_an_extra_file_in_a_tree_or_tool_is_damage() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("k")).unwrap();
        let (cancel, package) = (Cancel::default(), Digest::of(b"wheel"));
        let fill = || {
            let staging = store.stage().unwrap();
            fs::write_atomic(&staging.path().join("bin/ninja"), b"#!").unwrap();
            staging
        };
        let tree = Listing::scan(fill().path(), &Modes::default(), &cancel).unwrap().digest();
        let source = store.admit_tree(&fill(), &Modes::default(), &tree, "source of `e`", &cancel).unwrap();
        fs::write_atomic(&source.join("CMakeUserPresets.json"), b"{}").unwrap();
        assert_eq!(store.confirm_tree(&tree, &cancel).unwrap(), None);
        assert_eq!(store.tree_damages(&tree, &cancel, &mut |_| {}).unwrap().unwrap().len(), 1);
        store.remove_tree(&tree).unwrap();
        assert_eq!(store.tree_damages(&tree, &cancel, &mut |_| {}).unwrap(), None);

        let tool = store.admit_tool(&fill(), &Modes::default(), &package, &cancel).unwrap();
        fs::write_atomic(&tool.join("bin/sitecustomize.py"), b"evil").unwrap();
        for full in [false, true] {
            assert_eq!(store.tool(&package, full, &cancel).unwrap(), None);
        }
        assert_eq!(store.tool_damages(&package, &cancel, &mut |_| {}).unwrap().unwrap().len(), 1);
    }

    #[test]
    fn m2_a_damaged_tool_counts_as_missing_and_heals() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path(), Key::from_secret("k")).unwrap();
        let (cancel, package) = (Cancel::default(), Digest::of(b"wheel"));
        let admit = || {
            let staging = store.stage().unwrap();
            fs::write_atomic(&staging.path().join("bin/ninja"), b"#!").unwrap();
            fs::write_atomic(&staging.path().join("share/x"), b"x").unwrap();
            store.admit_tool(&staging, &Modes::default(), &package, &cancel).unwrap()
        };
        let there = |full| store.tool(&package, full, &cancel).unwrap().is_some();
        let path = admit();
        // A cleaner of old files took one: seen without hashing.
        fs::remove_file(&path.join("share/x")).unwrap();
        assert!(!there(false));
        admit();
        assert!(there(true));
        // Changed bytes of the same size: seen when hashed, and remembered.
        fs::write_atomic(&path.join("share/x"), b"y").unwrap();
        assert!(there(false) && !there(true));
        assert!(!there(false), "the next plan fetches it again");
        admit();
        assert!(there(true));
    }
}

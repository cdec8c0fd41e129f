//! A folder or file on this machine.
//!
//! An engine's folder is its files as they are now, without `.git`, and without what git ignores there and does not
//! track (build folders, mostly). The rules of git are those of the repository around the folder, unless that ignores the
//! folder itself, as a project does with sources checked out within it. A model is one file, or files of a folder, links to files
//! followed: caches of weights are full of such links.
//!
//! Fetching copies, by reflink where the file system can; never a hard link, since these files are being worked on.
//!
//! Absent: watching for changes. Commands compare sizes and times with what they were when the files were hashed last
//! ([`PathSpec::fingerprint`]): what was edited since makes the lockfile stale.

mod stamps;

use std::path::{Path, PathBuf};

use git2::Repository;

use crate::base::diagnostic::nearest;
use crate::base::digest::{self, Digest};
use crate::base::fs::{self, FsError};
use crate::base::name::RelPath;
use crate::base::tree::{Listing, MAX_DEPTH, MAX_FILES, Mode};
use crate::format::lockfile::FilePin;
use crate::format::manifest::PathSpec;
use crate::report::{Unit, Verb};

use super::archive::leads_out;
use super::globs::Globs;
use super::{Fetched, Source, SourceError, TreeSource, World};

impl Source for PathSpec {
    type Pin = ();

    fn resolve_files(&self, world: &World) -> Result<((), Vec<FilePin>), SourceError> {
        let root = self.root(world)?;
        Ok(((), self.pin_files(world, &root)?))
    }

    fn fetch_files(&self, world: &World, (): &(), files: &[&FilePin], staging: &Path) -> Result<Fetched, SourceError> {
        let root = self.root(world)?;
        let is_file = fs::metadata(&root)?.is_file();
        for file in files {
            world.task.check()?;
            let from = if is_file { root.clone() } else { file.path.under(&root) };
            if !from.is_file() {
                return Err(self.missing(&from, "it was removed after it was locked", None));
            }
            copy(&from, &file.path.under(staging))?;
        }
        Ok(Fetched::default())
    }
}

impl TreeSource for PathSpec {
    fn resolve_tree(&self, world: &World) -> Result<((), Digest), SourceError> {
        let root = self.root(world)?;
        Ok(((), self.listing(world, &root)?.digest()))
    }

    fn fetch_tree(&self, world: &World, (): &(), _: &Digest, staging: &Path) -> Result<Fetched, SourceError> {
        let root = self.root(world)?;
        let listing = self.listing(world, &root)?;
        for (path, entry) in &listing.0 {
            world.task.check()?;
            let (from, to) = (path.under(&root), path.under(staging));
            if entry.mode == Mode::Symlink {
                fs::create_dir_all(fs::parent(&to))?;
                let target = fs::read_link(&from)?.to_string_lossy().replace(std::path::MAIN_SEPARATOR, "/");
                fs::write_link(&target, &to)?;
            } else {
                copy(&from, &to)?;
            }
        }
        Ok(listing.modes().into())
    }
}

impl PathSpec {
    fn missing(&self, path: &Path, why: &str, hint: Option<String>) -> SourceError {
        SourceError::Missing { what: format!("`{}`", path.display()), why: why.to_owned(), hint }
    }

    /// Where the request points, if there is something.
    fn root(&self, world: &World) -> Result<PathBuf, SourceError> {
        let root = world.project.join(&self.path);
        if fs::metadata(&root).is_ok() {
            return Ok(root);
        }
        if fs::exists(&root) {
            return Err(self.missing(&root, "it is a broken symbolic link", None));
        }
        let beside = fs::read_dir(fs::parent(&root)).unwrap_or_default();
        let names = beside.iter().filter_map(|path| path.file_name()?.to_str());
        let wanted = root.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let hint = match nearest(wanted, names) {
            Some(near) => format!("did you mean `{near}`?"),
            None => "a relative `path` starts at the project's folder".to_owned(),
        };
        Err(self.missing(&root, "there is no such file or folder", Some(hint)))
    }

    /// An engine's files.
    fn listing(&self, world: &World, root: &Path) -> Result<Listing, SourceError> {
        if !fs::metadata(root)?.is_dir() {
            return Err(self.missing(root, "it is a file, but an engine's source is a folder", None));
        }
        let ignoring = Ignoring::around(root)?;
        let keep = |path: &RelPath| path.file_name() != ".git" && !ignoring.ignores(path);
        let told = |path: &RelPath| if ignoring.executable(path) { Mode::Executable } else { Mode::File };
        let listing = Listing::scan_where(root, &keep, &told, world.task.cancel())?;
        for (path, _) in listing.0.iter().filter(|(_, entry)| entry.mode == Mode::Symlink) {
            let target = fs::read_link(&path.under(root))?;
            let text = target.to_string_lossy().replace('\\', "/");
            if let Some(why) = leads_out(path, text.as_bytes()) {
                let what = format!("`{}`", path.under(root).display());
                return Err(SourceError::Hostile { what, why: format!("it is a link to `{text}`: {why}") });
            }
        }
        if listing.0.is_empty() {
            return Err(self.missing(root, "it has no files", None));
        }
        Ok(listing)
    }

    /// A model's files, hashed.
    fn pin_files(&self, world: &World, root: &Path) -> Result<Vec<FilePin>, SourceError> {
        let globs = Globs::new(&self.files)?;
        let all = if fs::metadata(root)?.is_file() {
            let name = root.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let name: RelPath = name.ok_or_else(|| self.missing(root, "its name is not portable", None))?;
            vec![(name, root.to_owned())]
        } else {
            files_below(world, root)?
        };
        let names: Vec<&RelPath> = all.iter().map(|(name, _)| name).collect();
        let chosen = globs.select(&format!("`{}`", root.display()), &names)?;
        let mut pins = Vec::new();
        for (name, path) in all.iter().filter(|(name, _)| chosen.contains(&name)) {
            let total = fs::metadata(path)?.len();
            let progress = world.task.start(Verb::Hash, name.as_str(), Some(total), Unit::Bytes);
            let file = fs::open(path)?;
            let hashed = digest::of_reader(file, |more| {
                progress.add(more);
                progress.check().map_err(std::io::Error::other)
            });
            world.task.check()?;
            let (sha256, size) = hashed.map_err(|error| FsError::new("read", path, error))?;
            progress.finish("");
            pins.push(FilePin { path: name.clone(), size, sha256 });
        }
        Ok(pins)
    }
}

/// Copies a file, its folder made: by reflink where the file system can.
fn copy(from: &Path, to: &Path) -> Result<(), FsError> {
    fs::create_dir_all(fs::parent(to))?;
    fs::copy(from, to)
}

/// Every file below a folder, by name: links to files followed, links to folders and to nothing not, names that other platforms
/// cannot hold left out with a warning.
fn files_below(world: &World, root: &Path) -> Result<Vec<(RelPath, PathBuf)>, SourceError> {
    let mut found = Vec::new();
    let mut folders = vec![(root.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        world.task.check()?;
        for path in fs::read_dir(&folder)? {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name == ".git" {
                continue;
            }
            let full = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
            if fs::symlink_metadata(&path)?.is_dir() {
                folders.push((path, full, depth + 1));
            } else if path.is_file() {
                match full.parse() {
                    Ok(name) => found.push((name, path)),
                    Err(error) => world.task.warn(format!("left out: {error}")),
                }
            }
            if found.len() > MAX_FILES || depth > MAX_DEPTH {
                let why = format!("it has more than {MAX_FILES} files or {MAX_DEPTH} levels");
                return Err(SourceError::Hostile { what: format!("`{}`", root.display()), why });
            }
        }
    }
    Ok(found)
}

/// The rules of the git repository around a folder.
struct Ignoring {
    /// The repository, its index, and where the folder is in it; none when there are no rules.
    rules: Option<(Repository, git2::Index, PathBuf)>,
}

impl Ignoring {
    fn around(root: &Path) -> Result<Self, SourceError> {
        let unreadable = |error: git2::Error| SourceError::Missing {
            what: format!("the git repository around `{}`", root.display()),
            why: error.message().to_owned(),
            hint: (error.code() == git2::ErrorCode::Owner)
                .then(|| "it belongs to somebody else; git's setting `safe.directory` allows it".to_owned()),
        };
        let repository = match Repository::discover(root) {
            Ok(repository) => repository,
            Err(error) if error.code() == git2::ErrorCode::NotFound => return Ok(Self { rules: None }),
            Err(error) => return Err(unreadable(error)),
        };
        let Some(work) = repository.workdir().map(Path::to_owned) else { return Ok(Self { rules: None }) };
        let whole = fs::canonical(root)?;
        let Ok(within) = whole.strip_prefix(fs::canonical(&work)?).map(Path::to_owned) else {
            return Ok(Self { rules: None });
        };
        let itself = !within.as_os_str().is_empty() && repository.is_path_ignored(&within).map_err(unreadable)?;
        let index = repository.index().map_err(unreadable)?;
        Ok(Self { rules: (!itself).then_some((repository, index, within)) })
    }

    fn ignores(&self, path: &RelPath) -> bool {
        let Some((repository, index, within)) = &self.rules else { return false };
        let path = within.join(path.to_path());
        repository.is_path_ignored(&path).unwrap_or(false) && !is_tracked(index, &path)
    }

    /// For systems whose files do not say whether they may be run: what git says.
    fn executable(&self, path: &RelPath) -> bool {
        let entry = self.rules.as_ref().and_then(|(_, index, within)| index.get_path(&within.join(path.to_path()), 0));
        entry.is_some_and(|entry| entry.mode & 0o111 != 0)
    }
}

/// Whether a file, or anything in a folder, is in git's index.
fn is_tracked(index: &git2::Index, path: &Path) -> bool {
    index.get_path(path, 0).is_some() || index.find_prefix(path.join("")).is_ok()
}

#[cfg(test)]
mod tests;

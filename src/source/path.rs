//! A folder (or, for models, a file) on this machine. What is pinned is its content when it was locked: a later change is
//! noticed when the bytes are next needed, and taken over with `aitools lock --upgrade NAME`.
//!
//! Left out everywhere: entries named `.git`. Symbolic links of an engine's folder are kept as links and must stay inside
//! it; those of a model's are followed.

use std::path::{Component, Path, PathBuf};

use crate::base::digest;
use crate::base::fs;
use crate::base::name::RelPath;
use crate::base::tree::{Listing, MAX_DEPTH, MAX_FILES, TreeError};
use crate::format::lockfile::{FilePin, Kind, Pin};
use crate::format::manifest::PathSpec;

use super::globs::Globs;
use super::{Fetch, Source, SourceError, World};

impl Source for PathSpec {
    fn resolve(&self, world: &World, kind: Kind) -> Result<Pin, SourceError> {
        let root = self.root(world)?;
        if kind == Kind::Model {
            return Ok(Pin { files: self.weights(world, &root)?, ..Pin::default() });
        }
        fs::create_dir_all(&world.scratch)?;
        let copy = fs::temporary_dir(&world.scratch)?;
        copy_folder(world, &root, copy.path())?;
        let listing =
            Listing::scan(copy.path(), &|_| false, world.task.cancel()).map_err(|error| self.refused(error))?;
        Ok(Pin { tree: Some(listing.digest()), ..Pin::default() })
    }

    fn fetch(&self, world: &World, ask: &Fetch<'_>) -> Result<(), SourceError> {
        let root = self.root(world)?;
        if ask.kind != Kind::Model {
            return copy_folder(world, &root, ask.staging);
        }
        for file in ask.wanted.iter().filter_map(|index| ask.pin.files.get(*index)) {
            world.task.check()?;
            let from = if root.is_dir() { file.path.under(&root) } else { root.clone() };
            if !from.is_file() {
                return Err(missing(&from, "the lockfile names it, but it is gone"));
            }
            let to = file.path.under(ask.staging);
            fs::create_dir_all(fs::parent(&to))?;
            fs::copy(&from, &to)?;
        }
        Ok(())
    }
}

impl PathSpec {
    fn root(&self, world: &World) -> Result<PathBuf, SourceError> {
        let root = world.project.join(&self.path);
        if fs::exists(&root) { Ok(root) } else { Err(missing(&root, "there is no such file or folder")) }
    }

    fn refused(&self, error: TreeError) -> SourceError {
        match error {
            TreeError::Fs(error) => error.into(),
            TreeError::Cancelled(error) => error.into(),
            other => SourceError::Hostile { what: format!("folder `{}`", self.path), why: other.to_string() },
        }
    }

    /// The files that are weights, hashed.
    fn weights(&self, world: &World, root: &Path) -> Result<Vec<FilePin>, SourceError> {
        let paths = match root.is_dir() {
            true => {
                let all = files_below(world, root)?;
                let names: Vec<&RelPath> = all.iter().collect();
                let globs = Globs::new(&self.files)?;
                let what = format!("folder `{}`", self.path);
                globs.select(&what, &names)?.into_iter().cloned().collect()
            }
            false => vec![name_of(root)?],
        };
        let pin = |path: RelPath| {
            world.task.check()?;
            let (sha256, size) = digest::of_file(&if root.is_dir() { path.under(root) } else { root.to_owned() })?;
            Ok(FilePin { path, size, sha256 })
        };
        paths.into_iter().map(pin).collect()
    }
}

fn missing(path: &Path, why: &str) -> SourceError {
    let hint = Some("correct `path` in the manifest, or put it there".to_owned());
    SourceError::Missing { what: format!("`{}`", path.display()), why: why.to_owned(), hint }
}

fn hostile(path: &Path, why: impl ToString) -> SourceError {
    SourceError::Hostile { what: format!("`{}`", path.display()), why: why.to_string() }
}

fn name_of(path: &Path) -> Result<RelPath, SourceError> {
    let name =
        path.file_name().and_then(|name| name.to_str()).ok_or_else(|| hostile(path, "its name is not Unicode"))?;
    name.parse().map_err(|error| hostile(path, error))
}

/// Every file below a folder, links followed, `.git` left out.
fn files_below(world: &World, root: &Path) -> Result<Vec<RelPath>, SourceError> {
    let mut files = Vec::new();
    let mut folders = vec![(root.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        world.task.check()?;
        for path in entries(&folder)? {
            let meta = fs::metadata(&path)?;
            if meta.is_dir() && depth < MAX_DEPTH {
                folders.push((path, depth + 1));
            } else if meta.is_file() {
                files.push(below(&path, root)?);
            }
            if files.len() > MAX_FILES {
                return Err(hostile(root, "it holds too many files"));
            }
        }
    }
    files.sort();
    Ok(files)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, SourceError> {
    let mut entries = fs::read_dir(folder)?;
    entries.retain(|path| path.file_name().is_none_or(|name| name != ".git"));
    Ok(entries)
}

fn below(path: &Path, root: &Path) -> Result<RelPath, SourceError> {
    let parts = path.strip_prefix(root).unwrap_or(path).components();
    let parts: Option<Vec<&str>> = parts.map(|part| part.as_os_str().to_str()).collect();
    let text = parts.ok_or_else(|| hostile(path, "its name is not Unicode"))?.join("/");
    text.parse().map_err(|error| hostile(path, error))
}

/// Copies a folder for building: links as links, `.git` left out.
fn copy_folder(world: &World, from: &Path, to: &Path) -> Result<(), SourceError> {
    if !from.is_dir() {
        return Err(missing(from, "an engine's source is a folder"));
    }
    let mut folders = vec![(from.to_owned(), 0)];
    let mut count = 0;
    while let Some((folder, depth)) = folders.pop() {
        world.task.check()?;
        for path in entries(&folder)? {
            count += 1;
            if depth > MAX_DEPTH || count > MAX_FILES {
                return Err(hostile(from, "it holds too many files or folders"));
            }
            let relative = below(&path, from)?;
            let target = relative.under(to);
            let meta = fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                fs::create_dir_all(&target)?;
                folders.push((path, depth + 1));
            } else if meta.is_symlink() {
                let link = fs::read_link(&path)?;
                if !stays_inside(&relative, &link) {
                    return Err(hostile(&path, format!("it is a link out of the folder, to `{}`", link.display())));
                }
                fs::symlink(&link, &target).map_err(|error| fs::FsError::new("create link", &target, error))?;
            } else if meta.is_file() {
                fs::copy(&path, &target)?;
            } else {
                return Err(hostile(&path, "it is neither a file, a folder nor a link"));
            }
        }
    }
    Ok(())
}

/// Whether a link at `at` with that target ends below the root.
fn stays_inside(at: &RelPath, target: &Path) -> bool {
    let mut depth = at.as_str().matches('/').count();
    target.components().all(|part| match part {
        Component::Normal(_) => {
            depth += 1;
            true
        }
        Component::CurDir => true,
        Component::ParentDir => {
            let inside = depth > 0;
            depth = depth.saturating_sub(1);
            inside
        }
        Component::RootDir | Component::Prefix(_) => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Task;

    fn world(project: &Path) -> World {
        World {
            task: Task::silent(),
            project: project.to_owned(),
            scratch: project.join("scratch é"),
            offline: true,
            mirrors: Vec::new(),
            env: std::collections::BTreeMap::new(),
        }
    }

    fn spec(path: &str, files: &[&str]) -> PathSpec {
        PathSpec { path: path.to_owned(), files: files.iter().map(|glob| (*glob).to_owned()).collect() }
    }

    #[test]
    fn an_engine_folder_is_the_same_tree_when_fetched() {
        let root = tempfile::tempdir().unwrap();
        let world = world(root.path());
        fs::write_atomic(&root.path().join("src é/a b/x.c"), b"1").unwrap();
        fs::write_atomic(&root.path().join("src é/.git/HEAD"), b"ref").unwrap();
        let pin = spec("src é", &[]).resolve(&world, Kind::Engine).unwrap();
        let staging = root.path().join("staging");
        fs::create_dir_all(&staging).unwrap();
        let ask = Fetch { kind: Kind::Engine, pin: &pin, wanted: &[], staging: &staging, name: "e" };
        spec("src é", &[]).fetch(&world, &ask).unwrap();
        let listing = Listing::scan(&staging, &|_| false, world.task.cancel()).unwrap();
        assert_eq!((Some(listing.digest()), listing.0.len()), (pin.tree, 1));
    }

    #[test]
    fn weights_are_one_file_or_what_globs_choose() {
        let root = tempfile::tempdir().unwrap();
        let world = world(root.path());
        for name in ["w/é.gguf", "w/activation/1.pt", "w/readme.md"] {
            fs::write_atomic(&root.path().join(name), name.as_bytes()).unwrap();
        }
        let paths = |spec: PathSpec| -> Vec<String> {
            let pin = spec.resolve(&world, Kind::Model).unwrap();
            pin.files.iter().map(|file| file.path.to_string()).collect()
        };
        assert_eq!(paths(spec("w/é.gguf", &[])), ["é.gguf"]);
        assert_eq!(paths(spec("w", &["*.gguf", "activation/**"])), ["activation/1.pt", "é.gguf"]);
        assert!(matches!(spec("w", &["*.ggml"]).resolve(&world, Kind::Model), Err(SourceError::Missing { .. })));
        assert!(matches!(spec("nowhere", &[]).resolve(&world, Kind::Model), Err(SourceError::Missing { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn links_out_of_the_folder_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let world = world(root.path());
        fs::write_atomic(&root.path().join("src/d/x.c"), b"1").unwrap();
        for (target, fine) in [("../d/x.c", true), ("x.c", true), ("../../secret", false), ("/etc/passwd", false)] {
            let link = root.path().join("src/d/link");
            fs::remove_file(&link).unwrap();
            fs::symlink(Path::new(target), &link).unwrap();
            let resolved = spec("src", &[]).resolve(&world, Kind::Engine);
            assert_eq!(resolved.is_ok(), fine, "{target}: {resolved:?}");
        }
    }
}

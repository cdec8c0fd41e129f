//! Sources in git repositories.
//!
//! A request names a commit, or a branch or tag that a server is asked about; the pin is the commit, the digest of its
//! files (see [`crate::base::tree`]), and the commits of those submodules that were asked for, whose files stand inside.
//! Exactly the pinned commits are fetched, without history where the server allows it, into caches under the scratch folder
//! (`mirror`), and written out as they are in the repository (`snapshot`).
//!
//! The program `git` does all network work (`program`), as in uv and jj, with the user's own configuration: `insteadOf`,
//! proxies, headers, credential helpers and ssh work as in every clone. The manifest's mirrors apply before `insteadOf`.
//! libgit2 reads the objects. A folder or `file://` is read in place.
//!
//! Absent: git's LFS (pointers stay pointers), filters, line-ending conversion, SHA-256 repositories, the dumb protocol.

mod address;
mod complaint;
mod mirror;
mod program;
mod project;
mod snapshot;

use std::collections::BTreeSet;
use std::path::Path;

use self::address::Way;
use self::mirror::{Ask, Session, ref_name};
use self::snapshot::{ReadError, Snapshot, parse_modules};
use crate::base::address::{Address, AddressError};
use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::RelPath;
use crate::base::tree::{Listing, Mode};
use crate::format::lockfile::{FilePin, GitPin, SubmodulePin};
use crate::format::manifest::GitSpec;
use crate::source::{Fetched, Source, SourceError, TreeSource, World};

pub use self::project::{Populated, check as check_submodule, populate_submodule};

/// A request for a git repository.
#[derive(Debug, Clone, Copy)]
pub struct GitSource<'a>(pub &'a GitSpec);

fn everything(_: &RelPath) -> bool {
    true
}

impl Source for GitSource<'_> {
    type Pin = GitPin;

    fn resolve_files(&self, world: &World) -> Result<(GitPin, Vec<FilePin>), SourceError> {
        let (pin, listing) = self.resolve(world)?;
        Ok((pin, files_of(&listing)))
    }

    fn fetch_files(
        &self,
        world: &World,
        pin: &GitPin,
        files: &[&FilePin],
        staging: &Path,
    ) -> Result<Fetched, SourceError> {
        let wanted: BTreeSet<&RelPath> = files.iter().map(|file| &file.path).collect();
        let listing = self.write(world, pin, &|path| wanted.contains(path), staging)?;
        files.iter().try_for_each(|file| check_file(file, &listing))?;
        Ok(listing.modes().into())
    }
}

impl TreeSource for GitSource<'_> {
    fn resolve_tree(&self, world: &World) -> Result<(GitPin, Digest), SourceError> {
        let (pin, listing) = self.resolve(world)?;
        Ok((pin, listing.digest()))
    }

    fn fetch_tree(&self, world: &World, pin: &GitPin, tree: &Digest, staging: &Path) -> Result<Fetched, SourceError> {
        let listing = self.write(world, pin, &everything, staging)?;
        if listing.digest() == *tree {
            return Ok(listing.modes().into());
        }
        Err(SourceError::Mismatch {
            what: format!(
                "the source tree of `{}`, commit `{}`",
                address::without_user(self.0.git.as_str()),
                pin.commit
            ),
            expected: tree.to_string(),
            actual: listing.digest().to_string(),
            likely: Some("the lockfile was edited by hand, or made by another version of this program".to_owned()),
        })
    }
}

impl GitSource<'_> {
    /// The commit that the request means today, and every file of it.
    fn resolve(&self, world: &World) -> Result<(GitPin, Listing), SourceError> {
        let session = Session::new(world)?;
        let commit = match &self.0.rev {
            Some(rev) => *rev,
            None => session.look_up(self.0)?,
        };
        project::check(world, self.0, commit, false)?;
        let (listing, submodules) = self.with_snapshot(&session, commit, None, |snapshot, submodules| {
            let listing = snapshot.walk(self.0.subdir.as_ref(), &everything, &mut |_, _, _| Ok(()))?;
            Ok((listing, submodules.to_vec()))
        })?;
        Ok((GitPin { commit, submodules }, listing))
    }

    /// Writes those of the pinned files that are wanted to the folder `staging`.
    fn write(
        &self,
        world: &World,
        pin: &GitPin,
        wanted: &dyn Fn(&RelPath) -> bool,
        staging: &Path,
    ) -> Result<Listing, SourceError> {
        project::check(world, self.0, pin.commit, true)?;
        let session = Session::new(world)?;
        self.with_snapshot(&session, pin.commit, Some(&pin.submodules), |snapshot, _| {
            empty(staging)?;
            let mut write = |path: &RelPath, mode: Mode, bytes: &[u8]| snapshot::write(staging, path, mode, bytes);
            snapshot.walk(self.0.subdir.as_ref(), &wanted, &mut write)
        })
    }
}

impl GitSource<'_> {
    /// Every file of a commit, into an empty folder.
    fn export(&self, world: &World, commit: Commit, to: &Path) -> Result<Listing, SourceError> {
        let session = Session::new(world)?;
        self.with_snapshot(&session, commit, None, |snapshot, _| {
            empty(to)?;
            let mut write = |path: &RelPath, mode: Mode, bytes: &[u8]| snapshot::write(to, path, mode, bytes);
            snapshot.walk(self.0.subdir.as_ref(), &everything, &mut write)
        })
    }

    /// Works on a commit and its submodules; when what is on this machine turns out to be damaged, once more on what was
    /// fetched anew.
    fn with_snapshot<T>(
        &self,
        session: &Session<'_>,
        commit: Commit,
        pinned: Option<&[SubmodulePin]>,
        mut work: impl FnMut(&Snapshot<'_>, &[SubmodulePin]) -> Result<T, ReadError>,
    ) -> Result<T, SourceError> {
        let shown = address::without_user(self.0.git.as_str());
        let mut attempt =
            |fresh| self.open(session, commit, pinned, fresh).and_then(|(snapshot, pins)| work(&snapshot, &pins));
        let done = match attempt(false) {
            Err(ReadError::Damaged(why)) => {
                let message = format!("the copy of `{shown}` on this machine is damaged and replaced: {why}");
                session.world.task.warn(message);
                attempt(true)
            }
            done => done,
        };
        done.map_err(|error| match error {
            ReadError::Source(error) => error,
            ReadError::Damaged(why) => SourceError::Hostile {
                what: format!("`{shown}` at `{commit}`"),
                why: format!("its objects are incomplete or damaged: {why}"),
            },
        })
    }

    fn open<'w>(
        &self,
        session: &Session<'w>,
        commit: Commit,
        pinned: Option<&[SubmodulePin]>,
        fresh: bool,
    ) -> Result<(Snapshot<'w>, Vec<SubmodulePin>), ReadError> {
        let beside = project::objects_beside(session.world, self.0);
        let main = Ask { address: self.0.git.as_str(), commit, name: ref_name(self.0), beside };
        let objects = session.objects(&main, fresh)?;
        let what = format!("`{}` at `{commit}`", address::without_user(self.0.git.as_str()));
        let mut snapshot = Snapshot::open(&what, objects, commit, session.world.task.cancel())?;
        let mut paths: Vec<&RelPath> = match pinned {
            Some(pins) => pins.iter().map(|pin| &pin.path).collect(),
            None => self.0.submodules.iter().collect(),
        };
        // A submodule within a submodule comes after it.
        paths.sort();
        paths.dedup();
        let mut pins: Vec<SubmodulePin> = Vec::new();
        for path in paths {
            let known = pinned.and_then(|pins| pins.iter().find(|pin| pin.path == *path));
            let pin = self.submodule(&snapshot, path, &pins, known)?;
            let ask = Ask { address: pin.git.as_str(), commit: pin.commit, name: None, beside: None };
            snapshot.add(path, session.objects(&ask, fresh)?, pin.commit)?;
            pins.push(pin);
        }
        Ok((snapshot, pins))
    }

    /// Where a submodule comes from, and at which commit: the tree says it, and the pin must agree.
    fn submodule(
        &self,
        snapshot: &Snapshot<'_>,
        path: &RelPath,
        outer: &[SubmodulePin],
        known: Option<&SubmodulePin>,
    ) -> Result<SubmodulePin, ReadError> {
        let missing = |why: &str| SourceError::Missing {
            what: format!("submodule `{path}` of `{}`", address::without_user(self.0.git.as_str())),
            why: why.to_owned(),
            hint: Some("check `submodules` in the manifest".to_owned()),
        };
        let commit = snapshot.gitlink(path)?.ok_or_else(|| missing("the repository has no submodule at that path"))?;
        if let Some(known) = known {
            if known.commit == commit {
                return Ok(known.clone());
            }
            return Err(ReadError::Source(SourceError::Mismatch {
                what: format!("submodule `{path}` of `{}`", address::without_user(self.0.git.as_str())),
                expected: format!("commit {}", known.commit),
                actual: format!("commit {commit}"),
                likely: None,
            }));
        }
        let within = outer.iter().rev().find_map(|pin| Some((pin, path.strip_prefix(&pin.path)?)));
        let (under, parent, inner) = match &within {
            Some((pin, rest)) => (Some(&pin.path), pin.git.as_str(), rest),
            None => (None, self.0.git.as_str(), path),
        };
        let modules = parse_modules(&snapshot.modules(under)?);
        let module = modules.into_iter().find(|module| module.path == inner.as_str() && !module.url.is_empty());
        let module = module.ok_or_else(|| missing("`.gitmodules` has no address for it"))?;
        let git = address::relative(parent, &module.url);
        let git: Address = git.parse().map_err(|error: AddressError| SourceError::Hostile {
            what: format!("submodule `{path}` of `{}`", address::without_user(self.0.git.as_str())),
            why: format!("its address in `.gitmodules` is {error}"),
        })?;
        let is_local = |address: &str| matches!(Way::of(address, Path::new("/")), Ok(Way::Local(_)));
        if is_local(git.as_str()) && !is_local(parent) {
            let why = format!("`.gitmodules` names `{git}`, a place on this machine, in a repository from elsewhere");
            return Err(SourceError::Hostile { what: format!("submodule `{path}`"), why }.into());
        }
        Ok(SubmodulePin { path: path.clone(), git, commit })
    }
}

fn files_of(listing: &Listing) -> Vec<FilePin> {
    let files = listing.0.iter().filter(|(_, entry)| entry.mode != Mode::Symlink);
    files.map(|(path, entry)| FilePin { path: path.clone(), size: entry.size_bytes, sha256: entry.digest }).collect()
}

fn check_file(file: &FilePin, listing: &Listing) -> Result<(), SourceError> {
    let actual = listing.0.get(&file.path);
    match actual {
        Some(entry) if entry.digest == file.sha256 && entry.size_bytes == file.size => Ok(()),
        _ => Err(SourceError::Mismatch {
            what: format!("`{}`", file.path),
            expected: file.sha256.to_string(),
            actual: actual.map_or("no such file".to_owned(), |entry| entry.digest.to_string()),
            likely: None,
        }),
    }
}

/// Removes what an attempt before this one left.
fn empty(folder: &Path) -> Result<(), fs::FsError> {
    for path in fs::read_dir(folder)? {
        if fs::symlink_metadata(&path)?.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    Ok(())
}

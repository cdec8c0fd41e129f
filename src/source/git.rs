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

use std::path::Path;

use self::address::Way;
use self::mirror::{Ask, Session, ref_name};
use self::snapshot::{ReadError, Snapshot, parse_modules};
use crate::base::commit::Commit;
use crate::base::fs;
use crate::base::name::RelPath;
use crate::base::tree::{Listing, Mode};
use crate::format::lockfile::{FilePin, Kind, Pin, SubmodulePin};
use crate::format::manifest::GitSpec;
use crate::source::{Fetch, Fetched, Source, SourceError, World};

pub use self::project::{Populated, check as check_submodule, populate_submodule};

/// A request for a git repository.
#[derive(Debug, Clone, Copy)]
pub struct GitSource<'a>(pub &'a GitSpec);

fn no_commit(git: &str) -> SourceError {
    SourceError::Disagreement {
        what: format!("the lockfile names no commit of `{}`", address::without_user(git)),
        details: Vec::new(),
        hint: Some("run `aitools lock`".to_owned()),
    }
}

fn everything(_: &RelPath) -> bool {
    true
}

impl Source for GitSource<'_> {
    fn resolve(&self, world: &World, kind: Kind) -> Result<Pin, SourceError> {
        let session = Session::new(world)?;
        let commit = match &self.0.rev {
            Some(rev) => full_id(rev, &self.0.git)?,
            None => session.look_up(self.0)?,
        };
        project::check(world, self.0, &commit, false)?;
        let (listing, submodules) = self.with_snapshot(&session, &commit, None, |snapshot, submodules| {
            let listing = snapshot.walk(self.0.subdir.as_ref(), &everything, &mut |_, _, _| Ok(()))?;
            Ok((listing, submodules.to_vec()))
        })?;
        let mut pin = Pin { commit: Some(commit), submodules, ..Pin::default() };
        match kind {
            Kind::Engine | Kind::Tool => pin.tree = Some(listing.digest()),
            Kind::Model => pin.files = files_of(&listing),
        }
        Ok(pin)
    }

    fn fetch(&self, world: &World, ask: &Fetch<'_>) -> Result<Fetched, SourceError> {
        let commit = ask.pin.commit.as_deref().ok_or_else(|| no_commit(&self.0.git))?;
        project::check(world, self.0, commit, true)?;
        let session = Session::new(world)?;
        let chosen: Vec<&FilePin> = ask.wanted.iter().filter_map(|index| ask.pin.files.get(*index)).collect();
        let is_model = ask.kind == Kind::Model;
        let wanted = |path: &RelPath| !is_model || chosen.iter().any(|file| file.path == *path);
        let listing = self.with_snapshot(&session, commit, Some(&ask.pin.submodules), |snapshot, _| {
            empty(ask.staging)?;
            let mut write = |path: &RelPath, mode: Mode, bytes: &[u8]| snapshot::write(ask.staging, path, mode, bytes);
            snapshot.walk(self.0.subdir.as_ref(), &wanted, &mut write)
        })?;
        match (ask.pin.tree, is_model) {
            (Some(expected), false) if listing.digest() != expected => Err(SourceError::Mismatch {
                what: format!("the source of `{}`, commit `{commit}`", ask.name),
                expected: expected.to_string(),
                actual: listing.digest().to_string(),
                likely: Some("the lockfile was edited by hand, or made by another version of this program".to_owned()),
            }),
            _ => {
                chosen.into_iter().try_for_each(|file| check_file(file, &listing))?;
                Ok(listing.modes().into())
            }
        }
    }
}

impl GitSource<'_> {
    /// Every file of a commit, into an empty folder.
    fn export(&self, world: &World, commit: &str, to: &Path) -> Result<Listing, SourceError> {
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
        commit: &str,
        pinned: Option<&[SubmodulePin]>,
        mut work: impl FnMut(&Snapshot<'_>, &[SubmodulePin]) -> Result<T, ReadError>,
    ) -> Result<T, SourceError> {
        let shown = address::without_user(&self.0.git);
        for fresh in [false, true] {
            let done = self.open(session, commit, pinned, fresh).and_then(|(snapshot, pins)| work(&snapshot, &pins));
            match done {
                Ok(value) => return Ok(value),
                Err(ReadError::Source(error)) => return Err(error),
                Err(ReadError::Damaged(why)) if fresh => {
                    let why = format!("its objects are incomplete or damaged: {why}");
                    return Err(SourceError::Hostile { what: format!("`{shown}` at `{commit}`"), why });
                }
                Err(ReadError::Damaged(why)) => {
                    session
                        .world
                        .task
                        .warn(format!("the copy of `{shown}` on this machine is damaged and replaced: {why}"));
                }
            }
        }
        Err(no_commit(&self.0.git))
    }

    fn open<'w>(
        &self,
        session: &Session<'w>,
        commit: &str,
        pinned: Option<&[SubmodulePin]>,
        fresh: bool,
    ) -> Result<(Snapshot<'w>, Vec<SubmodulePin>), ReadError> {
        let beside = project::objects_beside(session.world, self.0);
        let main = Ask { address: &self.0.git, commit, name: ref_name(self.0), beside };
        let objects = session.objects(&main, fresh)?;
        let what = format!("`{}` at `{commit}`", address::without_user(&self.0.git));
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
            let ask = Ask { address: &pin.git, commit: &pin.commit, name: None, beside: None };
            snapshot.add(path, session.objects(&ask, fresh)?, &pin.commit)?;
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
            what: format!("submodule `{path}` of `{}`", address::without_user(&self.0.git)),
            why: why.to_owned(),
            hint: Some("check `submodules` in the manifest".to_owned()),
        };
        let commit = snapshot.gitlink(path)?.ok_or_else(|| missing("the repository has no submodule at that path"))?;
        if let Some(known) = known {
            if known.commit == commit {
                return Ok(known.clone());
            }
            return Err(ReadError::Source(SourceError::Mismatch {
                what: format!("submodule `{path}` of `{}`", address::without_user(&self.0.git)),
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
        let module = module.ok_or_else(|| missing("`.gitmodules` does not say where it comes from"))?;
        let git = address::relative(parent, &module.url);
        let is_local = |address: &str| matches!(Way::of(address, Path::new("/")), Ok(Way::Local(_)));
        if is_local(&git) && !is_local(parent) {
            let why = format!("`.gitmodules` names `{git}`, a place on this machine, in a repository from elsewhere");
            return Err(SourceError::Hostile { what: format!("submodule `{path}`"), why }.into());
        }
        Ok(SubmodulePin { path: path.clone(), git, commit })
    }
}

/// Whether a text is 40 lowercase hexadecimal digits.
fn is_commit(text: &str) -> bool {
    text.parse::<Commit>().is_ok()
}

/// A commit as the manifest writes it: all 40 digits, since a short one may mean another commit tomorrow.
fn full_id(rev: &str, git: &str) -> Result<String, SourceError> {
    let lower = rev.to_ascii_lowercase();
    if is_commit(&lower) {
        return Ok(lower);
    }
    Err(SourceError::Missing {
        what: format!("`rev = \"{rev}\"` of `{}`", address::without_user(git)),
        why: "it is not a full commit id of 40 hexadecimal digits".to_owned(),
        hint: Some("write the whole id, or use `tag` or `branch` for a name".to_owned()),
    })
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

//! The project's own git submodule that holds an engine's source: does it name the commit that manifest and lockfile name,
//! does its checkout spare us the network, and can an empty one be filled.
//!
//! Whether the project is a git repository, and which commit it names, only the program `git` is asked: it alone knows
//! all the forms of `.git` and of the index. In a project that is no repository, manifest and lockfile decide alone.

use std::path::{Path, PathBuf};

use super::GitSource;
use super::address;
use super::mirror::{Ask, Repository, Session, objects_of_checkout, ref_name};
use super::program::Git;
use super::snapshot::{Module, parse_modules};
use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::RelPath;
use crate::base::tree::{Listing, Modes, TreeError};
use crate::format::lockfile::GitPin;
use crate::format::manifest::GitSpec;
use crate::source::{SourceError, World};

const MAX_MODULES_BYTES: u64 = 1 << 20;
/// Says that a folder is our own export: the commit and the digest of what was written.
const MARKER: &str = ".aitools-export";

/// What the project's repository says about a submodule.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Submodule {
    /// The repository's top folder.
    top: PathBuf,
    /// The submodule's path below it.
    path: String,
    /// The commit that the index names; `None` when there is no submodule at that path.
    gitlink: Option<Commit>,
    /// Its address in `.gitmodules`, relative ones resolved where that is possible.
    url: Option<String>,
    /// The project's folder is the repository's top folder.
    is_top: bool,
}

/// Reads what the repository says; `None` when the project is no repository, or lies in somebody else's.
fn look(world: &World, path: &RelPath) -> Result<Option<Submodule>, SourceError> {
    if !world.project.ancestors().any(|folder| fs::exists(&folder.join(".git"))) {
        return Ok(None);
    }
    let place = Git::at(world, &world.project).args(&["rev-parse", "--show-prefix", "--show-toplevel"]).try_run()?;
    let Some(place) = place else {
        world.task.warn(format!("git is not installed, so the submodule `{path}` is not compared with the lockfile"));
        return Ok(None);
    };
    let mut lines = place.stdout.split('\n');
    let (Some(prefix), Some(top), true) = (lines.next(), lines.next(), place.status.success()) else {
        if !place.stderr.contains("not a git repository") {
            world.task.warn(format!("the submodule `{path}` is not compared: git says: {}", place.stderr.trim()));
        }
        return Ok(None);
    };
    let (top, full) = (PathBuf::from(top), format!("{prefix}{path}"));
    let git = Git::at(world, &top).env("GIT_LITERAL_PATHSPECS", "1");
    let listed = git.args(&["ls-files", "--stage", "-z", "--", &full]).try_run()?;
    let listed = listed.map(|output| output.stdout).unwrap_or_default();
    let gitlink = listed.split('\0').find_map(|line| {
        let (facts, name) = line.split_once('\t')?;
        let commit = facts.strip_prefix("160000 ")?.split(' ').next()?;
        commit.parse().ok().filter(|_| name == full)
    });
    let is_top = prefix.is_empty();
    if gitlink.is_none() && !is_top {
        return Ok(None);
    }
    let url = module_url(world, &top, &full)?;
    Ok(Some(Submodule { top, path: full, gitlink, url, is_top }))
}

fn module_url(world: &World, top: &Path, path: &str) -> Result<Option<String>, SourceError> {
    let text = fs::read_bounded(&top.join(".gitmodules"), MAX_MODULES_BYTES).unwrap_or_default();
    let modules = parse_modules(&String::from_utf8_lossy(&text));
    let Some(Module { url, .. }) = modules.into_iter().find(|module| module.path == path) else { return Ok(None) };
    if !url.starts_with("./") && !url.starts_with("../") {
        return Ok(Some(url));
    }
    let origin = Git::at(world, top).args(&["config", "--get", "remote.origin.url"]).try_run()?;
    let origin = origin.filter(|output| output.status.success()).map(|output| output.stdout.trim().to_owned());
    Ok(origin.map(|origin| address::relative(&origin, &url)))
}

/// Compares the project's submodule with the commit that was pinned (`locked`) or is about to be.
///
/// # Errors
/// [`SourceError::Disagreement`] that names all of them.
pub fn check(world: &World, spec: &GitSpec, commit: Commit, locked: bool) -> Result<(), SourceError> {
    let Some(path) = &spec.submodule else { return Ok(()) };
    let Some(found) = look(world, path)? else { return Ok(()) };
    let required = match (&spec.rev, ref_name(spec)) {
        (Some(rev), _) => format!("manifest: rev `{rev}`"),
        (None, name) => format!("manifest: `{}`", name.unwrap_or_default()),
    };
    let lock = format!("{}: commit `{commit}`", if locked { "lockfile" } else { "resolved" });
    let url = address::without_user(spec.git.as_str());
    let Some(gitlink) = &found.gitlink else {
        return Err(SourceError::Disagreement {
            what: format!("the manifest names the submodule `{path}`, and the project's repository has none there"),
            details: vec![required, lock],
            hint: Some(format!("`git submodule add {url} {path}`, or remove `submodule` from the manifest")),
        });
    };
    if let Some(other) = found.url.as_ref().filter(|other| !address::same(other, spec.git.as_str())) {
        return Err(SourceError::Disagreement {
            what: format!("the submodule `{path}` comes from another address than the manifest's source"),
            details: vec![format!("`.gitmodules`: `{}`", address::without_user(other)), format!("manifest: `{url}`")],
            hint: Some(format!(
                "`git submodule set-url {path} {url}`, or change `git` in the manifest; then `aitools lock`"
            )),
        });
    }
    if *gitlink == commit {
        return Ok(());
    }
    let hint = format!(
        "to take the manifest's: `git -C {path} fetch origin {commit}`, `git -C {path} checkout {commit}`, `git add {path}`; \
         to take the submodule's: write `rev = \"{gitlink}\"` in the manifest, then `aitools lock`"
    );
    Err(SourceError::Disagreement {
        what: format!("the submodule `{path}` is at another commit than the manifest's source"),
        details: vec![format!("submodule: commit `{gitlink}`"), required, lock],
        hint: Some(hint),
    })
}

/// The objects of the submodule's checkout, when there is one.
pub fn objects_beside(world: &World, spec: &GitSpec) -> Option<PathBuf> {
    objects_of_checkout(&spec.submodule.as_ref()?.under(&world.project))
}

/// The outcome for a submodule's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Populated {
    /// It has the commit already.
    Unchanged,
    /// A checkout as `git submodule update --init` makes it.
    CheckedOut,
    /// The files alone, in a project that is no git repository.
    Exported,
    /// It has something of its own, and was left alone (a warning was given).
    Kept,
}

/// Gives the project's submodule folder `dest` the pinned commit, if it is missing or empty or our own export: a real
/// checkout in a git repository, else the files. Anything else is left alone.
///
/// # Errors
/// [`SourceError`]; the folder is then as it was.
pub fn populate_submodule(world: &World, spec: &GitSpec, pin: &GitPin, dest: &Path) -> Result<Populated, SourceError> {
    let commit = pin.commit;
    let keep = |why: &str| {
        world.task.warn(format!("`{}` is left as it is: {why}", dest.display()));
        Ok(Populated::Kept)
    };
    match state(world, dest)? {
        State::Checkout(head) if head == Some(commit) => Ok(Populated::Unchanged),
        State::Checkout(_) => keep(&format!("it is checked out at another commit than the lockfile's `{commit}`")),
        State::Export { commit: old, clean: true } if old == commit => Ok(Populated::Unchanged),
        State::Export { clean: true, .. } => export(world, spec, commit, dest),
        State::Export { clean: false, .. } => keep("its files were changed"),
        State::Foreign => keep("it is neither a git checkout nor our own export"),
        State::Empty => match spec.submodule.as_ref().map(|path| look(world, path)).transpose()?.flatten() {
            Some(found) if found.gitlink == Some(commit) => check_out(world, spec, commit, &found),
            Some(found) if found.gitlink.is_some() || found.is_top => {
                check(world, spec, commit, true).map(|()| Populated::Kept)
            }
            _ => export(world, spec, commit, dest),
        },
    }
}

enum State {
    Empty,
    Checkout(Option<Commit>),
    Export { commit: Commit, clean: bool },
    Foreign,
}

fn state(world: &World, dest: &Path) -> Result<State, SourceError> {
    if !fs::exists(dest) {
        return Ok(State::Empty);
    }
    if !fs::metadata(dest)?.is_dir() {
        return Ok(State::Foreign);
    }
    if fs::read_dir(dest)?.is_empty() {
        return Ok(State::Empty);
    }
    if fs::exists(&dest.join(".git")) {
        let head = Git::at(world, dest).args(&["rev-parse", "HEAD"]).try_run()?;
        let head = head.filter(|output| output.status.success()).and_then(|output| output.stdout.trim().parse().ok());
        return Ok(State::Checkout(head));
    }
    let Ok(marker) = fs::read_bounded(&dest.join(MARKER), 4096) else { return Ok(State::Foreign) };
    let marker = String::from_utf8_lossy(&marker).into_owned();
    let line = |name: &str| marker.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    let (Some(commit), Some(digest)) = (line("commit ").and_then(|text| text.parse().ok()), line("files ")) else {
        return Ok(State::Foreign);
    };
    let clean = scan(world, dest)?.is_some_and(|now| now.to_string() == digest);
    Ok(State::Export { commit, clean })
}

/// The digest of what is in an export, without its marker; `None` when there is something no export has.
fn scan(world: &World, folder: &Path) -> Result<Option<Digest>, SourceError> {
    let mut listing = match Listing::scan(folder, &Modes::default(), world.task.cancel()) {
        Ok(listing) => listing,
        Err(TreeError::Cancelled(cancelled)) => return Err(cancelled.into()),
        Err(TreeError::Fs(error)) => return Err(error.into()),
        Err(_) => return Ok(None),
    };
    listing.0.retain(|path, _| path.as_str() != MARKER);
    Ok(Some(listing.digest()))
}

fn export(world: &World, spec: &GitSpec, commit: Commit, dest: &Path) -> Result<Populated, SourceError> {
    let folder = fs::parent(dest);
    fs::create_dir_all(folder)?;
    let make = tempfile::Builder::new().prefix(".aitools-").tempdir_in(folder);
    let staged = make.map_err(|error| fs::FsError::new("create a folder in", folder, error))?;
    let new = staged.path().join("new");
    fs::create_dir_all(&new)?;
    let whole = GitSpec { subdir: None, submodules: Vec::new(), ..spec.clone() };
    GitSource(&whole).export(world, commit, &new)?;
    let digest = scan(world, &new)?.map(|digest| digest.to_string()).unwrap_or_default();
    let text = format!("written by aitools; delete this folder to get it anew\ncommit {commit}\nfiles {digest}\n");
    fs::write_atomic(&new.join(MARKER), text.as_bytes())?;
    if fs::exists(dest) {
        fs::rename(dest, &staged.path().join("old"))?;
    }
    fs::rename(&new, dest)?;
    Ok(Populated::Exported)
}

/// `git submodule update --init` from a repository of this run that serves the objects on this machine.
fn check_out(world: &World, spec: &GitSpec, commit: Commit, found: &Submodule) -> Result<Populated, SourceError> {
    let session = Session::new(world)?;
    let ask = Ask { address: spec.git.as_str(), commit, name: ref_name(spec), beside: None };
    let served = Repository::serving(world, &session.objects(&ask, false)?, commit)?;
    let Ok(address) = url::Url::from_file_path(served.path()) else {
        let what = format!("`{}`", served.path().display());
        let why = "git needs an absolute path in Unicode".to_owned();
        return Err(SourceError::Missing { what, why, hint: None });
    };
    let git = Git::at(world, &found.top)
        .setting(&format!("url.{address}.insteadOf"), found.url.as_deref().unwrap_or(spec.git.as_str()))
        .setting("protocol.file.allow", "always")
        .setting("advice.detachedHead", "false")
        .env("GIT_LITERAL_PATHSPECS", "1")
        .args(&["submodule", "--quiet", "update", "--init", "--depth=1", "--", &found.path]);
    git.run()?.map(|_| Populated::CheckedOut).map_err(|messages| SourceError::Tool {
        what: format!("checking out the submodule `{}`", found.path),
        why: format!("git says: {messages}"),
        hint: Some(format!("try `git submodule update --init {}`", found.path)),
    })
}

//! Which folder holds a commit's objects: the repository itself when it is on this machine, a checkout of it, or a cache
//! under the scratch folder that is filled from the network.
//!
//! `git` fetches into a repository that is made for this one fetch; then its packs move into the cache. A cache is only a
//! folder of objects, shared by runs and processes, one for each address. `git` never runs in it, and nothing in it is
//! trusted: libgit2 hashes objects when it reads them, and a damaged cache is deleted and filled again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tempfile::TempDir;

use super::address::{self, Way};
use super::complaint::{Complaint, explain};
use super::program::Git;
use crate::base::commit::Commit;
use crate::base::diagnostic;
use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::http::pause;
use crate::base::lock;
use crate::format::manifest::GitSpec;
use crate::report::{Progress, Unit, Verb};
use crate::source::{SourceError, World};

/// Pauses before another try when the connection broke or the server failed.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(1500)];
/// Characters of an http address that must be escaped; those beyond ASCII always are.
const NOT_IN_ADDRESSES: &AsciiSet =
    &CONTROLS.add(b' ').add(b'"').add(b'<').add(b'>').add(b'\\').add(b'^').add(b'`').add(b'{').add(b'|').add(b'}');
const EVERYTHING: [&str; 2] = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"];
/// Errors in old commits that many well-known repositories have. They are harmless, and only the history has them.
const OLD_ERRORS: [&str; 5] =
    ["zeroPaddedFilemode", "badTimezone", "missingSpaceBeforeDate", "missingSpaceBeforeEmail", "badDateOverflow"];

/// A branch, tag or HEAD of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Ref {
    name: String,
    /// The commit; that of an annotated tag, not the tag itself.
    commit: Commit,
}

/// Access to repositories for one piece of work.
#[derive(Debug)]
pub struct Session<'w> {
    pub world: &'w World,
    /// Empty: `git` works here when it needs no repository.
    nowhere: TempDir,
}

/// One commit of one repository.
#[derive(Debug)]
pub struct Ask<'a> {
    /// As the manifest or `.gitmodules` has it.
    pub address: &'a str,
    pub commit: Commit,
    /// The branch or tag that should lead to it, by its full name.
    pub name: Option<String>,
    /// The objects of a checkout that may have it already.
    pub beside: Option<PathBuf>,
}

impl Ask<'_> {
    fn what(&self) -> String {
        format!("commit `{}` of `{}`", self.commit, address::without_user(self.address))
    }
}

/// The full name of the ref that a request names; `None` for a commit.
pub fn ref_name(spec: &GitSpec) -> Option<String> {
    match (&spec.rev, &spec.tag, &spec.branch) {
        (Some(_), ..) => None,
        (None, Some(tag), _) => Some(format!("refs/tags/{tag}")),
        (None, None, Some(branch)) => Some(format!("refs/heads/{branch}")),
        (None, None, None) => Some("HEAD".to_owned()),
    }
}

impl<'w> Session<'w> {
    /// # Errors
    /// When the scratch folder cannot be written.
    pub fn new(world: &'w World) -> Result<Self, SourceError> {
        Ok(Self { world, nowhere: temporary(&folder(world)?, "nowhere-")? })
    }

    /// `git` outside of every repository.
    fn git(&self) -> Git<'w> {
        Git::with_repository(self.world, &self.nowhere.path().join("none"))
    }

    /// Where an address leads, after the manifest's mirrors and git's `insteadOf`. The address of a remote repository is
    /// given as it was before `insteadOf`, which `git` applies itself.
    fn way(&self, address: &str) -> Result<Way, SourceError> {
        let wrong = |why: &str| SourceError::Missing {
            what: format!("`{}`", address::without_user(address)),
            why: format!("not the address of a git repository: {why}"),
            hint: None,
        };
        let mirrored = self.world.mirrored(address);
        let way = Way::of(&mirrored, &self.world.project).map_err(wrong)?;
        let rewritten = self.git().args(&["ls-remote", "--get-url", "--", &mirrored]).try_run()?;
        let Some(rewritten) = rewritten.filter(|output| output.status.success()) else { return Ok(way) };
        let rewritten = rewritten.stdout.strip_suffix('\n').unwrap_or(&rewritten.stdout);
        Ok(match Way::of(rewritten, &self.world.project).map_err(wrong)? {
            Way::Remote(_) if mirrored.starts_with("http") => {
                Way::Remote(utf8_percent_encode(&mirrored, NOT_IN_ADDRESSES).to_string())
            }
            Way::Remote(_) => Way::Remote(mirrored),
            local @ Way::Local(_) => local,
        })
    }

    /// The commit that a branch, a tag or HEAD names today.
    ///
    /// # Errors
    /// [`SourceError::Missing`] when there is none of that name; offline, for everything not on this machine.
    pub fn look_up(&self, spec: &GitSpec) -> Result<Commit, SourceError> {
        let name = ref_name(spec).unwrap_or_default();
        let what = format!("`{}` of `{}`", name, address::without_user(spec.git.as_str()));
        let find = |refs: &[Ref]| refs.iter().find(|found| found.name == name).map(|found| found.commit);
        let refs = match self.way(spec.git.as_str())? {
            Way::Local(folder) => local_refs(&folder)?,
            Way::Remote(_) if self.world.offline => return Err(SourceError::Offline { what }),
            Way::Remote(address) => {
                let peeled = format!("{name}^{{}}");
                if let Some(commit) = find(&self.remote_refs(&address, &[&name, &peeled])?) {
                    return Ok(commit);
                }
                self.remote_refs(&address, &[])?
            }
        };
        find(&refs).ok_or_else(|| no_ref(what, &name, &refs))
    }

    /// The refs that match the patterns of `git ls-remote`; all of them without patterns.
    fn remote_refs(&self, address: &str, patterns: &[&str]) -> Result<Vec<Ref>, SourceError> {
        let git = self.with_ssh(self.git(), address)?.args(&["ls-remote", "--", address]).args(patterns);
        let listed = self.again(|| git.run())?.map_err(|messages| explain(address, &messages))?;
        let mut refs: Vec<Ref> = Vec::new();
        for line in listed.lines() {
            let Some((commit, name)) = line.split_once('\t') else { continue };
            let Ok(commit) = commit.parse() else { continue };
            match name.strip_suffix("^{}") {
                Some(_) => refs.iter_mut().rev().take(1).for_each(|last| last.commit = commit),
                None => refs.push(Ref { name: name.to_owned(), commit }),
            }
        }
        Ok(refs)
    }

    /// Repeats what failed because the connection broke or the server is overloaded.
    fn again<T>(
        &self,
        work: impl Fn() -> Result<Result<T, String>, SourceError>,
    ) -> Result<Result<T, String>, SourceError> {
        for delay in PAUSES {
            match work()? {
                Err(messages) if Complaint::of(&messages) == Complaint::Passing => {
                    pause(self.world.task.cancel(), delay)?;
                }
                done => return Ok(done),
            }
        }
        work()
    }

    /// Keeps ssh from asking questions, unless the user has set another command for it.
    fn with_ssh<'a>(&self, git: Git<'a>, address: &str) -> Result<Git<'a>, SourceError> {
        let env = &self.world.env;
        if address.starts_with("http") || env.contains_key("GIT_SSH_COMMAND") || env.contains_key("GIT_SSH") {
            return Ok(git);
        }
        let set = self.git().args(&["config", "--get", "core.sshCommand"]).try_run()?;
        if set.is_some_and(|output| output.status.success()) {
            return Ok(git);
        }
        Ok(git.env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=30 -oServerAliveInterval=30"))
    }

    /// A folder of objects that has the commit, filled from the network if need be. With `fresh`, what is on this machine
    /// turned out to be damaged: everything is fetched again.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn objects(&self, ask: &Ask<'_>, fresh: bool) -> Result<PathBuf, SourceError> {
        let address = match self.way(ask.address)? {
            Way::Remote(address) => address,
            Way::Local(folder) => {
                let objects = open_local(&folder)?.commondir().join("objects");
                return has(&objects, ask.commit).then_some(objects).ok_or_else(|| not_there(ask, "it is not there"));
            }
        };
        if let Some(objects) = ask.beside.as_ref().filter(|objects| !fresh && has(objects, ask.commit)) {
            return Ok(objects.clone());
        }
        let shown = address::without_user(ask.address);
        let name = Digest::of(shown.as_bytes()).hex()[..20].to_owned();
        let cache = folder(self.world)?.join(&name);
        let waiting = || self.world.task.waiting(format!("another process that fetches `{shown}`"));
        let held = lock::acquire(&cache.with_extension("lock"), self.world.task.cancel(), waiting)?;
        let objects = cache.join("objects");
        if !fresh && has(&objects, ask.commit) {
            return Ok(objects);
        }
        if self.world.offline {
            return Err(SourceError::Offline { what: ask.what() });
        }
        if fresh {
            fs::remove_dir_all(&cache)?;
        }
        let prefix = format!("{name}.new-");
        if held.excludes() {
            remove_leftovers(&cache, &prefix)?;
        }
        let packs = objects.join("pack");
        fs::create_dir_all(&packs)?;
        let progress = self.world.task.start(Verb::Fetch, shown, None, Unit::Bytes);
        let received = self.download(ask, &address, &prefix, &progress)?;
        received.move_packs(&packs)?;
        progress.finish("");
        Ok(objects)
    }

    /// Fetches the commit alone; where the server does not allow that, the branches and tags that may lead to it.
    fn download(
        &self,
        ask: &Ask<'_>,
        address: &str,
        prefix: &str,
        progress: &Progress,
    ) -> Result<Repository, SourceError> {
        let fetch = |refspecs: &[&str], alone: bool| {
            self.again(|| {
                let repository = Repository::new(&folder(self.world)?, prefix)?;
                let git = self.with_ssh(Git::with_repository(self.world, repository.path()), address)?;
                let git = git.args(&["fetch", "--progress", "--no-tags", "--no-write-fetch-head"]);
                let git = match alone {
                    true => git.args(&["--depth=1"]),
                    false => {
                        OLD_ERRORS.iter().fold(git, |git, error| git.setting(&format!("fetch.fsck.{error}"), "warn"))
                    }
                };
                let done = git.args(&["--", address]).args(refspecs).transfer(repository.path(), progress)?;
                Ok(done.map(|()| repository))
            })
        };
        let refused = match fetch(&[&ask.commit.to_string()], true)? {
            Ok(repository) if has(&repository.objects(), ask.commit) => return Ok(repository),
            Ok(_) => return Err(another(ask)),
            Err(messages) => messages,
        };
        match Complaint::of(&refused) {
            Complaint::NoCommit => return Err(not_there(ask, &format!("git says: {refused}"))),
            Complaint::NotAlone => {}
            _ => return Err(explain(address, &refused)),
        }
        let named = ask.name.as_ref().map(|name| vec![name.as_str()]);
        for refspecs in named.into_iter().chain([EVERYTHING.to_vec()]) {
            match fetch(&refspecs, false)? {
                Ok(repository) if has(&repository.objects(), ask.commit) => return Ok(repository),
                Ok(_) => {}
                // The branch or tag is gone; others may lead to the commit.
                Err(messages) if Complaint::of(&messages) == Complaint::NoCommit => {}
                Err(messages) => return Err(explain(address, &messages)),
            }
        }
        let why = format!("no branch or tag of the repository leads to it (asked for it alone, git says: {refused})");
        Err(not_there(ask, &why))
    }
}

/// The folder of all caches, as an absolute path.
fn folder(world: &World) -> Result<PathBuf, FsError> {
    let folder = world.scratch.join("git");
    fs::create_dir_all(&folder)?;
    std::path::absolute(&folder).map_err(|error| FsError::new("find", &folder, error))
}

fn temporary(folder: &Path, prefix: &str) -> Result<TempDir, FsError> {
    let made = tempfile::Builder::new().prefix(prefix).tempdir_in(folder);
    made.map_err(|error| FsError::new("create a folder in", folder, error))
}

/// Removes the repositories of fetches that were killed. The cache's lock is held.
fn remove_leftovers(cache: &Path, prefix: &str) -> Result<(), FsError> {
    for path in fs::read_dir(fs::parent(cache))? {
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)) {
            fs::remove_dir_all(&path)?;
        }
    }
    Ok(())
}

/// A bare repository that this run made and that is deleted when dropped: every file that `git` reads its settings from is
/// ours.
#[derive(Debug)]
pub struct Repository(TempDir);

impl Repository {
    /// # Errors
    /// When it cannot be written.
    pub fn new(folder: &Path, prefix: &str) -> Result<Self, FsError> {
        let made = Self(temporary(folder, prefix)?);
        fs::create_dir_all(&made.objects().join("pack"))?;
        fs::create_dir_all(&made.objects().join("info"))?;
        fs::create_dir_all(&made.path().join("refs"))?;
        fs::write_atomic(&made.path().join("HEAD"), b"ref: refs/heads/main\n")?;
        fs::write_atomic(&made.path().join("config"), b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n")?;
        Ok(made)
    }

    /// A repository that serves one commit, without history, from a folder of objects.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn serving(world: &World, objects: &Path, commit: Commit) -> Result<Self, FsError> {
        let made = Self::new(&folder(world)?, "serve-")?;
        let objects = fs::canonical(objects)?.to_string_lossy().replace('\\', "/");
        fs::write_atomic(&made.objects().join("info/alternates"), format!("{objects}\n").as_bytes())?;
        fs::write_atomic(&made.path().join("shallow"), format!("{commit}\n").as_bytes())?;
        let config =
            b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n[uploadpack]\n\tallowAnySHA1InWant = true\n";
        fs::write_atomic(&made.path().join("config"), config)?;
        Ok(made)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn objects(&self) -> PathBuf {
        self.path().join("objects")
    }

    /// Moves the packs, which `git` has checked, to a folder of packs: the index last, since it makes a pack visible.
    fn move_packs(&self, to: &Path) -> Result<(), FsError> {
        for ending in ["pack", "idx"] {
            for from in fs::read_dir(&self.objects().join("pack"))? {
                let name = from.file_name().filter(|_| from.extension().is_some_and(|found| found == ending));
                if let Some(name) = name {
                    fs::rename(&from, &to.join(name))?;
                }
            }
        }
        Ok(())
    }
}

fn not_there(ask: &Ask<'_>, why: &str) -> SourceError {
    let hint = match &ask.name {
        Some(name) => format!("was `{name}` rewritten? `aitools lock --upgrade` resolves it again"),
        None => "check the commit; it may never have been pushed, or a rewritten branch has left it behind".to_owned(),
    };
    SourceError::Missing { what: ask.what(), why: why.to_owned(), hint: Some(hint) }
}

fn another(ask: &Ask<'_>) -> SourceError {
    let why = "the server did not send the requested commit".to_owned();
    SourceError::Hostile { what: ask.what(), why }
}

fn no_ref(what: String, name: &str, refs: &[Ref]) -> SourceError {
    if refs.is_empty() {
        return SourceError::Missing { what, why: "the repository is empty".to_owned(), hint: None };
    }
    let short =
        |name: &str| name.rsplit_once("refs/heads/").or(name.rsplit_once("refs/tags/")).map(|(_, s)| s.to_owned());
    let wanted = short(name).unwrap_or_default();
    let twin = refs.iter().find(|found| short(&found.name).as_deref() == Some(&wanted));
    let names: Vec<String> = refs.iter().filter_map(|found| short(&found.name)).collect();
    let hint = match twin {
        Some(twin) if twin.name.starts_with("refs/tags/") => {
            Some(format!("there is a tag of that name: write `tag = \"{wanted}\"`"))
        }
        Some(_) => Some(format!("there is a branch of that name: write `branch = \"{wanted}\"`")),
        None => {
            diagnostic::nearest(&wanted, names.iter().map(String::as_str)).map(|near| format!("did you mean `{near}`?"))
        }
    };
    SourceError::Missing { what, why: "the repository has no such branch or tag".to_owned(), hint }
}

/// Whether a folder of objects has the commit. What it needs is found missing when it is read.
fn has(objects: &Path, commit: Commit) -> bool {
    let look = || -> Option<bool> {
        let odb = git2::Odb::new().ok()?;
        odb.add_disk_alternate(objects.to_str()?).ok()?;
        Some(odb.exists(commit.to_string().parse().ok()?))
    };
    look().unwrap_or(false)
}

fn open_local(folder: &Path) -> Result<git2::Repository, SourceError> {
    let opened = git2::Repository::open_ext(folder, git2::RepositoryOpenFlags::NO_SEARCH, [] as [&Path; 0]);
    opened.map_err(|error| match (error.class(), error.code()) {
        // The system's error, not the repository's.
        (git2::ErrorClass::Os, code) if code != git2::ErrorCode::NotFound => {
            FsError::new("open git repository", folder, std::io::Error::other(error.message().to_owned())).into()
        }
        (_, code) => SourceError::Missing {
            what: format!("`{}`", folder.display()),
            why: format!("no readable git repository: {}", error.message()),
            hint: (code == git2::ErrorCode::Owner).then(|| {
                format!("if you trust its owner: `git config --global --add safe.directory '{}'`", folder.display())
            }),
        },
    })
}

fn local_refs(folder: &Path) -> Result<Vec<Ref>, SourceError> {
    let repo = open_local(folder)?;
    let broken = |error: git2::Error| SourceError::Missing {
        what: format!("`{}`", folder.display()),
        why: format!("its branches cannot be read: {}", error.message()),
        hint: None,
    };
    let head = repo.head().ok().and_then(|head| head.peel_to_commit().ok());
    let named = |name: &str, commit: &git2::Commit<'_>| {
        Some(Ref { name: name.to_owned(), commit: commit.id().to_string().parse().ok()? })
    };
    let mut refs: Vec<Ref> = head.and_then(|commit| named("HEAD", &commit)).into_iter().collect();
    for reference in repo.references().map_err(broken)? {
        let reference = reference.map_err(broken)?;
        if let (Ok(name), Ok(commit)) = (reference.name(), reference.peel_to_commit()) {
            refs.extend(named(name, &commit));
        }
    }
    Ok(refs)
}

/// The objects of the repository that is checked out at `folder`, wherever its `.git` file points.
pub fn objects_of_checkout(folder: &Path) -> Option<PathBuf> {
    let repo = git2::Repository::open_ext(folder, git2::RepositoryOpenFlags::NO_SEARCH, [] as [&Path; 0]).ok()?;
    Some(repo.commondir().join("objects"))
}

/// Everything readable below several folders of objects, as one repository without refs.
pub fn join_objects(folders: &[PathBuf]) -> Result<git2::Repository, git2::Error> {
    let odb = git2::Odb::new()?;
    for folder in folders {
        let path = folder.to_str().ok_or_else(|| git2::Error::from_str("the path is not Unicode"))?;
        odb.add_disk_alternate(path)?;
    }
    git2::Repository::from_odb(odb)
}

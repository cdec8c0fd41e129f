//! Which folder holds a commit's objects: the repository itself when it is on this machine, a checkout of it, or a mirror
//! under the scratch folder that is filled from the network.
//!
//! A mirror is a bare repository that runs and processes share, one for each address. Nothing in it is trusted: objects
//! are hashed when they are read, and a damaged mirror is deleted and filled anew.

use std::path::{Path, PathBuf};

use super::address::{self, Way};
use super::http::Http;
use super::pack::Guard;
use super::program::{Configuration, Git};
use super::protocol::{Channel, FetchError, Ref, Remote, is_commit};
use crate::base::diagnostic;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::lock;
use crate::format::manifest::GitSpec;
use crate::source::{SourceError, World};

/// How many commits are asked for at most, where a server gives no single one.
const MAX_WANTS: usize = 100_000;
/// How often a pack is asked for when the connection breaks while it comes.
const MAX_TRIES: u32 = 3;
const EVERYTHING: [&str; 2] = ["refs/heads/", "refs/tags/"];

/// Repositories as seen from one machine, for one piece of work.
#[derive(Debug)]
pub struct Session<'w> {
    pub world: &'w World,
    configuration: Configuration,
}

/// One commit of one repository.
#[derive(Debug)]
pub struct Ask<'a> {
    /// As the manifest or `.gitmodules` has it.
    pub address: &'a str,
    pub commit: &'a str,
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
    /// When git's configuration is broken.
    pub fn new(world: &'w World) -> Result<Self, SourceError> {
        Ok(Self { world, configuration: Configuration::read(world)? })
    }

    /// Where an address really leads, after the manifest's mirrors and git's own rewriting. For the program `git`, which
    /// does its own, the address is left before that.
    fn way(&self, address: &str) -> Result<Way, SourceError> {
        let mirrored = self.world.mirrored(address);
        let way = Way::of(&self.configuration.rewrite(&mirrored), &self.world.project);
        let way = way.map_err(|why| SourceError::Missing {
            what: format!("`{}`", address::without_user(address)),
            why: format!("this is no address of a git repository: {why}"),
            hint: None,
        })?;
        Ok(if matches!(way, Way::Program(_)) { Way::Program(mirrored) } else { way })
    }

    /// The commit that a branch, a tag or HEAD names today.
    ///
    /// # Errors
    /// [`SourceError::Missing`] when there is none of that name; offline, for everything not on this machine.
    pub fn look_up(&self, spec: &GitSpec) -> Result<String, SourceError> {
        let name = ref_name(spec).unwrap_or_default();
        let what = format!("`{}` of `{}`", name, address::without_user(&spec.git));
        let find = |refs: &[Ref]| refs.iter().find(|found| found.name == name).map(|found| found.commit.clone());
        let refs = match self.way(&spec.git)? {
            Way::Local(folder) => local_refs(&folder)?,
            _ if self.world.offline => return Err(SourceError::Offline { what }),
            Way::Http(address) => {
                let mut remote = Remote::connect(Http::new(self.world, &self.configuration, &address)?)?;
                if let Some(commit) = find(&remote.refs(&[&name])?) {
                    return Ok(commit);
                }
                remote.refs(&EVERYTHING)?
            }
            Way::Program(address) => self.program_refs(&address)?,
        };
        find(&refs).ok_or_else(|| no_ref(what, &name, &refs))
    }

    fn program_refs(&self, address: &str) -> Result<Vec<Ref>, SourceError> {
        let git = self.ssh(Git::nowhere(self.world));
        let listed = git.args(&["ls-remote", "--", address]).run("ssh and git addresses are fetched by it")?;
        let listed = listed.map_err(|why| failed(address, why))?;
        let mut refs: Vec<Ref> = Vec::new();
        for line in listed.lines() {
            let Some((commit, name)) = line.split_once('\t').filter(|(commit, _)| is_commit(commit)) else { continue };
            match name.strip_suffix("^{}") {
                Some(_) => refs.iter_mut().rev().take(1).for_each(|last| last.commit = commit.to_owned()),
                None => refs.push(Ref { name: name.to_owned(), commit: commit.to_owned() }),
            }
        }
        Ok(refs)
    }

    /// Nobody may be there to answer ssh's questions.
    fn ssh<'a>(&self, git: Git<'a>) -> Git<'a> {
        let set = ["GIT_SSH_COMMAND", "GIT_SSH"].iter().any(|name| self.world.env.contains_key(*name));
        if set || self.configuration.has("core.sshcommand") {
            return git;
        }
        git.env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes")
    }

    /// A folder of objects that has the commit, filled from the network if need be. With `fresh`, what is on this machine
    /// has turned out to be damaged: everything is fetched anew.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn objects(&self, ask: &Ask<'_>, fresh: bool) -> Result<PathBuf, SourceError> {
        let way = self.way(ask.address)?;
        if let Way::Local(folder) = &way {
            let objects = open_local(folder)?.commondir().join("objects");
            return has(&objects, ask.commit).then_some(objects).ok_or_else(|| not_there(ask, "it is not there"));
        }
        if let Some(objects) = ask.beside.as_ref().filter(|objects| !fresh && has(objects, ask.commit)) {
            return Ok(objects.clone());
        }
        let mirror = self.mirror(ask.address);
        let waiting = || {
            self.world.task.waiting(format!("another process that fetches `{}`", address::without_user(ask.address)));
        };
        let _held = lock::acquire(&mirror.with_extension("lock"), self.world.task.cancel(), waiting)?;
        let objects = mirror.join("objects");
        if !fresh && has(&objects, ask.commit) {
            return Ok(objects);
        }
        if self.world.offline {
            return Err(SourceError::Offline { what: ask.what() });
        }
        if fresh {
            fs::remove_dir_all(&mirror)?;
        }
        prepare(&mirror)?;
        match way {
            Way::Http(address) => self.download(ask, &address, &mirror)?,
            Way::Program(address) => self.download_by_program(ask, &address, &mirror)?,
            Way::Local(_) => {}
        }
        Ok(objects)
    }

    fn mirror(&self, address: &str) -> PathBuf {
        let name = Digest::of(address::without_user(address).as_bytes()).hex();
        self.world.scratch.join("git").join(&name[..20])
    }

    fn download(&self, ask: &Ask<'_>, address: &str, mirror: &Path) -> Result<(), SourceError> {
        let mut remote = Remote::connect(Http::new(self.world, &self.configuration, address)?)?;
        let alone = [ask.commit.to_owned()];
        let Some(refused) = self.receive(ask, &mut remote, (&alone, true), mirror)? else {
            return if has(&mirror.join("objects"), ask.commit) { Ok(()) } else { Err(another(ask)) };
        };
        if remote.is_final(&refused) {
            return Err(not_there(ask, &format!("the server says: {refused}")));
        }
        // A server that gives no commit by its name: take what its branches and tags have, and look there.
        let first: Vec<&str> = ask.name.as_deref().into_iter().collect();
        for prefixes in [first.as_slice(), &EVERYTHING].into_iter().filter(|prefixes| !prefixes.is_empty()) {
            let mut commits: Vec<String> = remote.refs(prefixes)?.into_iter().map(|found| found.commit).collect();
            commits.sort();
            commits.dedup();
            if commits.is_empty() || commits.len() > MAX_WANTS {
                continue;
            }
            if let Some(words) = self.receive(ask, &mut remote, (&commits, false), mirror)? {
                return Err(failed(ask.address, format!("the server says: {words}")));
            }
            if has(&mirror.join("objects"), ask.commit) {
                return Ok(());
            }
        }
        let why =
            format!("no branch or tag of the repository leads to it (asked for it alone, the server says: {refused})");
        Err(not_there(ask, &why))
    }

    /// Receives commits, with or without their history, again when the connection breaks on the way. Gives the server's
    /// words when it refuses.
    fn receive<C: Channel>(
        &self,
        ask: &Ask<'_>,
        remote: &mut Remote<C>,
        (commits, shallow): (&[String], bool),
        mirror: &Path,
    ) -> Result<Option<String>, SourceError> {
        let packs = mirror.join("objects").join("pack");
        let mut tries = 0;
        loop {
            tries += 1;
            let mut sink = Guard::new(&self.world.task, &address::without_user(ask.address), &packs)?;
            match remote.fetch(commits, shallow, &mut sink) {
                Ok(cut) => {
                    sink.finish()?;
                    mark_shallow(mirror, &cut)?;
                    return Ok(None);
                }
                Err(FetchError::Refused(words)) => return Ok(Some(words)),
                Err(FetchError::Broken(error)) if tries == MAX_TRIES || self.world.task.check().is_err() => {
                    return Err(error);
                }
                Err(FetchError::Broken(_)) => {}
                Err(FetchError::Other(error)) => return Err(error),
            }
        }
    }

    fn download_by_program(&self, ask: &Ask<'_>, address: &str, mirror: &Path) -> Result<(), SourceError> {
        let objects = mirror.join("objects");
        let folder = mirror.to_string_lossy();
        let fetch = |args: &[&str]| {
            let git = Git::at(self.world, mirror).setting("gc.auto", "0").setting("maintenance.auto", "false");
            let common = ["--git-dir", &*folder, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head"];
            self.ssh(git).args(&common).args(args).run("ssh and git addresses are fetched by it")
        };
        let progress = self.world.task.start("fetching", address, None, crate::report::Unit::None);
        let alone = fetch(&["--depth=1", "--", address, ask.commit])?;
        if alone.is_ok() && has(&objects, ask.commit) {
            progress.finish("done");
            return Ok(());
        }
        let all = fetch(&["--", address, "+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"])?;
        all.map_err(|why| failed(address, why))?;
        if !has(&objects, ask.commit) {
            let why = format!("no branch or tag leads to it (asked for it alone: {})", alone.err().unwrap_or_default());
            return Err(not_there(ask, &why));
        }
        progress.finish("done");
        Ok(())
    }
}

fn failed(address: &str, why: String) -> SourceError {
    SourceError::Network { what: format!("`{}`", address::without_user(address)), why, hint: None }
}

fn not_there(ask: &Ask<'_>, why: &str) -> SourceError {
    let hint = match &ask.name {
        Some(name) => format!("was `{name}` rewritten? `aitools lock --upgrade` takes what it names today"),
        None => "check the commit; it may never have been pushed, or a rewritten branch has left it behind".to_owned(),
    };
    SourceError::Missing { what: ask.what(), why: why.to_owned(), hint: Some(hint) }
}

fn another(ask: &Ask<'_>) -> SourceError {
    let why = "the server sent something else than the commit it was asked for".to_owned();
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
fn has(objects: &Path, commit: &str) -> bool {
    let look = || -> Option<bool> {
        let odb = git2::Odb::new().ok()?;
        odb.add_disk_alternate(objects.to_str()?).ok()?;
        Some(odb.exists(commit.parse().ok()?))
    };
    look().unwrap_or(false)
}

fn open_local(folder: &Path) -> Result<git2::Repository, SourceError> {
    let opened = git2::Repository::open_ext(folder, git2::RepositoryOpenFlags::NO_SEARCH, [] as [&Path; 0]);
    opened.map_err(|error| SourceError::Missing {
        what: format!("`{}`", folder.display()),
        why: format!("there is no git repository that can be read: {}", error.message()),
        hint: (error.code() == git2::ErrorCode::Owner).then(|| {
            format!("if you trust its owner: `git config --global --add safe.directory '{}'`", folder.display())
        }),
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
    let head = head.map(|commit| Ref { name: "HEAD".to_owned(), commit: commit.id().to_string() });
    let mut refs: Vec<Ref> = head.into_iter().collect();
    for reference in repo.references().map_err(broken)? {
        let reference = reference.map_err(broken)?;
        if let (Ok(name), Ok(commit)) = (reference.name(), reference.peel_to_commit()) {
            refs.push(Ref { name: name.to_owned(), commit: commit.id().to_string() });
        }
    }
    Ok(refs)
}

/// Makes a mirror that is a repository for `git`, too, and removes what a killed run left. The lock is held.
fn prepare(mirror: &Path) -> Result<(), SourceError> {
    let packs = mirror.join("objects").join("pack");
    fs::create_dir_all(&packs)?;
    fs::create_dir_all(&mirror.join("refs"))?;
    fs::write_if_changed(&mirror.join("HEAD"), b"ref: refs/heads/main\n")?;
    fs::remove_file(&mirror.join("shallow.lock"))?;
    let config = b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n[uploadpack]\n\tallowAnySHA1InWant = true\n";
    fs::write_if_changed(&mirror.join("config"), config)?;
    for path in fs::read_dir(&packs)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("pack_git2_") || name.starts_with("tmp_") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Tells `git` which commits have no parents here.
fn mark_shallow(mirror: &Path, cut: &[String]) -> Result<(), SourceError> {
    let path = mirror.join("shallow");
    let old = fs::read_bounded(&path, 64 << 20).unwrap_or_default();
    let old = String::from_utf8_lossy(&old);
    let mut lines: Vec<&str> =
        old.lines().filter(|line| is_commit(line)).chain(cut.iter().map(String::as_str)).collect();
    lines.sort_unstable();
    lines.dedup();
    if !lines.is_empty() {
        fs::write_if_changed(&path, (lines.join("\n") + "\n").as_bytes())?;
    }
    Ok(())
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

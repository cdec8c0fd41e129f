//! One commit with the commits of its submodules: what lies at a path, what files there are, and writing them to a folder
//! as they are in the repository, byte for byte: no line endings are changed, no filter runs, LFS pointers stay pointers.
//!
//! Everything here comes from other people. Names that leave the folder, links that lead out of it, and trees without
//! measure are refused before anything is written.

use std::collections::{BTreeMap, HashSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use git2::{ErrorCode, ObjectType, Oid, Repository};

use super::mirror::join_objects;
use crate::base::cancel::Cancel;
use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::name::RelPath;
use crate::base::tree::{Entry, Listing, MAX_DEPTH, MAX_FILES, Mode};
use crate::source::SourceError;

/// The largest object, in bytes: it is held in memory as a whole.
const MAX_OBJECT_BYTES: u64 = 1 << 30;
/// The largest tree that is exported.
const MAX_TOTAL_BYTES: u64 = 8 << 30;
/// The largest `.gitmodules` that is read.
const MAX_MODULES_BYTES: usize = 1 << 20;

/// Why a snapshot could not be read.
#[derive(Debug)]
pub enum ReadError {
    /// Objects are missing or damaged: fetching them again may help.
    Damaged(String),
    Source(SourceError),
}

impl<E: Into<SourceError>> From<E> for ReadError {
    fn from(error: E) -> Self {
        Self::Source(error.into())
    }
}

pub struct Snapshot<'c> {
    /// For messages.
    what: String,
    folders: Vec<PathBuf>,
    repo: Repository,
    root: Oid,
    submodules: BTreeMap<RelPath, Oid>,
    cancel: &'c Cancel,
}

impl std::fmt::Debug for Snapshot<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("what", &self.what).field("root", &self.root).finish_non_exhaustive()
    }
}

/// Takes files in any order, then links: nothing can be written through a link of the same tree.
pub type Sink<'s> = dyn FnMut(&RelPath, Mode, &[u8]) -> Result<(), FsError> + 's;

fn damaged(error: &git2::Error) -> ReadError {
    ReadError::Damaged(error.message().to_owned())
}

impl<'c> Snapshot<'c> {
    /// # Errors
    /// [`ReadError`] when the commit cannot be read.
    pub fn open(what: &str, objects: PathBuf, commit: Commit, cancel: &'c Cancel) -> Result<Self, ReadError> {
        let folders = vec![objects];
        let repo = join_objects(&folders).map_err(|error| damaged(&error))?;
        let root = root_of(&repo, what, commit)?;
        Ok(Self { what: what.to_owned(), folders, repo, root, submodules: BTreeMap::new(), cancel })
    }

    /// Fills the place of a submodule.
    ///
    /// # Errors
    /// [`ReadError`] when its commit cannot be read.
    pub fn add(&mut self, path: &RelPath, objects: PathBuf, commit: Commit) -> Result<(), ReadError> {
        self.folders.push(objects);
        self.repo = join_objects(&self.folders).map_err(|error| damaged(&error))?;
        self.submodules.insert(path.clone(), root_of(&self.repo, &format!("submodule `{path}`"), commit)?);
        Ok(())
    }

    fn hostile(&self, why: String) -> ReadError {
        SourceError::Hostile { what: self.what.clone(), why }.into()
    }

    /// What lies at a path, through the submodules that were added.
    fn at(&self, path: &str) -> Result<Option<(Oid, ObjectType)>, ReadError> {
        let (mut tree, mut seen) = (self.root, String::new());
        let mut found = Some((tree, ObjectType::Tree));
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let entries = self.repo.find_tree(tree).map_err(|error| damaged(&error))?;
            let Some(entry) = entries.get_name(part) else { return Ok(None) };
            seen = if seen.is_empty() { part.to_owned() } else { format!("{seen}/{part}") };
            let kind = entry.kind().unwrap_or(ObjectType::Any);
            let inside = seen.parse().ok().and_then(|path: RelPath| self.submodules.get(&path));
            found = Some((entry.id(), kind));
            tree = match inside {
                Some(root) if kind == ObjectType::Commit && seen.len() < path.len() => *root,
                _ => entry.id(),
            };
            let last = seen.len() == path.len();
            if !last && kind != ObjectType::Tree && inside.is_none() {
                return Ok(None);
            }
        }
        Ok(found)
    }

    /// The commit that the tree names for a submodule.
    pub fn gitlink(&self, path: &RelPath) -> Result<Option<Commit>, ReadError> {
        let found = self.at(path.as_str())?.filter(|(_, kind)| *kind == ObjectType::Commit);
        Ok(found.and_then(|(id, _)| id.to_string().parse().ok()))
    }

    /// The text of `.gitmodules` at the root, or in the submodule at `under`.
    pub fn modules(&self, under: Option<&RelPath>) -> Result<String, ReadError> {
        let path = under.map_or(".gitmodules".to_owned(), |under| format!("{under}/.gitmodules"));
        let Some((id, ObjectType::Blob)) = self.at(&path)? else { return Ok(String::new()) };
        let odb = self.repo.odb().map_err(|error| damaged(&error))?;
        let (size, _) = odb.read_header(id).map_err(|error| damaged(&error))?;
        if size > MAX_MODULES_BYTES {
            return Err(self.hostile(format!("`{path}` has {size} bytes")));
        }
        let object = odb.read(id).map_err(|error| damaged(&error))?;
        Ok(String::from_utf8_lossy(object.data()).into_owned())
    }

    /// Every file below `subdir`, given to `sink` where it is `wanted`; others are listed without being read, as empty.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn walk(
        &self,
        subdir: Option<&RelPath>,
        wanted: &dyn Fn(&RelPath) -> bool,
        sink: &mut Sink<'_>,
    ) -> Result<Listing, ReadError> {
        let base = subdir.map_or("", RelPath::as_str);
        let start = match (self.at(base)?, subdir.and_then(|path| self.submodules.get(path))) {
            (_, Some(root)) => *root,
            (Some((id, ObjectType::Tree)), _) => id,
            _ => {
                let why = format!("it has no folder `{base}`");
                let hint = Some("check `subdir` in the manifest".to_owned());
                return Err(SourceError::Missing { what: self.what.clone(), why, hint }.into());
            }
        };
        let mut walk = Walk { snapshot: self, base, wanted, listing: Listing::default(), links: Vec::new(), bytes: 0 };
        walk.run(start, sink)?;
        let Walk { mut listing, links, .. } = walk;
        for (path, target) in links {
            let digest = Digest::of(target.as_bytes());
            listing.0.insert(path.clone(), Entry { mode: Mode::Symlink, size_bytes: target.len() as u64, digest });
            if wanted(&path) {
                sink(&path, Mode::Symlink, target.as_bytes())?;
            }
        }
        Ok(listing)
    }
}

fn root_of(repo: &Repository, what: &str, commit: Commit) -> Result<Oid, ReadError> {
    let id: Oid = commit.to_string().parse().map_err(|error: git2::Error| damaged(&error))?;
    match repo.find_commit(id) {
        Ok(commit) => Ok(commit.tree_id()),
        // A tag or a tree by this id: nothing that fetching again would change.
        Err(error) if error.code() == ErrorCode::NotFound && repo.find_object(id, None).is_ok() => {
            let why = format!("`{commit}` is not a commit");
            Err(SourceError::Missing { what: what.to_owned(), why, hint: None }.into())
        }
        Err(error) => Err(damaged(&error)),
    }
}

struct Walk<'a, 'c> {
    snapshot: &'a Snapshot<'c>,
    /// The folder that is exported, as a path in the repository.
    base: &'a str,
    wanted: &'a dyn Fn(&RelPath) -> bool,
    listing: Listing,
    links: Vec<(RelPath, String)>,
    bytes: u64,
}

impl Walk<'_, '_> {
    fn run(&mut self, start: Oid, sink: &mut Sink<'_>) -> Result<(), ReadError> {
        let mut folders = vec![(start, String::new(), 0)];
        let mut seen = 0;
        while let Some((tree, prefix, depth)) = folders.pop() {
            self.snapshot.cancel.check()?;
            seen += 1;
            if depth > MAX_DEPTH || seen > MAX_FILES {
                return Err(self
                    .snapshot
                    .hostile(format!("it has more than {MAX_DEPTH} levels or {MAX_FILES} folders")));
            }
            self.check_size(tree)?;
            let tree = self.snapshot.repo.find_tree(tree).map_err(|error| damaged(&error))?;
            let mut names = HashSet::new();
            for entry in &tree {
                let path = self.name(&prefix, entry.name_bytes(), &mut names)?;
                match entry.kind() {
                    Some(ObjectType::Tree) => folders.push((entry.id(), path.as_str().to_owned(), depth + 1)),
                    Some(ObjectType::Blob) => self.file(path, entry.id(), entry.filemode(), sink)?,
                    Some(ObjectType::Commit) => {
                        if let Some(root) = self.snapshot.submodules.get(&self.full(&path)) {
                            folders.push((*root, path.as_str().to_owned(), depth + 1));
                        }
                    }
                    _ => return Err(self.snapshot.hostile(format!("`{path}` is of an unknown type"))),
                }
                if self.listing.0.len() + self.links.len() > MAX_FILES {
                    return Err(self.snapshot.hostile(format!("it has more than {MAX_FILES} files")));
                }
            }
        }
        Ok(())
    }

    fn full(&self, path: &RelPath) -> RelPath {
        match self.base.parse::<RelPath>() {
            Ok(base) => base.join(path),
            Err(_) => path.clone(),
        }
    }

    fn name(&self, prefix: &str, name: &[u8], names: &mut HashSet<String>) -> Result<RelPath, ReadError> {
        let shown = String::from_utf8_lossy(name).into_owned();
        let refuse =
            |why: String| self.snapshot.hostile(format!("the name `{}` in `/{prefix}`: {why}", shown.escape_debug()));
        let name = std::str::from_utf8(name).map_err(|_| refuse("it is not Unicode".to_owned()))?;
        if name.contains('/') || is_dot_git(name) {
            return Err(refuse("it is not a name for a file".to_owned()));
        }
        if !names.insert(name.to_owned()) {
            return Err(refuse("it is there twice".to_owned()));
        }
        let full = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
        full.parse().map_err(|error: crate::base::name::RelPathError| refuse(error.why.to_owned()))
    }

    fn check_size(&self, id: Oid) -> Result<u64, ReadError> {
        let odb = self.snapshot.repo.odb().map_err(|error| damaged(&error))?;
        let (size, _) = odb.read_header(id).map_err(|error| damaged(&error))?;
        if size as u64 > MAX_OBJECT_BYTES {
            return Err(self.snapshot.hostile(format!("object `{id}` has {size} bytes, more than {MAX_OBJECT_BYTES}")));
        }
        Ok(size as u64)
    }

    fn file(&mut self, path: RelPath, id: Oid, mode: i32, sink: &mut Sink<'_>) -> Result<(), ReadError> {
        self.snapshot.cancel.check()?;
        let mode = match mode {
            0o120_000 => Mode::Symlink,
            mode if mode & 0o111 != 0 => Mode::Executable,
            _ => Mode::File,
        };
        let size_bytes = self.check_size(id)?;
        if mode != Mode::Symlink && !(self.wanted)(&path) {
            self.listing.0.insert(path, Entry { mode, size_bytes, digest: Digest::of(b"") });
            return Ok(());
        }
        self.bytes += size_bytes;
        if self.bytes > MAX_TOTAL_BYTES {
            return Err(self.snapshot.hostile(format!("its files have more than {MAX_TOTAL_BYTES} bytes together")));
        }
        let odb = self.snapshot.repo.odb().map_err(|error| damaged(&error))?;
        let object = odb.read(id).map_err(|error| damaged(&error))?;
        if mode == Mode::Symlink {
            let target = self.link(&path, object.data())?;
            self.links.push((path, target));
            return Ok(());
        }
        sink(&path, mode, object.data())?;
        let digest = Digest::of(object.data());
        self.listing.0.insert(path, Entry { mode, size_bytes, digest });
        Ok(())
    }

    fn link(&self, path: &RelPath, target: &[u8]) -> Result<String, ReadError> {
        let refuse = |why: &str| {
            let target = String::from_utf8_lossy(&target[..target.len().min(200)]).escape_debug().to_string();
            self.snapshot.hostile(format!("the link `{path}` to `{target}`: {why}"))
        };
        let text = std::str::from_utf8(target).map_err(|_| refuse("it is not Unicode"))?;
        stays_inside(path, text).map_err(refuse)?;
        Ok(text.to_owned())
    }
}

/// Whether a link can only lead to places below the root: `..` at its beginning alone, and not more often than there are
/// folders above it. (After a name, that name might be a link, and `..` would lead anywhere.)
fn stays_inside(path: &RelPath, target: &str) -> Result<(), &'static str> {
    if target.is_empty() || target.len() > RelPath::MAX_BYTES {
        return Err("it is empty or too long");
    }
    if target.starts_with('/') || target.contains(['\\', ':']) || target.chars().any(char::is_control) {
        return Err("it is absolute, or has a character that is not for paths");
    }
    let parts: Vec<&str> = target.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let up = parts.iter().take_while(|part| **part == "..").count();
    if parts[up..].contains(&"..") {
        return Err("it has `..` after a name");
    }
    let folders = path.as_str().matches('/').count();
    if up > folders { Err("it leads out of the folder") } else { Ok(()) }
}

/// `.git` in every spelling that some file system takes for it (see git's `verify_dotfile`, and CVE-2014-9390).
fn is_dot_git(name: &str) -> bool {
    let ignored =
        |c: char| matches!(c, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{206a}'..='\u{206f}' | '\u{feff}');
    let plain: String = name.chars().filter(|c| !ignored(*c)).flat_map(char::to_lowercase).collect();
    let stem = plain.split(':').next().unwrap_or_default().trim_end_matches([' ', '.']);
    matches!(stem, ".git" | "git~1")
}

/// Writes one file of a snapshot below `root`.
pub fn write(root: &Path, path: &RelPath, mode: Mode, bytes: &[u8]) -> Result<(), FsError> {
    let to = path.under(root);
    fs::create_dir_all(fs::parent(&to))?;
    if mode == Mode::Symlink {
        return fs::write_link(&String::from_utf8_lossy(bytes), &to);
    }
    let mut file = fs::create_new(&to)?;
    file.write_all(bytes).map_err(|error| FsError::new("write", &to, error))?;
    if mode == Mode::Executable { fs::set_executable(&to) } else { Ok(()) }
}

/// An entry of `.gitmodules`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Module {
    pub path: String,
    pub url: String,
}

/// The part of git's configuration format that `.gitmodules` is written in; includes are not followed.
pub fn parse_modules(text: &str) -> Vec<Module> {
    let mut modules: Vec<Module> = Vec::new();
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line.starts_with("[submodule ");
            if inside {
                modules.push(Module::default());
            }
        } else if let (true, Some((key, value)), Some(module)) = (inside, line.split_once('='), modules.last_mut()) {
            match key.trim().to_ascii_lowercase().as_str() {
                "path" => module.path = unquote(value),
                "url" => module.url = unquote(value),
                _ => {}
            }
        }
    }
    modules
}

fn unquote(value: &str) -> String {
    let (mut text, mut quoted, mut escaped) = (String::new(), false, false);
    for c in value.trim().chars() {
        match c {
            _ if escaped => {
                text.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            '#' | ';' if !quoted => break,
            _ => text.push(c),
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_stay() {
        let stays = |path: &str, target: &str| stays_inside(&path.parse().unwrap(), target).is_ok();
        for (path, target) in [("a", "b"), ("a/b", "../c"), ("a/b/c", "./../../é x/d"), ("a", "b//c/.")] {
            assert!(stays(path, target), "{path} {target}");
        }
        let out = [
            ("a", ".."),
            ("a", "../a"),
            ("a/b", "../../c"),
            ("a", "/etc"),
            ("a", "b/../.."),
            ("a/b", "c/../d"),
            ("a", "C:/x"),
            ("a", "..\\x"),
            ("a", ""),
            ("a/b", "x\0y"),
        ];
        for (path, target) in out {
            assert!(!stays(path, target), "{path} {target}");
        }
    }

    #[test]
    fn spellings_of_dot_git() {
        for name in [".git", ".GIT", "git~1", ".g\u{200c}it", ".git ", ".git.", ".git::$INDEX_ALLOCATION"] {
            assert!(is_dot_git(name), "{name:?}");
        }
        for name in [".gitignore", ".gitmodules", "git", ".github"] {
            assert!(!is_dot_git(name), "{name:?}");
        }
    }

    #[test]
    fn modules() {
        let text = "# x\n[submodule \"a\"]\n\tpath = a b # c\n\tURL = \"../é;x\" ; d\n[other]\n\tpath = no\n\
                    [submodule \"c\"]\n url=https://h/c\n path=c\n[submodule";
        let module = |path: &str, url: &str| Module { path: path.into(), url: url.into() };
        assert_eq!(parse_modules(text), [module("a b", "../é;x"), module("c", "https://h/c")]);
    }
}

//! A machine of its own for each test: repositories, a project, a home, a scratch folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use aitools::base::cancel::Cancel;
use aitools::base::digest::Digest;
use aitools::base::fs;
use aitools::base::tree::Listing;
use aitools::format::lockfile::GitPin;
use aitools::format::manifest::GitSpec;
use aitools::report::{Event, Reporter, Task};
use aitools::source::git::GitSource;
use aitools::source::{SourceError, TreeSource, World};

use crate::git_server::git;

/// Keeps what was warned about.
#[derive(Default, Clone)]
pub struct Ears(Arc<Mutex<Vec<Event>>>);

impl Reporter for Ears {
    fn report(&self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Ears {
    pub fn warnings(&self) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let texts = events.iter().filter_map(|event| match event {
            Event::Warning { text } => Some(text.clone()),
            _ => None,
        });
        texts.collect()
    }
}

/// A machine of its own: repositories below `served`, a project, a home, and a scratch folder.
pub struct Bench {
    pub root: tempfile::TempDir,
    pub world: World,
    pub ears: Ears,
}

impl Bench {
    pub fn new() -> Self {
        let root = tempfile::Builder::new().prefix("gît ").tempdir().unwrap();
        let ears = Ears::default();
        let folder = |name: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let env = BTreeMap::from([
            ("PATH".to_owned(), env!("PATH").to_owned()),
            ("HOME".to_owned(), folder("höme").to_str().unwrap().to_owned()),
            ("GIT_CONFIG_NOSYSTEM".to_owned(), "1".to_owned()),
        ]);
        folder("served");
        let world = World {
            task: Task::new(Arc::new(ears.clone()), Cancel::default()),
            project: folder("my project"),
            scratch: folder("scratch é"),
            offline: false,
            mirrors: Vec::new(),
            env,
        };
        Self { root, world, ears }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn served(&self) -> PathBuf {
        self.at("served")
    }

    /// Sets something in the user's own git configuration.
    pub fn set(&self, key: &str, value: &str) {
        let file = self.at("höme/.gitconfig");
        git(self.root.path(), &["config", "--file", file.to_str().unwrap(), "--add", key, value]);
    }

    /// A repository with two commits and a branch, a tag and an annotated tag; gives its first and second commit.
    pub fn repo(&self, name: &str) -> (String, String) {
        let path = self.served().join(name);
        fs::create_dir_all(&path).unwrap();
        git(&path, &["init", "-q", "."]);
        fs::write_atomic(&path.join("ünï/code file.c"), b"int x;\r\n").unwrap();
        fs::write_atomic(&path.join("run.sh"), b"#!/bin/sh\n").unwrap();
        fs::set_executable(&path.join("run.sh")).unwrap();
        fs::write_atomic(&path.join(".gitattributes"), b"* text eol=crlf\n*.c filter=lfs\n").unwrap();
        #[cfg(unix)]
        fs::symlink(Path::new("../run.sh"), &path.join("ünï/link")).unwrap();
        let first = self.commit(&path, "one");
        fs::write_atomic(&path.join("new"), b"2").unwrap();
        git(&path, &["tag", "light"]);
        git(&path, &["tag", "-a", "-m", "m", "heavy"]);
        git(&path, &["branch", "side"]);
        (first, self.commit(&path, "two"))
    }

    pub fn commit(&self, path: &Path, message: &str) -> String {
        git(path, &["add", "-A"]);
        git(path, &["commit", "-q", "-m", message]);
        git(path, &["rev-parse", "HEAD"])
    }

    pub fn resolve(&self, spec: &GitSpec) -> Result<Tree, SourceError> {
        resolve(spec, &self.world)
    }

    pub fn fetch(&self, spec: &GitSpec, locked: &Tree) -> Result<PathBuf, SourceError> {
        let staging = tempfile::Builder::new().prefix("stage ").tempdir_in(self.root.path()).unwrap().keep();
        GitSource(spec).fetch_tree(&self.world, &locked.pin, &locked.tree, &staging).map(|_| staging)
    }

    /// Resolves and fetches, and compares what was written with the pin.
    pub fn both(&self, spec: &GitSpec) -> Result<(Tree, PathBuf), SourceError> {
        let pin = self.resolve(spec)?;
        let staging = self.fetch(spec, &pin)?;
        let listing = Listing::scan(&staging, &Default::default(), &Cancel::default()).unwrap();
        assert_eq!(listing.digest(), pin.tree, "{}", listing.to_text());
        Ok((pin, staging))
    }

    pub fn mirrors(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.at("scratch é/git")).unwrap_or_default();
        entries.into_iter().filter(|path| path.join("objects").is_dir()).collect()
    }

    /// How many commits all mirrors hold.
    pub fn commits_held(&self) -> usize {
        let mut count = 0;
        for mirror in self.mirrors() {
            let odb = git2::Odb::new().unwrap();
            odb.add_disk_alternate(mirror.join("objects").to_str().unwrap()).unwrap();
            odb.foreach(|id| {
                count += usize::from(odb.read_header(*id).unwrap().1 == git2::ObjectType::Commit);
                true
            })
            .unwrap();
        }
        count
    }
}

/// What the source of an engine resolves to.
#[derive(Debug, Clone, PartialEq)]
pub struct Tree {
    pub pin: GitPin,
    pub tree: Digest,
}

pub fn resolve(spec: &GitSpec, world: &World) -> Result<Tree, SourceError> {
    GitSource(spec).resolve_tree(world).map(|(pin, tree)| Tree { pin, tree })
}

pub fn spec(git: &str) -> GitSpec {
    GitSpec {
        git: git.parse().unwrap(),
        rev: None,
        tag: None,
        branch: None,
        submodule: None,
        submodules: vec![],
        subdir: None,
    }
}

pub fn at(git: &str, rev: &str) -> GitSpec {
    GitSpec { rev: Some(rev.parse().unwrap()), ..spec(git) }
}

/// An error with everything that a person would be shown.
pub fn told(error: &SourceError) -> String {
    format!("{error} {error:?}")
}

#[track_caller]
pub fn fails<T>(result: Result<T, SourceError>, words: &[&str]) -> SourceError {
    let error = result.err().expect("this must fail");
    for word in words {
        assert!(told(&error).contains(word), "no `{word}` in {}", told(&error));
    }
    error
}

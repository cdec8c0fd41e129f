//! A stand-in for the Hugging Face Hub on two loopback origins: the Hub itself, and the store for large files that it
//! sends clients to. Repositories are held in memory, commits stay when branches move, and every answer can be spoilt.
//!
//! What it answers was taken from the official clients' sources and public header dumps: `siblings` with `blobs=true`, tree
//! pages by `Link`, 302 with `X-Linked-*` for large files, a relative 307 to `/api/resolve-cache/` for small ones,
//! `X-Error-Code`, 401 for unknown repositories when nobody is logged in.
#![allow(
    dead_code,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "shared by tests that use parts of it"
)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha2::Digest as _;

use super::test_server::{Reply, Seen, Server};

/// The token of somebody who may see everything.
pub const TOKEN: &str = "hf_stand_in_s3cret";

type Files = BTreeMap<String, Arc<[u8]>>;

#[derive(Default)]
struct Repository {
    refs: BTreeMap<String, String>,
    commits: BTreeMap<String, Files>,
}

#[derive(Default)]
struct State {
    repositories: BTreeMap<String, Repository>,
    gated: bool,
    private: bool,
    /// Entries of a tree page.
    page: usize,
    /// Whether `blobs=true` is understood.
    blobs: bool,
}

/// Where a request arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    Hub,
    Store,
}

pub struct Hub {
    hub: Server,
    store: Server,
    state: Arc<Mutex<State>>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&sha2::Sha256::digest(bytes))
}

pub fn git_blob(bytes: &[u8]) -> String {
    git2::Oid::hash_object(git2::ObjectType::Blob, bytes).unwrap().to_string()
}

/// Weights are in large file storage, unless their name says `plain`.
fn is_large(path: &str) -> bool {
    !path.contains("plain") && [".gguf", ".safetensors", ".bin"].iter().any(|end| path.ends_with(end))
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digits: Vec<u8> = if byte == b'%' { rest.by_ref().take(2).collect() } else { Vec::new() };
        let code = std::str::from_utf8(&digits).ok().and_then(|digits| u8::from_str_radix(digits, 16).ok());
        bytes.push(code.unwrap_or(byte));
    }
    String::from_utf8(bytes).unwrap()
}

fn refusal(status: u16, code: &str) -> Reply {
    Reply::text("{\"error\":\"no\"}").status(status).with("X-Error-Code", code)
}

impl Hub {
    /// `change` may spoil any answer.
    pub fn start(change: impl Fn(Site, &Seen, Reply) -> Reply + Send + Sync + 'static) -> Self {
        let state = Arc::new(Mutex::new(State { page: 1000, blobs: true, ..State::default() }));
        let change = Arc::new(change);
        let (of_store, spoil) = (Arc::clone(&state), Arc::clone(&change));
        let store = Server::start(move |seen, _| {
            let reply = of_store.lock().unwrap().stored(seen);
            spoil(Site::Store, seen, reply)
        });
        let (of_hub, elsewhere) = (Arc::clone(&state), store.url(""));
        let hub = Server::start(move |seen, _| {
            let reply = of_hub.lock().unwrap().answer(seen, &elsewhere);
            change(Site::Hub, seen, reply)
        });
        Self { hub, store, state }
    }

    pub fn good() -> Self {
        Self::start(|_, _, reply| reply)
    }

    pub fn endpoint(&self) -> String {
        self.hub.url("")
    }

    /// Moves a branch to a new commit with these files, and gives its id.
    pub fn push(&self, repository: &str, branch: &str, files: &[(&str, &[u8])]) -> String {
        let files: Files = files.iter().map(|(path, bytes)| ((*path).to_owned(), Arc::from(*bytes))).collect();
        let listing: String = files.iter().map(|(path, bytes)| format!("{path}\n{}\n", sha256(bytes))).collect();
        let commit = sha256(listing.as_bytes())[..40].to_owned();
        let mut state = self.state.lock().unwrap();
        let repository = state.repositories.entry(repository.to_owned()).or_default();
        repository.refs.insert(branch.to_owned(), commit.clone());
        repository.commits.insert(commit.clone(), files);
        commit
    }

    /// As when a repository's history is rewritten.
    pub fn forget(&self, repository: &str, commit: &str) {
        self.state.lock().unwrap().repositories.get_mut(repository).unwrap().commits.remove(commit);
    }

    pub fn gate(&self) {
        self.state.lock().unwrap().gated = true;
    }

    pub fn hide(&self) {
        self.state.lock().unwrap().private = true;
    }

    /// Tree pages of so many entries.
    pub fn paginate(&self, entries: usize) {
        self.state.lock().unwrap().page = entries;
    }

    /// Like simple mirrors: `blobs=true` gives names only.
    pub fn without_blobs(&self) {
        self.state.lock().unwrap().blobs = false;
    }

    pub fn seen(&self, site: Site) -> Vec<Seen> {
        match site {
            Site::Hub => self.hub.seen(),
            Site::Store => self.store.seen(),
        }
    }
}

impl State {
    fn answer(&self, seen: &Seen, store: &str) -> Reply {
        let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match parts.as_slice() {
            ["api", "models", owner, name, rest @ ..] => self.api(seen, &format!("{owner}/{name}"), rest, query),
            ["api", "resolve-cache", "models", owner, name, commit, file @ ..]
            | [owner, name, "resolve", commit, file @ ..] => {
                let repository = format!("{owner}/{name}");
                let file = decoded(&file.join("/"));
                self.resolve(seen, &repository, &decoded(commit), &file, if parts[0] == "api" { "" } else { store })
            }
            _ => refusal(404, "NotFound"),
        }
    }

    fn lookup(&self, seen: &Seen, repository: &str, revision: &str, bytes: bool) -> Result<(&str, &Files), Reply> {
        let authorization = seen.header("authorization");
        let known = authorization == Some(&format!("Bearer {TOKEN}"));
        let found = self.repositories.get(repository).filter(|_| !self.private || known);
        let Some(found) = found else {
            return Err(refusal(if authorization.is_some() { 404 } else { 401 }, "RepoNotFound"));
        };
        if self.gated && bytes && !known {
            return Err(refusal(if authorization.is_some() { 403 } else { 401 }, "GatedRepo"));
        }
        let commit = found.refs.get(revision).map_or(revision, String::as_str);
        let entry = found.commits.get_key_value(commit);
        entry.map(|(commit, files)| (commit.as_str(), files)).ok_or_else(|| refusal(404, "RevisionNotFound"))
    }

    fn api(&self, seen: &Seen, repository: &str, rest: &[&str], query: &str) -> Reply {
        let (verb, revision) = (rest.first().copied().unwrap_or("revision"), rest.get(1).copied().unwrap_or("main"));
        let (commit, files) = match self.lookup(seen, repository, &decoded(revision), false) {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        let reply = |value: &Value| {
            Reply::text(&value.to_string()).with("Content-Type", "application/json").with("X-Repo-Commit", commit)
        };
        match verb {
            "revision" => {
                let blobs = self.blobs && query.contains("blobs=true");
                let siblings: Vec<Value> = files.iter().map(|(path, bytes)| sibling(path, bytes, blobs)).collect();
                reply(&json!({
                    "_id": "0", "id": repository, "modelId": repository, "sha": commit, "siblings": siblings,
                    "private": self.private, "gated": if self.gated { json!("manual") } else { json!(false) },
                    "disabled": false, "downloads": 0, "likes": 0, "tags": ["gguf"],
                    "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
                }))
            }
            "tree" => {
                let from = query.split('&').find_map(|pair| pair.strip_prefix("cursor="));
                let from: usize = from.map_or(0, |text| text.parse().unwrap());
                let entries = tree(files);
                let end = entries.len().min(from + self.page);
                let answer = reply(&json!(entries[from..end]));
                if end == entries.len() {
                    return answer;
                }
                let host = seen.header("host").unwrap();
                let path = seen.path.split('?').next().unwrap();
                answer.with("Link", &format!("<http://{host}{path}?recursive=true&cursor={end}>; rel=\"next\""))
            }
            _ => refusal(404, "NotFound"),
        }
    }

    /// `store` is empty for what is served here.
    fn resolve(&self, seen: &Seen, repository: &str, revision: &str, file: &str, store: &str) -> Reply {
        let (commit, files) = match self.lookup(seen, repository, revision, true) {
            Ok(found) => found,
            Err(refused) => return refused,
        };
        let Some(bytes) = files.get(file) else {
            return refusal(404, "EntryNotFound").with("X-Repo-Commit", commit);
        };
        if is_large(file) {
            let digest = sha256(bytes);
            return Reply::redirect(302, &format!("{store}/repos/{repository}/{digest}?X-Amz-Signature=s&Expires=9"))
                .with("X-Repo-Commit", commit)
                .with("X-Linked-Etag", &format!("\"{digest}\""))
                .with("X-Linked-Size", &bytes.len().to_string())
                .with("X-Xet-Hash", &digest)
                .with("Accept-Ranges", "bytes");
        }
        if !store.is_empty() {
            let quoted: String = seen.path.split("/resolve/").nth(1).unwrap().split_once('/').unwrap().1.to_owned();
            let target = format!("/api/resolve-cache/models/{repository}/{commit}/{quoted}?etag=x");
            return Reply::redirect(307, &target).with("X-Repo-Commit", commit);
        }
        Reply::bytes(Arc::clone(bytes))
            .ranged(seen)
            .with("X-Repo-Commit", commit)
            .with("ETag", &format!("\"{}\"", git_blob(bytes)))
    }

    /// The store of large files, which refuses a second way to log in.
    fn stored(&self, seen: &Seen) -> Reply {
        if seen.header("authorization").is_some() {
            return Reply::text("<Error><Code>InvalidArgument</Code></Error>").status(400);
        }
        let digest = seen.path.split('?').next().unwrap().rsplit('/').next().unwrap().to_owned();
        let mut all = self.repositories.values().flat_map(|r| r.commits.values()).flat_map(BTreeMap::values);
        match all.find(|bytes| sha256(bytes) == digest) {
            Some(bytes) => Reply::bytes(Arc::clone(bytes)).ranged(seen).with("ETag", "\"of-the-store\""),
            None => Reply::text("<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>").status(403),
        }
    }
}

fn sibling(path: &str, bytes: &[u8], blobs: bool) -> Value {
    let mut entry = json!({ "rfilename": path });
    if blobs {
        entry["size"] = json!(bytes.len());
        entry["blobId"] = json!(git_blob(bytes));
        if is_large(path) {
            entry["lfs"] = json!({ "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 133 });
        }
    }
    entry
}

fn tree(files: &Files) -> Vec<Value> {
    let mut entries: Vec<Value> = Vec::new();
    for (path, bytes) in files {
        if let Some((folder, _)) = path.split_once('/')
            && !entries.iter().any(|entry| entry["path"] == folder)
        {
            entries.push(json!({ "type": "directory", "oid": "0", "size": 0, "path": folder }));
        }
        let mut entry = json!({ "type": "file", "path": path, "size": bytes.len(), "oid": git_blob(bytes) });
        if is_large(path) {
            entry["lfs"] = json!({ "oid": sha256(bytes), "size": bytes.len(), "pointerSize": 133 });
            entry["xetHash"] = json!(sha256(bytes));
        }
        entries.push(entry);
    }
    entries
}

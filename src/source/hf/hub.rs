//! The Hub's HTTP interface, as far as it is needed: what a revision holds, and whether a file can be had.
//!
//! Protocol: <https://huggingface.co/docs/hub/api> and the official Python client (`huggingface_hub`), whose environment
//! variables are honoured here: `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HOME`, `HF_HUB_CACHE`,
//! `HUGGINGFACE_HUB_CACHE`, `XDG_CACHE_HOME`, `HF_HUB_OFFLINE`, `HF_HUB_DISABLE_IMPLICIT_TOKEN`, and two older names:
//! `HUGGING_FACE_HUB_TOKEN`, `TRANSFORMERS_OFFLINE`. Paths may name the home folder (`~`) and variables, as there.
//!
//! Absent: Xet (every repository can also be had by plain HTTP), and the token anywhere but at the endpoint that the
//! environment names: a manifest's `[mirrors]` does not get it, since a manifest may be somebody else's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, SeqAccess, Visitor};

use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::http::{Answer, Follow, Http, Method, Request, same_origin, shown};
use crate::base::name::RelPath;
use crate::format::lockfile::FilePin;
use crate::source::download::likely_content;
use crate::source::{SourceError, World};

const ENDPOINT: &str = "https://huggingface.co";
/// Largest answer that is read: 100,000 files at some 400 bytes.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// Of an error page that comes instead of a small file.
const MAX_ERROR_BYTES: u64 = 1 << 20;
const MAX_PAGES: usize = 200;
const MAX_FILES: usize = 100_000;
const MAX_TOKEN_BYTES: u64 = 4096;

/// How this machine talks to the Hub.
#[derive(Clone)]
pub struct Settings {
    pub endpoint: String,
    token: Option<String>,
    /// The folder that holds `models--…`.
    pub cache: PathBuf,
    /// `HF_HUB_OFFLINE` is set.
    pub offline: bool,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("endpoint", &self.endpoint).field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Settings {
    /// # Errors
    /// [`SourceError::Disagreement`] when nothing says where the cache is.
    pub fn of(env: &BTreeMap<String, String>) -> Result<Self, SourceError> {
        let set = |key: &str| env.get(key).map(|value| value.trim()).filter(|value| !value.is_empty());
        let user = set(if cfg!(windows) { "USERPROFILE" } else { "HOME" });
        let folder =
            |text: &str| PathBuf::from(&*shellexpand::full_with_context_no_errors(text, || user, |name| env.get(name)));
        let xdg = set("XDG_CACHE_HOME").map(folder).or_else(|| user.map(|user| Path::new(user).join(".cache")));
        let home = set("HF_HOME").map(folder).or_else(|| xdg.map(|cache| cache.join("huggingface")));
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).map(folder);
        let cache = cache.or_else(|| home.as_ref().map(|home| home.join("hub"))).ok_or_else(no_home)?;
        let true_text = |text: &str| ["1", "on", "yes", "true"].contains(&&*text.to_lowercase());
        let offline = set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE")).is_some_and(true_text);
        let token = if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(true_text) {
            None
        } else {
            set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")).map(str::to_owned).or_else(|| {
                match set("HF_TOKEN_PATH") {
                    Some(path) => read_token(folder(path)),
                    None => hf_hub::Cache::new(home?.join("hub")).token(),
                }
            })
        };
        // A line break would end the header that it stands in.
        let token = token.map(|text| text.replace(['\r', '\n'], "").trim().to_owned()).filter(|text| !text.is_empty());
        let endpoint = set("HF_ENDPOINT").unwrap_or(ENDPOINT).trim_end_matches('/').to_owned();
        Ok(Self { endpoint, token, cache, offline })
    }

    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }
}

fn read_token(path: PathBuf) -> Option<String> {
    String::from_utf8(fs::read_bounded(&path, MAX_TOKEN_BYTES).ok()?).ok()
}

fn no_home() -> SourceError {
    SourceError::Disagreement {
        what: "the Hugging Face cache has no known location".to_owned(),
        details: vec!["neither `HF_HOME` nor the home folder is set".to_owned()],
        hint: Some("set `HF_HOME`".to_owned()),
    }
}

/// A file as the Hub lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Size in bytes.
    pub size: u64,
    /// Known for files in large file storage.
    pub sha256: Option<Digest>,
    /// git's own name for the content, known for the others: 40 hexadecimal digits.
    pub git_blob: Option<String>,
}

impl Listed {
    /// Whether these bytes are the file, as far as size and git's name for the content tell.
    pub fn is(&self, bytes: &[u8]) -> bool {
        let named = || git2::Oid::hash_object(git2::ObjectType::Blob, bytes).ok().map(|id| id.to_string());
        bytes.len() as u64 == self.size && self.git_blob.as_ref().is_none_or(|known| named().as_ref() == Some(known))
    }
}

/// What a revision is, and holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Revision {
    /// The commit that the revision is today.
    pub commit: Commit,
    pub files: BTreeMap<RelPath, Listed>,
    /// Names that no file here can have.
    pub unusable: Vec<String>,
}

#[derive(serde::Deserialize)]
struct Info {
    sha: String,
    #[serde(default)]
    siblings: Entries,
}

/// A listing, refused as soon as it is longer than any.
#[derive(Default)]
struct Entries(Vec<Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(Bounded)
    }
}

struct Bounded;

impl<'de> Visitor<'de> for Bounded {
    type Value = Entries;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a list of at most {MAX_FILES} files")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == MAX_FILES {
                return Err(A::Error::invalid_length(entries.len() + 1, &self));
            }
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

/// An entry of `siblings` (`rfilename`, `blobId`, `lfs.sha256`) or of a tree (`path`, `oid`, `lfs.oid`).
#[derive(serde::Deserialize)]
struct Entry {
    #[serde(alias = "path")]
    rfilename: String,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default, alias = "oid", rename = "blobId")]
    blob: Option<String>,
    #[serde(default)]
    lfs: Option<Lfs>,
}

/// Hubs say the digest under one of two names, some under both.
#[derive(serde::Deserialize)]
struct Lfs {
    #[serde(default)]
    sha256: Option<String>,
    #[serde(default)]
    oid: Option<String>,
    size: u64,
}

/// One repository on the Hub.
#[derive(Debug)]
pub struct Hub<'a> {
    pub http: Http,
    pub settings: Settings,
    world: &'a World,
    repo: &'a str,
}

impl<'a> Hub<'a> {
    /// # Errors
    /// [`SourceError::Disagreement`] when `repo` is no repository's name, or there is no place for a cache.
    pub fn new(world: &'a World, repo: &'a str) -> Result<Self, SourceError> {
        let part = |text: &str| {
            (1..=96).contains(&text.len())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
                && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && !text.contains("..")
                && !text.contains("--")
        };
        if repo.split('/').count() > 2 || !repo.split('/').all(part) {
            return Err(SourceError::Disagreement {
                what: format!("`{repo}` is not the name of a model repository"),
                details: vec!["expected `org/repo`".to_owned()],
                hint: None,
            });
        }
        Ok(Self { http: world.http()?, settings: Settings::of(&world.env)?, world, repo })
    }

    /// The work that this is part of.
    pub fn task(&self) -> &crate::report::Task {
        &self.world.task
    }

    /// For messages.
    pub fn what(&self) -> String {
        format!("model repository `{}`", self.repo)
    }

    /// # Errors
    /// When nothing may be sent: `--offline`, or `HF_HUB_OFFLINE`.
    pub fn require_online(&self, what: &str) -> Result<(), SourceError> {
        if self.world.offline {
            return Err(SourceError::Offline { what: what.to_owned() });
        }
        if self.settings.offline {
            let why = "it is not on this machine, and `HF_HUB_OFFLINE` forbids fetching it".to_owned();
            let hint = Some("unset `HF_HUB_OFFLINE`".to_owned());
            return Err(SourceError::Network { what: what.to_owned(), why, hint });
        }
        Ok(())
    }

    /// Which commit `revision` is, and every file of it: one request, or more where the server tells no digests at once.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn revision(&self, revision: &str) -> Result<Revision, SourceError> {
        self.require_online(&self.what())?;
        let path = format!("/api/models/{}/revision/{}?blobs=true", self.repo, quoted(revision, false));
        let info: Info = self.json(&self.url(&path), revision)?.0;
        let odd = || self.odd(format!("`{revision}` is said to be commit `{:.60}`", info.sha));
        let commit: Commit = info.sha.parse().map_err(|_| odd())?;
        if is_commit(revision) && info.sha != revision {
            return Err(self.odd(format!("asked for commit `{revision}`, it answers with `{}`", info.sha)));
        }
        let siblings = info.siblings.0;
        let told = siblings.iter().all(|entry| entry.size.is_some());
        let entries = if told { siblings } else { self.tree(&commit)? };
        let mut found = Revision { commit, files: BTreeMap::new(), unusable: Vec::new() };
        for entry in entries {
            match entry.rfilename.parse::<RelPath>() {
                Ok(path) => drop(found.files.insert(path, self.listed(entry)?)),
                Err(_) => found.unusable.push(entry.rfilename),
            }
        }
        Ok(found)
    }

    fn listed(&self, entry: Entry) -> Result<Listed, SourceError> {
        let Some(lfs) = entry.lfs else {
            let git_blob = entry.blob.filter(|id| is_commit(id));
            return Ok(Listed { size: entry.size.unwrap_or(u64::MAX), sha256: None, git_blob });
        };
        let said = lfs.sha256.or(lfs.oid).unwrap_or_default();
        let sha256 = Digest::from_hex(&said).map_err(|error| self.odd(format!("`{}`: {error}", entry.rfilename)))?;
        Ok(Listed { size: lfs.size, sha256: Some(sha256), git_blob: None })
    }

    /// The files of a commit, page after page.
    fn tree(&self, commit: &Commit) -> Result<Vec<Entry>, SourceError> {
        let home = self.url(&format!("/api/models/{}/tree/{commit}", self.repo));
        let mut query = "recursive=true".to_owned();
        let mut entries = Vec::new();
        for _ in 0..MAX_PAGES {
            let (Entries(page), next) = self.json(&format!("{home}?{query}"), &commit.to_string())?;
            entries.extend(page.into_iter().filter(|entry| entry.kind.as_deref() != Some("directory")));
            if entries.len() > MAX_FILES {
                break;
            }
            // Only the query of the link is used: wherever it points to, nothing is asked elsewhere.
            let Some(more) = next.as_deref().and_then(next_query) else { return Ok(entries) };
            if more == query {
                break;
            }
            query = more;
        }
        Err(self.odd(format!("it lists more than {MAX_FILES} files or {MAX_PAGES} pages")))
    }

    /// Asks whether the file can be had at the commit, and whether the Hub means the same content as the pin. Gives the
    /// name of its blob in the cache: the SHA-256 of large files, git's name for the others.
    ///
    /// # Errors
    /// [`SourceError::Mismatch`] when the Hub says otherwise than the pin; the others as for [`Self::revision`].
    pub fn look(&self, commit: &Commit, pin: &FilePin) -> Result<String, SourceError> {
        let what = format!("`{}` of {}", pin.path, self.what());
        self.require_online(&what)?;
        let url = self.file_url(commit, &pin.path);
        let answer = self.ask(Method::HEAD, Follow::SameOrigin, &url, 0, &what)?;
        let response = &answer.response;
        if !response.is_success() && !(301..=308).contains(&response.status) {
            return Err(self.refusal(&answer, &what, &commit.to_string()));
        }
        if let Some(other) = response.header("x-repo-commit").filter(|other| *other != commit.to_string()) {
            return Err(self.odd(format!("`{}` is said to be of commit `{other:.60}`, not `{commit}`", pin.path)));
        }
        let linked = response.header("x-linked-etag");
        let etag = linked.or_else(|| response.header("etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        let size = match (linked, response.is_success()) {
            (None, true) => response.length(),
            _ => response.header("x-linked-size").and_then(|text| text.parse().ok()),
        };
        let said = Digest::from_hex(&etag).ok();
        if said.is_some_and(|said| said != pin.sha256) || size.is_some_and(|size| size != pin.size) {
            let said = said.map_or_else(|| "another content".to_owned(), |said| said.to_string());
            return Err(SourceError::Mismatch {
                what,
                expected: format!("{} ({} bytes)", pin.sha256, pin.size),
                actual: format!("{said} ({} bytes), as the Hub says", size.unwrap_or(pin.size)),
                likely: Some("the lockfile was changed, or the server serves another file".to_owned()),
            });
        }
        Ok(if is_commit(&etag) { etag } else { pin.sha256.hex() })
    }

    /// A whole small file, compared with git's name for its content.
    ///
    /// # Errors
    /// [`SourceError::Mismatch`], and as for [`Self::revision`].
    pub fn small_file(&self, commit: &Commit, path: &RelPath, listed: &Listed) -> Result<Vec<u8>, SourceError> {
        let what = format!("`{path}` of {}", self.what());
        let url = self.file_url(commit, path);
        let limit = listed.size.max(MAX_ERROR_BYTES);
        let answer = self.ask(Method::GET, Follow::Anywhere, &url, limit, &what)?;
        if !answer.response.is_success() {
            return Err(self.refusal(&answer, &what, &commit.to_string()));
        }
        let blob = git2::Oid::hash_object(git2::ObjectType::Blob, &answer.body).map(|id| id.to_string());
        let blob = blob.map_err(|error| self.odd(error.to_string()))?;
        if !listed.is(&answer.body) {
            let expected = format!("git blob {} ({} bytes)", listed.git_blob.as_deref().unwrap_or("?"), listed.size);
            let actual = format!("git blob {blob} ({} bytes)", answer.body.len());
            let likely = likely_content(&answer.body).map(str::to_owned);
            return Err(SourceError::Mismatch { what, expected, actual, likely });
        }
        Ok(answer.body)
    }

    pub fn file_url(&self, commit: &Commit, path: &RelPath) -> String {
        self.url(&format!("/{}/resolve/{commit}/{}", self.repo, quoted(path.as_str(), true)))
    }

    /// What goes along to `url`: the token, when this is the endpoint that it is for.
    pub fn authorization(&self, url: &str) -> Option<String> {
        let token = self.settings.token().filter(|_| same_origin(url, &self.settings.endpoint))?;
        Some(format!("Bearer {token}"))
    }

    fn url(&self, path: &str) -> String {
        self.world.mirrored(&format!("{}{path}", self.settings.endpoint))
    }

    /// One question with a short answer, asked again when the server says "later".
    fn ask(
        &self,
        method: Method,
        follow: Follow,
        url: &str,
        limit_bytes: u64,
        what: &str,
    ) -> Result<Answer, SourceError> {
        let bearer = self.authorization(url);
        let headers: Vec<(&str, &str)> = bearer.iter().map(|bearer| ("authorization", bearer.as_str())).collect();
        let request = Request { method, url, headers: &headers, body: None, follow };
        let answer = self.http.answer_patiently(&request, limit_bytes, &|why| self.world.task.waiting(why));
        answer.map_err(|error| SourceError::of_http(what, error))
    }

    /// A JSON answer, and its `Link` header.
    fn json<T: serde::de::DeserializeOwned>(&self, url: &str, rev: &str) -> Result<(T, Option<String>), SourceError> {
        let answer = self.ask(Method::GET, Follow::Anywhere, url, MAX_ANSWER_BYTES, &self.what())?;
        if !answer.response.is_success() {
            return Err(self.refusal(&answer, &self.what(), rev));
        }
        let link = answer.response.header("link").map(str::to_owned);
        let parsed = answer.json().map_err(|error| match likely_content(&answer.body) {
            Some(likely) => self.odd(format!("{error}; {likely}")),
            None => SourceError::of_http(&self.what(), error),
        });
        Ok((parsed?, link))
    }

    fn odd(&self, why: String) -> SourceError {
        let hint = "is the endpoint (`HF_ENDPOINT`, `[mirrors]`) really a Hub?".to_owned();
        SourceError::Network { what: self.what(), why, hint: Some(hint) }
    }

    /// What an error answer means, by its `X-Error-Code` where it has one.
    fn refusal(&self, answer: &Answer, what: &str, rev: &str) -> SourceError {
        let (status, url) = (answer.response.status, shown(&answer.response.url));
        let page = format!("{}/{}", shown(&self.settings.endpoint), self.repo);
        let known = self.settings.token().is_some();
        let network = |why: &str, hint: String| SourceError::Network {
            what: what.to_owned(),
            why: format!("{why} (HTTP status {status})"),
            hint: Some(hint),
        };
        let missing = |why: String, hint: Option<String>| SourceError::Missing { what: what.to_owned(), why, hint };
        let login = "set `HF_TOKEN` to a token of yours, or run `hf auth login`";
        match (answer.response.header("x-error-code").unwrap_or_default(), status) {
            ("GatedRepo", _) if known => network(
                "this model is gated, and the token's owner has no access yet",
                format!("ask for access at {page}"),
            ),
            ("GatedRepo", _) => network("this model is gated", format!("accept its terms at {page}, then {login}")),
            ("RepoNotFound", _) if known => {
                missing("there is no such repository, or the token's owner may not see it".to_owned(), None)
            }
            ("RepoNotFound", _) => {
                let why = "there is no such repository, or it is private".to_owned();
                missing(why, Some(format!("check the name; for a private one {login}")))
            }
            ("RevisionNotFound", _) if is_commit(rev) => missing(
                format!("it no longer has commit `{rev}`"),
                Some("its history was rewritten: lock it again with `aitools lock --upgrade NAME`".to_owned()),
            ),
            ("RevisionNotFound", _) => missing(
                format!("it has no revision `{rev}`"),
                Some("use a branch, a tag, or a full commit id of 40 digits".to_owned()),
            ),
            ("EntryNotFound", _) => missing(
                format!("the Hub lists it, but does not have it at `{rev}`"),
                Some("try later, or lock another revision".to_owned()),
            ),
            (_, 401) if known => network("the token is not accepted", "is `HF_TOKEN` still valid?".to_owned()),
            (_, 401 | 403) => network("it may not be read", login.to_owned()),
            (_, 429) => network(
                "the Hub's rate limit is reached",
                format!("wait some minutes; with an account more are allowed: {login}"),
            ),
            (_, 404 | 410) => missing(format!("{url} was not found (HTTP status {status})"), None),
            _ => network(&format!("unexpected response from {url}"), "try again later".to_owned()),
        }
    }
}

/// Whether a text is a full commit id, or another id of an object in git.
fn is_commit(text: &str) -> bool {
    text.parse::<Commit>().is_ok()
}

/// Percent-encoded; `/` stays only between the parts of a path.
fn quoted(text: &str, is_path: bool) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut quoted, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (is_path && byte == b'/') {
            quoted.push(char::from(byte));
        } else {
            let _ = write!(quoted, "%{byte:02X}");
        }
        quoted
    })
}

/// The query of the `rel="next"` link (RFC 8288).
fn next_query(link: &str) -> Option<String> {
    let next = link.split(", <").find(|one| one.contains("rel=\"next\"") || one.contains("rel=next"))?;
    let address = next.trim_start_matches('<').split('>').next()?;
    Some(address.split_once('?')?.1.to_owned())
}

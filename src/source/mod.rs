//! Layer 2: one file per source kind. A source resolves a request to a pin, and brings the pinned bytes to a staging folder.
//!
//! Invariant: a source cannot bless its own bytes. What it fetched is staged; only the store compares it with the pin.
//! (A source may check earlier, to fail earlier: that saves time, it is not the proof. Where bytes were hashed on their way,
//! [`Hashed`] spares the store reading them again; a source cannot make one but by hashing.)

pub mod archive;
pub mod download;
pub mod git;
pub mod globs;
pub mod hf;
pub mod hub_cache;
pub mod path;
pub mod pypi;
pub mod url;

use std::path::{Path, PathBuf};

use crate::base::cancel::Cancelled;
use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::hashed::Hashed;
use crate::base::http::{Http, HttpError, Settings};
use crate::base::lock::LockError;
use crate::base::tree::{Modes, TreeError};
use crate::format::lockfile::{Kind, Pin};
use crate::format::manifest::SourceSpec;
use crate::report::Task;

const MAX_CERTIFICATES_BYTES: u64 = 16 << 20;

/// What a source needs to know of the world. Nothing in `source/` reads the environment itself.
#[derive(Debug, Clone)]
pub struct World {
    pub task: Task,
    /// The project's folder: `path` sources and submodules are relative to it.
    pub project: PathBuf,
    /// Where partial downloads and git mirrors are kept between runs. Nothing in it is trusted.
    pub scratch: PathBuf,
    /// Send nothing at all.
    pub offline: bool,
    /// Address prefix to replacement, from `[mirrors]`.
    pub mirrors: Vec<(String, String)>,
    /// Environment variables, as they were when the program started.
    pub env: std::collections::BTreeMap<String, String>,
}

impl World {
    /// A client with this world's proxies and certificates. Make one for a piece of work and pass it on: it keeps
    /// connections.
    ///
    /// # Errors
    /// When `SSL_CERT_FILE` names a file that cannot be read.
    pub fn http(&self) -> Result<Http, FsError> {
        let cancel = self.task.cancel().clone();
        let file = self.env.get("SSL_CERT_FILE").filter(|path| !path.is_empty());
        let certificates = file.map(|path| certificates(Path::new(path))).transpose()?;
        let (env, offline) = (self.env.clone(), self.offline);
        Ok(Http::new(Settings { env, offline, cancel, certificates, ..Settings::default() }))
    }

    /// Connections for one file: `AITOOLS_CONNECTIONS`, within reason.
    pub fn connections(&self) -> usize {
        let asked = self.env.get("AITOOLS_CONNECTIONS").and_then(|text| text.trim().parse().ok());
        asked.map_or(download::STREAMS, |count: usize| count.clamp(1, download::MAX_STREAMS))
    }

    /// The address to really ask, after `[mirrors]`: the longest prefix decides.
    pub fn mirrored(&self, url: &str) -> String {
        let fitting =
            self.mirrors.iter().filter_map(|(from, to)| Some((from.len(), to, url.strip_prefix(from.as_str())?)));
        fitting.max_by_key(|(length, ..)| *length).map_or_else(|| url.to_owned(), |(_, to, rest)| format!("{to}{rest}"))
    }
}

/// A file of certificates to trust.
///
/// # Errors
/// When it cannot be read.
pub fn certificates(path: &Path) -> Result<Vec<u8>, FsError> {
    fs::read_bounded(path, MAX_CERTIFICATES_BYTES)
}

/// One way to get bytes.
pub trait Source {
    /// Finds out what the request means today. Downloads no weights where the protocol can say their digest.
    /// `kind` says what the entry is for: an engine's pin gets `tree`, a model's gets `files`, a tool's gets `downloads`.
    ///
    /// # Errors
    /// [`SourceError`], with the network's or the server's own words.
    fn resolve(&self, world: &World, kind: Kind) -> Result<Pin, SourceError>;

    /// Brings what `pin` names into the empty folder `staging`: for an engine, the tree itself; for a model, the pinned
    /// files at their pinned paths, those of `wanted` only; for a tool, the package of this platform unpacked.
    /// Never follows a moved tag or branch: only what is pinned.
    ///
    /// # Errors
    /// [`SourceError`]; the staging folder is then of no use.
    fn fetch(&self, world: &World, ask: &Fetch<'_>) -> Result<Fetched, SourceError>;

    /// Where fetching the files `wanted` of a model would take space, and how much: less where they, or parts of them,
    /// are on this machine.
    ///
    /// # Errors
    /// When the pin is not for this source, or nothing says where the space would be taken.
    fn space(&self, world: &World, pin: &Pin, wanted: &[usize]) -> Result<(PathBuf, u64), SourceError> {
        Ok((world.scratch.clone(), wanted_bytes(pin, wanted)))
    }
}

/// What a source has to say of what it staged.
#[derive(Debug, Default)]
pub struct Fetched {
    /// Which files are not plain ones, for file systems that cannot tell.
    pub modes: Modes,
    /// Staged files that were hashed on their way.
    pub hashed: Vec<Hashed>,
}

impl From<Modes> for Fetched {
    fn from(modes: Modes) -> Self {
        Self { modes, ..Self::default() }
    }
}

/// What to bring, and where to.
#[derive(Debug)]
pub struct Fetch<'a> {
    pub kind: Kind,
    pub pin: &'a Pin,
    /// For models: indices into `pin.files` that are missing.
    pub wanted: &'a [usize],
    /// An empty folder on the store's file system.
    pub staging: &'a Path,
    /// The entry's name, for progress.
    pub name: &'a str,
}

/// Why bytes could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The network is needed, and `--offline` was given.
    #[error("{what} is not on this machine, and `--offline` forbids fetching it")]
    Offline { what: String },
    /// The server cannot be reached or answers with an error.
    #[error("could not fetch {what}: {why}")]
    Network { what: String, why: String, hint: Option<String> },
    /// The server answers, but what is asked for does not exist there.
    #[error("{what}: {why}")]
    Missing { what: String, why: String, hint: Option<String> },
    /// The bytes are not the pinned ones.
    #[error("{what} does not match the lockfile")]
    Mismatch { what: String, expected: String, actual: String, likely: Option<String> },
    /// An archive, repository or package that is refused: escaping names, bombs, damage.
    #[error("{what} is refused: {why}")]
    Hostile { what: String, why: String },
    /// A program that is needed is not there.
    #[error("{what} is needed: {why}")]
    Tool { what: String, why: String, hint: Option<String> },
    /// Manifest, lockfile and repository disagree.
    #[error("{what}")]
    Disagreement { what: String, details: Vec<String>, hint: Option<String> },
}

impl SourceError {
    /// What the client says, said of `what`.
    pub fn of_http(what: &str, error: HttpError) -> Self {
        let what = what.to_owned();
        match error {
            HttpError::Offline { .. } => Self::Offline { what },
            HttpError::Cancelled(cancelled) => Self::Cancelled(cancelled),
            HttpError::Unreachable { .. } => {
                let hint = "check the network and the proxy settings, or use `--offline` with what is already here";
                Self::Network { what, why: error.to_string(), hint: Some(hint.to_owned()) }
            }
            error => Self::Network { what, why: error.to_string(), hint: None },
        }
    }
}

impl From<LockError> for SourceError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Fs(error) => error.into(),
            LockError::Cancelled(cancelled) => cancelled.into(),
        }
    }
}

impl From<TreeError> for SourceError {
    fn from(error: TreeError) -> Self {
        match error {
            TreeError::Fs(error) => error.into(),
            TreeError::Cancelled(cancelled) => cancelled.into(),
            error => Self::Hostile { what: "the source tree".to_owned(), why: error.to_string() },
        }
    }
}

/// The size of those of a model's files.
pub fn wanted_bytes(pin: &Pin, wanted: &[usize]) -> u64 {
    wanted.iter().filter_map(|index| pin.files.get(*index)).map(|file| file.size).fold(0, u64::saturating_add)
}

/// The digest of an engine's tree, for messages.
pub fn short(digest: &Digest) -> String {
    digest.hex()[..12].to_owned()
}

/// The source for a request.
pub fn of(spec: &SourceSpec) -> Box<dyn Source + '_> {
    match spec {
        SourceSpec::Git(spec) => Box::new(git::GitSource(spec)),
        SourceSpec::Pypi(spec) => Box::new(spec.clone()),
        SourceSpec::Hf(spec) => Box::new(spec.clone()),
        SourceSpec::Url(spec) => Box::new(spec.clone()),
        SourceSpec::Path(spec) => Box::new(spec.clone()),
    }
}

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
pub mod oci;
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
use crate::format::lockfile::{FilePin, FilesOrigin, Origin};
use crate::format::manifest::SourceSpec;
use crate::report::Task;

use self::git::GitSource;

const MAX_CERTIFICATES_BYTES: u64 = 16 << 20;

/// Everything that a source knows about its environment. Nothing in `source/` reads the environment itself.
#[derive(Debug, Clone)]
pub struct World {
    /// Receives progress, and says whether the user wants to stop.
    pub task: Task,
    /// The project's folder: `path` sources and submodules are relative to it.
    pub project: PathBuf,
    /// Where partial downloads and git mirrors are kept between runs. Nothing in it is trusted.
    pub scratch: PathBuf,
    /// Send no request.
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

    /// The address after `[mirrors]` is applied: the longest prefix decides.
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

/// A source of files: resolves a request to a pin and digests, and brings the pinned files to a staging folder.
pub trait Source {
    /// What a request resolves to, beside the digests of its content.
    type Pin;

    /// Finds out which files the request means today. Downloads no weights where the protocol can say their digests.
    ///
    /// # Errors
    /// [`SourceError`], with the words of the network or the server.
    fn resolve_files(&self, world: &World) -> Result<(Self::Pin, Vec<FilePin>), SourceError>;

    /// Brings `files`, which are some of those that were pinned, to their pinned paths in the empty folder `staging`. Never
    /// follows a moved tag or branch: fetches only what is pinned.
    ///
    /// # Errors
    /// [`SourceError`]; the staging folder must then be discarded.
    fn fetch_files(
        &self,
        world: &World,
        pin: &Self::Pin,
        files: &[&FilePin],
        staging: &Path,
    ) -> Result<Fetched, SourceError>;

    /// Where fetching `files` takes space, and how much in bytes: less where they, or parts of them, are on this machine.
    ///
    /// # Errors
    /// When nothing says where the space would be taken.
    fn space(&self, world: &World, _: &Self::Pin, files: &[&FilePin]) -> Result<(PathBuf, u64), SourceError> {
        Ok((world.scratch.clone(), bytes_of(files)))
    }

    /// Files outside the store that a later fetch may take instead of the network, each with the pin that it should be.
    /// Needs no network.
    fn copies(&self, _: &World, _: &Self::Pin, _: &[&FilePin]) -> Vec<(PathBuf, FilePin)> {
        Vec::new()
    }
}

/// A source that can hold the source tree of an engine, too.
pub trait TreeSource: Source {
    /// Finds out which tree the request means today, and its digest.
    ///
    /// # Errors
    /// [`SourceError`], with the words of the network or the server.
    fn resolve_tree(&self, world: &World) -> Result<(Self::Pin, Digest), SourceError>;

    /// Brings the pinned tree, whose digest should be `tree`, to the empty folder `staging`.
    ///
    /// # Errors
    /// [`SourceError`]; the staging folder must then be discarded.
    fn fetch_tree(&self, world: &World, pin: &Self::Pin, tree: &Digest, staging: &Path)
    -> Result<Fetched, SourceError>;
}

/// Resolves the source of an engine.
///
/// # Errors
/// The source's; a Hugging Face repository, which the manifest's parser refuses here, is an error, too.
pub fn resolve_tree(spec: &SourceSpec, world: &World) -> Result<(Origin, Digest), SourceError> {
    Ok(match spec.clone() {
        SourceSpec::Git(request) => {
            let (pin, tree) = GitSource(&request).resolve_tree(world)?;
            (Origin::Git { request, pin }, tree)
        }
        SourceSpec::Url(request) => {
            let (download, tree) = request.resolve_tree(world)?;
            (Origin::Url { request, download }, tree)
        }
        SourceSpec::Path(request) => {
            let ((), tree) = request.resolve_tree(world)?;
            (Origin::Path { request }, tree)
        }
        SourceSpec::Pypi(request) => {
            let (download, tree) = request.resolve_tree(world)?;
            (Origin::Pypi { request, download }, tree)
        }
        SourceSpec::Hf(request) => {
            return Err(SourceError::Disagreement {
                what: format!("`{}` on the Hugging Face Hub cannot be the source of an engine", request.hf),
                details: vec!["repositories there hold models".to_owned()],
                hint: None,
            });
        }
    })
}

/// Resolves the source of a model.
///
/// # Errors
/// The source's.
pub fn resolve_files(spec: &SourceSpec, world: &World) -> Result<(FilesOrigin, Vec<FilePin>), SourceError> {
    let (origin, files) = match spec.clone() {
        SourceSpec::Hf(request) => {
            let (commit, files) = request.resolve_files(world)?;
            return Ok((FilesOrigin::Hub { request, commit }, files));
        }
        SourceSpec::Git(request) => {
            let (pin, files) = GitSource(&request).resolve_files(world)?;
            (Origin::Git { request, pin }, files)
        }
        SourceSpec::Url(request) => {
            let (download, files) = request.resolve_files(world)?;
            (Origin::Url { request, download }, files)
        }
        SourceSpec::Path(request) => {
            let ((), files) = request.resolve_files(world)?;
            (Origin::Path { request }, files)
        }
        SourceSpec::Pypi(request) => {
            let (download, files) = request.resolve_files(world)?;
            (Origin::Pypi { request, download }, files)
        }
    };
    Ok((FilesOrigin::Other(origin), files))
}

/// Brings a locked source tree to a staging folder: see [`TreeSource::fetch_tree`].
///
/// # Errors
/// The source's.
pub fn fetch_tree(origin: &Origin, world: &World, tree: &Digest, staging: &Path) -> Result<Fetched, SourceError> {
    match origin {
        Origin::Git { request, pin } => GitSource(request).fetch_tree(world, pin, tree, staging),
        Origin::Url { request, download } => request.fetch_tree(world, download, tree, staging),
        Origin::Path { request } => request.fetch_tree(world, &(), tree, staging),
        Origin::Pypi { request, download } => request.fetch_tree(world, download, tree, staging),
    }
}

/// Brings locked files of a model to a staging folder: see [`Source::fetch_files`].
///
/// # Errors
/// The source's.
pub fn fetch_files(
    origin: &FilesOrigin,
    world: &World,
    files: &[&FilePin],
    staging: &Path,
) -> Result<Fetched, SourceError> {
    match origin {
        FilesOrigin::Hub { request, commit } => request.fetch_files(world, commit, files, staging),
        FilesOrigin::Other(Origin::Git { request, pin }) => GitSource(request).fetch_files(world, pin, files, staging),
        FilesOrigin::Other(Origin::Url { request, download }) => request.fetch_files(world, download, files, staging),
        FilesOrigin::Other(Origin::Path { request }) => request.fetch_files(world, &(), files, staging),
        FilesOrigin::Other(Origin::Pypi { request, download }) => request.fetch_files(world, download, files, staging),
    }
}

/// Where fetching locked files takes space, and how much in bytes: see [`Source::space`].
///
/// # Errors
/// The source's.
pub fn space(origin: &FilesOrigin, world: &World, files: &[&FilePin]) -> Result<(PathBuf, u64), SourceError> {
    match origin {
        FilesOrigin::Hub { request, commit } => request.space(world, commit, files),
        FilesOrigin::Other(Origin::Git { request, pin }) => GitSource(request).space(world, pin, files),
        FilesOrigin::Other(Origin::Url { request, download }) => request.space(world, download, files),
        FilesOrigin::Other(Origin::Path { request }) => request.space(world, &(), files),
        FilesOrigin::Other(Origin::Pypi { request, download }) => request.space(world, download, files),
    }
}

/// Files outside the store that a later fetch may use: see [`Source::copies`].
pub fn copies(origin: &FilesOrigin, world: &World, files: &[&FilePin]) -> Vec<(PathBuf, FilePin)> {
    match origin {
        FilesOrigin::Hub { request, commit } => request.copies(world, commit, files),
        FilesOrigin::Other(_) => Vec::new(),
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

/// Why a source could not resolve or fetch something.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
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

/// The sum of the sizes, in bytes.
fn bytes_of(files: &[&FilePin]) -> u64 {
    files.iter().map(|file| file.size).fold(0, u64::saturating_add)
}

//! Why a verb failed. Facts only: `cli/failure.rs` maps each to a kind, an exit code and a hint, exhaustively.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::base::cancel::Cancelled;
use crate::base::diagnostic::Diagnostics;
use crate::base::fs::FsError;
use crate::base::name::Name;
use crate::base::process::ProcessError;
use crate::base::tree::TreeError;
use crate::build::BuildError;
use crate::build::command::CommandError;
use crate::build::toolchain::ToolError;
use crate::engine::EngineError;
use crate::engine::backend::BackendError;
use crate::format::manifest::Kind;
use crate::gateway::access::KeyError;
use crate::gateway::listener::TlsError;
use crate::source::SourceError;
use crate::store::StoreError;

use super::run::RunError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum Failure {
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// Problems in input files, with their places.
    #[error("{0}")]
    Input(#[from] Diagnostics),
    #[error("{what}")]
    Usage { what: String, hint: Option<String> },
    #[error("no manifest `{name}` was found from `{}` upwards", from.display())]
    NoManifest { name: String, from: PathBuf },
    #[error("there is no lockfile `{}`", path.display())]
    NoLock { path: PathBuf },
    /// The lockfile does not say what the manifest asks for: one line per entry.
    #[error("the lockfile `{}` is out of date", path.display())]
    Stale { path: PathBuf, entries: Vec<Staleness> },
    #[error("the project is not synced: {} left to do", count_of(.steps.len(), "step"))]
    NotSynced { steps: Vec<crate::plan::Step> },
    /// One entry could not be resolved or fetched.
    #[error("{} `{name}`: {error}", kind.as_str())]
    Source { kind: Kind, name: Name, error: SourceError, lock_line: Option<String> },
    /// A bundle could not be read or written.
    #[error("{0}")]
    Bundle(SourceError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What was fetched is not what the lockfile says, twice.
    #[error("{} `{name}`: {error}", kind.as_str())]
    Integrity { kind: Kind, name: Name, error: StoreError, lock_line: Option<String> },
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("engine `{engine}`: {error}")]
    Build { engine: Name, error: BuildError },
    #[error("engine `{engine}`: {error}")]
    Toolchain { engine: Name, error: ToolError },
    #[error("engine `{engine}`: {error}")]
    Recipe { engine: Name, error: EngineError },
    #[error("model `{model}`: {error}")]
    Derive { model: Name, error: DeriveError },
    #[error("policy `{policy}`: {error}")]
    Run { policy: Name, error: RunError },
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// Files on disk that are not what the lockfile or a receipt says.
    #[error("{}", count_of(.damages.len(), "file does not match|files do not match"))]
    Damaged { damages: Vec<Damaged> },
    /// Sizes in bytes.
    #[error(
        "{what}: {needed} bytes and a reserve of {reserve} are needed, {available} are free at `{}`",
        at.display()
    )]
    NoSpace { what: String, needed: u64, reserve: u64, available: u64, at: PathBuf },
}

/// Why there is no gateway, or none that answers.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// It would be open to everybody who can reach the machine.
    #[error("{0} can be reached by other machines, and no API key is set")]
    Open(SocketAddr),
    /// There is one already.
    #[error("a server of this project runs already, at {url} (process {pid})")]
    Running {
        /// Where clients reach it.
        url: String,
        /// Its process.
        pid: u32,
    },
    /// There is none to talk to.
    #[error("no server of this project is running")]
    NotRunning,
    /// No policy is ready to run.
    #[error("none of the policies can be served")]
    Unusable {
        /// One line for each policy.
        problems: Vec<String>,
    },
    /// What a running gateway answered.
    #[error("{0}")]
    Answer(String),
    /// An API key that cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A certificate that cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system refuses something.
    #[error("cannot serve: {0}")]
    Runtime(io::Error),
}

/// Why a model could not be derived.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum DeriveError {
    /// The engine has no such derivation, or cannot use its inputs.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine's program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// There is no Python that the conversion can use.
    #[error(transparent)]
    Python(#[from] PythonError),
    /// The program ended well, and wrote what the engine cannot use.
    #[error("the result cannot be used: {}", .why.join("; "))]
    Useless { why: Vec<String>, log: PathBuf },
}

/// Why a conversion has no Python.
#[derive(Debug, Clone, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum PythonError {
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error("there is no CPython 3 on this machine")]
    None,
    #[error(
        "`{package}` has no wheel for {}: it has wheels for {}",
        .here.join(" or "),
        if .there.is_empty() { "no Python of this system".to_owned() } else { .there.join(", ") }
    )]
    NoWheel { package: Name, here: Vec<String>, there: Vec<String> },
}

/// One entry of a lockfile that does not match the manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Staleness {
    /// What the entry is for.
    pub kind: Kind,
    /// Its name in the manifest.
    pub name: Name,
    /// In what way it does not match.
    pub why: Why,
}

/// In what way a lockfile entry does not match the manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case", tag = "why")]
#[expect(missing_docs, reason = "the fields are described with their variant")]
pub enum Why {
    /// The manifest has it, the lockfile does not.
    Added,
    /// The lockfile has it, the manifest does not.
    Removed,
    /// Both have it, with different requests; what each says.
    Changed { manifest: String, lock: String },
    /// The files of its `path` source were edited since they were locked: earlier they were hashed here, and were those.
    Edited,
    /// The files of its `path` source are not those that were locked, and never were as far as this machine knows.
    Differs,
    /// What a model is derived from is locked differently than before.
    Inputs,
    /// The lockfile's text has an unresolved merge conflict here.
    Conflict,
}

/// A file that is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damaged {
    /// The file or folder.
    pub path: PathBuf,
    /// What it is, for messages: `weights file`.
    pub what: String,
    /// What it should be: a digest.
    pub expected: String,
    /// None when it is missing.
    pub computed: Option<String>,
    /// Its size in bytes; None when it is missing.
    pub size_bytes: Option<u64>,
    /// `file:line` of the lockfile, or the receipt.
    pub recorded_in: String,
}

/// `1 step`, `2 steps`; `one|many` gives both words.
fn count_of(count: usize, words: &str) -> String {
    match words.split_once('|') {
        Some((one, many)) => format!("{count} {}", if count == 1 { one } else { many }),
        None => format!("{count} {words}{}", if count == 1 { "" } else { "s" }),
    }
}

impl Failure {
    /// Whether the user cancelled, in any nested error.
    pub fn is_interruption(&self) -> bool {
        let store =
            |error: &StoreError| matches!(error, StoreError::Cancelled(_) | StoreError::Tree(TreeError::Cancelled(_)));
        let process = |error: &ProcessError| matches!(error, ProcessError::Cancelled(_));
        match self {
            Self::Cancelled(_) => true,
            Self::Store(error) | Self::Integrity { error, .. } => store(error),
            Self::Source { error, .. } | Self::Bundle(error) => matches!(error, SourceError::Cancelled(_)),
            Self::Build { error, .. } | Self::Derive { error: DeriveError::Command(CommandError::Run(error)), .. } => {
                matches!(error, BuildError::Cancelled(_))
                    || matches!(error, BuildError::Process(error) if process(error))
            }
            Self::Toolchain { error: ToolError::Process(error), .. } => process(error),
            Self::Run { error: RunError::Cancelled(_), .. } => true,
            Self::Run { error: RunError::Backend(BackendError::Process(error)), .. } => process(error),
            _ => false,
        }
    }

    /// A run's error.
    pub fn run(policy: &Name, error: RunError) -> Self {
        match error {
            RunError::Fs(error) => error.into(),
            error => Self::Run { policy: policy.clone(), error },
        }
    }

    /// A source's error about one entry.
    pub fn source(kind: Kind, name: &Name, error: SourceError, lock_line: Option<String>) -> Self {
        Self::Source { kind, name: name.clone(), error, lock_line }
    }
}

//! Layer 3: one file per engine. Only `engine/<name>.rs` knows an engine's flags, target names, formats or endpoints.
//!
//! A new engine is one file and one line in [`ENGINES`].
//!
//! Beside the engines: [`derive`] says how one makes a model from another; [`backend`] keeps one alive; [`http`], [`stream`] and [`answer`] are what talking to one takes;
//! [`metrics`] says how it did.

pub mod answer;
pub mod backend;
pub mod cmake;
pub mod derive;
pub mod http;
pub mod llama_cpp;
pub mod metrics;
pub mod powerinfer;
pub mod stream;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use self::answer::Sink;
use self::derive::{Derivation, DeriveRequest};
use self::http::{HttpError, Patience};
use crate::base::cancel::{Cancel, Cancelled};
use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::{Platform, Variant};
use crate::build::BuildRecipe;
use crate::build::accelerator::Gpu;
use crate::format::gguf::Header;
use crate::format::manifest::{EngineSpec, Step};
use crate::format::policy::Policy;

/// Every adapter there is.
pub const ENGINES: &[&dyn Engine] = &[&llama_cpp::LlamaCpp, &powerinfer::PowerInfer];

/// The adapter of that id.
pub fn find(id: &str) -> Option<&'static dyn Engine> {
    ENGINES.iter().copied().find(|engine| engine.id() == id)
}

/// What is said of an engine, of all of them, in one place each.
pub trait Engine: std::fmt::Debug + Sync {
    /// The word in manifests and policies: `llama-cpp`.
    fn id(&self) -> &'static str;

    /// How to build it. Pure: the same request gives the same recipe.
    ///
    /// # Errors
    /// When this engine has no such variant on this platform.
    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError>;

    /// Which accelerators this engine can be built for on a platform.
    fn variants(&self, platform: Platform) -> &'static [Variant];

    /// Everything that is wrong with running `model` under `policy`, before anything is started. Pure.
    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding>;

    /// What can be told of a policy before its model is at hand.
    fn check_policy(&self, _: &Policy) -> Vec<Finding> {
        Vec::new()
    }

    /// Memory for weights and caches together, in bytes: an estimate from the header alone.
    fn memory_bytes(&self, policy: &Policy, header: &Header, sizes: &[u64]) -> u64;

    /// The command that serves one model under one policy. Pure but for the port and key given.
    ///
    /// # Errors
    /// When the policy asks for what this engine cannot do.
    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError>;

    /// Makes what must lie in the scratch folder beside the launch's small files, before each start.
    ///
    /// # Errors
    /// When what it is made of is missing or wrong, or the disk fails.
    fn prepare(&self, _: &LaunchRequest<'_>) -> Result<(), EngineError> {
        Ok(())
    }

    /// Whether the started engine answers for its model yet. Called again every few milliseconds until it does.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`]; [`EngineError::Foreign`] when what listens there is not the engine that was given this key; others when it
    /// answers that it never will.
    fn ready(&self, endpoint: &Endpoint, patience: Patience<'_>) -> Result<bool, EngineError>;

    /// One answer, handed to `sink` piece by piece as it comes. `sink` returns false to stop; so does `ask.cancel`.
    /// Either way the pieces so far are the answer, and its end is [`Finish::Cancelled`].
    ///
    /// # Errors
    /// What the engine or the connection said. The pieces handed over before remain true.
    fn generate(
        &self,
        endpoint: &Endpoint,
        ask: &GenerateRequest<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<Generated, EngineError>;

    /// What the engine prints about a start that only looks as if it went well: a judge of its lines, when there is anything
    /// to judge. The judge gives None for a line that is about something else.
    fn judge(&self, _: &LaunchRequest<'_>) -> Option<Judge> {
        None
    }

    /// What deriving a model this way takes. Pure: the manifest's words are all there is.
    ///
    /// # Errors
    /// When this engine has no such step, or what comes out would be of no use to it.
    fn derivation(&self, step: Step<'_>, _: &EngineSpec) -> Result<Derivation, EngineError> {
        let (engine, step) = (self.id(), step.to_string());
        Err(EngineError::Underivable { why: format!("engine `{engine}` has no step to {step}"), hint: None })
    }

    /// The command that derives a model, for inputs that are there.
    ///
    /// # Errors
    /// When nothing of use can come of these inputs.
    fn derive(&self, ask: &DeriveRequest<'_>) -> Result<Launch, EngineError> {
        let why = format!("engine `{}` makes no `{}`", self.id(), ask.output.display());
        Err(EngineError::Underivable { why, hint: None })
    }

    /// What is wrong with a file that was derived, of `size` bytes. Pure.
    fn check_derived(&self, _: &DeriveRequest<'_>, _: &Header, _: u64) -> Vec<Finding> {
        Vec::new()
    }

    /// What the built program says of itself, for `status` and receipts: run with no model.
    fn version_args(&self) -> &'static [&'static str];
}

/// Whether the start was as asked for, by one line of an engine's output.
pub type Judge = fn(&str) -> Option<Result<(), EngineError>>;

#[derive(Debug)]
pub struct RecipeRequest<'a> {
    pub spec: &'a EngineSpec,
    /// The commit of the source, when it comes from git.
    pub commit: Option<Commit>,
    /// The digest of the source tree.
    pub tree: &'a Digest,
    pub platform: Platform,
    pub variant: Variant,
}

#[derive(Debug)]
pub struct CheckRequest<'a> {
    pub policy: &'a Policy,
    pub variant: Variant,
    /// The main weights file's header, and every part's when it is split; in order.
    pub headers: &'a [Header],
    /// The size of each part in bytes.
    pub sizes: &'a [u64],
    /// Physical processor cores.
    pub cores: u32,
    /// The machine's memory in bytes, when it is known.
    pub memory_bytes: Option<u64>,
    /// The model's files that are no weights, as its source names them.
    pub beside: &'a [RelPath],
    /// NVIDIA's graphics processors here, when the variant needs one and the driver answers.
    pub gpus: Option<&'a [Gpu]>,
    /// The engine's commit, when its source has one.
    pub commit: Option<&'a str>,
}

/// One thing that is wrong (or doubtful) about a model under a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A warning does not stop a run.
    pub error: bool,
    /// The policy key it is about (`runtime.context_size`), or empty when it is about the model.
    pub key: &'static str,
    pub message: String,
    pub hint: Option<String>,
}

#[derive(Debug)]
pub struct LaunchRequest<'a> {
    pub policy: &'a Policy,
    pub variant: Variant,
    /// The installed artifact's folder.
    pub artifact: &'a Path,
    /// The main weights file.
    pub weights: &'a Path,
    pub header: &'a Header,
    /// A free port on 127.0.0.1.
    pub port: u16,
    /// A random key that requests must carry.
    pub key: &'a str,
    /// A scratch folder of this run: engines that write files into their working directory do it there.
    pub scratch: &'a Path,
    /// Physical processor cores.
    pub cores: u32,
}

/// Everything that an answer takes, at hand and verified: what `sync` leaves behind for one policy.
#[derive(Debug, Clone)]
pub struct Ready {
    pub engine: &'static dyn Engine,
    pub name: Name,
    pub policy: Policy,
    /// Of the policy file's bytes.
    pub policy_sha256: Digest,
    pub variant: Variant,
    /// The installed artifact's folder, and what it is.
    pub artifact: PathBuf,
    pub fingerprint: Digest,
    /// The main weights file, and what it is.
    pub weights: PathBuf,
    pub weights_sha256: Digest,
    pub header: Header,
    /// Physical processor cores.
    pub cores: u32,
}

impl Ready {
    /// The command, once its scratch folder is prepared.
    ///
    /// # Errors
    /// When the policy asks for what the engine cannot do, or [`Engine::prepare`] fails.
    pub fn launch(&self, endpoint: &Endpoint, scratch: &Path) -> Result<Launch, EngineError> {
        let ask = self.ask(endpoint, scratch);
        self.engine.prepare(&ask)?;
        self.engine.launch(&ask)
    }

    /// [`Engine::judge`] of this start.
    pub fn judge(&self, endpoint: &Endpoint, scratch: &Path) -> Option<Judge> {
        self.engine.judge(&self.ask(endpoint, scratch))
    }

    fn ask<'a>(&'a self, endpoint: &'a Endpoint, scratch: &'a Path) -> LaunchRequest<'a> {
        LaunchRequest {
            policy: &self.policy,
            variant: self.variant,
            artifact: &self.artifact,
            weights: &self.weights,
            header: &self.header,
            port: endpoint.port,
            key: &endpoint.key,
            scratch,
            cores: self.cores,
        }
    }
}

/// The command to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// Added to the scrubbed environment. Secrets travel here: other users cannot read it, unlike arguments.
    pub env: BTreeMap<OsString, OsString>,
    pub cwd: PathBuf,
    /// Small files to write first, below the scratch folder.
    pub files: BTreeMap<PathBuf, String>,
}

/// Where a started engine listens: `http://127.0.0.1:<port>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub port: u16,
    pub key: String,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("port", &self.port).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub struct GenerateRequest<'a> {
    pub policy: &'a Policy,
    pub header: &'a Header,
    pub prompt: &'a str,
    /// What the sampling starts from: the policy's seed, or one that the caller drew and remembers.
    pub seed: u32,
    /// Until when an answer must be there.
    pub deadline: Instant,
    pub cancel: &'a Cancel,
}

/// A part of an answer, never cut inside a character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    Text(&'a str),
    /// What a reasoning model says to itself before it answers.
    Thought(&'a str),
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// End of text, or a stop text.
    Stop,
    /// `max_tokens` or the context was reached.
    Length,
    /// The user stopped it.
    Cancelled,
}

/// What came out, in the engine's own numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generated {
    pub text: String,
    /// What a reasoning model said to itself; empty for others.
    pub thought: String,
    pub finish: Finish,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Tokens of the first piece (1 unless an engine holds text back).
    pub first_tokens: u64,
    /// Prompt tokens that were taken from a cache.
    pub cached_tokens: Option<u64>,
    /// Milliseconds the engine spent on the prompt.
    pub prompt_ms: Option<f64>,
    /// Milliseconds the engine spent on the answer.
    pub decode_ms: Option<f64>,
    /// Milliseconds from sending the request to the first text, by our clock.
    pub first_token_ms: Option<f64>,
    /// Milliseconds from the first text to the last, by our clock. None with fewer than two pieces.
    pub streaming_ms: Option<f64>,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("engine `{engine}` has no variant `{variant}` on {platform}")]
    NoVariant { engine: &'static str, variant: Variant, platform: String },
    #[error("policy key `{key}`: {why}")]
    Policy { key: &'static str, why: String },
    /// A model cannot be derived as the manifest says.
    #[error("{why}")]
    Underivable { why: String, hint: Option<String> },
    /// The connection ended, or what came over it makes no sense.
    #[error("the engine did not answer: {0}")]
    Unanswered(String),
    #[error("the engine refused the request: {0}")]
    Refused(String),
    #[error("the prompt has {prompt_tokens} tokens and the context holds {context_size}")]
    TooLong { prompt_tokens: u64, context_size: u64 },
    #[error("port {0} belongs to another program")]
    Foreign(u16),
    #[error("no answer in time")]
    Timeout,
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl From<HttpError> for EngineError {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Cancelled(cancelled) => cancelled.into(),
            HttpError::Timeout => Self::Timeout,
            other => Self::Unanswered(other.to_string()),
        }
    }
}

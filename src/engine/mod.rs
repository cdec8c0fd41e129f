//! Layer 3: one file or folder per engine. Only `engine/<name>.rs` knows an engine's flags, target names, formats or endpoints.
//!
//! A new engine is one file and one line in [`ENGINES`]. It is made of four things, each with its own trait or type:
//!
//! | what | where |
//! |---|---|
//! | how it is installed | [`InstallMethod`], from [`Engine::install_method`]; carried out by `ops/install/` |
//! | what it knows about a model | [`Model`], opened by [`Engine::open`]; [`gguf`] serves engines whose models are GGUF files |
//! | how it is started | [`Launch`], from [`Model::launch`]; [`backend`] starts and supervises it |
//! | how it is talked to | [`conversation::Conversation`]; [`openai`] serves every engine that speaks the OpenAI API |
//!
//! [`client`] and [`sse`] are the HTTP below conversations, [`control_tokens`] keeps messages free of a model's control tokens,
//! [`answer`] and [`metrics`] what comes of one, [`derive`] says how an engine makes a model from another one, and [`finding`]
//! holds the checks that engines share.

pub mod answer;
pub mod backend;
pub mod client;
pub mod cmake;
pub mod control_tokens;
pub mod conversation;
pub mod derive;
pub mod finding;
pub mod gguf;
pub mod llama_cpp;
pub mod metrics;
pub mod openai;
pub mod powerinfer;
pub mod sse;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::cmake::CmakeProject;
use self::conversation::Conversation;
use self::derive::{Derivation, DeriveRequest};
use self::finding::Finding;
use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;
use crate::build::accelerator::Gpu;
use crate::format::manifest::{EngineSpec, Step};
use crate::format::policy::Policy;

/// The adapters that this program has. They reach the pipeline as a value (`ops::Host::engines`), so that another program, such
/// as a test, can have more.
pub const ENGINES: &[&dyn Engine] = &[&llama_cpp::LlamaCpp, &powerinfer::PowerInfer];

/// An engine: how it is installed, and how it opens a model. Everything later is up to the opened [`Model`].
pub trait Engine: std::fmt::Debug + Sync {
    /// The name in manifests and policies: `llama-cpp`.
    fn id(&self) -> &'static str;

    /// How it is installed.
    fn install_method(&self) -> InstallMethod<'_>;

    /// What is wrong with a policy, as far as it can be told without its model.
    fn check_policy(&self, _: &Policy) -> Vec<Finding> {
        Vec::new()
    }

    /// Reads what the engine has to know about a model: the headers of its files, never the weights.
    ///
    /// # Errors
    /// When a file cannot be read, or is not of a format that this engine loads.
    fn open(&self, files: &ModelFiles<'_>) -> Result<Arc<dyn Model>, ModelError>;

    /// What deriving a model this way takes. Pure: decided by the manifest alone.
    ///
    /// # Errors
    /// When this engine has no such step, or could not use the result.
    fn derivation(&self, step: Step<'_>, _: &EngineSpec) -> Result<Derivation, EngineError> {
        let (engine, step) = (self.id(), step.to_string());
        Err(EngineError::Underivable { why: format!("engine `{engine}` has no step to {step}"), hint: None })
    }

    /// The command that derives a model, for inputs that are there.
    ///
    /// # Errors
    /// When the inputs cannot give a model that the engine can use.
    fn derive(&self, ask: &DeriveRequest<'_>) -> Result<Launch, EngineError> {
        let why = format!("engine `{}` makes no `{}`", self.id(), ask.output.display());
        Err(EngineError::Underivable { why, hint: None })
    }

    /// What is wrong with the file that [`Engine::derive`]'s command has written.
    fn check_derived(&self, _: &DeriveRequest<'_>) -> Vec<Finding> {
        Vec::new()
    }
}

/// How an engine is installed, with what that method needs to know about the engine. Each method is one file of
/// `ops/install/`.
#[derive(Debug, Clone, Copy)]
pub enum InstallMethod<'a> {
    /// Compiled from its locked source with CMake.
    Cmake(&'a dyn CmakeProject),
}

/// A model as one engine sees it.
pub trait Model: std::fmt::Debug + Send + Sync {
    /// Everything that is wrong with running this model under a policy, before anything is started. Pure.
    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding>;

    /// How large it is under a policy: an estimate from headers, never from weights. None when the adapter cannot tell.
    fn size(&self, _: &Policy, _: Variant) -> Option<ModelSize> {
        None
    }

    /// The command that serves this model under a policy. Pure: the same request gives the same command.
    ///
    /// # Errors
    /// When the policy requires what this engine cannot do.
    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError>;

    /// Writes what must lie in the scratch folder beside the launch's small files, before each start.
    ///
    /// # Errors
    /// When an input is missing or wrong, or the disk fails.
    fn prepare(&self, _: &LaunchRequest<'_>) -> Result<(), EngineError> {
        Ok(())
    }

    /// What the engine's output must say about a start, when "ready" alone does not prove that it started as requested.
    fn startup_check(&self, _: &LaunchRequest<'_>) -> Option<StartupCheck> {
        None
    }

    /// How to talk to the engine that serves this model there under a policy. Nothing is sent yet.
    ///
    /// # Errors
    /// When the policy requires what this engine cannot do.
    fn connect(&self, policy: &Policy, endpoint: &Endpoint) -> Result<Arc<dyn Conversation>, EngineError>;
}

/// How large a model is under a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSize {
    /// Bytes of all weights files.
    pub weights_bytes: u64,
    /// Bytes that its engine needs in the machine's memory.
    pub ram_bytes: u64,
    /// Bytes that its engine needs on the GPUs together.
    pub gpu_bytes: u64,
    /// Tokens of context of one request.
    pub context: u32,
    /// Tokens of context that the model was trained for, where it tells.
    pub trained: Option<u32>,
}

/// Judges one line of an engine's output: whether the engine started as requested. None for a line about something else.
pub type StartupCheck = fn(&str) -> Option<Result<(), EngineError>>;

/// The files of a model, verified before.
#[derive(Debug, Clone, Copy)]
pub struct ModelFiles<'a> {
    /// The main weights file first; all parts in order when it is split.
    pub weights: &'a [PathBuf],
    /// The model's other files, as its source names them. They lie beside the first weights file.
    pub beside: &'a [RelPath],
}

/// A model file that an engine cannot open.
#[derive(Debug, thiserror::Error)]
#[error("weights file `{}` is not usable: {why}", path.display())]
pub struct ModelError {
    /// The file.
    pub path: PathBuf,
    /// Why it cannot be opened.
    pub why: String,
}

/// A policy and the machine it is to run on.
#[derive(Debug, Clone, Copy)]
pub struct CheckRequest<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// The accelerator of the build.
    pub variant: Variant,
    /// Physical processor cores.
    pub cores: u32,
    /// The machine's memory in bytes, when it is known.
    pub memory_bytes: Option<u64>,
    /// NVIDIA's GPUs in this machine, when the variant needs one and the driver answers.
    pub gpus: Option<&'a [Gpu]>,
    /// The engine's commit, when its source has one.
    pub commit: Option<Commit>,
}

/// What a launch depends on.
#[derive(Debug, Clone, Copy)]
pub struct LaunchRequest<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// The policy's name.
    pub name: &'a str,
    /// The accelerator of the build.
    pub variant: Variant,
    /// The folder of the installed engine.
    pub artifact: &'a Path,
    /// Where the engine will listen.
    pub endpoint: &'a Endpoint,
    /// A folder of this start alone, for engines that write files into their working directory.
    pub scratch: &'a Path,
    /// Physical processor cores.
    pub cores: u32,
}

/// The verified inputs that one engine is started from: what `sync` leaves behind for one policy.
#[derive(Debug, Clone)]
pub struct Ready {
    /// The adapter.
    pub engine: &'static dyn Engine,
    /// The opened model.
    pub model: Arc<dyn Model>,
    /// The policy's name.
    pub name: Name,
    /// The policy.
    pub policy: Policy,
    /// Of the policy file's bytes.
    pub policy_sha256: Digest,
    /// The accelerator of the build.
    pub variant: Variant,
    /// The folder of the installed engine, and its fingerprint.
    pub artifact: PathBuf,
    /// The fingerprint of the installation.
    pub fingerprint: Digest,
    /// Of the main weights file.
    pub weights_sha256: Digest,
    /// Physical processor cores.
    pub cores: u32,
    /// Whether the engine may connect to other machines.
    pub network: bool,
}

impl Ready {
    /// The request for a start at this endpoint.
    pub fn launch_request<'a>(&'a self, endpoint: &'a Endpoint, scratch: &'a Path) -> LaunchRequest<'a> {
        LaunchRequest {
            policy: &self.policy,
            name: self.name.as_str(),
            variant: self.variant,
            artifact: &self.artifact,
            endpoint,
            scratch,
            cores: self.cores,
        }
    }
}

/// The command to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The program's file.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Added to the scrubbed environment. Secrets travel here: other users cannot read it, unlike arguments.
    pub env: BTreeMap<OsString, OsString>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Small files to write first, below the scratch folder.
    pub files: BTreeMap<PathBuf, String>,
}

/// Where a started engine listens: `http://127.0.0.1:<port>`.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The TCP port on the loopback interface.
    pub port: u16,
    /// A random key of this start, which requests carry as a bearer token.
    pub key: String,
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("port", &self.port).finish_non_exhaustive()
    }
}

/// What an engine cannot do, or did not do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum EngineError {
    #[error("engine `{engine}` has no variant `{variant}` on {platform}")]
    NoVariant { engine: &'static str, variant: Variant, platform: String },
    #[error("policy key `{key}`: {why}")]
    Policy { key: &'static str, why: String },
    /// A model cannot be derived as the manifest says.
    #[error("{why}")]
    Underivable { why: String, hint: Option<String> },
    /// The connection ended, or what came over it is not valid.
    #[error("the engine did not answer: {0}")]
    Unanswered(String),
    #[error("the engine refused the request: {0}")]
    Refused(String),
    #[error("engine `{engine}` does not support {what}")]
    Unsupported { engine: &'static str, what: &'static str },
    #[error("the prompt has {prompt_tokens} tokens and the context holds {context_size}")]
    TooLong { prompt_tokens: u64, context_size: u64 },
    #[error("port {0} belongs to another program")]
    Foreign(u16),
    #[error("no answer in time")]
    Timeout,
}

//! Layer 2: runs one [`BuildRecipe`] and says what came out. Knows nothing of engines.
//!
//! Invariant: a build sees a scrubbed environment and, where the system allows, no network and no private files. It writes to
//! its own work folder and its copy of the source alone; the parent process writes log and staged prefix, and only the store
//! makes that an artifact.
//!
//! | file | holds |
//! |---|---|
//! | [`run`](mod@run) | the steps: edit, configure, look at what CMake decided, build, collect |
//! | [`settings`] | environment and definitions that every build gets |
//! | [`command`] | one program of an artifact, off the network, for what is made with it |
//! | `watch` | a child's output, line by line |
//! | [`driver`] | the child process that runs CMake |
//! | [`isolation`], [`confine`], [`mounts`] | what it can reach: no network, no private files, fixed paths |
//! | [`log`], [`cmake_cache`] | what the tools said and decided |
//! | [`outputs`], `search_paths` | from the build folder to the prefix, and where programs find their libraries |
//! | [`toolchain`], [`accelerator`] | what this machine builds with, and for |
//! | [`fingerprint`] | what a build depends on |

pub mod accelerator;
pub mod cmake_cache;
pub mod command;
pub mod confine;
pub mod difference;
pub mod driver;
pub mod fatbin;
pub mod fingerprint;
pub mod isolation;
pub mod log;
pub mod mounts;
pub mod outputs;
pub mod run;
mod search_paths;
pub mod settings;
pub mod toolchain;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use run::run;

use crate::base::cancel::Cancelled;
use crate::base::fs::FsError;
use crate::base::name::{RelPath, RelPathError};
use crate::base::process::ProcessError;
use crate::format::receipt::InstalledFile;
use settings::Env;
use toolchain::Toolchain;

/// What a build may do with the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// It has none, or fails where it cannot be cut off.
    Never,
    /// It is cut off where the system allows that.
    Avoided,
    /// The manifest allows it.
    Allowed,
}

/// A build as an adapter defines it. Every field is an input of the fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildRecipe {
    /// Incremented when the adapter changes something that the other fields do not show.
    pub version: u32,
    /// CMake definitions, values as CMake writes them.
    pub define: BTreeMap<String, String>,
    /// CMake targets; all when empty.
    pub targets: Vec<String>,
    /// Definitions that must be ON in CMakeCache.txt after configure.
    pub require: Vec<String>,
    /// `CMAKE_BUILD_TYPE`.
    pub build_type: String,
    /// Replacements in the exported source before configure: what the build would otherwise find out from git.
    pub edits: Vec<SourceEdit>,
    /// What is installed: globs over the build folder, and the folder of the artifact they go to.
    pub outputs: Vec<OutputRule>,
    /// Texts of which each must be in an installed file, such as a function of the accelerator's library: what CMake says it
    /// will build and what comes out are two things.
    pub evidence: Vec<String>,
    /// Built for exactly this machine's processor: the processor's model then is an input.
    pub native: bool,
}

/// A text replacement in a source file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceEdit {
    /// The file, relative to the source.
    pub path: RelPath,
    /// The text to replace, which must occur exactly once.
    pub find: String,
    /// The text that replaces it.
    pub replace: String,
}

/// Files of the build folder that become part of the artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRule {
    /// A glob over the build folder, such as `bin/llama-server*`.
    pub glob: String,
    /// The folder below the artifact, such as `bin`.
    pub to: RelPath,
    /// Fail when nothing matches.
    pub required: bool,
}

/// A program that a build uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolPath {
    /// The program's file.
    pub path: PathBuf,
    /// What identifies it in the fingerprint: `4.4.4 sha256:…` for a locked tool, a version line for the machine's own.
    pub identity: String,
}

/// One build to run.
#[derive(Debug, Clone)]
pub struct BuildRequest {
    /// Our own program, which runs again as the [`driver`].
    pub driver: PathBuf,
    /// A copy of the source that is this build's own: builds write into it.
    pub source: PathBuf,
    /// The work folder, named by the fingerprint. Emptied at the start; may be deleted whenever no build runs.
    pub folder: PathBuf,
    /// An empty folder for what is installed. Left empty when the build fails.
    pub prefix: PathBuf,
    /// What to build.
    pub recipe: BuildRecipe,
    /// CMake.
    pub cmake: ToolPath,
    /// Without it make is used (on Windows nmake).
    pub ninja: Option<ToolPath>,
    /// The compilers.
    pub compilers: Toolchain,
    /// Compilers at a time.
    pub jobs: u32,
    /// What the build may do with the network.
    pub network: Network,
    /// Whether tools see the folders at fixed paths where the system allows that, instead of having paths mapped by flags.
    pub fixed_paths: bool,
    /// The caller's environment; [`settings::environment`] takes from it what a build may see.
    pub env: Env,
    /// Where everything that the tools say is written.
    pub log: PathBuf,
    /// What is built, for progress: `powerinfer (cpu)`.
    pub label: String,
}

impl BuildRequest {
    /// CMake's build folder.
    pub fn binary(&self) -> PathBuf {
        self.folder.join("build")
    }

    /// What tools take for the user's home.
    pub fn home(&self) -> PathBuf {
        self.folder.join("home")
    }

    /// The folder for temporary files.
    pub fn temp(&self) -> PathBuf {
        self.folder.join("tmp")
    }
}

/// What came out.
#[derive(Debug)]
pub struct Built {
    /// By path below the prefix.
    pub files: BTreeMap<RelPath, InstalledFile>,
    /// For the receipt: what does not change the result, such as seconds and the compilers' paths.
    pub notes: BTreeMap<String, String>,
    /// For people.
    pub warnings: Vec<String>,
}

/// A step of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// CMake's configure step.
    Configure,
    /// Compiling and linking.
    Build,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configure => "configure",
            Self::Build => "build",
        })
    }
}

/// The generator without ninja on Windows.
pub(crate) const NMAKE: &str = "NMake Makefiles";

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum BuildError {
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// The recipe contains a value that CMake would interpret differently.
    #[error("{what} `{value}` cannot be given to CMake: {why}")]
    Recipe { what: &'static str, value: String, why: &'static str },
    #[error("could not edit `{path}` of the source: {why}")]
    Edit { path: RelPath, why: String },
    #[error("CMake found no compiler for {language}")]
    NoCompiler { language: String, hint: &'static str, log: PathBuf },
    #[error("the {} step failed ({})", .0.phase, .0.status)]
    Failed(Box<Failure>),
    /// A required definition is not ON, so this is not the requested build.
    #[error(
        "`{definition}` is required, but {}",
        match .value {
            Some(value) => format!("CMake set it to `{value}`"),
            None => "the project does not use it".to_owned(),
        }
    )]
    NotBuilt {
        definition: String,
        /// `None`: the project does not use the definition.
        value: Option<String>,
        /// Lines of the configure step about accelerators and things that were not found.
        said: Vec<String>,
        log: PathBuf,
    },
    #[error("the build succeeded, but no built file contains `{text}`: it is not the requested variant")]
    NoEvidence { text: String, log: PathBuf },
    /// With `--offline`, on a system that would leave the build its network.
    #[error(
        "this system cannot run a build without network access ({why}), and `--offline` forbids a build with network access"
    )]
    NotIsolated { why: String },
    #[error("no space left on the disk ({available_bytes} bytes free): {said}")]
    NoSpace { said: String, available_bytes: u64, log: PathBuf },
    #[error("no built file matches `{glob}`")]
    NoOutput { glob: String, beside: Vec<String> },
    #[error("`{path}`: {why}")]
    Output { path: RelPath, why: &'static str },
    /// Anyone who can write to the current folder of a user could choose the libraries of the engine.
    #[error("`{path}` looks for libraries in the current folder: its RUNPATH has the entry `{entry}`")]
    SearchPath { path: RelPath, entry: String },
    #[error("invalid glob `{glob}`: {why}")]
    Glob { glob: String, why: String },
    #[error(transparent)]
    Name(RelPathError),
    #[error("the build folder holds too many files")]
    TooManyFiles,
}

/// CMake or a compiler failed.
#[derive(Debug)]
pub struct Failure {
    /// The step that failed.
    pub phase: Phase,
    /// How the driver ended: `exit status: 1`.
    pub status: String,
    /// The full log.
    pub log: PathBuf,
    /// The first error with some lines after it; nothing when no line looks like one.
    pub first_error: Option<String>,
    /// The last lines of the log.
    pub tail: Vec<String>,
    /// Who tried to reach what, which may be the cause.
    pub network: Vec<String>,
}

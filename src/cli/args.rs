//! The command line, as clap sees it: low-level words only. `settings.rs` makes decisions of them.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::base::name::Name;
use crate::base::platform::Variant;

/// Locks, builds, verifies and runs local LLM engines and their models.
///
/// A manifest says what you want, a lockfile says exactly what that is, and `sync` brings this machine there:
/// engine sources at their commits, built with named flags, and weights whose every byte was checked.
#[derive(Debug, Parser)]
#[command(name = "aitools", version, max_term_width = 110, after_help = EXIT_CODES)]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done · 1 a checked condition is false (stale lock, not synced) · 2 usage or input \
error · 3 integrity mismatch · 4 network needed or failed · 5 build failed · 6 not reproducible · 7 engine failed · \
8 the machine could not (disk full, no permission, missing program) · 130 interrupted";

#[derive(Debug, ClapArgs)]
pub struct Global {
    /// The manifest: a name (`quickstart` means `manifests/quickstart.toml`, searched upwards) or a path
    #[arg(short, long, global = true, env = "AITOOLS_MANIFEST", value_name = "NAME|PATH")]
    pub manifest: Option<String>,
    /// Work as if started in this folder
    #[arg(short = 'C', long, global = true, value_name = "DIR")]
    pub directory: Option<PathBuf>,
    /// One JSON object on stdout, also for failures; progress as JSON lines on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// Use no network at all, builds included
    #[arg(long, global = true)]
    pub offline: bool,
    /// Where verified files, sources and builds are kept [default: the platform's cache folder + `aitools`]
    #[arg(long, global = true, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Say only what went wrong
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// When to colour [default: auto]
    #[arg(long, global = true, value_name = "WHEN")]
    pub color: Option<Color>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a starter manifest, lockfile and policy: a small real model that runs everywhere
    Init(Init),
    /// Find out exactly what the manifest means today and write it to the lockfile
    Lock(Lock),
    /// Bring this machine to what the lockfile says: fetch, verify, build, place
    Sync(Sync),
    /// Check formats, cross references, model files and policies, with no side effects
    Check(Check),
    /// Hash everything on disk again, against lockfile and receipts; needs no network
    Verify(Verify),
    /// Run one prompt under a policy and stream the answer
    Run(Run),
    /// Show what is wanted, what is there, and why something would be rebuilt
    Status(Status),
    /// Show what this machine has: compilers, tools, GPUs, folders, space
    Doctor,
    /// Print the JSON Schema of a format
    Schema(Schema),
    /// Print shell completions
    Completions(Completions),
}

impl Command {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Init(_) => "init",
            Self::Lock(_) => "lock",
            Self::Sync(_) => "sync",
            Self::Check(_) => "check",
            Self::Verify(_) => "verify",
            Self::Run(_) => "run",
            Self::Status(_) => "status",
            Self::Doctor => "doctor",
            Self::Schema(_) => "schema",
            Self::Completions(_) => "completions",
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct Init {
    /// The folder to make a project of
    #[arg(default_value = ".")]
    pub path: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub struct Lock {
    /// Write nothing; fail with exit code 1 when the lockfile does not answer the manifest
    #[arg(long)]
    pub check: bool,
    /// Resolve again though the request did not change: everything, or the entries named
    #[arg(long, value_name = "NAME", num_args = 0.., conflicts_with = "check")]
    pub upgrade: Option<Vec<Name>>,
    /// The lockfile has merge conflicts: keep what both sides agree on, resolve the rest again
    #[arg(long, conflicts_with = "check")]
    pub resolve_conflicts: bool,
}

/// How `sync` and `run --sync` treat the lockfile.
#[derive(Debug, ClapArgs)]
pub struct LockMode {
    /// Fail when the lockfile is missing or would change (implied by `CI=true`)
    #[arg(long, env = "AITOOLS_LOCKED", value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, require_equals = true, default_missing_value = "true", conflicts_with = "frozen")]
    pub locked: Option<bool>,
    /// Use the lockfile as it is, without comparing it with the manifest
    #[arg(long, env = "AITOOLS_FROZEN", value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub frozen: Option<bool>,
}

/// What to build with.
#[derive(Debug, ClapArgs)]
pub struct BuildWith {
    /// Which build of an engine to use [default: the policy's, else what this machine has]
    #[arg(long, env = "AITOOLS_VARIANT", value_name = "VARIANT", value_parser = variant)]
    pub variant: Option<Variant>,
    /// Parallel compile jobs [default: the number of processors]
    #[arg(short, long, env = "AITOOLS_JOBS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub jobs: Option<u32>,
}

fn variant(text: &str) -> Result<Variant, String> {
    let found = Variant::ALL.into_iter().find(|variant| variant.as_str() == text);
    found.ok_or_else(|| "expected `cpu`, `cuda`, `rocm` or `metal`".to_owned())
}

#[derive(Debug, ClapArgs)]
pub struct Sync {
    /// Sync what these policies need [default: everything in the manifest]
    pub policies: Vec<String>,
    #[command(flatten)]
    pub lock: LockMode,
    #[command(flatten)]
    pub build: BuildWith,
    /// Show what would be done
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Check {
    /// Check these policies, by name or by file [default: all that the manifest includes]
    pub policies: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub struct Verify {
    /// Verify what these policies need [default: everything in the manifest]
    pub policies: Vec<String>,
    /// Fetch or build again what is bad, and only that
    #[arg(long)]
    pub repair: bool,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Run {
    /// The policy, by name or file
    #[arg(required_unless_present = "config")]
    pub policy: Option<String>,
    /// The prompt; `-` reads it from stdin
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short = 'f', long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    /// The policy file, instead of a policy's name
    #[arg(long, value_name = "FILE", conflicts_with = "policy")]
    pub config: Option<PathBuf>,
    /// The engine that the policy must be for
    #[arg(long, value_name = "NAME")]
    pub engine: Option<String>,
    /// The model that the policy must be for
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Sync what the policy needs first
    #[arg(long)]
    pub sync: bool,
    #[command(flatten)]
    pub lock: LockMode,
    #[command(flatten)]
    pub build: BuildWith,
    /// Put prompt and answer into the generation log, too
    #[arg(long)]
    pub log_prompts: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Status {
    /// Name the inputs of an engine's build, or of a derived model, that differ from what is there
    #[arg(long, value_name = "NAME")]
    pub why: Option<String>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Schema {
    pub format: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    Manifest,
    Policy,
    Settings,
}

#[derive(Debug, ClapArgs)]
pub struct Completions {
    pub shell: clap_complete::Shell,
}

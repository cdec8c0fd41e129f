//! The command line as clap parses it. No decisions: `settings.rs` merges it with variables and settings files.
#![expect(missing_docs, reason = "clap prints doc comments as help, so only options and commands have them")]

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use crate::base::name::Name;
use crate::base::platform::Variant;
use crate::format::oci::{Reference, ReferenceError};

/// Locks, builds, verifies and runs local LLM engines and their models.
///
/// A manifest names engines and models, a lockfile pins them, and `sync` installs them on this machine:
/// engine sources at their commits, built with named flags, and weights with their checksums verified.
#[derive(Debug, Parser)]
#[command(name = "aitools", version, max_term_width = 110, after_help = super::exit::help())]
pub struct Args {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

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
    /// Never use the network, not even in builds
    #[arg(long, global = true)]
    pub offline: bool,
    /// The cache folder for verified files, sources and builds [default: `aitools` in the platform's cache folder]
    #[arg(long, global = true, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Print errors only
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
    /// Resolve the manifest and write the lockfile
    Lock(Lock),
    /// Fetch, verify, build and place everything that the lockfile lists
    Sync(Sync),
    /// Check formats, cross references, model files and policies, with no side effects
    Check(Check),
    /// Hash everything on disk again and compare it with lockfile and receipts; needs no network
    Verify(Verify),
    /// Build engines again elsewhere, and compare every file bit for bit
    Reproduce(Reproduce),
    /// Run one prompt under a policy and stream the answer
    Run(Run),
    /// Run the smoke prompts of policies for real, and judge the answers
    Test(Test),
    /// Do what a pipeline needs: lock --check, sync --locked, check, verify, test, and with --reproduce the second build
    Ci(Ci),
    /// Serve all policies, or the named ones, at one OpenAI-compatible endpoint
    #[command(visible_alias = "server")]
    Serve(Serve),
    /// Chat with a policy's model on the terminal
    Chat(Chat),
    /// Show what a running server of this project serves
    Ps,
    /// Unload the engines of policies from a running server; the server itself when none is named
    Stop(Stop),
    /// Show what is ready, what is missing, and why something would be rebuilt
    Status(Status),
    /// Write evidence of what is installed: a bill of materials, provenance of engines, signatures of models
    Export(Export),
    /// Tell two lockfiles apart in words
    Diff(Diff),
    /// Show what the cache holds, and remove what no project needs
    Cache(Cache),
    /// Move everything that a project needs to a machine without a network, or through a registry
    Bundle(Bundle),
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
            Self::Reproduce(_) => "reproduce",
            Self::Run(_) => "run",
            Self::Test(_) => "test",
            Self::Ci(_) => "ci",
            Self::Serve(_) => "serve",
            Self::Chat(_) => "chat",
            Self::Ps => "ps",
            Self::Stop(_) => "stop",
            Self::Status(_) => "status",
            Self::Export(_) => "export",
            Self::Diff(_) => "diff",
            Self::Cache(ask) => ask.command.name(),
            Self::Bundle(ask) => ask.command.name(),
            Self::Doctor => "doctor",
            Self::Schema(_) => "schema",
            Self::Completions(_) => "completions",
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct Init {
    /// The folder to create the project in
    #[arg(default_value = ".")]
    pub path: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub struct Lock {
    /// Write nothing; fail with exit code 1 when the lockfile is out of date
    #[arg(long)]
    pub check: bool,
    /// Resolve again even if the manifest did not change: everything, or the named entries
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
    /// The build variant of engines [default: the policy's, else the best one that this machine supports]
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
    /// Fetch or build again what does not match, and only that
    #[arg(long)]
    pub repair: bool,
    /// Compare what is here with evidence that somebody else exported: a bill of materials, provenance, or a model's signature
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    /// The key that signed the evidence, a PEM file
    #[arg(long, value_name = "FILE", requires = "against")]
    pub public_key: Option<PathBuf>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Reproduce {
    /// Build these engines again [default: all of the manifest]
    pub engines: Vec<String>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Ci {
    /// Build every engine again and compare the bits
    #[arg(long)]
    pub reproduce: bool,
    /// Write a JUnit report
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Append a table in Markdown, for instance to $GITHUB_STEP_SUMMARY
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Test {
    /// Test these policies [default: all that the manifest includes]
    pub policies: Vec<String>,
    /// Compare the answers with those recorded beside the policies, with temperature 0
    #[arg(long)]
    pub golden: bool,
    /// Record the answers beside the policies as `<policy>.golden.json`, with temperature 0
    #[arg(long, conflicts_with = "golden")]
    pub record_golden: bool,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Run {
    /// The policy, by name or file
    #[arg(required_unless_present = "config")]
    pub policy: Option<String>,
    /// The prompt; `-` reads it from stdin, and other piped text is appended to it
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Read the prompt from a file; `-` is stdin
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
    /// Write prompt and answer to the generation log
    #[arg(long)]
    pub log_prompts: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Serve {
    /// The policies to serve [default: all that the manifest includes]
    pub policies: Vec<String>,
    /// The address to listen on; other machines reach only one that is not a loopback address
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS", value_parser = address)]
    pub host: IpAddr,
    /// The port to listen on; 0 is any free one
    #[arg(long, default_value_t = 8081, value_name = "PORT")]
    pub port: u16,
    /// A file with API keys, one a line; `AITOOLS_API_KEY` holds one, too
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Serve other machines without an API key
    #[arg(long)]
    pub insecure: bool,
    /// Another name by which clients reach the server, such as that of this machine
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
    /// The origin of pages that may use the server, such as `https://chat.example`; `*` is any
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// The certificate chain for https, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The key of the certificate, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Requests that may wait for one policy
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub queue: u32,
    /// Seconds that a policy waits for memory before busy engines of others take no new requests
    #[arg(long, default_value_t = 15, value_name = "SECONDS")]
    pub longest_wait: u32,
    /// Engines that may be loaded at a time [default: as many as fit in memory]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub max_loaded: Option<u32>,
    /// Seconds that running requests may take when the server ends
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    pub grace: u32,
    /// Say whether it would start, and start nothing
    #[arg(long)]
    pub check: bool,
    #[command(flatten)]
    pub build: BuildWith,
}

fn address(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        _ => text.parse().map_err(|_| "expected an address such as `127.0.0.1` or `0.0.0.0`".to_owned()),
    }
}

#[derive(Debug, ClapArgs)]
pub struct Chat {
    /// The policy, by name or file
    pub policy: String,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Stop {
    /// The policies whose engines end
    pub policies: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub struct Status {
    /// Show which inputs of an engine's build or of a derived model have changed
    #[arg(long, value_name = "NAME")]
    pub why: Option<String>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Export {
    /// What these policies need [default: everything in the manifest]
    pub policies: Vec<String>,
    /// The folder to write to
    #[arg(short, long, default_value = "evidence", value_name = "DIR")]
    pub output: PathBuf,
    /// Sign with this P-256 private key, a PEM file
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Diff {
    /// A lockfile; `-` is standard input, such as the output of `git show HEAD:manifests/default.lock`
    pub old: PathBuf,
    /// Another one [default: the project's]
    pub new: Option<PathBuf>,
}

#[derive(Debug, ClapArgs)]
pub struct Cache {
    #[command(subcommand)]
    pub command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Print the cache's folder
    Dir,
    /// Show what the cache takes of the disk
    Size,
    /// Show everything in the cache, and which projects need it
    List,
    /// Remove what no project needs; projects register when they are synced, and count until their lockfile is gone
    Prune(Prune),
    /// Remove everything; `sync` brings back what it needs
    Clean {
        /// Show what would be removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Print the key under which a pipeline should keep this project's cache
    Key(BuildWith),
}

impl CacheCommand {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dir => "cache dir",
            Self::Size => "cache size",
            Self::List => "cache list",
            Self::Prune(_) => "cache prune",
            Self::Clean { .. } => "cache clean",
            Self::Key(_) => "cache key",
        }
    }
}

impl BundleCommand {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Export(_) => "bundle export",
            Self::Import(_) => "bundle import",
            Self::Push(_) => "bundle push",
            Self::Pull(_) => "bundle pull",
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct Prune {
    /// Show what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Leave what was put there or linked within this time, such as `30days` or `12h`
    #[arg(long, value_name = "TIME")]
    pub older_than: Option<humantime::Duration>,
    /// Remove, the oldest first, only until the cache is not larger than this, such as `20GB`
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub max_size: Option<u64>,
}

fn bytes(text: &str) -> Result<u64, String> {
    let size: Result<bytesize::ByteSize, _> = text.parse();
    size.map(|size| size.as_u64()).map_err(|_| "expected a size such as `20GB` or `500MiB`".to_owned())
}

#[derive(Debug, ClapArgs)]
pub struct Bundle {
    #[command(subcommand)]
    pub command: BundleCommand,
}

#[derive(Debug, Subcommand)]
pub enum BundleCommand {
    /// Write what policies need to a folder, or to a tar archive
    Export(BundleExport),
    /// Take a folder or a tar archive into the cache; needs no project and no network
    Import(Import),
    /// Write what policies need to an OCI registry
    Push(Push),
    /// Take a bundle from an OCI registry into the cache
    Pull(Pull),
}

#[derive(Debug, ClapArgs)]
pub struct BundleExport {
    /// The folder to make, or the tar archive when the name ends in `.tar`
    #[arg(short, long, value_name = "PATH")]
    pub output: PathBuf,
    /// Bundle what these policies need [default: everything in the manifest]
    pub policies: Vec<String>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Import {
    /// The folder or tar archive
    pub path: PathBuf,
    /// Take engines and derived models whoever built them: whoever made the bundle can run code on this machine
    #[arg(long)]
    pub trust: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Push {
    /// Where to, such as `registry.example:5000/team/bundle:v1`
    #[arg(value_parser = reference)]
    pub reference: Reference,
    /// Bundle what these policies need [default: everything in the manifest]
    pub policies: Vec<String>,
    #[command(flatten)]
    pub build: BuildWith,
}

#[derive(Debug, ClapArgs)]
pub struct Pull {
    /// Where from, such as `registry.example:5000/team/bundle:v1` or `…/bundle@sha256:…`
    #[arg(value_parser = reference)]
    pub reference: Reference,
    /// Take engines and derived models whoever built them: whoever made the bundle can run code on this machine
    #[arg(long)]
    pub trust: bool,
}

fn reference(text: &str) -> Result<Reference, ReferenceError> {
    text.parse()
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

//! `doctor`: what this machine has, and what a project needs that it lacks. Changes nothing.

use std::path::PathBuf;
use std::time::Duration;

use crate::base::fs;
use crate::base::platform::{self, Platform, Variant};
use crate::base::process::Program;
use crate::build::accelerator::{self, Accelerators};
use crate::build::settings::Env;
use crate::build::toolchain::{COMPILER_HINT, ToolError};
use crate::build::{ToolPath, driver};
use crate::format::manifest::{Manifest, SourceSpec};
use crate::source::{hf, pypi};

use super::{Failure, Host, check};

/// What this machine has and lacks.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// Operating system and processor: `linux-x86_64`.
    pub platform: String,
    /// Cores without hyper-threads.
    pub physical_cores: u32,
    /// Main memory in bytes; None when the system does not tell.
    pub memory_bytes: Option<u64>,
    /// The cache folder.
    pub cache: PathBuf,
    /// Free space on the cache folder's disk, in bytes.
    pub cache_free_bytes: Option<u64>,
    /// Unfinished downloads and their like, in the cache folder and in the Hugging Face cache, in bytes.
    pub unfinished_bytes: u64,
    /// Damaged files of the Hugging Face cache that were renamed to `.bad`, in bytes.
    pub set_aside_bytes: u64,
    /// Programs and facilities, found or not.
    pub findings: Vec<Found>,
    /// GPUs and their toolkits; None when the user's environment makes detection fail.
    pub accelerators: Option<Accelerators>,
    /// What works but is probably not what the user wants.
    pub notes: Vec<String>,
    /// One command that installs everything needed that is missing, for this system's package manager.
    pub install: Option<String>,
}

/// One program or facility.
#[derive(Debug, serde::Serialize)]
pub struct Found {
    /// Its name: `git`.
    pub what: &'static str,
    /// What it says of itself; None when it is missing.
    pub identity: Option<String>,
    /// What needs it, or why it cannot be used.
    pub trouble: Option<String>,
    /// Whether the project needs it. Without a project: whether usual projects do.
    pub needed: bool,
}

/// What a manifest needs of the machine.
#[derive(Debug, Clone, Copy)]
struct Needs {
    compiler: bool,
    cmake: bool,
    git: bool,
    python: bool,
}

impl Needs {
    /// Those of usual projects.
    const USUAL: Self = Self { compiler: true, cmake: false, git: true, python: true };

    fn of(manifest: &Manifest) -> Self {
        let engines = manifest.engines.values().map(|engine| &engine.source);
        let mut sources: Vec<&SourceSpec> = engines.collect();
        let models = manifest.models.values().filter_map(|model| model.source.as_ref());
        sources.extend(models);
        let compiler = !manifest.engines.is_empty();
        Self {
            compiler,
            cmake: compiler && !manifest.tools.keys().any(|tool| tool.as_str() == "cmake"),
            git: sources.iter().any(|source| matches!(source, SourceSpec::Git(_))),
            python: !manifest.tools.is_empty() || sources.iter().any(|source| matches!(source, SourceSpec::Pypi(_))),
        }
    }
}

/// Looks for what `manifest` needs, or usual projects when there is none.
///
/// # Errors
/// When the user asked to stop.
pub fn run(host: &Host, manifest: Option<&Manifest>) -> Result<Report, Failure> {
    let needs = manifest.map_or(Needs::USUAL, Needs::of);
    let env = host.os_env();
    let finder = check::finder(host, &env);
    let mut findings = Vec::new();
    match finder.toolchain(false, false) {
        Ok(found) => {
            findings.push(there("C compiler", found.cc.identity, needs.compiler));
            findings.push(there("C++ compiler", found.cxx.identity, needs.compiler));
        }
        Err(error) => {
            findings.push(missing(COMPILERS, format!("builds need them: {error}"), needs.compiler));
        }
    }
    let unlocked = "needed by manifests that do not lock it under `[tools]`";
    findings.push(tool(CMAKE, finder.cmake().map(Some), unlocked, needs.cmake));
    findings.push(tool("ninja", finder.ninja(), unlocked, false));
    findings.push(git(host, &env, needs.git));
    findings.push(python(host, &env, needs.python));
    findings.push(confinement(host, &env));
    host.task.check()?;
    let (parts, set_aside_bytes) = hf::leftover_bytes(&host.env);
    let accelerators = accelerator::detect(&finder).ok();
    let lacking: Vec<&str> =
        findings.iter().filter(|found| found.needed && found.identity.is_none()).map(|found| found.what).collect();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        platform: Platform::HOST.to_string(),
        physical_cores: platform::physical_cores(),
        memory_bytes: platform::memory_bytes(),
        cache: host.store.root().to_owned(),
        cache_free_bytes: fs::available_bytes(host.store.root()).ok(),
        unfinished_bytes: parts.saturating_add(fs::size_below(&host.store.scratch())),
        set_aside_bytes,
        notes: manifest.map(|manifest| notes(manifest, accelerators.as_ref())).unwrap_or_default(),
        install: install_command(&lacking, |program| finder.search(program).is_some()),
        findings,
        accelerators,
    })
}

const COMPILERS: &str = "C and C++ compilers";
const CMAKE: &str = "CMake";
const GIT: &str = "git";
const PYTHON: &str = "Python 3 with pip";

/// A package manager's program, the command that installs with it, and the names of packages there.
type Manager = (&'static str, &'static str, [(&'static str, &'static str); 4]);

const MANAGERS: [Manager; 6] = [
    ("apt-get", "sudo apt install", [(COMPILERS, "g++"), (CMAKE, "cmake"), (GIT, "git"), (PYTHON, "python3-pip")]),
    ("dnf", "sudo dnf install", [(COMPILERS, "gcc-c++"), (CMAKE, "cmake"), (GIT, "git"), (PYTHON, "python3-pip")]),
    (
        "zypper",
        "sudo zypper install",
        [(COMPILERS, "gcc-c++"), (CMAKE, "cmake"), (GIT, "git"), (PYTHON, "python3-pip")],
    ),
    ("pacman", "sudo pacman -S", [(COMPILERS, "gcc"), (CMAKE, "cmake"), (GIT, "git"), (PYTHON, "python-pip")]),
    ("apk", "sudo apk add", [(COMPILERS, "g++"), (CMAKE, "cmake"), (GIT, "git"), (PYTHON, "py3-pip")]),
    ("brew", "brew install", [(COMPILERS, "llvm"), (CMAKE, "cmake"), (GIT, "git"), (PYTHON, "python")]),
];

/// The command of the first package manager that `has` finds; None when nothing is lacking or no manager is known.
fn install_command(lacking: &[&str], has: impl Fn(&str) -> bool) -> Option<String> {
    if lacking.contains(&COMPILERS) && !cfg!(target_os = "linux") {
        return Some(COMPILER_HINT.to_owned());
    }
    let (_, command, packages) = MANAGERS.iter().find(|(manager, ..)| has(manager))?;
    let names: Vec<&str> =
        packages.iter().filter(|(what, _)| lacking.contains(what)).map(|(_, package)| *package).collect();
    (!names.is_empty()).then(|| format!("{command} {}", names.join(" ")))
}

/// A GPU that no engine of the manifest is built for.
fn notes(manifest: &Manifest, accelerators: Option<&Accelerators>) -> Vec<String> {
    let Some(found) = accelerators else { return Vec::new() };
    let kinds = [
        ("an NVIDIA GPU", Variant::Cuda, !found.gpus.is_empty()),
        ("an AMD GPU", Variant::Rocm, !found.amd.is_empty()),
    ];
    let present = kinds.into_iter().filter(|(.., here)| *here);
    let note = |(gpu, variant, _)| {
        let without = manifest.engines.iter().filter(|(_, engine)| !engine.variant.contains_key(&variant));
        let names: Vec<String> = without.map(|(name, _)| format!("`{name}`")).collect();
        (!names.is_empty()).then(|| {
            let table = variant.as_str();
            format!(
                "this machine has {gpu}, but the manifest has no variant `{table}` of {}: \
                     add `[engines.NAME.variant.{table}]`",
                names.join(", ")
            )
        })
    };
    present.filter_map(note).collect()
}

fn there(what: &'static str, identity: String, needed: bool) -> Found {
    Found { what, identity: Some(identity), trouble: None, needed }
}

fn missing(what: &'static str, trouble: String, needed: bool) -> Found {
    Found { what, identity: None, trouble: Some(trouble), needed }
}

fn tool(what: &'static str, found: Result<Option<ToolPath>, ToolError>, without: &str, needed: bool) -> Found {
    match found {
        Ok(Some(tool)) => there(what, tool.identity, needed),
        Ok(None) => missing(what, without.to_owned(), needed),
        Err(error) => missing(what, format!("{error}; {without}"), needed),
    }
}

fn git(host: &Host, env: &Env, needed: bool) -> Found {
    let Some(path) = check::finder(host, env).search("git") else {
        return missing(GIT, "`git` sources need it".to_owned(), needed);
    };
    match first_line(host, env, path, &["--version"]) {
        Ok(line) => there(GIT, line, needed),
        Err(why) => missing(GIT, why, needed),
    }
}

/// The interpreter that `pypi` sources would use.
fn python(host: &Host, env: &Env, needed: bool) -> Found {
    let finder = check::finder(host, env);
    let mut tried = Vec::new();
    for command in pypi::interpreters(&host.env) {
        let (program, before) = (command[0], &command[1..]);
        let path =
            if program.contains(std::path::is_separator) { Some(program.into()) } else { finder.search(program) };
        let Some(path) = path else {
            tried.push(format!("no `{program}`"));
            continue;
        };
        match first_line(host, env, path, &[before, &["-m", "pip", "--version"]].concat()) {
            // pip's line goes on with where it is installed.
            Ok(line) => {
                return there(PYTHON, line.split(" from ").next().unwrap_or_default().to_owned(), needed);
            }
            Err(why) => tried.push(format!("`{program}`: {why}")),
        }
    }
    missing(PYTHON, format!("`pypi` sources need it ({})", tried.join("; ")), needed)
}

/// The first line that a program prints, or why it cannot be run.
fn first_line(host: &Host, env: &Env, path: PathBuf, args: &[&str]) -> Result<String, String> {
    let program = Program { path, args: args.iter().map(Into::into).collect(), env: env.clone(), cwd: "/".into() };
    let first = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    match program.output(Duration::from_secs(20), 4096, host.task.cancel()) {
        Ok(ran) if ran.status.success() => Ok(first(&ran.stdout)),
        Ok(ran) => Err(first(&ran.stderr)),
        Err(error) => Err(error.to_string()),
    }
}

/// What keeps builds from the network and from private files here, tried out by a child process.
fn confinement(host: &Host, env: &Env) -> Found {
    let what = "confined builds";
    let args = vec!["internal".into(), "confinement".into(), host.store.root().into()];
    let program = Program { path: host.driver.clone(), args, env: env.clone(), cwd: host.store.root().to_owned() };
    let ran = program.output(Duration::from_secs(20), 4096, host.task.cancel());
    let report = ran.ok().and_then(|ran| serde_json::from_str::<driver::Report>(&ran.stdout).ok());
    let Some(report) = report else { return missing(what, "the build driver did not start".to_owned(), false) };
    let kept = format!("builds cannot reach: {}", report.confined);
    match report.network {
        None => there(what, kept, false),
        Some(why) => {
            missing(what, format!("{kept}; they have network access ({why}), so `--offline` refuses to build"), false)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u25_what_is_missing_depends_on_the_manifest() {
        let manifest = |text: &str| {
            let text = format!("version = 1\n{text}");
            crate::format::manifest::parse("m.toml", text.as_bytes()).expect("good").0.value
        };
        let nothing = Needs::of(&manifest("[models.m]\nsource = { path = \"w.gguf\" }\n"));
        assert!(!nothing.compiler && !nothing.cmake && !nothing.git && !nothing.python);
        let engine = "[engines.llama-cpp]\nsource = { git = \"https://example.org/x\" }\n";
        let built = Needs::of(&manifest(engine));
        assert!(built.compiler && built.cmake && built.git && !built.python);
        let locked = format!("{engine}[tools]\ncmake = {{ pypi = \"cmake\", version = \"4.0.0\" }}\n");
        let locked = Needs::of(&manifest(&locked));
        assert!(!locked.cmake && locked.python);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn u25_one_command_installs_what_is_missing() {
        let command = |lacking: &[&str], manager: &str| install_command(lacking, |program| program == manager);
        assert_eq!(command(&[COMPILERS, PYTHON], "apt-get").as_deref(), Some("sudo apt install g++ python3-pip"));
        assert_eq!(command(&[GIT], "pacman").as_deref(), Some("sudo pacman -S git"));
        assert_eq!(command(&[], "apt-get"), None);
        assert_eq!(command(&[GIT], "none"), None);
    }
}

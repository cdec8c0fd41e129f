//! `doctor`: what this machine has, and what it lacks for building and fetching. Changes nothing.

use std::time::Duration;

use crate::base::fs;
use crate::base::platform::{self, Platform};
use crate::base::process::Program;
use crate::build::accelerator::{self, Accelerators};
use crate::build::settings::Env;
use crate::build::toolchain::ToolError;
use crate::build::{ToolPath, driver};

use super::{Failure, Host, check};

#[derive(Debug, serde::Serialize)]
pub struct Report {
    pub version: &'static str,
    pub platform: String,
    pub physical_cores: u32,
    pub memory_bytes: Option<u64>,
    pub cache: std::path::PathBuf,
    pub cache_free_bytes: Option<u64>,
    pub findings: Vec<Found>,
    pub accelerators: Option<Accelerators>,
}

/// One program or facility.
#[derive(Debug, serde::Serialize)]
pub struct Found {
    pub what: &'static str,
    /// What it says of itself; none when it is missing.
    pub identity: Option<String>,
    /// What is lost without it, or why it is of no use.
    pub trouble: Option<String>,
    /// Whether nothing works without it.
    pub needed: bool,
}

/// # Errors
/// When the user asked to stop.
pub fn run(host: &Host) -> Result<Report, Failure> {
    let env = host.os_env();
    let finder = check::finder(host, &env);
    let mut findings = Vec::new();
    match finder.toolchain(false, false) {
        Ok(found) => {
            findings.push(there("C compiler", found.cc.identity, true));
            findings.push(there("C++ compiler", found.cxx.identity, true));
        }
        Err(error) => findings.push(missing("C and C++ compilers", error.to_string(), true)),
    }
    let unlocked = "needed only by manifests that do not lock it under `[tools]`";
    findings.push(optional("CMake", finder.cmake().map(Some), unlocked));
    findings.push(optional("ninja", finder.ninja(), unlocked));
    findings.push(program(host, &env, "git", &["--version"], "submodules over ssh and credential helpers need it"));
    findings.push(python(host, &env));
    findings.push(confinement(host, &env));
    host.task.check()?;
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        platform: Platform::HOST.to_string(),
        physical_cores: platform::physical_cores(),
        memory_bytes: platform::memory_bytes(),
        cache: host.store.root().to_owned(),
        cache_free_bytes: fs::available_bytes(host.store.root()).ok(),
        findings,
        accelerators: accelerator::detect(&finder).ok(),
    })
}

fn there(what: &'static str, identity: String, needed: bool) -> Found {
    Found { what, identity: Some(identity), trouble: None, needed }
}

fn missing(what: &'static str, trouble: String, needed: bool) -> Found {
    Found { what, identity: None, trouble: Some(trouble), needed }
}

fn optional(what: &'static str, found: Result<Option<ToolPath>, ToolError>, without: &str) -> Found {
    match found {
        Ok(Some(tool)) => there(what, tool.identity, false),
        Ok(None) => missing(what, without.to_owned(), false),
        Err(error) => missing(what, format!("{error}; {without}"), false),
    }
}

fn program(host: &Host, env: &Env, name: &'static str, args: &[&str], without: &str) -> Found {
    let finder = check::finder(host, env);
    let Some(path) = finder.search(name) else { return missing(name, without.to_owned(), true) };
    let program = Program { path, args: args.iter().map(Into::into).collect(), env: env.clone(), cwd: "/".into() };
    match program.output(Duration::from_secs(20), 4096, host.task.cancel()) {
        Ok(ran) if ran.status.success() => there(name, ran.stdout.lines().next().unwrap_or_default().to_owned(), true),
        Ok(ran) => missing(name, ran.stderr.lines().next().unwrap_or("it fails").to_owned(), true),
        Err(error) => missing(name, error.to_string(), true),
    }
}

fn python(host: &Host, env: &Env) -> Found {
    let name = if cfg!(windows) { "py" } else { "python3" };
    let found = program(host, env, name, &["-m", "pip", "--version"], "`pypi` sources need Python 3 with pip");
    // pip's version line goes on with where it is installed.
    let identity = found.identity.map(|line| line.split(" from ").next().unwrap_or_default().to_owned());
    Found { what: "Python 3 with pip", identity, ..found }
}

/// What keeps builds from the network and from private files here, tried out by a child process.
fn confinement(host: &Host, env: &Env) -> Found {
    let what = "confined builds";
    let args = vec!["internal".into(), "confinement".into(), host.store.root().into()];
    let program = Program { path: host.driver.clone(), args, env: env.clone(), cwd: host.store.root().to_owned() };
    let ran = program.output(Duration::from_secs(20), 4096, host.task.cancel());
    let report = ran.ok().and_then(|ran| serde_json::from_str::<driver::Report>(&ran.stdout).ok());
    let Some(report) = report else { return missing(what, "the driver does not start".to_owned(), false) };
    let kept = format!("kept from builds: {}", report.confined);
    match report.network {
        None => there(what, kept, false),
        Some(why) => {
            missing(what, format!("{kept}; they have a network ({why}), so `--offline` refuses to build"), false)
        }
    }
}

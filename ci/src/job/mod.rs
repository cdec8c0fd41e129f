//! One file per job. A new job is one file and one line in a list below.

mod clippy;
mod fmt;
mod powerinfer;
mod powerinfer_cuda;
pub mod quickstart;
mod sources;
mod test;
mod tidy;
mod wire;

use xshell::{Cmd, Shell, cmd};

/// One thing that can pass or fail.
#[derive(Debug)]
pub struct Job {
    pub name: &'static str,
    /// What passing means.
    pub about: &'static str,
    pub run: fn(&Shell) -> Result<()>,
}

/// What a job says, as its error, when this machine lacks what it needs.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// An error is words for a person who reads the log.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub const CHECK: &[Job] = &[fmt::JOB, clippy::JOB, tidy::JOB];
pub const TEST: &[Job] = &[test::JOB];
/// The first [`ALWAYS`] are those that `cargo ci` runs.
pub const E2E: &[Job] = &[quickstart::JOB, wire::JOB, powerinfer::JOB, powerinfer_cuda::JOB, sources::JOB];

/// How many of [`E2E`] need nothing but what the README lists.
pub const ALWAYS: usize = 3;

/// Cargo as a person starts it. What the cargo that started us says of our own crate would make build scripts run again.
pub fn cargo<'a>(sh: &'a Shell, words: &str) -> Cmd<'a> {
    const OURS: &[&str] = &["NAME", "VERSION", "VERSION_MAJOR", "VERSION_MINOR", "VERSION_PATCH", "VERSION_PRE"];
    let cargo = cmd!(sh, "cargo").args(words.split_whitespace()).env_remove("CARGO_MANIFEST_DIR");
    OURS.iter().fold(cargo, |cargo, name| cargo.env_remove(format!("CARGO_PKG_{name}")))
}

/// Fails, saying how to get it, when a cargo subcommand is not installed.
fn need_component(sh: &Shell, subcommand: &str, component: &str) -> Result<()> {
    match cargo(sh, &format!("{subcommand} --version")).quiet().ignore_stderr().read() {
        Ok(_) => Ok(()),
        Err(_) => {
            Err(format!("`cargo {subcommand}` is not installed\n  hint: run `rustup component add {component}`").into())
        }
    }
}

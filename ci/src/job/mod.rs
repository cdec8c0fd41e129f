//! One file per job. A new job is one file and one line in a list below.

mod clippy;
mod fmt;
pub mod quickstart;
mod sources;
mod test;
mod tidy;

use xshell::{Shell, cmd};

/// One thing that can pass or fail.
#[derive(Debug)]
pub struct Job {
    pub name: &'static str,
    /// What passing means.
    pub about: &'static str,
    pub run: fn(&Shell) -> Result<()>,
}

/// An error is words for a person who reads the log.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub const CHECK: &[Job] = &[fmt::JOB, clippy::JOB, tidy::JOB];
pub const TEST: &[Job] = &[test::JOB];
/// The first is the one that `cargo ci` runs.
pub const E2E: &[Job] = &[quickstart::JOB, sources::JOB];

/// Fails, saying how to get it, when a cargo subcommand is not installed.
fn need_component(sh: &Shell, subcommand: &str, component: &str) -> Result<()> {
    match cmd!(sh, "cargo {subcommand} --version").quiet().ignore_stderr().read() {
        Ok(_) => Ok(()),
        Err(_) => {
            Err(format!("`cargo {subcommand}` is not installed\n  hint: run `rustup component add {component}`").into())
        }
    }
}

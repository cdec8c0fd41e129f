//! One file per job. A new job is one file and one line in a list below.

mod bundle;
mod clippy;
mod evidence;
#[cfg(target_os = "linux")]
mod faults;
mod fmt;
mod fuzz;
mod powerinfer;
mod powerinfer_cuda;
pub mod quickstart;
mod serve;
mod sources;
mod test;
mod tidy;
mod webui;
mod wire;

use xshell::Shell;

use crate::step::{Job, Result, cargo};

pub const CHECK: &[Job] = &[fmt::JOB, clippy::JOB, tidy::JOB];
pub const TEST: &[Job] = &[test::JOB];
/// The first [`ALWAYS`] are those that `cargo ci` runs.
pub const E2E: &[Job] = &[
    quickstart::JOB,
    wire::JOB,
    evidence::JOB,
    powerinfer::JOB,
    powerinfer_cuda::JOB,
    sources::JOB,
    bundle::JOB,
    serve::JOB,
    webui::JOB,
    fuzz::JOB,
    #[cfg(target_os = "linux")]
    faults::JOB,
];

/// How many of [`E2E`] `cargo ci` runs. The last of them, `powerinfer`, is skipped without a copy of its repository.
pub const ALWAYS: usize = 4;

/// Fails, saying how to get it, when a cargo subcommand is not installed.
fn need_component(sh: &Shell, subcommand: &str, component: &str) -> Result<()> {
    match cargo(sh, &format!("{subcommand} --version")).quiet().ignore_stderr().read() {
        Ok(_) => Ok(()),
        Err(_) => {
            Err(format!("`cargo {subcommand}` is not installed\n  hint: run `rustup component add {component}`").into())
        }
    }
}

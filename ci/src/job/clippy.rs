//! The lints of Cargo.toml and clippy.toml hold everywhere, tests included.

use xshell::Shell;

use super::need_component;
use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "clippy", about: "no lint warns", run };

fn run(sh: &Shell) -> Result<()> {
    need_component(sh, "clippy", "clippy")?;
    cargo(sh, "clippy --workspace --all-targets --all-features --locked -- -D warnings").run()?;
    Ok(())
}

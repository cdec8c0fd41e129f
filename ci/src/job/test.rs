//! Every test of the workspace. None of them needs a network.

use xshell::Shell;

use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "test", about: "every test of the workspace passes", run };

fn run(sh: &Shell) -> Result<()> {
    cargo(sh, "test --workspace --locked").run()?;
    Ok(())
}

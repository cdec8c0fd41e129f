//! Every test of the workspace. None of them needs a network.

use xshell::{Shell, cmd};

use super::{Job, Result};

pub const JOB: Job = Job { name: "test", about: "every test of the workspace passes", run };

fn run(sh: &Shell) -> Result<()> {
    cmd!(sh, "cargo test --workspace --locked").run()?;
    Ok(())
}

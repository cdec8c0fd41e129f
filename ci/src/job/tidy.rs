//! The house rules that neither rustc nor clippy knows: see `ci/src/tidy/`.

use xshell::Shell;

use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "tidy", about: "layers, sizes, words and links are as the house wants them", run };

fn run(sh: &Shell) -> Result<()> {
    // The whole workspace, so that its crates are built with the features that the next job wants.
    cargo(sh, "test --workspace --bin ci --locked --quiet -- tidy").run()?;
    Ok(())
}

//! The house rules that neither rustc nor clippy knows: see `ci/src/tidy/`.

use xshell::Shell;

use super::{Job, Result, cargo};

pub const JOB: Job = Job { name: "tidy", about: "layers, sizes, words and links are as the house wants them", run };

fn run(sh: &Shell) -> Result<()> {
    cargo(sh, "test --package ci --locked --quiet -- tidy").run()?;
    Ok(())
}

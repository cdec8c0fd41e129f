//! The house rules that neither rustc nor clippy knows: see `ci/src/tidy/`.

use xshell::{Shell, cmd};

use super::{Job, Result};

pub const JOB: Job = Job { name: "tidy", about: "layers, sizes, words and links are as the house wants them", run };

fn run(sh: &Shell) -> Result<()> {
    cmd!(sh, "cargo test --package ci --locked --quiet -- tidy").run()?;
    Ok(())
}

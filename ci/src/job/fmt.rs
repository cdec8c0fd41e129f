//! The code is formatted as rustfmt.toml says.

use xshell::Shell;

use super::need_component;
use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "fmt", about: "every source file is formatted", run };

fn run(sh: &Shell) -> Result<()> {
    need_component(sh, "fmt", "rustfmt")?;
    cargo(sh, "fmt --all --check").run().map_err(|_| "not formatted\n  hint: run `cargo fmt`")?;
    Ok(())
}

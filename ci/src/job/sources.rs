//! What no loopback server can show: a package from the index that this machine is set up for, and the official Hugging
//! Face client (installed from that index) as referee of the cache that we share with it.

use xshell::Shell;

use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "sources", about: "real packages come, the Hugging Face client agrees", run };

fn run(sh: &Shell) -> Result<()> {
    cargo(sh, "test --workspace --locked --lib source::pypi -- --ignored").run()?;
    cargo(sh, "test --workspace --locked --test hub_referee -- --ignored").run()?;
    Ok(())
}

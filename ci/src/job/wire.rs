//! The adapter for PowerInfer against a real server of the same protocol: the llama.cpp that it grew from, which is in
//! `llama-cpp-python` 0.2.19 and so in the Python package index. Built through our program, as a user would.

use xshell::Shell;

use super::powerinfer;
use crate::sparse::model::Tiny;
use crate::sparse::{Engine, Project};
use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "wire", about: "PowerInfer's adapter drives a real server of its protocol", run };

fn run(sh: &Shell) -> Result<()> {
    let mut project = Project::new(sh, "wire")?;
    let dense = Tiny::dense();
    project.add_model("dense", &dense, powerinfer::GREEDY)?;
    project.write_manifest(&Engine::of_the_same_wire(), true, "targets = [\"server\"]")?;
    project.ours(&["sync"]).run()?;
    powerinfer::answers(&project, "dense", &dense)?;
    let _server = sh.push_env("AITOOLS_TEST_POWERINFER_WIRE_SERVER", project.program("server"));
    cargo(sh, "test --workspace --locked --lib engine::powerinfer::real::a_real_server -- --ignored").run()?;
    Ok(())
}

//! The GPU index of a model of 32 layers with 11008 neurons: ours, and PowerInfer's own Python module, where a copy of its
//! repository and a Python with torch, numpy and cvxopt are named.

use std::path::PathBuf;
use std::process::Command;

use xshell::cmd;

use super::ground::Ground;
use super::measure::{Contender, Series, interleave};
use super::{Bench, Run};
use crate::sparse::Engine;
use crate::sparse::model::{self, Shape};
use crate::step::{Result, cargo};

pub const BENCH: Bench = Bench {
    name: "gpu-index",
    about: "which neurons go to the GPU: 32 layers",
    rounds: 5,
    warm_up: true,
    run: Run::Processes(run),
};

/// A Python that has what PowerInfer's module imports.
const PYTHON: &str = "AITOOLS_TEST_POWERINFER_PYTHON";
/// As in ReluLLaMA-7B. Only layers and neurons count here.
const SHAPE: Shape = Shape { layers: 32, width: 4096, neurons: 11008, rank: 1024, heads: 32, context: 2048 };
/// A row of each of three matrices, in 16 bits.
const NEURON_BYTES: u64 = 3 * 2 * SHAPE.width as u64;
const BUDGET_BYTES: u64 = 4 << 30;

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let sh = ground.sh;
    cargo(sh, "build --release --locked --package ci --features library --bin gpu-index").run()?;
    let ours = crate::step::root().join("target/release").join(format!("gpu-index{}", std::env::consts::EXE_SUFFIX));
    let folder = ground.folder("activation")?;
    for (name, bytes) in model::activation_files(&SHAPE) {
        sh.write_file(folder.join(name), bytes)?;
    }
    let (layers, neurons) = (SHAPE.layers.to_string(), SHAPE.neurons.to_string());
    let output = ground.scratch.join("ours.gpuidx");
    let mut contenders = vec![Contender::command("aitools", || {
        let mut command = Command::new(&ours);
        command
            .arg(&folder)
            .args([&layers, &neurons, &NEURON_BYTES.to_string(), &BUDGET_BYTES.to_string()])
            .arg(&output);
        command
    })];
    match theirs(ground) {
        Err(why) => println!("PowerInfer's own module is left out: {why}"),
        Ok((python, path)) => contenders.push(Contender::command("python -m powerinfer", {
            let (folder, output) = (folder.clone(), ground.scratch.join("theirs.gpuidx"));
            let (layers, neurons) = (layers.clone(), neurons.clone());
            move || {
                let mut command = Command::new(&python);
                command.args(["-m", "powerinfer", "--layer", &layers, "--neuron", &neurons]);
                command.args(["--capacity", &(BUDGET_BYTES / NEURON_BYTES).to_string()]);
                command.args(["--vram-capacity", &BUDGET_BYTES.to_string()]).arg("--activation").arg(&folder);
                command.arg("--output").arg(&output).env("PYTHONPATH", &path);
                command
            }
        })),
    }
    interleave(&mut contenders, bench.warm_up, rounds)
}

/// A Python, and where PowerInfer's modules lie.
fn theirs(ground: &Ground<'_>) -> Result<(PathBuf, std::ffi::OsString)> {
    let (sh, folder) = (ground.sh, ground.folder("powerinfer")?);
    let python = sh.var(PYTHON).map_err(|_| format!("{PYTHON} names no Python with torch, numpy and cvxopt"))?;
    let (copy, commit) = Engine::powerinfer(sh)?.copy.ok_or("no copy")?;
    cmd!(sh, "git -C {folder} init --quiet").run()?;
    cmd!(sh, "git -C {folder} fetch --quiet --depth 1 {copy} {commit}").run()?;
    cmd!(sh, "git -C {folder} checkout --quiet FETCH_HEAD -- powerinfer-py gguf-py").run()?;
    let path = std::env::join_paths([folder.join("powerinfer-py"), folder.join("gguf-py")])?;
    Ok((python.into(), path))
}

//! A sync with nothing to do: the command that people and CI run most.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use xshell::cmd;

use super::ground::{Ground, command};
use super::measure::{Contender, Series, interleave};
use super::{Bench, Run};
use crate::step::Result;

pub const BENCH: Bench = Bench {
    name: "noop-sync",
    about: "a sync with nothing to do",
    rounds: 30,
    warm_up: true,
    run: Run::Processes(run),
};

const MODELS: usize = 200;
const FILES: usize = 5;

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let quickstart = ground.quickstart()?;
    let quickstart = || {
        let mut command = ground.ours(&quickstart, None);
        command.args(["-m", "quickstart", "sync"]);
        command
    };
    must_succeed(&mut quickstart())?;

    let (many, cache) = (many_models(ground)?, ground.folder("cache")?);
    let many_models = || {
        let mut command = ground.ours(&many, Some(&cache));
        command.args(["-m", "many", "sync"]);
        command
    };
    must_succeed(&mut many_models())?;

    let uv = ground.peer("uv");
    let project = uv_project(ground, &uv)?;
    let ninja = ground.peer("ninja");
    let (one, thousand) = (ninja_project(ground, &ninja, 1)?, ninja_project(ground, &ninja, MODELS * FILES)?);
    interleave(
        &mut [
            Contender::command("aitools sync (quickstart)", quickstart),
            Contender::command("aitools sync (200 models, 1,000 files)", many_models),
            Contender::command("uv sync (1 package)", || command(&uv, &project, &["sync", "--quiet"])),
            Contender::command("ninja (1 file)", || command(&ninja, &one, &[])),
            Contender::command("ninja (1,000 files)", || command(&ninja, &thousand, &[])),
        ],
        bench.warm_up,
        rounds,
    )
}

fn must_succeed(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {}\n{words}", output.status).into()) }
}

/// A project of many small models, each a folder of a few files on this machine.
fn many_models(ground: &Ground<'_>) -> Result<PathBuf> {
    let sh = ground.sh;
    let project = ground.folder("many")?;
    let mut manifest = "version = 1\n".to_owned();
    for model in 0..MODELS {
        // A GGUF of version 3 without tensors and metadata: the shortest there is.
        sh.write_file(
            project.join(format!("weights/m{model}/m.gguf")),
            b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        )?;
        for file in 1..FILES {
            sh.write_file(project.join(format!("weights/m{model}/part-{file}.bin")), format!("{model} {file}\n"))?;
        }
        write!(manifest, "\n[models.m{model}]\nsource = {{ path = \"weights/m{model}\" }}\n")?;
    }
    sh.write_file(project.join("manifests/many.toml"), manifest)?;
    Ok(project)
}

fn uv_project(ground: &Ground<'_>, uv: &Path) -> Result<PathBuf> {
    let project = ground.folder("uv")?;
    let text = "[project]\nname = \"tiny\"\nversion = \"1\"\nrequires-python = \">=3.9\"\ndependencies = [\"iniconfig==2.1.0\"]\n";
    ground.sh.write_file(project.join("pyproject.toml"), text)?;
    let _there = ground.sh.push_dir(&project);
    cmd!(ground.sh, "{uv} sync --quiet").run()?;
    Ok(project)
}

/// A build of `files` copies, done once.
fn ninja_project(ground: &Ground<'_>, ninja: &Path, files: usize) -> Result<PathBuf> {
    let project = ground.folder(&format!("ninja-{files}"))?;
    let copy = if cfg!(windows) { "cmd /c copy $in $out" } else { "cp $in $out" };
    let mut text = format!("rule copy\n  command = {copy}\n");
    for file in 0..files {
        ground.sh.write_file(project.join(format!("in-{file}.txt")), "x\n")?;
        writeln!(text, "build out-{file}.txt: copy in-{file}.txt")?;
    }
    ground.sh.write_file(project.join("build.ninja"), text)?;
    let _there = ground.sh.push_dir(&project);
    cmd!(ground.sh, "{ninja} --quiet").run()?;
    Ok(project)
}

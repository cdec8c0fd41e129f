//! A big file from loopback into a verified place, beside what people use for it. And what memory it takes.
//!
//! curl, aria2c and hf neither hash nor flush what they wrote; the lines with sha256sum are the like for like.

use std::path::{Path, PathBuf};
use std::process::Command;

use xshell::cmd;

use super::Bench;
use super::ground::Ground;
use super::measure::{Contender, Series, interleave};
use super::server::{NAME, REPO, Server};
use crate::job::Result;

pub const BENCH: Bench = Bench { name: "download", about: "1 GiB from loopback", rounds: 5, warm_up: true, run };
pub const MEMORY: Bench = Bench {
    name: "sync-memory",
    about: "peak memory of a sync, by size of file",
    rounds: 3,
    warm_up: true,
    run: memory,
};

const MIB: u64 = 1 << 20;

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let server = Server::start(ground.sh, &ground.folder("served")?, 1024 * MIB)?;
    let url = server.url();
    let hub = format!("hf = \"{REPO}\", files = [\"*.gguf\"]");
    let mut contenders = vec![
        ours(ground, "aitools sync (url)", &server, &format!("url = \"{url}\""))?,
        ours(ground, "aitools sync (hub)", &server, &hub)?,
    ];
    let out = ground.folder("peers")?;
    let file = out.join(NAME).display().to_string();
    let mut peer = |name: &str, program: &Path, args: &[&str]| {
        let (program, args) = (program.to_owned(), args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>());
        let (origin, out, home) = (server.origin(), out.clone(), out.join("hf"));
        contenders.push(Contender::prepared(
            name,
            {
                let out = out.clone();
                move || fresh(ground, &out)
            },
            move || {
                let mut command = Command::new(&program);
                command.args(&args).current_dir(&out).env("HF_ENDPOINT", &origin).env("HF_HOME", &home);
                command
            },
        ));
    };
    peer("hf download", &ground.peer("hf"), &["download", REPO, NAME, "--quiet"]);
    if cfg!(unix) {
        let sh = PathBuf::from("sh");
        peer("curl", Path::new("curl"), &["-sSfo", &file, &url]);
        peer("curl, then sha256sum", &sh, &["-ec", &format!("curl -sSfo '{file}' {url}; sha256sum '{file}'")]);
        peer("curl | tee | sha256sum", &sh, &["-ec", &format!("curl -sSf {url} | tee '{file}' | sha256sum")]);
        if cmd!(ground.sh, "aria2c --version").quiet().ignore_stdout().ignore_stderr().run().is_ok() {
            let folder = out.display().to_string();
            peer("aria2c -x 4", Path::new("aria2c"), &["-q", "-x", "4", "-s", "4", "-d", &folder, &url]);
        }
    }
    interleave(&mut contenders, bench.warm_up, rounds)
}

fn memory(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let mut contenders = Vec::new();
    for size in [64, 1024] {
        let server = Server::start(ground.sh, &ground.folder(&format!("served-{size}"))?, size * MIB)?;
        let name = format!("aitools sync ({size} MiB)");
        contenders.push(ours(ground, &name, &server, &format!("url = \"{}\"", server.url()))?);
    }
    interleave(&mut contenders, bench.warm_up, rounds)
}

/// A project of one model, locked; each run begins with an empty cache and without a link.
fn ours<'a>(ground: &'a Ground<'_>, name: &str, server: &Server, source: &str) -> Result<Contender<'a>> {
    let sh = ground.sh;
    let project = ground.folder(&name.replace(' ', "-"))?;
    let cache = project.join("cache");
    sh.write_file(
        project.join("manifests/big.toml"),
        format!("version = 1\n\n[models.big]\nsource = {{ {source} }}\n"),
    )?;
    let origin = server.origin();
    let command = {
        let (project, cache) = (project.clone(), cache.clone());
        move |args: &[&str]| {
            let mut command = ground.ours(&project, Some(&cache));
            command.env("HF_ENDPOINT", &origin).args(["-m", "big"]).args(args);
            command
        }
    };
    let locked = command(&["lock"]).status()?;
    let lock = sh.read_file(project.join("manifests/big.lock"))?;
    if !locked.success() || !lock.contains(&server.sha256) {
        return Err(format!("{name}: the lockfile does not hold the digest of what is served\n{lock}").into());
    }
    let prepare = move || {
        sh.remove_path(project.join("models"))?;
        fresh(ground, &cache)
    };
    Ok(Contender::prepared(name, prepare, move || command(&["sync", "--frozen"])))
}

/// An empty folder, and nothing left to write of what others wrote.
fn fresh(ground: &Ground<'_>, folder: &Path) -> Result<()> {
    ground.sh.remove_path(folder)?;
    ground.sh.create_dir(folder)?;
    if cfg!(unix) {
        cmd!(ground.sh, "sync").quiet().run()?;
    }
    Ok(())
}

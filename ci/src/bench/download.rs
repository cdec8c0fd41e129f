//! A big file from loopback into a verified place, beside what people use for it. And what memory it takes.
//!
//! curl, aria2c and hf neither hash nor flush what they wrote; the lines with sha256sum are the like for like.

use std::path::{Path, PathBuf};
use std::process::Command;

use xshell::cmd;

use super::ground::Ground;
use super::measure::{Contender, Sample, Series, interleave};
use super::{Bench, Run};
use crate::server::{NAME, REPO, Server};
use crate::step::Result;

pub const BENCH: Bench =
    Bench { name: "download", about: "1 GiB from loopback", rounds: 5, warm_up: true, run: Run::Processes(run) };
pub const THROTTLED: Bench = Bench {
    name: "download-throttled",
    about: "800 MB from a server that gives each connection 20 MB/s",
    rounds: 2,
    warm_up: false,
    run: Run::Processes(throttled),
};
pub const MEMORY: Bench = Bench {
    name: "sync-memory",
    about: "peak memory of a sync, by size of file",
    rounds: 3,
    warm_up: true,
    run: Run::Processes(memory),
};

const MIB: u64 = 1 << 20;

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let server = Server::start(ground.sh, &ground.folder("served")?, 1024 * MIB, None)?;
    let url = server.url();
    let hub = format!("hf = \"{REPO}\", files = [\"*.gguf\"]");
    let mut contenders = vec![
        ours(ground, "aitools sync (url)", &server, &format!("url = \"{url}\""), None)?,
        ours(ground, "aitools sync (hub)", &server, &hub, None)?,
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
    if ground.has("curl") {
        let sh = PathBuf::from("sh");
        peer("curl", Path::new("curl"), &["-sSfo", &file, &url]);
        peer("curl, then sha256sum", &sh, &["-ec", &format!("curl -sSfo '{file}' {url}; sha256sum '{file}'")]);
        peer("curl | tee | sha256sum", &sh, &["-ec", &format!("curl -sSf {url} | tee '{file}' | sha256sum")]);
    }
    if ground.has("aria2c") {
        let (folder, aria) = (out.display().to_string(), Path::new("aria2c"));
        let checksum = format!("--checksum=sha-256={}", server.sha256);
        let args = ["-q", "-x", "8", "-s", "8", "--file-allocation=falloc", "-d", &folder, &url];
        peer("aria2c -x 8", aria, &args);
        peer("aria2c -x 8 --checksum", aria, &[&args[..], &[&checksum]].concat());
    }
    let mut contenders: Vec<_> = contenders.into_iter().map(|contender| contender.noting(note_tail(&server))).collect();
    interleave(&mut contenders, bench.warm_up, rounds)
}

/// Notes how long ago the last byte of the file was sent.
fn note_tail(server: &Server) -> impl Fn(&mut Sample) + use<> {
    let tail_s = server.tail_s();
    move |sample| sample.tail_s = tail_s()
}

/// One connection's time is known: 40 s. N of them should take an N-th.
fn throttled(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let server = Server::start(ground.sh, &ground.folder("served")?, 800_000_000, Some(20_000_000))?;
    let url = format!("url = \"{}\"", server.url());
    let mut contenders = Vec::new();
    for connections in ["1", "4", "8"] {
        let name = format!("aitools sync ({connections} connections)");
        contenders.push(ours(ground, &name, &server, &url, Some(connections))?.noting(note_tail(&server)));
    }
    interleave(&mut contenders, bench.warm_up, rounds)
}

fn memory(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let mut contenders = Vec::new();
    for size in [64, 1024] {
        let server = Server::start(ground.sh, &ground.folder(&format!("served-{size}"))?, size * MIB, None)?;
        let name = format!("aitools sync ({size} MiB)");
        contenders.push(ours(ground, &name, &server, &format!("url = \"{}\"", server.url()), None)?);
    }
    interleave(&mut contenders, bench.warm_up, rounds)
}

/// A project of one model, locked; each run begins with an empty cache and without a link.
fn ours<'a>(
    ground: &'a Ground<'_>,
    name: &str,
    server: &Server,
    source: &str,
    connections: Option<&'static str>,
) -> Result<Contender<'a>> {
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
            command.envs(connections.map(|count| ("AITOOLS_CONNECTIONS", count)));
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

//! Hashing weights that are there: `verify`, and the fastest programs that hash files on this machine.
//!
//! The files are in memory after the first round, so this is about the processor: a disk that is slower than it hides it.

use std::path::Path;
use std::process::Command;

use super::ground::{Ground, command};
use super::measure::{Contender, Series, interleave};
use super::{Bench, Run};
use crate::server::make;
use crate::step::Result;

pub const BENCH: Bench =
    Bench { name: "verify", about: "hashing 4 files of 256 MiB", rounds: 5, warm_up: true, run: Run::Processes(run) };

const FILES: u64 = 4;
const SIZE_BYTES: u64 = 256 << 20;

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let (project, cache) = (ground.folder("project")?, ground.folder("cache")?);
    let mut files = Vec::new();
    for number in 0..FILES {
        let file = project.join(format!("weights/part-{number}.gguf"));
        make(&file, SIZE_BYTES + number, ground.sh)?;
        files.push(file.display().to_string());
    }
    let models: String = (0..FILES)
        .map(|number| format!("\n[models.m{number}]\nsource = {{ path = \"weights/part-{number}.gguf\" }}\n"))
        .collect();
    ground.sh.write_file(project.join("manifests/big.toml"), format!("version = 1\n{models}"))?;
    let ours = |word: &str| {
        let mut command = ground.ours(&project, Some(&cache));
        command.args(["-m", "big", word]);
        command
    };
    if !ours("sync").status()?.success() {
        return Err("the first sync failed".into());
    }
    let here = project.as_path();
    let mut contenders = vec![Contender::command("aitools verify", || ours("verify"))];
    let mut peer = |name: &str, program: &str, args: &[&str]| {
        if !ground.has(program) {
            return;
        }
        let words: Vec<String> =
            [program].iter().chain(args).map(|word| (*word).to_owned()).chain(files.clone()).collect();
        contenders.push(Contender::command(name, move || by_words(&words, here)));
    };
    peer("openssl dgst -sha256", "openssl", &["dgst", "-sha256"]);
    let script = "for file; do openssl dgst -sha256 \"$file\" & done; wait";
    peer("openssl dgst -sha256, all at once", "bash", &["-c", script, "bash"]);
    peer("sha256sum", "sha256sum", &[]);
    peer("cat", "cat", &[]);
    interleave(&mut contenders, bench.warm_up, rounds)
}

fn by_words(words: &[String], folder: &Path) -> Command {
    let args: Vec<&str> = words.iter().skip(1).map(String::as_str).collect();
    command(Path::new(&words[0]), folder, &args)
}

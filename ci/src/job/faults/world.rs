//! The project that is disturbed: two engines that a real CMake builds in a second, one from git and one from a folder; models
//! from a folder, an address and a Hub, all on this machine; and a model that is derived from another.

use std::path::{Path, PathBuf};
use std::process::Command;

use xshell::{Shell, cmd};

use super::process::{Ended, run};
use crate::server::Server;
use crate::sparse::model::{Shape, Tiny};
use crate::step::Result;

const WHEELS: &[&str] = &["cmake==4.4.4", "ninja==1.13.2"];
const SHAPE: Shape = Shape { layers: 1, width: 32, neurons: 256, rank: 16, heads: 2, context: 512 };
const CMAKE: &str = "cmake_minimum_required(VERSION 3.14)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
";

/// A world whose folders are below [`World::root`].
#[derive(Debug)]
pub struct World {
    pub root: PathBuf,
    /// Where the job keeps what is not the program's.
    pub place: PathBuf,
    program: PathBuf,
    path: String,
    hub: String,
    /// Digests of the files that the servers have.
    pub served: [String; 2],
}

/// CMake and Ninja, from their wheels.
pub fn tools(sh: &Shell, place: &Path) -> Result<PathBuf> {
    let folder = place.join("tools");
    let stamp = folder.join("installed.txt");
    if sh.read_file(&stamp).is_ok_and(|installed| installed == WHEELS.join("\n")) {
        return Ok(folder);
    }
    sh.remove_path(&folder)?;
    cmd!(sh, "python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --target {folder} {WHEELS...}").run()?;
    sh.write_file(stamp, WHEELS.join("\n"))?;
    Ok(folder)
}

impl World {
    /// Makes one anew. It is not synced.
    pub fn new(sh: &Shell, place: &Path, program: &Path, tools: &Path) -> Result<Self> {
        let root = place.join("world");
        sh.remove_path(&root)?;
        let system = sh.var("PATH")?;
        let path = format!("{}:{}:{system}", tools.join("cmake/data/bin").display(), tools.join("bin").display());
        let (files, parts) = (place.join("served/file"), place.join("served/hub"));
        sh.create_dir(&files)?;
        sh.create_dir(&parts)?;
        let (file, hub) = (Server::start(sh, &files, 600_000, None)?, Server::start(sh, &parts, 900_000, None)?);
        let served = [file.sha256.clone(), hub.sha256.clone()];
        let world =
            Self { root, place: place.to_owned(), program: program.to_owned(), path, hub: hub.origin(), served };
        world.write_project(sh, &file.url())?;
        Ok(world)
    }

    /// Keeps a copy of everything.
    pub fn keep(&self, sh: &Shell) -> Result<()> {
        let (root, copy) = (&self.root, self.place.join("copy"));
        sh.remove_path(&copy)?;
        Ok(cmd!(sh, "cp -a {root} {copy}").quiet().run()?)
    }

    /// Makes everything as it was kept.
    pub fn restore(&self, sh: &Shell) -> Result<()> {
        let (root, copy) = (&self.root, self.place.join("copy"));
        sh.remove_path(root)?;
        cmd!(sh, "cp -a {copy} {root}").quiet().run()?;
        self.must(sh, &["sync"])?;
        Ok(())
    }

    fn write_project(&self, sh: &Shell, url: &str) -> Result<()> {
        let repository = self.place.join("engine.git");
        let commit = write_engine(sh, &repository)?;
        let write = |path: &str, text: &str| sh.write_file(self.project().join(path), text);
        let manifest = MANIFEST
            .replace("REPOSITORY", &format!("file://{}", repository.display()))
            .replace("COMMIT", &commit)
            .replace("URL", url);
        write("manifests/default.toml", &manifest)?;
        write(
            "engine source/CMakeLists.txt",
            &format!(
                "{CMAKE}add_executable(main main.c)\nadd_executable(server main.c)\nadd_executable(quantize quantize.c)\n"
            ),
        )?;
        write("engine source/main.c", "int main(void) { return 0; }\n")?;
        write("engine source/quantize.c", include_str!("quantize.c"))?;
        write("engine source/common/build-info.cpp.in", "@BUILD_NUMBER@ @BUILD_COMMIT@\n")?;
        write("configs/p.yaml", "engine: tiny\nmodel: m\ngeneration:\n  max_tokens: 8\n  chat_template: chatml\n")?;
        write("configs/s.yaml", "engine: sparse\nmodel: q4\ngeneration:\n  max_tokens: 8\n")?;
        write("made/activation/activation_0.pt", "statistics")?;
        sh.write_file(self.project().join("made/m.gguf"), Tiny::new(&SHAPE, true).to_bytes())?;
        self.write_version(sh, 0)
    }

    /// The first model, in one of its versions, which have one size.
    pub fn write_version(&self, sh: &Shell, version: u8) -> Result<()> {
        let mut bytes = Tiny::new(&SHAPE, false).to_bytes();
        if let Some(last) = bytes.last_mut() {
            *last = version;
        }
        Ok(sh.write_file(self.project().join("weights/m.gguf"), bytes)?)
    }

    pub fn version(&self, sh: &Shell) -> Result<u8> {
        Ok(sh.read_binary_file(self.project().join("weights/m.gguf"))?.last().copied().unwrap_or(0))
    }

    pub fn project(&self) -> PathBuf {
        self.root.join("project")
    }

    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// A program in front of ours, such as strace, and ours.
    pub fn command(&self, before: &[String], args: &[&str]) -> Command {
        let mut command = match before {
            [] => Command::new(&self.program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(&self.program);
                command
            }
        };
        command
            .args(args)
            .current_dir(self.project())
            .env_clear()
            .env("PATH", &self.path)
            .env("HOME", self.root.join("home"))
            .env("AITOOLS_CACHE_DIR", self.cache())
            .env("AITOOLS_STATE_DIR", self.root.join("state"))
            .env("HF_HOME", self.root.join("hub"))
            .env("HF_ENDPOINT", &self.hub);
        command
    }

    pub fn run(&self, sh: &Shell, args: &[&str]) -> Result<Ended> {
        run(sh, &self.place, &mut self.command(&[], args), None)
    }

    /// Runs without a fault; anything but success is an error.
    pub fn must(&self, sh: &Shell, args: &[&str]) -> Result<Ended> {
        let ended = self.run(sh, args)?;
        if ended.status.success() { Ok(ended) } else { Err(format!("`{}`: {}", args.join(" "), ended.words()).into()) }
    }
}

/// A repository with the imitation of llama.cpp, and its commit.
fn write_engine(sh: &Shell, repository: &Path) -> Result<String> {
    sh.remove_path(repository)?;
    sh.create_dir(repository)?;
    sh.write_file(repository.join("CMakeLists.txt"), format!("{CMAKE}add_executable(llama-server main.c)\n"))?;
    sh.write_file(repository.join("main.c"), include_str!("llama-server.c"))?;
    cmd!(sh, "git -C {repository} init --quiet").run()?;
    cmd!(sh, "git -C {repository} add .").run()?;
    let who = ["-c", "user.name=ci", "-c", "user.email=ci@localhost"];
    cmd!(sh, "git -C {repository} {who...} commit --quiet --message engine").run()?;
    Ok(cmd!(sh, "git -C {repository} rev-parse HEAD").quiet().read()?)
}

const MANIFEST: &str = r#"version = 1

[engines.tiny]
adapter = "llama-cpp"
source = { git = "REPOSITORY", rev = "COMMIT" }

[engines.sparse]
adapter = "powerinfer"
source = { path = "engine source" }

[models.m]
source = { path = "weights/m.gguf" }
place = "models/tiny/m"
weights = "model.gguf"

[models.url]
source = { url = "URL" }

[models.hub]
source = { hf = "bench/big", rev = "main", files = ["*.gguf"] }

[models.f16]
source = { path = "made", files = ["*.gguf", "activation/**"] }

[models.q4]
weights = "q4.gguf"
[models.q4.derive]
from = "f16"
engine = "sparse"
quantize = "Q4_0"

[policies]
include = ["configs/*.yaml"]
"#;

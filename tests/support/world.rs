//! A sealed world for command tests: a project, a home, a cache and a machine key of its own, under a path with a space and
//! letters beyond ASCII; a tiny engine that a real CMake builds in a second, and a tiny model.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "shared by tests that use parts of it"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use aitools::base::fs;

#[path = "tools.rs"]
pub mod tools;

#[derive(Debug)]
pub struct World {
    folder: tempfile::TempDir,
}

/// What a run of the program gave.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }
}

const MANIFEST: &str = r#"version = 1

[engines.tiny]
adapter = "llama-cpp"
source = { path = "engine source" }

[models.m]
source = { path = "weights/modèle.gguf" }
place = "models/tiny/m"
weights = "model.gguf"

[policies]
include = ["configs/models/tiny/*.yaml"]
"#;

const CMAKE: &str = r#"cmake_minimum_required(VERSION 3.14)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(llama-server main.c part1.c part2.c)
"#;

impl World {
    /// A project with one engine, one model and one policy.
    pub fn new() -> Self {
        let world = Self { folder: tempfile::Builder::new().prefix("un monde é ").tempdir().unwrap() };
        world.write("manifests/default.toml", MANIFEST);
        world.write("engine source/CMakeLists.txt", CMAKE);
        world.write(
            "engine source/main.c",
            "int one(void); int two(void); int main(void) { return one() + two() - 3; }\n",
        );
        world.write("engine source/part1.c", "int one(void) { return 1; }\n");
        world.write("engine source/part2.c", "int two(void) { return 2; }\n");
        fs::write_atomic(&world.project().join("weights/modèle.gguf"), &tiny_gguf()).unwrap();
        world.write("configs/models/tiny/p.yaml", "engine: tiny\nmodel: m\ngeneration:\n  max_tokens: 8\n");
        world
    }

    pub fn project(&self) -> PathBuf {
        self.folder.path().join("un projet")
    }

    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("la cache")
    }

    pub fn write(&self, path: &str, text: &str) {
        fs::write_atomic(&self.project().join(path), text.as_bytes()).unwrap();
    }

    pub fn read(&self, path: &str) -> String {
        String::from_utf8(fs::read_bounded(&self.project().join(path), 64 << 20).unwrap()).unwrap()
    }

    /// Replaces text in a file of the project; it must be there.
    #[track_caller]
    pub fn edit(&self, path: &str, from: &str, to: &str) {
        let text = self.read(path);
        assert!(text.contains(from), "`{from}` is not in {text}");
        self.write(path, &text.replace(from, to));
    }

    /// The program, ready to start in the project with nothing of the caller's environment.
    pub fn command(&self, args: &[&str]) -> Command {
        let tools = tools::tools();
        let own = [tools.cmake.parent().unwrap().to_owned(), tools.ninja.parent().unwrap().to_owned()];
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path))).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_aitools"));
        command
            .args(args)
            .current_dir(self.project())
            .env_clear()
            .env("PATH", path)
            .env("HOME", self.folder.path().join("home"))
            .env("AITOOLS_CACHE_DIR", self.cache())
            .env("AITOOLS_STATE_DIR", self.folder.path().join("state"))
            .stdin(Stdio::null());
        if let Some(root) = std::env::var_os("SystemRoot") {
            command.env("SystemRoot", root);
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).output().unwrap())
    }

    /// Every file below a folder of the world, with its bytes.
    pub fn snapshot(&self, folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(&folder).unwrap_or_default() {
                if path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else if path.is_file() {
                    let bytes = fs::read_bounded(&path, 64 << 20).unwrap();
                    files.push((path, bytes));
                }
            }
        }
        files.sort();
        files
    }
}

/// A GGUF of one small tensor: enough for everything but running it.
pub fn tiny_gguf() -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3_u32.to_le_bytes());
    file.extend(1_u64.to_le_bytes());
    file.extend(4_u64.to_le_bytes());
    let text = |file: &mut Vec<u8>, text: &str| {
        file.extend((text.len() as u64).to_le_bytes());
        file.extend(text.as_bytes());
    };
    text(&mut file, "general.architecture");
    file.extend(8_u32.to_le_bytes());
    text(&mut file, "llama");
    for (key, value) in [("llama.context_length", 2048_u32), ("llama.block_count", 1), ("llama.embedding_length", 32)] {
        text(&mut file, key);
        file.extend(4_u32.to_le_bytes());
        file.extend(value.to_le_bytes());
    }
    text(&mut file, "token_embd.weight");
    file.extend(1_u32.to_le_bytes());
    file.extend(32_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32) + 32 * 4, 0);
    file
}

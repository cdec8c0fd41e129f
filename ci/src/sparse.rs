//! A project around PowerInfer, with models that are made here: what the jobs and benchmarks about it stand on.

use std::path::{Path, PathBuf};

use xshell::{Cmd, Shell, cmd};

use crate::step::{Result, Skip, cargo};

#[path = "../../tests/support/tiny_powerinfer.rs"]
pub mod model;

#[path = "../../tests/support/tiny_published.rs"]
pub mod published;

use model::{Shape, Tiny};

/// Where PowerInfer is at home: what the manifest says.
const HOME: &str = "https://github.com/SJTU-IPADS/PowerInfer";
/// The commit of `manifests/default.toml`.
const COMMIT: &str = "d3ebd7c5666348cf43c22f0d62dfbc9a763cffb8";
/// A copy of the repository that can be reached from here, as git names it.
const COPY: &str = "AITOOLS_TEST_POWERINFER_REPO";
/// The commit to take of it, when it has not the usual one.
const COPY_COMMIT: &str = "AITOOLS_TEST_POWERINFER_COMMIT";
/// A built `aitools`, where there is no cargo to build one.
const PROGRAM: &str = "AITOOLS_TEST_PROGRAM";

/// Where the engine's source comes from.
#[derive(Debug)]
pub struct Engine {
    /// The line `source = …`.
    pub source: String,
    /// From where git is to fetch what it is told is at [`HOME`], and which commit.
    pub copy: Option<(String, String)>,
}

impl Engine {
    /// PowerInfer itself, from a copy that a variable names.
    pub fn powerinfer(sh: &Shell) -> Result<Self> {
        let Ok(copy) = sh.var(COPY) else {
            let how = format!("set it to a clone of {HOME}, and {COPY_COMMIT} when that lacks {COMMIT}");
            return Err(Skip(format!("{COPY} names no copy of PowerInfer's repository: {how}")).into());
        };
        let commit = sh.var(COPY_COMMIT).unwrap_or_else(|_| COMMIT.to_owned());
        let source = format!(r#"{{ git = "{HOME}", rev = "{commit}", submodule = "external/powerinfer" }}"#);
        let copy = if copy.contains("://") { copy } else { format!("file://{copy}") };
        Ok(Self { source, copy: Some((copy, commit)) })
    }

    /// The llama.cpp that PowerInfer grew from: the same protocol, dense models alone.
    pub fn of_the_same_wire() -> Self {
        let source = r#"{ pypi = "llama-cpp-python", version = "0.2.19", sdist = true, subdir = "vendor/llama.cpp" }"#;
        Self { source: source.to_owned(), copy: None }
    }
}

/// A project below `target/e2e/`, made anew; its cache stays, so that a second run builds nothing.
#[derive(Debug)]
pub struct Project<'a> {
    sh: &'a Shell,
    pub folder: PathBuf,
    aitools: PathBuf,
    cache: PathBuf,
    models: Vec<String>,
    /// More of the manifest.
    pub more: String,
}

impl<'a> Project<'a> {
    pub fn new(sh: &'a Shell, name: &str) -> Result<Self> {
        let root = crate::step::root();
        let aitools = match sh.var_os(PROGRAM) {
            Some(program) => PathBuf::from(program),
            None => {
                cargo(sh, "build --release --locked --bin aitools").run()?;
                root.join("target/release").join(format!("aitools{}", std::env::consts::EXE_SUFFIX))
            }
        };
        let place = root.join("target/e2e");
        // A name that has broken many a build.
        let folder = place.join(name).join("un projet é");
        sh.remove_path(&folder)?;
        sh.create_dir(&folder)?;
        Ok(Self { sh, folder, aitools, cache: place.join("cache"), models: Vec::new(), more: String::new() })
    }

    pub fn write(&self, path: &str, bytes: impl AsRef<[u8]>) -> Result<()> {
        Ok(self.sh.write_file(self.folder.join(path), bytes)?)
    }

    /// A model, its statistics when it is sparse, and a policy of the same name.
    pub fn add_model(&mut self, name: &str, model: &Tiny, policy: &str) -> Result<()> {
        let bytes = model.to_bytes();
        self.add_file(name, &bytes, policy)?;
        let statistics = if model.sparse { model::activation_files(&model.shape) } else { Vec::new() };
        for (file, bytes) in statistics {
            self.write(&format!("made/{name}/activation/{file}"), bytes)?;
        }
        Ok(())
    }

    pub fn add_file(&mut self, name: &str, bytes: &[u8], policy: &str) -> Result<()> {
        self.write(&format!("made/{name}/{name}.gguf"), bytes)?;
        self.add_policy(name, name, policy)?;
        self.models.push(name.to_owned());
        Ok(())
    }

    pub fn add_policy(&self, name: &str, model: &str, policy: &str) -> Result<()> {
        self.write(&format!("configs/{name}.yaml"), format!("engine: powerinfer\nmodel: {model}\n{policy}\n"))
    }

    /// The manifest, and what git must know. `tools`: whether CMake and Ninja are fetched rather than found. `rest` is
    /// said of the engine.
    pub fn write_manifest(&self, engine: &Engine, tools: bool, rest: &str) -> Result<()> {
        let mut manifest = "version = 1\n".to_owned();
        if tools {
            manifest += "[tools]\ncmake = { pypi = \"cmake\", version = \"4.4.4\" }\n";
            manifest += "ninja = { pypi = \"ninja\", version = \"1.13.2\" }\n";
        }
        manifest += &format!("[engines.powerinfer]\nsource = {}\n{rest}\n", engine.source);
        for name in &self.models {
            let place = format!("place = \"models/powerinfer/{name}\"\nweights = \"model.gguf\"");
            manifest += &format!("[models.{name}]\nsource = {{ path = \"made/{name}\" }}\n{place}\n");
        }
        manifest += &self.more;
        manifest += "[policies]\ninclude = [\"configs/*.yaml\"]\n";
        self.write("manifests/default.toml", manifest)?;
        let Some((copy, commit)) = &engine.copy else { return self.write("gitconfig", "") };
        self.write("gitconfig", format!("[url \"{copy}\"]\n\tinsteadOf = {HOME}\n"))?;
        self.write(
            ".gitmodules",
            format!("[submodule \"external/powerinfer\"]\n\tpath = external/powerinfer\n\turl = {HOME}\n"),
        )?;
        let (sh, folder) = (self.sh, &self.folder);
        cmd!(sh, "git -C {folder} init --quiet").run()?;
        let link = format!("160000,{commit},external/powerinfer");
        cmd!(sh, "git -C {folder} update-index --add --cacheinfo {link}").run()?;
        Ok(())
    }

    /// Our program in the project.
    pub fn ours(&self, args: &[&str]) -> Cmd<'a> {
        let (sh, program) = (self.sh, &self.aitools);
        let state = fs_parent(&self.cache).join("state");
        cmd!(sh, "{program} -C")
            .arg(&self.folder)
            .args(args)
            .env("AITOOLS_CACHE_DIR", &self.cache)
            .env("AITOOLS_STATE_DIR", state)
            .env("GIT_CONFIG_GLOBAL", self.folder.join("gitconfig"))
            .env_remove("CI")
            .env_remove("AITOOLS_MANIFEST")
    }

    /// The result that our program gives as JSON.
    pub fn json(&self, args: &[&str]) -> Result<serde_json::Value> {
        let said = self.ours(args).arg("--json").read()?;
        let mut said: serde_json::Value = serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))?;
        Ok(said["result"].take())
    }

    /// A program of the built engine.
    pub fn program(&self, name: &str) -> PathBuf {
        self.folder.join("build/powerinfer/bin").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
    }
}

fn fs_parent(path: &Path) -> &Path {
    path.parent().unwrap_or(path)
}

/// About 1.1 billion weights, 2.2 GB.
pub const LARGE: Shape = Shape { layers: 16, width: 2048, neurons: 8192, rank: 512, heads: 16, context: 2048 };

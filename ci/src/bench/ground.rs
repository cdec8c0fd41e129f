//! What a benchmark stands on: our program in its release build, the peers' programs, a folder of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use xshell::{Shell, cmd};

use crate::step::{Result, cargo};

/// The peers, by their names in the Python package index. Installed into a folder below `target/`.
const PEERS: &[&str] = &["uv==0.11.*", "cmake==4.4.4", "ninja==1.13.2", "huggingface_hub[cli]"];

pub struct Ground<'a> {
    pub sh: &'a Shell,
    /// Our own program.
    pub aitools: PathBuf,
    /// Empty at the start.
    pub scratch: PathBuf,
    peers: PathBuf,
}

impl std::fmt::Debug for Ground<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ground").field("scratch", &self.scratch).finish_non_exhaustive()
    }
}

impl<'a> Ground<'a> {
    pub fn new(sh: &'a Shell, name: &str) -> Result<Self> {
        let target = crate::step::root().join("target");
        cargo(sh, "build --release --locked --bin aitools").run()?;
        let scratch = target.join("bench").join("scratch").join(name);
        sh.remove_path(&scratch)?;
        sh.create_dir(&scratch)?;
        let ground = Self {
            sh,
            aitools: target.join("release").join(program("aitools")),
            scratch,
            peers: target.join("bench-tools"),
        };
        ground.install_peers()?;
        Ok(ground)
    }

    pub fn results(&self) -> PathBuf {
        crate::step::root().join("target").join("bench")
    }

    fn install_peers(&self) -> Result<()> {
        let stamp = self.peers.join("installed.txt");
        if self.sh.read_file(&stamp).is_ok_and(|text| text == PEERS.join("\n")) {
            return Ok(());
        }
        let (sh, peers) = (self.sh, &self.peers);
        let python = if cfg!(windows) { "python" } else { "python3" };
        cmd!(sh, "{python} -m venv {peers}").run()?;
        let pip = self.peer("pip");
        cmd!(sh, "{pip} install --quiet --disable-pip-version-check {PEERS...}").run()?;
        sh.write_file(stamp, PEERS.join("\n"))?;
        Ok(())
    }

    /// A peer's program.
    pub fn peer(&self, name: &str) -> PathBuf {
        self.peers.join(if cfg!(windows) { "Scripts" } else { "bin" }).join(program(name))
    }

    /// Whether a program of the machine's own is there; says so when it is not.
    pub fn has(&self, program: &str) -> bool {
        let find = format!("command -v {program}");
        let found = cfg!(unix) && cmd!(self.sh, "sh -c {find}").quiet().ignore_stdout().ignore_stderr().run().is_ok();
        if !found {
            println!("not measured, because it is not here: {program}");
        }
        found
    }

    /// Our program in `folder`, with a cache of its own when one is given.
    pub fn ours(&self, folder: &Path, cache: Option<&Path>) -> Command {
        let mut command = Command::new(&self.aitools);
        command.current_dir(folder).env_remove("CI").env_remove("AITOOLS_MANIFEST");
        if let Some(cache) = cache {
            command.env("AITOOLS_CACHE_DIR", cache).env("HF_HOME", cache.join("hf")).env_remove("HF_HUB_CACHE");
        }
        command
    }

    /// A copy of the quickstart project, whose links are its own.
    pub fn quickstart(&self) -> Result<PathBuf> {
        let project = self.folder("project")?;
        for part in ["manifests", "configs"] {
            self.copy(&crate::step::root().join(part), &project.join(part))?;
        }
        Ok(project)
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        self.sh.create_dir(to)?;
        for path in self.sh.read_dir(from)? {
            let to = to.join(path.file_name().unwrap_or_default());
            if path.is_dir() {
                self.copy(&path, &to)?;
            } else {
                self.sh.copy_file(&path, &to)?;
            }
        }
        Ok(())
    }

    /// A folder below the scratch folder, made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        Ok(self.sh.create_dir(self.scratch.join(name))?)
    }
}

fn program(name: &str) -> String {
    format!("{name}{}", std::env::consts::EXE_SUFFIX)
}

/// A command from its words.
pub fn command(program: &Path, folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).args(args);
    command
}

/// What a reader of numbers wants to know of the machine.
pub fn machine(sh: &Shell) -> serde_json::Value {
    let proc = |file: &str, key: &str| {
        let text = sh.read_file(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split(':').nth(1)).map(|value| value.trim().to_owned())
    };
    serde_json::json!({
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "processor": proc("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": proc("/proc/meminfo", "MemTotal"),
        "load": sh.read_file("/proc/loadavg").ok().map(|text| text.trim().to_owned()),
        "commit": cmd!(sh, "git rev-parse --short HEAD").quiet().read().ok(),
    })
}

/// This program's own peak: a child's is never reported below it, because it starts as a copy (Linux, vfork then exec).
pub fn own_peak_bytes(sh: &Shell) -> Option<u64> {
    let status = sh.read_file("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

//! Finds the compilers and build tools of this machine, and says what they are.
//!
//! A tool's identity is what it says of itself (version line and target), not a digest of its bytes: a rebuilt package of
//! the same compiler must not rebuild every engine. What a tool said is remembered by its path and [`Stamp`], so that a
//! command with nothing to do starts no process.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ToolPath;
use super::settings::{Env, lookup};
use crate::base::cancel::Cancel;
use crate::base::fs::{self, FsError, Stamp};
use crate::base::platform::executable;
use crate::base::process::{ProcessError, Program};

/// How long a tool may take to say its version.
const LIMIT: Duration = Duration::from_secs(60);
/// What is kept of an answer.
const MAX_ANSWER_BYTES: u64 = 16 << 10;
/// Answers remembered.
const MAX_KNOWN: usize = 512;
const MAX_CACHE_BYTES: u64 = 16 << 20;

/// What compiles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    /// The C compiler.
    pub cc: ToolPath,
    /// The C++ compiler.
    pub cxx: ToolPath,
    /// nvcc, when the build is for CUDA.
    pub cuda: Option<ToolPath>,
    /// hipcc, when the build is for ROCm.
    pub hip: Option<ToolPath>,
}

/// Why a compiler or build tool cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ToolError {
    /// No such program on this machine.
    #[error("found no {what} (looked for {})", .tried.join(", "))]
    Missing { what: &'static str, tried: Vec<String>, hint: &'static str },
    /// A variable such as `CC` that does not name a program.
    #[error("`{variable}` is `{value}`, which is not a program")]
    Variable { variable: &'static str, value: String },
    #[error("`{}` did not print its version: {said}", path.display())]
    Mute { path: PathBuf, said: String },
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// How to get what is missing, in this system's words.
pub const COMPILER_HINT: &str = if cfg!(target_os = "macos") {
    "install Apple's command line tools: `xcode-select --install`"
} else if cfg!(windows) {
    "install the Visual Studio Build Tools with the workload `Desktop development with C++`"
} else {
    "install a C and C++ compiler: `apt install g++`, `dnf install gcc-c++`, `pacman -S gcc` or `apk add g++`"
};
/// How to get NVIDIA's compiler.
pub const CUDA_HINT: &str = "install the CUDA toolkit, or set `CUDACXX` to its `nvcc`";
/// How to get AMD's compiler.
pub const ROCM_HINT: &str = "install ROCm, or set `ROCM_PATH` to its folder";
/// Only where ROCm is: no variant for it exists on Windows.
#[cfg(unix)]
const CLANG_HINT: &str = "set `ROCM_PATH` to ROCm's folder, or `CC` and `CXX` to a clang that knows HIP";
const CMAKE_HINT: &str =
    "lock them: `[tools] cmake = { pypi = \"cmake\", version = \"…\" }` (and `ninja`) in the manifest";

/// One remembered answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Known {
    stamp: Stamp,
    said: String,
}

/// Looks for tools in one environment and remembers what they say.
#[derive(Debug)]
pub struct Finder<'a> {
    env: &'a Env,
    memory: PathBuf,
    known: RefCell<BTreeMap<String, Known>>,
    cancel: &'a Cancel,
}

impl<'a> Finder<'a> {
    /// `env` is the caller's environment; answers are remembered in `folder`. A memory that cannot be read is forgotten.
    pub fn new(env: &'a Env, folder: &Path, cancel: &'a Cancel) -> Self {
        let memory = folder.join("tools.json");
        let bytes = fs::read_bounded(&memory, MAX_CACHE_BYTES).unwrap_or_default();
        let known = serde_json::from_slice(&bytes).unwrap_or_default();
        Self { env, memory, known: RefCell::new(known), cancel }
    }

    /// The caller's environment.
    pub fn env(&self) -> &'a Env {
        self.env
    }

    /// The compilers of a build: C and C++, and those that `cuda` and `hip` ask for. With `hip`, C and C++ are ROCm's own,
    /// too: its CMake packages give every compiler options that only that one knows.
    ///
    /// # Errors
    /// When one is missing or does not say what it is.
    pub fn toolchain(&self, cuda: bool, hip: bool) -> Result<Toolchain, ToolError> {
        let need = |tool: Option<ToolPath>, what, tried: &str, hint| {
            tool.ok_or(ToolError::Missing { what, tried: vec![tried.to_owned()], hint })
        };
        let cuda = cuda.then(|| need(self.nvcc()?, "CUDA compiler", "nvcc", CUDA_HINT)).transpose()?;
        let hip = hip.then(|| need(self.hipcc()?, "HIP compiler", "hipcc", ROCM_HINT)).transpose()?;
        let (cc, cxx) = platform::compilers(self, hip.as_ref().map(|hipcc| hipcc.path.as_path()))?;
        Ok(Toolchain { cc, cxx, cuda, hip })
    }

    /// The machine's own CMake.
    ///
    /// # Errors
    /// When there is none.
    pub fn cmake(&self) -> Result<ToolPath, ToolError> {
        let missing = || ToolError::Missing { what: "CMake", tried: vec!["cmake".to_owned()], hint: CMAKE_HINT };
        self.versioned(self.search("cmake").ok_or_else(missing)?, "")
    }

    /// The machine's own ninja, if it has one.
    ///
    /// # Errors
    /// When it does not say its version.
    pub fn ninja(&self) -> Result<Option<ToolPath>, ToolError> {
        let found = self.search("ninja").or_else(|| self.search("ninja-build"));
        found.map(|path| self.versioned(path, "ninja ")).transpose()
    }

    /// NVIDIA's compiler: `CUDACXX`, `CUDA_PATH`, the search path, then where its installer puts it.
    ///
    /// # Errors
    /// When `CUDACXX` names nothing, or what was found does not say its version.
    pub fn nvcc(&self) -> Result<Option<ToolPath>, ToolError> {
        let roots = ["CUDA_PATH", "CUDA_HOME"];
        let Some(path) = self.accelerator_compiler("CUDACXX", "nvcc", &roots, "/usr/local/cuda")? else {
            return Ok(None);
        };
        let said = self.ask(&path, &["--version"])?;
        let release = said.lines().rev().find(|line| line.contains("release")).map(str::trim);
        let identity = release.ok_or_else(|| mute(&path, &said))?.to_owned();
        Ok(Some(ToolPath { path, identity }))
    }

    /// AMD's compiler: `HIPCXX`, `ROCM_PATH`, the search path, then where its packages put it.
    ///
    /// # Errors
    /// When what was found does not say its version.
    pub fn hipcc(&self) -> Result<Option<ToolPath>, ToolError> {
        let found = self.accelerator_compiler("HIPCXX", "hipcc", &["ROCM_PATH", "HIP_PATH"], "/opt/rocm")?;
        found.map(|path| self.versioned(path, "")).transpose()
    }

    fn accelerator_compiler(
        &self,
        variable: &'static str,
        name: &str,
        roots: &[&str],
        usual: &str,
    ) -> Result<Option<PathBuf>, ToolError> {
        if let Some(path) = self.named_by(variable)? {
            return Ok(Some(path));
        }
        let in_root = |root: PathBuf| Some(root.join("bin").join(executable(name))).filter(|path| is_program(path));
        let given = roots.iter().filter_map(|root| lookup(self.env, root)).map(PathBuf::from).find_map(in_root);
        Ok(given.or_else(|| self.search(name)).or_else(|| in_root(usual.into())))
    }

    /// A compiler named by a variable such as `CC`.
    fn named_by(&self, variable: &'static str) -> Result<Option<PathBuf>, ToolError> {
        let Some(value) = lookup(self.env, variable).filter(|value| !value.is_empty()) else { return Ok(None) };
        let path = Path::new(value);
        let found = if path.is_absolute() { Some(path.to_owned()) } else { self.search_os(value) };
        let error = || ToolError::Variable { variable, value: value.to_string_lossy().into_owned() };
        found.filter(|path| is_program(path)).map(Some).ok_or_else(error)
    }

    /// The first program of that name on the search path. Compiler caches that pose as compilers are passed over.
    pub fn search(&self, name: &str) -> Option<PathBuf> {
        self.search_os(OsStr::new(&executable(name)))
    }

    fn search_os(&self, name: &OsStr) -> Option<PathBuf> {
        let folders = lookup(self.env, "PATH").map(std::env::split_paths).into_iter().flatten();
        let absolute = folders.filter(|folder| folder.is_absolute());
        absolute.map(|folder| folder.join(name)).find(|path| is_program(path) && !is_compiler_cache(path))
    }

    /// A tool whose `--version` begins with what it is.
    fn versioned(&self, path: PathBuf, prefix: &str) -> Result<ToolPath, ToolError> {
        let said = self.ask(&path, &["--version"])?;
        let line = said.lines().find(|line| !line.trim().is_empty()).ok_or_else(|| mute(&path, &said))?;
        let identity = format!("{prefix}{}", line.trim());
        Ok(ToolPath { path, identity })
    }

    /// What a tool says when it is called with `args` (stdout, else stderr), remembered as long as the file stays the same.
    ///
    /// # Errors
    /// When it cannot be run or fails.
    pub fn ask(&self, path: &Path, args: &[&str]) -> Result<String, ToolError> {
        let stamp = fs::stamp(path)?;
        let key = format!("{}\n{}\n{}", path.display(), args.join(" "), platform::selection(self.env));
        if let Some(known) = self.known.borrow().get(&key).filter(|known| known.stamp == stamp) {
            return Ok(known.said.clone());
        }
        let mut env: Env = ["PATH", "DEVELOPER_DIR", "SDKROOT", "SystemRoot", "TEMP", "ROCM_PATH", "HIP_PATH"]
            .iter()
            .filter_map(|name| lookup(self.env, name).map(|value| (OsString::from(name), value.clone())))
            .collect();
        env.insert("LC_ALL".into(), "C".into());
        let args = args.iter().map(OsString::from).collect();
        let program = Program { path: path.to_owned(), args, env, cwd: fs::parent(path).to_owned() };
        let ran = program.output(LIMIT, MAX_ANSWER_BYTES, self.cancel)?;
        let said = if ran.stdout.trim().is_empty() { ran.stderr } else { ran.stdout };
        if !ran.status.success() && !platform::is_banner(&said) {
            return Err(mute(path, &said));
        }
        self.remember(key, Known { stamp, said: said.clone() });
        Ok(said)
    }

    /// Being unable to remember costs time, nothing else.
    fn remember(&self, key: String, known: Known) {
        let mut all = self.known.borrow_mut();
        if all.len() >= MAX_KNOWN {
            all.clear();
        }
        all.insert(key, known);
        // A cache that is not there is not made to remember this.
        if let Ok(text) = serde_json::to_vec_pretty(&*all)
            && fs::exists(fs::parent(&self.memory))
        {
            let _ = fs::write_atomic(&self.memory, &text);
        }
    }
}

fn mute(path: &Path, said: &str) -> ToolError {
    let said = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no output");
    ToolError::Mute { path: path.to_owned(), said: said.chars().take(200).collect() }
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && (cfg!(windows) || fs::is_executable(&meta)))
}

fn is_compiler_cache(path: &Path) -> bool {
    let real = fs::canonical(path).unwrap_or_else(|_| path.to_owned());
    let stem = real.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default();
    ["ccache", "sccache", "distcc", "icecc"].iter().any(|cache| stem.starts_with(cache))
}

/// This machine's processor, for builds made for exactly it: model and a digest of its features.
pub fn processor(env: &Env) -> String {
    platform::processor(env)
}

#[cfg(unix)]
mod platform {
    use super::*;

    /// `CC` and `CXX`, else those that belong to `hipcc`, else those of the search path.
    pub fn compilers(finder: &Finder<'_>, hipcc: Option<&Path>) -> Result<(ToolPath, ToolPath), ToolError> {
        let find = |variable, names: &[&str], what| {
            let search = || match (hipcc, names.last()) {
                (Some(hipcc), Some(clang)) => of_rocm(hipcc, clang),
                _ => names.iter().find_map(|name| finder.search(name)),
            };
            let found = match finder.named_by(variable)? {
                Some(path) => Some(path),
                None => search(),
            };
            let missing = || match hipcc {
                Some(_) => ToolError::Missing { what, tried: vec!["ROCm's own clang".to_owned()], hint: CLANG_HINT },
                None => {
                    let tried = names.iter().map(|name| format!("`{name}`")).collect();
                    ToolError::Missing { what, tried, hint: COMPILER_HINT }
                }
            };
            identify(finder, found.ok_or_else(missing)?)
        };
        let cc = find("CC", &["cc", "gcc", "clang"], "C compiler")?;
        Ok((cc, find("CXX", &["c++", "g++", "clang++"], "C++ compiler")?))
    }

    /// ROCm's own `clang`: in `llvm/bin` of the folder whose `bin` has `hipcc` (which may be a link into it), or beside a
    /// `HIPCXX` that is itself one.
    fn of_rocm(hipcc: &Path, clang: &str) -> Option<PathBuf> {
        let real = fs::canonical(hipcc).unwrap_or_else(|_| hipcc.to_owned());
        let folders = [hipcc, &real].map(fs::parent);
        let in_root = folders.map(|folder| fs::parent(folder).join("llvm").join("bin").join(clang));
        let beside = folders.map(|folder| folder.join(clang));
        in_root.into_iter().chain(beside).find(|path| is_program(path))
    }

    /// Version line and target. gcc begins its line with the name it was called by, which says nothing.
    fn identify(finder: &Finder<'_>, path: PathBuf) -> Result<ToolPath, ToolError> {
        let said = finder.ask(&path, &["--version"])?;
        let line = said.lines().next().filter(|line| !line.trim().is_empty()).ok_or_else(|| mute(&path, &said))?;
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let line = line.strip_prefix(&format!("{name} ")).map_or_else(|| line.to_owned(), |rest| format!("gcc {rest}"));
        let target = finder.ask(&path, &["-dumpmachine"])?;
        let identity = format!("{} {}", line.trim(), target.trim());
        Ok(ToolPath { path, identity })
    }

    /// What, besides the file, decides which compiler runs: on macOS `cc` is a door to the selected Xcode.
    pub fn selection(env: &Env) -> String {
        let chosen = lookup(env, "DEVELOPER_DIR").map(|folder| folder.to_string_lossy().into_owned());
        let link = || fs::read_link(Path::new("/var/db/xcode_select_link")).map(|path| path.display().to_string());
        chosen.or_else(|| link().ok()).unwrap_or_default()
    }

    pub fn is_banner(_: &str) -> bool {
        false
    }

    #[cfg(target_os = "linux")]
    pub fn processor(_: &Env) -> String {
        let bytes = fs::read_bounded(Path::new("/proc/cpuinfo"), 16 << 20).unwrap_or_default();
        describe_processor(&String::from_utf8_lossy(&bytes))
    }

    #[cfg(not(target_os = "linux"))]
    pub fn processor(env: &Env) -> String {
        let program = Program {
            path: "/usr/sbin/sysctl".into(),
            args: ["-n", "machdep.cpu.brand_string", "hw.optional"].map(OsString::from).into(),
            env: env.clone(),
            cwd: "/".into(),
        };
        let ran = program.output(LIMIT, MAX_ANSWER_BYTES, &Cancel::default());
        ran.map_or_else(|_| std::env::consts::ARCH.to_owned(), |ran| ran.stdout.trim().replace('\n', " "))
    }

    /// The first processor of `/proc/cpuinfo` (proc_cpuinfo(5)): `model name` on x86, implementer and part on ARM.
    #[cfg(target_os = "linux")]
    pub fn describe_processor(text: &str) -> String {
        let first = text.split("\n\n").next().unwrap_or_default();
        let field = |name: &str| {
            let mut fields = first.lines().filter_map(|line| line.split_once(':'));
            fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
        };
        let arm = || Some(format!("{} {}", field("CPU implementer")?, field("CPU part")?));
        let name = field("model name").or_else(arm).unwrap_or_else(|| "unknown".to_owned());
        let family = ["cpu family", "model", "stepping"].map(|name| field(name).unwrap_or_default()).join("/");
        let flags = field("flags").or_else(|| field("Features")).unwrap_or_default();
        let mut flags: Vec<&str> = flags.split_whitespace().collect();
        flags.sort_unstable();
        let features = crate::base::digest::Digest::of(flags.join(" ").as_bytes()).hex();
        format!("{name} {family} features {}", &features[..16])
    }
}

#[cfg(windows)]
mod platform {
    use super::*;

    /// Microsoft's compiler, found as the `cc` crate does (through the Visual Studio installer's records), unless `CC` and
    /// `CXX` name others.
    pub fn compilers(finder: &Finder<'_>, _hipcc: Option<&Path>) -> Result<(ToolPath, ToolPath), ToolError> {
        if let (Some(cc), Some(cxx)) = (finder.named_by("CC")?, finder.named_by("CXX")?) {
            return Ok((finder.versioned(cc, "")?, finder.versioned(cxx, "")?));
        }
        let found = cc::windows_registry::find_tool(std::env::consts::ARCH, "cl.exe");
        let tried = || vec!["`cl.exe` of Visual Studio".to_owned()];
        let missing = || ToolError::Missing { what: "C compiler", tried: tried(), hint: COMPILER_HINT };
        let path = found.ok_or_else(missing)?.path().to_owned();
        // Called with nothing, cl writes its banner to stderr: version and target.
        let said = finder.ask(&path, &[])?;
        let identity = said.lines().next().map(|line| line.trim().to_owned()).ok_or_else(|| mute(&path, &said))?;
        let cl = ToolPath { path, identity };
        Ok((cl.clone(), cl))
    }

    pub fn selection(_: &Env) -> String {
        String::new()
    }

    pub fn is_banner(said: &str) -> bool {
        said.contains("Microsoft (R)")
    }

    pub fn processor(env: &Env) -> String {
        lookup(env, "PROCESSOR_IDENTIFIER").map_or_else(|| "unknown".to_owned(), |it| it.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(unix)]
    fn a_build_for_rocm_is_compiled_by_its_own_clang() {
        use super::*;
        let root = tempfile::tempdir().unwrap();
        let real = fs::canonical(root.path()).unwrap();
        let at = |path: &str| real.join(path);
        // A program that says its name when it is asked what it is.
        let tool = |path: &Path| {
            let name = path.file_name().unwrap().to_string_lossy();
            fs::write_atomic(path, format!("#!/bin/sh\necho {name} version 1\n").as_bytes()).unwrap();
            fs::set_executable(path).unwrap();
        };
        for folder in ["bin", "opt/rocm/bin", "opt/rocm/llvm/bin"] {
            fs::create_dir_all(&at(folder)).unwrap();
        }
        ["opt/rocm/bin/hipcc", "bin/cc", "bin/c++"].iter().for_each(|path| tool(&at(path)));
        fs::symlink(&at("opt/rocm/bin/hipcc"), &at("bin/hipcc")).unwrap();
        let cancel = Cancel::default();
        let mut env = Env::from([("PATH".into(), at("bin").into())]);
        let compilers = |env: &Env, hip| {
            let found = Finder::new(env, root.path(), &cancel).toolchain(false, hip)?;
            Ok::<_, ToolError>((found.cc.path, found.cxx.path))
        };
        assert_eq!(compilers(&env, false).unwrap(), (at("bin/cc"), at("bin/c++")));
        let error = compilers(&env, true).unwrap_err();
        assert!(error.to_string().contains("ROCm's own clang"), "{error}");
        let clang = ["opt/rocm/llvm/bin/clang", "opt/rocm/llvm/bin/clang++"].map(at);
        clang.iter().for_each(|path| tool(path));
        assert_eq!(compilers(&env, true).unwrap(), clang.clone().into());
        env.insert("HIPCXX".into(), clang[1].clone().into());
        assert_eq!(compilers(&env, true).unwrap(), clang.clone().into());
        env.insert("CC".into(), at("bin/cc").into());
        assert_eq!(compilers(&env, true).unwrap(), (at("bin/cc"), clang[1].clone()));
    }
}

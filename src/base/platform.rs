//! Which platform this is, in the words that manifests and lockfiles use.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which accelerator a build of an engine uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "schemars lists the keys of a map only if they are undocumented")]
pub enum Variant {
    Cpu,
    Cuda,
    Rocm,
    Metal,
}

impl Variant {
    /// Every variant.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Cuda, Self::Rocm, Self::Metal];

    /// The word in manifests and policies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Rocm => "rocm",
            Self::Metal => "metal",
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Operating system and processor, as Rust names them (`linux`, `macos`, `windows`; `x86_64`, `aarch64`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Platform {
    /// Operating system.
    pub os: &'static str,
    /// Processor architecture.
    pub arch: &'static str,
}

impl Platform {
    /// The platform that this program was compiled for.
    pub const HOST: Self = Self { os: std::env::consts::OS, arch: std::env::consts::ARCH };

    /// Whether a wheel's platform tag (`manylinux_2_17_x86_64`, `macosx_11_0_arm64`, `win_amd64`, `any`, …) runs here.
    /// One tag: wheels that name several separate them by dots.
    pub fn runs_wheel_tag(&self, tag: &str, musl: bool) -> bool {
        if tag == "any" {
            return true;
        }
        let arch = match (self.os, self.arch) {
            ("macos", "aarch64") => "arm64",
            ("windows", "x86_64") => "amd64",
            ("windows", "aarch64") => "arm64",
            (_, arch) => arch,
        };
        let fits_arch = tag.ends_with(&format!("_{arch}")) || tag.ends_with("_universal2");
        match self.os {
            "linux" if musl => tag.starts_with("musllinux_") && fits_arch,
            "linux" => tag.starts_with("manylinux") && fits_arch,
            "macos" => tag.starts_with("macosx_") && fits_arch,
            "windows" => tag.starts_with("win_") && fits_arch,
            _ => false,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.os, self.arch)
    }
}

/// Whether the system's C library is musl (Alpine and the like): its loader is there and glibc's is not. How this program
/// itself was linked does not matter.
pub fn is_musl() -> bool {
    let arch = std::env::consts::ARCH;
    let glibc = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    let exists = |path: &str| super::fs::metadata(std::path::Path::new(path)).is_ok();
    cfg!(target_os = "linux") && exists(&format!("/lib/ld-musl-{arch}.so.1")) && !glibc.into_iter().any(exists)
}

/// The file name of a program here: `llama-server` or `llama-server.exe`.
pub fn executable(name: &str) -> String {
    format!("{name}{}", std::env::consts::EXE_SUFFIX)
}

/// Physical processor cores; logical ones where the system does not tell.
pub fn physical_cores() -> u32 {
    let logical = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let logical = u32::try_from(logical).unwrap_or(1);
    match siblings() {
        0 => logical,
        physical => physical.min(logical),
    }
}

/// How many groups of threads share a core, where Linux says so; else 0.
fn siblings() -> u32 {
    let Ok(cpus) = super::fs::read_dir(std::path::Path::new("/sys/devices/system/cpu")) else { return 0 };
    let group = |cpu: &std::path::PathBuf| {
        let list = super::fs::read_bounded(&cpu.join("topology/thread_siblings_list"), 4096);
        list.ok()
    };
    let groups: std::collections::BTreeSet<Vec<u8>> = cpus.iter().take(4096).filter_map(group).collect();
    u32::try_from(groups.len()).unwrap_or(0)
}

/// The machine's memory in bytes, where the system tells without a program.
pub fn memory_bytes() -> Option<u64> {
    meminfo("MemTotal:")
}

/// Memory in bytes that programs could get now, where the system tells without a program.
pub fn available_memory_bytes() -> Option<u64> {
    meminfo("MemAvailable:")
}

/// A line of `/proc/meminfo` (proc_meminfo(5)).
fn meminfo(field: &str) -> Option<u64> {
    let text = super::fs::read_bounded(std::path::Path::new("/proc/meminfo"), 64 << 10).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

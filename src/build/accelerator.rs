//! Which accelerators this machine has, and which compilers for them. Cheap where there are none: a library that cannot be
//! loaded and a program that is not there cost nothing.
//!
//! Graphics processors are asked through NVIDIA's own library; AMD's are not listed, only ROCm's compiler is found.

use std::ffi::OsStr;

use serde::Serialize;

use super::ToolPath;
use super::toolchain::{Finder, ToolError};
use crate::base::platform::{Platform, Variant};

/// More than any machine has.
const MAX_GPUS: u32 = 64;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Accelerators {
    pub gpus: Vec<Gpu>,
    /// Why NVIDIA's library is there but does not answer: a driver that does not fit the kernel, no permission.
    pub trouble: Option<String>,
    pub nvcc: Option<Nvcc>,
    pub hipcc: Option<Tool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    pub name: String,
    /// All of its memory, in bytes.
    pub vram_bytes: u64,
    /// Memory nobody uses now, in bytes.
    pub free_bytes: u64,
    /// `(9, 0)` for compute capability 9.0.
    pub compute_capability: (u32, u32),
    /// The driver's version: `580.95.05`.
    pub driver: String,
}

impl Gpu {
    /// As CMake's `CMAKE_CUDA_ARCHITECTURES` writes it: `90`.
    pub fn architecture(&self) -> u32 {
        self.compute_capability.0 * 10 + self.compute_capability.1
    }
}

/// A compiler, for reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tool {
    pub path: String,
    pub identity: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nvcc {
    #[serde(flatten)]
    pub tool: Tool,
    /// `(13, 0)` for CUDA 13.0.
    pub release: (u32, u32),
    /// The architectures it compiles for, ascending, as CMake writes them.
    pub architectures: Vec<u32>,
}

impl Accelerators {
    /// Whether a build for that accelerator can be made and used here.
    pub fn can_use(&self, variant: Variant) -> bool {
        match variant {
            Variant::Cpu => true,
            Variant::Cuda => self.nvcc.is_some() && !self.gpus.is_empty(),
            Variant::Rocm => self.hipcc.is_some(),
            Variant::Metal => Platform::HOST.os == "macos",
        }
    }
}

/// Looks at the machine.
///
/// # Errors
/// When a variable such as `CUDACXX` names nothing, a compiler does not answer, or the user asked to stop.
pub fn detect(finder: &Finder<'_>) -> Result<Accelerators, ToolError> {
    let (gpus, trouble) = match gpus() {
        Ok(gpus) => (gpus, None),
        Err(trouble) => (Vec::new(), Some(trouble)),
    };
    let nvcc = finder.nvcc()?.map(|tool| describe_nvcc(finder, &tool)).transpose()?;
    let hipcc = finder.hipcc()?.map(|tool| Tool::from(&tool));
    Ok(Accelerators { gpus, trouble, nvcc, hipcc })
}

impl From<&ToolPath> for Tool {
    fn from(tool: &ToolPath) -> Self {
        Self { path: tool.path.display().to_string(), identity: tool.identity.clone() }
    }
}

fn describe_nvcc(finder: &Finder<'_>, tool: &ToolPath) -> Result<Nvcc, ToolError> {
    let release = release_of(&tool.identity).unwrap_or_default();
    let architectures = architectures_of(&finder.ask(&tool.path, &["--list-gpu-arch"])?);
    Ok(Nvcc { tool: tool.into(), release, architectures })
}

/// `(13, 0)` of `Cuda compilation tools, release 13.0, V13.0.88`.
fn release_of(identity: &str) -> Option<(u32, u32)> {
    let (_, rest) = identity.split_once("release ")?;
    let (major, minor) = rest.split(',').next()?.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Lines `compute_90`. Those that end in a letter are for one chip alone and are left out.
fn architectures_of(said: &str) -> Vec<u32> {
    let numbers = said.lines().filter_map(|line| line.trim().strip_prefix("compute_")?.parse().ok());
    let mut all: Vec<u32> = numbers.take(256).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// NVIDIA's graphics processors. No library is no trouble: an empty list. Source: NVML's reference, by the `nvml-wrapper` crate.
///
/// # Errors
/// Why the library is there but does not answer.
pub fn gpus() -> Result<Vec<Gpu>, String> {
    let names: &[&str] = if cfg!(windows) { &["nvml.dll"] } else { &["libnvidia-ml.so.1", "libnvidia-ml.so"] };
    let mut nvml = None;
    for name in names {
        match nvml_wrapper::Nvml::builder().lib_path(OsStr::new(name)).init() {
            Ok(loaded) => nvml = Some(loaded),
            Err(nvml_wrapper::error::NvmlError::LibloadingError(_)) => continue,
            Err(error) => return Err(error.to_string()),
        }
        break;
    }
    let Some(nvml) = nvml else { return Ok(Vec::new()) };
    let list = || -> Result<Vec<Gpu>, nvml_wrapper::error::NvmlError> {
        let driver = nvml.sys_driver_version()?;
        let describe = |index| {
            let device = nvml.device_by_index(index)?;
            let memory = device.memory_info()?;
            let capability = device.cuda_compute_capability()?;
            Ok(Gpu {
                name: device.name()?,
                vram_bytes: memory.total,
                free_bytes: memory.free,
                compute_capability: (capability.major.unsigned_abs(), capability.minor.unsigned_abs()),
                driver: driver.clone(),
            })
        };
        (0..nvml.device_count()?.min(MAX_GPUS)).map(describe).collect()
    };
    list().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nvcc_says() {
        assert_eq!(release_of("Cuda compilation tools, release 13.0, V13.0.88"), Some((13, 0)));
        assert_eq!(release_of("release x.y"), None);
        assert_eq!(release_of(""), None);
        assert_eq!(architectures_of("compute_90\ncompute_75\n  compute_90\ncompute_90a\nnonsense\n"), [75, 90]);
    }

    #[test]
    fn what_can_be_used_follows_from_what_is_there() {
        let mut here = Accelerators::default();
        assert!(here.can_use(Variant::Cpu) && !here.can_use(Variant::Cuda) && !here.can_use(Variant::Rocm));
        let tool = Tool { path: "/x/nvcc".to_owned(), identity: String::new() };
        here.nvcc = Some(Nvcc { tool, release: (13, 0), architectures: vec![90] });
        assert!(!here.can_use(Variant::Cuda), "a compiler without a card");
        let gpu = Gpu {
            name: "G".to_owned(),
            vram_bytes: 1,
            free_bytes: 1,
            compute_capability: (9, 0),
            driver: "580".to_owned(),
        };
        assert_eq!(gpu.architecture(), 90);
        here.gpus.push(gpu);
        assert!(here.can_use(Variant::Cuda));
    }
}

//! Which accelerators this machine has, and which compilers for them. Detection is cheap where there are none: a library that cannot be
//! loaded and a program that is not there cost nothing.
//!
//! NVIDIA's graphics processors are asked through its own library; AMD's are those that Linux's driver lists.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use serde::Serialize;

use super::ToolPath;
use super::settings::{Env, lookup};
use super::toolchain::{Finder, ToolError};
use crate::base::fs;
use crate::base::platform::{Platform, Variant};

/// The most devices that are listed.
const MAX_GPUS: u32 = 64;
/// Which variant is taken when nobody asks for one: the first that fits.
const PREFERENCE: [Variant; 4] = [Variant::Metal, Variant::Cuda, Variant::Rocm, Variant::Cpu];
/// CMake's words for the architectures of a build.
const CUDA_TARGETS: &str = "CMAKE_CUDA_ARCHITECTURES";
const ROCM_TARGETS: [&str; 3] = ["GPU_TARGETS", "AMDGPU_TARGETS", "CMAKE_HIP_ARCHITECTURES"];

/// CMake's definitions of a build, by name.
pub type Definitions = BTreeMap<String, String>;

/// The GPUs and GPU compilers of this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Accelerators {
    /// NVIDIA's GPUs.
    pub gpus: Vec<Gpu>,
    /// AMD's graphics processors, as ROCm's compiler names them: `gfx1100`.
    pub amd: Vec<String>,
    /// Why NVIDIA's library is installed but fails: a driver that does not match the kernel, no permission.
    pub trouble: Option<String>,
    /// NVIDIA's compiler, if it is installed.
    pub nvcc: Option<Nvcc>,
    /// AMD's compiler, if it is installed.
    pub hipcc: Option<Tool>,
}

/// One NVIDIA GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// The product name: `NVIDIA H100 80GB HBM3`.
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
    /// Where it is.
    pub path: String,
    /// Its version line.
    pub identity: String,
}

/// NVIDIA's compiler and what it supports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Nvcc {
    /// The compiler.
    #[serde(flatten)]
    pub tool: Tool,
    /// `(13, 0)` for CUDA 13.0.
    pub release: (u32, u32),
    /// The architectures it compiles for, ascending, as CMake writes them.
    pub architectures: Vec<u32>,
}

/// Why a build for an accelerator cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum Unfit {
    #[error("this machine has no GPU for it, or no compiler")]
    Absent,
    #[error("it is built for the architectures {built}, but this machine's GPU has {}", numbers(.here))]
    Gpu { built: String, here: Vec<u32> },
    #[error("the installed CUDA {}.{} does not compile for the architectures {}", release.0, release.1, numbers(.unknown))]
    Toolkit { release: (u32, u32), unknown: Vec<u32> },
}

impl Unfit {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        let list = |wanted: &str| format!("list {wanted} in `{CUDA_TARGETS}` of the manifest's `variant.cuda`");
        match self {
            Self::Absent => None,
            Self::Gpu { here, .. } => Some(format!("{}, or use `--variant cpu`", list(&numbers(here)))),
            Self::Toolkit { .. } => {
                Some(format!("install another CUDA toolkit, or {}", list("only the ones that it supports")))
            }
        }
    }
}

fn numbers(all: &[u32]) -> String {
    all.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

impl Accelerators {
    /// The variant to build when nobody asks for one, of those whose definitions are given.
    pub fn best(&self, builds: &BTreeMap<Variant, Definitions>) -> Variant {
        let fits = |variant: &Variant| builds.get(variant).is_some_and(|define| self.fit(*variant, define).is_ok());
        PREFERENCE.into_iter().find(fits).unwrap_or(Variant::Cpu)
    }

    /// Whether a build with those definitions can be made and used here.
    ///
    /// # Errors
    /// Why not.
    pub fn fit(&self, variant: Variant, define: &Definitions) -> Result<(), Unfit> {
        let rocm = || {
            let lists = ROCM_TARGETS.iter().filter_map(|name| define.get(*name));
            // A target may go on with features: `gfx90a:xnack-`.
            let mut targets = lists.flat_map(|list| list.split(';').filter_map(|target| target.split(':').next()));
            self.hipcc.is_some() && targets.any(|target| self.amd.iter().any(|gpu| gpu == target))
        };
        let fits = match variant {
            Variant::Cpu => true,
            Variant::Cuda => return self.fit_cuda(define.get(CUDA_TARGETS).map_or("", String::as_str)),
            Variant::Rocm => rocm(),
            Variant::Metal => Platform::HOST.os == "macos",
        };
        if fits { Ok(()) } else { Err(Unfit::Absent) }
    }

    fn fit_cuda(&self, built: &str) -> Result<(), Unfit> {
        let nvcc = self.nvcc.as_ref().ok_or(Unfit::Absent)?;
        let targets = cuda_targets(built).unwrap_or_default();
        let unknown = |target: &&CudaTarget| !nvcc.architectures.contains(&target.number);
        let mut unknown: Vec<u32> = targets.iter().filter(unknown).map(|target| target.number).collect();
        unknown.dedup();
        // One that does not say what it compiles for is believed.
        if !unknown.is_empty() && !nvcc.architectures.is_empty() {
            return Err(Unfit::Toolkit { release: nvcc.release, unknown });
        }
        let here: Vec<u32> = self.gpus.iter().map(Gpu::architecture).collect();
        if here.is_empty() {
            return Err(Unfit::Absent);
        }
        let runs = |gpu: &u32| targets.iter().any(|target| target.runs_on(*gpu));
        if targets.is_empty() || here.iter().any(runs) {
            return Ok(());
        }
        Err(Unfit::Gpu { built: built.to_owned(), here })
    }
}

/// One of `CMAKE_CUDA_ARCHITECTURES`: `90` is machine code and PTX, `90-real` and `90-virtual` are one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct CudaTarget {
    number: u32,
    code: bool,
    ptx: bool,
}

impl CudaTarget {
    /// Machine code runs on its generation from its own number on; PTX is compiled at the start for everything newer.
    /// Source: "Application Compatibility" in NVIDIA's guide to nvcc.
    fn runs_on(self, gpu: u32) -> bool {
        gpu >= self.number && (self.ptx || (self.code && gpu / 10 == self.number / 10))
    }
}

/// None when CMake or the manifest's author decides in a way that is not judged here: `native`, `all`, `90a`.
fn cuda_targets(list: &str) -> Option<Vec<CudaTarget>> {
    let parse = |entry: &str| {
        let (number, kind) = entry.split_once('-').unwrap_or((entry, ""));
        let (code, ptx) = (kind != "virtual", kind != "real");
        Some(CudaTarget { number: number.trim().parse().ok()?, code, ptx })
    };
    list.split(';').map(parse).collect()
}

/// Looks at the machine.
///
/// # Errors
/// When a variable such as `CUDACXX` names nothing, a compiler does not answer, or the user asked to stop.
pub fn detect(finder: &Finder<'_>) -> Result<Accelerators, ToolError> {
    let (gpus, trouble) = match gpus(finder.env()) {
        Ok(gpus) => (gpus, None),
        Err(trouble) => (Vec::new(), Some(trouble)),
    };
    let nvcc = finder.nvcc()?.map(|tool| describe_nvcc(finder, &tool)).transpose()?;
    let hipcc = finder.hipcc()?.map(|tool| Tool::from(&tool));
    let amd = amd_gpus(finder.env(), Path::new("/sys/class/kfd/kfd/topology/nodes"));
    Ok(Accelerators { gpus, amd, trouble, nvcc, hipcc })
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

/// Whether the user keeps every device from programs: NVIDIA's and AMD's libraries obey such a variable, and take no device
/// from the first one on that does not exist.
fn hidden(env: &Env, variable: &str) -> bool {
    let first = |value: &str| value.split(',').next().unwrap_or_default().trim().to_owned();
    lookup(env, variable).map(|value| first(&value.to_string_lossy())).is_some_and(|it| it.is_empty() || it == "-1")
}

/// AMD's graphics processors as its driver lists them, processors among them with a version of 0. `gfx_target_version` is
/// 90010 for `gfx90a`: two digits each for minor version and stepping, which the name has in hexadecimal. Source: the
/// kernel's `kfd_topology.c`.
fn amd_gpus(env: &Env, nodes: &Path) -> Vec<String> {
    if ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"].iter().any(|variable| hidden(env, variable)) {
        return Vec::new();
    }
    let name = |node: &std::path::PathBuf| {
        let bytes = fs::read_bounded(&node.join("properties"), 64 << 10).ok()?;
        let text = String::from_utf8_lossy(&bytes);
        let version: u32 =
            text.lines().find_map(|line| line.strip_prefix("gfx_target_version "))?.trim().parse().ok()?;
        (version > 0).then(|| format!("gfx{}{:x}{:x}", version / 10_000, version / 100 % 100, version % 100))
    };
    fs::read_dir(nodes).unwrap_or_default().iter().take(MAX_GPUS as usize).filter_map(name).collect()
}

/// NVIDIA's graphics processors that `env` lets programs see. No library is no trouble: an empty list. Source: NVML's
/// reference, by the `nvml-wrapper` crate.
///
/// # Errors
/// Why the library is there but does not answer.
pub fn gpus(env: &Env) -> Result<Vec<Gpu>, String> {
    if hidden(env, "CUDA_VISIBLE_DEVICES") {
        return Ok(Vec::new());
    }
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

    const TARGETS: &str = "80-real;86-real;89-real;90";

    /// A machine with an nvcc that compiles for `compiles`, and GPUs of those architectures.
    fn machine(compiles: &[u32], gpus: &[u32]) -> Accelerators {
        let tool = Tool { path: "/x/nvcc".to_owned(), identity: String::new() };
        let gpu = |architecture: &u32| Gpu {
            name: "G".to_owned(),
            vram_bytes: 1,
            free_bytes: 1,
            compute_capability: (architecture / 10, architecture % 10),
            driver: "580".to_owned(),
        };
        Accelerators {
            gpus: gpus.iter().map(gpu).collect(),
            nvcc: Some(Nvcc { tool, release: (11, 5), architectures: compiles.to_vec() }),
            ..Accelerators::default()
        }
    }

    fn definitions(name: &str, value: &str) -> Definitions {
        BTreeMap::from([(name.to_owned(), value.to_owned())])
    }

    /// What a manifest with all of these variants would get.
    fn best(here: &Accelerators) -> Variant {
        here.best(&BTreeMap::from([
            (Variant::Cpu, Definitions::new()),
            (Variant::Cuda, definitions(CUDA_TARGETS, TARGETS)),
            (Variant::Rocm, definitions("GPU_TARGETS", "gfx90a:xnack-;gfx1100")),
        ]))
    }

    #[test]
    fn without_a_request_a_variant_is_taken_that_can_be_built_and_runs() {
        use Variant::{Cpu, Cuda};
        let new = [75, 80, 86, 87, 89, 90, 100, 120];
        let table: [(&[u32], &[u32], Variant); 10] = [
            (&new, &[90], Cuda),
            (&new, &[80], Cuda),
            // Machine code for 8.6 runs on 8.7; PTX for 9.0 on everything newer.
            (&new, &[87], Cuda),
            (&new, &[120], Cuda),
            (&new, &[], Cpu),
            // "no kernel image is available": T4, V100.
            (&new, &[75], Cpu),
            (&new, &[70], Cpu),
            (&new, &[75, 90], Cuda),
            // CUDA 11.5 with an A100: nvcc refuses 89 and 90.
            (&[70, 75, 80, 86, 87], &[80], Cpu),
            (&[], &[80], Cuda),
        ];
        for (compiles, gpus, expected) in table {
            assert_eq!(best(&machine(compiles, gpus)), expected, "{compiles:?} {gpus:?}");
        }
        assert_eq!(best(&Accelerators::default()), Cpu);
        assert_eq!(best(&Accelerators { nvcc: None, ..machine(&new, &[90]) }), Cpu, "a card without a compiler");
    }

    #[test]
    fn rocm_takes_a_gpu_of_amd_and_comes_after_cuda() {
        let hipcc = Some(Tool { path: "/x/hipcc".to_owned(), identity: String::new() });
        let of = |amd: &[&str], here: Accelerators| {
            let amd = amd.iter().map(|name| (*name).to_owned()).collect();
            best(&Accelerators { hipcc: hipcc.clone(), amd, ..here })
        };
        assert_eq!(of(&[], Accelerators::default()), Variant::Cpu, "a compiler alone");
        assert_eq!(of(&["gfx1036", "gfx1100"], Accelerators::default()), Variant::Rocm);
        assert_eq!(of(&["gfx90a"], Accelerators::default()), Variant::Rocm);
        assert_eq!(of(&["gfx1036"], Accelerators::default()), Variant::Cpu, "a GPU it is not built for");
        assert_eq!(of(&["gfx1100"], machine(&[80, 86, 89, 90], &[80])), Variant::Cuda);
        assert_eq!(of(&["gfx1100"], machine(&[80, 86, 89, 90], &[75])), Variant::Rocm);
        let without = Accelerators { amd: vec!["gfx1100".to_owned()], ..Accelerators::default() };
        assert_eq!(best(&without), Variant::Cpu);
    }

    #[test]
    fn what_does_not_fit_says_why_and_what_to_do() {
        let of = |here: &Accelerators, targets: &str| here.fit(Variant::Cuda, &definitions(CUDA_TARGETS, targets));
        let (turing, old) = (machine(&[75, 80, 86, 89, 90], &[75]), machine(&[75, 80, 86], &[80]));
        let refused = of(&turing, TARGETS).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "it is built for the architectures 80-real;86-real;89-real;90, but this machine's GPU has 75"
        );
        assert!(refused.hint().unwrap().contains("list 75 in `CMAKE_CUDA_ARCHITECTURES`"));
        assert_eq!(
            of(&old, TARGETS).unwrap_err().to_string(),
            "the installed CUDA 11.5 does not compile for the architectures 89, 90"
        );
        // Told also where no GPU is: such a build cannot be made.
        assert!(matches!(of(&machine(&[80], &[]), "90"), Err(Unfit::Toolkit { .. })));
        assert_eq!(of(&machine(&[90], &[]), "90"), Err(Unfit::Absent));
        assert!(matches!(of(&machine(&[90, 100], &[100]), "90-real"), Err(Unfit::Gpu { .. })), "no PTX");
        assert_eq!(of(&machine(&[90, 100], &[100]), "90-virtual"), Ok(()));
        for unjudged in ["native", "all-major", "90a;80", ""] {
            assert_eq!(of(&turing, unjudged), Ok(()), "{unjudged}");
        }
    }

    #[test]
    fn hidden_devices_are_not_there() {
        let env = |value: &str| Env::from([("CUDA_VISIBLE_DEVICES".into(), value.into())]);
        for (value, expected) in [("", true), ("-1", true), ("-1,0", true), ("0", false), ("1,0", false)] {
            assert_eq!(hidden(&env(value), "CUDA_VISIBLE_DEVICES"), expected, "{value}");
        }
        assert!(!hidden(&Env::new(), "CUDA_VISIBLE_DEVICES"));
        assert_eq!(gpus(&env("")), Ok(Vec::new()));
    }

    #[test]
    fn gpus_of_amd_are_read_from_the_driver() {
        let nodes = tempfile::tempdir().unwrap();
        for (node, version) in [("0", "0"), ("1", "90010"), ("2", "110000"), ("3", "100306")] {
            let text = format!("cpu_cores_count 0\ngfx_target_version {version}\nvendor_id 4098\n");
            fs::create_dir_all(&nodes.path().join(node)).unwrap();
            fs::write_atomic(&nodes.path().join(node).join("properties"), text.as_bytes()).unwrap();
        }
        assert_eq!(amd_gpus(&Env::new(), nodes.path()), ["gfx90a", "gfx1100", "gfx1036"]);
        assert_eq!(amd_gpus(&Env::new(), &nodes.path().join("none")), Vec::<String>::new());
        let env = Env::from([("HIP_VISIBLE_DEVICES".into(), "-1".into())]);
        assert_eq!(amd_gpus(&env, nodes.path()), Vec::<String>::new());
    }
}

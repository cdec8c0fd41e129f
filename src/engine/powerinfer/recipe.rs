//! How PowerInfer is built. Read against its `CMakeLists.txt` at commit d3ebd7c (llama.cpp of November 2023).

use std::collections::BTreeMap;

use crate::base::platform::{Platform, Variant};
use crate::build::{BuildRecipe, OutputRule, SourceEdit};
use crate::engine::EngineError;
use crate::engine::cmake::{self, BuildDescription, RecipeRequest};

use super::{ID, SERVER};

/// Metal is in the tree, but PowerInfer turns it off: it has no sparse operations for Metal.
pub(super) fn variants(platform: Platform) -> &'static [Variant] {
    match platform.os {
        "linux" => &[Variant::Cpu, Variant::Cuda, Variant::Rocm],
        "windows" => &[Variant::Cpu, Variant::Cuda],
        _ => &[Variant::Cpu],
    }
}

/// # Errors
/// When there is no such variant on this platform.
pub(super) fn recipe(ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
    cmake::recipe(ID, variants(ask.platform), ask, || BuildDescription {
        define: definitions(ask),
        require: accelerator(ask.variant),
        targets: &["main", "quantize"],
        server: SERVER,
        outputs,
        edits: edits(ask),
        evidence: evidence(ask.variant),
    })
}

/// The CMake option of an accelerator, and a variable that CMake sets only after it found the toolkit: without the toolkit PowerInfer warns,
/// leaves the option ON and builds for the CPU only.
fn accelerator(variant: Variant) -> &'static [&'static str] {
    match variant {
        Variant::Cuda => &["LLAMA_CUBLAS", "CMAKE_CUDA_FLAGS_RELEASE"],
        Variant::Rocm => &["LLAMA_HIPBLAS", "hipblas_DIR"],
        Variant::Cpu | Variant::Metal => &[],
    }
}

/// Symbols that its programs import from the vendor's library.
fn evidence(variant: Variant) -> Option<&'static str> {
    match variant {
        Variant::Cuda => Some("cublasCreate"),
        Variant::Rocm => Some("hipblasCreate"),
        Variant::Cpu | Variant::Metal => None,
    }
}

/// Every option by name: the default of a missing one would depend on the machine or on a later commit.
fn definitions(ask: &RecipeRequest<'_>) -> BTreeMap<String, String> {
    const ON: &str = "ON";
    const OFF: &str = "OFF";
    let chosen = |variant| if ask.variant == variant { ON } else { OFF };
    // x86 processor features, which CMakeLists.txt ignores on other processors: those of machines of the last ten years.
    let features = if ask.spec.native { OFF } else { ON };
    let mut define = vec![
        ("BUILD_SHARED_LIBS", OFF),
        ("LLAMA_STATIC", OFF),
        ("LLAMA_NATIVE", if ask.spec.native { ON } else { OFF }),
        ("LLAMA_LTO", OFF),
        ("LLAMA_AVX", features),
        ("LLAMA_AVX2", features),
        ("LLAMA_FMA", features),
        ("LLAMA_F16C", features),
        ("LLAMA_AVX512", OFF),
        ("LLAMA_AVX512_VBMI", OFF),
        ("LLAMA_AVX512_VNNI", OFF),
        ("LLAMA_ACCELERATE", if ask.platform.os == "macos" { ON } else { OFF }),
        ("LLAMA_BLAS", OFF),
        ("LLAMA_CLBLAST", OFF),
        ("LLAMA_MPI", OFF),
        ("LLAMA_METAL", OFF),
        ("LLAMA_QKK_64", OFF),
        ("LLAMA_CUBLAS", chosen(Variant::Cuda)),
        ("LLAMA_HIPBLAS", chosen(Variant::Rocm)),
        ("LLAMA_BUILD_TESTS", OFF),
        // `main` and `quantize` are examples there.
        ("LLAMA_BUILD_EXAMPLES", ON),
        ("LLAMA_BUILD_SERVER", ON),
    ];
    match ask.variant {
        // Without a list PowerInfer names some that today's CUDA no longer compiles. Ampere (A100; RTX 30), Ada, Hopper;
        // newer ones compile Hopper's PTX at their first start.
        Variant::Cuda => define.push(("CMAKE_CUDA_ARCHITECTURES", "80-real;86-real;89-real;90")),
        // Its HIP code is C++ to CMake, whose list for the language HIP has no say then: ROCm's own packages have one, under a
        // new name and an old one.
        Variant::Rocm => {
            const TARGETS: &str = "gfx90a;gfx942;gfx1030;gfx1100;gfx1101;gfx1102";
            define.extend([("GPU_TARGETS", TARGETS), ("AMDGPU_TARGETS", TARGETS)]);
        }
        Variant::Cpu | Variant::Metal => {}
    }
    define.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The build asks git for a number and a commit, and would find those of any repository around its folder.
fn edits(ask: &RecipeRequest<'_>) -> Vec<SourceEdit> {
    let commit = ask.commit.map_or_else(|| ask.tree.hex(), |commit| commit.to_string());
    let commit: String = commit.chars().take(9).collect();
    let Ok(path) = "common/build-info.cpp.in".parse() else { return Vec::new() };
    let edit =
        |find: &str, replace| SourceEdit { path: std::clone::Clone::clone(&path), find: find.to_owned(), replace };
    vec![edit("@BUILD_NUMBER@", "0".to_owned()), edit("@BUILD_COMMIT@", commit)]
}

/// Visual Studio has a folder for each build type.
fn outputs(targets: &[String], platform: Platform) -> Vec<OutputRule> {
    let suffix = if platform.os == "windows" { ".exe" } else { "" };
    let rule = |glob: String, required| Some(OutputRule { glob, to: "bin".parse().ok()?, required });
    let programs = targets.iter().filter_map(|target| rule(format!("{{bin,bin/*}}/{target}{suffix}"), true));
    // A manifest may set BUILD_SHARED_LIBS; the library is then beside `bin`.
    programs.chain(rule("{.,bin,bin/*}/*.{dll,dylib,so,so.*}".to_owned(), false)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::digest::Digest;
    use crate::format::manifest::EngineSpec;

    fn of(spec: &str, os: &'static str, variant: Variant) -> Result<BuildRecipe, EngineError> {
        let spec: EngineSpec =
            toml::from_str(&format!("source = {{ git = 'https://example.org/p' }}\n{spec}")).unwrap();
        let commit = Some("0123456789abcdef0123456789abcdef01234567".parse().unwrap());
        let tree = &Digest::of(b"tree");
        recipe(&RecipeRequest { spec: &spec, commit, tree, platform: Platform { os, arch: "x86_64" }, variant })
    }

    #[test]
    fn nothing_is_left_to_the_machine() {
        let cpu = of("", "linux", Variant::Cpu).unwrap();
        for (name, value) in [
            ("LLAMA_NATIVE", "OFF"),
            ("LLAMA_AVX2", "ON"),
            ("LLAMA_CUBLAS", "OFF"),
            ("LLAMA_BUILD_TESTS", "OFF"),
            ("LLAMA_BUILD_EXAMPLES", "ON"),
        ] {
            assert_eq!(cpu.define[name], value, "{name}");
        }
        assert_eq!(
            (cpu.targets.as_slice(), cpu.require.len()),
            (["main", "quantize", "server"].map(str::to_owned).as_slice(), 0)
        );
        let edits: Vec<_> = cpu.edits.iter().map(|edit| (edit.find.as_str(), edit.replace.as_str())).collect();
        assert_eq!(edits, [("@BUILD_NUMBER@", "0"), ("@BUILD_COMMIT@", "012345678")]);
        let native = of("native = true", "linux", Variant::Cpu).unwrap();
        assert_eq!((&*native.define["LLAMA_NATIVE"], &*native.define["LLAMA_AVX2"]), ("ON", "OFF"));
    }

    #[test]
    fn accelerators() {
        let cuda = of("[variant.cuda]\ndefine = { CMAKE_CUDA_ARCHITECTURES = '90' }", "linux", Variant::Cuda).unwrap();
        assert_eq!((&*cuda.define["LLAMA_CUBLAS"], &*cuda.define["CMAKE_CUDA_ARCHITECTURES"]), ("ON", "90"));
        assert!(cuda.require.iter().any(|name| name == "LLAMA_CUBLAS") && cuda.require.len() == 2);
        assert_eq!(cuda.evidence, ["cublasCreate"]);
        let rocm = of("", "linux", Variant::Rocm).unwrap().define;
        assert_eq!(rocm["LLAMA_HIPBLAS"], "ON");
        assert!(rocm["GPU_TARGETS"].contains("gfx1100") && rocm["AMDGPU_TARGETS"] == rocm["GPU_TARGETS"]);
        for (os, variant) in [("macos", Variant::Metal), ("macos", Variant::Cuda), ("windows", Variant::Rocm)] {
            assert!(matches!(of("", os, variant), Err(EngineError::NoVariant { .. })), "{os} {variant}");
        }
    }

    #[test]
    fn programs_are_found_wherever_a_generator_puts_them() {
        let outputs = of("targets = ['server']", "windows", Variant::Cpu).unwrap().outputs;
        let glob =
            globset::GlobBuilder::new(&outputs[0].glob).literal_separator(true).build().unwrap().compile_matcher();
        for path in ["bin/server.exe", "bin/Release/server.exe"] {
            assert!(glob.is_match(path), "{path}");
        }
        assert!(!glob.is_match("examples/server/server.exe"));
    }
}

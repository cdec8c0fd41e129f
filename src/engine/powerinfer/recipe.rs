//! How PowerInfer is built. Read against its `CMakeLists.txt` at commit d3ebd7c (llama.cpp of November 2023).

use std::collections::BTreeMap;

use crate::base::platform::{Platform, Variant};
use crate::build::{BuildRecipe, OutputRule, SourceEdit};
use crate::engine::{EngineError, RecipeRequest};
use crate::format::manifest::BuildType;

use super::{ID, SERVER};

/// Metal is in the tree, but PowerInfer turns it off: its sparse operations do not exist there.
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
    if !variants(ask.platform).contains(&ask.variant) {
        let platform = ask.platform.to_string();
        return Err(EngineError::NoVariant { engine: ID, variant: ask.variant, platform });
    }
    let spec = ask.spec;
    let own = spec.variant.get(&ask.variant);
    let mut define = definitions(ask);
    for (name, value) in spec.define.iter().chain(own.iter().flat_map(|own| &own.define)) {
        define.insert(name.clone(), value.to_cmake());
    }
    let mut require: Vec<String> = accelerator(ask.variant).into_iter().map(str::to_owned).collect();
    require.extend(spec.require.iter().chain(own.iter().flat_map(|own| &own.require)).cloned());
    let mut targets = spec.targets.clone();
    if targets.is_empty() {
        targets.extend(["main", "quantize"].map(str::to_owned));
    }
    targets.push(SERVER.to_owned());
    for list in [&mut require, &mut targets] {
        list.sort();
        list.dedup();
    }
    Ok(BuildRecipe {
        version: 1,
        define,
        outputs: outputs(&targets, ask.platform),
        targets,
        require,
        build_type: format!("{:?}", spec.build_type.unwrap_or(BuildType::Release)),
        edits: edits(ask),
        native: spec.native,
    })
}

/// The option that an accelerator is. When its toolkit is not found, PowerInfer warns, builds for the processor alone and
/// leaves the option ON: the compiler that the option asks for is what shows it.
fn accelerator(variant: Variant) -> Option<&'static str> {
    match variant {
        Variant::Cuda => Some("LLAMA_CUBLAS"),
        Variant::Rocm => Some("LLAMA_HIPBLAS"),
        Variant::Cpu | Variant::Metal => None,
    }
}

/// Every option by name: what is not said here would follow the machine, or a later commit.
fn definitions(ask: &RecipeRequest<'_>) -> BTreeMap<String, String> {
    const ON: &str = "ON";
    const OFF: &str = "OFF";
    let chosen = |variant| if ask.variant == variant { ON } else { OFF };
    // The Intel features; on other processors CMakeLists.txt does not look at them. Those of the machines of ten years.
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
        Variant::Rocm => define.push(("CMAKE_HIP_ARCHITECTURES", "gfx90a;gfx942;gfx1030;gfx1100;gfx1101;gfx1102")),
        Variant::Cpu | Variant::Metal => {}
    }
    define.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// The build asks git for a number and a commit, and finds those of any repository that its folder lies in.
fn edits(ask: &RecipeRequest<'_>) -> Vec<SourceEdit> {
    let commit: String = match (&ask.pin.commit, &ask.pin.tree) {
        (Some(commit), _) => commit.chars().take(9).collect(),
        (None, Some(tree)) => tree.hex().chars().take(9).collect(),
        (None, None) => "unknown".to_owned(),
    };
    let Ok(path) = "common/build-info.cpp.in".parse() else { return Vec::new() };
    let edit = |find: &str, replace| SourceEdit { path: std::clone::Clone::clone(&path), find: find.to_owned(), replace };
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

//! llama.cpp (<https://github.com/ggml-org/llama.cpp>): built from its own CMake tree, served by its own `llama-server`.
//!
//! Read against the tree in `llama-cpp-python` 0.3.36 (llama.cpp 0.5.0-dev, ggml 0.25.3): its `CMakeLists.txt`,
//! `ggml/CMakeLists.txt`, `tools/server/README.md` and the server's source.

mod check;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::Arc;

use serde_json::Value as Json;

use super::cmake::{self, BuildDescription, CmakeProject, RecipeRequest};
use super::control_tokens::ControlTokens;
use super::conversation::{Conversation, Format, Request, Sampling};
use super::finding::Finding;
use super::gguf::{self, Gguf, cache_bytes_per_token, chat_template};
use super::openai::{Dialect, OpenAi};
use super::{
    CheckRequest, Endpoint, Engine, EngineError, InstallMethod, Launch, LaunchRequest, Model, ModelError, ModelFiles,
    ModelSize,
};
use crate::base::platform::{Platform, Variant, executable};
use crate::build::{BuildRecipe, OutputRule};
use crate::format::gguf::Header;
use crate::format::manifest::SourceSpec;
use crate::format::policy::{Output, Policy};

/// The adapter.
#[derive(Debug)]
pub struct LlamaCpp;

const ID: &str = "llama-cpp";
const SERVER: &str = "llama-server";

/// Tokens of context when the policy does not say. Said to the engine every time, as everything else that a policy leaves
/// open, so that a new version cannot change it.
const CONTEXT: u32 = 4096;
/// Logical and physical batch, in tokens: llama.cpp's own defaults.
const BATCH: (u32, u32) = (2048, 512);

/// What llama-server knows beyond the API. Before the model is loaded it answers every request with 503.
const DIALECT: Dialect = Dialect { checks_key: true, sampling, extend };

impl Engine for LlamaCpp {
    fn id(&self) -> &'static str {
        ID
    }

    fn install_method(&self) -> InstallMethod<'_> {
        InstallMethod::Cmake(self)
    }

    fn open(&self, files: &ModelFiles<'_>) -> Result<Arc<dyn Model>, ModelError> {
        Ok(Arc::new(LlamaModel(Gguf::open(files)?)))
    }
}

impl CmakeProject for LlamaCpp {
    fn variants(&self, platform: Platform) -> &'static [Variant] {
        match platform.os {
            "linux" => &[Variant::Cpu, Variant::Cuda, Variant::Rocm],
            "windows" => &[Variant::Cpu, Variant::Cuda],
            "macos" => &[Variant::Cpu, Variant::Metal],
            _ => &[Variant::Cpu],
        }
    }

    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
        cmake::recipe(ID, self.variants(ask.platform), ask, || BuildDescription {
            define: definitions(ask),
            require: accelerator(ask.variant),
            targets: &[],
            server: SERVER,
            outputs,
            edits: Vec::new(),
            evidence: evidence(ask.variant),
        })
    }
}

/// A model for llama.cpp.
#[derive(Debug, Clone)]
pub struct LlamaModel(pub Gguf);

impl LlamaModel {
    /// Bytes of weights and context cache together: an estimate from headers.
    pub fn memory_bytes(&self, policy: &Policy) -> u64 {
        self.0.size_bytes().saturating_add(self.cache_bytes(policy))
    }

    fn cache_bytes(&self, policy: &Policy) -> u64 {
        let header = self.0.header();
        let tokens = u64::from(context_size(policy, header)) * u64::from(policy.runtime.parallel.unwrap_or(1));
        tokens.saturating_mul(cache_bytes_per_token(header))
    }
}

impl Model for LlamaModel {
    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
        check::all(self, ask)
    }

    fn size(&self, policy: &Policy, variant: Variant) -> Option<ModelSize> {
        let header = self.0.header();
        let whole = self.memory_bytes(policy);
        // As many layers as fit when the policy does not say; the output counts as one more layer.
        let layers = header.block_count().map_or(1, |blocks| blocks.saturating_add(1));
        let on_gpu = policy.runtime.gpu_layers.map_or(layers, u64::from).min(layers);
        let gpu_bytes = if variant == Variant::Cpu { 0 } else { whole / layers.max(1) * on_gpu };
        Some(ModelSize {
            weights_bytes: self.0.size_bytes(),
            ram_bytes: whole - gpu_bytes,
            gpu_bytes,
            context: context_size(policy, header),
            trained: header.context_length().and_then(|tokens| u32::try_from(tokens).ok()),
        })
    }

    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        Ok(launch(&self.0, ask))
    }

    fn connect(&self, policy: &Policy, endpoint: &Endpoint) -> Result<Arc<dyn Conversation>, EngineError> {
        let template = chat_template(policy, self.0.header());
        let conversation = OpenAi::new(endpoint, DIALECT, template.is_some());
        let Some(template) = template else { return Ok(Arc::new(conversation)) };
        // Templates name them `tools`, older ones `functions`.
        let has_tools = template.contains("tool") || template.contains("function");
        let conversation = if has_tools { conversation } else { conversation.without_tools() };
        let tokens = ControlTokens::new(self.0.header(), template)
            .map_err(|_| EngineError::Unsupported { engine: ID, what: "a vocabulary with this many special tokens" })?;
        Ok(Arc::new(conversation.without_control_tokens(tokens)))
    }
}

/// The option that an accelerator is, and that must be ON after configure.
fn accelerator(variant: Variant) -> &'static [&'static str] {
    match variant {
        Variant::Cpu => &[],
        Variant::Cuda => &["GGML_CUDA"],
        Variant::Rocm => &["GGML_HIP"],
        Variant::Metal => &["GGML_METAL"],
    }
}

/// A function of the backend that tells its name when it starts; HIP's is CUDA's, compiled for it.
fn evidence(variant: Variant) -> Option<&'static str> {
    match variant {
        Variant::Cpu => None,
        Variant::Cuda | Variant::Rocm => Some("ggml_cuda_init"),
        Variant::Metal => Some("ggml_metal_"),
    }
}

/// Every option whose default depends on the machine, the environment or the network, and every one that decides what is
/// in the result: nothing is left to chance.
fn definitions(ask: &RecipeRequest<'_>) -> BTreeMap<String, String> {
    const ON: &str = "ON";
    const OFF: &str = "OFF";
    let metal = if ask.variant == Variant::Metal { ON } else { OFF };
    let mut define = vec![
        // One program without libraries of its own beside it, which runs wherever it is put.
        ("BUILD_SHARED_LIBS", OFF),
        ("GGML_BACKEND_DL", OFF),
        ("GGML_BACKEND_DIR", ""),
        ("GGML_CPU_ALL_VARIANTS", OFF),
        // With GGML_NATIVE unset its default follows SOURCE_DATE_EPOCH, and the processor features follow it.
        ("GGML_NATIVE", if ask.spec.native { ON } else { OFF }),
        ("GGML_CCACHE", OFF),
        ("GGML_LTO", OFF),
        ("GGML_LLAMAFILE", ON),
        ("GGML_CPU_REPACK", ON),
        ("GGML_CPU_KLEIDIAI", OFF),
        ("GGML_RPC", OFF),
        ("GGML_VULKAN", OFF),
        ("GGML_CUDA", OFF),
        ("GGML_HIP", OFF),
        ("GGML_METAL", metal),
        ("GGML_METAL_EMBED_LIBRARY", metal),
        ("GGML_BLAS", OFF),
        // ggml's own threads are as fast, and the program then needs no OpenMP library where it runs.
        ("GGML_OPENMP", OFF),
        // Without these the user interface of the day is fetched while building.
        ("LLAMA_BUILD_UI", OFF),
        ("LLAMA_USE_PREBUILT_UI", OFF),
        ("LLAMA_OPENSSL", OFF),
        ("LLAMA_SUBPROCESS", OFF),
        ("LLAMA_LLGUIDANCE", OFF),
        ("LLAMA_BUILD_COMMON", ON),
        ("LLAMA_BUILD_TOOLS", ON),
        ("LLAMA_BUILD_SERVER", ON),
        ("LLAMA_BUILD_APP", OFF),
        ("LLAMA_BUILD_TESTS", OFF),
        ("LLAMA_BUILD_EXAMPLES", OFF),
        // What the build would ask git for. Off is a program that is not there.
        ("GIT_EXE", OFF),
        ("GIT_EXECUTABLE", OFF),
        ("LLAMA_BUILD_NUMBER", "0"),
    ];
    define.extend(processor(ask));
    define.extend(accelerated(ask.variant));
    let mut define: BTreeMap<_, _> =
        define.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    define.insert("LLAMA_BUILD_COMMIT".to_owned(), commit(ask));
    define
}

/// Processor features by name: those of the machines of the last ten years.
fn processor(ask: &RecipeRequest<'_>) -> Vec<(&'static str, &'static str)> {
    if ask.spec.native {
        return Vec::new();
    }
    match (ask.platform.arch, ask.platform.os) {
        ("x86_64", _) => {
            let on = ["GGML_SSE42", "GGML_AVX", "GGML_AVX2", "GGML_BMI2", "GGML_FMA", "GGML_F16C"];
            let off = ["GGML_AVX_VNNI", "GGML_AVX512", "GGML_AVX512_VBMI", "GGML_AVX512_VNNI", "GGML_AVX512_BF16"];
            on.map(|name| (name, "ON")).into_iter().chain(off.map(|name| (name, "OFF"))).collect()
        }
        // Apple's compiler begins at M1.
        ("aarch64", "macos") => vec![("GGML_CPU_ARM_ARCH", "")],
        ("aarch64", _) => vec![("GGML_CPU_ARM_ARCH", "armv8.2-a+dotprod+fp16")],
        _ => Vec::new(),
    }
}

fn accelerated(variant: Variant) -> Vec<(&'static str, &'static str)> {
    match variant {
        Variant::Cpu => Vec::new(),
        Variant::Cuda => vec![
            ("GGML_CUDA", "ON"),
            ("GGML_CUDA_FA", "ON"),
            ("GGML_CUDA_GRAPHS", "ON"),
            // Found or not found by chance otherwise.
            ("GGML_CUDA_NCCL", "OFF"),
            // Turing, Ampere (A100; RTX 30), Ada and Hopper; newer ones compile Hopper's PTX at their first start.
            ("CMAKE_CUDA_ARCHITECTURES", "75-real;80-real;86-real;89-real;90"),
        ],
        Variant::Rocm => vec![
            ("GGML_HIP", "ON"),
            ("GGML_HIP_GRAPHS", "ON"),
            ("GGML_HIP_RCCL", "OFF"),
            ("CMAKE_HIP_ARCHITECTURES", "gfx90a;gfx942;gfx1030;gfx1100;gfx1101;gfx1102;gfx1200;gfx1201"),
        ],
        Variant::Metal => vec![("GGML_METAL_NDEBUG", "OFF")],
    }
}

/// What the program calls its version: the commit, else the package's version, else the tree.
fn commit(ask: &RecipeRequest<'_>) -> String {
    match (ask.commit, &ask.spec.source) {
        (Some(commit), _) => commit.to_string().chars().take(9).collect(),
        (None, SourceSpec::Pypi(package)) => package.version.clone(),
        (None, _) => ask.tree.short(),
    }
}

fn outputs(targets: &[String], platform: Platform) -> Vec<OutputRule> {
    let suffix = if platform.os == "windows" { ".exe" } else { "" };
    let rule = |glob: String, required| Some(OutputRule { glob, to: "bin".parse().ok()?, required });
    let programs = targets.iter().filter_map(|target| rule(format!("bin/{target}{suffix}"), true));
    // A manifest may set BUILD_SHARED_LIBS.
    programs.chain(rule("bin/*.{dll,dylib,so,so.*}".to_owned(), false)).collect()
}

/// Tokens of context for one request.
fn context_size(policy: &Policy, header: &Header) -> u32 {
    gguf::context_size(policy, header, CONTEXT)
}

/// `llama-server` and its options: `tools/server/README.md` of its tree. What every tree of the last years has is said on the
/// command line; the rest by the options' own variables, which trees that do not know them pass over.
fn launch(model: &Gguf, ask: &LaunchRequest<'_>) -> Launch {
    let runtime = &ask.policy.runtime;
    let threads = runtime.threads.unwrap_or(ask.cores).max(1);
    let parallel = runtime.parallel.unwrap_or(1);
    let (batch, micro_batch) = runtime.batch_size.map_or(BATCH, |size| (size, size));
    // `-c` is shared out among the slots, each then holding `context_size` tokens (rounded up to 256 by the server).
    let context = u64::from(context_size(ask.policy, model.header())) * u64::from(parallel);
    let numbers = [
        ("--port", u64::from(ask.endpoint.port)),
        ("--threads", u64::from(threads)),
        ("--threads-batch", u64::from(threads)),
        ("--ctx-size", context),
        ("--parallel", u64::from(parallel)),
        ("--batch-size", u64::from(batch)),
        ("--ubatch-size", u64::from(micro_batch)),
    ];
    let mut args: Vec<OsString> =
        vec!["--model".into(), model.weights.as_path().into(), "--host".into(), "127.0.0.1".into()];
    for (name, number) in numbers {
        args.extend([name.into(), number.to_string().into()]);
    }
    args.extend(["--jinja", "--metrics", "--no-slots"].map(OsString::from));
    let fit = match (ask.variant, runtime.gpu_layers) {
        (Variant::Cpu, _) => None,
        (_, Some(layers)) => Some((layers.to_string(), "off")),
        // As many as fit; nothing else is left open for it to change.
        (_, None) => Some(("auto".to_owned(), "on")),
    };
    if let Some((layers, _)) = &fit {
        args.extend(["--gpu-layers".into(), layers.into()]);
    }
    let mut files = BTreeMap::new();
    if let Some(template) = ask.policy.generation.chat_template.as_deref().filter(|template| *template != "none") {
        let path = ask.scratch.join("chat-template.jinja");
        args.extend(["--chat-template-file".into(), path.clone().into()]);
        files.insert(path, template.to_owned());
    }
    let mut env: BTreeMap<OsString, OsString> =
        OPTIONS.iter().map(|(name, value)| (name.into(), value.into())).collect();
    match runtime.output {
        None | Some(Output::Text) => {}
        Some(Output::Embeddings) => {
            env.insert("LLAMA_ARG_EMBEDDINGS".into(), "on".into());
            // A model that says nothing, or 0, gives a vector for each token, which `/v1/embeddings` has no form for.
            if model.header().architecture_uint("pooling_type").unwrap_or(0) == 0 {
                env.insert("LLAMA_ARG_POOLING".into(), "mean".into());
            }
        }
        Some(Output::Ranking) => drop(env.insert("LLAMA_ARG_RERANKING".into(), "on".into())),
    }
    env.insert("LLAMA_ARG_FIT".into(), fit.map_or("off", |(_, fit)| fit).into());
    // The name that answers give their model.
    env.insert("LLAMA_ARG_ALIAS".into(), ask.name.into());
    env.insert("LLAMA_API_KEY".into(), (&ask.endpoint.key).into());
    let program = ask.artifact.join("bin").join(executable(SERVER));
    Launch { program, args, env, cwd: ask.scratch.to_owned(), files }
}

/// Options that are the same for every policy.
const OPTIONS: &[(&str, &str)] = &[
    ("LLAMA_ARG_OFFLINE", "on"),
    ("LLAMA_ARG_UI", "off"),
    ("LLAMA_ARG_CORS_ORIGINS", "localhost"),
    ("LLAMA_ARG_CORS_CREDENTIALS", "off"),
    // Each slot has its own share of the cache, and an answer that fills it ends there.
    ("LLAMA_ARG_KV_UNIFIED", "off"),
    ("LLAMA_ARG_CONTEXT_SHIFT", "off"),
    // MiB of prompts kept beside those in the slots: a conversation may come back after another one (8192 by default).
    ("LLAMA_ARG_CACHE_RAM", "1024"),
    ("LLAMA_ARG_LOG_COLORS", "off"),
];

/// Fields for sampling that only llama-server has: `tools/server/README.md` of its tree.
fn sampling(sampling: &Sampling, body: &mut Json) {
    body["top_k"] = sampling.top_k.into();
    body["min_p"] = sampling.min_p.into();
    body["repeat_penalty"] = sampling.repeat_penalty.into();
}

fn extend(request: &Request, body: &mut Json) {
    body["timings_per_token"] = true.into();
    body["cache_prompt"] = true.into();
    if let Format::Grammar(grammar) = &request.format {
        body["grammar"] = grammar.as_str().into();
    }
}

#[cfg(test)]
mod tests;

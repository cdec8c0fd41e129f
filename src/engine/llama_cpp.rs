//! llama.cpp (<https://github.com/ggml-org/llama.cpp>): built from its own CMake tree, served by its own `llama-server`.
//!
//! Read against the tree in `llama-cpp-python` 0.3.36 (llama.cpp 0.5.0-dev, ggml 0.25.3): its `CMakeLists.txt`,
//! `ggml/CMakeLists.txt`, `tools/server/README.md` and the server's source.

mod check;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::time::Duration;

use serde_json::{Value as Json, json};

use super::answer::{Answer, Sink};
use super::cmake;
use super::http::{self, HttpError, Patience, Request, Response};
use super::stream::Events;
use super::{
    CheckRequest, Endpoint, Engine, EngineError, Finding, Finish, GenerateRequest, Generated, Launch, LaunchRequest,
    Piece, RecipeRequest,
};
use crate::base::platform::{Platform, Variant, executable};
use crate::build::{BuildRecipe, OutputRule};
use crate::format::gguf::Header;
use crate::format::manifest::SourceSpec;
use crate::format::policy::Policy;

#[derive(Debug)]
pub struct LlamaCpp;

const ID: &str = "llama-cpp";
const SERVER: &str = "llama-server";

/// What a policy leaves open. llama.cpp's own defaults but for the first two (its own are "no limit" and "as much as the
/// model was trained on"), said to the engine every time, so that a new version cannot change them quietly.
mod default {
    pub const MAX_TOKENS: u32 = 512;
    /// At most, and never more than the model was trained on.
    pub const CONTEXT: u32 = 4096;
    pub const TEMPERATURE: f64 = 0.8;
    pub const TOP_K: u32 = 40;
    pub const TOP_P: f64 = 0.95;
    pub const MIN_P: f64 = 0.05;
    pub const REPEAT_PENALTY: f64 = 1.0;
    pub const PRESENCE_PENALTY: f64 = 0.0;
    pub const FREQUENCY_PENALTY: f64 = 0.0;
    /// Logical and physical batch, in tokens.
    pub const BATCH: (u32, u32) = (2048, 512);
}

impl Engine for LlamaCpp {
    fn id(&self) -> &'static str {
        ID
    }

    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
        cmake::recipe(ID, self.variants(ask.platform), ask, || cmake::Project {
            define: definitions(ask),
            require: accelerator(ask.variant),
            targets: &[],
            server: SERVER,
            outputs,
            edits: Vec::new(),
            evidence: evidence(ask.variant),
        })
    }

    fn variants(&self, platform: Platform) -> &'static [Variant] {
        match platform.os {
            "linux" => &[Variant::Cpu, Variant::Cuda, Variant::Rocm],
            "windows" => &[Variant::Cpu, Variant::Cuda],
            "macos" => &[Variant::Cpu, Variant::Metal],
            _ => &[Variant::Cpu],
        }
    }

    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
        check::all(ask)
    }

    fn memory_bytes(&self, policy: &Policy, header: &Header, sizes: &[u64]) -> u64 {
        let tokens = u64::from(context_size(policy, header)) * u64::from(policy.runtime.parallel.unwrap_or(1));
        sizes.iter().sum::<u64>().saturating_add(tokens.saturating_mul(cache_bytes_per_token(header)))
    }

    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        Ok(launch(ask))
    }

    /// Before the model is loaded every request gets 503; after that, one without the key gets 401 (both answered by
    /// the server's middleware, state first). A server that knows our key and refuses others is ours.
    fn ready(&self, endpoint: &Endpoint, patience: Patience<'_>) -> Result<bool, EngineError> {
        let status = |key| -> Result<Option<u16>, EngineError> {
            let request = Request { path: "/v1/models", key, json: None };
            match http::send(endpoint.port, request, patience.at_most(Duration::from_secs(2))) {
                Ok(response) => Ok(Some(response.status)),
                Err(HttpError::Cancelled(cancelled)) => Err(cancelled.into()),
                Err(HttpError::Malformed(_) | HttpError::TooLarge(_)) => Err(EngineError::Foreign(endpoint.port)),
                // Not there yet, busy, or on its way out: the supervisor sees which.
                Err(_) => Ok(None),
            }
        };
        match status(Some(&endpoint.key))? {
            None | Some(503) => Ok(false),
            Some(200) => match status(None)? {
                None => Ok(false),
                Some(401) => Ok(true),
                Some(_) => Err(EngineError::Foreign(endpoint.port)),
            },
            Some(_) => Err(EngineError::Foreign(endpoint.port)),
        }
    }

    fn generate(
        &self,
        endpoint: &Endpoint,
        ask: &GenerateRequest<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<Generated, EngineError> {
        let (path, body) = request(ask);
        let body = body.to_string();
        let mut stream = Stream::default();
        let request = Request { path, key: Some(&endpoint.key), json: Some(&body) };
        let patience = Patience { cancel: ask.cancel, deadline: ask.deadline };
        let received = match http::send(endpoint.port, request, patience) {
            Ok(response) if response.status == 200 => stream.receive(response, sink),
            Ok(response) => Err(refusal(response)),
            Err(error) => Err(error.into()),
        };
        match received {
            Err(EngineError::Cancelled(_)) => stream.finish = Some(Finish::Cancelled),
            other => other?,
        }
        stream.generated()
    }

    fn version_args(&self) -> &'static [&'static str] {
        &["--version"]
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
    let trained = header.context_length().and_then(|tokens| u32::try_from(tokens).ok());
    policy.runtime.context_size.unwrap_or_else(|| trained.unwrap_or(u32::MAX).min(default::CONTEXT))
}

/// Bytes of key and value cache that one token takes, in 16 bits; 0 when the header does not say.
fn cache_bytes_per_token(header: &Header) -> u64 {
    let of = |key| header.architecture_uint(key);
    let Some(layers) = of("block_count") else { return 0 };
    let Some(heads) = of("attention.head_count_kv").or_else(|| of("attention.head_count")) else { return 0 };
    let width = || Some(of("embedding_length")? / of("attention.head_count")?.max(1));
    let key = of("attention.key_length").or_else(width).unwrap_or(0);
    let value = of("attention.value_length").or_else(width).unwrap_or(0);
    [heads, key.saturating_add(value), 2].into_iter().fold(layers, u64::saturating_mul)
}

/// The Jinja template that requests go through: the policy's, else the model's. None when prompts are sent as they are.
fn chat_template<'a>(policy: &'a Policy, header: &'a Header) -> Option<&'a str> {
    match policy.generation.chat_template.as_deref() {
        Some("none") => None,
        Some(template) => Some(template),
        None => header.chat_template(),
    }
}

/// `llama-server` and its options: `tools/server/README.md` of its tree. What every tree of the last years has is said on the
/// command line; the rest by the options' own variables, which trees that do not know them pass over.
fn launch(ask: &LaunchRequest<'_>) -> Launch {
    let runtime = &ask.policy.runtime;
    let threads = runtime.threads.unwrap_or(ask.cores).max(1);
    let parallel = runtime.parallel.unwrap_or(1);
    let (batch, micro_batch) = runtime.batch_size.map_or(default::BATCH, |size| (size, size));
    // `-c` is shared out among the slots, each then holding `context_size` tokens (rounded up to 256 by the server).
    let context = u64::from(context_size(ask.policy, ask.header)) * u64::from(parallel);
    let numbers = [
        ("--port", u64::from(ask.port)),
        ("--threads", u64::from(threads)),
        ("--threads-batch", u64::from(threads)),
        ("--ctx-size", context),
        ("--parallel", u64::from(parallel)),
        ("--batch-size", u64::from(batch)),
        ("--ubatch-size", u64::from(micro_batch)),
    ];
    let mut args: Vec<OsString> = vec!["--model".into(), ask.weights.into(), "--host".into(), "127.0.0.1".into()];
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
    env.insert("LLAMA_ARG_FIT".into(), fit.map_or("off", |(_, fit)| fit).into());
    env.insert("LLAMA_API_KEY".into(), ask.key.into());
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

/// Path and body of a request: through the chat template, or as plain text when there is none.
fn request(ask: &GenerateRequest<'_>) -> (&'static str, Json) {
    let generation = &ask.policy.generation;
    let mut body = json!({
        "stream": true,
        "stream_options": { "include_usage": true },
        "timings_per_token": true,
        "cache_prompt": true,
        "max_tokens": generation.max_tokens.unwrap_or(default::MAX_TOKENS),
        "temperature": generation.temperature.unwrap_or(default::TEMPERATURE),
        "top_k": generation.top_k.unwrap_or(default::TOP_K),
        "top_p": generation.top_p.unwrap_or(default::TOP_P),
        "min_p": generation.min_p.unwrap_or(default::MIN_P),
        "repeat_penalty": generation.repeat_penalty.unwrap_or(default::REPEAT_PENALTY),
        "presence_penalty": generation.presence_penalty.unwrap_or(default::PRESENCE_PENALTY),
        "frequency_penalty": generation.frequency_penalty.unwrap_or(default::FREQUENCY_PENALTY),
        "seed": ask.seed,
        "stop": generation.stop,
    });
    if chat_template(ask.policy, ask.header).is_none() {
        body["prompt"] = ask.prompt.into();
        return ("/v1/completions", body);
    }
    let system = generation.system_prompt.as_ref().map(|text| json!({ "role": "system", "content": text }));
    let user = json!({ "role": "user", "content": ask.prompt });
    body["messages"] = system.into_iter().chain([user]).collect();
    ("/v1/chat/completions", body)
}

/// The error object of an answer that is not 200.
fn refusal(response: Response<'_>) -> EngineError {
    const LIMIT_BYTES: usize = 64 * 1024;
    let status = response.status;
    match response.text(LIMIT_BYTES) {
        Err(error) => error.into(),
        Ok(text) => match serde_json::from_str::<Json>(&text) {
            Ok(body) if body["error"].is_object() => error_object(&body["error"]),
            _ => EngineError::Refused(format!("status {status}: {}", text.chars().take(500).collect::<String>())),
        },
    }
}

fn error_object(error: &Json) -> EngineError {
    if let (Some(prompt_tokens), Some(context_size)) = (error["n_prompt_tokens"].as_u64(), error["n_ctx"].as_u64()) {
        return EngineError::TooLong { prompt_tokens, context_size };
    }
    EngineError::Refused(error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned))
}

/// What the server has said so far.
#[derive(Default)]
struct Stream {
    answer: Answer,
    /// Tokens of the first piece, which the clock between first and last does not see.
    first_tokens: u64,
    finish: Option<Finish>,
    usage: Json,
    timings: Json,
}

impl Stream {
    /// Reads to the end of the stream, or until the sink has had enough.
    fn receive(&mut self, mut response: Response<'_>, sink: &mut Sink<'_>) -> Result<(), EngineError> {
        let (mut events, mut part) = (Events::default(), [0; 8192]);
        loop {
            let count = response.read(&mut part)?;
            let whole = events.push(&part[..count]).map_err(|error| EngineError::Unanswered(error.to_string()))?;
            for data in &whole {
                if data == "[DONE]" {
                    return Ok(());
                }
                if !self.take(data, sink)? {
                    self.finish = Some(Finish::Cancelled);
                    return Ok(());
                }
            }
            if count == 0 {
                return Ok(());
            }
        }
    }

    /// One event; false when the sink has had enough.
    fn take(&mut self, data: &str, sink: &mut Sink<'_>) -> Result<bool, EngineError> {
        let mut event: Json = serde_json::from_str(data).map_err(|error| {
            let shown: String = data.chars().take(200).collect();
            EngineError::Unanswered(format!("an event is not JSON ({error}): `{shown}`"))
        })?;
        if let Some(error) = event.get("error") {
            return Err(error_object(error));
        }
        for (field, kept) in [("usage", &mut self.usage), ("timings", &mut self.timings)] {
            if let Some(object) = event.get_mut(field).filter(|object| object.is_object()) {
                *kept = object.take();
            }
        }
        let choice = &event["choices"][0];
        let delta = &choice["delta"];
        let text = delta["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
        let thought = delta["reasoning_content"].as_str().unwrap_or_default();
        let begun = self.answer.has_begun();
        let more = self.answer.push(Piece::Thought(thought), sink)? && self.answer.push(Piece::Text(text), sink)?;
        if !begun && self.answer.has_begun() {
            self.first_tokens = self.timings["predicted_n"].as_u64().unwrap_or(1);
        }
        if let Some(reason) = choice["finish_reason"].as_str() {
            self.finish = Some(if reason == "length" { Finish::Length } else { Finish::Stop });
            self.answer.ended();
        }
        Ok(more)
    }

    /// What became of it. An answer whose end was never said is none.
    fn generated(self) -> Result<Generated, EngineError> {
        let Some(finish) = self.finish else {
            return Err(EngineError::Unanswered("the stream ended in the middle of the answer".to_owned()));
        };
        let (usage, timings) = (&self.usage, &self.timings);
        let count = |field: &str| usage[field].as_u64();
        let time = |field: &str| timings[field].as_f64().filter(|ms| *ms >= 0.0);
        let evaluated = || Some(timings["prompt_n"].as_u64()? + timings["cache_n"].as_u64().unwrap_or(0));
        let completion_tokens = count("completion_tokens").or_else(|| timings["predicted_n"].as_u64());
        if finish != Finish::Cancelled && completion_tokens.is_none() {
            return Err(EngineError::Unanswered("the stream ended without a count of its tokens".to_owned()));
        }
        Ok(Generated {
            finish,
            prompt_tokens: count("prompt_tokens").or_else(evaluated).unwrap_or(0),
            completion_tokens: completion_tokens.unwrap_or(0),
            first_tokens: self.first_tokens,
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_u64(),
            prompt_ms: time("prompt_ms"),
            decode_ms: time("predicted_ms"),
            first_token_ms: self.answer.first_token_ms(),
            streaming_ms: self.answer.streaming_ms(),
            text: self.answer.text,
            thought: self.answer.thought,
        })
    }
}

#[cfg(test)]
mod tests;

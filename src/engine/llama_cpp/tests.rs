//! Tables: recipe, checks, launch, requests.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;

use super::*;
use crate::base::digest::Digest;
use crate::engine::cmake::RecipeRequest;
use crate::format::gguf::{Magic, Tensor, Value};
use crate::format::manifest::EngineSpec;

/// A small valid model.
pub(super) fn header() -> Header {
    let text = |text: &str| Value::Text(text.to_owned());
    let metadata = [
        ("general.architecture", text("llama")),
        ("general.name", text("Tiny Instruct")),
        ("tokenizer.chat_template", text("{{ messages }}")),
        ("llama.context_length", Value::Uint(2048)),
        ("llama.block_count", Value::Uint(30)),
        ("llama.embedding_length", Value::Uint(576)),
        ("llama.attention.head_count", Value::Uint(9)),
        ("llama.attention.head_count_kv", Value::Uint(3)),
    ];
    let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let tensor = Tensor { name: "output.weight".to_owned(), shape: vec![8, 8], kind: 0, offset: 0, size_bytes: 256 };
    Header {
        magic: Magic::Gguf,
        version: 3,
        metadata,
        tensors: vec![tensor],
        special_tokens: BTreeMap::new(),
        markers: BTreeMap::new(),
        data_offset: 1024,
    }
}

/// A model of such parts, of 2,000 bytes each.
pub(super) fn model(headers: Vec<Header>) -> LlamaModel {
    let sizes = vec![2000; headers.len()];
    LlamaModel(Gguf { weights: PathBuf::from("/w/é.gguf"), headers, sizes, beside: Vec::new() })
}

pub(super) fn policy(text: &str) -> Policy {
    let text = format!("engine: llama-cpp\nmodel: m\n{text}\n");
    crate::format::policy::parse("p.yaml", text.as_bytes()).unwrap().0.value
}

fn recipe(spec: &str, os: &'static str, arch: &'static str, variant: Variant) -> Result<BuildRecipe, EngineError> {
    let spec: EngineSpec = toml::from_str(spec).unwrap();
    let commit = Some("0123456789abcdef0123456789abcdef01234567".parse().unwrap());
    let (tree, platform) = (&Digest::of(b"tree"), Platform { os, arch });
    LlamaCpp.recipe(&RecipeRequest { spec: &spec, commit, tree, platform, variant })
}

const SOURCE: &str = "source = { git = 'https://example.org/llama.cpp' }\n";

#[test]
fn recipes_name_everything() {
    let cpu = recipe(SOURCE, "linux", "x86_64", Variant::Cpu).unwrap();
    for (name, value) in [("GGML_AVX2", "ON"), ("GGML_NATIVE", "OFF"), ("LLAMA_BUILD_COMMIT", "012345678")] {
        assert_eq!(cpu.define[name], value, "{name}");
    }
    assert_eq!((cpu.targets, cpu.require), (vec!["llama-server".to_owned()], vec![]));
    assert_eq!(cpu.outputs[0].glob, "bin/llama-server");
    let cuda = recipe(SOURCE, "linux", "x86_64", Variant::Cuda).unwrap();
    assert_eq!((&*cuda.define["GGML_CUDA"], cuda.require), ("ON", vec!["GGML_CUDA".to_owned()]));
    let metal = recipe(SOURCE, "macos", "aarch64", Variant::Metal).unwrap();
    assert_eq!(metal.define["GGML_METAL_EMBED_LIBRARY"], "ON");
    assert!(!metal.define.contains_key("GGML_AVX2"));
    let native = recipe(&format!("{SOURCE}native = true"), "linux", "x86_64", Variant::Cpu).unwrap();
    assert!(native.native && native.define["GGML_NATIVE"] == "ON" && !native.define.contains_key("GGML_AVX2"));
}

#[test]
fn the_manifest_has_the_last_word() {
    let spec = format!(
        "{SOURCE}targets = ['llama-quantize']\nbuild_type = 'MinSizeRel'\nrequire = ['X']\ndefine = {{ GGML_AVX512 = true, A = 1 }}\n\
         [variant.cuda]\ndefine = {{ CMAKE_CUDA_ARCHITECTURES = '90', A = 2 }}\nrequire = ['GGML_CUDA_FA']"
    );
    let cuda = recipe(&spec, "linux", "x86_64", Variant::Cuda).unwrap();
    assert_eq!(["A", "GGML_AVX512", "CMAKE_CUDA_ARCHITECTURES"].map(|name| &*cuda.define[name]), ["2", "ON", "90"]);
    assert_eq!(cuda.targets, ["llama-quantize", "llama-server"]);
    assert_eq!(cuda.require, ["GGML_CUDA", "GGML_CUDA_FA", "X"]);
    assert_eq!(cuda.build_type, "MinSizeRel");
    assert_eq!(recipe(&spec, "linux", "x86_64", Variant::Cpu).unwrap().define["A"], "1");
}

#[test]
fn variants_that_a_platform_lacks() {
    for (os, variant) in [("linux", Variant::Metal), ("windows", Variant::Rocm), ("macos", Variant::Cuda)] {
        assert!(matches!(recipe(SOURCE, os, "x86_64", variant), Err(EngineError::NoVariant { .. })), "{os}");
    }
}

fn launched(policy_text: &str, variant: Variant) -> (Launch, String) {
    let ask = LaunchRequest {
        name: "p",
        policy: &policy(policy_text),
        variant,
        artifact: Path::new("/a b"),
        endpoint: &Endpoint { port: 4321, key: "sekret".to_owned() },
        scratch: Path::new("/s"),
        cores: 6,
    };
    let launch = model(vec![header()]).launch(&ask).unwrap();
    let line = launch.args.iter().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ");
    (launch, format!("{line} "))
}

#[test]
fn launches_say_what_the_policy_says() {
    let (launch, line) = launched("", Variant::Cpu);
    assert!(launch.program.ends_with(executable(SERVER)) && launch.cwd == Path::new("/s"));
    assert!(!line.contains("sekret"), "the key is on the command line: {line}");
    assert_eq!(launch.env[&OsString::from("LLAMA_API_KEY")], "sekret");
    let table = [
        (
            "",
            Variant::Cpu,
            "--model /w/é.gguf --host 127.0.0.1 --port 4321 --threads 6 --threads-batch 6 --ctx-size 2048 --parallel 1 --batch-size 2048 --ubatch-size 512 ",
        ),
        ("runtime: {threads: 3}", Variant::Cpu, "--threads 3 --threads-batch 3 "),
        ("runtime: {context_size: 1024, parallel: 4}", Variant::Cpu, "--ctx-size 4096 --parallel 4 "),
        ("runtime: {batch_size: 64}", Variant::Cpu, "--batch-size 64 --ubatch-size 64 "),
        ("runtime: {gpu_layers: 12}", Variant::Cuda, "--gpu-layers 12 "),
        ("runtime: {gpu_layers: 0}", Variant::Cuda, "--gpu-layers 0 "),
        ("", Variant::Metal, "--gpu-layers auto "),
    ];
    for (text, variant, expected) in table {
        let (_, line) = launched(text, variant);
        assert!(line.contains(expected), "{text}: `{expected}` is not in `{line}`");
    }
    assert!(!launched("runtime: {gpu_layers: 9}", Variant::Cpu).1.contains("gpu-layers"));
    let fit = |text, variant| launched(text, variant).0.env[&OsString::from("LLAMA_ARG_FIT")].clone();
    assert_eq!([fit("", Variant::Cuda), fit("runtime: {gpu_layers: 1}", Variant::Cuda)], ["on", "off"]);
    assert_eq!(fit("", Variant::Cpu), "off");
}

#[test]
fn embeddings_are_one_vector_for_a_text() {
    let set = |launch: Launch| {
        ["LLAMA_ARG_EMBEDDINGS", "LLAMA_ARG_POOLING", "LLAMA_ARG_RERANKING"]
            .map(|name| launch.env.get(&OsString::from(name)).map(|value| value.to_str().unwrap().to_owned()))
    };
    let on = |value: &str| Some(value.to_owned());
    assert_eq!(set(launched("", Variant::Cpu).0), [None, None, None]);
    assert_eq!(set(launched("runtime: {output: embeddings}", Variant::Cpu).0), [on("on"), on("mean"), None]);
    assert_eq!(set(launched("runtime: {output: ranking}", Variant::Cpu).0), [None, None, on("on")]);
}

#[test]
fn templates_travel_as_files() {
    let (launch, line) = launched("generation: {chat_template: '{{ x }}'}", Variant::Cpu);
    assert!(line.contains("--chat-template-file"));
    assert_eq!(launch.files.into_values().collect::<Vec<_>>(), ["{{ x }}"]);
    assert!(launched("generation: {chat_template: none}", Variant::Cpu).0.files.is_empty());
}

fn requested(policy_text: &str) -> (&'static str, Json) {
    let policy = policy(policy_text);
    let endpoint = Endpoint { port: 1, key: String::new() };
    let chat = chat_template(&policy, &header()).is_some();
    OpenAi::new(&endpoint, DIALECT, chat).body(&Request::new(&policy, "P", 7, Instant::now())).unwrap()
}

#[test]
fn requests_carry_the_whole_sampler() {
    let (path, body) = requested("generation: {system_prompt: S, top_k: 5, stop: [x]}");
    assert_eq!(path, "/v1/chat/completions");
    assert_eq!(body["messages"], json!([{"role": "system", "content": "S"}, {"role": "user", "content": "P"}]));
    let got = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "stop"];
    assert_eq!(json!(got.map(|field| &body[field])), json!([512, 0.8, 5, 0.95, 0.05, 1.0, 7, ["x"]]));
    let (path, body) = requested("generation: {chat_template: none}");
    assert_eq!((path, &body["prompt"], body.get("messages")), ("/v1/completions", &json!("P"), None));
}

#[test]
fn the_cache_of_a_token() {
    // SmolLM2-135M: 30 layers, 3 heads, 64 wide, keys and values, two bytes each.
    assert_eq!(cache_bytes_per_token(&header()), 30 * 3 * 128 * 2);
    assert_eq!(model(vec![header()]).memory_bytes(&policy("runtime: {parallel: 2}")), 2000 + 4096 * 23_040);
}

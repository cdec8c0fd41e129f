//! Policies that are read, and every problem of those that are not, with its place and words.

use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::base::digest::Digest;
use crate::format::policy::{Policy, parse, resolve};
use crate::format::{Parsed, manifest};

/// The policies that the project started from must be read as they stand.
const BAMBOO: &str = r#"# PowerInfer Model Policy: Bamboo-7B DPO
engine: powerinfer
model_path: models/powerinfer/bamboo-7b-dpo/model.powerinfer.gguf

generation:
  max_tokens: 512
  temperature: 0.7
  top_p: 0.9
  top_k: 40

runtime:
  threads: 8
  gpu_layers: 32
  vram_budget_gb: 10
  batch_size: 4
  context_size: 2048
  timeout: 300

audit:
  model_version: "bamboo-7b-dpo-v0.1"
  source_repo: "hf://PowerInfer/Bamboo-DPO-v0.1-gguf"
  checksum: "sha256:..."
  created_at: "2026-01-18"

metadata:
  description: "Bamboo-7B DPO - Fast and high-quality local LLM"
  use_cases:
    - "General conversation"
    - "Code generation"
    - "Question answering"
  performance:
    tokens_per_second: "15-20"
    vram_usage: "6-8GB"
"#;

const PROSPARSE: &str = r#"# PowerInfer Model Policy: ProSparse Llama2-7B
engine: powerinfer
model_path: models/powerinfer/prosparse-llama2-7b/model.powerinfer.gguf

generation:
  max_tokens: 512
  temperature: 0.7
  top_p: 0.9

runtime:
  threads: 8
  gpu_layers: 28
  vram_budget_gb: 8
  batch_size: 4
  context_size: 2048

audit:
  model_version: "prosparse-llama2-7b-q4"
  source_repo: "hf://SparseLLM/prosparse-llama-2-7b"
  sparsity: "90%"

metadata:
  description: "ProSparse Llama2-7B - Fastest with 90% sparsity"
  performance:
    tokens_per_second: "20-25"
    vram_usage: "5-7GB"
"#;

fn read(text: &str) -> (Parsed<Policy>, Vec<Diagnostic>) {
    parse("configs/é x.yaml", text.as_bytes()).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
}

fn told(problems: &[Diagnostic]) -> Vec<String> {
    let part =
        |name: &str, text: &Option<String>| text.as_ref().map(|text| format!("; {name} {text}")).unwrap_or_default();
    let line = |problem: &Diagnostic| {
        let text = problem.to_string() + &part("expected", &problem.expected) + &part("actual", &problem.actual);
        text.trim_start_matches("p.yaml:").to_owned() + &part("hint", &problem.hint)
    };
    problems.iter().map(line).collect()
}

fn refused(text: &str) -> Vec<String> {
    told(&parse("p.yaml", text.as_bytes()).expect_err(text).0)
}

#[test]
fn the_first_policies_are_read_as_they_stand() {
    let (bamboo, warnings) = read(BAMBOO);
    assert_eq!(warnings, []);
    assert!(bamboo.value.audit.has_placeholder());
    assert_eq!(bamboo.value.generation.top_k, Some(40));
    assert_eq!(bamboo.value.runtime.vram_budget_gb, Some(10.0));
    assert_eq!(bamboo.value.audit.digest(), None);
    assert_eq!(bamboo.value.audit.created_at.as_deref(), Some("2026-01-18"));
    assert_eq!(bamboo.value.metadata.performance["tokens_per_second"], "15-20");
    assert_eq!(bamboo.digest(), Digest::of(BAMBOO.as_bytes()));
    let (prosparse, warnings) = read(PROSPARSE);
    assert_eq!(warnings, []);
    assert_eq!(prosparse.value.audit.sparsity.as_deref(), Some("90%"));
}

#[test]
fn the_policies_manifests_and_settings_of_this_repository() {
    let manifest = |text: &str| manifest::parse("m.toml", text.as_bytes()).expect("good").0.value;
    let quickstart = manifest(include_str!("../../../manifests/quickstart.toml"));
    let default = manifest(include_str!("../../../manifests/default.toml"));
    let smol = read(include_str!("../../../configs/models/llama-cpp/smollm2-135m-instruct.yaml")).0;
    assert!(resolve(&smol, &quickstart).is_ok());
    for text in [
        include_str!("../../../configs/models/powerinfer/bamboo-7b-dpo.yaml"),
        include_str!("../../../configs/models/powerinfer/prosparse-llama2-7b.yaml"),
        include_str!("../../../configs/models/powerinfer/relu-llama-7b.yaml"),
    ] {
        assert!(resolve(&read(text).0, &default).is_ok(), "{text}");
    }
    let mixtral = read(include_str!("../../../configs/models/powerinfer/mixtral-47b.yaml")).0;
    assert!(resolve(&mixtral, &default).is_err());
}

#[test]
fn what_is_not_quoted_is_text_where_text_is_wanted() {
    let (policy, _) = read(
        "engine: e\nmodel: m\naudit:\n  created_at: 2026-01-18\n  model_version: 1.10\n  sparsity: 90%\nmetadata:\n  \
         performance: {tokens_per_second: 15, vram: 6-8GB, quick: true}\nsmoke: {prompt: 6 * 7?, expect: 042}\n",
    );
    assert_eq!(policy.value.audit.created_at.as_deref(), Some("2026-01-18"));
    assert_eq!(policy.value.audit.model_version.as_deref(), Some("1.10"));
    assert_eq!(policy.value.audit.sparsity.as_deref(), Some("90%"));
    assert_eq!(policy.value.metadata.performance["quick"], "true");
    assert_eq!(policy.value.smoke.expect("smoke").expect.as_deref(), Some("042"));
}

#[test]
fn a_key_without_a_value_counts_as_absent() {
    let (policy, _) = read("engine: e\nmodel: m\ngeneration:\nruntime:\n  threads:\n  # timeout: 3\n");
    assert_eq!(policy.value.runtime.threads, None);
    assert_eq!(refused("engine:\nmodel: m\n"), ["1:1: `engine` has the wrong type; expected a string; actual nothing"]);
}

#[test]
fn everything_wrong_at_once() {
    let text = "engin: powerinfer\nmodel_path: ../x\ngeneration:\n  max_tokens: 0\n  temperature: hot\n  top_p: 1.5\n  temprature: 1\n  \
                stop: [a, ~, [b]]\nruntime:\n  threads: 2.5\n  variant: cudaa\n  batch_size: 99999999999\nsmoke:\n  expect: x\n- x: 1\n";
    assert_eq!(refused(text).len(), 1, "a syntax error comes alone");
    let text = text.replace("- x: 1\n", "");
    assert_eq!(
        refused(&text),
        [
            "1:1: unknown key `engin`; hint did you mean `engine`?",
            "1:1: the file has no key `engine`; expected a string",
            "2:13: `model_path`: `../x` is not a path inside its folder: it has a part `..`",
            "4:15: `generation.max_tokens` is out of range; expected a whole number from 1 to 1048576; actual the number `0`",
            "5:16: `generation.temperature` has the wrong type; expected a number from 0 to 10; actual the string `hot`",
            "6:10: `generation.top_p` is out of range; expected a number from 0 to 1; actual the number `1.5`",
            "7:3: unknown key `temprature` in `generation`; hint did you mean `temperature`?",
            "8:13: `generation.stop[1]` has the wrong type; expected a string; actual nothing",
            "8:16: `generation.stop[2]` has the wrong type; expected a string; actual a list",
            "10:12: `runtime.threads` has the wrong type; expected a whole number from 1 to 1024; actual the number `2.5`",
            "11:12: `runtime.variant` cannot be `cudaa`; expected one of `cpu`, `cuda`, `rocm`, `metal`; hint did you mean `cuda`?",
            "12:15: `runtime.batch_size` is out of range; expected a whole number from 1 to 65536; actual the number `99999999999`",
            "13:1: `smoke` has no key `prompt`; expected a string",
        ]
    );
}

#[test]
fn what_types_cannot_say() {
    assert_eq!(
        refused(
            "engine: e\nmodel: m\nmodel_path: a/b\ngeneration:\n  stop: ['']\naudit:\n  checksum: sha256:12\nsmoke: {prompt: a, expect: ' '}\n"
        ),
        [
            "3:13: a policy names its model only once; expected either `model` or `model_path`",
            "5:10: an empty stop text would end every answer at once",
            "7:13: the checksum is not a digest; expected `sha256:` and 64 hexadecimal digits; actual `sha256:12`",
            "8:28: every answer contains the empty string: this test cannot fail",
        ]
    );
    assert_eq!(
        refused("engine: e\nmodel: m\nsmoke: {prompt: a, matches: '([', schema: '{\"type\": 3}'}\n"),
        [
            "3:29: this is not a regular expression: unclosed character class",
            "3:43: this is not a JSON Schema: 3 is not valid under any of the schemas listed in the 'anyOf' keyword",
        ]
    );
    assert_eq!(
        refused("engine: e\nmodel: m\nsmoke: {prompt: a}\n"),
        ["3:1: `smoke` expects nothing of the answer; expected `expect`, `matches` or `schema`"]
    );
    assert_eq!(
        refused("engine: e\n"),
        [
            "1:1: the policy does not name a model; expected either `model: <name>` or `model_path: models/<engine>/<model>/<file>`"
        ]
    );
    assert_eq!(refused(""), ["1:1: the document has the wrong type; expected a table; actual nothing"]);
    assert_eq!(refused("engine: e\nmodel: m\ngeneration: {temperature: .nan}\n").len(), 1);
    let digest = Digest::of(b"weights");
    let (policy, warnings) = read(&format!("engine: e\nmodel: m\naudit:\n  checksum: {digest}\n"));
    assert_eq!((policy.value.audit.digest(), warnings), (Some(digest), Vec::new()));
}

#[test]
fn engine_and_model_are_found_in_the_manifest() {
    let text = r#"
        version = 1
        [engines.powerinfer]
        source = { path = "x" }
        [models.bamboo-7b-dpo]
        source = { hf = "a/b" }
        place = "models/powerinfer/bamboo-7b-dpo"
        weights = "model.powerinfer.gguf"
        [models.own-name]
        source = { hf = "a/c" }
    "#;
    let (manifest, _) = manifest::parse("m.toml", text.as_bytes()).expect("good");
    let manifest = manifest.value;
    let found = |text: &str| {
        resolve(&parse("p.yaml", text.as_bytes()).expect(text).0, &manifest).map(|found| found.model.0.to_string())
    };
    let missing = |text: &str| told(&found(text).expect_err(text).0);
    assert_eq!(found(BAMBOO), Ok("bamboo-7b-dpo".to_owned()));
    assert_eq!(found("engine: powerinfer\nmodel: own-name\n"), Ok("own-name".to_owned()));
    assert_eq!(found("engine: powerinfer\nmodel_path: models/own-name/any.gguf\n"), Ok("own-name".to_owned()));
    assert_eq!(
        missing("engine: powerinfr\nmodel: bamboo\n"),
        [
            "1:9: the manifest has no engine `powerinfr`; hint did you mean `powerinfer`?",
            "2:8: the manifest has no model `bamboo`; hint did you mean `bamboo-7b-dpo`?",
        ]
    );
    assert_eq!(
        missing("engine: powerinfer\nmodel_path: models/powerinfer/bamboo-7b-dpo/model.gguf\n"),
        ["2:13: the manifest has no model `models/powerinfer/bamboo-7b-dpo/model.gguf`; \
             hint did you mean `models/powerinfer/bamboo-7b-dpo/model.powerinfer.gguf`?"]
    );
    assert!(missing("engine: zzz\nmodel: own-name\n")[0].ends_with("expected one of `powerinfer`"));
    let empty = manifest::parse("m.toml", b"version = 1\n").expect("good").0.value;
    let policy = read("engine: e\nmodel: m\n").0;
    let Diagnostics(problems) = resolve(&policy, &empty).expect_err("nothing there");
    assert_eq!(problems[0].hint.as_deref(), Some("add `[engines.<name>]` to the manifest"));
}

#[test]
fn no_single_changed_byte_panics() {
    for at in 0..BAMBOO.len() {
        for byte in [b':', b'\n', b'&', b'*', b'{', b'"', b'\t', 0, 0xc3] {
            let mut bytes = BAMBOO.as_bytes().to_vec();
            bytes[at] = byte;
            let _ = parse("p.yaml", &bytes);
        }
        let _ = parse("p.yaml", &BAMBOO.as_bytes()[..at]);
    }
}

#[test]
fn the_words_of_other_programs_lead_to_ours() {
    let told = |text: &str| {
        let text = format!("engine: e\nmodel: m\n{text}\n");
        let Diagnostics(problems) = parse("p.yaml", text.as_bytes()).expect_err("refused");
        problems[0].hint.clone().unwrap_or_default()
    };
    for (theirs, ours) in [
        ("runtime:\n  ctx_size: 1", "context_size"),
        ("runtime:\n  ngl: 1", "gpu_layers"),
        ("runtime:\n  n-gpu-layers: 1", "gpu_layers"),
        ("generation:\n  n_predict: 1", "max_tokens"),
        ("generation:\n  temp: 1", "temperature"),
        ("runtime:\n  variant: gpu", "cuda"),
        ("runtime:\n  variant: hip", "rocm"),
    ] {
        assert_eq!(told(theirs), format!("did you mean `{ours}`?"), "{theirs}");
    }
    assert!(told("generation:\n  ngl: 1").is_empty(), "an alias counts where its key is known");
}

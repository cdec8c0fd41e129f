//! A policy: which engine runs which model, and how. YAML, one policy a file.
//!
//! The types below are the format: parsing, the JSON Schema of `aitools schema policy` and "did you mean" come from them.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::diagnostic::{Diagnostic, Diagnostics, nearest};
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};

use super::Parsed;
use super::document::{Document, Syntax};
use super::manifest::{EngineSpec, Manifest, ModelSpec};
use super::schema::{Schema, quoted_list};

/// Bytes of a policy at most.
pub const MAX_BYTES: usize = 1 << 20;

static SCHEMA: Schema<Policy> = Schema::new();

/// Reads a policy; `name` is the file's name in messages.
///
/// # Errors
/// Everything that is wrong with the file: syntax, else types and keys, else what contradicts itself.
pub fn parse(name: &str, bytes: &[u8]) -> Result<(Parsed<Policy>, Vec<Diagnostic>), Diagnostics> {
    let document = Document::parse(Syntax::Yaml, name, bytes, MAX_BYTES)?;
    let value = SCHEMA.decode(&document)?;
    let mut problems = check(&value, &document);
    problems.sort();
    problems.or(Parsed { value, document })
}

fn check(policy: &Policy, document: &Document) -> Diagnostics {
    let mut problems = Diagnostics::default();
    match (&policy.model, &policy.model_path) {
        (Some(_), Some(_)) => problems.push(
            document
                .error(&["model_path"], "a policy names its model only once")
                .expected("either `model` or `model_path`"),
        ),
        (None, None) => problems.push(
            document
                .error(&[], "the policy does not name a model")
                .expected("either `model: <name>` or `model_path: models/<engine>/<model>/<file>`"),
        ),
        _ => {}
    }
    for (index, stop) in policy.generation.stop.iter().enumerate() {
        if stop.is_empty() {
            let path = ["generation", "stop", &index.to_string()];
            problems.push(document.error(&path, "an empty stop text would end every answer at once"));
        }
    }
    if let Some(smoke) = &policy.smoke {
        check_smoke(document, smoke, &mut problems);
    }
    if let Some(checksum) = &policy.audit.checksum {
        let path = ["audit", "checksum"];
        if !policy.audit.has_placeholder() && policy.audit.digest().is_none() {
            let problem = document.error(&path, "the checksum is not a digest");
            problems.push(problem.expected("`sha256:` and 64 hexadecimal digits").actual(format!("`{checksum:.100}`")));
        }
    }
    problems
}

fn check_smoke(document: &Document, smoke: &Smoke, problems: &mut Diagnostics) {
    let mut wrong = |key: &str, what: &str| problems.push(document.error(&["smoke", key], what));
    if smoke.expect.as_ref().is_some_and(|expect| expect.trim().is_empty()) {
        wrong("expect", "every answer contains the empty string: this test cannot fail");
    }
    if let Some(Err(error)) = smoke.matches.as_ref().map(|pattern| regex::Regex::new(pattern)) {
        let last = error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        wrong("matches", &format!("this is not a regular expression: {last}"));
    }
    if let Some(schema) = &smoke.schema {
        let made = serde_json::from_str(schema).map_err(|error| error.to_string());
        let made = made.and_then(|schema| jsonschema::validator_for(&schema).map_err(|error| error.to_string()));
        if let Err(error) = made {
            wrong("schema", &format!("this is not a JSON Schema: {error}"));
        }
    }
    if (&smoke.expect, &smoke.matches, &smoke.schema) == (&None, &None, &None) {
        let problem = document.error(&["smoke"], "`smoke` expects nothing of the answer");
        problems.push(problem.expected("`expect`, `matches` or `schema`"));
    }
}

/// `sha256:...`
fn is_placeholder(checksum: &str) -> bool {
    checksum.strip_prefix("sha256:").unwrap_or(checksum).chars().all(|c| c == '.' || c == '…')
}

impl Parsed<Policy> {
    /// The digest of the file, which names exactly this policy.
    pub fn digest(&self) -> Digest {
        Digest::of(self.document.source.text.as_bytes())
    }
}

/// What a policy's words mean in a manifest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resolved<'m> {
    /// The engine's name and entry.
    pub engine: (&'m Name, &'m EngineSpec),
    /// The model's name and entry.
    pub model: (&'m Name, &'m ModelSpec),
}

/// Finds a policy's engine and model in the manifest.
///
/// # Errors
/// Each of the two that is not there, placed in the policy's file.
pub fn resolve<'m>(policy: &Parsed<Policy>, manifest: &'m Manifest) -> Result<Resolved<'m>, Diagnostics> {
    let mut problems = Diagnostics::default();
    let engine = manifest.engines.get_key_value(&policy.value.engine);
    if engine.is_none() {
        let known = manifest.engines.keys().map(Name::as_str);
        problems.push(missing(policy, "engine", policy.value.engine.as_str(), known.collect()));
    }
    let model = match (&policy.value.model, &policy.value.model_path) {
        (Some(name), _) => {
            let model = manifest.models.get_key_value(name);
            if model.is_none() {
                problems.push(missing(
                    policy,
                    "model",
                    name.as_str(),
                    manifest.models.keys().map(Name::as_str).collect(),
                ));
            }
            model
        }
        (None, Some(path)) => {
            let model = manifest.models.iter().find(|(name, spec)| holds(name, spec, path));
            if model.is_none() {
                let known: Vec<String> = manifest.models.iter().map(|(name, spec)| weights_path(name, spec)).collect();
                let known = known.iter().map(String::as_str).collect();
                problems.push(missing(policy, "model_path", path.as_str(), known));
            }
            model
        }
        (None, None) => None,
    };
    match (engine, model) {
        (Some(engine), Some(model)) => Ok(Resolved { engine, model }),
        _ => Err(problems),
    }
}

/// Whether a model's weights are at `path`. Without `weights` the file has its own name, which only the lockfile knows.
fn holds(name: &Name, spec: &ModelSpec, path: &RelPath) -> bool {
    match (path.strip_prefix(&spec.place(name)), &spec.weights) {
        (Some(file), Some(weights)) => file == *weights,
        (Some(_), None) => true,
        (None, _) => false,
    }
}

fn weights_path(name: &Name, spec: &ModelSpec) -> String {
    let file = spec.weights.as_ref().map_or("<file>", RelPath::as_str);
    format!("{}/{file}", spec.place(name))
}

fn missing(policy: &Parsed<Policy>, key: &str, written: &str, known: Vec<&str>) -> Diagnostic {
    let what = key.trim_end_matches("_path");
    let problem = policy.error(&[key], format!("the manifest has no {what} `{written}`"));
    if known.is_empty() {
        return problem.hint(format!("add `[{what}s.<name>]` to the manifest"));
    }
    match nearest(written, known.iter().copied()) {
        Some(near) => problem.hint(format!("did you mean `{near}`?")),
        None => problem.expected(format!("one of {}", quoted_list(known.into_iter()))),
    }
}

/// Which engine runs which model, with which options.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The manifest's name of the engine.
    pub engine: Name,
    /// The manifest's name of the model. Either this or `model_path`.
    pub model: Option<Name>,
    /// The weights file, relative to the project: `models/<engine>/<model>/<file>`.
    pub model_path: Option<RelPath>,
    /// How text is generated.
    #[serde(default)]
    pub generation: Generation,
    /// How the engine is started.
    #[serde(default)]
    pub runtime: Runtime,
    /// How `serve` offers the policy.
    #[serde(default)]
    pub serve: Serve,
    /// Where the model came from.
    #[serde(default)]
    pub audit: Audit,
    /// Notes for people.
    #[serde(default)]
    pub metadata: Metadata,
    /// A prompt that shows whether the model works.
    pub smoke: Option<Smoke>,
}

/// How text is generated. The engine's adapter has a default for each key.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// The most tokens to generate.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_tokens: Option<u32>,
    /// 0 = greedy decoding.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub temperature: Option<f64>,
    /// Nucleus sampling: only the most likely tokens with this total probability are considered.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    /// 0 turns it off.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub top_k: Option<u32>,
    /// The least probability of a token relative to the most likely one.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f64>,
    /// Penalty for repeated tokens; 1 = none.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub repeat_penalty: Option<f64>,
    /// Penalty for tokens that occurred; 0 = none.
    #[schemars(range(min = -10.0, max = 10.0))]
    pub presence_penalty: Option<f64>,
    /// Penalty for tokens by how often they occurred; 0 = none.
    #[schemars(range(min = -10.0, max = 10.0))]
    pub frequency_penalty: Option<f64>,
    /// The seed of the sampler; drawn at random and recorded when not given.
    pub seed: Option<u32>,
    /// Texts that end the generation; they are not part of the answer.
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub stop: Vec<String>,
    /// A chat template in Jinja, instead of the model's own; `none` sends the prompt as it is.
    pub chat_template: Option<String>,
    /// The system message put before the prompt.
    pub system_prompt: Option<String>,
}

/// How the engine is started.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// Processor threads; the physical cores, as the adapter counts them, when not given.
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<u32>,
    /// Layers on the accelerator.
    #[schemars(range(min = 0, max = 10_000))]
    pub gpu_layers: Option<u32>,
    /// GPU memory for a sparse model, in GiB.
    #[schemars(range(min = 0.0, max = 100_000.0))]
    pub vram_budget_gb: Option<f64>,
    /// Tokens of a prompt that are processed at once.
    #[schemars(range(min = 1, max = 65_536))]
    pub batch_size: Option<u32>,
    /// Tokens of context for each request.
    #[schemars(range(min = 8, max = 16_777_216))]
    pub context_size: Option<u32>,
    /// Requests at a time.
    #[schemars(range(min = 1, max = 256))]
    pub parallel: Option<u32>,
    /// Seconds for one answer, start of the engine included.
    #[schemars(range(min = 1, max = 604_800))]
    pub timeout: Option<u32>,
    /// What the engine gives for a text; text when not given.
    pub output: Option<Output>,
    /// Which build to use; chosen by detection when not given.
    pub variant: Option<crate::base::platform::Variant>,
}

impl Runtime {
    /// The longest time for one answer, the start of the engine included: 600 seconds when the policy does not say.
    pub fn time_limit(&self) -> Duration {
        Duration::from_secs(self.timeout.unwrap_or(600).into())
    }
}

/// What an engine gives for a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Output {
    /// An answer.
    Text,
    /// A vector that stands for its meaning.
    Embeddings,
    /// How well it fits a query.
    Ranking,
}

/// How `aitools serve` offers a policy.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// Other names that clients may use for the policy.
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub aliases: Vec<String>,
    /// Start the engine together with the server.
    #[serde(default)]
    pub preload: bool,
    /// Seconds without a request after which the engine ends; it stays loaded when not given.
    #[schemars(range(min = 1, max = 604_800))]
    pub idle_timeout: Option<u32>,
    /// The fields of a request by which clients may change how text is generated, such as `temperature`; all when not given,
    /// none when empty.
    #[serde(rename = "override")]
    #[schemars(length(max = 64))]
    pub overrides: Option<Vec<String>>,
    /// What becomes of tools in a request. `ignore` drops them, for clients that offer tools to every model; otherwise a model
    /// that has no place for them refuses the request.
    pub tools: Option<Tools>,
}

/// What becomes of tools in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tools {
    /// They are passed on, or refused.
    Offer,
    /// They are dropped: the model never sees them.
    Ignore,
}

/// Where the model came from, for the record. A real `checksum` is really checked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// Free text.
    pub model_version: Option<String>,
    /// For example `hf://organisation/repository`.
    pub source_repo: Option<String>,
    /// `sha256:<hex>` of the weights file. `sha256:...` is a placeholder and counts as absent.
    pub checksum: Option<String>,
    /// Free text.
    pub created_at: Option<String>,
    /// Free text.
    pub sparsity: Option<String>,
}

impl Audit {
    /// The digest that the weights file must have, when a real one is given.
    pub fn digest(&self) -> Option<Digest> {
        self.checksum.as_ref()?.parse().ok()
    }

    /// Whether the checksum is a placeholder such as `sha256:...`, which counts as absent.
    pub fn has_placeholder(&self) -> bool {
        self.checksum.as_deref().is_some_and(is_placeholder)
    }
}

/// For people; nothing here changes what runs.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// A title.
    pub name: Option<String>,
    /// Free text.
    pub description: Option<String>,
    /// What the policy is for.
    #[serde(default)]
    pub use_cases: Vec<String>,
    /// Free keywords.
    #[serde(default)]
    pub tags: Vec<String>,
    /// The model's licence.
    pub license: Option<String>,
    /// Who wrote the policy.
    pub author: Option<String>,
    /// Free text by measure, such as `tokens_per_second: "15-20"`.
    #[serde(default)]
    pub performance: BTreeMap<String, String>,
}

/// A prompt whose answer shows that the model works: `aitools test` runs it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Smoke {
    /// The prompt.
    pub prompt: String,
    /// The answer must contain this, whatever the case of its letters.
    pub expect: Option<String>,
    /// The answer must match this regular expression somewhere.
    pub matches: Option<String>,
    /// The answer must be JSON that satisfies this JSON Schema, which is written as JSON text.
    pub schema: Option<String>,
    /// The most tokens to generate.
    #[schemars(range(min = 1, max = 4096))]
    pub max_tokens: Option<u32>,
    /// The longest that the answer may take, in seconds, the start of the engine included; `runtime.timeout` when not given.
    #[schemars(range(min = 1, max = 86400))]
    pub max_seconds: Option<u32>,
    /// The least tokens per second after the first.
    #[schemars(range(min = 0))]
    pub min_tokens_per_second: Option<f64>,
}

#[cfg(test)]
mod tests;

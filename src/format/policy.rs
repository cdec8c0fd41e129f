//! A policy: which engine runs which model, and how. YAML, one policy a file.
//!
//! The types below are the format: parsing, the JSON Schema of `aitools schema policy` and "did you mean" come from them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::name::{Name, RelPath};

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
    #[serde(default)]
    pub generation: Generation,
    #[serde(default)]
    pub runtime: Runtime,
    #[serde(default)]
    pub audit: Audit,
    #[serde(default)]
    pub metadata: Metadata,
    pub smoke: Option<Smoke>,
}

/// How text is made. What is not given is left to the engine's adapter, which documents its defaults.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Generation {
    /// Tokens to make at most.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_tokens: Option<u32>,
    /// 0 takes the most likely token always.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub temperature: Option<f64>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub top_p: Option<f64>,
    /// 0 turns it off.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub top_k: Option<u32>,
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: Option<f64>,
    #[schemars(range(min = 0.0, max = 10.0))]
    pub repeat_penalty: Option<f64>,
    #[schemars(range(min = -10.0, max = 10.0))]
    pub presence_penalty: Option<f64>,
    #[schemars(range(min = -10.0, max = 10.0))]
    pub frequency_penalty: Option<f64>,
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
    /// Which build to use; chosen by detection when not given.
    pub variant: Option<crate::base::platform::Variant>,
}

/// Where the model came from, for the record. A real `checksum` is really checked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    pub model_version: Option<String>,
    /// For example `hf://organisation/repository`.
    pub source_repo: Option<String>,
    /// `sha256:<hex>` of the weights file. `sha256:...` is a placeholder and counts as absent.
    pub checksum: Option<String>,
    pub created_at: Option<String>,
    pub sparsity: Option<String>,
}

/// For people; nothing here changes what runs.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    pub name: Option<String>,
    pub description: Option<String>,
    #[serde(default)]
    pub use_cases: Vec<String>,
    #[serde(default)]
    pub tags: Vec<String>,
    pub license: Option<String>,
    pub author: Option<String>,
    /// Free text by measure, such as `tokens_per_second: "15-20"`.
    #[serde(default)]
    pub performance: BTreeMap<String, String>,
}

/// A prompt whose answer shows that the model works: used by `check --run` and CI.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Smoke {
    pub prompt: String,
    /// The answer must contain this, whatever the case of its letters.
    pub expect: String,
    #[schemars(range(min = 1, max = 4096))]
    pub max_tokens: Option<u32>,
}

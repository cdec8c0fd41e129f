//! What the gateway serves, as the layer above knows it: policies, and the verified inputs of their engines.

use std::time::{Duration, SystemTime};

use serde_json::Value as Json;

use super::scheduler::{Memory, Terms};
use crate::base::digest::Digest;
use crate::engine::Ready;
use crate::format::policy::Policy;

/// Gives the policies of a project, and what their engines are started from. Called on threads that may block.
pub trait Catalog: std::fmt::Debug + Send + Sync {
    /// Every policy that is served. None when nothing has changed since the last call.
    ///
    /// # Errors
    /// Why the project cannot be read any more; what was served before goes on.
    fn offers(&self) -> Result<Option<Vec<Offer>>, String>;

    /// The verified inputs of a policy's engine, looked at again before each start.
    ///
    /// # Errors
    /// Why it cannot be started: not synced, or damaged.
    fn ready(&self, policy: &str) -> Result<Ready, String>;
}

/// A policy that is served.
#[derive(Debug, Clone)]
pub struct Offer {
    /// The model's name in the API.
    pub name: String,
    /// Other names that clients may use for it.
    pub aliases: Vec<String>,
    /// What the file says.
    pub policy: Policy,
    /// Of the policy's file.
    pub policy_sha256: Digest,
    /// How many times [`Catalog::ready`] has failed for it: after each time it counts as changed, so that it is tried again.
    pub failed: u32,
    /// When the policy's file was changed.
    pub changed: SystemTime,
    /// What its engine is started from; or why it cannot be started now.
    pub model: Result<Model, String>,
}

/// What is known about the model of a policy that can be started.
#[derive(Debug, Clone)]
pub struct Model {
    /// The accelerator of the build.
    pub variant: &'static str,
    /// Of the installed engine.
    pub fingerprint: Digest,
    /// Of the main weights file.
    pub weights_sha256: Digest,
    /// Bytes of all weights files.
    pub size_bytes: u64,
    /// Tokens of context of one request, and the most that the model was trained for.
    pub context: Option<(u32, u32)>,
    /// What its engine needs by the adapter's estimate.
    pub need: Memory,
}

impl Offer {
    /// The terms under which the scheduler starts its engine.
    pub fn terms(&self, learned: Option<Memory>) -> Terms {
        let model = self.model.as_ref().ok();
        let (fingerprint, weights) =
            model.map_or((None, None), |model| (Some(model.fingerprint), Some(model.weights_sha256)));
        Terms {
            version: format!(
                "{} {fingerprint:?} {weights:?} {} {}",
                self.policy_sha256,
                self.model.is_ok(),
                self.failed
            ),
            slots: self.policy.runtime.parallel.unwrap_or(1),
            need: learned.or(model.map(|model| model.need)).unwrap_or_default(),
            idle_timeout: self.policy.serve.idle_timeout.map(|seconds| Duration::from_secs(seconds.into())),
        }
    }

    /// When the policy's file was changed, in seconds since 1970.
    pub fn created(&self) -> u64 {
        self.changed.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }

    /// Its entry in a list of models: OpenAI's fields, and those that llama.cpp's router and vLLM add.
    pub fn listed(&self, status: &Json) -> Json {
        let mut entry = serde_json::json!({
            "id": self.name,
            "object": "model",
            "created": self.created(),
            "owned_by": "aitools",
            "root": self.name,
            "aliases": self.aliases,
            "architecture": { "input_modalities": ["text"], "output_modalities": ["text"] },
            "status": status,
        });
        let mut meta = serde_json::json!({
            "aitools": {
                "engine": self.policy.engine,
                "policy_sha256": self.policy_sha256,
                "problem": self.model.as_ref().err(),
            },
        });
        if let Ok(model) = &self.model {
            meta["size"] = model.size_bytes.into();
            meta["aitools"]["variant"] = model.variant.into();
            meta["aitools"]["weights_sha256"] = model.weights_sha256.to_string().into();
            if let Some((context, trained)) = model.context {
                entry["max_model_len"] = context.into();
                entry["context_length"] = context.into();
                meta["n_ctx"] = context.into();
                meta["n_ctx_train"] = trained.into();
            }
        }
        // Absent rather than null: Open WebUI shows what is there.
        if let Some(name) = &self.policy.metadata.name {
            entry["name"] = name.as_str().into();
        }
        if let Some(description) = &self.policy.metadata.description {
            entry["description"] = description.as_str().into();
        }
        entry["meta"] = meta;
        entry
    }
}

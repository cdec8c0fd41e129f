//! Findings of checks of policies and models, and the checks that are the same for every engine.

use serde::Serialize;

use crate::format::policy::Policy;

/// One error or warning about a model under a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A warning does not stop a run.
    pub error: bool,
    /// The policy key it is about (`runtime.context_size`), or empty when it is about the model.
    pub key: &'static str,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// A finding that stops a run.
pub fn error(key: &'static str, message: impl Into<String>, hint: Option<&str>) -> Finding {
    Finding { error: true, key, message: message.into(), hint: hint.map(str::to_owned) }
}

/// A finding that does not stop a run.
pub fn warning(key: &'static str, message: impl Into<String>, hint: Option<&str>) -> Finding {
    Finding { error: false, key, message: message.into(), hint: hint.map(str::to_owned) }
}

/// Bytes in GiB, as messages show memory.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// The context size against what the model was `trained` on and against the policy's `max_tokens`. All in tokens.
pub fn of_context(policy: &Policy, size: u32, trained: Option<u64>) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Some(trained) = trained.filter(|trained| u64::from(size) > *trained) {
        let message =
            format!("the model was trained with a context of {trained} tokens: answers may be incoherent with {size}");
        found.push(warning("runtime.context_size", message, Some(&format!("use {trained} or less"))));
    }
    if let Some(tokens) = policy.generation.max_tokens.filter(|tokens| *tokens >= size) {
        let message = format!("{tokens} tokens and a prompt do not fit a context of {size}: answers will end early");
        found.push(warning("generation.max_tokens", message, Some("raise `runtime.context_size`")));
    }
    found
}

/// A model without a chat template, under a policy that gives none. `name`: what the model calls itself, when that matters.
pub fn of_missing_template(policy: &Policy, name: Option<&str>) -> Option<Finding> {
    if policy.generation.chat_template.is_some() {
        return None;
    }
    let what = name.map_or_else(|| "the model".to_owned(), |name| format!("`{name}`"));
    let hint = "give `generation.chat_template`, or `chat_template: none` to send prompts as they are";
    let message = format!("{what} has no chat template: prompts are sent as they are");
    Some(warning("generation.chat_template", message, Some(hint)))
}

/// Weights and context cache against the memory that this machine has, `on_gpu` of them elsewhere. All in bytes.
pub fn of_memory(weights: u64, cache: u64, machine: u64, on_gpu: u64) -> Option<Finding> {
    let needed = weights.saturating_add(cache);
    if needed.saturating_sub(on_gpu) <= machine {
        return None;
    }
    let message = format!(
        "weights and caches take about {:.1} GiB ({:.1} GiB of it for the context), and this machine has {:.1} GiB",
        gib(needed),
        gib(cache),
        gib(machine)
    );
    let hint = if cache > needed / 2 {
        "lower `runtime.context_size` or `runtime.parallel`"
    } else {
        "choose a smaller quantisation"
    };
    Some(warning("runtime.context_size", message, Some(hint)))
}

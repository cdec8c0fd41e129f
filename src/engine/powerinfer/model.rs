//! What a header says, in PowerInfer's terms: sparse or dense, the sizes of layers and neurons, what fits where. Pure.

use std::collections::BTreeMap;

use super::gpu_index;
use crate::base::platform::Variant;
use crate::engine::ModelSize;
use crate::engine::gguf::{self, Gguf};
use crate::format::gguf::{Header, Magic, Tensor, Value};
use crate::format::policy::Policy;

/// Tokens of context when the policy does not say; never more than the model was trained on.
const CONTEXT: u32 = 2048;
/// Each slot gets this many tokens more than the policy says. Its server shifts the context (and forgets its beginning)
/// when a slot is full, and counts a character of several tokens late: the last of them must not get there.
const SPARE: u32 = 8;
/// The largest batch of its server, in tokens.
pub(super) const BATCH: u32 = 512;

/// A sparse model is known by its magic alone. A dense one runs as llama.cpp of November 2023 would run it.
pub(super) fn is_sparse(header: &Header) -> bool {
    header.magic == Magic::Pwri
}

/// Whether the build puts anything on a GPU.
pub(super) fn on_gpu(variant: Variant) -> bool {
    variant != Variant::Cpu
}

/// Every tensor by name: a hostile header has a quarter of a million.
pub(super) fn by_name(header: &Header) -> BTreeMap<&str, &Tensor> {
    header.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect()
}

/// Tokens of context for one request.
pub(super) fn context_size(policy: &Policy, header: &Header) -> u32 {
    gguf::context_size(policy, header, CONTEXT)
}

/// Tokens of context of all slots together, as the server is started.
pub(super) fn total_context(policy: &Policy, header: &Header) -> u64 {
    u64::from(context_size(policy, header).saturating_add(SPARE)) * u64::from(policy.runtime.parallel.unwrap_or(1))
}

/// Tokens that its server takes at once.
pub(super) fn batch(policy: &Policy) -> u32 {
    policy.runtime.batch_size.unwrap_or(BATCH).min(BATCH)
}

/// Processor threads: never more than cores (they wait by spinning, and more of them than cores take a hundred times as
/// long), and at least two where a thread of its own feeds the GPU.
pub(super) fn threads(policy: &Policy, header: &Header, variant: Variant, cores: u32) -> u32 {
    let asked = policy.runtime.threads.unwrap_or(cores).min(cores);
    asked.max(if is_sparse(header) && on_gpu(variant) { 2 } else { 1 })
}

/// What its engine needs under a policy. A dense model of a GPU build lies on the GPU, a sparse one as far as its budget goes.
pub(super) fn size(of: &Gguf, policy: &Policy, variant: Variant) -> ModelSize {
    let header = of.header();
    let whole = of.size_bytes().saturating_add(cache_bytes(policy, header));
    let budget = policy.runtime.vram_budget_gb.unwrap_or(0.0).clamp(0.0, 100_000.0);
    let gpu_bytes = match (on_gpu(variant), is_sparse(header)) {
        (false, _) => 0,
        (true, false) => whole,
        (true, true) => (budget * f64::from(1 << 30)) as u64,
    };
    ModelSize {
        weights_bytes: of.size_bytes(),
        ram_bytes: whole.saturating_sub(gpu_bytes),
        gpu_bytes,
        context: context_size(policy, header),
        trained: header.context_length().and_then(|tokens| u32::try_from(tokens).ok()),
    }
}

/// Bytes of the key and value cache of all slots, in 16 bits; 0 when the header does not say.
pub(super) fn cache_bytes(policy: &Policy, header: &Header) -> u64 {
    gguf::cache_bytes_per_token(header).saturating_mul(total_context(policy, header))
}

/// Bytes of the largest part of its buffer for computing, the attention of each head for each token of a batch to each of
/// the context; 0 when the header does not say. It lies beside the cache, and beside a budget (`llama_new_context_with_model`).
pub(super) fn attention_bytes(policy: &Policy, header: &Header) -> u64 {
    let (context, heads) = (total_context(policy, header), header.architecture_uint("attention.head_count"));
    let batch = u64::from(batch(policy)).min(context);
    [context, batch, 4].into_iter().fold(heads.unwrap_or(0), u64::saturating_mul)
}

/// The parts of a feed-forward block that the neurons are rows of.
const NEURON_TENSORS: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down_t"];

/// A layer's neurons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layer {
    pub neurons: usize,
    /// Of one neuron, in all its tensors.
    pub neuron_bytes: u64,
}

/// The layers of a sparse model, as far as the header has them all.
pub(super) fn layers(header: &Header) -> Option<Vec<Layer>> {
    let tensors = by_name(header);
    let layer = |index: u64| {
        let named = |part: &str| tensors.get(format!("blk.{index}.{part}.weight").as_str());
        let neurons = *named("ffn_up")?.shape.get(1)?;
        let sizes = NEURON_TENSORS.iter().filter_map(|part| named(part)).map(|tensor| tensor.size_bytes);
        let neuron_bytes = sizes.fold(0, u64::saturating_add).checked_div(neurons)?;
        Some(Layer { neurons: usize::try_from(neurons).ok()?, neuron_bytes })
    };
    (0..header.block_count()?).map(layer).collect()
}

/// What is left of a GPU memory budget for neurons. Everything else goes to the GPU first: attention, predictors, norms and
/// output, then the cache (`buffered_tensor_allocator` and `llama_reserve_model_kv_cache`); neurons go there only if all
/// of that fits. A little is kept back, because an index that is one byte too large is not used at all. 0 when that is too
/// little for any block of neurons.
pub(super) fn neuron_budget(policy: &Policy, header: &Header, budget_gib: f64) -> u64 {
    let stays = |name: &str| {
        ["token_embd", "position_embd", "rope_freqs"].iter().any(|start| name.starts_with(start))
            || NEURON_TENSORS.iter().any(|part| name.ends_with(&format!(".{part}.weight")))
    };
    let others = header.tensors.iter().filter(|tensor| !stays(&tensor.name)).map(|tensor| tensor.size_bytes);
    let first = others.fold(cache_bytes(policy, header), u64::saturating_add);
    let left = ((budget_gib * f64::from(1 << 30)) as u64).saturating_sub(first);
    let left = left - left / 64;
    let blocks = layers(header).into_iter().flatten();
    let smallest = blocks.map(|layer| gpu_index::smallest_block(layer.neurons, layer.neuron_bytes)).min();
    if smallest.is_some_and(|smallest| left >= smallest) { left } else { 0 }
}

pub(super) const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";
pub(super) const EOS_KEY: &str = "tokenizer.ggml.eos_token_id";

/// The token that begins a text; llama.cpp's own default when the model does not say, or names none of its tokens.
pub(super) fn bos(header: &Header) -> Option<u32> {
    token(header, BOS_KEY, 1)
}

/// The token that ends an answer.
pub(super) fn eos(header: &Header) -> Option<u32> {
    token(header, EOS_KEY, 2)
}

/// Never one that is not in the vocabulary: PowerInfer reads past its weights there.
fn token(header: &Header, key: &str, pieces: u32) -> Option<u32> {
    let default = if is_bytewise(header) { 11 } else { pieces };
    let known = |id: &u32| u64::from(*id) < header.vocabulary_size().unwrap_or(0);
    header.uint(key).and_then(|id| u32::try_from(id).ok()).filter(known).or_else(|| Some(default).filter(known))
}

/// Tokens are runs of bytes (BPE); any other vocabulary is taken for SentencePiece's.
pub(super) fn is_bytewise(header: &Header) -> bool {
    header.text("tokenizer.ggml.model") == Some("gpt2")
}

/// Whether a prompt begins with [`bos`].
pub(super) fn adds_bos(header: &Header) -> bool {
    match header.metadata.get("tokenizer.ggml.add_bos_token") {
        Some(Value::Bool(adds)) => *adds,
        _ => !is_bytewise(header),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::powerinfer::tests::{SPARSE, header};

    #[test]
    fn tokens_that_begin_and_end_a_text_are_in_the_vocabulary() {
        let of = |metadata: &[(&str, Value)]| {
            let mut header = header(&SPARSE);
            header.metadata.extend(metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
            (bos(&header), eos(&header), adds_bos(&header))
        };
        let size = header(&SPARSE).vocabulary_size().unwrap();
        let kind = |name: &str| ("tokenizer.ggml.model", Value::Text(name.to_owned()));
        assert_eq!(of(&[(BOS_KEY, Value::Uint(size - 1))]), (Some(size as u32 - 1), Some(2), true));
        for outside in [Value::Uint(size), Value::Uint(u64::MAX), Value::Int(-1)] {
            let ends = [(BOS_KEY, outside.clone()), (EOS_KEY, outside)];
            assert_eq!(of(&ends), (Some(1), Some(2), true));
            assert_eq!(of(&[&ends[..], &[kind("another")]].concat()), (Some(1), Some(2), true));
            assert_eq!(of(&[&ends[..], &[kind("gpt2")]].concat()), (Some(11), Some(11), false));
            let few = ("tokenizer.ggml.tokens", Value::Array { length: 2 });
            assert_eq!(of(&[&ends[..], &[few]].concat()), (Some(1), None, true), "two tokens");
        }
    }
}

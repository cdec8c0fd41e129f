//! Findings about a policy's use of GPUs.

use super::{QUANTIZE_HINT, launch, model, named, of_no_neuron_type};
use crate::base::platform::Variant;
use crate::build::accelerator::Gpu;
use crate::engine::CheckRequest;
use crate::engine::finding::{Finding, error, gib, warning};
use crate::engine::gguf::Gguf;
use crate::format::gguf::Header;
use crate::format::policy::Policy;

/// What a process takes on each GPU beside what it puts there, for weights of 16 bits and for quantised ones, which it unpacks:
/// measured on an H100 with 0.6 to 2.2 GB of weights, beside a budget, 0.62 to 0.79 GiB, and up to 0.85 GiB.
/// [`model::attention_bytes`] come on top (there 16 MiB).
const GPU_OVERHEAD_GIB: [f64; 2] = [0.8, 0.9];
/// `GGML_TYPE_F32` and `GGML_TYPE_F16`.
const UNQUANTISED: [u32; 2] = [0, 1];

/// Findings about the accelerator options of a policy, for the build and the model that it uses.
pub fn of_build(of: &Gguf, ask: &CheckRequest<'_>) -> Vec<Finding> {
    let header = of.header();
    let mut found = Vec::new();
    let runtime = &ask.policy.runtime;
    let (layers, budget) = (runtime.gpu_layers.filter(|layers| *layers > 0), runtime.vram_budget_gb);
    if ask.variant == Variant::Cpu {
        for key in
            [layers.map(|_| "runtime.gpu_layers"), budget.map(|_| "runtime.vram_budget_gb")].into_iter().flatten()
        {
            let hint = "choose a variant: `runtime.variant: cuda`";
            found.push(warning(key, "the build `cpu` has no accelerator: this has no effect", Some(hint)));
        }
        return found;
    }
    if !model::is_sparse(header) {
        if budget.is_some() {
            let hint = "use `runtime.gpu_layers`";
            let message = "a dense model has no memory budget: this has no effect";
            found.push(warning("runtime.vram_budget_gb", message, Some(hint)));
        }
        return found;
    }
    if layers.is_some() {
        let hint = "remove it: `runtime.vram_budget_gb` decides";
        let message = "a sparse model is not placed by layers: this has no effect";
        found.push(warning("runtime.gpu_layers", message, Some(hint)));
    }
    found.extend(of_budget(of, ask, budget));
    found
}

/// What the graphics processors here say to it; nothing when nobody asked them. A sparse model lies on one of them, a dense
/// one is shared out among all.
pub fn of_gpus(of: &Gguf, ask: &CheckRequest<'_>) -> Option<Finding> {
    let header = of.header();
    let gpus = ask.gpus?;
    let sparse = model::is_sparse(header);
    if gpus.is_empty() {
        let message = "this machine has no GPU, and a GPU build cannot load a sparse model without one";
        let hint = "use the CPU build: `--variant cpu`, and no `runtime.variant`";
        return sparse.then(|| error("runtime.variant", message, Some(hint)));
    }
    let (key, asked, used, who) = if sparse {
        ("runtime.vram_budget_gb", ask.policy.runtime.vram_budget_gb?, 1, "the largest GPU has")
    } else {
        let bytes = Some(dense_bytes_on_gpu(of, ask)).filter(|bytes| *bytes > 0)?;
        ("runtime.gpu_layers", gib(bytes), gpus.len(), "the GPUs have")
    };
    let room = |bytes: fn(&Gpu) -> u64| {
        let each = gpus.iter().map(bytes);
        gib(if sparse { each.max().unwrap_or(0) } else { each.fold(0, u64::saturating_add) })
    };
    let needed = asked + overhead_gib(ask.policy, header, used);
    let (all, free) = (room(|gpu| gpu.vram_bytes), room(|gpu| gpu.free_bytes));
    let message = format!("about {needed:.1} GiB of GPU memory are needed, and {who} {all:.1} GiB");
    if needed.is_finite() && needed > all {
        let hint = "lower it, `runtime.context_size`, `runtime.parallel` or `runtime.batch_size`";
        return Some(error(key, message, Some(hint)));
    }
    let hint = "lower it, or end what else uses the GPU";
    (needed > free).then(|| warning(key, format!("{message}, of which {free:.1} GiB are free now"), Some(hint)))
}

/// GPU memory that a process uses on `gpus` GPUs in addition to what a policy places there.
fn overhead_gib(policy: &Policy, header: &Header, gpus: usize) -> f64 {
    let quantised = header.tensors.iter().any(|tensor| !UNQUANTISED.contains(&tensor.kind));
    GPU_OVERHEAD_GIB[usize::from(quantised)] * gpus as f64 + gib(model::attention_bytes(policy, header))
}

/// A dense model's weights on the GPU, by the share of its layers, and its cache.
fn dense_bytes_on_gpu(of: &Gguf, ask: &CheckRequest<'_>) -> u64 {
    let header = of.header();
    let layers = header.block_count().unwrap_or(0).max(1);
    let share = ask.policy.runtime.gpu_layers.map_or(layers, |asked| u64::from(asked).min(layers));
    let all = of.size_bytes().saturating_add(model::cache_bytes(ask.policy, header));
    (u128::from(all) * u128::from(share) / u128::from(layers)) as u64
}

fn of_budget(of: &Gguf, ask: &CheckRequest<'_>, budget: Option<f64>) -> Option<Finding> {
    let header = of.header();
    const KEY: &str = "runtime.vram_budget_gb";
    let Some(budget) = budget else {
        let message = "without a budget no neuron of the model is placed on the GPU";
        let more = overhead_gib(ask.policy, header, 1);
        let hint = format!("set the GPU memory for neurons; the process uses {more:.1} GiB in addition");
        return Some(warning(KEY, message, Some(&hint)));
    };
    if !(0.0..=100_000.0).contains(&budget) {
        return Some(error(KEY, format!("{budget} is not a size in GiB"), None));
    }
    if model::neuron_budget(ask.policy, header, budget) > 0 {
        if of.beside.iter().any(|file| file.as_str().starts_with(&format!("{}/", launch::STATISTICS))) {
            let tensor = of_no_neuron_type(header, &["ffn_gate", "ffn_up"])?;
            let message = format!("{} must be F16 or Q4_0: a GPU computes no neurons of any other type", named(tensor));
            return Some(error(KEY, message, Some(&format!("{QUANTIZE_HINT}; or remove the budget"))));
        }
        let message = format!(
            "the model comes without `{}/`: it is not known which neurons are active often, so none is placed on the GPU, and answers take longer",
            launch::STATISTICS
        );
        let hint = format!("add `\"{}/**\"` to the model's `files`, when its repository has them", launch::STATISTICS);
        return Some(warning(KEY, message, Some(&hint)));
    }
    let message =
        format!("{budget} GiB leave no room for neurons after the data that must be there: none is placed on the GPU");
    Some(warning(KEY, message, Some("raise it, or lower `runtime.context_size` or `runtime.parallel`")))
}

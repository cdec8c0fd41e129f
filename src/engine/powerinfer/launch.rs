//! The command that serves one model, and the index that must lie beside it. Read against `examples/server/server.cpp` of
//! PowerInfer at commit d3ebd7c.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::base::fs;
use crate::base::platform::{Variant, executable};
use crate::engine::conversation::Sampling;
use crate::engine::gguf::Gguf;
use crate::engine::{EngineError, Launch, LaunchRequest};

use super::{SERVER, activation, chat, gpu_index, model, wire};

/// The model's name in the scratch folder. PowerInfer looks for `<this>.generated.gpuidx` beside it.
const MODEL: &str = "model.gguf";
/// The log that its server writes to its working folder (`LOG_DEFAULT_FILE_NAME` in its `common/log.h`), in addition to stderr.
const LOG: &str = "llama.log";
/// The folder beside a sparse model with a file for each layer: how often each neuron fired.
pub(super) const STATISTICS: &str = "activation";

/// The command. A sparse model on a GPU is reached through a link in the scratch folder, beside the index that [`prepare`]
/// makes there. What lies beside the model itself is thus never found: neither an index, which PowerInfer would trust, nor
/// statistics, with which it would run a program through a shell.
///
/// # Errors
/// When the policy asks for what cannot be sent.
pub(super) fn launch(of: &Gguf, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
    chat::has_template(ask.policy, of.header())?;
    wire::sampling(&Sampling::new(ask.policy, 0))?;
    let runtime = &ask.policy.runtime;
    let threads = model::threads(ask.policy, of.header(), ask.variant, ask.cores);
    let weights = if needs_index(of, ask) { ask.scratch.join(MODEL) } else { of.weights.clone() };
    let mut args: Vec<OsString> = vec!["-m".into(), weights.into(), "--host".into(), "127.0.0.1".into()];
    let mut add = |name: &str, value: String| args.extend([name.into(), value.into()]);
    add("--port", ask.endpoint.port.to_string());
    add("-a", wire::alias(&ask.endpoint.key));
    add("-t", threads.to_string());
    add("-tb", threads.to_string());
    add("-c", model::total_context(ask.policy, of.header()).to_string());
    add("-b", model::batch(ask.policy).to_string());
    add("-np", runtime.parallel.unwrap_or(1).to_string());
    if model::is_sparse(of.header()) {
        // Without a budget everything but the neurons goes to the GPU, as far as it fits.
        if let Some(budget) = runtime.vram_budget_gb.filter(|_| needs_index(of, ask)) {
            add("--vram-budget", budget.to_string());
        }
        if index_budget(of, ask) == 0 {
            args.push("--disable-gpu-index".into());
        }
    } else if model::on_gpu(ask.variant) {
        // More than a model has means all of it.
        add("-ngl", runtime.gpu_layers.unwrap_or(999).to_string());
    }
    Ok(Launch {
        program: ask.artifact.join("bin").join(executable(SERVER)),
        args,
        env: BTreeMap::new(),
        // It writes its log there.
        cwd: ask.scratch.to_owned(),
        files: BTreeMap::new(),
    })
}

/// Only builds for a GPU look for an index.
fn needs_index(of: &Gguf, ask: &LaunchRequest<'_>) -> bool {
    model::is_sparse(of.header()) && ask.variant != Variant::Cpu
}

/// GPU memory for neurons, in bytes.
fn index_budget(of: &Gguf, ask: &LaunchRequest<'_>) -> u64 {
    let budget = ask.policy.runtime.vram_budget_gb.filter(|_| needs_index(of, ask));
    budget.map_or(0, |budget| model::neuron_budget(ask.policy, of.header(), budget))
}

fn statistics_folder(of: &Gguf) -> PathBuf {
    fs::parent(&of.weights).join(STATISTICS)
}

/// Whether neurons are to go to the GPU.
pub(super) fn expects_neurons(of: &Gguf, ask: &LaunchRequest<'_>) -> bool {
    index_budget(of, ask) > 0 && fs::exists(&statistics_folder(of))
}

/// `llm_load_gpu_split` tells how much went there; when it refuses an index, that is nothing, and it goes on.
pub(super) fn offloaded(line: &str) -> Option<Result<(), EngineError>> {
    let (before, _) = line.split_once(" MiB of FFN weights to GPU")?;
    let mib: f64 = before.rsplit(' ').next()?.parse().ok()?;
    let why = || "PowerInfer put no neuron on the GPU: raise the budget by a little, or leave it out".to_owned();
    Some(if mib > 0.0 { Ok(()) } else { Err(EngineError::Policy { key: "runtime.vram_budget_gb", why: why() }) })
}

/// Makes the links and the index. A model without statistics gets none: its neurons then stay in main memory.
///
/// # Errors
/// When statistics are there and cannot be used, or the disk fails.
pub(super) fn prepare(of: &Gguf, ask: &LaunchRequest<'_>) -> Result<(), EngineError> {
    discard_log(&ask.scratch.join(LOG));
    if !needs_index(of, ask) {
        return Ok(());
    }
    let link = ask.scratch.join(MODEL);
    place(of, &link).map_err(|error| unusable(error.to_string()))?;
    if !expects_neurons(of, ask) {
        return Ok(());
    }
    let (folder, budget) = (statistics_folder(of), index_budget(of, ask));
    let layers = model::layers(of.header()).ok_or_else(|| unusable("the model lacks layers".to_owned()))?;
    let neurons: Vec<usize> = layers.iter().map(|layer| layer.neurons).collect();
    let sizes: Vec<u64> = layers.iter().map(|layer| layer.neuron_bytes).collect();
    let statistics = activation::read_all(&folder, &neurons).map_err(|error| unusable(error.to_string()))?;
    let index = gpu_index::to_bytes(&gpu_index::choose(&statistics, &sizes, budget), &neurons);
    let path = ask.scratch.join(format!("{MODEL}.generated.gpuidx"));
    fs::write_atomic(&path, &index).map_err(|error| unusable(error.to_string()))
}

/// Its log has no limit, and nobody reads it: stderr has the same lines. A link that cannot be made does not stop the start.
fn discard_log(log: &Path) {
    if cfg!(unix) && fs::remove_file(log).is_ok() {
        let _ = fs::symlink(Path::new("/dev/null"), log);
    }
}

/// A symbolic link where the system lets us make one; else what costs least.
fn place(of: &Gguf, link: &Path) -> Result<(), fs::FsError> {
    fs::remove_file(link)?;
    if fs::symlink(&of.weights, link).is_ok() {
        return Ok(());
    }
    fs::place(&of.weights, link).map(drop)
}

fn unusable(why: String) -> EngineError {
    EngineError::Policy { key: "runtime.vram_budget_gb", why: format!("the GPU index could not be made: {why}") }
}

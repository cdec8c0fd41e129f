//! PowerInfer on a real GPU: built for CUDA through our program, with a tiny sparse model and one of 1.1 billion weights under
//! two budgets. What counts: the index that we make is taken, neurons lie on the GPU, and the budget is kept.

use std::path::Path;
use std::time::Duration;

use xshell::{Shell, cmd};

use super::{Job, Result, Skip};
use crate::sparse::model::{TINY, Tiny};
use crate::sparse::{Engine, LARGE, Project};

pub const JOB: Job =
    Job { name: "powerinfer-cuda", about: "sparse models lie on a real GPU, within their budgets", run };

/// What a process takes beside its budget: the adapter warns of so much.
const OVERHEAD_MIB: f64 = 0.7 * 1024.0;
/// GPU memory for the large model, in GiB: next to nothing, some, and everything.
const BUDGETS_GIB: [f64; 4] = [0.0, 1.0, 1.5, 4.0];

fn run(sh: &Shell) -> Result<()> {
    let engine = Engine::powerinfer(sh)?;
    let Ok(gpu) = cmd!(sh, "nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader").read()
    else {
        return Err(Skip("`nvidia-smi` names no GPU".to_owned()).into());
    };
    println!("{gpu}\n{}", cmd!(sh, "nvcc --version").read()?);
    let architecture: String = gpu.rsplit(", ").next().unwrap_or_default().replace('.', "");
    let mut project = Project::new(sh, "powerinfer-cuda")?;
    project.add_model("tiny", &Tiny::new(&TINY, true), &policy(0.01))?;
    project.add_model("large", &Tiny::new(&LARGE, true), &policy(BUDGETS_GIB[0]))?;
    for budget in &BUDGETS_GIB[1..] {
        project.add_policy(&format!("large-{budget}"), "large", &policy(*budget))?;
    }
    let found = cmd!(sh, "cmake --version").quiet().ignore_stderr().read().is_ok();
    let variants =
        format!("[engines.powerinfer.variant.cuda]\ndefine = {{ CMAKE_CUDA_ARCHITECTURES = \"{architecture}\" }}");
    project.write_manifest(&engine, !found, &format!("{variants}\n[engines.powerinfer.variant.cpu]"))?;
    project.ours(&["sync"]).run()?;
    project.ours(&["check"]).run()?;
    println!("| model | budget | peak GPU memory | on the GPU by its own count | neurons of it | load | tokens/s |");
    println!("|---|---|---|---|---|---|---|");
    row(&project, sh, "tiny", 0.01)?;
    for budget in BUDGETS_GIB {
        let name = if budget == BUDGETS_GIB[0] { "large".to_owned() } else { format!("large-{budget}") };
        row(&project, sh, &name, budget)?;
    }
    Ok(())
}

fn policy(budget: f64) -> String {
    format!(
        "runtime: {{variant: cuda, vram_budget_gb: {budget}, threads: 8, context_size: 512}}\n\
         generation: {{temperature: 0, max_tokens: 64, chat_template: none}}"
    )
}

/// One answer, measured.
fn row(project: &Project<'_>, sh: &Shell, policy: &str, budget_gib: f64) -> Result<()> {
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (ran, peak) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| watch(&stop));
        let ran = project.json(&["run", policy, "--prompt", "hi there"]);
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        (ran, watcher.join().unwrap_or(None))
    });
    let (ran, peak) = (ran?, peak.ok_or("`nvidia-smi` tells no memory")?);
    let log = sh.read_file(project.folder.join(Path::new(".aitools")).join(format!("{policy}.log")))?;
    let said = |before: &str, after: &str| -> Option<f64> {
        log.lines().rev().find_map(|line| line.split_once(before)?.1.split_once(after)?.0.trim().parse().ok())
    };
    let neurons = said("offloaded ", " MiB of FFN weights to GPU").ok_or("the log does not tell of neurons")?;
    let used = said("total VRAM used: ", " MB").unwrap_or(0.0);
    let metrics = &ran["metrics"];
    let (load, rate) =
        (metrics["load_ms"].as_f64().unwrap_or(0.0), metrics["tokens_per_second"].as_f64().unwrap_or(0.0));
    println!("| {policy} | {budget_gib} GiB | {peak} MiB | {used} MiB | {neurons} MiB | {load:.0} ms | {rate:.1} |");
    if budget_gib > 0.0 && neurons <= 0.0 {
        return Err("no neuron went to the GPU".into());
    }
    if peak > budget_gib * 1024.0 + OVERHEAD_MIB {
        return Err("the process takes more than its budget and the overhead".into());
    }
    Ok(())
}

/// The most memory in use on the first GPU while somebody waits, over what was in use at first; in MiB.
fn watch(stop: &std::sync::atomic::AtomicBool) -> Option<f64> {
    let sh = Shell::new().ok()?;
    let used = || -> Option<f64> {
        let all = cmd!(sh, "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits").quiet().read().ok()?;
        all.lines().next()?.trim().parse().ok()
    };
    let idle = used()?;
    let mut peak = idle;
    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
        peak = used()?.max(peak);
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(peak - idle)
}

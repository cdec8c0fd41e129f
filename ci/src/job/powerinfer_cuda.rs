//! PowerInfer on a real GPU: built for CUDA through our program, with a tiny sparse model and one of 1.1 billion weights, also
//! quantised and with a long context, under several budgets. What counts: the index that we make is taken, neurons lie on the GPU, and the budget is kept.

use std::path::Path;
use std::time::Duration;

use xshell::{Shell, cmd};

use crate::sparse::model::{TINY, Tiny};
use crate::sparse::{Engine, LARGE, Project};
use crate::step::{Job, Result, Skip};

pub const JOB: Job =
    Job { name: "powerinfer-cuda", about: "sparse models lie on a real GPU, within their budgets", run };

/// Tokens that its server takes at once.
const BATCH: u32 = 512;

/// One answer to measure.
struct Row {
    policy: &'static str,
    model: &'static str,
    budget_gib: f64,
    context_size: u32,
    parallel: u32,
}

impl Row {
    const fn short(policy: &'static str, model: &'static str, budget_gib: f64) -> Self {
        Self { policy, model, budget_gib, context_size: 512, parallel: 1 }
    }

    fn text(&self) -> String {
        let Self { budget_gib, context_size, parallel, .. } = self;
        format!(
            "runtime: {{variant: cuda, vram_budget_gb: {budget_gib}, threads: 8, context_size: {context_size}, \
             parallel: {parallel}}}\ngeneration: {{temperature: 0, max_tokens: 64, chat_template: none}}"
        )
    }

    /// Attention of each head, for a batch of tokens to those of all contexts, in 4 bytes.
    fn attention_mib(&self) -> f64 {
        let tokens = f64::from(self.context_size) * f64::from(self.parallel);
        tokens * f64::from(BATCH) * LARGE.heads as f64 * 4.0 / f64::from(1 << 20)
    }

    /// What a process takes beside its budget, and beside what its context takes: the adapter warns of so much.
    fn overhead_mib(&self) -> f64 {
        let gib = if self.model.ends_with("q4") { 0.9 } else { 0.8 };
        gib * 1024.0
    }
}

/// Next to nothing, some, and everything on the GPU; the smallest weights, beside which most was taken; a long context.
const ROWS: [Row; 8] = [
    Row::short("tiny", "tiny", 0.01),
    Row::short("large", "large", 0.0),
    Row::short("large-1", "large", 1.0),
    Row::short("large-1.5", "large", 1.5),
    Row::short("large-4", "large", 4.0),
    Row::short("large-q4-small", "large-q4", 0.3),
    Row::short("large-q4", "large-q4", 0.4),
    // A cache of 1 GiB, and attention of 256 MiB.
    Row { context_size: 2048, parallel: 4, ..Row::short("large-long", "large", 2.0) },
];

const DERIVED: &str = r#"
[models.large-q4]
place = "models/powerinfer/large-q4"
weights = "model.gguf"
[models.large-q4.derive]
from = "large"
engine = "powerinfer"
quantize = "Q4_0"
"#;

fn run(sh: &Shell) -> Result<()> {
    let engine = Engine::powerinfer(sh)?;
    let Ok(gpu) = cmd!(sh, "nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader").read()
    else {
        return Err(Skip("`nvidia-smi` names no GPU".to_owned()).into());
    };
    println!("{gpu}\n{}", cmd!(sh, "nvcc --version").read()?);
    let architecture: String = gpu.rsplit(", ").next().unwrap_or_default().replace('.', "");
    let mut project = Project::new(sh, "powerinfer-cuda")?;
    project.add_model("tiny", &Tiny::new(&TINY, true), &ROWS[0].text())?;
    project.add_model("large", &Tiny::new(&LARGE, true), &ROWS[1].text())?;
    project.more = DERIVED.to_owned();
    for row in &ROWS[2..] {
        project.add_policy(row.policy, row.model, &row.text())?;
    }
    let found = cmd!(sh, "cmake --version").quiet().ignore_stderr().read().is_ok();
    let variants =
        format!("[engines.powerinfer.variant.cuda]\ndefine = {{ CMAKE_CUDA_ARCHITECTURES = \"{architecture}\" }}");
    project.write_manifest(&engine, !found, &format!("{variants}\n[engines.powerinfer.variant.cpu]"))?;
    project.ours(&["sync"]).run()?;
    project.ours(&["check"]).run()?;
    println!("| model | budget | peak GPU memory | on the GPU by its own count | neurons of it | load | tokens/s |");
    println!("|---|---|---|---|---|---|---|");
    let mut wrong = Vec::new();
    for row in &ROWS {
        wrong.extend(measured(&project, sh, row)?.into_iter().map(|what| format!("{}: {what}", row.policy)));
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}

/// One answer, measured, and what is wrong with it.
fn measured(project: &Project<'_>, sh: &Shell, row: &Row) -> Result<Vec<String>> {
    let Row { policy, budget_gib, .. } = *row;
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
    let mut wrong = Vec::new();
    if budget_gib > 0.0 && neurons <= 0.0 {
        wrong.push("no neuron went to the GPU".to_owned());
    }
    let allowed = budget_gib * 1024.0 + row.overhead_mib() + row.attention_mib();
    if peak > allowed {
        wrong.push(format!("the process took {peak} MiB, which is more than the {allowed:.0} MiB that were estimated"));
    }
    Ok(wrong)
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

//! One answer of a sparse model: our `run`, and PowerInfer's own `main` with the same model, prompt, threads and sampling.
//!
//! Ours starts its server, asks and ends it; `main` does everything in one process. One thread, so that both make the same
//! tokens.

use std::process::Command;

use super::ground::Ground;
use super::measure::{Contender, Sample, Series, interleave, measure_with_words};
use super::{Bench, Run};
use crate::sparse::model::{Shape, Tiny};
use crate::sparse::{Engine, Project};
use crate::step::Result;

pub const BENCH: Bench = Bench {
    name: "powerinfer",
    about: "one answer of a sparse model",
    rounds: 7,
    warm_up: true,
    run: Run::Processes(run),
};

/// 170 MB: a token takes milliseconds, as with models that are of use.
const SHAPE: Shape = Shape { layers: 8, width: 768, neurons: 4096, rank: 128, heads: 12, context: 1024 };
const TOKENS: &str = "200";

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let mut project = Project::new(ground.sh, "powerinfer-bench")?;
    let policy = format!(
        "runtime: {{variant: cpu, threads: 1, context_size: 512}}\n\
         generation: {{temperature: 0, max_tokens: {TOKENS}, chat_template: none}}"
    );
    project.add_model("sparse", &Tiny::new(&SHAPE, true), &policy)?;
    project.write_manifest(&Engine::powerinfer(ground.sh)?, true, "targets = [\"main\", \"server\"]")?;
    project.ours(&["sync"]).run()?;
    let (main, model) = (project.program("main"), project.folder.join("models/powerinfer/sparse/model.gguf"));
    let scratch = ground.folder("main")?;
    let by_hand = move || {
        let mut command = Command::new(&main);
        // It reads special tokens in a prompt, so it does not put the space before that the server puts there.
        command.arg("-m").arg(&model).args(["-p", " hi", "-n", TOKENS, "-t", "1", "-c", "512", "-b", "512"]);
        command.args(["--temp", "0", "--repeat-penalty", "1"]).current_dir(&scratch);
        command
    };
    let ours = || Command::from(project.ours(&["run", "sparse", "--prompt", "hi", "--json"]));
    let contenders = &mut [
        contender("aitools run", || rated(ours(), |out, _| rate_of_ours(out))),
        contender("PowerInfer's main", || rated(by_hand(), |_, err| rate_of_main(err))),
    ];
    interleave(contenders, bench.warm_up, rounds)
}

fn contender<'a>(name: &str, run: impl FnMut() -> Result<Sample> + 'a) -> Contender<'a> {
    Contender { name: name.to_owned(), prepare: Box::new(|| Ok(())), run: Box::new(run) }
}

fn rated(command: Command, rate: fn(&str, &str) -> Option<f64>) -> Result<Sample> {
    let (sample, out, err) = measure_with_words(command)?;
    let rate = rate(&out, &err).ok_or_else(|| format!("no rate in\n{out}\n{err}"))?;
    Ok(Sample { tokens_per_s: Some(rate), ..sample })
}

/// By the engine's clock in both.
fn rate_of_ours(out: &str) -> Option<f64> {
    serde_json::from_str::<serde_json::Value>(out).ok()?["result"]["metrics"]["engine_tokens_per_second"].as_f64()
}

/// `llama_print_timings:        eval time = … (   2.61 ms per token,   383.14 tokens per second)`.
fn rate_of_main(err: &str) -> Option<f64> {
    let line = err.lines().find(|line| line.contains("llama_print_timings:        eval time"))?;
    line.rsplit_once(',')?.1.split_whitespace().next()?.parse().ok()
}

//! The README's first command, word for word: from a checkout to an answer of a real model on a real engine.
//! Then what a person would look at next: nothing is left to do, and everything on disk is what the lockfile says.
//!
//! It uses the cache folder of the machine (or `AITOOLS_CACHE_DIR`), so a second run builds nothing.

use std::time::Instant;

use xshell::{Shell, cmd};

use crate::quickstart::{POLICY, PROMPT, program};
use crate::step::{Job, Result, cargo};

pub const JOB: Job = Job { name: "quickstart", about: "the README's first command answers", run };

const EXPECTED: &str = "Paris";

fn run(sh: &Shell) -> Result<()> {
    let answer =
        cargo(sh, "run --release --locked -- -m quickstart run").args([POLICY, "--sync", "--prompt", PROMPT]).read()?;
    println!("{answer}");
    if !answer.contains(EXPECTED) {
        return Err(format!("the answer does not name {EXPECTED}").into());
    }
    let aitools = program();
    cmd!(sh, "{aitools} -m quickstart lock --check").run()?;
    let begun = Instant::now();
    cmd!(sh, "{aitools} -m quickstart sync --locked --offline").run()?;
    println!("a sync with nothing to do took {:.0} ms", begun.elapsed().as_secs_f64() * 1000.0);
    cmd!(sh, "{aitools} -m quickstart verify").run()?;
    cmd!(sh, "{aitools} -m quickstart test").run()?;
    real_engine(sh)
}

/// The adapter's own tests, with the engine and the weights that are there now.
fn real_engine(sh: &Shell) -> Result<()> {
    let root = crate::step::root();
    let server = root.join("build/llama-cpp/bin").join(format!("llama-server{}", std::env::consts::EXE_SUFFIX));
    let weights = root.join("models/llama-cpp").join(POLICY).join("model.gguf");
    let _server = sh.push_env("AITOOLS_TEST_LLAMA_SERVER", server);
    let _weights = sh.push_env("AITOOLS_TEST_WEIGHTS", weights);
    // One engine at a time: each uses all processors.
    cargo(sh, "test --workspace --locked --test engine_real -- --ignored --test-threads=1").run()?;
    Ok(())
}

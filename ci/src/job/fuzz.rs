//! Search for inputs that break a parser, guided by coverage: cargo-fuzz (libFuzzer) for a minute a target. What the short run
//! in `tests/fuzz.rs` feeds is the same, without the guidance.

use std::time::Instant;

use xshell::{Shell, cmd};

use crate::step::{Job, Result, Skip};

pub const JOB: Job = Job { name: "fuzz", about: "cargo-fuzz finds no input that breaks a parser", run };

/// Seconds for each target, unless `AITOOLS_FUZZ_SECONDS` says otherwise.
const SECONDS: &str = "60";

fn run(sh: &Shell) -> Result<()> {
    if cmd!(sh, "cargo +nightly fuzz --version").quiet().ignore_stderr().read().is_err() {
        let how = "run `rustup toolchain install nightly` and `cargo install cargo-fuzz`";
        return Err(Skip(format!("cargo-fuzz or a nightly toolchain is missing: {how}")).into());
    }
    let seconds = sh.var("AITOOLS_FUZZ_SECONDS").unwrap_or_else(|_| SECONDS.to_owned());
    let targets = cmd!(sh, "cargo +nightly fuzz list").quiet().read()?;
    println!("| target | executions | seconds |\n|---|---|---|");
    for target in targets.lines() {
        let corpus = sh.current_dir().join("target/fuzz-corpus").join(target);
        let seeds = sh.current_dir().join("fuzz/corpus").join(target);
        sh.create_dir(&corpus)?;
        let began = Instant::now();
        // What it finds that is new goes to the first folder, under `target/`.
        let options = ["-max_len=8192", "-rss_limit_mb=2048", "-timeout=20", "-print_final_stats=1"];
        let limit = format!("-max_total_time={seconds}");
        let ran = cmd!(sh, "cargo +nightly fuzz run {target} {corpus} {seeds} -- {limit} {options...}")
            .quiet()
            .ignore_status()
            .output()?;
        let said = String::from_utf8_lossy(&ran.stderr);
        let count = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:")).unwrap_or("?");
        println!("| {target} | {} | {:.0} |", count.trim(), began.elapsed().as_secs_f64());
        if !ran.status.success() {
            let tail: Vec<&str> = said.lines().rev().take(30).collect();
            return Err(tail.into_iter().rev().collect::<Vec<_>>().join("\n").into());
        }
    }
    Ok(())
}

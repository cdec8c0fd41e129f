//! Runs jobs one after the other under a heading each, stops at the first that fails, and sums up.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use xshell::{Cmd, Shell, cmd};

/// One thing that can pass or fail.
#[derive(Debug)]
pub struct Job {
    pub name: &'static str,
    /// What passing means.
    pub about: &'static str,
    pub run: fn(&Shell) -> Result<()>,
}

/// What a job says, as its error, when this machine lacks what it needs.
#[derive(Debug)]
pub struct Skip(pub String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// An error is words for a person who reads the log.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Cargo as a person starts it. What the cargo that started us says of our own crate would make build scripts run again.
pub fn cargo<'a>(sh: &'a Shell, words: &str) -> Cmd<'a> {
    const OURS: &[&str] = &["NAME", "VERSION", "VERSION_MAJOR", "VERSION_MINOR", "VERSION_PATCH", "VERSION_PRE"];
    let cargo = cmd!(sh, "cargo").args(words.split_whitespace()).env_remove("CARGO_MANIFEST_DIR");
    OURS.iter().fold(cargo, |cargo, name| cargo.env_remove(format!("CARGO_PKG_{name}")))
}

/// The repository.
pub fn root() -> PathBuf {
    // Cargo says where the crate is now; the program may have been built elsewhere.
    let now = Shell::new().and_then(|sh| sh.var("CARGO_MANIFEST_DIR"));
    let crate_dir = PathBuf::from(now.unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned()));
    crate_dir.parent().map(Path::to_owned).unwrap_or(crate_dir)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Skipped,
}

impl Verdict {
    fn as_str(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

pub fn run(sh: &Shell, jobs: &[&Job]) -> ExitCode {
    let started = Instant::now();
    let mut verdicts: Vec<(&str, Verdict, Duration)> = Vec::new();
    for job in jobs {
        if verdicts.iter().any(|(_, verdict, _)| *verdict == Verdict::Failed) {
            verdicts.push((job.name, Verdict::Skipped, Duration::ZERO));
            continue;
        }
        println!("\n=== {}: {}", job.name, job.about);
        let begun = Instant::now();
        let verdict = match (job.run)(sh) {
            Ok(()) => Verdict::Passed,
            Err(error) if error.is::<Skip>() => {
                println!("skipped: {error}");
                Verdict::Skipped
            }
            Err(error) => {
                println!("error: {error}");
                Verdict::Failed
            }
        };
        verdicts.push((job.name, verdict, begun.elapsed()));
    }
    println!();
    for (name, verdict, took) in &verdicts {
        println!("{name:<12} {:<8} {:>7.1} s", verdict.as_str(), took.as_secs_f64());
    }
    println!("elapsed: {:.1} s", started.elapsed().as_secs_f64());
    let (line, code) = summary(verdicts.iter().map(|(_, verdict, _)| *verdict));
    println!("{line}");
    code
}

fn summary(verdicts: impl Iterator<Item = Verdict> + Clone) -> (String, ExitCode) {
    let count = |which| verdicts.clone().filter(|verdict| *verdict == which).count();
    let failed = count(Verdict::Failed);
    let line = format!("{} passed, {failed} failed, {} skipped", count(Verdict::Passed), count(Verdict::Skipped));
    (line, if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Job = Job { name: "good", about: "does nothing", run: |_| Ok(()) };
    const BAD: Job = Job { name: "bad", about: "fails", run: |_| Err("as it should".into()) };
    const NEVER: Job = Job { name: "never", about: "comes after a failure", run: |_| panic!("it ran") };

    #[test]
    fn the_first_failure_ends_the_run() {
        let sh = Shell::new().unwrap();
        assert_eq!(run(&sh, &[&GOOD, &BAD, &NEVER]), ExitCode::FAILURE);
        assert_eq!(run(&sh, &[&GOOD]), ExitCode::SUCCESS);
    }

    #[test]
    fn a_job_that_cannot_run_here_is_no_failure() {
        const UNABLE: Job =
            Job { name: "unable", about: "lacks a machine", run: |_| Err(Skip("no GPU".into()).into()) };
        let sh = Shell::new().unwrap();
        assert_eq!(run(&sh, &[&UNABLE, &GOOD]), ExitCode::SUCCESS);
    }

    #[test]
    fn the_closing_line_sums_up() {
        let (line, _) = summary([Verdict::Passed, Verdict::Passed, Verdict::Failed, Verdict::Skipped].into_iter());
        assert_eq!(line, "2 passed, 1 failed, 1 skipped");
    }
}

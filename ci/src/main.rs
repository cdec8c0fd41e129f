//! The project's own automation, behind the alias `cargo ci`. Without an argument it does everything CI does.
//!
//! Nothing here is part of the tool that people install, and nothing there knows of this crate.
#![expect(clippy::print_stdout, reason = "a program for a terminal and a log")]

mod bench;
mod job;
mod quickstart;
mod server;
mod sparse;
mod step;
#[cfg(test)]
mod tidy;

use std::process::ExitCode;

use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Parser, Subcommand};
use xshell::Shell;

use step::Job;

/// The project's checks, tests and measurements.
#[derive(Debug, Parser)]
#[command(name = "cargo ci")]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything CI runs, in order: what no argument means
    All,
    /// Formatting, lints and the tidy rules
    Check,
    /// Every test
    Test,
    /// The real thing, from nothing to an answer
    E2e {
        /// Which one; `quickstart` when not given
        #[arg(value_parser = names(job::E2E))]
        name: Option<String>,
    },
    /// Measurements of our program and its peers, in turn; judges nothing
    Bench {
        /// Which ones; all when not given
        #[arg(value_parser = bench_names())]
        names: Vec<String>,
        /// Measured rounds, instead of each benchmark's own number
        #[arg(short, long)]
        rounds: Option<usize>,
    },
}

fn bench_names() -> PossibleValuesParser {
    bench::BENCHES.iter().map(|bench| PossibleValue::new(bench.name).help(bench.about)).collect::<Vec<_>>().into()
}

fn names(jobs: &[Job]) -> PossibleValuesParser {
    jobs.iter().map(|job| PossibleValue::new(job.name).help(job.about)).collect::<Vec<_>>().into()
}

impl Command {
    fn run(&self, sh: &Shell) -> ExitCode {
        let jobs: Vec<&Job> = match self {
            Self::All => job::CHECK.iter().chain(job::TEST).chain(&job::E2E[..job::ALWAYS]).collect(),
            Self::Check => job::CHECK.iter().collect(),
            Self::Test => job::TEST.iter().collect(),
            Self::E2e { name: None } => job::E2E.first().into_iter().collect(),
            Self::E2e { name: Some(name) } => job::E2E.iter().filter(|job| job.name == name).collect(),
            Self::Bench { names, rounds } => return bench::run(sh, names, *rounds),
        };
        step::run(sh, &jobs)
    }
}

fn main() -> ExitCode {
    let command = Args::parse().command.unwrap_or(Command::All);
    match Shell::new() {
        Ok(sh) => {
            sh.change_dir(step::root());
            command.run(&sh)
        }
        Err(error) => {
            println!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

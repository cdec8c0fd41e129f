//! Benchmarks: ours and named peers, in the same run. They measure and tell; they never judge.
//!
//! A new benchmark is one file and one line in [`BENCHES`].

mod build;
mod download;
mod figure;
mod gpu_index;
mod ground;
mod help;
mod measure;
mod noop_sync;
mod powerinfer;
mod run;
mod serve;
mod verify;

use std::process::ExitCode;

use xshell::Shell;

use crate::step::Result;
use figure::Figure;
use ground::Ground;
use measure::Series;

#[derive(Debug)]
pub struct Bench {
    pub name: &'static str,
    pub about: &'static str,
    /// How many measured rounds, when nothing else is asked for.
    rounds: usize,
    /// Whether an unmeasured round comes first.
    warm_up: bool,
    run: Run,
}

/// What a benchmark measures, in so many rounds.
#[derive(Debug)]
enum Run {
    /// Whole processes.
    Processes(fn(&Ground<'_>, &Bench, usize) -> Result<Vec<Series>>),
    /// Something else.
    Figures(fn(&Ground<'_>, usize) -> Result<Vec<Figure>>),
}

pub const BENCHES: &[Bench] = &[
    help::BENCH,
    noop_sync::BENCH,
    run::BENCH,
    serve::BENCH,
    powerinfer::BENCH,
    gpu_index::BENCH,
    download::BENCH,
    download::THROTTLED,
    download::MEMORY,
    verify::BENCH,
    build::BENCH,
];

/// The benchmarks of these names, or all. One that cannot be taken does not stop the others, but fails the run.
pub fn run(sh: &Shell, names: &[String], rounds: Option<usize>) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for bench in BENCHES.iter().filter(|bench| names.is_empty() || names.iter().any(|name| name == bench.name)) {
        println!("\n=== {}: {}", bench.name, bench.about);
        if let Err(error) = measure(sh, bench, rounds) {
            println!("error: {error}");
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// Measures, prints a table, and writes `target/bench/<name>.json`.
fn measure(sh: &Shell, bench: &Bench, rounds: Option<usize>) -> Result<()> {
    let ground = Ground::new(sh, bench.name)?;
    let rounds = rounds.unwrap_or(bench.rounds);
    let (mut series, mut figures) = (Vec::new(), Vec::new());
    match bench.run {
        Run::Processes(run) => {
            series = run(&ground, bench, rounds)?;
            print!("{}", table(&series));
        }
        Run::Figures(run) => {
            figures = run(&ground, rounds)?;
            print!("{}", figure::table(&figures));
        }
    }
    let file = ground.results().join(format!("{}.json", bench.name));
    let result = serde_json::json!({
        "bench": bench.name,
        "about": bench.about,
        "rounds": rounds,
        "machine": ground::machine(sh),
        "floor_bytes": ground::own_peak_bytes(sh),
        "series": series,
        "figures": figures,
    });
    sh.write_file(&file, format!("{result:#}\n"))?;
    println!("written to {}", file.display());
    Ok(())
}

fn table(series: &[Series]) -> String {
    let head =
        ["", "wall ms", "min", "max", "cpu ms", "first byte ms", "tokens/s", "tail ms", "peak MiB", "first/this"]
            .map(str::to_owned);
    let mut rows = vec![head];
    for series in series {
        let value = |key: &str, pick: fn(&measure::Spread) -> f64, scale: f64| {
            series.summary.get(key).map_or_else(String::new, |spread| format!("{:.1}", pick(spread) * scale))
        };
        rows.push([
            series.name.clone(),
            value("wall_s", |spread| spread.median, 1e3),
            value("wall_s", |spread| spread.min, 1e3),
            value("wall_s", |spread| spread.max, 1e3),
            value("cpu_s", |spread| spread.median, 1e3),
            value("first_output_s", |spread| spread.median, 1e3),
            value("tokens_per_s", |spread| spread.median, 1.0),
            value("tail_s", |spread| spread.median, 1e3),
            value("peak_rss_bytes", |spread| spread.median, 1.0 / f64::from(1 << 20)),
            series.first_over_this.map_or_else(String::new, |ratio| format!("{:.3}", ratio.median)),
        ]);
    }
    aligned(&rows)
}

/// A table: the first column to the left, the others to the right.
fn aligned<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let widths: Vec<usize> =
        (0..COLUMNS).map(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0)).collect();
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells
            .map(|(at, (cell, width))| if at == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
        cells.collect::<Vec<_>>().join("  ") + "\n"
    };
    rows.iter().map(line).collect()
}

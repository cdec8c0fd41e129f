//! Kills and faults: the real program is killed at random moments and at system calls, and gets errors from the system. After each
//! fault, what is on disk is hashed here and compared with an undisturbed run, and the command is run again.
//!
//! It runs on Linux and needs `strace`. `faketime` is used where it is installed.

mod conditions;
mod process;
mod round;
mod scenario;
mod snapshot;
mod table;
mod trace;
mod world;

use std::path::{Path, PathBuf};
use std::time::Duration;

use xshell::{Shell, cmd};

use crate::step::{Job, Result, Skip, cargo};
use round::{Fault, Round};
use scenario::{SCENARIOS, Scenario};
use table::Table;
use trace::{CHANGES, ERRORS};
use world::World;

pub const JOB: Job = Job { name: "faults", about: "kills and errors of the system leave no wrong bytes", run };

/// Names of scenarios, with commas between them, or `conditions`: what is tried when not everything is.
const ONLY: &str = "AITOOLS_TEST_FAULTS";
/// How many kills the job promises.
const KILLS: usize = 1000;

fn run(sh: &Shell) -> Result<()> {
    need(sh)?;
    let root = crate::step::root();
    // Not a release build: this one also checks its own assertions and arithmetic.
    cargo(sh, "build --locked --bin aitools").run()?;
    let tools = world::tools(sh, &root.join("target/e2e/faults"))?;
    let place = place(sh, &root)?;
    let world = World::new(sh, &place, &root.join("target/debug/aitools"), &tools)?;
    world.must(sh, &["sync"])?;
    world.must(sh, &["run", "p", "--prompt", "x"])?;
    world.keep(sh)?;
    let mut table = Table::default();
    let only = sh.var(ONLY).unwrap_or_default();
    let is_wanted = |name: &str| only.is_empty() || only.split(',').any(|wanted| wanted == name);
    for scenario in SCENARIOS.iter().filter(|scenario| is_wanted(scenario.name)) {
        disturb(sh, &world, scenario, &mut table)?;
    }
    if is_wanted("conditions") {
        conditions::full_disk(sh, &world, &mut table)?;
        conditions::clocks(sh, &world, &mut table)?;
    }
    table.print();
    if table.failures > 0 {
        return Err(format!("{} faults did harm", table.failures).into());
    }
    sh.remove_path(&place)?;
    if only.is_empty() && table.kills < KILLS {
        return Err(format!("only {} kills", table.kills).into());
    }
    Ok(())
}

/// An empty folder for the world: in memory where programs can be started there, so that no time goes into waiting for a disk.
fn place(sh: &Shell, root: &Path) -> Result<PathBuf> {
    let below = |folder: &Path| -> Result<PathBuf> {
        let place = folder.join("aitools-faults");
        sh.remove_path(&place)?;
        let probe = sh.create_dir(&place)?.join("probe");
        sh.copy_file("/bin/true", &probe)?;
        cmd!(sh, "{probe}").quiet().ignore_stderr().run()?;
        Ok(place)
    };
    below(Path::new("/dev/shm")).or_else(|_| below(&root.join("target/e2e")))
}

fn need(sh: &Shell) -> Result<()> {
    if cmd!(sh, "strace --version").quiet().ignore_stdout().ignore_stderr().run().is_err() {
        return Err(Skip("it needs the program `strace`, which is not here".to_owned()).into());
    }
    Ok(())
}

/// Every fault of one command.
fn disturb(sh: &Shell, world: &World, scenario: &'static Scenario, table: &mut Table) -> Result<()> {
    world.restore(sh)?;
    let mut round = Round::new(sh, world, scenario)?;
    let (kills, errors) = scenario.most;
    let mut faults: Vec<Fault> = Vec::new();
    faults.extend(trace::spread(&round.places(CHANGES)?, kills).into_iter().map(Fault::KillAt));
    for (error, calls) in ERRORS {
        let places = trace::spread(&round.places(calls)?, errors).into_iter();
        // In turn: one call fails, or all from there on. Of `run`, the calls that wake threads would fail, too, and those that ask
        // whether the engine is ready, which goes on for minutes: there it is one.
        let alone = |call: &str| scenario.name == "run" && ["write", "socket"].contains(&call);
        let on = |index: usize, call: &str| index % 2 == 1 && !alone(call);
        faults.extend(places.enumerate().map(|(index, place)| {
            let on = on(index, &place.0);
            Fault::Error(error, place, on)
        }));
    }
    let longest = round.took.mul_f64(1.1);
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    for _ in 0..scenario.random_kills {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let share = f64::from(u32::try_from(random >> 32).unwrap_or(0)) / f64::from(u32::MAX);
        faults.push(Fault::KillAfter(Duration::from_secs_f64(longest.as_secs_f64() * share)));
    }
    println!("{}: {} faults, {:.0} ms undisturbed", scenario.name, faults.len(), round.took.as_secs_f64() * 1000.0);
    let begun = std::time::Instant::now();
    for fault in &faults {
        match round.disturb(fault) {
            Ok(Some(outcome)) => table.add(scenario.name, &fault.name(), outcome),
            Ok(None) => {}
            Err(harm) => {
                println!("harm: {harm}\n");
                table.failures += 1;
                world.restore(sh)?;
                round = Round::new(sh, world, scenario)?;
            }
        }
    }
    println!("  {:.1} s, {} leftovers", begun.elapsed().as_secs_f64(), round.leftovers);
    Ok(())
}

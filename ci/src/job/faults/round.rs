//! One fault: the world is made ready, a command is disturbed, what it left is judged, and the command is run again.

use std::collections::BTreeMap;
use std::time::Duration;

use xshell::Shell;

use super::process::{Ended, must_be_gone, run};
use super::scenario::Scenario;
use super::snapshot::Snapshot;
use super::table::Outcome;
use super::trace::{self, Place};
use super::world::World;
use crate::step::Result;

/// How a program ends whose libraries could not be loaded.
const LOADER: i32 = 127;

/// The runtime wakes its threads by writing to an eventfd, which fails in no real system.
const WAKE: &str = "failed to wake I/O driver";

/// What disturbs a command.
#[derive(Debug, Clone)]
pub enum Fault {
    KillAfter(Duration),
    KillAt(Place),
    /// The error, where, and whether every later call gets it, too.
    Error(&'static str, Place, bool),
}

impl Fault {
    /// How the table calls it.
    pub fn name(&self) -> String {
        match self {
            Self::KillAfter(_) => "kill at random".to_owned(),
            Self::KillAt((call, _)) => format!("kill at {call}"),
            Self::Error(error, (call, _), false) => format!("{error} of {call}"),
            Self::Error(error, (call, _), true) => format!("{error} of {call}, on"),
        }
    }
}

/// States before and after an undisturbed run, by the version that it ends in.
#[derive(Debug)]
pub struct Round<'a> {
    pub sh: &'a Shell,
    pub world: &'a World,
    pub scenario: &'static Scenario,
    /// By version.
    known: BTreeMap<u8, (Snapshot, Snapshot)>,
    /// How long an undisturbed run takes at least.
    pub took: Duration,
    /// What killed runs left, and undisturbed ones after them did not remove.
    pub leftovers: usize,
}

impl<'a> Round<'a> {
    /// Runs the command without faults, for every version.
    pub fn new(sh: &'a Shell, world: &'a World, scenario: &'static Scenario) -> Result<Self> {
        let mut round = Self { sh, world, scenario, known: BTreeMap::new(), took: Duration::MAX, leftovers: 0 };
        // The first ones bring what stays from then on, such as what was kept of an earlier version.
        for _ in 0..4 {
            (scenario.prepare)(sh, world)?;
            let start = Snapshot::take(sh, &world.root)?;
            round.took = round.took.min(world.must(sh, scenario.args)?.took);
            let end = Snapshot::take(sh, &world.root)?;
            round.known.insert(round.version()?, (start, end));
        }
        Ok(round)
    }

    fn version(&self) -> Result<u8> {
        if self.scenario.alternates { self.world.version(self.sh) } else { Ok(0) }
    }

    /// Where the command calls the system.
    pub fn places(&self, calls: &[&str]) -> Result<std::collections::BTreeSet<Place>> {
        (self.scenario.prepare)(self.sh, self.world)?;
        trace::places(self.sh, self.world, self.scenario.args, calls)
    }

    /// None when the fault never came.
    pub fn disturb(&mut self, fault: &Fault) -> Result<Option<Outcome>> {
        (self.scenario.prepare)(self.sh, self.world)?;
        let log = self.world.place.join("injected.txt");
        let (before, after) = match fault {
            Fault::KillAfter(after) => (Vec::new(), Some(*after)),
            Fault::KillAt(place) => (trace::fault(&log, place, "signal=SIGKILL", false), None),
            Fault::Error(error, place, on) => (trace::fault(&log, place, &format!("error={error}"), *on), None),
        };
        let mut command = self.world.command(&before, self.scenario.args);
        let ended = run(self.sh, &self.world.place, &mut command, after)?;
        let came = match fault {
            Fault::KillAfter(_) => ended.is_killed(),
            Fault::KillAt(_) if ended.is_killed() => true,
            _ => trace::came(self.sh, &log)?,
        };
        // Else our program never began.
        let came = came && ended.status.code() != Some(LOADER);
        let judged = self.judge(fault, &ended).and_then(|()| self.recover());
        judged.map_err(|error| {
            format!("`{}`, {fault:?}: {error}\nthe disturbed command: {}", self.scenario.args.join(" "), ended.words())
        })?;
        let outcome = ended.status.code().map_or(Outcome::Killed, Outcome::Ended);
        Ok(came.then_some(outcome))
    }

    fn judge(&self, fault: &Fault, ended: &Ended) -> Result<()> {
        must_be_gone(self.sh, &self.world.root)?;
        let snapshot = Snapshot::take(self.sh, &self.world.root)?;
        let (start, end) = self.known.get(&self.version()?).ok_or("this version is not known")?;
        let mut wrong = snapshot.wrong_between(start, end);
        wrong.extend(snapshot.wrong_records(self.sh, &self.world.root)?);
        wrong.extend(self.cut_metrics()?);
        if let Some(code) = ended.status.code() {
            wrong.extend(wrong_words(code, &ended.stderr, matches!(fault, Fault::Error(_, _, true))));
            // What cannot be read is damaged, in the words of `verify` alone.
            if code == 3 && self.scenario.args[0] != "verify" {
                wrong.push("an error of the system is taken for damage".to_owned());
            }
            if code == 0 {
                wrong.extend(snapshot.differences(end));
            }
            if code == 0 && self.scenario.name == "run" && !ended.stdout.contains("Paris") {
                wrong.push("success without an answer".to_owned());
            }
        }
        hold(&wrong)
    }

    /// Lines of metrics that are not whole.
    fn cut_metrics(&self) -> Result<Vec<String>> {
        let path = self.world.project().join(".aitools/generations.jsonl");
        let text = if path.exists() { self.sh.read_file(path)? } else { String::new() };
        let is_cut = |line: &&str| serde_json::from_str::<serde_json::Value>(line).is_err();
        Ok(text.lines().filter(is_cut).map(|line| format!("a line of metrics is cut: {line}")).collect())
    }

    /// The same command without a fault ends where it would have ended.
    fn recover(&mut self) -> Result<()> {
        self.world.must(self.sh, self.scenario.args)?;
        must_be_gone(self.sh, &self.world.root)?;
        let snapshot = Snapshot::take(self.sh, &self.world.root)?;
        let (_, end) = self.known.get(&self.version()?).ok_or("this version is not known")?;
        let mut wrong = snapshot.differences(end);
        wrong.extend(snapshot.wrong_records(self.sh, &self.world.root)?);
        for left in &snapshot.leftovers {
            self.leftovers += 1;
            self.sh.remove_path(self.world.root.join(left))?;
        }
        hold(&wrong)
    }
}

fn hold(wrong: &[String]) -> Result<()> {
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n  ").into()) }
}

/// An exit code that no failure of the system has, or words that do not say what failed. When every write fails, nothing can be said.
fn wrong_words(code: i32, stderr: &str, may_be_silent: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    if code == LOADER && stderr.contains("loading shared libraries") {
        return wrong;
    }
    if stderr.contains(WAKE) {
        return wrong;
    }
    if ![0, 1, 3, 4, 5, 7, 8].contains(&code) {
        wrong.push(format!("exit code {code}"));
    }
    if stderr.contains("panicked") {
        wrong.push("a panic".to_owned());
    }
    if code != 0 && !stderr.contains("error") && !may_be_silent {
        wrong.push("a failure without an error message".to_owned());
    }
    wrong
}

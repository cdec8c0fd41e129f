//! What was done, counted.

use std::collections::BTreeMap;

/// How a fault ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The command itself, or one of its processes, was killed.
    Killed,
    /// It ended with this exit code.
    Ended(i32),
}

#[derive(Debug, Default)]
pub struct Table {
    counts: BTreeMap<(String, String), BTreeMap<String, usize>>,
    pub kills: usize,
    pub errors: usize,
    /// Faults that did harm.
    pub failures: usize,
}

impl Table {
    pub fn add(&mut self, command: &str, fault: &str, outcome: Outcome) {
        let is_kill = fault.starts_with("kill");
        *(if is_kill { &mut self.kills } else { &mut self.errors }) += 1;
        let how = match outcome {
            Outcome::Killed => "killed".to_owned(),
            Outcome::Ended(code) => format!("exit {code}"),
        };
        *self.counts.entry((command.to_owned(), fault.to_owned())).or_default().entry(how).or_default() += 1;
    }

    pub fn print(&self) {
        println!("\n{:<16} {:<24} {:>5}  how the command ended", "command", "fault", "times");
        for ((command, fault), ends) in &self.counts {
            let times: usize = ends.values().sum();
            let ends: Vec<String> = ends.iter().map(|(how, times)| format!("{how}: {times}")).collect();
            println!("{command:<16} {fault:<24} {times:>5}  {}", ends.join(", "));
        }
        println!("{} kills and {} other faults", self.kills, self.errors);
    }
}

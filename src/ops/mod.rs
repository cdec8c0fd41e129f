//! Layer 5: one file per verb. Orchestration: reads the project, asks sources, store, plan, build and engines, and gives a
//! result that `cli/` words.
//!
//! Invariant: nothing here parses, prints, reads the environment or picks an exit code. `run` never writes the lockfile.

pub mod answer;
pub mod build;
pub mod bundle;
pub mod cache;
pub mod chat;
pub mod check;
pub mod ci;
pub mod demand;
pub mod derive;
pub mod diff;
pub mod diffoscope;
pub mod doctor;
pub mod edited;
pub mod evidence;
pub mod export;
pub mod failure;
pub mod fetch;
pub mod host;
pub mod init;
pub mod install;
pub mod lock;
pub mod project;
pub mod proven;
pub mod python;
pub mod ready;
pub mod remote;
pub mod reproduce;
pub mod run;
pub mod serve;
pub mod status;
pub mod survey;
pub mod sync;
pub mod test;
pub mod verify;

/// What became of a step of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// It is done.
    Done,
    /// Something that the plan relied on is damaged or gone, and counts as missing from now on: a new plan is needed.
    Outdated,
}

impl Outcome {
    /// Of two steps: outdated when one of them is.
    pub fn and(self, other: Self) -> Self {
        if self == Self::Done { other } else { self }
    }
}

pub use failure::Failure;
pub use host::Host;
pub use project::Project;

//! Layer 5: one file per verb. Orchestration: reads the project, asks sources, store, plan, build and engines, and gives a
//! result that `cli/` words.
//!
//! Invariant: nothing here parses, prints, reads the environment or picks an exit code. `run` never writes the lockfile.

pub mod build;
pub mod check;
pub mod demand;
pub mod derive;
pub mod doctor;
pub mod failure;
pub mod host;
pub mod init;
pub mod lock;
pub mod project;
pub mod ready;
pub mod run;
pub mod status;
pub mod survey;
pub mod sync;
pub mod verify;

pub use failure::Failure;
pub use host::Host;
pub use project::Project;

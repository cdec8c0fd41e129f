//! One file per command: calls `ops/` and prints the result.

pub mod chat;
pub mod check;
pub mod completions;
pub mod doctor;
pub mod init;
pub mod lock;
pub mod ps;
pub mod run;
pub mod schema;
pub mod serve;
pub mod status;
pub mod stop;
pub mod sync;
pub mod verify;

use super::output::Output;
use super::settings::Session;
use crate::ops::{Failure, Project};

/// The project of this run; its warnings are printed.
///
/// # Errors
/// See [`Session::project`].
fn load(session: &Session<'_>, output: &Output) -> Result<Project, Failure> {
    let project = session.project()?;
    output.warnings(&project.warnings);
    Ok(project)
}

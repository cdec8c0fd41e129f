//! One file per command: calls `ops/` and prints the result.

pub mod bundle;
pub mod cache;
pub mod chat;
pub mod check;
pub mod ci;
pub mod completions;
pub mod diff;
pub mod doctor;
pub mod export;
pub mod init;
pub mod lock;
pub mod ps;
pub mod reproduce;
pub mod run;
pub mod schema;
pub mod serve;
pub mod status;
pub mod stop;
pub mod sync;
pub mod test;
pub mod verify;

use super::output::Output;
use super::settings::Session;
use crate::format::policy;
use crate::ops::project::PolicyFile;
use crate::ops::{Failure, Project};

/// Refuses a policy whose engine gives no text.
///
/// # Errors
/// [`Failure::Usage`].
fn require_text(file: &PolicyFile) -> Result<(), Failure> {
    match file.policy.value.runtime.output {
        None | Some(policy::Output::Text) => Ok(()),
        Some(policy::Output::Embeddings | policy::Output::Ranking) => Err(Failure::Usage {
            what: format!("policy `{}` gives no text (`runtime.output`)", file.name),
            hint: Some("serve it with `aitools serve`".to_owned()),
        }),
    }
}

/// The project of this run; its warnings are printed.
///
/// # Errors
/// See [`Session::project`].
fn load(session: &Session<'_>, output: &Output) -> Result<Project, Failure> {
    let project = session.project()?;
    output.warnings(&project.warnings);
    Ok(project)
}

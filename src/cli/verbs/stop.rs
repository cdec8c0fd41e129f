//! `aitools stop`.

use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::{Failure, remote};

/// # Errors
/// When no server of this project is running, or it refuses.
pub fn run(ask: &args::Stop, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let server = remote::connect(&project.root)?;
    if ask.policies.is_empty() {
        server.shut_down()?;
        output.say(&format!("the server at {} is ending", server.url()));
    }
    for policy in &ask.policies {
        server.unload(policy)?;
        output.say(&format!("unloading {policy}"));
    }
    output.result("stop", true, &json!({ "url": server.url(), "policies": ask.policies }));
    Ok(exit::DONE)
}

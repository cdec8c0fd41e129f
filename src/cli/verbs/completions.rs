//! `aitools completions`.

use clap::CommandFactory as _;

use crate::cli::args::{self, Args};
use crate::cli::output::Output;
use crate::ops::Failure;

/// # Errors
/// Never; the signature is that of every verb.
pub fn run(ask: &args::Completions, output: &Output) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(ask.shell, &mut Args::command(), "aitools", &mut script);
    let script = String::from_utf8_lossy(&script);
    output.text(&script);
    output.result("completions", true, &serde_json::json!({ "shell": ask.shell.to_string(), "script": script }));
    Ok(0)
}

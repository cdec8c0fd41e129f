//! `aitools ps`.

use serde_json::Value as Json;

use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{size, table};
use crate::ops::{Failure, remote};

/// # Errors
/// When no server of this project is running.
pub fn run(session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let server = remote::connect(&project.root)?;
    let status = server.status()?;
    let rows: Vec<[String; 6]> = status["policies"].as_array().into_iter().flatten().map(row).collect();
    output.text(&format!("server at {} (process {})\n", server.url(), status["pid"]));
    output.text(&table(["POLICY", "ENGINE", "STATE", "RUNNING", "WAITING", "MEMORY"], &rows));
    output.result("ps", true, &serde_json::json!({ "url": server.url(), "status": status }));
    Ok(exit::DONE)
}

fn row(policy: &Json) -> [String; 6] {
    let text = |key: &str| policy[key].as_str().unwrap_or_default().to_owned();
    let memory = |key: &str| {
        let bytes = policy[key]["ram_bytes"].as_u64().unwrap_or(0) + policy[key]["gpu_bytes"].as_u64().unwrap_or(0);
        if bytes == 0 { "-".to_owned() } else { size(bytes) }
    };
    let problem = policy["problem"].as_str().or(policy["error"].as_str());
    let state = if problem.is_some() && text("state") != "loaded" { "failed".to_owned() } else { text("state") };
    [
        text("name"),
        text("engine"),
        state,
        policy["running"].to_string(),
        policy["waiting"].to_string(),
        memory("measured"),
    ]
}

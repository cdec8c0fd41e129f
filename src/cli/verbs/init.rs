//! `aitools init`.

use serde_json::json;

use crate::cli::args;
use crate::cli::invocation::quoted;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::{Failure, init};

/// # Errors
/// See [`init::run`].
pub fn run(ask: &args::Init, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let folder = session.cwd.join(&ask.path);
    let written = init::run(&folder)?;
    for path in &written {
        output.say(&format!("wrote {}", path.display()));
    }
    let folder_option = match (&ask.path, &session.directory()) {
        (path, None) if path.as_os_str() == "." => String::new(),
        (path, None) => format!(" -C {}", quoted(&path.display().to_string())),
        (_, Some(_)) => format!(" -C {}", quoted(&folder.display().to_string())),
    };
    output.say(&format!(
        "next: aitools{folder_option} run smollm2-135m-instruct --sync --prompt \"What is the capital of France?\""
    ));
    output.result("init", true, &json!({ "folder": folder, "written": written }));
    Ok(0)
}

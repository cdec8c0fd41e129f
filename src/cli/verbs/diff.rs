//! `aitools diff`.

use std::path::Path;

use serde_json::json;

use crate::base::fs;
use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::prompt::read_stdin;
use crate::cli::settings::Session;
use crate::cli::wording::differences;
use crate::format::lockfile::{self, Lockfile};
use crate::ops::diff::{self, Changed, How};
use crate::ops::{Failure, lock};

/// # Errors
/// When a lockfile cannot be read.
pub fn run(ask: &args::Diff, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let old = read(&ask.old, session)?;
    let new = match &ask.new {
        Some(path) => read(path, session)?,
        None => lock::require(&super::load(session, output)?)?,
    };
    let changed = diff::diff(&old, &new);
    output.text(&changed.iter().map(text).collect::<String>());
    if changed.is_empty() {
        output.say("the lockfiles say the same");
    }
    output.result("diff", true, &json!({ "equal": changed.is_empty(), "changes": changed }));
    Ok(exit::DONE)
}

fn read(path: &Path, session: &Session<'_>) -> Result<Lockfile, Failure> {
    let limit_bytes = lockfile::MAX_BYTES as u64;
    let (shown, bytes) = match path.to_str() {
        Some("-") => ("standard input".to_owned(), read_stdin("the lockfile", limit_bytes)?),
        _ => (path.display().to_string(), fs::read_bounded(&session.cwd.join(path), limit_bytes)?),
    };
    Ok(lockfile::parse(&shown, &bytes)?.0.value)
}

fn text(Changed { kind, name, how, differences: facts }: &Changed) -> String {
    let sign = match how {
        How::Added => '+',
        How::Removed => '-',
        How::Changed => '~',
    };
    format!("{sign} {} {name}\n{}", kind.as_str(), differences(facts))
}

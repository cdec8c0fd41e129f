//! `aitools export`.

use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::ops::{Failure, export};

/// # Errors
/// See [`export::run`].
pub fn run(ask: &args::Export, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let key = ask.key.as_ref().map(|key| session.cwd.join(key));
    let written = export::run(&host, &project, &ask.policies, &session.cwd.join(&ask.output), key.as_deref())?;
    host.store.save_records()?;
    for file in &written {
        let signed = if file.signed { "signed" } else { "not signed" };
        output.say(&format!("wrote `{}`: {}, {signed}", file.path.display(), file.what));
    }
    if key.is_none() {
        output.say("without `--key FILE` nothing is signed, and signatures of models are left out");
    }
    output.result("export", true, &json!({ "files": written }));
    Ok(exit::DONE)
}

//! `aitools reproduce`.

use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::counted;
use crate::ops::Failure;
use crate::ops::reproduce::{self, Compared, Reproduced};

/// # Errors
/// See [`reproduce::run`].
pub fn run(ask: &args::Reproduce, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let all = reproduce::run(&host, &project, &ask.engines, &mut |reproduced| tell(reproduced, output))?;
    let equal = all.iter().all(|reproduced| reproduced.equal);
    output.result("reproduce", equal, &json!({ "engines": all }));
    Ok(if equal { exit::DONE } else { exit::NOT_REPRODUCED })
}

fn tell(reproduced: &Reproduced, output: &Output) {
    let Reproduced { engine, variant, files, places, seconds, diffoscope, .. } = reproduced;
    let differing: Vec<_> = files.iter().filter(|(_, compared)| **compared != Compared::Equal).collect();
    let bits = if differing.is_empty() { "equal" } else { "DIFFERENT" };
    output.say(&format!(
        "engine {engine} ({variant}): inputs equal, recipe equal, bits {bits} ({}, second build {seconds} s)",
        counted(files.len(), "file")
    ));
    output.say(&format!("  first built in {}, then in {}", places[0], places[1]));
    for (path, compared) in differing {
        let why = match compared {
            Compared::Equal => continue,
            Compared::Different { why } if why.is_empty() => "differs".to_owned(),
            Compared::Different { why } => why.join("; "),
            Compared::Gone => "only the first build has it".to_owned(),
            Compared::New => "only the second build has it".to_owned(),
        };
        output.say(&format!("  {path}: {why}"));
    }
    if let Some(report) = diffoscope {
        output.say(&format!("  see `{}`, by diffoscope", report.display()));
    }
    if bits != "equal" {
        output.say("  whether it answers with the same tokens is for `aitools test --golden` to tell");
    }
}

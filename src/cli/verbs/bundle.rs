//! `aitools bundle`.

use crate::cli::args::{self, BundleCommand};
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{counted, size};
use crate::ops::bundle::{self, Exported, Imported, Why};
use crate::ops::{Failure, project};

/// # Errors
/// See [`bundle`].
pub fn run(ask: &args::Bundle, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    match &ask.command {
        BundleCommand::Export(ask) => {
            let project = super::load(session, output)?;
            let host = session.host(&project.root, Some(&ask.build))?;
            let path = session.cwd.join(&ask.output);
            let exported = bundle::export(&host, &project, &ask.policies, &path)?;
            written(&exported, "exported", &ask.output.display().to_string(), output);
            output.result("bundle export", true, &exported);
        }
        BundleCommand::Push(ask) => {
            let project = super::load(session, output)?;
            let host = session.host(&project.root, Some(&ask.build))?;
            let exported = bundle::push(&host, &project, &ask.policies, &ask.reference)?;
            written(&exported, "pushed", &ask.reference.to_string(), output);
            output.result("bundle push", true, &exported);
        }
        BundleCommand::Import(ask) => {
            let host = session.host(&project::find_root(&session.cwd), None)?;
            let imported = bundle::import(&host, &session.cwd.join(&ask.path), ask.trust)?;
            taken(&imported, "imported", output);
            output.result("bundle import", true, &imported);
        }
        BundleCommand::Pull(ask) => {
            let root = project::find_root(&session.cwd);
            let host = session.host(&root, None)?;
            let imported = bundle::pull(&host, &root, &ask.reference, ask.trust)?;
            taken(&imported, "pulled", output);
            output.result("bundle pull", true, &imported);
        }
    }
    Ok(exit::DONE)
}

fn written(exported: &Exported, verb: &str, to: &str, output: &Output) {
    let blobs = counted(exported.blobs, "blob");
    output.say(&format!("{verb} {blobs} ({}) to `{to}`", size(exported.size_bytes)));
    output.say(&format!("the digest of the bundle is {}", exported.manifest));
}

fn taken(imported: &Imported, verb: &str, output: &Output) {
    let items = counted(imported.admitted.len(), "item");
    let here = match imported.present {
        0 => String::new(),
        present => format!(", {present} were here already"),
    };
    output.say(&format!(
        "{verb} {items} ({}) of a bundle for `{}`{here}",
        size(imported.size_bytes),
        imported.lockfile
    ));
    output.say(&format!("the digest of the bundle is {}", imported.manifest));
    for left_out in &imported.left_out {
        let why = match left_out.why {
            Why::SealedElsewhere => "its receipt was sealed by another machine; `sync` makes it from its source",
            Why::OtherPlatform => "it was built for another platform; `sync` makes it from its source",
        };
        output.say(&format!("left out {}: {why}", left_out.what));
    }
    if imported.left_out.iter().any(|left_out| left_out.why == Why::SealedElsewhere) {
        output.say(
            "hint: machines with one `AITOOLS_RECEIPT_KEY` believe each other; `--trust` believes this bundle's maker",
        );
    }
}

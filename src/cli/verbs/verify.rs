//! `aitools verify`.

use serde_json::json;

use crate::cli::args;
use crate::cli::output::Output;
use crate::cli::settings::Session;
use crate::cli::wording::{self, counted, size};
use crate::ops::evidence::{self, Compared};
use crate::ops::sync::{self, Ask, LockMode};
use crate::ops::verify::{self, Verified};
use crate::ops::{Failure, proven};

/// # Errors
/// [`Failure::Damaged`] when something is wrong and stays so.
pub fn run(ask: &args::Verify, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let project = super::load(session, output)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let mut verified = verify::run(&host, &project, &ask.policies, &[])?;
    if ask.repair && !verified.damages.is_empty() {
        for damage in &verified.damages {
            output.say(&format!("repairing `{}`", damage.path.display()));
        }
        // What was found damaged is remembered as such, so `sync` fetches or builds exactly that.
        verify::discard(&host, &project, &ask.policies, &verified.damages)?;
        sync::run(&host, &project, &Ask { policies: &ask.policies, mode: LockMode::Frozen, dry_run: false })?;
        verified.damages = verify::run(&host, &project, &ask.policies, &verified.damages)?.damages;
    }
    if !verified.damages.is_empty() {
        return Err(Failure::Damaged { damages: verified.damages });
    }
    output.say(&format!("verified {} ({})", counted(verified.files, "file"), size(verified.size_bytes)));
    let (evidence, key) = (&ask.against, ask.public_key.as_ref().map(|key| session.cwd.join(key)));
    let compared = evidence
        .as_ref()
        .map(|path| evidence::compare(&host, &project, &ask.policies, &session.cwd.join(path), key.as_deref()));
    let compared = compared.transpose()?;
    if let Some(Compared { equal, unnamed, signed, damages }) = &compared {
        let by = if *signed == Some(true) {
            "signed by the owner of that key"
        } else {
            "not signed: anybody may have written it"
        };
        let wrong = damages.len();
        output.say(&format!(
            "the evidence ({by}): {} as it says, {wrong} not, {unnamed} of engines and models that it is not about",
            counted(*equal, "file")
        ));
    }
    if let Some(compared) = compared.as_ref().filter(|compared| !compared.damages.is_empty()) {
        return Err(Failure::Damaged { damages: compared.damages.clone() });
    }
    let policies = proven::all(&host, &project, &ask.policies)?;
    for (policy, proven) in &policies {
        output.say(format!("policy    {policy}\n{}", wording::proven(proven)).trim_end());
    }
    let Verified { files, size_bytes, damages } = verified;
    let result = json!({ "files": files, "size_bytes": size_bytes, "damages": damages, "policies": policies, "evidence": compared });
    output.result("verify", true, &result);
    Ok(0)
}

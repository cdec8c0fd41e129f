//! The verified inputs that one engine is started from: what `sync` leaves behind for one policy.

use crate::base::diagnostic::Diagnostic;
use crate::base::name::Name;
use crate::base::{fs, platform};
use crate::engine::Ready;
use crate::format::manifest::{Kind, Permission};
use crate::plan::Step;
use crate::report::{Unit, Verb};

use super::demand::{Demand, demand};
use super::install::Purpose;
use super::project::PolicyFile;
use super::{Failure, Host, Project, check, edited, lock, sync};

/// Finds what a policy needs without changing anything.
///
/// # Errors
/// [`Failure::NotSynced`] when something is missing, [`Failure::Input`] when the policy cannot work with the model.
pub fn ready(host: &Host, project: &Project, file: &PolicyFile) -> Result<(Ready, Vec<Diagnostic>), Failure> {
    let lockfile = lock::require(project)?;
    let names = [file.name.clone()];
    let demand = demand(host, project, &lockfile, &names, Purpose::Use)?;
    let mut steps = sync::plan_for(host, project, &demand)?.steps;
    if steps.iter().any(|step| matches!(step, Step::Hash { .. })) {
        hash_recent(host, project, &demand)?;
        steps = sync::plan_for(host, project, &demand)?.steps;
    }
    // A link for people is not needed to run.
    if steps.iter().any(|step| !matches!(step, Step::LinkBuild { .. })) {
        return Err(Failure::NotSynced { steps });
    }
    let used = |kind: Kind, name: &Name| match kind {
        Kind::Engine => demand.engines.iter().any(|engine| engine.required.name == *name),
        Kind::Model => demand.models.iter().any(|model| model.required.name == *name),
        Kind::Tool => false,
    };
    let entries = edited::edited(host, project, &lockfile, used)?;
    if !entries.is_empty() {
        return Err(Failure::Stale { path: project.lock_path.clone(), entries });
    }
    let (Some(engine), Some(model)) = (demand.engines.first(), demand.model()) else {
        return Err(Failure::NotSynced { steps });
    };
    let (opened, warnings) = check::open(host, project, file, engine, model)?;
    host.task.check()?;
    let main = model.layout.parts.first().copied().unwrap_or_default();
    let ready = Ready {
        engine: engine.adapter,
        model: opened,
        name: file.name.parse().map_err(|error: crate::base::name::NameError| Failure::Usage {
            what: format!("policy file `{}`: {error}", file.path.display()),
            hint: Some("rename the file".to_owned()),
        })?,
        policy: file.policy.value.clone(),
        policy_sha256: file.digest,
        variant: engine.required.variant,
        artifact: host.store.artifact_path(&engine.required.fingerprint),
        fingerprint: engine.required.fingerprint,
        weights_sha256: model.required.files[main].sha256,
        cores: platform::physical_cores(),
        network: engine.entry.allow.contains(&Permission::Network) && !host.offline,
    };
    Ok((ready, warnings))
}

/// Hashes files whose times prove nothing, as those from a clock that was ahead: a `sync` leaves no record of them.
fn hash_recent(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<(), Failure> {
    for model in &demand.models {
        for (pin, place) in model.required.files.iter().zip(&model.required.places) {
            for path in [host.store.blob_path(&pin.sha256), place.under(&project.root)] {
                if fs::stamp(&path).is_ok_and(|stamp| stamp.is_recent()) {
                    let progress = host.task.start(Verb::Hash, model.required.name.as_str(), None, Unit::None);
                    host.store.confirm(&path, pin, &mut host.stopping())?;
                    progress.finish("");
                }
            }
        }
    }
    Ok(())
}

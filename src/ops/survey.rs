//! What is really there, for a demand: no network, no subprocess, and no byte hashed that was hashed before.

use crate::base::fs;
use crate::plan::{PackageRequirement, Survey};
use crate::store::blobs::Presence;

use super::demand::Demand;
use super::{Failure, Host, Project};

/// # Errors
/// When the store cannot be read.
pub fn survey(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Survey, Failure> {
    let mut survey = Survey::default();
    for engine in &demand.engines {
        let required = &engine.required;
        if fs::exists(&host.store.tree_path(&required.tree)) {
            survey.trees.insert(required.tree);
        }
        if host.store.artifact(&required.fingerprint)?.is_some() {
            survey.artifacts.insert(required.fingerprint);
        } else {
            packages(host, &required.tools, &mut survey)?;
        }
        if let Some(fingerprint) = project.linked_build(&required.name) {
            survey.links.insert(required.name.clone(), fingerprint);
        }
    }
    for model in &demand.models {
        for (file, place) in model.required.files.iter().zip(&model.required.places) {
            let presence = |path: &std::path::Path| host.store.presence(path, file);
            let placed = presence(&place.under(&project.root));
            survey.places.insert(place.clone(), placed);
            if placed != Presence::Verified {
                survey.blobs.insert(file.sha256, presence(&host.store.blob_path(&file.sha256)));
            }
        }
        packages(host, model.required.derive.iter().flat_map(|derive| &derive.packages), &mut survey)?;
    }
    Ok(survey)
}

fn packages<'p>(
    host: &Host,
    requirements: impl IntoIterator<Item = &'p PackageRequirement>,
    survey: &mut Survey,
) -> Result<(), Failure> {
    for required in requirements {
        if host.store.tool(&required.package.sha256, false, host.task.cancel())?.is_some() {
            survey.tools.insert(required.package.sha256);
        }
    }
    Ok(())
}

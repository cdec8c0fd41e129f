//! What is really there, for a demand: no network, no subprocess, and no byte hashed that was hashed before.

use crate::base::fs;
use crate::plan::{PackageWish, Survey};

use super::demand::Demand;
use super::{Failure, Host, Project};

/// # Errors
/// When the store cannot be read.
pub fn survey(host: &Host, project: &Project, demand: &Demand<'_>) -> Result<Survey, Failure> {
    let mut survey = Survey::default();
    for engine in &demand.engines {
        let wish = &engine.wish;
        if fs::exists(&host.store.tree_path(&wish.tree)) {
            survey.trees.insert(wish.tree);
        }
        if host.store.artifact(&wish.fingerprint)?.is_some() {
            survey.artifacts.insert(wish.fingerprint);
        } else {
            packages(host, &wish.tools, &mut survey)?;
        }
        if let Some(fingerprint) = project.linked_build(&wish.name) {
            survey.links.insert(wish.name.clone(), fingerprint);
        }
    }
    for model in &demand.models {
        for (file, place) in model.wish.files.iter().zip(&model.wish.places) {
            let presence = |path: &std::path::Path| host.store.presence(path, file);
            survey.blobs.insert(file.sha256, presence(&host.store.blob_path(&file.sha256)));
            survey.places.insert(place.clone(), presence(&place.under(&project.root)));
        }
        packages(host, model.wish.derive.iter().flat_map(|derive| &derive.packages), &mut survey)?;
    }
    Ok(survey)
}

fn packages<'p>(
    host: &Host,
    wishes: impl IntoIterator<Item = &'p PackageWish>,
    survey: &mut Survey,
) -> Result<(), Failure> {
    for wish in wishes {
        if host.store.tool(&wish.package.sha256, false, host.task.cancel())?.is_some() {
            survey.tools.insert(wish.package.sha256);
        }
    }
    Ok(())
}

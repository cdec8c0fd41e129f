//! What is really there, for a demand: no network, no subprocess, and no byte hashed that was hashed before.

use crate::base::digest::Digest;
use crate::base::fs;
use crate::plan::{Standing, Survey};
use crate::store::blobs::Presence;

use super::demand::Demand;
use super::{Failure, Host, Project};

/// The folder (a link where the platform has them) with the engine install in use.
pub fn build_link(project: &Project, engine: &crate::base::name::Name) -> std::path::PathBuf {
    project.root.join("build").join(engine.as_str())
}

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
            for (_, package) in &wish.tools {
                if host.store.tool(&package.sha256, false, host.task.cancel())?.is_some() {
                    survey.tools.insert(package.sha256);
                }
            }
        }
        if let Some(fingerprint) = linked(&build_link(project, &wish.name)) {
            survey.links.insert(wish.name.clone(), fingerprint);
        }
    }
    for model in &demand.models {
        for (file, place) in model.wish.files.iter().zip(&model.wish.places) {
            let standing = |path: &std::path::Path| match host.store.presence(path, file) {
                Presence::Verified => Standing::Verified,
                Presence::Unverified => Standing::Unverified,
                Presence::Missing => Standing::Missing,
            };
            survey.blobs.insert(file.sha256, standing(&host.store.blob_path(&file.sha256)));
            survey.places.insert(place.clone(), standing(&place.under(&project.root)));
        }
    }
    Ok(survey)
}

/// The fingerprint that a link names: the last part of the path it points at.
pub fn linked(link: &std::path::Path) -> Option<Digest> {
    let target = fs::read_dir_link(link)?;
    Digest::from_hex(target.file_name()?.to_str()?).ok()
}

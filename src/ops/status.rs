//! `status`: what is wanted, what is there, and why something would be built again. Changes nothing.

use std::path::PathBuf;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;
use crate::build::fingerprint::{self, Difference};
use crate::format::lockfile::{FilePin, Lockfile};
use crate::format::receipt::Receipt;
use crate::plan::Step;
use crate::store::blobs::Presence;
use crate::store::proofs::Proofs;

use super::demand::{Demand, EngineDemand, ModelDemand, demand, demand_as_locked};
use super::failure::Staleness;
use super::install::Purpose;
use super::proven::{self, Proven};
use super::{Failure, Host, Project, lock, sync};

/// The state of a project on this machine.
#[derive(Debug, serde::Serialize)]
pub struct Status {
    /// The manifest's file.
    pub manifest: PathBuf,
    /// None when there is no lockfile.
    pub stale: Option<Vec<Staleness>>,
    /// The engines that the policies need.
    pub engines: Vec<EngineStatus>,
    /// The models that the policies need.
    pub models: Vec<ModelStatus>,
    /// The policies.
    pub policies: Vec<PolicyStatus>,
    /// What `sync` would do.
    pub steps: Vec<Step>,
}

/// One engine in one variant.
#[derive(Debug, serde::Serialize)]
pub struct EngineStatus {
    /// Its name in the manifest.
    pub name: Name,
    /// The id of its adapter.
    pub adapter: &'static str,
    /// The accelerator.
    pub variant: Variant,
    /// The commit, or the package, it is built from.
    pub source: String,
    /// Digest of every input of its installation.
    pub fingerprint: Digest,
    /// Whether it is installed.
    pub built: bool,
    /// The folder of its installation.
    pub artifact: PathBuf,
}

/// One model.
#[derive(Debug, serde::Serialize)]
pub struct ModelStatus {
    /// Its name in the manifest.
    pub name: Name,
    /// The number of its files.
    pub files: usize,
    /// The size of its files together, in bytes.
    pub size_bytes: u64,
    /// None when others are derived from it, and no engine could run it.
    pub main: Option<String>,
    /// Whether every file is verified and in its place.
    pub ready: bool,
    /// The same in more detail.
    pub state: ModelState,
}

/// What is on this machine of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModelState {
    /// Every file is verified and in its place.
    Ready,
    /// A file in its place is not the locked one.
    Changed,
    /// Every file is there, but at least one was not hashed here, or was written since.
    Unverified,
    /// Every file is in the store, but not in its place.
    NotPlaced,
    /// It was not derived on this machine from its current inputs.
    NotDerived,
    /// At least one file is missing.
    Missing,
}

impl ModelState {
    /// The state as words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Changed => "changed",
            Self::Unverified => "not verified",
            Self::NotPlaced => "not placed",
            Self::NotDerived => "not derived",
            Self::Missing => "missing",
        }
    }
}

/// One policy.
#[derive(Debug, serde::Serialize)]
pub struct PolicyStatus {
    /// Its name.
    pub name: String,
    /// The engine that it uses.
    pub engine: Name,
    /// The digest of its file.
    pub digest: Digest,
    /// Whether it can run now.
    pub ready: bool,
    /// What was proven of what it uses.
    pub proven: Proven,
}

/// The state of a project. With a lockfile that is out of date, everything is shown that the lockfile has.
///
/// # Errors
/// When the project's files cannot be read.
pub fn run(host: &Host, project: &Project) -> Result<Status, Failure> {
    let manifest = project.manifest_path.clone();
    let Some(lockfile) = project.lockfile()? else {
        let (engines, models, policies) = (Vec::new(), Vec::new(), Vec::new());
        return Ok(Status { manifest, stale: None, engines, models, policies, steps: Vec::new() });
    };
    let mut stale = lock::staleness(&project.manifest.value, &lockfile);
    stale.extend(lock::edited(host, project, &lockfile, &stale)?);
    let demand = match stale.is_empty() {
        true => demand(host, project, &lockfile, &[], Purpose::Install)?,
        false => match demand_as_locked(host, project, &lockfile) {
            Ok(demand) => demand,
            Err(Failure::Stale { .. }) => Demand::default(),
            Err(other) => return Err(other),
        },
    };
    let plan = sync::plan_for(host, project, &demand)?;
    let engines = demand.engines.iter().map(|engine| engine_status(host, engine, &plan.steps)).collect();
    let models = demand.models.iter().filter(|model| model.required.wanted).map(|model| ModelStatus {
        name: model.required.name.clone(),
        files: model.required.files.len(),
        size_bytes: model.required.files.iter().map(|file| file.size).sum(),
        main: model.layout.main.as_ref().map(ToString::to_string),
        ready: !plan.steps.iter().any(|step| step.is_about(&model.required.name)),
        state: model_state(host, project, model, &plan.steps),
    });
    let models = models.collect();
    let proofs = host.store.proofs();
    let policies = project.policies.iter().map(|file| policy_status(host, project, &lockfile, &proofs, file)).collect();
    Ok(Status { manifest, stale: Some(stale), engines, models, policies, steps: plan.steps })
}

fn model_state(host: &Host, project: &Project, model: &ModelDemand<'_>, steps: &[Step]) -> ModelState {
    let due: Vec<&Step> = steps.iter().filter(|step| step.is_about(&model.required.name)).collect();
    let is_changed = |(place, pin): (&RelPath, &FilePin)| {
        let path = place.under(&project.root);
        fs::exists(&path) && host.store.presence(&path, pin) == Presence::Missing
    };
    let has = |kind: fn(&Step) -> bool| due.iter().any(|step| kind(step));
    if due.is_empty() {
        ModelState::Ready
    } else if has(|step| matches!(step, Step::Derive { .. })) {
        ModelState::NotDerived
    } else if model.required.places.iter().zip(&model.required.files).any(is_changed) {
        ModelState::Changed
    } else if has(|step| matches!(step, Step::FetchWeights { .. })) {
        ModelState::Missing
    } else if has(|step| matches!(step, Step::Hash { .. })) {
        ModelState::Unverified
    } else {
        ModelState::NotPlaced
    }
}

fn engine_status(host: &Host, engine: &EngineDemand<'_>, steps: &[Step]) -> EngineStatus {
    let origin = &engine.entry.origin;
    let package = origin.download().map(|file| file.path.to_string());
    EngineStatus {
        name: engine.required.name.clone(),
        adapter: engine.adapter.id(),
        variant: engine.required.variant,
        source: origin.commit().map(|commit| commit.to_string()).or(package).unwrap_or_else(|| "path".to_owned()),
        fingerprint: engine.required.fingerprint,
        built: !steps
            .iter()
            .any(|step| matches!(step, Step::Build { fingerprint, .. } if *fingerprint == engine.required.fingerprint)),
        artifact: host.store.artifact_path(&engine.required.fingerprint),
    }
}

fn policy_status(
    host: &Host,
    project: &Project,
    lockfile: &Lockfile,
    proofs: &Proofs,
    file: &super::project::PolicyFile,
) -> PolicyStatus {
    let demand = demand(host, project, lockfile, std::slice::from_ref(&file.name), Purpose::Install).ok();
    let plan = demand.as_ref().and_then(|demand| sync::plan_for(host, project, demand).ok());
    PolicyStatus {
        name: file.name.clone(),
        engine: file.policy.value.engine.clone(),
        digest: file.digest,
        ready: plan.is_some_and(|plan| plan.steps.iter().all(|step| matches!(step, Step::LinkBuild { .. }))),
        proven: demand.map(|demand| proven::of(proofs, &file.digest, &demand)).unwrap_or_default(),
    }
}

/// Why an engine would be built again, or is not built.
#[derive(Debug, serde::Serialize)]
pub struct WhyBuild {
    /// The engine's name in the manifest.
    pub engine: Name,
    /// The accelerator.
    pub variant: Variant,
    /// Digest of every input of its installation.
    pub fingerprint: Digest,
    /// Whether it is installed.
    pub built: bool,
    /// The build that the project uses now, when it is another one.
    pub other: Option<Digest>,
    /// Inputs that differ between that build and the wanted one.
    pub differences: Vec<Difference>,
    /// Every input of the wanted build.
    pub inputs: std::collections::BTreeMap<String, String>,
}

/// Why a model would be derived again, or is not derived.
#[derive(Debug, serde::Serialize)]
pub struct WhyDerived {
    /// The model's name in the manifest.
    pub model: Name,
    /// Digest of every input of the derivation.
    pub fingerprint: Digest,
    /// Whether it was derived on this machine from just these inputs.
    pub derived: bool,
    /// The latest derivation of this model, when it is another one.
    pub other: Option<Digest>,
    /// Inputs that differ between that derivation and the wanted one.
    pub differences: Vec<Difference>,
    /// Every input of the wanted derivation.
    pub inputs: std::collections::BTreeMap<String, String>,
}

/// Why something would be made again.
#[derive(Debug, serde::Serialize)]
#[serde(untagged)]
pub enum Why {
    /// An engine.
    Build(WhyBuild),
    /// A derived model.
    Derived(WhyDerived),
}

/// # Errors
/// When there is no such engine or derived model, or no lockfile.
pub fn why(host: &Host, project: &Project, name: &str) -> Result<Vec<Why>, Failure> {
    let lockfile = lock::require(project)?;
    let demand = demand(host, project, &lockfile, &[], Purpose::Install)?;
    let engines = demand.engines.iter().filter(|found| found.required.name.as_str() == name);
    let mut whys: Vec<Why> =
        engines.map(|engine| why_one(host, project, engine).map(Why::Build)).collect::<Result<_, _>>()?;
    let derived = |model: &&ModelDemand<'_>| model.derive.is_some();
    for model in demand.models.iter().filter(derived).filter(|model| model.required.name.as_str() == name) {
        whys.extend(why_derived(host, model)?.map(Why::Derived));
    }
    if whys.is_empty() {
        let engines = demand.engines.iter().map(|known| known.required.name.as_str());
        let models = demand.models.iter().filter(derived).map(|known| known.required.name.as_str());
        let near = crate::base::diagnostic::nearest(name, engines.chain(models));
        let hint = near.map(|near| format!("did you mean `{near}`?"));
        return Err(Failure::Usage { what: format!("the manifest has no engine or derived model `{name}`"), hint });
    }
    Ok(whys)
}

fn why_derived(host: &Host, model: &ModelDemand<'_>) -> Result<Option<WhyDerived>, Failure> {
    let (Some(derive), Some(required)) = (&model.derive, &model.required.derive) else { return Ok(None) };
    let derived = host.store.derived(&required.fingerprint).is_some();
    let own = |receipt: &Receipt| receipt.notes.get("model").is_some_and(|name| name == model.required.name.as_str());
    let other = if derived { None } else { host.store.all_derived()?.into_iter().find(own) };
    let differences = other.as_ref().map(|receipt| fingerprint::differences(&receipt.inputs, &derive.inputs));
    Ok(Some(WhyDerived {
        model: model.required.name.clone(),
        fingerprint: required.fingerprint,
        derived,
        other: other.map(|receipt| receipt.fingerprint),
        differences: differences.unwrap_or_default(),
        inputs: derive.inputs.clone(),
    }))
}

fn why_one(host: &Host, project: &Project, engine: &EngineDemand<'_>) -> Result<WhyBuild, Failure> {
    let required = &engine.required;
    let built = host.store.artifact(&required.fingerprint)?.is_some();
    let used = project.linked_build(&required.name).and_then(|fingerprint| host.store.receipt_of(&fingerprint));
    let latest = || newest(host, engine);
    let other = match used.filter(|artifact| artifact.receipt.fingerprint != required.fingerprint) {
        Some(artifact) => Some(artifact),
        None if built => None,
        None => latest()?,
    };
    let differences = other.as_ref().map(|artifact| fingerprint::differences(&artifact.receipt.inputs, &engine.inputs));
    Ok(WhyBuild {
        engine: required.name.clone(),
        variant: required.variant,
        fingerprint: required.fingerprint,
        built,
        other: other.map(|artifact| artifact.receipt.fingerprint),
        differences: differences.unwrap_or_default(),
        inputs: engine.inputs.clone(),
    })
}

/// The artifact of this engine and variant that was installed last.
fn newest(host: &Host, engine: &EngineDemand<'_>) -> Result<Option<crate::store::artifacts::Artifact>, Failure> {
    let same = |artifact: &crate::store::artifacts::Artifact| {
        artifact.receipt.engine == engine.required.name
            && artifact.receipt.variant == engine.required.variant
            && artifact.receipt.fingerprint != engine.required.fingerprint
    };
    let when = |artifact: &crate::store::artifacts::Artifact| {
        fs::metadata(&artifact.path)
            .and_then(|meta| meta.modified().map_err(|error| fs::FsError::new("look at", &artifact.path, error)))
    };
    let artifacts = host.store.artifacts()?;
    Ok(artifacts.into_iter().filter(same).max_by_key(|artifact| when(artifact).ok()))
}

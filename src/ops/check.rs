//! `check`: formats, cross references, model files and engine rules, with no side effects.

use std::sync::Arc;

use crate::base::diagnostic::{Diagnostic, Diagnostics, Severity};
use crate::base::fs;
use crate::base::platform::{self, Variant};
use crate::build::accelerator;
use crate::build::toolchain::Finder;
use crate::engine::finding::Finding;
use crate::engine::{CheckRequest, Model, ModelFiles};
use crate::format::lockfile::Lockfile;
use crate::format::policy;

use super::demand::{self, EngineDemand, ModelDemand};
use super::install::Purpose;
use super::project::PolicyFile;
use super::{Failure, Host, Project};

/// What was found about one policy.
#[derive(Debug, serde::Serialize)]
pub struct Checked {
    /// The policy's name.
    pub policy: String,
    /// Whether its weights are on this machine, so that the model file could be checked.
    pub weights_checked: bool,
    /// Its errors and warnings.
    #[serde(skip)]
    pub problems: Vec<Diagnostic>,
}

/// Checks policies one by one; model files can only be checked if there is a lockfile.
///
/// # Errors
/// When the project's own files cannot be read.
pub fn run(host: &Host, project: &Project, names: &[String]) -> Result<Vec<Checked>, Failure> {
    demand::check_derivations(host, project)?;
    let lock = project.lockfile()?;
    let check = |file| {
        let mut checked = check_policy(host, project, lock.as_ref(), file)?;
        checked.problems.extend(placeholder(file));
        Ok(checked)
    };
    demand::select(project, names)?.into_iter().map(check).collect()
}

/// The warning about a checksum that is only a placeholder. Other commands do not need one.
fn placeholder(file: &PolicyFile) -> Option<Diagnostic> {
    let source = &file.policy.document.source;
    let warning = Diagnostic::warning("the checksum is a placeholder: only the lockfile's digest is checked");
    let span = file.policy.document.span_of(&["audit", "checksum"]);
    file.policy.value.audit.has_placeholder().then(|| warning.at(source, span))
}

fn check_policy(
    host: &Host,
    project: &Project,
    lock: Option<&Lockfile>,
    file: &PolicyFile,
) -> Result<Checked, Failure> {
    let mut checked = Checked { policy: file.name.clone(), weights_checked: false, problems: Vec::new() };
    checked.problems = by_policy_alone(host, project, file);
    if let Err(problems) = policy::resolve(&file.policy, &project.manifest.value) {
        checked.problems.splice(..0, problems.0);
        return Ok(checked);
    }
    let Some(lock) = lock else { return Ok(checked) };
    let names = [file.name.clone()];
    let demand = match demand::demand(host, project, lock, &names, Purpose::Install) {
        Ok(demand) => demand,
        Err(Failure::Input(problems)) => {
            checked.problems = problems.0;
            return Ok(checked);
        }
        Err(Failure::Recipe { error, .. }) => {
            checked.problems.push(file.policy.error(&["runtime", "variant"], error.to_string()));
            return Ok(checked);
        }
        // The lockfile has no entry for this policy yet: `status` and `sync` report that.
        Err(Failure::Stale { .. } | Failure::Build { .. }) => return Ok(checked),
        Err(other) => return Err(other),
    };
    if let (Some(engine), Some(model)) = (demand.engines.first(), demand.model()) {
        // Checking the model file finds the same, and more.
        checked.problems = checksum(file, model);
        if model_is_here(project, model) {
            checked.weights_checked = true;
            checked.problems.extend(open_and_check(host, project, file, engine, model).1);
        }
    }
    Ok(checked)
}

/// What is wrong with a policy by the rules of its engine's adapter, without its model.
fn by_policy_alone(host: &Host, project: &Project, file: &PolicyFile) -> Vec<Diagnostic> {
    let name = file.policy.value.engine.as_str();
    let spec = project.manifest.value.engines.iter().find(|(known, _)| known.as_str() == name);
    let id = spec.and_then(|(_, spec)| spec.adapter.as_deref()).unwrap_or(name);
    let findings = host.engine(id).map(|adapter| adapter.check_policy(&file.policy.value)).unwrap_or_default();
    findings.iter().map(|finding| diagnostic(file, finding)).collect()
}

/// A policy's model as its engine sees it, with the warnings about both.
///
/// # Errors
/// [`Failure::Input`] when they cannot work together.
pub fn open(
    host: &Host,
    project: &Project,
    file: &PolicyFile,
    engine: &EngineDemand<'_>,
    model: &ModelDemand<'_>,
) -> Result<(Arc<dyn Model>, Vec<Diagnostic>), Failure> {
    let mut problems = Diagnostics(checksum(file, model));
    let (opened, found) = open_and_check(host, project, file, engine, model);
    problems.0.extend(found);
    let ((), warnings) = problems.or(()).map_err(Failure::Input)?;
    // One that cannot be opened is among the problems.
    opened.map(|opened| (opened, warnings)).ok_or_else(|| Failure::Input(Diagnostics::default()))
}

fn model_is_here(project: &Project, model: &ModelDemand<'_>) -> bool {
    !model.layout.parts.is_empty()
        && model.layout.parts.iter().all(|index| fs::exists(&model.layout.places[*index].under(&project.root)))
}

/// `audit.checksum`, when it is a real one, must be the locked digest of the main weights file.
fn checksum(file: &PolicyFile, model: &ModelDemand<'_>) -> Vec<Diagnostic> {
    let Some(asked) = file.policy.value.audit.digest() else { return Vec::new() };
    // What is yet to be derived has no digest.
    if model.layout.parts.is_empty() {
        return Vec::new();
    }
    let locked = model.layout.parts.first().map(|index| model.required.files[*index].sha256);
    if locked == Some(asked) {
        return Vec::new();
    }
    let actual = locked.map_or_else(|| "no locked file".to_owned(), |digest| format!("{digest} in the lockfile"));
    let problem = file.policy.error(&["audit", "checksum"], "the checksum is not that of the locked weights");
    vec![
        problem
            .expected(asked.to_string())
            .actual(actual)
            .hint("correct the policy, or the model's source in the manifest"),
    ]
}

/// The model, unless it cannot be opened, and everything that is wrong with running it under a policy.
fn open_and_check(
    host: &Host,
    project: &Project,
    file: &PolicyFile,
    engine: &EngineDemand<'_>,
    model: &ModelDemand<'_>,
) -> (Option<Arc<dyn Model>>, Vec<Diagnostic>) {
    let parts = &model.layout.parts;
    let weights: Vec<_> = parts.iter().map(|index| model.layout.places[*index].under(&project.root)).collect();
    let beside = (0..model.required.files.len()).filter(|index| !parts.contains(index));
    let beside: Vec<_> = beside.map(|index| model.required.files[index].path.clone()).collect();
    let opened = match engine.adapter.open(&ModelFiles { weights: &weights, beside: &beside }) {
        Ok(opened) => opened,
        Err(error) => {
            let problem = Diagnostic::error(error.to_string());
            return (None, vec![problem.hint("run `aitools verify` to compare it with the lockfile")]);
        }
    };
    let gpus =
        (engine.required.variant == Variant::Cuda).then(|| accelerator::gpus(&host.os_env())).and_then(Result::ok);
    let findings = opened.check(&CheckRequest {
        policy: &file.policy.value,
        variant: engine.required.variant,
        cores: platform::physical_cores(),
        memory_bytes: platform::memory_bytes(),
        gpus: gpus.as_deref(),
        commit: engine.entry.origin.commit(),
    });
    let problems = findings.iter().map(|finding| diagnostic(file, finding)).collect();
    (Some(opened), problems)
}

fn diagnostic(file: &PolicyFile, finding: &Finding) -> Diagnostic {
    let keys: Vec<&str> = finding.key.split('.').filter(|key| !key.is_empty()).collect();
    let mut told = file.policy.error(&keys, finding.message.clone());
    if !finding.error {
        told.severity = Severity::Warning;
    }
    told.hint = finding.hint.clone();
    told
}

/// The compilers and programs here, for `doctor`.
pub(super) fn finder<'a>(host: &'a Host, env: &'a crate::build::settings::Env) -> Finder<'a> {
    Finder::new(env, host.store.root(), host.task.cancel())
}

//! Models that are made from others: what decides what comes out, and what is known of it already.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::diagnostic::Diagnostics;
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;
use crate::build::fingerprint;
use crate::engine::EngineError;
use crate::engine::derive::Maker;
use crate::format::lockfile::{FilePin, ModelEntry, ToolEntry};
use crate::format::manifest::{DeriveSpec, EngineSpec, Kind, Manifest, ModelSpec, Step};
use crate::format::receipt::Receipt;
use crate::ops::failure::{Staleness, Why};
use crate::ops::{Failure, Host, Project, python};
use crate::plan::{self, DeriveRequirement, DerivesWith, EngineIndex, Layout, ModelIndex, ModelRequirement};

use super::{Demand, DemandBuilder, DeriveDemand, ModelDemand};

/// `names`, and whatever they are derived from.
pub(super) fn with_inputs<'a>(manifest: &'a Manifest, names: &'a [Name]) -> BTreeSet<&'a Name> {
    let mut needed: BTreeSet<&Name> = names.iter().collect();
    for name in manifest.models_in_order().into_iter().rev() {
        if let Some(derive) = manifest.models[name].derive.as_ref().filter(|_| needed.contains(name)) {
            needed.extend(derive.inputs());
        }
    }
    needed
}

/// Whether another model is derived from it.
pub(super) fn is_input(manifest: &Manifest, name: &Name) -> bool {
    manifest.models.values().filter_map(|spec| spec.derive.as_ref()).any(|derive| derive.inputs().contains(&name))
}

/// Whether every engine of the manifest has an adapter, and every derivation is one that its engine can make.
///
/// # Errors
/// [`Failure::Input`] with every engine, or every derivation, that is not.
pub fn check(host: &Host, project: &Project) -> Result<(), Failure> {
    let manifest = &project.manifest.value;
    let mut problems = Diagnostics::default();
    for (name, spec) in &manifest.engines {
        if let Err(Failure::Input(unknown)) = super::adapter(host, project, name, spec) {
            problems.0.extend(unknown.0);
        }
    }
    if problems.has_errors() {
        return Err(problems.into());
    }
    for (name, spec) in &manifest.models {
        let Some((derive, step)) = spec.derive.as_ref().and_then(|derive| Some((derive, derive.step()?))) else {
            continue;
        };
        let engine = &manifest.engines[&derive.engine];
        if let Err(error) = super::adapter(host, project, &derive.engine, engine)?.derivation(step, engine) {
            problems.push(refusal(project, name, step, error));
        }
    }
    if problems.has_errors() { Err(problems.into()) } else { Ok(()) }
}

fn refusal(project: &Project, model: &Name, step: Step<'_>, error: EngineError) -> crate::base::diagnostic::Diagnostic {
    let key = match step {
        Step::Quantize(_) => "quantize",
        Step::Convert(_) => "convert",
    };
    let mut problem = project.manifest.document.error(&["models", model.as_str(), "derive", key], error.to_string());
    if let EngineError::Underivable { hint, .. } = error {
        problem.hint = hint;
    }
    problem
}

/// The files of a derivation's receipt.
pub fn made(receipt: &Receipt) -> Vec<FilePin> {
    let pin = |(path, file): (&RelPath, &crate::format::receipt::InstalledFile)| FilePin {
        path: path.clone(),
        size: file.size,
        sha256: file.sha256,
    };
    receipt.files.iter().map(pin).collect()
}

/// A derived model to look into.
pub(super) struct Asked<'a> {
    pub name: &'a Name,
    pub spec: &'a ModelSpec,
    pub request: &'a DeriveSpec,
    pub entry: &'a ModelEntry,
    pub wanted: bool,
}

impl<'a> DemandBuilder<'_, 'a> {
    pub(super) fn derived(&mut self, of: &Asked<'a>, demand: &mut Demand<'a>) -> Result<ModelDemand<'a>, Failure> {
        let (name, request) = (of.name, of.request);
        let manifest = &self.project.manifest.value;
        // The lockfile may be older than the manifest.
        let tools = request.packages().iter().all(|tool| manifest.tools.contains_key(tool));
        let spec = manifest.engines.get(&request.engine).filter(|_| tools).ok_or_else(|| self.outdated(name))?;
        let at = self.deriving_engine(&request.engine, spec, demand)?;
        let engine = demand.engine_at(at);
        let step = request.step().ok_or_else(|| self.outdated(name))?;
        let derivation = engine.adapter.derivation(step, spec);
        let derivation = derivation.map_err(|error| Failure::Input(refusal(self.project, name, step, error).into()))?;
        let package = |name| self.lock.tool(name).ok_or_else(|| self.not_locked(Kind::Tool, name));
        let packages: Vec<&ToolEntry> = request.packages().iter().map(package).collect::<Result<_, _>>()?;
        let from = request.inputs().into_iter().map(|input| demand.find(input).ok_or_else(|| self.outdated(name)));
        let from: Vec<ModelIndex> = from.collect::<Result<_, _>>()?;
        let models: Vec<&ModelDemand<'_>> = from.iter().map(|at| demand.model_at(*at)).collect();
        let (engine_input, with) = match derivation.by {
            Maker::Build => (engine.required.fingerprint, DerivesWith::Build),
            Maker::Source => (engine.required.tree, DerivesWith::Source),
        };
        let adapter = format!("{} {}", engine.adapter.id(), derivation.version);
        let named = [("step", step.to_string()), ("adapter", adapter), ("engine", engine_input.to_string())];
        let mut inputs: BTreeMap<String, String> = named.map(|(name, value)| (name.to_owned(), value)).into();
        for package in &packages {
            inputs.insert(format!("tool {}", package.name), listing(&package.packages).to_string());
        }
        for (role, model) in ["from", "predictor"].into_iter().zip(&models) {
            inputs.insert(role.to_owned(), identity(model).to_string());
        }
        let fingerprint = fingerprint::fingerprint(&inputs);
        let beside = models.first().map(|from| beside(from, derivation.beside)).unwrap_or_default();
        let bytes: u64 = models.iter().flat_map(|model| &model.required.files).map(|file| file.size).sum();
        let (files, layout) = self.derived_files(of, &fingerprint, &beside)?;
        let python = match step {
            Step::Convert(_) if files.is_empty() => Some(python::find(self.host, &packages)),
            Step::Convert(_) | Step::Quantize(_) => None,
        };
        let (how, engine) = (step.to_string(), at);
        let packages = python.iter().flatten().flat_map(|python| python.packages.clone()).collect();
        let required = DeriveRequirement { fingerprint, from, how, engine, with, packages };
        let (places, name) = (layout.places.clone(), name.clone());
        let required = ModelRequirement { name, files, places, derive: Some(required), wanted: of.wanted };
        let size_bytes = (bytes / 100).saturating_mul(derivation.percent);
        let derive = Some(DeriveDemand { step, size_bytes, beside, engine, python, inputs });
        Ok(ModelDemand { required, layout, entry: of.entry, spec: of.spec, derive })
    }

    /// The files of a derived model that is on record, and where they go; no files when it is not.
    fn derived_files(
        &self,
        of: &Asked<'_>,
        fingerprint: &Digest,
        beside: &[FilePin],
    ) -> Result<(Vec<FilePin>, Layout), Failure> {
        let mut files = self.host.store.derived(fingerprint).map(|receipt| made(&receipt)).unwrap_or_default();
        if files.is_empty() {
            return Ok((files, plan::layout_to_be(of.name, of.spec)));
        }
        files.extend(beside.iter().cloned());
        let layout = self.layout(of.name, of.spec, &files)?;
        Ok((files, layout))
    }

    fn outdated(&self, model: &Name) -> Failure {
        let entries = vec![Staleness { kind: Kind::Model, name: model.clone(), why: Why::Inputs }];
        Failure::Stale { path: self.project.lock_path.clone(), entries }
    }

    /// The engine's build `cpu`, where it has one: what is derived is then the same with every accelerator and without.
    fn deriving_engine(
        &mut self,
        name: &Name,
        spec: &EngineSpec,
        demand: &mut Demand<'a>,
    ) -> Result<EngineIndex, Failure> {
        let plain = spec.variant.is_empty() || spec.variant.contains_key(&Variant::Cpu);
        let linked = !demand.engines.iter().any(|other| other.required.name == *name);
        let mut engine = self.engine(name, plain.then_some(Variant::Cpu), linked)?;
        if let Some(at) = demand.same_engine(&engine) {
            return Ok(at);
        }
        engine.required.wanted = false;
        demand.engines.push(engine);
        Ok(EngineIndex(demand.engines.len() - 1))
    }
}

/// Files of a model that go along unchanged: those in one of its `folders`.
fn beside(from: &ModelDemand<'_>, folders: &[&str]) -> Vec<FilePin> {
    let along = |file: &&FilePin| file.path.as_str().split_once('/').is_some_and(|(top, _)| folders.contains(&top));
    let files = from.derive.as_ref().map_or(&from.required.files, |derive| &derive.beside);
    files.iter().filter(along).cloned().collect()
}

/// What a model is, as an input of another: the digest of its locked files, or of its own inputs.
fn identity(model: &ModelDemand<'_>) -> Digest {
    model.required.derive.as_ref().map_or_else(|| listing(&model.required.files), |derive| derive.fingerprint)
}

/// The digest of a list of files.
fn listing(files: &[FilePin]) -> Digest {
    let line = |file: &FilePin| format!("{} {} {}\n", file.sha256, file.size, file.path);
    Digest::of(files.iter().map(line).collect::<String>().as_bytes())
}

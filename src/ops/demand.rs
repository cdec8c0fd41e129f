//! What a selection of policies needs of this machine: which engines in which variants, which models.

mod derived;

pub use derived::{check as check_derivations, made};

use std::collections::BTreeMap;

use crate::base::diagnostic::{Diagnostic, Diagnostics, nearest};
use crate::base::name::Name;
use crate::base::platform::Variant;
use crate::build::fingerprint;
use crate::engine::Engine;
use crate::format::lockfile::{EngineEntry, FilePin, Lockfile, ModelEntry, ModelPin};
use crate::format::manifest::{self, EngineSpec, Kind, ModelSpec};
use crate::format::policy;
use crate::format::schema::quoted_list;
use crate::plan::{self, EngineIndex, EngineRequirement, Layout, LayoutError, ModelIndex, ModelRequirement};

use super::failure::PythonError;
use super::install::{Decided, Installation, Installers, Purpose, Wanted};
use super::project::PolicyFile;
use super::python::Python;
use super::{Failure, Host, Project};

/// An engine in one variant: everything that decides what is installed.
#[derive(Debug)]
pub struct EngineDemand<'a> {
    /// For the plan.
    pub required: EngineRequirement,
    /// The adapter that drives it.
    pub adapter: &'static dyn Engine,
    /// What is locked.
    pub entry: &'a EngineEntry,
    /// Every named input of the installation; the fingerprint is their digest.
    pub inputs: BTreeMap<String, String>,
    /// The installation itself.
    pub installation: Box<dyn Installation>,
}

/// A model and where its files go.
#[derive(Debug)]
pub struct ModelDemand<'a> {
    /// For the plan.
    pub required: ModelRequirement,
    /// Where its files go.
    pub layout: Layout,
    /// What is locked.
    pub entry: &'a ModelEntry,
    /// What the manifest says.
    pub spec: &'a ModelSpec,
    /// How it is derived; None when it is fetched.
    pub derive: Option<DeriveDemand<'a>>,
}

/// How a model is derived: everything that decides what comes out.
#[derive(Debug)]
pub struct DeriveDemand<'a> {
    /// What is done to the model.
    pub step: manifest::Step<'a>,
    /// Of what comes out, at most.
    pub size_bytes: u64,
    /// Files of the model it is made from that go along.
    pub beside: Vec<FilePin>,
    /// The engine whose program or source makes it.
    pub engine: EngineIndex,
    /// For a conversion that is due: the Python that runs it, or why there is none.
    pub python: Option<Result<Python, PythonError>>,
    /// Every named input; the fingerprint is their digest.
    pub inputs: BTreeMap<String, String>,
}

/// Models come after those that they are derived from.
#[derive(Debug, Default)]
pub struct Demand<'a> {
    /// The engines, each in one variant.
    pub engines: Vec<EngineDemand<'a>>,
    /// The models, each after those that it is derived from.
    pub models: Vec<ModelDemand<'a>>,
}

impl<'a> Demand<'a> {
    /// The engine at a position that a step of this demand's plan names.
    pub fn engine_at(&self, at: EngineIndex) -> &EngineDemand<'a> {
        &self.engines[at.0]
    }

    /// The model at a position that a step of this demand's plan names.
    pub fn model_at(&self, at: ModelIndex) -> &ModelDemand<'a> {
        &self.models[at.0]
    }

    /// The model of a single policy's demand.
    pub fn model(&self) -> Option<&ModelDemand<'a>> {
        self.models.iter().find(|model| model.required.wanted)
    }

    /// The engine of the same name and fingerprint.
    fn same_engine(&self, engine: &EngineDemand<'_>) -> Option<EngineIndex> {
        let same = |other: &EngineDemand<'_>| {
            other.required.name == engine.required.name && other.required.fingerprint == engine.required.fingerprint
        };
        self.engines.iter().position(same).map(EngineIndex)
    }

    /// The position of the model of that name.
    fn find(&self, model: &Name) -> Option<ModelIndex> {
        self.models.iter().position(|demand| demand.required.name == *model).map(ModelIndex)
    }
}

/// The policies that were named; all when none was.
///
/// # Errors
/// When a name is unknown.
pub fn select<'p>(project: &'p Project, names: &[String]) -> Result<Vec<&'p PolicyFile>, Failure> {
    if names.is_empty() {
        return Ok(project.policies.iter().collect());
    }
    names.iter().map(|name| project.policy(name)).collect()
}

/// What has to be there for `names`, or for the whole manifest when no policy is named.
///
/// # Errors
/// When a policy names what is not there, an engine cannot be built here, or the lockfile lacks an entry.
pub fn demand<'a>(
    host: &Host,
    project: &'a Project,
    lock: &'a Lockfile,
    names: &[String],
    purpose: Purpose,
) -> Result<Demand<'a>, Failure> {
    demand_of(host, project, lock, wanted(host, project, names)?, purpose)
}

/// What the whole manifest needs, as far as an outdated lockfile has it.
///
/// # Errors
/// When an engine cannot be built here, or a derivation is locked with other inputs.
pub fn demand_as_locked<'a>(host: &Host, project: &'a Project, lock: &'a Lockfile) -> Result<Demand<'a>, Failure> {
    let manifest = &project.manifest.value;
    let (mut engines, mut models, run) = wanted(host, project, &[])?;
    engines.retain(|(name, _)| lock.engine(name).is_some());
    let is_locked = |name: &Name| {
        let engine = manifest.models.get(name).and_then(|spec| spec.derive.as_ref()).map(|derive| &derive.engine);
        lock.model(name).is_some() && engine.is_none_or(|engine| lock.engine(engine).is_some())
    };
    models.retain(|name| derived::with_inputs(manifest, std::slice::from_ref(name)).iter().all(|name| is_locked(name)));
    demand_of(host, project, lock, (engines, models, run), Purpose::Install)
}

fn demand_of<'a>(
    host: &Host,
    project: &'a Project,
    lock: &'a Lockfile,
    (engines, models, run): Selected,
    purpose: Purpose,
) -> Result<Demand<'a>, Failure> {
    let env = host.os_env();
    let mut builder = DemandBuilder { host, project, lock, purpose, installers: Installers::new(host, lock, &env) };
    let mut demand = Demand::default();
    for (name, variant) in engines {
        let linked = !demand.engines.iter().any(|other| other.required.name == name);
        let engine = builder.engine(&name, variant, linked)?;
        // One policy may name the variant that is chosen for another.
        if demand.same_engine(&engine).is_none() {
            demand.engines.push(engine);
        }
    }
    let needed = derived::with_inputs(&project.manifest.value, &models);
    for name in project.manifest.value.models_in_order().into_iter().filter(|name| needed.contains(name)) {
        let model = builder.model(name, models.contains(name), &mut demand)?;
        // A model that others are derived from need not run on an engine.
        if model.layout.main.is_none() && (run.contains(name) || !derived::is_input(&project.manifest.value, name)) {
            return Err(misplaced(project, name, &LayoutError::NoWeights));
        }
        demand.models.push(model);
    }
    Ok(demand)
}

/// Engines with variants; models; those of the models that policies name.
type Selected = (Vec<(Name, Option<Variant>)>, Vec<Name>, Vec<Name>);

/// Names of engines (with the variant that a policy or the user asks for) and models.
fn wanted(host: &Host, project: &Project, names: &[String]) -> Result<Selected, Failure> {
    let manifest = &project.manifest;
    let (mut engines, mut models) = (Vec::new(), Vec::new());
    for file in select(project, names)? {
        let resolved = match policy::resolve(&file.policy, &manifest.value) {
            Ok(resolved) => resolved,
            // A policy that names something the manifest lacks does not stop the others.
            Err(problems) if names.is_empty() => {
                host.task.warn(format!("policy `{}` is left out: {problems}", file.name));
                continue;
            }
            Err(problems) => return Err(problems.into()),
        };
        let (engine, model) = (resolved.engine.0.clone(), resolved.model.0.clone());
        let variant = host.variant.or(file.policy.value.runtime.variant);
        if !engines.contains(&(engine.clone(), variant)) {
            engines.push((engine, variant));
        }
        if !models.contains(&model) {
            models.push(model);
        }
    }
    let run = models.clone();
    if names.is_empty() {
        let rest = manifest.value.engines.keys().filter(|name| !engines.iter().any(|(known, _)| known == *name));
        engines.extend(rest.cloned().map(|name| (name, host.variant)).collect::<Vec<_>>());
        let rest: Vec<Name> = manifest.value.models.keys().filter(|name| !models.contains(name)).cloned().collect();
        models.extend(rest);
    }
    Ok((engines, models, run))
}

struct DemandBuilder<'h, 'a> {
    host: &'h Host,
    project: &'a Project,
    lock: &'a Lockfile,
    purpose: Purpose,
    installers: Installers<'h>,
}

impl<'a> DemandBuilder<'_, 'a> {
    /// An entry that the manifest has and the lockfile has not.
    fn not_locked(&self, kind: Kind, name: &Name) -> Failure {
        let entries = vec![super::failure::Staleness { kind, name: name.clone(), why: super::failure::Why::Added }];
        Failure::Stale { path: self.project.lock_path.clone(), entries }
    }

    fn model(&mut self, name: &'a Name, wanted: bool, demand: &mut Demand<'a>) -> Result<ModelDemand<'a>, Failure> {
        let entry = self.lock.model(name).ok_or_else(|| self.not_locked(Kind::Model, name))?;
        let spec = &self.project.manifest.value.models[name];
        let files = match &entry.pin {
            ModelPin::Files { files, .. } => files,
            ModelPin::Derived { request, .. } => {
                return self.derived(&derived::Asked { name, spec, request, entry, wanted }, demand);
            }
        };
        let (files, layout) = (files.clone(), self.layout(name, spec, files)?);
        let required =
            ModelRequirement { name: name.clone(), files, places: layout.places.clone(), derive: None, wanted };
        Ok(ModelDemand { required, layout, entry, spec, derive: None })
    }

    fn layout(&self, name: &Name, spec: &ModelSpec, files: &[FilePin]) -> Result<Layout, Failure> {
        plan::layout(name, spec, files).map_err(|error| misplaced(self.project, name, &error))
    }

    fn engine(&mut self, name: &Name, variant: Option<Variant>, linked: bool) -> Result<EngineDemand<'a>, Failure> {
        let entry = self.lock.engine(name).ok_or_else(|| self.not_locked(Kind::Engine, name))?;
        let spec = &self.project.manifest.value.engines[name];
        let adapter = adapter(self.host, self.project, name, spec)?;
        let (purpose, in_use) = (self.purpose, self.project.linked_build(name));
        let wanted = Wanted { name, spec, entry, adapter, variant, purpose, in_use };
        let decided = self.installers.decide(&wanted)?;
        let Decided { variant, inputs, packages, installation } = decided;
        let fingerprint = fingerprint::fingerprint(&inputs);
        let (name, tree, wanted) = (name.clone(), entry.tree, true);
        let required = EngineRequirement { name, variant, fingerprint, tree, tools: packages, linked, wanted };
        Ok(EngineDemand { required, adapter, entry, inputs, installation })
    }
}

/// Whether every model of a lockfile can be placed, so that `lock` refuses what `sync` could never carry out.
///
/// # Errors
/// [`Failure::Input`] with every model of which it cannot be told which file is the main one, or two of whose files would get
/// one name.
pub fn check_layouts(project: &Project, lock: &Lockfile) -> Result<(), Failure> {
    let manifest = &project.manifest.value;
    let mut problems = Diagnostics::default();
    for entry in &lock.models {
        let (ModelPin::Files { files, .. }, Some(spec)) = (&entry.pin, manifest.models.get(&entry.name)) else {
            continue;
        };
        let layout = plan::layout(&entry.name, spec, files);
        // What others are derived from need not be a GGUF.
        let layout = match layout {
            Ok(Layout { main: None, .. }) if !derived::is_input(manifest, &entry.name) => Err(LayoutError::NoWeights),
            layout => layout,
        };
        if let Err(error) = layout {
            problems.push(misplacement(project, &entry.name, &error));
        }
    }
    if problems.has_errors() { Err(problems.into()) } else { Ok(()) }
}

fn misplacement(project: &Project, name: &Name, error: &LayoutError) -> Diagnostic {
    let problem = project.manifest.document.error(&["models", name.as_str()], format!("model `{name}`: {error}"));
    problem.hint("name the files with `files = [\"…\"]`")
}

/// The files of a model that cannot be placed.
pub fn misplaced(project: &Project, name: &Name, error: &LayoutError) -> Failure {
    Failure::Input(misplacement(project, name, error).into())
}

/// The adapter that drives an engine.
fn adapter(host: &Host, project: &Project, name: &Name, spec: &EngineSpec) -> Result<&'static dyn Engine, Failure> {
    let id = spec.adapter.as_deref().unwrap_or(name.as_str());
    host.engine(id).ok_or_else(|| {
        let known: Vec<&str> = host.engines.iter().map(|engine| engine.id()).collect();
        let place = project.manifest.document.error(
            &["engines", name.as_str(), if spec.adapter.is_some() { "adapter" } else { "source" }],
            format!("engine `{name}`: there is no adapter `{id}`"),
        );
        let hint = match nearest(id, known.iter().copied()) {
            Some(near) => format!("did you mean `adapter = \"{near}\"`?"),
            None => "set `adapter` to one of them".to_owned(),
        };
        Failure::Input(
            place.expected(format!("one of {}", quoted_list(known.into_iter()))).actual(id).hint(hint).into(),
        )
    })
}

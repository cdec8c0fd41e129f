//! What a selection of policies needs of this machine: which engines in which variants, which models.

mod derived;

pub use derived::{check as check_derivations, made};

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::base::name::Name;
use crate::base::platform::{Platform, Variant};
use crate::build::accelerator::{self, Accelerators, Definitions, Unfit};
use crate::build::fingerprint::{self, Ingredients};
use crate::build::settings::Env;
use crate::build::toolchain::{self, Finder, ToolError, Toolchain};
use crate::build::{BuildRecipe, ToolPath};
use crate::engine::{self, Engine, RecipeRequest};
use crate::format::lockfile::{EngineEntry, FilePin, Lockfile, ModelEntry, ModelPin, ToolEntry};
use crate::format::manifest::{self, EngineSpec, Kind, ModelSpec};
use crate::format::policy;
use crate::plan::{self, EngineWish, Layout, LayoutError, ModelWish};
use crate::source::pypi;

use super::project::PolicyFile;
use super::{Failure, Host, Project};

/// An engine in one variant: everything that decides what is built.
#[derive(Debug)]
pub struct EngineDemand<'a> {
    pub wish: EngineWish,
    pub adapter: &'static dyn Engine,
    pub entry: &'a EngineEntry,
    pub recipe: BuildRecipe,
    pub toolchain: Toolchain,
    pub cmake: ToolPath,
    pub ninja: Option<ToolPath>,
    /// Every named input of the build; the fingerprint is their digest.
    pub inputs: BTreeMap<String, String>,
}

/// A model and where its files go.
#[derive(Debug)]
pub struct ModelDemand<'a> {
    pub wish: ModelWish,
    pub layout: Layout,
    pub entry: &'a ModelEntry,
    pub spec: &'a ModelSpec,
    pub derive: Option<DeriveDemand<'a>>,
}

/// How a model is derived: everything that decides what comes out.
#[derive(Debug)]
pub struct DeriveDemand<'a> {
    pub step: manifest::Step<'a>,
    /// Of what comes out, at most.
    pub size_bytes: u64,
    /// Files of the model it is made from that go along.
    pub beside: Vec<FilePin>,
    /// The engine's build, as an index into the demand's engines.
    pub engine: usize,
    /// Python packages that the engine's script is given.
    pub packages: Vec<&'a ToolEntry>,
    /// Every named input; the fingerprint is their digest.
    pub inputs: BTreeMap<String, String>,
}

/// Models come after those that they are derived from.
#[derive(Debug, Default)]
pub struct Demand<'a> {
    pub engines: Vec<EngineDemand<'a>>,
    pub models: Vec<ModelDemand<'a>>,
}

impl Demand<'_> {
    /// The model of a single policy's demand.
    pub fn model(&self) -> Option<&ModelDemand<'_>> {
        self.models.iter().find(|model| model.wish.wanted)
    }

    pub fn find(&self, model: &Name) -> Option<&ModelDemand<'_>> {
        self.models.iter().find(|demand| demand.wish.name == *model)
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
) -> Result<Demand<'a>, Failure> {
    let (engines, models, run) = wanted(host, project, names)?;
    let env = host.os_env();
    let finder = Finder::new(&env, host.store.root(), host.task.cancel());
    let mut surroundings = Surroundings { host, project, lock, env: &env, finder, accelerators: None };
    let mut demand = Demand::default();
    for (name, variant) in engines {
        let linked = !demand.engines.iter().any(|other| other.wish.name == name);
        demand.engines.push(surroundings.engine(&name, variant, linked)?);
    }
    let needed = derived::with_inputs(&project.manifest.value, &models);
    for name in project.manifest.value.models_in_order().into_iter().filter(|name| needed.contains(name)) {
        let model = surroundings.model(name, models.contains(name), &mut demand)?;
        // What others are derived from need not be of use to an engine.
        if model.layout.main.is_none() && (run.contains(name) || !derived::is_input(&project.manifest.value, name)) {
            return Err(misplaced(project, name, &LayoutError::NoWeights));
        }
        demand.models.push(model);
    }
    Ok(demand)
}

/// Engines with variants; models; those of the models that policies name.
type Wanted = (Vec<(Name, Option<Variant>)>, Vec<Name>, Vec<Name>);

/// Names of engines (with the variant that a policy or the user asks for) and models.
fn wanted(host: &Host, project: &Project, names: &[String]) -> Result<Wanted, Failure> {
    let manifest = &project.manifest;
    let (mut engines, mut models) = (Vec::new(), Vec::new());
    for file in select(project, names)? {
        let resolved = match policy::resolve(&file.policy, &manifest.value) {
            Ok(resolved) => resolved,
            // One policy that asks for what the manifest lacks is no reason to leave the others without their needs.
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

struct Surroundings<'h, 'a> {
    host: &'h Host,
    project: &'a Project,
    lock: &'a Lockfile,
    env: &'h Env,
    finder: Finder<'h>,
    accelerators: Option<Accelerators>,
}

impl<'a> Surroundings<'_, 'a> {
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
        let wish = ModelWish { name: name.clone(), files, places: layout.places.clone(), derive: None, wanted };
        Ok(ModelDemand { wish, layout, entry, spec, derive: None })
    }

    fn layout(&self, name: &Name, spec: &ModelSpec, files: &[FilePin]) -> Result<Layout, Failure> {
        plan::layout(name, spec, files).map_err(|error| misplaced(self.project, name, &error))
    }

    fn engine(&mut self, name: &Name, asked: Option<Variant>, linked: bool) -> Result<EngineDemand<'a>, Failure> {
        let entry = self.lock.engine(name).ok_or_else(|| self.not_locked(Kind::Engine, name))?;
        let spec = &self.project.manifest.value.engines[name];
        let adapter = adapter(self.project, name, spec)?;
        let broken = |error: ToolError| Failure::Toolchain { engine: name.clone(), error };
        let recipe_of = |variant| {
            let recipe = adapter.recipe(&RecipeRequest {
                spec,
                commit: entry.origin.commit(),
                tree: &entry.tree,
                platform: Platform::HOST,
                variant,
            });
            recipe.map_err(|error| Failure::Recipe { engine: name.clone(), error })
        };
        let variant = match asked {
            Some(variant) => self.allowed(name, spec, variant)?,
            None => self.best(name, spec, adapter.variants(Platform::HOST), &recipe_of)?,
        };
        let recipe = recipe_of(variant)?;
        if asked == Some(Variant::Cuda) {
            self.require_fit(name, &recipe)?;
        }
        let toolchain = self.finder.toolchain(variant == Variant::Cuda, variant == Variant::Rocm).map_err(broken)?;
        let tools = self.tools()?;
        let locked =
            |tool: &str| tools.iter().find(|(name, _)| name.as_str() == tool).map(|found| self.identified(found));
        let cmake = match locked("cmake") {
            Some(cmake) => cmake,
            None => self.finder.cmake().map_err(broken)?,
        };
        let ninja = match locked("ninja") {
            Some(ninja) => Some(ninja),
            None => self.finder.ninja().map_err(broken)?,
        };
        let source = entry.tree;
        let inputs = fingerprint::inputs(&Ingredients {
            engine: name.as_str(),
            variant,
            platform: Platform::HOST,
            recipe: &recipe,
            source,
            toolchain: &toolchain,
            cmake: &cmake,
            ninja: ninja.as_ref(),
            env: self.env,
            processor: &toolchain::processor(self.env),
        });
        let fingerprint = fingerprint::fingerprint(&inputs);
        let wish = EngineWish { name: name.clone(), variant, fingerprint, tree: source, tools, linked, wanted: true };
        Ok(EngineDemand { wish, adapter, entry, recipe, toolchain, cmake, ninja, inputs })
    }

    /// Whether the manifest lists the variant that was asked for.
    fn allowed(&self, name: &Name, spec: &EngineSpec, variant: Variant) -> Result<Variant, Failure> {
        let listed = spec.variant.contains_key(&variant) || (variant == Variant::Cpu && spec.variant.is_empty());
        if listed {
            return Ok(variant);
        }
        let known: Vec<&str> = spec.variant.keys().map(|variant| variant.as_str()).collect();
        let what = format!("engine `{name}` has no variant `{variant}` in the manifest");
        let hint = format!("it has: {}", if known.is_empty() { "cpu".to_owned() } else { known.join(", ") });
        Err(Failure::Usage { what, hint: Some(hint) })
    }

    /// The best variant that manifest, adapter and machine have in common. The machine is asked only when there is a choice.
    fn best(
        &mut self,
        name: &Name,
        spec: &EngineSpec,
        possible: &[Variant],
        recipe_of: &impl Fn(Variant) -> Result<BuildRecipe, Failure>,
    ) -> Result<Variant, Failure> {
        let listed: Vec<Variant> = spec.variant.keys().copied().filter(|variant| possible.contains(variant)).collect();
        if !listed.iter().any(|variant| *variant != Variant::Cpu) {
            return Ok(Variant::Cpu);
        }
        let builds = listed.into_iter().map(|variant| Ok((variant, recipe_of(variant)?.define)));
        let builds: BTreeMap<Variant, Definitions> = builds.collect::<Result<_, Failure>>()?;
        let task = &self.host.task;
        let here = self.accelerators(name)?;
        if let Some(unfit) = builds.get(&Variant::Cuda).and_then(|define| here.fit(Variant::Cuda, define).err())
            && unfit != Unfit::Absent
            && !here.gpus.is_empty()
        {
            let hint = unfit.hint().unwrap_or_default();
            task.warn(format!("engine `{name}`: its variant `cuda` is not taken: {unfit}; {hint}"));
        }
        Ok(here.best(&builds))
    }

    /// What this machine has, asked once.
    fn accelerators(&mut self, name: &Name) -> Result<&Accelerators, Failure> {
        let found = match self.accelerators.take() {
            Some(found) => found,
            None => {
                accelerator::detect(&self.finder).map_err(|error| Failure::Toolchain { engine: name.clone(), error })?
            }
        };
        Ok(self.accelerators.insert(found))
    }

    /// A build for CUDA that somebody insists on may be made where no GPU is, for another machine; one that nvcc would refuse,
    /// or that does not run on the GPU here, is not begun.
    fn require_fit(&mut self, name: &Name, recipe: &BuildRecipe) -> Result<(), Failure> {
        match self.accelerators(name)?.fit(Variant::Cuda, &recipe.define) {
            Ok(()) | Err(Unfit::Absent) => Ok(()),
            Err(unfit) => {
                let what = format!("engine `{name}` cannot be used as variant `cuda`: {unfit}");
                Err(Failure::Usage { what, hint: unfit.hint() })
            }
        }
    }

    /// This platform's package of every locked tool.
    fn tools(&self) -> Result<Vec<(Name, FilePin)>, Failure> {
        let package = |entry: &ToolEntry| {
            let package = pypi::package_here(&entry.packages).ok_or_else(|| Failure::Usage {
                what: format!("the lockfile has no package of tool `{}` for {}", entry.name, Platform::HOST),
                hint: Some("leave the tool out of the manifest to use this machine's own".to_owned()),
            })?;
            Ok((entry.name.clone(), package.clone()))
        };
        self.lock.tools.iter().filter(|entry| manifest::TOOLS.contains(&entry.name.as_str())).map(package).collect()
    }

    /// A locked tool as an input of a build: its version and package. Its path is known once it is in the store.
    fn identified(&self, (name, package): &(Name, FilePin)) -> ToolPath {
        let version = self.project.manifest.value.tools.get(name).map_or("", |spec| spec.version.as_str());
        ToolPath { path: PathBuf::new(), identity: format!("{version} {}", package.sha256) }
    }
}

/// What is told of a model whose files make no whole.
pub fn misplaced(project: &Project, name: &Name, error: &LayoutError) -> Failure {
    let place = project.manifest.document.error(&["models", name.as_str()], format!("model `{name}`: {error}"));
    Failure::Input(place.hint("name the files with `files = [\"…\"]`").into())
}

/// The adapter that drives an engine.
fn adapter(project: &Project, name: &Name, spec: &EngineSpec) -> Result<&'static dyn Engine, Failure> {
    let id = spec.adapter.as_deref().unwrap_or(name.as_str());
    engine::find(id).ok_or_else(|| {
        let known: Vec<&str> = engine::ENGINES.iter().map(|engine| engine.id()).collect();
        let place = project.manifest.document.error(
            &["engines", name.as_str(), if spec.adapter.is_some() { "adapter" } else { "source" }],
            format!("engine `{name}`: there is no adapter `{id}`"),
        );
        Failure::Input(place.expected(known.join(", ")).actual(id).hint("set `adapter`").into())
    })
}

/// A build's tool with its path: the store's for a locked one, the machine's own otherwise.
///
/// # Errors
/// When the store cannot be read, or the tool is not there.
pub fn located(host: &Host, demand: &EngineDemand<'_>, tool: &ToolPath, name: &str) -> Result<ToolPath, Failure> {
    let Some((name, package)) = demand.wish.tools.iter().find(|(locked, _)| locked.as_str() == name) else {
        return Ok(tool.clone());
    };
    let folder = host.store.tool(&package.sha256, true, host.task.cancel())?;
    let folder = folder.ok_or_else(|| Failure::Usage {
        what: format!("tool `{name}` is damaged in the cache"),
        hint: Some("run `aitools sync` again".to_owned()),
    })?;
    let path = pypi::program(&folder, name.as_str()).ok_or_else(|| Failure::Usage {
        what: format!("the package of tool `{name}` has no program of that name"),
        hint: Some("correct `[tools]` in the manifest".to_owned()),
    })?;
    Ok(ToolPath { path, identity: tool.identity.clone() })
}

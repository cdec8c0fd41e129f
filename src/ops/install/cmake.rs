//! Engines that are built from source with CMake, with compilers of this machine, and with CMake and ninja from the lockfile where
//! it has them.

use std::collections::BTreeMap;

use crate::base::fs;
use crate::base::name::Name;
use crate::base::platform::{Platform, Variant};
use crate::build::accelerator::{self, Accelerators, Definitions, Unfit};
use crate::build::fingerprint::{self, Ingredients};
use crate::build::settings::Env;
use crate::build::toolchain::{self, Finder, ToolError, Toolchain};
use crate::build::{self, BuildRecipe, BuildRequest, Built, Network, ToolPath};
use crate::engine::cmake::{CmakeProject, RecipeRequest};
use crate::format::lockfile::{Lockfile, ToolEntry};
use crate::format::manifest::{self, EngineSpec, Permission};
use crate::ops::{Failure, Host};
use crate::plan::PackageRequirement;
use crate::source::pypi;

use super::{Decided, Folders, Installation, Purpose, Wanted};

/// CMake builds on this machine.
#[derive(Debug)]
pub struct Cmake<'a> {
    host: &'a Host,
    lock: &'a Lockfile,
    env: &'a Env,
    finder: Finder<'a>,
    accelerators: Option<Accelerators>,
}

/// A program that a build runs.
#[derive(Debug, Clone)]
enum Tool {
    /// One of this machine.
    Found(ToolPath),
    /// One of a locked package. Where it lies is known once the package is in the store.
    Locked(PackageRequirement),
}

impl Tool {
    /// What stands for it in the inputs of a build: the version that it reports, or version and digest of its package.
    fn identity(&self) -> String {
        match self {
            Self::Found(found) => found.identity.clone(),
            Self::Locked(required) => format!("{} {}", required.request.version, required.package.sha256),
        }
    }

    /// The program with its path; none when its package is not in the store, or damaged there.
    fn located(&self, host: &Host) -> Result<Option<ToolPath>, Failure> {
        let required = match self {
            Self::Found(found) => return Ok(Some(found.clone())),
            Self::Locked(required) => required,
        };
        let Some(folder) = host.store.tool(&required.package.sha256, true, host.task.cancel())? else {
            return Ok(None);
        };
        let path = pypi::program(&folder, required.name.as_str()).ok_or_else(|| Failure::Usage {
            what: format!("the package of tool `{}` has no program of that name", required.name),
            hint: Some("correct `[tools]` in the manifest".to_owned()),
        })?;
        Ok(Some(ToolPath { path, identity: self.identity() }))
    }
}

/// A build with everything decided.
#[derive(Debug)]
struct CmakeBuild {
    engine: Name,
    recipe: BuildRecipe,
    compilers: Toolchain,
    cmake: Tool,
    ninja: Option<Tool>,
    /// Whether the manifest lets the build use the network.
    network: bool,
}

impl<'a> Cmake<'a> {
    /// Builds with the tools of this machine and of the lockfile.
    pub fn new(host: &'a Host, lock: &'a Lockfile, env: &'a Env) -> Self {
        let finder = Finder::new(env, host.store.root(), host.task.cancel());
        Self { host, lock, env, finder, accelerators: None }
    }

    /// Whether the manifest lists the variant that was asked for.
    fn allowed(name: &Name, spec: &EngineSpec, variant: Variant) -> Result<Variant, Failure> {
        let listed = spec.variant.contains_key(&variant) || (variant == Variant::Cpu && spec.variant.is_empty());
        if listed {
            return Ok(variant);
        }
        let known: Vec<&str> = spec.variant.keys().map(|variant| variant.as_str()).collect();
        let what = format!("engine `{name}` has no variant `{variant}` in the manifest");
        let hint = format!("it has: {}", if known.is_empty() { "cpu".to_owned() } else { known.join(", ") });
        Err(Failure::Usage { what, hint: Some(hint) })
    }

    /// The best variant that manifest, adapter and machine have in common. The machine is examined only when there is a choice.
    fn best(
        &mut self,
        project: &dyn CmakeProject,
        wanted: &Wanted<'_>,
        recipe_of: &impl Fn(Variant) -> Result<BuildRecipe, Failure>,
    ) -> Result<Variant, Failure> {
        let (name, possible) = (wanted.name, project.variants(Platform::HOST));
        let listed = wanted.spec.variant.keys().copied().filter(|variant| possible.contains(variant));
        let listed: Vec<Variant> = listed.collect();
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
            task.warn(format!("engine `{name}`: its variant `cuda` is not used: {unfit}; {hint}"));
        }
        Ok(here.best(&builds))
    }

    /// What this machine has, examined once.
    fn accelerators(&mut self, name: &Name) -> Result<&Accelerators, Failure> {
        let found = match self.accelerators.take() {
            Some(found) => found,
            None => {
                accelerator::detect(&self.finder).map_err(|error| Failure::Toolchain { engine: name.clone(), error })?
            }
        };
        Ok(self.accelerators.insert(found))
    }

    /// A build for CUDA that was asked for may be made where no GPU is, for another machine; one that nvcc would refuse,
    /// or that does not run on the GPU of this machine, is an error.
    fn require_fit(&mut self, name: &Name, recipe: &BuildRecipe) -> Result<(), Failure> {
        match self.accelerators(name)?.fit(Variant::Cuda, &recipe.define) {
            Ok(()) | Err(Unfit::Absent) => Ok(()),
            Err(unfit) => {
                let what = format!("engine `{name}` cannot be used as variant `cuda`: {unfit}");
                Err(Failure::Usage { what, hint: unfit.hint() })
            }
        }
    }

    /// This platform's package of every locked build tool.
    fn packages(&self) -> Result<Vec<PackageRequirement>, Failure> {
        let package = |entry: &ToolEntry| {
            let package = pypi::package_here(&entry.packages).ok_or_else(|| Failure::Usage {
                what: format!("the lockfile has no package of tool `{}` for {}", entry.name, Platform::HOST),
                hint: Some("remove the tool from the manifest to use the one of this machine".to_owned()),
            })?;
            Ok(PackageRequirement {
                name: entry.name.clone(),
                request: entry.request.clone(),
                package: package.clone(),
            })
        };
        self.lock.tools.iter().filter(|entry| manifest::TOOLS.contains(&entry.name.as_str())).map(package).collect()
    }
}

impl Cmake<'_> {
    /// Decides everything about a build of `project`.
    ///
    /// # Errors
    /// When it cannot be built on this machine.
    pub fn decide(&mut self, project: &dyn CmakeProject, wanted: &Wanted<'_>) -> Result<Decided, Failure> {
        let decided = self.build(project, wanted);
        if wanted.purpose == Purpose::Install {
            return decided;
        }
        let why = match &decided {
            Ok(build) if self.host.store.artifact(&fingerprint::fingerprint(&build.inputs))?.is_some() => {
                return decided;
            }
            Ok(_) => "this machine's compilers have changed since it was built".to_owned(),
            Err(Failure::Toolchain { error, .. }) => error.to_string(),
            Err(_) => return decided,
        };
        let Some(kept) = self.kept(project, wanted)? else { return decided };
        let name = wanted.name;
        self.host.task.warn(format!("engine `{name}` is used as it is, and `sync` would build it again: {why}"));
        Ok(kept)
    }

    fn recipe(project: &dyn CmakeProject, wanted: &Wanted<'_>, variant: Variant) -> Result<BuildRecipe, Failure> {
        let (spec, commit, tree) = (wanted.spec, wanted.entry.origin.commit(), &wanted.entry.tree);
        let recipe = project.recipe(&RecipeRequest { spec, commit, tree, platform: Platform::HOST, variant });
        recipe.map_err(|error| Failure::Recipe { engine: wanted.name.clone(), error })
    }

    /// The build that this machine would make.
    fn build(&mut self, project: &dyn CmakeProject, wanted: &Wanted<'_>) -> Result<Decided, Failure> {
        let Wanted { name, spec, entry, variant: asked, .. } = *wanted;
        let broken = |error: ToolError| Failure::Toolchain { engine: name.clone(), error };
        let recipe_of = |variant| Self::recipe(project, wanted, variant);
        let variant = match asked {
            Some(variant) => Self::allowed(name, spec, variant)?,
            None => self.best(project, wanted, &recipe_of)?,
        };
        let recipe = recipe_of(variant)?;
        if asked == Some(Variant::Cuda) {
            self.require_fit(name, &recipe)?;
        }
        let (cuda, rocm) = (variant == Variant::Cuda, variant == Variant::Rocm);
        let compilers = self.finder.toolchain(cuda, rocm).map_err(broken)?;
        let packages = self.packages()?;
        let locked =
            |tool: &str| packages.iter().find(|required| required.name.as_str() == tool).cloned().map(Tool::Locked);
        let cmake = match locked("cmake") {
            Some(locked) => locked,
            None => Tool::Found(self.finder.cmake().map_err(broken)?),
        };
        let ninja = match locked("ninja") {
            Some(locked) => Some(locked),
            None => self.finder.ninja().map_err(broken)?.map(Tool::Found),
        };
        let network = entry.allow.contains(&Permission::Network);
        let inputs = fingerprint::inputs(&Ingredients {
            engine: name.as_str(),
            variant,
            platform: Platform::HOST,
            recipe: &recipe,
            source: entry.tree,
            toolchain: Some(&compilers),
            cmake: Some(&cmake.identity()),
            ninja: ninja.as_ref().map(Tool::identity).as_deref(),
            env: self.env,
            processor: &toolchain::processor(self.env),
            network,
        });
        let engine = name.clone();
        let installation = Box::new(CmakeBuild { engine, recipe, compilers, cmake, ninja, network });
        Ok(Decided { variant, inputs, packages, installation })
    }

    /// A build in the store that other compilers made from the same locked inputs.
    fn kept(&self, project: &dyn CmakeProject, wanted: &Wanted<'_>) -> Result<Option<Decided>, Failure> {
        let possible = project.variants(Platform::HOST);
        let variants: Vec<Variant> = match wanted.variant {
            Some(variant) => vec![variant],
            None if wanted.spec.variant.is_empty() => vec![Variant::Cpu],
            None => wanted.spec.variant.keys().copied().filter(|variant| possible.contains(variant)).collect(),
        };
        let packages = self.packages()?;
        let identity = |tool: &str| {
            let required = packages.iter().find(|required| required.name.as_str() == tool)?;
            Some(Tool::Locked(required.clone()).identity())
        };
        let (cmake, ninja) = (identity("cmake"), identity("ninja"));
        let expected = |variant| {
            Ok(fingerprint::inputs(&Ingredients {
                engine: wanted.name.as_str(),
                variant,
                platform: Platform::HOST,
                recipe: &Self::recipe(project, wanted, variant)?,
                source: wanted.entry.tree,
                toolchain: None,
                cmake: cmake.as_deref(),
                ninja: ninja.as_deref(),
                env: self.env,
                processor: &toolchain::processor(self.env),
                network: wanted.entry.allow.contains(&Permission::Network),
            }))
        };
        let locked: Vec<&str> = packages.iter().map(|required| required.name.as_str()).collect();
        super::kept(self.host, wanted, &variants, &locked, &expected)
    }
}

/// Variables that change what careless builds make. None of them reaches a build.
const STRANGE: &[(&str, &str)] = &[
    ("TZ", "Asia/Tokyo"),
    ("LANG", "tr_TR.UTF-8"),
    ("LC_ALL", "tr_TR.UTF-8"),
    ("HOME", "/nonexistent"),
    ("USER", "somebody"),
    ("CFLAGS", "-O0 -DSTRANGE"),
    ("CXXFLAGS", "-O0 -DSTRANGE"),
    ("LDFLAGS", "-Wl,--build-id=uuid"),
    ("CPATH", "/nonexistent"),
    ("SOURCE_DATE_EPOCH", "1"),
    ("GIT_DIR", "/nonexistent"),
    ("CMAKE_BUILD_TYPE", "Debug"),
    ("CMAKE_C_COMPILER_LAUNCHER", "false"),
    ("CMAKE_CXX_COMPILER_LAUNCHER", "false"),
];

impl CmakeBuild {
    /// `--offline` is stronger than the manifest.
    fn network(&self, host: &Host) -> Network {
        match (host.offline, self.network) {
            (true, _) => Network::Never,
            (false, true) => Network::Allowed,
            (false, false) => Network::Avoided,
        }
    }
}

impl Installation for CmakeBuild {
    fn install(&self, host: &Host, label: &str, folders: &Folders<'_>) -> Result<Option<Built>, Failure> {
        let Some(cmake) = self.cmake.located(host)? else { return Ok(None) };
        let ninja = match &self.ninja {
            Some(ninja) => match ninja.located(host)? {
                Some(ninja) => Some(ninja),
                None => return Ok(None),
            },
            None => None,
        };
        // nvcc hashes paths: only at fixed ones are two builds equal.
        let fixed_paths = self.compilers.cuda.is_some() || folders.again;
        let (work, jobs) = match folders.again {
            true => (folders.work.join("another place for it"), if host.jobs > 1 { host.jobs - 1 } else { 2 }),
            false => (folders.work.to_owned(), host.jobs),
        };
        let mut env = host.os_env();
        let strange = STRANGE.iter().filter(|_| folders.again);
        env.extend(strange.map(|(name, value)| (name.into(), value.into())));
        let source = work.join("src");
        fs::copy_tree(folders.source, &source)?;
        let request = BuildRequest {
            driver: host.driver.clone(),
            source,
            folder: work.join("build"),
            prefix: folders.prefix.to_owned(),
            recipe: self.recipe.clone(),
            cmake,
            ninja,
            compilers: self.compilers.clone(),
            jobs,
            fixed_paths,
            network: self.network(host),
            env,
            log: folders.log.to_owned(),
            label: label.to_owned(),
        };
        let built = match folders.again {
            true => fs::with_private_umask(|| build::run(&request, &host.task)),
            false => build::run(&request, &host.task),
        };
        built.map(Some).map_err(|error| Failure::Build { engine: self.engine.clone(), error })
    }
}

//! Engines that are compiled from a CMake tree: what an engine says about its build, and its recipe with what the manifest
//! adds.

use std::collections::BTreeMap;

use crate::base::commit::Commit;
use crate::base::digest::Digest;
use crate::base::platform::{Platform, Variant};
use crate::build::{BuildRecipe, OutputRule, SourceEdit};
use crate::format::manifest::{BuildType, EngineSpec};

use super::EngineError;

/// An engine that is compiled with CMake.
pub trait CmakeProject: std::fmt::Debug + Sync {
    /// The accelerators that this engine can be built for on a platform.
    fn variants(&self, platform: Platform) -> &'static [Variant];

    /// How to build it. Pure: the same request gives the same recipe.
    ///
    /// # Errors
    /// When this engine has no such variant on this platform.
    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError>;
}

/// What a build recipe depends on.
#[derive(Debug)]
pub struct RecipeRequest<'a> {
    /// What the manifest says about the engine.
    pub spec: &'a EngineSpec,
    /// The commit of the source, when it comes from git.
    pub commit: Option<Commit>,
    /// The digest of the source tree.
    pub tree: &'a Digest,
    /// The platform that the build is for.
    pub platform: Platform,
    /// The accelerator that the build is for.
    pub variant: Variant,
}

/// The build of an engine for one variant, without what the manifest adds.
#[derive(Debug)]
pub struct BuildDescription {
    /// Definitions with their values: every option that the machine, the environment or a later commit would decide otherwise.
    pub define: BTreeMap<String, String>,
    /// Definitions that must be ON after configure.
    pub require: &'static [&'static str],
    /// Targets to build when the manifest names none.
    pub targets: &'static [&'static str],
    /// The target that is built always: the server.
    pub server: &'static str,
    /// The files to install, for the targets that are built.
    pub outputs: fn(&[String], Platform) -> Vec<OutputRule>,
    /// Changes of the source.
    pub edits: Vec<SourceEdit>,
    /// What an installed file must contain, which shows that the accelerator is in it.
    pub evidence: Option<&'static str>,
}

/// The recipe of the build that `describe` returns, with what the manifest adds.
///
/// # Errors
/// When the engine `id` has no such variant on this platform.
pub fn recipe(
    id: &'static str,
    variants: &[Variant],
    ask: &RecipeRequest<'_>,
    describe: impl FnOnce() -> BuildDescription,
) -> Result<BuildRecipe, EngineError> {
    if !variants.contains(&ask.variant) {
        let platform = ask.platform.to_string();
        return Err(EngineError::NoVariant { engine: id, variant: ask.variant, platform });
    }
    let BuildDescription { mut define, require, targets, server, outputs, edits, evidence } = describe();
    let spec = ask.spec;
    let own = spec.variant.get(&ask.variant);
    for (name, value) in spec.define.iter().chain(own.iter().flat_map(|own| &own.define)) {
        define.insert(name.clone(), value.to_cmake());
    }
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    let mut require = owned(require);
    require.extend(spec.require.iter().chain(own.iter().flat_map(|own| &own.require)).cloned());
    let mut targets = if spec.targets.is_empty() { owned(targets) } else { spec.targets.clone() };
    targets.push(server.to_owned());
    for list in [&mut require, &mut targets] {
        list.sort();
        list.dedup();
    }
    Ok(BuildRecipe {
        version: 1,
        define,
        outputs: outputs(&targets, ask.platform),
        targets,
        require,
        build_type: format!("{:?}", spec.build_type.unwrap_or(BuildType::Release)),
        edits,
        evidence: evidence.map(str::to_owned).into_iter().collect(),
        native: spec.native,
    })
}

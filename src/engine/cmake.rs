//! Build recipes of engines that have a CMake tree: what the engine says of itself and what the manifest adds.

use std::collections::BTreeMap;

use crate::base::platform::{Platform, Variant};
use crate::build::{BuildRecipe, OutputRule, SourceEdit};
use crate::format::manifest::BuildType;

use super::{EngineError, RecipeRequest};

/// What an engine says of its build, for one variant.
#[derive(Debug)]
pub struct Project {
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

/// The recipe of `project`, with what the manifest adds.
///
/// # Errors
/// When the engine `id` has no such variant on this platform.
pub fn recipe(
    id: &'static str,
    variants: &[Variant],
    ask: &RecipeRequest<'_>,
    project: impl FnOnce() -> Project,
) -> Result<BuildRecipe, EngineError> {
    if !variants.contains(&ask.variant) {
        let platform = ask.platform.to_string();
        return Err(EngineError::NoVariant { engine: id, variant: ask.variant, platform });
    }
    let Project { mut define, require, targets, server, outputs, edits, evidence } = project();
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

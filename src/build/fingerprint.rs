//! What a build depends on, by name, and the digest of it. Pure.
//!
//! Not inputs: where things lie, how many jobs run, what time it is.

use std::collections::BTreeMap;

use super::settings::{self, Env};
use super::toolchain::Toolchain;
use super::{BuildRecipe, ToolPath};
use crate::base::digest::Digest;
use crate::base::platform::{Platform, Variant};

/// Everything that decides what a build produces.
#[derive(Debug)]
pub struct Ingredients<'a> {
    pub engine: &'a str,
    pub variant: Variant,
    pub platform: Platform,
    pub recipe: &'a BuildRecipe,
    /// The digest of the exported source tree.
    pub source: Digest,
    pub toolchain: &'a Toolchain,
    pub cmake: &'a ToolPath,
    pub ninja: Option<&'a ToolPath>,
    /// The caller's environment; only what reaches a build and changes it counts.
    pub env: &'a Env,
    /// [`super::toolchain::processor`], for builds made for exactly this machine.
    pub processor: &'a str,
}

/// Names and values, as receipts keep them.
pub fn inputs(of: &Ingredients<'_>) -> BTreeMap<String, String> {
    let recipe = of.recipe;
    let mut all: BTreeMap<String, String> = [
        ("settings", settings::VERSION.to_string()),
        ("engine", of.engine.to_owned()),
        ("variant", of.variant.to_string()),
        ("platform", of.platform.to_string()),
        ("source", of.source.to_string()),
        ("recipe", recipe.version.to_string()),
        ("build-type", recipe.build_type.clone()),
        ("targets", recipe.targets.join(" ")),
        ("require", recipe.require.join(" ")),
        ("native", recipe.native.to_string()),
        ("tool.cc", of.toolchain.cc.identity.clone()),
        ("tool.cxx", of.toolchain.cxx.identity.clone()),
        ("tool.cmake", of.cmake.identity.clone()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    let optional = [("ninja", of.ninja), ("cuda", of.toolchain.cuda.as_ref()), ("hip", of.toolchain.hip.as_ref())];
    all.extend(optional.into_iter().filter_map(|(name, tool)| Some((format!("tool.{name}"), tool?.identity.clone()))));
    all.extend(recipe.define.iter().map(|(name, value)| (format!("define.{name}"), value.clone())));
    for (index, edit) in recipe.edits.iter().enumerate() {
        all.insert(format!("edit.{index}"), format!("{}: {:?} becomes {:?}", edit.path, edit.find, edit.replace));
    }
    for (index, rule) in recipe.outputs.iter().enumerate() {
        let required = if rule.required { "required" } else { "optional" };
        all.insert(format!("output.{index}"), format!("{} to {}, {required}", rule.glob, rule.to));
    }
    if recipe.native {
        all.insert("processor".to_owned(), of.processor.to_owned());
    }
    // The kit's name carries its version (`MacOSX15.2.sdk`); where it lies does not matter.
    if let Some(kit) = settings::lookup(of.env, "SDKROOT").map(std::path::Path::new).and_then(|path| path.file_name()) {
        all.insert("env.SDKROOT".to_owned(), kit.to_string_lossy().into_owned());
    }
    all
}

/// The digest of named inputs: each name and value with its length (8 bytes, little-endian) before it, in order of names.
pub fn fingerprint(inputs: &BTreeMap<String, String>) -> Digest {
    let mut bytes = b"aitools-build-inputs-1\0".to_vec();
    for text in inputs.iter().flat_map(|(name, value)| [name, value]) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }
    Digest::of(&bytes)
}

/// One input that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    pub name: String,
    pub old: Option<String>,
    pub new: Option<String>,
}

/// Why two fingerprints differ, in order of names.
pub fn differences(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<Difference> {
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let differ = names.into_iter().filter(|name| old.get(*name) != new.get(*name));
    differ
        .map(|name| Difference { name: name.clone(), old: old.get(name).cloned(), new: new.get(name).cloned() })
        .collect()
}

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
    /// The engine's name in the manifest.
    pub engine: &'a str,
    /// The accelerator.
    pub variant: Variant,
    /// The platform that the build is for.
    pub platform: Platform,
    /// What the adapter and the manifest define.
    pub recipe: &'a BuildRecipe,
    /// The digest of the exported source tree.
    pub source: Digest,
    /// The compilers; none to name only what does not depend on them (see [`without_machine`]).
    pub toolchain: Option<&'a Toolchain>,
    /// What stands for CMake and ninja: see [`super::ToolPath::identity`].
    pub cmake: Option<&'a str>,
    /// As `cmake`, for ninja; None when make is used.
    pub ninja: Option<&'a str>,
    /// The caller's environment; only what reaches a build and changes it counts.
    pub env: &'a Env,
    /// [`super::toolchain::processor`], for builds made for exactly this machine.
    pub processor: &'a str,
    /// Whether the build may use the network.
    pub network: bool,
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
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    let tools = [("cmake", of.cmake), ("ninja", of.ninja)];
    let compilers = of.toolchain.into_iter().flat_map(identities);
    let tools = tools.into_iter().filter_map(|(name, identity)| Some((name, identity?))).chain(compilers);
    all.extend(tools.map(|(name, identity)| (format!("tool.{name}"), identity.to_owned())));
    all.extend(recipe.define.iter().map(|(name, value)| (format!("define.{name}"), value.clone())));
    if of.network {
        all.insert("network".to_owned(), "allowed".to_owned());
    }
    if !recipe.evidence.is_empty() {
        all.insert("evidence".to_owned(), recipe.evidence.join("\n"));
    }
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

fn identities(toolchain: &Toolchain) -> impl Iterator<Item = (&'static str, &str)> {
    fn of(tool: Option<&ToolPath>) -> Option<&str> {
        tool.map(|tool| tool.identity.as_str())
    }
    let (cuda, hip) = (of(toolchain.cuda.as_ref()), of(toolchain.hip.as_ref()));
    let always = [("cc", toolchain.cc.identity.as_str()), ("cxx", toolchain.cxx.identity.as_str())];
    let optional = [("cuda", cuda), ("hip", hip)].into_iter().filter_map(|(name, identity)| Some((name, identity?)));
    always.into_iter().chain(optional)
}

/// The inputs that the project decides: without the machine's compilers, and without CMake and ninja when they are not locked.
pub fn without_machine(inputs: &BTreeMap<String, String>, locked: &[&str]) -> BTreeMap<String, String> {
    let machine = |name: &str| match name.strip_prefix("tool.") {
        Some(tool) => !locked.contains(&tool),
        None => name == "env.SDKROOT",
    };
    inputs.iter().filter(|(name, _)| !machine(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
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
    /// The input's name.
    pub name: String,
    /// Its former value; None when it is new.
    pub old: Option<String>,
    /// Its value now; None when it was removed.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::{OutputRule, SourceEdit};

    #[derive(Clone)]
    struct Case {
        engine: &'static str,
        variant: Variant,
        source: &'static str,
        recipe: BuildRecipe,
        toolchain: Toolchain,
        cmake: ToolPath,
        ninja: Option<ToolPath>,
        env: Env,
        processor: &'static str,
    }

    fn tool(path: &str, identity: &str) -> ToolPath {
        ToolPath { path: path.into(), identity: identity.to_owned() }
    }

    fn case() -> Case {
        let edit = SourceEdit { path: "a".parse().unwrap(), find: "b".to_owned(), replace: "c".to_owned() };
        let output = OutputRule { glob: "bin/*".to_owned(), to: "bin".parse().unwrap(), required: true };
        Case {
            engine: "powerinfer",
            variant: Variant::Cpu,
            source: "x",
            recipe: BuildRecipe {
                version: 1,
                define: BTreeMap::from([("A".to_owned(), "ON".to_owned())]),
                targets: vec!["main".to_owned()],
                require: vec!["A".to_owned()],
                build_type: "Release".to_owned(),
                edits: vec![edit],
                outputs: vec![output],
                evidence: Vec::new(),
                native: false,
            },
            toolchain: Toolchain { cc: tool("/cc", "gcc 12"), cxx: tool("/c++", "gcc 12"), cuda: None, hip: None },
            cmake: tool("/cmake", "4.4.4"),
            ninja: Some(tool("/ninja", "1.13")),
            env: Env::from([("PATH".into(), "/bin".into())]),
            processor: "EPYC",
        }
    }

    fn inputs_of(case: &Case) -> BTreeMap<String, String> {
        inputs(&Ingredients {
            engine: case.engine,
            variant: case.variant,
            platform: Platform { os: "linux", arch: "x86_64" },
            recipe: &case.recipe,
            source: Digest::of(case.source.as_bytes()),
            toolchain: Some(&case.toolchain),
            cmake: Some(&case.cmake.identity),
            ninja: case.ninja.as_ref().map(|ninja| ninja.identity.as_str()),
            env: &case.env,
            processor: case.processor,
            network: false,
        })
    }

    #[test]
    fn where_things_lie_is_no_input() {
        let mut other = case();
        other.toolchain.cc.path = "/elsewhere/cc".into();
        other.cmake.path = "/elsewhere/cmake".into();
        other.env.insert("PATH".into(), "/usr/bin".into());
        other.env.insert("HOME".into(), "/h".into());
        other.processor = "Xeon";
        assert_eq!(inputs_of(&case()), inputs_of(&other));
    }

    #[test]
    fn every_input_changes_the_fingerprint_and_is_named_when_it_does() {
        type Change = fn(&mut Case);
        let changes: &[(&str, Change)] = &[
            ("engine", |case| case.engine = "llama-cpp"),
            ("variant", |case| case.variant = Variant::Cuda),
            ("source", |case| case.source = "y"),
            ("recipe", |case| case.recipe.version = 2),
            ("define.A", |case| drop(case.recipe.define.insert("A".to_owned(), "OFF".to_owned()))),
            ("define.B", |case| drop(case.recipe.define.insert("B".to_owned(), String::new()))),
            ("targets", |case| case.recipe.targets.push("server".to_owned())),
            ("require", |case| case.recipe.require.clear()),
            ("build-type", |case| case.recipe.build_type = "Debug".to_owned()),
            ("evidence", |case| case.recipe.evidence.push("x".to_owned())),
            ("edit.0", |case| case.recipe.edits[0].replace = "d".to_owned()),
            ("output.0", |case| case.recipe.outputs[0].required = false),
            ("native", |case| case.recipe.native = true),
            ("tool.cc", |case| case.toolchain.cc.identity = "gcc 13".to_owned()),
            ("tool.cxx", |case| case.toolchain.cxx.identity = "gcc 13".to_owned()),
            ("tool.cuda", |case| case.toolchain.cuda = Some(tool("/nvcc", "13"))),
            ("tool.hip", |case| case.toolchain.hip = Some(tool("/hipcc", "6"))),
            ("tool.cmake", |case| case.cmake.identity = "4.5".to_owned()),
            ("tool.ninja", |case| case.ninja = None),
            ("env.SDKROOT", |case| drop(case.env.insert("SDKROOT".into(), "/x/MacOSX15.2.sdk".into()))),
        ];
        let old = inputs_of(&case());
        for (name, change) in changes {
            let mut changed = case();
            change(&mut changed);
            let new = inputs_of(&changed);
            assert_ne!(fingerprint(&old), fingerprint(&new), "{name}");
            let differing = differences(&old, &new);
            assert!(differing.iter().any(|difference| difference.name == *name), "{name}: {differing:?}");
        }
    }

    #[test]
    fn a_native_build_belongs_to_one_processor() {
        let (mut here, mut there) = (case(), case());
        (here.recipe.native, there.recipe.native, there.processor) = (true, true, "Xeon");
        let expected =
            Difference { name: "processor".to_owned(), old: Some("EPYC".to_owned()), new: Some("Xeon".to_owned()) };
        assert_eq!(differences(&inputs_of(&here), &inputs_of(&there)), [expected]);
    }

    #[test]
    fn names_and_values_cannot_run_into_each_other() {
        let digest = |pairs: &[(&str, &str)]| {
            fingerprint(&pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
        };
        let all = [
            digest(&[]),
            digest(&[("", "")]),
            digest(&[("a", "bc")]),
            digest(&[("ab", "c")]),
            digest(&[("a", "b"), ("c", "")]),
            digest(&[("a", ""), ("b", "c")]),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[index + 1..].contains(one), "{index}");
        }
    }

    /// Changing this strands every artifact that was ever built.
    #[test]
    fn the_serialisation_stays_as_it_is() {
        let known = fingerprint(&BTreeMap::from([("a".to_owned(), "b".to_owned())]));
        let text = b"aitools-build-inputs-1\0\x01\0\0\0\0\0\0\0a\x01\0\0\0\0\0\0\0b";
        assert_eq!(known, Digest::of(text));
    }
}

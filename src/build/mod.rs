//! Layer 2: runs one [`BuildRecipe`] and says what came out. Knows nothing of engines.
//!
//! Invariant: a build sees a scrubbed environment and, where the system allows, no network. It writes to its own build
//! folder and to a staged prefix; only the store makes that an artifact.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::name::RelPath;

/// What an adapter asks of a build. Every field is an input of the fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildRecipe {
    /// Counted up when the adapter changes something that the other fields do not show.
    pub version: u32,
    /// CMake definitions, values as CMake writes them.
    pub define: BTreeMap<String, String>,
    pub targets: Vec<String>,
    /// Definitions that must be ON in CMakeCache.txt after configure.
    pub require: Vec<String>,
    pub build_type: String,
    /// Replacements in the exported source before configure: what the build would otherwise find out from git.
    pub edits: Vec<SourceEdit>,
    /// What is installed: globs over the build folder, and the folder of the artifact they go to.
    pub outputs: Vec<OutputRule>,
    /// Built for exactly this machine's processor: the processor's model then is an input.
    pub native: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceEdit {
    pub path: RelPath,
    pub find: String,
    pub replace: String,
}

/// Files of the build folder that become part of the artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRule {
    /// A glob over the build folder, such as `bin/llama-server*`.
    pub glob: String,
    /// The folder below the artifact, such as `bin`.
    pub to: RelPath,
    /// Fail when nothing matches.
    pub required: bool,
}

/// A program that a build uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolPath {
    pub path: PathBuf,
    /// What identifies it in the fingerprint: `4.4.4 sha256:…` for a locked tool, a version line for the machine's own.
    pub identity: String,
}

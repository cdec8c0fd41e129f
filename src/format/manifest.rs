//! The manifest: what people ask for. TOML, one file per set of engines and models.
//!
//! The types below are the format: parsing, the JSON Schema of `aitools schema manifest` and "did you mean" come from them.
//! What types cannot say is in [`check`].

mod check;
mod derive;

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::address::Address;
use crate::base::commit::Commit;
use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;

use super::Parsed;
use super::document::{Document, Syntax};
use super::schema::Schema;

pub use check::{check_source, glob};
pub use derive::{ConvertSpec, DeriveSpec, Request, Step};

/// The format's version that this program reads.
pub const VERSION: u32 = 1;
/// Bytes of a manifest at most.
pub const MAX_BYTES: usize = 1 << 20;
/// The build tools that `[tools]` can name, beside the Python packages of conversions.
pub const TOOLS: [&str; 2] = ["cmake", "ninja"];

static SCHEMA: Schema<Manifest> = Schema::new();

/// Reads a manifest; `name` is the file's name in messages.
///
/// # Errors
/// Everything that is wrong with the file: syntax, else types and keys, else what contradicts itself.
pub fn parse(name: &str, bytes: &[u8]) -> Result<(Parsed<Manifest>, Vec<Diagnostic>), Diagnostics> {
    let document = Document::parse(Syntax::Toml, name, bytes, MAX_BYTES)?;
    document.check_version("manifest", VERSION..=VERSION)?;
    let value = SCHEMA.decode(&document)?;
    let mut problems = check::check(&value, &document);
    problems.sort();
    problems.or(Parsed { value, document })
}

/// What an entry of a manifest or lockfile is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A build tool or a Python package.
    Tool,
    /// A program that runs models.
    Engine,
    /// An AI model.
    Model,
}

impl Kind {
    /// In the order of a lockfile.
    pub const ALL: [Self; 3] = [Self::Tool, Self::Engine, Self::Model];

    /// The word, in lower case.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tool => "tool",
            Self::Engine => "engine",
            Self::Model => "model",
        }
    }

    /// The word with `a` or `an`.
    pub fn with_article(self) -> &'static str {
        match self {
            Self::Tool => "a tool",
            Self::Engine => "an engine",
            Self::Model => "a model",
        }
    }
}

/// What a project wants on a machine.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of this format: 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u32,
    /// Build tools the machine need not have (`cmake`, `ninja`), and Python packages that models are converted with: locked
    /// like everything else.
    #[serde(default)]
    pub tools: BTreeMap<Name, PypiSpec>,
    /// The engines, by name.
    #[serde(default)]
    pub engines: BTreeMap<Name, EngineSpec>,
    /// The models, by name.
    #[serde(default)]
    pub models: BTreeMap<Name, ModelSpec>,
    /// The policies.
    #[serde(default)]
    pub policies: PoliciesSpec,
    /// Endpoints to use instead of others: address prefix to replacement. Not recorded in the lockfile.
    #[serde(default)]
    pub mirrors: BTreeMap<String, String>,
}

/// An engine: where its source comes from and how it is built.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EngineSpec {
    /// Which adapter drives it (`llama-cpp`, `powerinfer`, …); the engine's own name when not given.
    pub adapter: Option<String>,
    /// Where its source comes from.
    pub source: SourceSpec,
    /// CMake targets to build; the adapter's own list when not given.
    #[serde(default)]
    pub targets: Vec<String>,
    /// CMake definitions, added to the adapter's.
    #[serde(default)]
    pub define: BTreeMap<String, DefineValue>,
    /// Definitions that must be ON in CMakeCache.txt after configure, or the build fails.
    #[serde(default)]
    pub require: Vec<String>,
    /// CMAKE_BUILD_TYPE; `Release` when not given.
    pub build_type: Option<BuildType>,
    /// Build for exactly this machine's processor instead of for named features. The result then runs on no other processor.
    #[serde(default)]
    pub native: bool,
    /// What its build and its process may do beyond what all may. The lockfile shows it.
    #[serde(default)]
    pub allow: BTreeSet<Permission>,
    /// What each accelerator adds (`cpu`, `cuda`, `rocm`, `metal`). An engine without any has the variant `cpu` alone.
    #[serde(default)]
    pub variant: BTreeMap<Variant, VariantSpec>,
}

/// What an engine may do beyond what all may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Permission {
    /// Use the network, in its build and while it runs.
    Network,
}

/// What one accelerator adds to an engine's build.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VariantSpec {
    /// CMake definitions for this accelerator alone.
    #[serde(default)]
    pub define: BTreeMap<String, DefineValue>,
    /// Definitions that must be ON for this accelerator.
    #[serde(default)]
    pub require: Vec<String>,
}

/// CMake's build types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum BuildType {
    /// Optimised.
    Release,
    /// Optimised, with debug information.
    RelWithDebInfo,
    /// Optimised for size.
    MinSizeRel,
    /// Not optimised, with debug information.
    Debug,
}

/// The value of a CMake definition.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum DefineValue {
    /// `ON` or `OFF`.
    Bool(bool),
    /// A number.
    Int(i64),
    /// Any other value.
    Text(String),
}

impl DefineValue {
    /// As CMake writes it: `ON`, `OFF`, or the string itself.
    pub fn to_cmake(&self) -> String {
        match self {
            Self::Bool(true) => "ON".to_owned(),
            Self::Bool(false) => "OFF".to_owned(),
            Self::Int(number) => number.to_string(),
            Self::Text(text) => text.clone(),
        }
    }
}

/// An AI model: where its weights come from and where engines find them. It has either `source` or `derive`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Where its files come from.
    pub source: Option<SourceSpec>,
    /// Made on this machine from another model.
    pub derive: Option<DeriveSpec>,
    /// The folder for the weights, relative to the project; `models/<name>` when not given.
    pub place: Option<RelPath>,
    /// The name the main weights file gets there; its own name when not given.
    pub weights: Option<RelPath>,
}

impl ModelSpec {
    /// What the lockfile repeats. The parser has seen to it that there is one.
    pub fn request(&self) -> Option<Request> {
        let source = self.source.clone().map(Request::Source);
        source.or_else(|| self.derive.clone().map(Request::Derive))
    }

    /// The folder for the weights, relative to the project.
    pub fn place(&self, name: &Name) -> RelPath {
        self.place.clone().unwrap_or_else(|| RelPath::from_name("models", name))
    }
}

/// Which policies belong to the project.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoliciesSpec {
    /// Globs relative to the project folder.
    #[serde(default)]
    pub include: Vec<String>,
}

/// Where bytes come from. The first key decides: `git`, `hf`, `url`, `path` or `pypi`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum SourceSpec {
    /// A git repository.
    Git(GitSpec),
    /// A repository on the Hugging Face Hub.
    Hf(HfSpec),
    /// A file or archive at an address.
    Url(UrlSpec),
    /// A folder or file on this machine.
    Path(PathSpec),
    /// A package of the Python package index.
    Pypi(PypiSpec),
}

/// A git repository at one commit. At most one of `rev`, `tag` and `branch`; the remote's HEAD when none is given.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GitSpec {
    /// The address to fetch from. git's own `url.<base>.insteadOf` applies.
    pub git: Address,
    /// A full commit id: 40 lowercase hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rev: Option<Commit>,
    /// A tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// A branch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The project's own git submodule that has the same commit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub submodule: Option<RelPath>,
    /// Submodules of the repository itself that the build needs, by path. None when not given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub submodules: Vec<RelPath>,
    /// The folder of the repository to build.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subdir: Option<RelPath>,
}

/// A model repository on the Hugging Face Hub.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HfSpec {
    /// `org/repo`.
    pub hf: String,
    /// A branch, a tag or a full commit id; `main` when not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// Globs over the repository's files; every file when not given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// One file, or one tar or zip archive, at an address.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UrlSpec {
    /// An http or https address without user and password.
    pub url: String,
    /// Checked when given; computed and locked when not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    /// The folder of the archive to use, after its single top folder (if it has one) is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subdir: Option<RelPath>,
    /// For models: globs over the archive's files. The address itself is the weights file when not given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// A folder (or, for models, a file) on this machine, relative to the project unless absolute.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PathSpec {
    /// The path, relative to the project unless absolute.
    pub path: String,
    /// For models: globs over the folder's files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// A package from the Python package index the machine's own pip or uv is set up for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PypiSpec {
    /// The project name.
    pub pypi: String,
    /// The exact version.
    pub version: String,
    /// Take the source distribution instead of a wheel.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub sdist: bool,
    /// The folder of the package to use, after an sdist's top folder is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subdir: Option<RelPath>,
    /// For models: globs over the package's files.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

#[cfg(test)]
mod tests;

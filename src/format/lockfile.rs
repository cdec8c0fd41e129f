//! The lockfile: exactly what the manifest's wishes turned out to be. TOML, written by the tool, read in reviews.
//!
//! Design goals: the same inputs give the same bytes; one file serves every platform; request and result stand side by
//! side, so that staleness is decided entry by entry; a text merge of two branches that touched different entries is
//! right; nothing about the machine, the time, a mirror or a token is in it.
//! Version history: 1 (2026): the first.

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};

use super::manifest::SourceSpec;

/// The format's version that this program writes.
pub const VERSION: u32 = 1;

/// In file order: `version`, then tools, engines and models, each sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lockfile {
    pub tools: Vec<Entry>,
    pub engines: Vec<Entry>,
    pub models: Vec<Entry>,
}

/// One thing: what was asked, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Entry {
    pub name: Name,
    /// The manifest's source, word for word: the entry is stale when this differs.
    pub request: SourceSpec,
    #[serde(flatten)]
    pub pin: Pin,
}

/// What a request resolved to. Which fields are set follows from the kind of source and of entry; the parser checks it:
/// engines have `tree`; models have `files`; `git` and `hf` have `commit`; `url` and `pypi` have `downloads`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Pin {
    /// 40 hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Digest of the source tree an engine is built from (see [`crate::base::tree`]), after `subdir` is applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tree: Option<Digest>,
    /// Submodules that were asked for, by path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub submodules: Vec<SubmodulePin>,
    /// What travels, before unpacking: the archive, or the packages of every platform.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub downloads: Vec<FilePin>,
    /// The weights, by path within the source, globs expanded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FilePin>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SubmodulePin {
    pub path: RelPath,
    pub git: String,
    pub commit: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FilePin {
    pub path: RelPath,
    /// Size in bytes.
    pub size: u64,
    pub sha256: Digest,
}

/// What an entry is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Tool,
    Engine,
    Model,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Tool, Self::Engine, Self::Model];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tool => "tool",
            Self::Engine => "engine",
            Self::Model => "model",
        }
    }
}

impl Lockfile {
    pub fn entries(&self, kind: Kind) -> &[Entry] {
        match kind {
            Kind::Tool => &self.tools,
            Kind::Engine => &self.engines,
            Kind::Model => &self.models,
        }
    }

    pub fn get(&self, kind: Kind, name: &Name) -> Option<&Entry> {
        self.entries(kind).iter().find(|entry| entry.name == *name)
    }
}

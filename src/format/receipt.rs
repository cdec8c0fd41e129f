//! The receipt of a built artifact: which inputs made it, and what came out. JSON, beside the artifact, written last.
//!
//! A receipt carries a message authentication code under a key that is not in the cache (see [`crate::store`]):
//! one that arrives with a restored cache from elsewhere is not believed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::digest::Digest;
use crate::base::name::{Name, RelPath};
use crate::base::platform::Variant;

pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    pub version: u32,
    pub engine: Name,
    pub variant: Variant,
    /// Digest of `inputs`: the artifact's name in the store.
    pub fingerprint: Digest,
    /// Every named input of the build.
    pub inputs: BTreeMap<String, String>,
    /// What was installed, by path below the artifact.
    pub files: BTreeMap<RelPath, InstalledFile>,
    /// Things about the build that do not change its result: tool versions in full, warnings, seconds.
    pub notes: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct InstalledFile {
    /// Size in bytes.
    pub size: u64,
    pub sha256: Digest,
    pub executable: bool,
}

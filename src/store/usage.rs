//! What lies in the cache, what it takes of the disk, and its removal.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::digest::Digest;
use crate::base::fs::{self, Footprint};
use crate::base::lock;

use super::{Store, StoreError, TAG_FILE};

/// What kind of thing lies in the cache; each has a folder of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A verified file.
    Blob,
    /// An engine's source.
    Tree,
    /// An unpacked build tool.
    Tool,
    /// An installed engine.
    Artifact,
    /// The receipt of a derivation.
    Derived,
    /// A partial download, or a git mirror: nothing in it is trusted or needed.
    Scratch,
    /// The log of a build.
    Log,
    /// What a former version of the program wrote.
    Former,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Blob, Self::Tree, Self::Tool, Self::Artifact, Self::Derived, Self::Scratch, Self::Log, Self::Former];

    /// For people: in the plural.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Blob => "files",
            Self::Tree => "engine sources",
            Self::Tool => "build tools",
            Self::Artifact => "engines",
            Self::Derived => "receipts of derived models",
            Self::Scratch => "downloads and git mirrors",
            Self::Log => "build logs",
            Self::Former => "files of a former version",
        }
    }
}

/// One thing in the cache.
#[derive(Debug, Clone, Serialize)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// Its digest, where that is its name.
    pub digest: Option<Digest>,
    /// The file or folder. A folder's listing lies beside it.
    pub path: PathBuf,
    /// What it takes of the disk.
    #[serde(flatten)]
    pub footprint: Footprint,
    /// When it was put there or last linked, in nanoseconds since 1970; 0 when that is not known.
    pub touched_ns: u64,
}

/// The ending of a listing beside a folder.
const LIST: &str = "list";
/// The folders of sources in `scratch/`.
const SCRATCH: &[&str] = &["git", "pypi", "url"];

impl Store {
    /// Everything in the cache, each kind in the order of names.
    pub fn items(&self) -> Vec<Item> {
        let mut items = Vec::new();
        for kind in Kind::ALL {
            for path in self.paths(kind) {
                let name = if kind == Kind::Derived { path.file_stem() } else { path.file_name() };
                let digest = name.and_then(|name| Digest::from_hex(name.to_str()?).ok());
                let mut footprint = fs::footprint(&path);
                if matches!(kind, Kind::Tree | Kind::Tool) {
                    footprint += fs::footprint(&path.with_extension(LIST));
                }
                let touched_ns = fs::touched_ns(&path).unwrap_or(0);
                items.push(Item { kind, digest, path, footprint, touched_ns });
            }
        }
        items
    }

    /// What has a name that the store gives, in a folder of its own: a cache folder may turn out to be somebody's, or to
    /// have links to what is.
    fn paths(&self, kind: Kind) -> Vec<PathBuf> {
        let below = |name: &str| {
            let folder = self.root.join(name);
            let is_folder = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
            let is_own = folder.ancestors().take_while(|above| *above != self.root).all(is_folder);
            if is_own { fs::read_dir(&folder).unwrap_or_default() } else { Vec::new() }
        };
        let named = |name: &str, ending: Option<&str>| -> Vec<PathBuf> {
            let is_ours = |path: &PathBuf| {
                let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
                Digest::from_hex(stem).is_ok() && path.extension() == ending.map(std::ffi::OsStr::new)
            };
            below(name).into_iter().filter(is_ours).collect()
        };
        match kind {
            Kind::Blob => named("blobs", None),
            Kind::Tree => named("trees", None),
            Kind::Tool => named("tools", None),
            Kind::Artifact => named("artifacts", None),
            Kind::Derived => named("derived", Some("json")),
            Kind::Scratch => SCRATCH.iter().flat_map(|source| below(&format!("scratch/{source}"))).collect(),
            Kind::Log => {
                let is_log = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "log" || ending == "txt");
                below("logs").into_iter().filter(is_log).collect()
            }
            Kind::Former => named("paths", None),
        }
    }

    /// Removes things in one step each, what vouches for them first. Call it while holding [`Store::alone`]; `done` is told
    /// of each. A kill in between leaves folders that count as missing, and leftovers that the next run removes.
    ///
    /// # Errors
    /// When something cannot be removed; the rest stays.
    pub fn remove(&self, items: &[&Item], done: &mut dyn FnMut(&Item)) -> Result<(), StoreError> {
        if items.is_empty() {
            return Ok(());
        }
        let staging = self.stage()?;
        for (index, item) in items.iter().enumerate() {
            let is_dir = fs::symlink_metadata(&item.path).is_ok_and(|meta| meta.is_dir());
            if matches!(item.kind, Kind::Tree | Kind::Tool) {
                fs::remove_file(&item.path.with_extension(LIST))?;
            }
            if is_dir {
                let out_of_the_way = staging.path().join(index.to_string());
                fs::rename(&item.path, &out_of_the_way)?;
                fs::remove_dir_all(&out_of_the_way)?;
            } else {
                fs::remove_file(&item.path)?;
            }
            done(item);
        }
        Ok(())
    }

    /// Whether the folder is a cache that this program made; also when there is no such folder.
    pub fn is_ours(&self) -> bool {
        !fs::exists(&self.root) || fs::exists(&self.root.join(TAG_FILE))
    }

    /// Whether a process is making something at this moment.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn is_in_use(&self) -> Result<bool, StoreError> {
        let folder = self.root.join("staging");
        if !fs::exists(&folder) {
            return Ok(false);
        }
        for path in fs::read_dir(&folder)? {
            if is_lock(&path) && lock::try_acquire(&path)?.is_none() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn is_lock(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "lock")
}

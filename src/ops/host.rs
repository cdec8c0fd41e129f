//! This machine, as far as the verbs need it: the store, the environment at start, and what the user set.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use crate::base::platform::Variant;
use crate::engine::Engine;
use crate::engine::backend::passed_on;
use crate::report::Task;
use crate::source::World;
use crate::store::Store;

use super::Project;

/// This machine and the user's settings.
#[derive(Debug)]
pub struct Host {
    /// The store of verified files.
    pub store: Store,
    /// The adapters that manifests can name.
    pub engines: &'static [&'static dyn Engine],
    /// Environment variables as they were when the program started.
    pub env: BTreeMap<String, String>,
    /// This program's own file: build driver and engine supervisor are hidden commands of it.
    pub driver: PathBuf,
    /// Whether the network must not be used.
    pub offline: bool,
    /// Parallel compile jobs.
    pub jobs: u32,
    /// From `--variant` or the settings.
    pub variant: Option<Variant>,
    /// Receives progress, and says whether the user wants to stop.
    pub task: Task,
}

impl Host {
    /// The adapter of that id.
    pub fn engine(&self, id: &str) -> Option<&'static dyn Engine> {
        self.engines.iter().copied().find(|engine| engine.id() == id)
    }

    /// The environment as programs are given it.
    pub fn os_env(&self) -> crate::build::settings::Env {
        self.env.iter().map(|(name, value)| (name.into(), value.into())).collect()
    }

    /// The environment of engines.
    pub fn engine_env(&self) -> BTreeMap<OsString, OsString> {
        passed_on(self.env.iter().map(|(name, value)| (name.as_ref(), value.as_ref())))
    }

    /// Lets the user interrupt hashing.
    pub fn stopping(&self) -> impl FnMut(u64) -> std::io::Result<()> + Send + '_ {
        |_| self.task.check().map_err(std::io::Error::other)
    }

    /// The environment of sources.
    pub fn world(&self, project: &Project) -> World {
        World {
            task: self.task.clone(),
            project: project.root.clone(),
            scratch: self.store.scratch(),
            offline: self.offline,
            mirrors: project.manifest.value.mirrors.clone().into_iter().collect(),
            env: self.env.clone(),
        }
    }
}

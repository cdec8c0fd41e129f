//! What holds for this run: flag, else `AITOOLS_*`, else `configs/settings.toml`, else a default. Each value remembers which.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::base::cancel::Cancel;
use crate::base::fs;
use crate::base::platform::Variant;
use crate::engine::ENGINES;
use crate::format::settings::{self, Settings};
use crate::ops::sync::LockMode;
use crate::ops::{Failure, Host, Project, project};
use crate::report::Task;
use crate::store::Store;
use crate::store::seal::Key;

use super::args::{self, BuildWith, Global};
use super::output::Output;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    Flag,
    /// An environment variable.
    Variable(&'static str),
    File,
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => f.write_str(name),
            Self::File => f.write_str("configs/settings.toml"),
            Self::Default => f.write_str("default"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting<T> {
    pub value: T,
    pub origin: Origin,
}

/// One run of the program: what was asked, where, and how to tell.
#[derive(Debug)]
pub struct Session<'a> {
    global: &'a Global,
    env: BTreeMap<String, String>,
    pub cwd: PathBuf,
    pub task: Task,
}

impl<'a> Session<'a> {
    /// # Errors
    /// When the working folder is gone.
    pub fn new(global: &'a Global, output: &Output, cancel: Cancel) -> Result<Self, Failure> {
        let cwd = current_dir()?;
        let cwd = global.directory.as_ref().map_or(cwd.clone(), |folder| cwd.join(folder));
        if !cwd.is_dir() {
            let what = format!("there is no folder `{}`", cwd.display());
            return Err(Failure::Usage { what, hint: None });
        }
        let env = environment();
        Ok(Self { global, env, cwd, task: Task::new(output.reporter(), cancel) })
    }

    /// The project that the arguments mean.
    ///
    /// # Errors
    /// When there is none, or its files have problems.
    pub fn project(&self, output: &Output) -> Result<Project, Failure> {
        let chosen = match &self.global.manifest {
            Some(name) => Some(name.clone()),
            None => self.settings(&project::find_root(&self.cwd))?.manifest,
        };
        let path = project::find_manifest(chosen.as_deref(), &self.cwd)?;
        let project = Project::load(&path)?;
        output.warnings(&project.warnings);
        Ok(project)
    }

    /// The settings file of a project; all defaults when there is none.
    ///
    /// # Errors
    /// Every problem of the file at once.
    pub fn settings(&self, root: &Path) -> Result<Settings, Failure> {
        let path = root.join("configs").join("settings.toml");
        match fs::read_bounded(&path, project::MAX_MANIFEST_BYTES) {
            Ok(bytes) => Ok(settings::parse(&project::shown(&path, root), &bytes)?.0.value),
            Err(error) if error.is_not_found() => Ok(Settings::default()),
            Err(error) => Err(error.into()),
        }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The cache folder.
    ///
    /// # Errors
    /// When neither flag, variable nor settings name one and the user has no home.
    pub fn cache_dir(&self, settings: &Settings, root: &Path) -> Result<Setting<PathBuf>, Failure> {
        if let Some(folder) = &self.global.cache_dir {
            return Ok(Setting { value: self.cwd.join(folder), origin: Origin::Flag });
        }
        if let Some(folder) = self.variable("AITOOLS_CACHE_DIR") {
            return Ok(Setting { value: self.cwd.join(folder), origin: Origin::Variable("AITOOLS_CACHE_DIR") });
        }
        if let Some(folder) = &settings.cache_dir {
            return Ok(Setting { value: root.join(folder), origin: Origin::File });
        }
        let value = self.platform_dir("XDG_CACHE_HOME", ".cache", "Library/Caches", "AITOOLS_CACHE_DIR")?;
        Ok(Setting { value: if cfg!(windows) { value.join("cache") } else { value }, origin: Origin::Default })
    }

    /// The folder for what must not be in the cache: the key that receipts are sealed with.
    ///
    /// # Errors
    /// When no variable names one and the user has no home.
    pub fn state_dir(&self) -> Result<PathBuf, Failure> {
        if let Some(folder) = self.variable("AITOOLS_STATE_DIR") {
            return Ok(self.cwd.join(folder));
        }
        self.platform_dir("XDG_STATE_HOME", ".local/state", "Library/Application Support", "AITOOLS_STATE_DIR")
    }

    fn platform_dir(&self, xdg: &str, linux: &str, macos: &str, ours: &str) -> Result<PathBuf, Failure> {
        if cfg!(windows)
            && let Some(folder) = self.variable("LOCALAPPDATA")
        {
            return Ok(PathBuf::from(folder).join("aitools"));
        }
        if let Some(folder) = self.variable(xdg).map(PathBuf::from).filter(|path| path.is_absolute()) {
            return Ok(folder.join("aitools"));
        }
        let Some(home) = home() else {
            let what = "the home folder of this user is not known".to_owned();
            return Err(Failure::Usage { what, hint: Some(format!("set `HOME`, or `{ours}` to a folder")) });
        };
        Ok(home.join(if cfg!(target_os = "macos") { macos } else { linux }).join("aitools"))
    }

    fn key(&self) -> Result<Key, Failure> {
        match self.variable("AITOOLS_RECEIPT_KEY") {
            Some(secret) => Ok(Key::from_secret(secret)),
            None => Ok(Key::load_or_create(&self.state_dir()?.join("receipt.key"))?),
        }
    }

    /// Whether to send nothing at all.
    pub fn offline(&self, settings: &Settings) -> Setting<bool> {
        if self.global.offline {
            return Setting { value: true, origin: Origin::Flag };
        }
        match self.variable("AITOOLS_OFFLINE") {
            Some(text) => Setting { value: is_true(text), origin: Origin::Variable("AITOOLS_OFFLINE") },
            None => match settings.offline {
                Some(value) => Setting { value, origin: Origin::File },
                None => Setting { value: false, origin: Origin::Default },
            },
        }
    }

    /// This machine for a verb that works on a project.
    ///
    /// # Errors
    /// When the cache cannot be opened.
    pub fn host(&self, root: &Path, build: Option<&BuildWith>) -> Result<Host, Failure> {
        let settings = self.settings(root)?;
        let cache = self.cache_dir(&settings, root)?.value;
        let store = Store::open(&cache, self.key()?)?;
        let mut env = self.env.clone();
        if let Some(python) = &settings.python {
            env.entry("AITOOLS_PYTHON".to_owned()).or_insert_with(|| python.clone());
        }
        let variant: Option<Variant> = build.and_then(|build| build.variant).or(settings.variant);
        let jobs =
            build.and_then(|build| build.jobs).or(settings.jobs.filter(|jobs| *jobs > 0)).unwrap_or_else(processors);
        let offline = self.offline(&settings).value;
        let (engines, driver, task) = (ENGINES, driver()?, self.task.clone());
        Ok(Host { store, engines, env, driver, offline, jobs, variant, task })
    }

    /// How the lockfile is treated. `CI=true` implies `--locked`.
    pub fn lock_mode(&self, asked: &args::LockMode, settings: &Settings) -> LockMode {
        let said = asked.locked.is_some() || asked.frozen.is_some();
        let (locked, frozen) = if said { (asked.locked, asked.frozen) } else { (settings.locked, settings.frozen) };
        match (locked, frozen) {
            (_, Some(true)) => LockMode::Frozen,
            (Some(true), _) => LockMode::Locked,
            (None, _) if self.variable("CI").is_some_and(is_true) => LockMode::Locked,
            _ => LockMode::Update,
        }
    }

    pub fn env(&self) -> &BTreeMap<String, String> {
        &self.env
    }
}

fn is_true(text: &str) -> bool {
    !matches!(text.to_ascii_lowercase().as_str(), "0" | "false" | "no" | "off")
}

fn processors() -> u32 {
    std::thread::available_parallelism().ok().and_then(|count| u32::try_from(count.get()).ok()).unwrap_or(1)
}

#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn environment() -> BTreeMap<String, String> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "the one place that asks for the working folder")]
fn current_dir() -> Result<PathBuf, Failure> {
    let gone = |error| fs::FsError::new("find", Path::new("."), error);
    Ok(std::env::current_dir().map_err(gone)?)
}

/// The user's home, from the environment or the system's own record of the user.
fn home() -> Option<PathBuf> {
    std::env::home_dir().filter(|home| home.is_absolute())
}

fn driver() -> Result<PathBuf, Failure> {
    let lost = |error| fs::FsError::new("find", Path::new("aitools"), error);
    Ok(std::env::current_exe().map_err(lost)?)
}

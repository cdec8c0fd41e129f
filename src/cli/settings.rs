//! The settings of this run. Precedence: flag, `AITOOLS_*` variable, the project's `configs/settings.toml`, the user's own
//! `settings.toml`, default. Each value remembers its origin. Nothing here prints.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use serde::Serialize;

use crate::base::cancel::Cancel;
use crate::base::fs;
use crate::base::platform::Variant;
use crate::engine::ENGINES;
use crate::format::settings::{self, Owner, Settings};
use crate::ops::sync::LockMode;
use crate::ops::{Failure, Host, Project, project};
use crate::report::{Reporter, Task};
use crate::source::pypi::PYTHON;
use crate::store::Store;
use crate::store::seal::Key;

use super::args::{self, BuildWith, Global};

/// Where the value of a setting came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A command line option.
    Flag,
    /// The environment variable of this name.
    Variable(&'static str),
    /// `configs/settings.toml` of the project.
    Project,
    /// `settings.toml` in the user's own configuration folder.
    User,
    /// Nothing set it.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("flag"),
            Self::Variable(name) => f.write_str(name),
            Self::Project => f.write_str("configs/settings.toml"),
            Self::User => f.write_str("your settings.toml"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value and its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting<T> {
    /// The value that this run uses.
    pub value: T,
    /// Where it came from.
    pub origin: Origin,
}

impl<T> Setting<T> {
    fn new(value: T, origin: Origin) -> Self {
        Self { value, origin }
    }
}

/// The two settings files as read; all keys are unset where a file is missing.
#[derive(Debug, Default)]
pub struct Files {
    project: Settings,
    user: Settings,
}

impl Files {
    /// The first file that sets a key: the project's, then the user's.
    fn get<T>(&self, key: impl Fn(&Settings) -> Option<T>) -> Option<Setting<T>> {
        let project = key(&self.project).map(|value| Setting::new(value, Origin::Project));
        project.or_else(|| key(&self.user).map(|value| Setting::new(value, Origin::User)))
    }
}

/// One run of the program: the global options, the environment, the working folder, and who is told of progress.
#[derive(Debug)]
pub struct Session<'a> {
    global: &'a Global,
    env: BTreeMap<String, String>,
    /// The folder that relative paths of the command line start from: `-C`, else the working folder. Absolute.
    pub cwd: PathBuf,
    /// Takes progress, and knows whether the user asked to stop.
    pub task: Task,
    /// Settings files that were read, by project folder.
    files: RefCell<BTreeMap<PathBuf, Rc<Files>>>,
}

impl<'a> Session<'a> {
    /// Reads the environment; `cancel` ends every long operation.
    ///
    /// # Errors
    /// When the working folder does not exist.
    pub fn new(global: &'a Global, reporter: Arc<dyn Reporter>, cancel: Cancel) -> Result<Self, Failure> {
        let cwd = current_dir()?;
        let cwd = global.directory.as_ref().map_or(cwd.clone(), |folder| cwd.join(folder));
        if !cwd.is_dir() {
            let what = format!("there is no folder `{}`", cwd.display());
            return Err(Failure::Usage { what, hint: None });
        }
        Ok(Self::with(global, environment(), cwd, Task::new(reporter, cancel)))
    }

    fn with(global: &'a Global, env: BTreeMap<String, String>, cwd: PathBuf, task: Task) -> Self {
        Self { global, env, cwd, task, files: RefCell::default() }
    }

    /// The project that the arguments and settings name. Its warnings are in [`Project::warnings`].
    ///
    /// # Errors
    /// When there is none, or its files have problems.
    pub fn project(&self) -> Result<Project, Failure> {
        let chosen = self.manifest(&project::find_root(&self.cwd))?.value;
        let path = project::find_manifest(chosen.as_deref(), &self.cwd)?;
        Project::load(&path)
    }

    /// The manifest to use: a name or a path; None is the default name.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn manifest(&self, root: &Path) -> Result<Setting<Option<String>>, Failure> {
        if let Some(name) = &self.global.manifest {
            let variable = self.variable("AITOOLS_MANIFEST") == Some(name);
            let origin = if variable { Origin::Variable("AITOOLS_MANIFEST") } else { Origin::Flag };
            return Ok(Setting::new(Some(name.clone()), origin));
        }
        let found = self.files(root)?.get(|file| file.manifest.clone());
        Ok(found.map_or(Setting::new(None, Origin::Default), |set| Setting::new(Some(set.value), set.origin)))
    }

    /// The settings files for a project. Each is read once in a run.
    ///
    /// # Errors
    /// Every problem of the first file that has one.
    fn files(&self, root: &Path) -> Result<Rc<Files>, Failure> {
        if let Some(read) = self.files.borrow().get(root) {
            return Ok(Rc::clone(read));
        }
        let path = root.join("configs").join("settings.toml");
        let project = read_settings(&path, &project::shown(&path, root), Owner::Project)?;
        let user = match self.user_file() {
            Some(path) => read_settings(&path, &path.display().to_string(), Owner::User)?,
            None => Settings::default(),
        };
        let files = Rc::new(Files { project, user });
        self.files.borrow_mut().insert(root.to_owned(), Rc::clone(&files));
        Ok(files)
    }

    /// The user's own settings file, whether or not it exists; None when the user has no home.
    pub fn user_file(&self) -> Option<PathBuf> {
        let folder = self.platform_dir("XDG_CONFIG_HOME", ".config", "Library/Application Support", "HOME").ok()?;
        Some(folder.join("settings.toml"))
    }

    /// The folder that `-C` names.
    pub fn directory(&self) -> Option<&Path> {
        self.global.directory.as_deref()
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// The cache folder.
    ///
    /// # Errors
    /// When neither flag, variable nor settings name one and the user has no home.
    pub fn cache_dir(&self, root: &Path) -> Result<Setting<PathBuf>, Failure> {
        if let Some(folder) = &self.global.cache_dir {
            return Ok(Setting::new(self.cwd.join(folder), Origin::Flag));
        }
        if let Some(folder) = self.variable("AITOOLS_CACHE_DIR") {
            return Ok(Setting::new(self.cwd.join(folder), Origin::Variable("AITOOLS_CACHE_DIR")));
        }
        if let Some(folder) = &self.files(root)?.user.cache_dir {
            return Ok(Setting::new(root.join(folder), Origin::User));
        }
        let value = self.platform_dir("XDG_CACHE_HOME", ".cache", "Library/Caches", "AITOOLS_CACHE_DIR")?;
        Ok(Setting::new(if cfg!(windows) { value.join("cache") } else { value }, Origin::Default))
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
            let what = "could not find the home folder of this user".to_owned();
            return Err(Failure::Usage { what, hint: Some(format!("set `HOME`, or `{ours}` to a folder")) });
        };
        Ok(home.join(if cfg!(target_os = "macos") { macos } else { linux }).join("aitools"))
    }

    fn key(&self) -> Result<Key, Failure> {
        match self.variable("AITOOLS_RECEIPT_KEY") {
            Some(secret) => Ok(Key::from_secret(secret)),
            None => Ok(Key::load(&self.state_dir()?.join("receipt.key"))?),
        }
    }

    /// Whether the network may not be used.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn offline(&self, root: &Path) -> Result<Setting<bool>, Failure> {
        if self.global.offline {
            return Ok(Setting::new(true, Origin::Flag));
        }
        if let Some(text) = self.variable("AITOOLS_OFFLINE") {
            return Ok(Setting::new(is_true(text), Origin::Variable("AITOOLS_OFFLINE")));
        }
        let found = self.files(root)?.get(|file| file.offline);
        Ok(found.unwrap_or(Setting::new(false, Origin::Default)))
    }

    /// The Python interpreter that fetches packages; None is the first one found. Never a project's choice.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn python(&self, root: &Path) -> Result<Setting<Option<String>>, Failure> {
        if let Some(path) = self.variable(PYTHON) {
            return Ok(Setting::new(Some(path.to_owned()), Origin::Variable(PYTHON)));
        }
        let own = self.files(root)?.user.python.clone();
        let origin = if own.is_some() { Origin::User } else { Origin::Default };
        Ok(Setting::new(own, origin))
    }

    /// The build variant of engines; None is detected.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn variant(&self, root: &Path, build: Option<&BuildWith>) -> Result<Setting<Option<Variant>>, Failure> {
        if let Some(variant) = build.and_then(|build| build.variant) {
            return Ok(Setting::new(Some(variant), Origin::Flag));
        }
        let found = self.files(root)?.get(|file| file.variant);
        Ok(found.map_or(Setting::new(None, Origin::Default), |set| Setting::new(Some(set.value), set.origin)))
    }

    /// Number of parallel compiler processes.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn jobs(&self, root: &Path, build: Option<&BuildWith>) -> Result<Setting<u32>, Failure> {
        if let Some(jobs) = build.and_then(|build| build.jobs) {
            return Ok(Setting::new(jobs, Origin::Flag));
        }
        let found = self.files(root)?.get(|file| file.jobs);
        Ok(found.unwrap_or_else(|| Setting::new(processors(), Origin::Default)))
    }

    /// Whether prompts and answers go into the generation log.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn log_prompts(&self, root: &Path, flag: bool) -> Result<Setting<bool>, Failure> {
        if flag {
            return Ok(Setting::new(true, Origin::Flag));
        }
        let found = self.files(root)?.get(|file| file.log_prompts);
        Ok(found.unwrap_or(Setting::new(false, Origin::Default)))
    }

    /// An API key for `serve` from the environment.
    pub fn api_key(&self) -> Option<&str> {
        self.variable("AITOOLS_API_KEY")
    }

    /// Groups of policies that `serve` may load together.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn groups(&self, root: &Path) -> Result<Vec<Vec<String>>, Failure> {
        let found = self.files(root)?.get(|file| file.serve.as_ref().map(|serve| serve.groups.clone()));
        Ok(found.map(|set| set.value).unwrap_or_default())
    }

    /// This machine for a verb that works on a project.
    ///
    /// # Errors
    /// When a settings file has problems or the cache cannot be opened.
    pub fn host(&self, root: &Path, build: Option<&BuildWith>) -> Result<Host, Failure> {
        let cache = self.cache_dir(root)?.value;
        let store = Store::open(&cache, self.key()?)?;
        let mut env = self.env.clone();
        if let Setting { value: Some(python), origin: Origin::User } = self.python(root)? {
            env.insert(PYTHON.to_owned(), python);
        }
        let variant = self.variant(root, build)?.value;
        let jobs = self.jobs(root, build)?.value;
        let offline = self.offline(root)?.value;
        let (engines, driver, task) = (ENGINES, driver()?, self.task.clone());
        Ok(Host { store, engines, env, driver, offline, jobs, variant, task })
    }

    /// How the lockfile is treated. `CI=true` implies `--locked`.
    ///
    /// # Errors
    /// Every problem of the settings files.
    pub fn lock_mode(&self, asked: &args::LockMode, root: &Path) -> Result<Setting<LockMode>, Failure> {
        let chosen = |locked: Option<bool>, frozen: Option<bool>| match (locked, frozen) {
            (_, Some(true)) => Some(LockMode::Frozen),
            (Some(true), _) => Some(LockMode::Locked),
            (Some(false), _) => Some(LockMode::Update),
            _ => None,
        };
        if asked.locked.is_some() || asked.frozen.is_some() {
            let mode = chosen(asked.locked, asked.frozen).or(self.in_ci()).unwrap_or(LockMode::Update);
            return Ok(Setting::new(mode, Origin::Flag));
        }
        if let Some(set) = self.files(root)?.get(|file| chosen(file.locked, file.frozen)) {
            return Ok(set);
        }
        Ok(match self.in_ci() {
            Some(mode) => Setting::new(mode, Origin::Variable("CI")),
            None => Setting::new(LockMode::Update, Origin::Default),
        })
    }

    fn in_ci(&self) -> Option<LockMode> {
        self.variable("CI").is_some_and(is_true).then_some(LockMode::Locked)
    }
}

fn read_settings(path: &Path, name: &str, owner: Owner) -> Result<Settings, Failure> {
    match fs::read_bounded(path, settings::MAX_BYTES as u64) {
        Ok(bytes) => Ok(settings::parse(name, &bytes, owner)?.0.value),
        Err(error) if error.is_not_found() => Ok(Settings::default()),
        Err(error) => Err(error.into()),
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
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, as_text(value)?))).collect()
}

/// The text of a variable. Of a list of folders, such as `PATH`, the folders whose names are Unicode.
fn as_text(value: OsString) -> Option<String> {
    let value = match value.into_string() {
        Ok(text) => return Some(text),
        Err(value) => value,
    };
    let folders: Vec<PathBuf> = std::env::split_paths(&value).filter(|folder| folder.to_str().is_some()).collect();
    if folders.is_empty() { None } else { std::env::join_paths(folders).ok()?.into_string().ok() }
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

#[cfg(test)]
mod tests {
    use super::*;

    const NO_GLOBALS: Global = Global {
        manifest: None,
        directory: None,
        json: false,
        offline: false,
        cache_dir: None,
        quiet: false,
        color: None,
    };
    const NO_LOCK_MODE: args::LockMode = args::LockMode { locked: None, frozen: None };

    /// A project folder and a user's configuration folder.
    struct Bench(tempfile::TempDir);

    impl Bench {
        fn new(project: &str, user: &str) -> Self {
            let bench = Self(tempfile::tempdir().unwrap());
            fs::write_atomic(&bench.root().join("configs/settings.toml"), project.as_bytes()).unwrap();
            fs::write_atomic(&bench.0.path().join("config/aitools/settings.toml"), user.as_bytes()).unwrap();
            bench
        }

        fn root(&self) -> PathBuf {
            self.0.path().join("project")
        }

        fn session<'a>(&self, global: &'a Global, variables: &[(&str, &str)]) -> Session<'a> {
            let config = self.0.path().join("config").display().to_string();
            let mut env: BTreeMap<String, String> =
                variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            let folder = if cfg!(windows) { "LOCALAPPDATA" } else { "XDG_CONFIG_HOME" };
            env.insert(folder.to_owned(), config);
            Session::with(global, env, self.root(), Task::silent())
        }
    }

    #[test]
    fn precedence_of_offline_is_flag_variable_project_user_default() {
        let bench = Bench::new("offline = false\n", "offline = true\n");
        let origin = |bench: &Bench, global: &Global, variables: &[(&str, &str)]| {
            let set = bench.session(global, variables).offline(&bench.root()).unwrap();
            (set.value, set.origin)
        };
        let flag = Global { offline: true, ..NO_GLOBALS };
        let variable = [("AITOOLS_OFFLINE", "0")];
        assert_eq!(origin(&bench, &flag, &variable), (true, Origin::Flag));
        assert_eq!(origin(&bench, &NO_GLOBALS, &variable), (false, Origin::Variable("AITOOLS_OFFLINE")));
        assert_eq!(origin(&bench, &NO_GLOBALS, &[]), (false, Origin::Project));
        assert_eq!(origin(&Bench::new("", "offline = true\n"), &NO_GLOBALS, &[]), (true, Origin::User));
        assert_eq!(origin(&Bench::new("", ""), &NO_GLOBALS, &[]), (false, Origin::Default));
    }

    #[test]
    fn precedence_of_the_lock_mode_and_what_ci_implies() {
        let mode = |project: &str, asked: args::LockMode, ci: &str| {
            let bench = Bench::new(project, "");
            let set = bench.session(&NO_GLOBALS, &[("CI", ci)]).lock_mode(&asked, &bench.root()).unwrap();
            (set.value, set.origin)
        };
        let unlocked = args::LockMode { locked: Some(false), frozen: None };
        let frozen = args::LockMode { locked: None, frozen: Some(true) };
        assert_eq!(mode("locked = true\n", frozen, "true"), (LockMode::Frozen, Origin::Flag));
        assert_eq!(mode("locked = true\n", unlocked, "true"), (LockMode::Update, Origin::Flag));
        assert_eq!(mode("frozen = true\n", NO_LOCK_MODE, "true"), (LockMode::Frozen, Origin::Project));
        assert_eq!(mode("locked = false\n", NO_LOCK_MODE, "true"), (LockMode::Update, Origin::Project));
        assert_eq!(mode("", NO_LOCK_MODE, "true"), (LockMode::Locked, Origin::Variable("CI")));
        assert_eq!(mode("", NO_LOCK_MODE, "false"), (LockMode::Update, Origin::Default));
    }

    #[test]
    fn precedence_of_build_settings_the_manifest_and_the_log() {
        let bench = Bench::new("jobs = 3\nmanifest = \"a\"\nlog_prompts = true\n", "jobs = 5\nvariant = \"cpu\"\n");
        let (session, root) = (bench.session(&NO_GLOBALS, &[]), bench.root());
        let with = BuildWith { variant: Some(Variant::Cuda), jobs: Some(7) };
        assert_eq!(session.jobs(&root, Some(&with)).unwrap(), Setting::new(7, Origin::Flag));
        assert_eq!(session.jobs(&root, None).unwrap(), Setting::new(3, Origin::Project));
        assert_eq!(session.variant(&root, Some(&with)).unwrap(), Setting::new(Some(Variant::Cuda), Origin::Flag));
        assert_eq!(session.variant(&root, None).unwrap(), Setting::new(Some(Variant::Cpu), Origin::User));
        assert_eq!(session.manifest(&root).unwrap(), Setting::new(Some("a".to_owned()), Origin::Project));
        assert_eq!(session.log_prompts(&root, false).unwrap(), Setting::new(true, Origin::Project));
        let none = Bench::new("", "");
        let session = none.session(&NO_GLOBALS, &[]);
        assert_eq!(session.jobs(&none.root(), None).unwrap().origin, Origin::Default);
        assert_eq!(session.log_prompts(&none.root(), false).unwrap(), Setting::new(false, Origin::Default));
        assert_eq!(session.log_prompts(&none.root(), true).unwrap(), Setting::new(true, Origin::Flag));
    }

    #[test]
    fn precedence_of_the_cache_folder() {
        let bench = Bench::new("", "cache_dir = \"/user\"\n");
        let cache = |global: &Global, variables: &[(&str, &str)]| {
            bench.session(global, variables).cache_dir(&bench.root()).unwrap()
        };
        let flag = Global { cache_dir: Some("/flag".into()), ..NO_GLOBALS };
        let variable = [("AITOOLS_CACHE_DIR", "/variable")];
        assert_eq!(cache(&flag, &variable), Setting::new("/flag".into(), Origin::Flag));
        assert_eq!(cache(&NO_GLOBALS, &variable).origin, Origin::Variable("AITOOLS_CACHE_DIR"));
        assert_eq!(cache(&NO_GLOBALS, &[]), Setting::new("/user".into(), Origin::User));
    }

    #[test]
    fn h5b_programs_come_from_the_user_never_from_the_project() {
        let hostile = Bench::new("python = \"./p\"\n", "");
        let session = hostile.session(&NO_GLOBALS, &[]);
        assert!(matches!(session.python(&hostile.root()), Err(Failure::Input(_))));
        assert!(session.host(&hostile.root(), None).is_err());
        let own = Bench::new("", "python = \"python3.12\"\n");
        let python = |variables: &[(&str, &str)]| own.session(&NO_GLOBALS, variables).python(&own.root()).unwrap();
        assert_eq!(python(&[]), Setting::new(Some("python3.12".to_owned()), Origin::User));
        assert_eq!(python(&[(PYTHON, "p")]), Setting::new(Some("p".to_owned()), Origin::Variable(PYTHON)));
    }
}

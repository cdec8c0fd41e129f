//! One program of an engine, run to make a file: off the network as far as the system lets us, with an environment of its
//! own, its output in a log.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use serde::{Deserialize, Serialize};

use super::log::Findings;
use super::settings::{self, Env};
use super::{BuildError, watch};
use crate::base::fs::{self, FsError};
use crate::base::process::{self, Program};
use crate::report::{Progress, Task};

/// What is kept of a log on disk.
const MAX_LOG_BYTES: u64 = 16 << 20;

/// One program to run.
#[derive(Debug)]
pub struct Command<'a> {
    /// Our own program, which runs again as `internal offline-exec`, and then becomes the one that is asked for.
    pub driver: &'a Path,
    /// Its environment is added to the scrubbed one; its working directory is also its home.
    pub program: Program,
    /// Folders that it writes to, besides its working directory.
    pub writable: Vec<PathBuf>,
    /// Fail where it cannot be cut off the network.
    pub offline: bool,
    /// Where everything that it says is written.
    pub log: PathBuf,
}

/// What `internal offline-exec` is told, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct OfflineExec {
    /// The process that asks: when it is gone, so is the program.
    pub parent: u32,
    /// Folders that may be written to.
    pub writable: Vec<PathBuf>,
    /// Do not start the program where it would have a network.
    pub offline: bool,
}

/// The exit code of `internal offline-exec` when it did not start the program; the reason is its last line of output.
pub const NOT_ISOLATED: i32 = 125;

/// Why the program did not do its work.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum CommandError {
    #[error(transparent)]
    Run(#[from] BuildError),
    /// `tail`: the last lines it wrote.
    #[error("`{program}` failed ({status})")]
    Failed { program: String, status: ExitStatus, tail: Vec<String>, log: PathBuf },
}

impl From<FsError> for CommandError {
    fn from(error: FsError) -> Self {
        Self::Run(error.into())
    }
}

/// Runs it to its end. Lines such as `[3/12]` are its progress.
///
/// # Errors
/// [`CommandError`]; nothing that was started still runs then.
pub fn run(ask: &Command<'_>, task: &Task, progress: &Progress) -> Result<(), CommandError> {
    let program = &ask.program;
    let writable = ask.writable.iter().chain([&program.cwd]).cloned().collect();
    let request = OfflineExec { parent: std::process::id(), writable, offline: ask.offline };
    let request = serde_json::to_string(&request).unwrap_or_default();
    let mut args = vec!["internal".into(), "offline-exec".into(), request.into(), program.path.clone().into()];
    args.extend(program.args.iter().cloned());
    let mut env = environment(&program.cwd);
    env.extend(program.env.clone());
    let driver = process::Program { path: ask.driver.to_owned(), args, env, cwd: program.cwd.clone() };
    fs::create_dir_all(fs::parent(&ask.log))?;
    let mut log = fs::create(&ask.log)?;
    let (mut left, mut findings) = (MAX_LOG_BYTES, Findings::default());
    let status = watch::run(&driver, task, &mut |line| {
        let kept = &line[..usize::try_from(left).unwrap_or(usize::MAX).min(line.len())];
        left -= kept.len() as u64;
        log.write_all(kept).map_err(|why| FsError::new("write", &ask.log, why))?;
        let text = String::from_utf8_lossy(line);
        if let Some(step) = findings.line(text.trim_end()) {
            progress.set(step.done, Some(step.total), None);
        }
        Ok(())
    })?;
    if status.success() {
        return Ok(());
    }
    if ask.offline && status.code() == Some(NOT_ISOLATED) {
        let why = findings.tail().pop().unwrap_or_default();
        return Err(BuildError::NotIsolated { why }.into());
    }
    if let Some(said) = findings.no_space.take() {
        let available_bytes = fs::available_bytes(&program.cwd).unwrap_or(0);
        return Err(BuildError::NoSpace { said, available_bytes, log: ask.log.clone() }.into());
    }
    let program = program.path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Err(CommandError::Failed { program, status, tail: findings.tail(), log: ask.log.clone() })
}

/// Nothing of the user's: no search path, no home, no proxy that would lead anywhere.
fn environment(folder: &Path) -> Env {
    let folders = ["PATH", "HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"];
    let mut env: Env = folders.map(|name| (name.into(), folder.into())).into();
    let nowhere = format!("http://{}:9", settings::NO_NETWORK_HOST);
    env.extend(settings::PROXY_NAMES.iter().map(|name| (name.into(), nowhere.clone().into())));
    env.insert("LC_ALL".into(), settings::LOCALE.into());
    env.insert("TZ".into(), "UTC".into());
    env
}

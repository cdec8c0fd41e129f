//! Commands that aitools gives itself: `aitools internal build REQUEST`, `aitools internal exec PARENT PROGRAM ARG…` and
//! `aitools internal offline-exec REQUEST PROGRAM ARG…`; `aitools internal confinement FOLDER` is for `doctor`.
//!
//! All must be dispatched before anything else is set up: [`build`] and `offline-exec` may only leave the network while there is one
//! thread, and [`exec`] becomes another program.
#![expect(clippy::disallowed_methods, reason = "these commands read their own environment, as all of cli/ may")]

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::base::lifeline;
use crate::build::command::{NOT_ISOLATED, OfflineExec};
use crate::build::{confine, driver, isolation};

/// Bad usage.
const USAGE: i32 = 2;
/// A program that cannot be started, as shells have it.
const NOT_STARTED: i32 = 127;

/// Runs the words after `internal` and gives the exit code.
pub fn run(args: &[OsString]) -> i32 {
    match args {
        [verb, request] if verb == "build" => build(Path::new(request)),
        [verb, parent, program, args @ ..] if verb == "exec" || verb == "exec-with-network" => {
            let Some(parent) = parent.to_str().and_then(|id| id.parse().ok()) else { return USAGE };
            confine::restrict_engine(&engine_folders(), verb == "exec-with-network");
            exec(parent, program, args)
        }
        [verb, request, program, args @ ..] if verb == "offline-exec" => {
            let request = request.to_str().and_then(|text| serde_json::from_str::<OfflineExec>(text).ok());
            let Some(request) = request else { return USAGE };
            if let Err(why) = isolation::leave_network()
                && request.offline
            {
                let _ = writeln!(std::io::stderr(), "{why}");
                return NOT_ISOLATED;
            }
            confine::restrict_engine(&request.writable, false);
            exec(request.parent, program, args)
        }
        [verb, folder] if verb == "confinement" => {
            let report = driver::probe(&std::env::vars_os().collect(), Path::new(folder));
            let text = serde_json::to_string(&report).unwrap_or_default();
            i32::from(writeln!(std::io::stdout(), "{text}").is_err())
        }
        _ => USAGE,
    }
}

/// Where an engine may write: its working directory, temporary files, and the caches of GPU drivers.
fn engine_folders() -> Vec<PathBuf> {
    let of = |name: &str, below: &str| std::env::var_os(name).map(|folder| Path::new(&folder).join(below));
    let temporary = of("TMPDIR", "").unwrap_or_else(|| "/tmp".into());
    let caches = [of("HOME", ".nv"), of("HOME", ".cache/mesa_shader_cache"), of("CUDA_CACHE_PATH", "")];
    std::env::current_dir().into_iter().chain([temporary]).chain(caches.into_iter().flatten()).collect()
}

/// The child that runs CMake: see [`crate::build::driver`].
pub fn build(request: &Path) -> i32 {
    driver::run_driver(request)
}

/// Becomes `program`, which then ends with the process that started it, even when that one is killed outright. `parent` is
/// that process's id: when it is gone already, nothing is started.
///
/// Where a system has no such promise (everything but Linux) it stays in between: it waits for the program, and ends it when
/// the parent is gone. Its own stdin is for that alone ([`lifeline`]); the program gets none.
pub fn exec(parent: u32, program: &OsString, args: &[OsString]) -> i32 {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    platform::exec(parent, command)
}

#[cfg(target_os = "linux")]
mod platform {
    use std::os::unix::process::CommandExt as _;

    use super::{Command, NOT_STARTED, lifeline};

    pub fn exec(parent: u32, mut command: Command) -> i32 {
        lifeline::die_with_parent();
        if lifeline::parent_id() == parent {
            // Only comes back when it fails.
            let _ = command.exec();
        }
        NOT_STARTED
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use super::{Command, NOT_STARTED, lifeline};

    pub fn exec(parent: u32, mut command: Command) -> i32 {
        let Ok(mut child) = command.spawn() else { return NOT_STARTED };
        if !lifeline::end_with_parent(parent, lifeline::end_all) {
            lifeline::end_all();
        }
        child.wait().ok().and_then(|status| status.code()).unwrap_or(NOT_STARTED)
    }
}

//! Commands that aitools gives itself: `aitools internal build REQUEST`, `aitools internal exec PARENT PROGRAM ARG…` and
//! `aitools internal offline-exec PARENT PROGRAM ARG…`.
//!
//! All must be dispatched before anything else is set up: [`build`] and `offline-exec` may only leave the network while there is one
//! thread, and [`exec`] becomes another program.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::base::lifeline;

/// Bad usage.
const USAGE: i32 = 2;
/// A program that cannot be started, as shells have it.
const NOT_STARTED: i32 = 127;

/// Runs the words after `internal` and gives the exit code.
pub fn run(args: &[OsString]) -> i32 {
    match args {
        [verb, request] if verb == "build" => build(Path::new(request)),
        [verb, parent, program, args @ ..] if verb == "exec" || verb == "offline-exec" => {
            let Some(parent) = parent.to_str().and_then(|id| id.parse().ok()) else { return USAGE };
            if verb == "offline-exec" {
                // Where the system refuses, the environment leads nowhere all the same.
                let _ = crate::build::isolation::leave_network();
            }
            exec(parent, program, args)
        }
        _ => USAGE,
    }
}

/// The child that runs CMake: see [`crate::build::driver`].
pub fn build(request: &Path) -> i32 {
    crate::build::driver::run_driver(request)
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

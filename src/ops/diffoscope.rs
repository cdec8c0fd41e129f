//! A closer look at two builds of a file that differ: diffoscope (<https://diffoscope.org>), when it is installed. It runs as
//! programs of engines do, off the network and without the user's files, because it reads what a stranger's source has made.

use std::path::{Path, PathBuf};

use crate::base::fs;
use crate::base::process::Program;
use crate::build::command::{self, Command};
use crate::build::toolchain::Finder;
use crate::report::{Unit, Verb};

use super::{Failure, Host};

/// Larger files take it too long: it takes programs apart, instruction by instruction.
const MAX_FILE_BYTES: u64 = 32 << 20;
const MAX_REPORT_BYTES: u64 = 1 << 20;
const OPTIONS: [&str; 5] = ["--no-progress", "--max-report-size", "1048576", "--exclude-directory-metadata", "yes"];

/// Writes how two files differ to `report`, and says whether it did.
///
/// # Errors
/// When a file cannot be copied, or the user asked to stop. What diffoscope itself cannot do is no error.
pub fn compare(host: &Host, first: &Path, second: &Path, report: &Path) -> Result<bool, Failure> {
    let env = host.os_env();
    let Some(program) = Finder::new(&env, &host.store.scratch(), host.task.cancel()).search("diffoscope") else {
        return Ok(false);
    };
    for file in [first, second] {
        if fs::metadata(file)?.len() > MAX_FILE_BYTES {
            return Ok(false);
        }
    }
    // Where the copies lie is all that it sees of the cache.
    let place = host.store.stage()?;
    let copy = |from: &Path, name: &str| -> Result<PathBuf, Failure> {
        let to = place.path().join(name);
        fs::copy(from, &to)?;
        Ok(to)
    };
    let (first, second, text) = (copy(first, "first")?, copy(second, "second")?, place.path().join("report.txt"));
    let mut args: Vec<_> = OPTIONS.iter().map(Into::into).collect();
    args.extend(["--text".into(), text.clone().into(), first.into(), second.into()]);
    // It looks for the tools that take files apart.
    let path = env.get(std::ffi::OsStr::new("PATH")).cloned().unwrap_or_default();
    let program = Program { path: program, args, env: [("PATH".into(), path)].into(), cwd: place.path().to_owned() };
    let progress = host.task.start(Verb::Verify, "the difference, with diffoscope", None, Unit::None);
    let log = report.with_extension("log");
    let command = Command { driver: &host.driver, program, writable: Vec::new(), offline: false, log: log.clone() };
    // It exits with 1 because the files differ; what counts is the report.
    let _ = command::run(&command, &host.task, &progress);
    progress.finish("");
    host.task.check()?;
    fs::remove_file(&log)?;
    match fs::read_bounded(&text, 4 * MAX_REPORT_BYTES) {
        Ok(said) if !said.is_empty() => fs::write_atomic(report, &said)?,
        _ => return Ok(false),
    }
    Ok(true)
}

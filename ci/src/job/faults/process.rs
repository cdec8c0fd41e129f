//! Starts commands that may be killed, hang, or leave processes behind.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};

use xshell::Shell;

use crate::step::Result;

/// No command of this job takes as long.
const LIMIT: Duration = Duration::from_secs(120);
/// How long processes of a killed command may take to end.
const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Ended {
    pub fn is_killed(&self) -> bool {
        self.status.signal() == Some(9)
    }

    /// What was said, for a message.
    pub fn words(&self) -> String {
        format!("{}\nstdout: {}\nstderr: {}", self.status, self.stdout.trim(), self.stderr.trim())
    }
}

/// Runs a command to its end, or kills it after `kill_after`.
pub fn run(sh: &Shell, folder: &Path, command: &mut Command, kill_after: Option<Duration>) -> Result<Ended> {
    // Files, because a process that is left over would keep a pipe open.
    let file = |name: &str| -> Result<_> {
        sh.write_file(folder.join(name), "")?;
        Ok(std::fs::OpenOptions::new().append(true).open(folder.join(name))?)
    };
    let (stdout, stderr) = (file("stdout.txt")?, file("stderr.txt")?);
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).process_group(0).spawn()?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        let elapsed = begun.elapsed();
        if kill_after.is_some_and(|limit| elapsed >= limit) {
            child.kill()?;
            break child.wait()?;
        }
        if elapsed > LIMIT {
            let left = left_over(sh, folder).join("\n  ");
            if let Some(group) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            child.wait()?;
            return Err(format!("{command:?} did not end within {} s\n  {left}", LIMIT.as_secs()).into());
        }
        std::thread::sleep(POLL);
    };
    let took = begun.elapsed();
    let read = |name: &str| -> Result<_> {
        Ok(String::from_utf8_lossy(&sh.read_binary_file(folder.join(name))?).into_owned())
    };
    Ok(Ended { status, stdout: read("stdout.txt")?, stderr: read("stderr.txt")?, took })
}

/// Waits until no process has to do with a folder.
pub fn must_be_gone(sh: &Shell, folder: &Path) -> Result<()> {
    let until = Instant::now() + GRACE;
    loop {
        let left = left_over(sh, folder);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("processes are left over:\n  {}", left.join("\n  ")).into());
        }
        std::thread::sleep(POLL);
    }
}

/// Processes whose program, folder, arguments or environment name a folder.
fn left_over(sh: &Shell, folder: &Path) -> Vec<String> {
    let wanted = folder.to_string_lossy().into_owned();
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for process in Path::new("/proc").read_dir().into_iter().flatten().flatten() {
        let (path, name) = (process.path(), process.file_name().to_string_lossy().into_owned());
        if name == own || !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let text = |file: &str| {
            let bytes = sh.read_binary_file(path.join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let link = |file: &str| path.join(file).read_link().unwrap_or_default().to_string_lossy().into_owned();
        let is_dead = text("stat").rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']));
        let about = [text("cmdline"), text("environ"), link("exe"), link("cwd")];
        if !is_dead && about.iter().any(|text| text.contains(&wanted)) {
            found.push(format!("{name}: {} ({})", about[0].trim(), about[2]));
        }
    }
    found
}

//! Other people's programs: started in a process group of their own with exactly the environment given, ended as a group.
//!
//! Invariant: a program started here never outlives its [`Running`], unless this process is killed outright; for that case
//! the hidden command `aitools internal exec` stands between (see `cli/internal.rs`), which asks the system to be told.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::cancel::{Cancel, Cancelled};

/// What to start. Nothing is inherited but what is here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The program's file.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// The whole environment.
    pub env: BTreeMap<OsString, OsString>,
    /// Its working directory.
    pub cwd: PathBuf,
}

/// Why a program could not be run to its end.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum ProcessError {
    #[error("could not start `{}`: {source}", path.display())]
    Start { path: PathBuf, source: io::Error },
    #[error("lost `{}`: {source}", path.display())]
    Wait { path: PathBuf, source: io::Error },
    #[error("`{}` took longer than {limit_s} s", path.display())]
    Timeout { path: PathBuf, limit_s: u64 },
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

/// How long a program may take to end after it was asked to.
pub const GRACE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(5);
/// Leaders of the groups that run now.
static GROUPS: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Ends every group that runs, by force and without waiting: for a user who does not want to wait.
pub fn kill_all() {
    for leader in &*GROUPS.lock().unwrap_or_else(PoisonError::into_inner) {
        platform::kill_group(*leader);
    }
}

impl Program {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.args(&self.args).env_clear().envs(&self.env).current_dir(&self.cwd);
        platform::own_group(&mut command);
        command
    }

    /// Starts it.
    ///
    /// # Errors
    /// When the system cannot start it.
    pub fn spawn(&self, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Running, ProcessError> {
        let child = self.command().stdin(stdin).stdout(stdout).stderr(stderr).spawn();
        let child = child.map_err(|source| ProcessError::Start { path: self.path.clone(), source })?;
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).insert(child.id());
        Ok(Running { child, path: self.path.clone(), over: false })
    }

    /// Runs a short program to its end and gives what it wrote (stdout and stderr), each cut after `limit_bytes`.
    ///
    /// # Errors
    /// When it cannot be started, takes longer than `limit`, or the user asked to stop.
    pub fn output(&self, limit: Duration, limit_bytes: u64, cancel: &Cancel) -> Result<Output, ProcessError> {
        let mut running = self.spawn(Stdio::null(), Stdio::piped(), Stdio::piped())?;
        let stdout = running.stdout().map(|pipe| read_in_background(pipe, limit_bytes));
        let stderr = running.stderr().map(|pipe| read_in_background(pipe, limit_bytes));
        let status = running.wait(cancel, Some(Instant::now() + limit))?;
        // The pipes close when the group is gone; a stray grandchild must not hold us.
        running.end(Duration::ZERO);
        let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
            let bytes = reader.and_then(|thread| thread.join().ok()).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Ok(Output { status, stdout: text(stdout), stderr: text(stderr) })
    }
}

fn read_in_background(mut pipe: impl io::Read + Send + 'static, limit: u64) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        let _ = io::Read::read_to_end(&mut io::Read::take(&mut pipe, limit), &mut kept);
        let _ = io::copy(&mut pipe, &mut io::sink());
        kept
    })
}

/// What a finished program left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, as text.
    pub stdout: String,
    /// Its standard error, as text.
    pub stderr: String,
}

/// A started program. Dropping it ends the whole group.
#[derive(Debug)]
pub struct Running {
    child: Child,
    path: PathBuf,
    over: bool,
}

impl Running {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The program's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pipe, once.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// The pipe, once.
    pub fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// The exit status, when it has ended.
    ///
    /// # Errors
    /// When the system has lost it.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        let status = self.child.try_wait();
        status.map_err(|source| ProcessError::Wait { path: self.path.clone(), source })
    }

    /// Waits for the end. On cancel and after `deadline` the group is ended before this returns.
    ///
    /// # Errors
    /// [`ProcessError::Cancelled`], [`ProcessError::Timeout`], or when the system has lost it.
    pub fn wait(&mut self, cancel: &Cancel, deadline: Option<Instant>) -> Result<ExitStatus, ProcessError> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if let Err(cancelled) = cancel.check() {
                self.end(GRACE);
                return Err(cancelled.into());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                self.end(GRACE);
                let limit_s = began.elapsed().as_secs();
                return Err(ProcessError::Timeout { path: self.path.clone(), limit_s });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks the group to end, and after `grace` ends it by force. Waits until the program itself is gone.
    pub fn end(&mut self, grace: Duration) {
        if self.over {
            return;
        }
        self.over = true;
        if grace > Duration::ZERO && matches!(self.child.try_wait(), Ok(None)) {
            platform::ask_group_to_end(self.child.id());
            let deadline = Instant::now() + grace;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
        }
        platform::kill_group(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.child.id());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end(GRACE);
    }
}

#[cfg(unix)]
mod platform {
    use std::os::unix::process::CommandExt as _;
    use std::process::Command;

    use rustix::process::{Pid, Signal, kill_process_group};

    pub fn own_group(command: &mut Command) {
        command.process_group(0);
    }

    fn signal(leader: u32, signal: Signal) {
        if let Some(pid) = i32::try_from(leader).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(pid, signal);
        }
    }

    pub fn ask_group_to_end(leader: u32) {
        signal(leader, Signal::TERM);
    }

    pub fn kill_group(leader: u32) {
        signal(leader, Signal::KILL);
    }
}

#[cfg(windows)]
mod platform {
    use std::os::windows::process::CommandExt as _;
    use std::process::Command;

    /// CREATE_NEW_PROCESS_GROUP: Ctrl-C in the console reaches us, not the program.
    const NEW_GROUP: u32 = 0x0000_0200;

    pub fn own_group(command: &mut Command) {
        command.creation_flags(NEW_GROUP);
    }

    pub fn ask_group_to_end(leader: u32) {
        let _ = Command::new("taskkill").args(["/T", "/PID", &leader.to_string()]).output();
    }

    pub fn kill_group(leader: u32) {
        let _ = Command::new("taskkill").args(["/T", "/F", "/PID", &leader.to_string()]).output();
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        let env = BTreeMap::from([("PATH".into(), "/usr/bin:/bin".into())]);
        Program { path: "/bin/sh".into(), args: vec!["-c".into(), script.into()], env, cwd: "/".into() }
    }

    #[test]
    fn output_is_cut_and_the_environment_is_only_what_was_given() {
        let ran = shell("env | wc -l >&2; printf 123456789").output(GRACE, 4, &Cancel::default());
        let ran = ran.unwrap();
        assert_eq!(ran.stdout, "1234");
        assert!(ran.stderr.trim().parse::<u32>().unwrap() <= 4, "{}", ran.stderr);
    }

    #[test]
    fn a_cancelled_group_is_gone_with_its_children() {
        let cancel = Cancel::default();
        let mut running =
            shell("sleep 100 & echo $!; wait").spawn(Stdio::null(), Stdio::piped(), Stdio::null()).unwrap();
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(running.stdout().unwrap()), &mut line).unwrap();
        cancel.cancel();
        assert!(matches!(running.wait(&cancel, None), Err(ProcessError::Cancelled(_))));
        let child = PathBuf::from(format!("/proc/{}/stat", line.trim()));
        let gone = || {
            let stat = super::super::fs::read_bounded(&child, 1 << 16);
            stat.map_or(true, |stat| String::from_utf8_lossy(&stat).contains(") Z "))
        };
        assert!(
            (0..200).any(|_| gone() || {
                std::thread::sleep(POLL);
                false
            }),
            "the grandchild lives"
        );
    }
}

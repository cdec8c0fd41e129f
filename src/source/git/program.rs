//! The program `git`. It does all network work and reads the project's own repository.
//!
//! The user's own configuration applies: `insteadOf`, proxies, headers, credential helpers, ssh. Nothing else does. The
//! repository that `git` works in is made by this run; hooks, prompts, file system monitors and remote helpers such as
//! `ext::` are off; every received object is checked (`fetch.fsckObjects`).

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::process::{ChildStderr, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::base::fs;
use crate::base::process::{Output, ProcessError, Program};
use crate::report::Progress;
use crate::source::{SourceError, World};

/// Time limit of a command without a transfer. It covers a credential helper that asks a person.
const SHORT: Duration = Duration::from_secs(120);
/// A transfer ends when neither its messages nor its pack file change for this long.
const MAX_SILENCE: Duration = Duration::from_secs(300);
/// The largest pack that is accepted, in bytes.
const MAX_PACK_BYTES: u64 = 8 << 30;
const MAX_OUTPUT_BYTES: u64 = 64 << 20;
const POLL: Duration = Duration::from_millis(20);
/// Lines of git's messages that are kept, and the longest line in bytes.
const KEPT_LINES: usize = 12;
const MAX_LINE_BYTES: usize = 500;

/// Variables that point `git` at another repository (`git rev-parse --local-env-vars`).
const POINTERS: [&str; 16] = [
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_QUARANTINE_PATH",
    "GIT_CONFIG",
    "GIT_GRAFT_FILE",
    "GIT_NO_REPLACE_OBJECTS",
    "GIT_REPLACE_REF_BASE",
    "GIT_ATTR_SOURCE",
];

/// Environment of every run. `GIT_PROTOCOL_FROM_USER=0` allows only http, https, ssh and git addresses, and those that a
/// `protocol.<name>.allow` allows always (`git help config`).
const PINNED_ENV: [(&str, &str); 4] =
    [("GIT_TERMINAL_PROMPT", "0"), ("GIT_PROTOCOL_FROM_USER", "0"), ("GIT_OPTIONAL_LOCKS", "0"), ("LC_ALL", "C")];

/// Settings of every run. Objects larger than `core.bigFileThreshold` are not held in memory as a whole.
const PINNED_SETTINGS: [(&str, &str); 13] = [
    ("core.fsmonitor", "false"),
    ("protocol.ext.allow", "never"),
    ("transfer.fsckObjects", "true"),
    ("fetch.fsckObjects", "true"),
    ("fetch.unpackLimit", "1"),
    ("fetch.recurseSubmodules", "false"),
    ("fetch.writeCommitGraph", "false"),
    ("transfer.bundleURI", "false"),
    ("core.bigFileThreshold", "64m"),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
    ("http.lowSpeedLimit", "1"),
    ("http.lowSpeedTime", "120"),
];

/// One run of `git`.
#[derive(Debug)]
pub struct Git<'w> {
    world: &'w World,
    program: Program,
}

impl<'w> Git<'w> {
    /// `git` in the folder `at` of the project's repository.
    pub fn at(world: &'w World, at: &Path) -> Self {
        let kept = world.env.iter().filter(|(name, _)| !POINTERS.contains(&name.as_str()));
        let env: BTreeMap<OsString, OsString> =
            kept.map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        let program = Program { path: "git".into(), args: Vec::new(), env, cwd: at.to_owned() };
        let git = PINNED_ENV.iter().fold(Self { world, program }, |git, (name, value)| git.env(name, value));
        // No hook can be in a folder that is a file.
        let no_hooks = if cfg!(windows) { "NUL" } else { "/dev/null" };
        let git = git.setting("core.hooksPath", no_hooks);
        PINNED_SETTINGS.iter().fold(git, |git, (key, value)| git.setting(key, value))
    }

    /// `git` with the repository `folder`, an absolute path to a folder that this run made. Where there is no repository
    /// in it, `git` works without one.
    pub fn with_repository(world: &'w World, folder: &Path) -> Self {
        let mut git = Self::at(world, fs::parent(folder));
        git.program.env.insert("GIT_DIR".into(), folder.into());
        git
    }

    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.program.args.extend(args.iter().map(OsString::from));
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.program.env.insert(name.into(), value.into());
        self
    }

    /// A setting for this run alone, with precedence over all files and added to those that the environment already has.
    #[must_use]
    pub fn setting(self, key: &str, value: &str) -> Self {
        let count = self.program.env.get(&OsString::from("GIT_CONFIG_COUNT"));
        let count: u32 = count.and_then(|text| text.to_str()?.parse().ok()).unwrap_or(0);
        self.env(&format!("GIT_CONFIG_KEY_{count}"), key)
            .env(&format!("GIT_CONFIG_VALUE_{count}"), value)
            .env("GIT_CONFIG_COUNT", &(count + 1).to_string())
    }

    /// Runs it; `None` when there is no such program.
    ///
    /// # Errors
    /// [`SourceError::Tool`] when it cannot be run or takes longer than two minutes.
    pub fn try_run(&self) -> Result<Option<Output>, SourceError> {
        match self.program.output(SHORT, MAX_OUTPUT_BYTES, self.world.task.cancel()) {
            Ok(output) => Ok(Some(output)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(tool_error(error)),
        }
    }

    /// Runs it and gives its output, or the last lines of its messages when it failed.
    ///
    /// # Errors
    /// [`SourceError::Tool`] when there is no such program, or as [`Git::try_run`].
    pub fn run(&self) -> Result<Result<String, String>, SourceError> {
        let output = self.try_run()?.ok_or_else(missing)?;
        if output.status.success() {
            return Ok(Ok(output.stdout));
        }
        let mut messages = Messages::default();
        messages.take(output.stderr.as_bytes());
        Ok(Err(messages.last_lines(&output.status.to_string())))
    }

    /// Runs a transfer into the repository `folder` and reports its progress. Gives the last lines of git's messages when
    /// it failed. On cancel, all its processes end.
    ///
    /// # Errors
    /// [`SourceError`] when there is no such program, the user asked to stop, the pack is too large, or nothing happens
    /// for five minutes.
    pub fn transfer(&self, folder: &Path, progress: &Progress) -> Result<Result<(), String>, SourceError> {
        let spawned = self.program.spawn(Stdio::null(), Stdio::null(), Stdio::piped());
        let mut running = spawned.map_err(|error| if is_missing(&error) { missing() } else { tool_error(error) })?;
        let messages = Arc::new(Mutex::new(Messages::default()));
        let reader = running.stderr().map(|pipe| read_messages(pipe, Arc::clone(&messages)));
        let (mut seen, mut changed) = ((0, 0), Instant::now());
        let status = loop {
            if let Some(status) = running.try_wait().map_err(tool_error)? {
                break status;
            }
            self.world.task.check()?;
            let bytes = pack_bytes(folder);
            let (latest, count) = {
                let messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
                (messages.latest.clone(), messages.count)
            };
            if bytes > MAX_PACK_BYTES {
                let why = format!("the server sends more than {MAX_PACK_BYTES} bytes");
                return Err(SourceError::Hostile { what: "the git repository".to_owned(), why });
            }
            if (bytes, count) != seen {
                (seen, changed) = ((bytes, count), Instant::now());
                progress.set(bytes, None, latest);
            } else if changed.elapsed() > MAX_SILENCE {
                return Ok(Err(format!("timed out: received nothing for {} s", MAX_SILENCE.as_secs())));
            }
            std::thread::park_timeout(POLL);
        };
        // A child of git that is left over must not hold the pipe open.
        running.end(Duration::ZERO);
        reader.map(std::thread::JoinHandle::join);
        let messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(if status.success() { Ok(()) } else { Err(messages.last_lines(&status.to_string())) })
    }
}

/// Bytes of the packs in a repository, unfinished ones included.
fn pack_bytes(repository: &Path) -> u64 {
    let packs = fs::read_dir(&repository.join("objects/pack")).unwrap_or_default();
    packs.iter().filter_map(|path| fs::symlink_metadata(path).ok()).map(|facts| facts.len()).sum()
}

/// What git writes to stderr: lines, and progress lines that end with a carriage return.
#[derive(Debug, Default)]
struct Messages {
    line: Vec<u8>,
    lines: VecDeque<String>,
    latest: Option<String>,
    /// Bytes seen so far.
    count: u64,
}

impl Messages {
    fn take(&mut self, bytes: &[u8]) {
        self.count += bytes.len() as u64;
        for byte in bytes {
            match byte {
                b'\r' | b'\n' => {
                    let line = printable(&std::mem::take(&mut self.line));
                    let line = line.strip_suffix("[K").unwrap_or(&line).trim_end().to_owned();
                    if line.is_empty() {
                        continue;
                    }
                    if *byte == b'\n' && !line.ends_with(", done.") {
                        self.lines.push_back(line);
                        if self.lines.len() > KEPT_LINES {
                            self.lines.pop_front();
                        }
                    } else {
                        self.latest = Some(line);
                    }
                }
                byte if self.line.len() < MAX_LINE_BYTES => self.line.push(*byte),
                _ => {}
            }
        }
    }

    fn last_lines(&self, otherwise: &str) -> String {
        let rest = printable(&self.line);
        let lines: Vec<&str> = self.lines.iter().map(String::as_str).chain([rest.as_str()]).collect();
        let text = lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
        if text.is_empty() { format!("git failed with {otherwise}") } else { text }
    }
}

fn read_messages(mut pipe: ChildStderr, messages: Arc<Mutex<Messages>>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            messages.lock().unwrap_or_else(PoisonError::into_inner).take(&buffer[..count]);
        }
    })
}

/// A server's text without control characters.
fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().chars().filter(|c| !c.is_control()).collect()
}

fn is_missing(error: &ProcessError) -> bool {
    matches!(error, ProcessError::Start { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

fn missing() -> SourceError {
    SourceError::Tool {
        what: "the program `git`".to_owned(),
        why: "it fetches git repositories".to_owned(),
        hint: Some("install git and put it on `PATH`".to_owned()),
    }
}

fn tool_error(error: ProcessError) -> SourceError {
    match error {
        ProcessError::Cancelled(cancelled) => cancelled.into(),
        other => SourceError::Tool { what: "the program `git`".to_owned(), why: other.to_string(), hint: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_progress_are_told_apart() {
        let mut messages = Messages::default();
        messages.take(b"remote: Counting: 50% (1/2)\rremote: Counting: 100% (2/2), done.\x1b[K\nReceiving ob");
        messages.take(b"jects:  45% (45/100), 1.20 MiB | 1.10 MiB/s\rfatal: early\x07 EOF\nfatal: again");
        assert_eq!(messages.latest.as_deref(), Some("Receiving objects:  45% (45/100), 1.20 MiB | 1.10 MiB/s"));
        assert_eq!(messages.last_lines("x"), "fatal: early EOF; fatal: again");
        assert_eq!(Messages::default().last_lines("signal: 9"), "git failed with signal: 9");
        let mut long = Messages::default();
        for number in 0..100 {
            long.take(format!("{number}{}\n", "x".repeat(1 << 12)).as_bytes());
        }
        assert!(long.last_lines("").len() <= KEPT_LINES * (MAX_LINE_BYTES + 2));
    }
}

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
/// What a server can cost.
const LIMITS: Limits = Limits {
    silence: Duration::from_secs(300),
    transfer: Duration::from_secs(4 * 3600),
    pack_bytes: 8 << 30,
    output_bytes: 64 << 20,
    memory_bytes: 2 << 30,
};
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
const PINNED_ENV: [(&str, &str); 5] = [
    ("GIT_TERMINAL_PROMPT", "0"),
    ("GIT_PROTOCOL_FROM_USER", "0"),
    ("GIT_OPTIONAL_LOCKS", "0"),
    // No single allocation is larger, whatever size an object claims.
    ("GIT_ALLOC_LIMIT", "1g"),
    ("LC_ALL", "C"),
];

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

/// Bounds of one run.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// A transfer ends when neither its messages nor its pack file change for this long.
    silence: Duration,
    /// A transfer ends after this time, even if bytes still trickle in.
    transfer: Duration,
    /// The largest pack that is accepted.
    pack_bytes: u64,
    /// The longest output of a command without a transfer, such as a list of refs.
    output_bytes: u64,
    /// Memory for data of each process of git (`RLIMIT_DATA`), where the system has such a limit.
    memory_bytes: u64,
}

/// One run of `git`.
#[derive(Debug)]
pub struct Git<'w> {
    world: &'w World,
    program: Program,
    limits: Limits,
}

impl<'w> Git<'w> {
    /// `git` in the folder `at` of the project's repository.
    pub fn at(world: &'w World, at: &Path) -> Self {
        let kept = world.env.iter().filter(|(name, _)| !POINTERS.contains(&name.as_str()));
        let env: BTreeMap<OsString, OsString> =
            kept.map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        let program = Program { path: "git".into(), args: Vec::new(), env, cwd: at.to_owned() };
        let git =
            PINNED_ENV.iter().fold(Self { world, program, limits: LIMITS }, |git, (name, value)| git.env(name, value));
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

    /// The program, started with the limit of memory. A shell sets it: nothing else can before git runs.
    #[cfg(unix)]
    fn bounded(&self) -> Program {
        let kilobytes = self.limits.memory_bytes / 1024;
        let script =
            format!("ulimit -d {kilobytes} 2>/dev/null; command -v git >/dev/null || exit {MISSING}; exec git \"$@\"");
        let before = ["-c".into(), script.into(), "git".into()];
        let args = before.into_iter().chain(self.program.args.iter().cloned()).collect();
        Program { path: "/bin/sh".into(), args, ..self.program.clone() }
    }

    #[cfg(not(unix))]
    fn bounded(&self) -> Program {
        self.program.clone()
    }

    /// Runs it; `None` when there is no such program.
    ///
    /// # Errors
    /// [`SourceError::Tool`] when it cannot be run or takes longer than two minutes.
    pub fn try_run(&self) -> Result<Option<Output>, SourceError> {
        match self.bounded().output(SHORT, self.limits.output_bytes, self.world.task.cancel()) {
            Ok(output) if is_missing_status(output.status) => Ok(None),
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
        if output.stdout.len() as u64 >= self.limits.output_bytes {
            return Err(too_large(self.limits.output_bytes));
        }
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
    /// [`SourceError`] when there is no such program, the user asked to stop, the pack is too large, nothing happens for five
    /// minutes, or it takes more than four hours.
    pub fn transfer(&self, folder: &Path, progress: &Progress) -> Result<Result<(), String>, SourceError> {
        let spawned = self.bounded().spawn(Stdio::null(), Stdio::null(), Stdio::piped());
        let mut running = spawned.map_err(|error| if is_missing(&error) { missing() } else { tool_error(error) })?;
        let messages = Arc::new(Mutex::new(Messages::default()));
        let reader = running.stderr().map(|pipe| read_messages(pipe, Arc::clone(&messages)));
        let (mut seen, mut changed, began) = ((0, 0), Instant::now(), Instant::now());
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
            if bytes > self.limits.pack_bytes {
                return Err(too_large(self.limits.pack_bytes));
            }
            if began.elapsed() > self.limits.transfer {
                return Ok(Err(format!("the transfer took more than {} s", self.limits.transfer.as_secs())));
            }
            if (bytes, count) != seen {
                (seen, changed) = ((bytes, count), Instant::now());
                progress.set(bytes, None, latest);
            } else if changed.elapsed() > self.limits.silence {
                return Ok(Err(format!("timed out: received nothing for {} s", self.limits.silence.as_secs())));
            }
            std::thread::park_timeout(POLL);
        };
        // A child of git that is left over must not hold the pipe open.
        running.end(Duration::ZERO);
        reader.map(std::thread::JoinHandle::join);
        if is_missing_status(status) {
            return Err(missing());
        }
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

/// The shell's exit status when there is no `git`.
const MISSING: i32 = 127;

fn is_missing_status(status: std::process::ExitStatus) -> bool {
    cfg!(unix) && status.code() == Some(MISSING)
}

fn too_large(limit_bytes: u64) -> SourceError {
    let why = format!("the server sends more than {limit_bytes} bytes");
    SourceError::Hostile { what: "the git repository".to_owned(), why }
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

    /// A world whose `git` is this shell script.
    #[cfg(unix)]
    fn imitated(script: &str) -> (tempfile::TempDir, World) {
        let root = tempfile::tempdir().unwrap();
        let program = root.path().join("git");
        fs::write_atomic(&program, format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
        fs::set_executable(&program).unwrap();
        let world = World {
            task: crate::report::Task::silent(),
            project: root.path().to_owned(),
            scratch: root.path().join("scratch"),
            offline: false,
            mirrors: Vec::new(),
            env: [("PATH".to_owned(), format!("{}:/usr/bin:/bin", root.path().display()))].into(),
        };
        (root, world)
    }

    #[cfg(unix)]
    #[test]
    fn m7_git_has_bounded_memory() {
        let (root, world) = imitated("ulimit -d; echo $GIT_ALLOC_LIMIT; echo \"$@\"");
        let said = Git::at(&world, root.path()).args(&["a b", "c"]).run().unwrap().unwrap();
        assert_eq!(said, format!("{}\n1g\na b c\n", LIMITS.memory_bytes / 1024));
    }

    #[cfg(unix)]
    #[test]
    fn m7_a_list_of_refs_without_end_is_refused() {
        let (root, world) = imitated("yes 0123456789012345678901234567890123456789 refs/heads/x | head -c 100000");
        let git = Git { limits: Limits { output_bytes: 1 << 16, ..LIMITS }, ..Git::at(&world, root.path()) };
        assert!(matches!(git.run(), Err(SourceError::Hostile { .. })));
    }

    /// Each of these goes on for ever, with something new all the time.
    #[cfg(unix)]
    #[test]
    fn m7_transfers_end() {
        let (root, world) = imitated("while :; do echo still counting >&2; printf 0123456789 >>\"$1\"; done");
        let folder = root.path().join("repository");
        let pack = folder.join("objects/pack/tmp_pack_x");
        fs::create_dir_all(fs::parent(&pack)).unwrap();
        let run = |limits: Limits| {
            let git = Git { limits, ..Git::at(&world, root.path()) }.args(&[pack.to_str().unwrap()]);
            git.transfer(&folder, &world.task.start(crate::report::Verb::Fetch, "x", None, crate::report::Unit::Bytes))
        };
        let endless = run(Limits { transfer: Duration::from_millis(300), ..LIMITS });
        assert!(endless.unwrap().unwrap_err().starts_with("the transfer took more than"));
        let large = run(Limits { pack_bytes: 100, ..LIMITS });
        assert!(matches!(large, Err(SourceError::Hostile { .. })), "{large:?}");
    }

    #[cfg(unix)]
    #[test]
    fn a_machine_without_git_is_told_so() {
        let (root, mut world) = imitated("");
        world.env.insert("PATH".to_owned(), root.path().join("nothing").display().to_string());
        assert!(Git::at(&world, root.path()).try_run().unwrap().is_none());
        let folder = root.path().join("repository");
        let progress = world.task.start(crate::report::Verb::Fetch, "x", None, crate::report::Unit::Bytes);
        let missing = Git::at(&world, root.path()).transfer(&folder, &progress);
        assert!(matches!(missing, Err(SourceError::Tool { hint: Some(_), .. })), "{missing:?}");
    }

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

//! Asks the package index through the machine's own pip: an embedded script (`index.py`) is run by the Python that has pip.
//!
//! So every mirror, proxy, certificate, netrc entry, keyring and credential that pip is set up for is used, and nothing has
//! to be set up twice. Absent here: any index address. The script passes none on, and its stderr goes nowhere, so that
//! no credential in an address can reach a message or a lockfile.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read, Seek as _, Write as _};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::base::digest::Digest;
use crate::base::fs::{self, FsError};
use crate::base::process::{ProcessError, Program};
use crate::source::{SourceError, World};

const SCRIPT: &str = include_str!("index.py");

/// The environment variable that names the interpreter, when the ones on `PATH` are not the right ones.
pub const PYTHON: &str = "AITOOLS_PYTHON";

/// An answer is at most this long: 2,000 files and 500 versions.
const MAX_LINE_BYTES: u64 = 4 << 20;
/// pip itself gives up sooner; this ends an interpreter that says nothing at all.
const STALL: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(50);

/// One file of a version, as the index lists it.
#[derive(Debug, Clone, Deserialize)]
pub struct File {
    pub name: String,
    /// Size in bytes, where the index or the server says it.
    pub size: Option<u64>,
    /// 64 hexadecimal digits, where the index says it.
    pub sha256: Option<String>,
    pub yanked: Yanked,
}

/// PEP 592: withdrawn by its makers, perhaps with a reason.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Yanked {
    Plainly(bool),
    Because(String),
}

impl File {
    pub fn is_yanked(&self) -> bool {
        !matches!(self.yanked, Yanked::Plainly(false))
    }

    pub fn yanked_because(&self) -> Option<&str> {
        match &self.yanked {
            Yanked::Because(why) => Some(why),
            Yanked::Plainly(_) => None,
        }
    }
}

/// What the index has of one version, and which versions there are at all (the newest last, 500 at most).
#[derive(Debug, Deserialize)]
pub struct Listing {
    pub files: Vec<File>,
    pub versions: Vec<String>,
}

/// One line of the script.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer {
    Done {
        done: u64,
    },
    Listing(Listing),
    /// How many bytes are there.
    Fetched {
        #[serde(rename = "fetched")]
        _bytes: u64,
    },
    Error {
        error: String,
        why: String,
    },
}

/// The files of one version, those of every platform.
///
/// # Errors
/// [`SourceError::Tool`] without pip, [`SourceError::Missing`] without the project, [`SourceError::Network`] otherwise.
pub fn list(world: &World, project: &str, version: &str) -> Result<Listing, SourceError> {
    let asked = Asked { what: format!("`{project}` {version} from the package index"), project };
    match ask(world, &asked, &["list".into(), project.into(), version.into()], &mut |_| ())? {
        Answer::Listing(listing) => Ok(listing),
        _ => Err(asked.network("unexpected output of pip's interpreter".to_owned(), None)),
    }
}

/// One file to bring.
#[derive(Debug)]
pub struct Wanted<'a> {
    pub project: &'a str,
    pub version: &'a str,
    /// The file's name, to the letter.
    pub file: &'a str,
    /// Of several files with this name, the one that is meant.
    pub sha256: Option<Digest>,
    /// No more than one chunk beyond this is written.
    pub limit_bytes: u64,
}

/// Brings one file to `dest`, continuing what is there; `seen` is told how many bytes are there so far.
/// What came is not checked here.
///
/// # Errors
/// As for [`list`].
pub fn fetch(world: &World, wanted: &Wanted<'_>, dest: &Path, seen: &mut dyn FnMut(u64)) -> Result<(), SourceError> {
    let asked = Asked { what: format!("`{}` from the package index", wanted.file), project: wanted.project };
    let digest = wanted.sha256.map_or_else(|| "-".to_owned(), |digest| digest.hex());
    let args = [
        "fetch".into(),
        wanted.project.into(),
        wanted.version.into(),
        wanted.file.into(),
        digest.into(),
        wanted.limit_bytes.to_string().into(),
        dest.into(),
    ];
    match ask(world, &asked, &args, seen)? {
        Answer::Fetched { .. } => Ok(()),
        _ => Err(asked.network("unexpected output of pip's interpreter".to_owned(), None)),
    }
}

struct Asked<'a> {
    what: String,
    project: &'a str,
}

impl Asked<'_> {
    fn network(&self, why: String, hint: Option<&str>) -> SourceError {
        SourceError::Network { what: self.what.clone(), why, hint: hint.map(str::to_owned) }
    }

    fn failure(&self, kind: &str, why: String) -> SourceError {
        let missing = |hint: &str| SourceError::Missing {
            what: self.what.clone(),
            why: why.clone(),
            hint: Some(hint.to_owned()),
        };
        match kind {
            "no-project" => missing(&format!(
                "check the name: `python3 -m pip index versions {}` asks the same indexes",
                self.project
            )),
            "no-file" => missing("was it removed? lock again, or point pip at an index that still has it"),
            "denied" => self.network(why, Some("give pip credentials: in its configuration, `.netrc` or a keyring")),
            "machine" => self.network(why, None),
            _ => self.network(why, Some("`python3 -m pip config debug` shows which index pip uses")),
        }
    }
}

/// The first interpreter with a usable pip answers.
fn ask(world: &World, asked: &Asked<'_>, args: &[OsString], seen: &mut dyn FnMut(u64)) -> Result<Answer, SourceError> {
    if world.offline {
        return Err(SourceError::Offline { what: asked.what.clone() });
    }
    let mut tried = Vec::new();
    for command in interpreters(&world.env) {
        match converse(world, &command, args, seen) {
            Ok(Some(Answer::Error { error, why })) if error == "no-pip" => {
                tried.push(format!("`{}`: {why}", command[0]));
            }
            Ok(Some(Answer::Error { error, why })) => return Err(asked.failure(&error, why)),
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => tried.push(format!("`{}` ended without output", command[0])),
            Err(Broken::Process(ProcessError::Start { source, .. })) => {
                tried.push(format!("`{}`: {source}", command[0]));
            }
            Err(Broken::Process(ProcessError::Cancelled(cancelled))) => return Err(cancelled.into()),
            Err(Broken::Process(error)) => return Err(asked.network(error.to_string(), None)),
            Err(Broken::Fs(error)) => return Err(error.into()),
        }
    }
    Err(SourceError::Tool {
        what: "Python with pip, or uv,".to_owned(),
        why: format!("it fetches packages, as it is configured on this machine ({})", tried.join("; ")),
        hint: Some(format!("install pip or uv, or set `{PYTHON}` to a Python that has pip")),
    })
}

/// Commands that may start a Python with pip, in the order in which they are tried.
pub fn interpreters(env: &BTreeMap<String, String>) -> Vec<Vec<&str>> {
    if let Some(named) = env.get(PYTHON).filter(|named| !named.is_empty()) {
        return vec![vec![named]];
    }
    let mut all = vec![vec!["python3"], vec!["python"]];
    if cfg!(windows) {
        all.push(vec!["py", "-3"]);
    }
    // The range of pip versions that the script was tried with.
    all.push(vec!["uv", "run", "--quiet", "--no-project", "--with", "pip>=23,<27", "python"]);
    all
}

#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// Runs the script to its end and gives its last word.
fn converse(
    world: &World,
    command: &[&str],
    args: &[OsString],
    seen: &mut dyn FnMut(u64),
) -> Result<Option<Answer>, Broken> {
    let before = command[1..].iter().map(OsString::from).chain(["-".into()]);
    let program = Program {
        path: command[0].into(),
        args: before.chain(args.iter().cloned()).collect(),
        env: environment(&world.env, command[0] == "uv"),
        // pip's settings and version managers may look at the current folder.
        cwd: world.project.clone(),
    };
    let mut running = program.spawn(script(&world.scratch)?, Stdio::piped(), Stdio::null())?;
    let Some(pipe) = running.stdout() else { return Ok(None) };
    let lines = read_lines(pipe);
    let mut heard = Instant::now();
    let mut last = None;
    loop {
        match lines.recv_timeout(POLL) {
            Ok(line) => {
                heard = Instant::now();
                match serde_json::from_slice(&line) {
                    Ok(Answer::Done { done }) => seen(done),
                    Ok(answer) => last = Some(answer),
                    Err(_) => {}
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                world.task.check().map_err(ProcessError::from)?;
                if heard.elapsed() > STALL {
                    return Err(ProcessError::Timeout { path: program.path, limit_s: STALL.as_secs() }.into());
                }
            }
        }
    }
    running.wait(world.task.cancel(), Some(Instant::now() + crate::base::process::GRACE))?;
    Ok(last)
}

/// uv knows its own variables for the index; the pip that it brings knows only pip's.
fn environment(env: &BTreeMap<String, String>, by_uv: bool) -> BTreeMap<OsString, OsString> {
    let mut all: BTreeMap<OsString, OsString> = env.iter().map(|(key, value)| (key.into(), value.into())).collect();
    let renamed = [
        ("UV_INDEX_URL", "PIP_INDEX_URL"),
        ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"),
        ("UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL"),
    ];
    for (theirs, pips) in renamed {
        if let (true, Some(value), None) = (by_uv, env.get(theirs), env.get(pips)) {
            all.insert(pips.into(), value.into());
        }
    }
    all
}

/// The script as standard input: no file that somebody could change on the way, no limit on a command line's length.
fn script(scratch: &Path) -> Result<Stdio, FsError> {
    let written = || {
        let mut file = tempfile::tempfile_in(scratch)?;
        file.write_all(SCRIPT.as_bytes())?;
        file.rewind()?;
        Ok(file)
    };
    fs::create_dir_all(scratch)?;
    written().map(Stdio::from).map_err(|error| FsError::new("write a file in", scratch, error))
}

fn read_lines(pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (send, lines) = sync_channel(64);
    std::thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        loop {
            let mut line = Vec::new();
            let read = (&mut pipe).take(MAX_LINE_BYTES).read_until(b'\n', &mut line);
            if !matches!(read, Ok(1..)) || line.last() != Some(&b'\n') || send.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_interpreter_is_the_only_one() {
        let env = BTreeMap::from([(PYTHON.to_owned(), "/opt/x y/python".to_owned())]);
        assert_eq!(interpreters(&env), [["/opt/x y/python"]]);
        assert!(interpreters(&BTreeMap::new()).len() >= 3);
    }

    #[test]
    fn uv_settings_reach_the_pip_that_uv_brings() {
        let env = BTreeMap::from([("UV_DEFAULT_INDEX".to_owned(), "a".to_owned())]);
        let index = |by_uv| environment(&env, by_uv).get(std::ffi::OsStr::new("PIP_INDEX_URL")).cloned();
        assert_eq!((index(true), index(false)), (Some("a".into()), None));
    }

    #[test]
    fn an_endless_line_is_dropped() {
        let lines = read_lines(std::io::repeat(b'x').take(MAX_LINE_BYTES * 3));
        assert!(lines.recv().is_err());
    }
}

//! The supervised process that answers for one policy: started, watched until it is ready, and ended.
//!
//! Invariant: an engine never outlives its [`Backend`]; with a [`Driver`] it does not outlive this process either, however
//! that one ends. Nothing the engine prints is lost to the user when it fails, and nothing it prints can fill the disk.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::http::Patience;
use super::{Endpoint, EngineError, Judge, Launch, Ready};
use crate::base::cancel::{Cancel, Cancelled};
use crate::base::digest;
use crate::base::fs::{self, FsError};
use crate::base::process::{ProcessError, Program, Running};

/// How often an engine that loads is asked whether it is ready.
const POLL: Duration = Duration::from_millis(10);
/// How often another port is tried when somebody else was quicker.
const PORT_ATTEMPTS: u32 = 3;
/// How many ports in a row may turn out to be claimed by others.
const CLAIM_ATTEMPTS: u32 = 20;
/// After this many bytes the log begins anew; one former part is kept beside it as `<log>.old`.
const LOG_LIMIT_BYTES: u64 = 16 << 20;
/// Lines kept in memory for messages.
const TAIL_LINES: usize = 200;
const LINE_LIMIT_BYTES: usize = 4096;
/// How long the pipes of an engine that has ended are read on.
const DRAIN: Duration = Duration::from_millis(500);

/// Our own program as `aitools internal exec`: it stands between and ties the engine's life to ours.
#[derive(Debug, Clone)]
pub struct Driver {
    pub program: PathBuf,
    /// What comes before the parent's process id, the engine's program and its arguments.
    pub args: Vec<OsString>,
}

/// What a start needs beside the engine's own command.
#[derive(Debug)]
pub struct Supervision<'a> {
    /// Without one the engine is started directly and outlives us when we are killed.
    pub driver: Option<&'a Driver>,
    /// The whole environment but for the launch's own additions: see [`passed_on`].
    pub env: &'a BTreeMap<OsString, OsString>,
    /// A folder of this run alone.
    pub scratch: &'a Path,
    /// Where the engine's output goes.
    pub log: &'a Path,
    pub cancel: &'a Cancel,
    /// Until when it must be ready.
    pub deadline: Instant,
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Engine(EngineError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// `tail`: the last lines it wrote.
    #[error("`{program}` ended before it was ready ({status})")]
    Ended { program: String, status: ExitStatus, tail: Vec<String> },
    #[error("`{program}` was not ready within {waited_s} s")]
    NotReady { program: String, waited_s: u64, tail: Vec<String> },
    #[error("no port could be had: {0}")]
    Port(io::Error),
    #[error("{0} ports in a row were taken by another program before the engine could listen")]
    PortsTaken(u32),
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

impl From<EngineError> for BackendError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Cancelled(cancelled) => cancelled.into(),
            other => Self::Engine(other),
        }
    }
}

impl BackendError {
    /// The last lines of the engine's output, when they say why.
    pub fn tail(&self) -> &[String] {
        match self {
            Self::Ended { tail, .. } | Self::NotReady { tail, .. } => tail,
            _ => &[],
        }
    }
}

/// The variables of the user's environment that engines are given: where things are, which devices to use, and nothing
/// that changes what an engine does with a policy.
pub fn passed_on<'a>(env: impl Iterator<Item = (&'a OsStr, &'a OsStr)>) -> BTreeMap<OsString, OsString> {
    const NAMES: &[&str] = &[
        "PATH",
        "HOME",
        "USERPROFILE",
        "SYSTEMROOT",
        "TMPDIR",
        "TMP",
        "TEMP",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_DEVICE_ORDER",
        "CUDA_CACHE_PATH",
        "NVIDIA_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "HSA_OVERRIDE_GFX_VERSION",
    ];
    let wanted = |name: &OsStr| NAMES.iter().any(|known| name.eq_ignore_ascii_case(known));
    env.filter(|(name, _)| wanted(name)).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// A started engine that has said it is ready. Dropping it ends it.
#[derive(Debug)]
pub struct Backend {
    running: Running,
    endpoint: Endpoint,
    output: Output,
    load: Duration,
    _claim: UdpSocket,
}

impl Backend {
    /// Starts the engine of a policy and waits until it is ready, with a new port and key for each attempt.
    ///
    /// # Errors
    /// [`BackendError`]; nothing runs then.
    pub fn start(ready: &Ready, supervision: &Supervision<'_>) -> Result<Self, BackendError> {
        let began = Instant::now();
        for _ in 0..PORT_ATTEMPTS {
            let (port, claim) = free_port().map_err(BackendError::Port)?;
            let endpoint = Endpoint { port, key: random_key()? };
            let command = ready.launch(&endpoint, supervision.scratch)?;
            for (path, text) in &command.files {
                fs::write_atomic(path, text.as_bytes())?;
            }
            let (running, output) = spawn(command, supervision)?;
            let mut backend = Self { running, endpoint, output, load: Duration::ZERO, _claim: claim };
            if backend.wait_until_ready(ready, supervision, began)? {
                backend.load = began.elapsed();
                backend.listen_to(ready.judge(&backend.endpoint, supervision.scratch), supervision.cancel)?;
                return Ok(backend);
            }
        }
        Err(BackendError::PortsTaken(PORT_ATTEMPTS))
    }

    /// False when the port is somebody else's.
    fn wait_until_ready(
        &mut self,
        asked: &Ready,
        supervision: &Supervision<'_>,
        began: Instant,
    ) -> Result<bool, BackendError> {
        let patience = Patience { cancel: supervision.cancel, deadline: supervision.deadline };
        loop {
            let ready = match asked.engine.ready(&self.endpoint, patience) {
                Err(EngineError::Foreign(port)) if is_listened_on(port) => return Ok(false),
                // Nobody listens any more: that was our own on its way out.
                Err(EngineError::Foreign(_)) => false,
                other => other?,
            };
            // Looked at after the answer: what ended cannot have given it.
            if let Some(status) = self.running.try_wait()? {
                if is_listened_on(self.endpoint.port) {
                    return Ok(false);
                }
                return Err(BackendError::Ended { program: self.name(), status, tail: self.final_lines() });
            }
            if ready {
                return Ok(true);
            }
            supervision.cancel.check()?;
            if Instant::now() >= supervision.deadline {
                let tail = self.output.tail();
                return Err(BackendError::NotReady { program: self.name(), waited_s: began.elapsed().as_secs(), tail });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether the engine itself says that it started as it was asked to. What is not said within a moment is not said.
    fn listen_to(&self, judge: Option<Judge>, cancel: &Cancel) -> Result<(), BackendError> {
        let Some(judge) = judge else { return Ok(()) };
        let deadline = Instant::now() + DRAIN;
        loop {
            if let Some(judged) = self.output.tail().iter().find_map(|line| judge(line)) {
                return judged.map_err(BackendError::from);
            }
            cancel.check()?;
            if Instant::now() >= deadline {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }

    fn name(&self) -> String {
        self.output.program.clone()
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// From starting the program to its first "ready", earlier attempts at a port included.
    pub fn load(&self) -> Duration {
        self.load
    }

    /// How it ended, when it did.
    ///
    /// # Errors
    /// When the system has lost it.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        self.running.try_wait()
    }

    /// How it ended, waiting a moment for it: after its connection broke, the program may still be on its way out.
    pub fn ending(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + DRAIN;
        loop {
            match self.running.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(POLL),
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
    }

    /// The last lines the engine wrote.
    pub fn tail(&self) -> Vec<String> {
        self.output.tail()
    }

    /// [`Backend::tail`] of an engine that has ended: what is still in its pipes is read first.
    pub fn final_lines(&mut self) -> Vec<String> {
        self.output.drain();
        self.output.tail()
    }

    /// The most memory the engine held at once, in bytes. None where the system does not tell.
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        platform::peak_memory_bytes(self.pid())
    }

    /// GPU memory that the engine holds now, in bytes, over all devices. None where the driver does not tell (no NVIDIA
    /// device; a container with process ids of its own).
    pub fn gpu_memory_bytes(&self) -> Option<u64> {
        gpu_memory_bytes(self.pid())
    }

    /// Asks the engine to end, and after `grace` ends it by force.
    pub fn stop(mut self, grace: Duration) {
        self.running.end(grace);
        self.output.drain();
    }
}

/// A port on which nobody listens, and our claim to it. Engines listen only once they have loaded, and some of them beside
/// whoever listens there already (`SO_REUSEPORT`): until then another run could draw the same one. It cannot have the UDP
/// port of that number, too, which nobody needs.
fn free_port() -> io::Result<(u16, UdpSocket)> {
    for _ in 0..CLAIM_ATTEMPTS {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        if let Ok(claim) = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)) {
            return Ok((port, claim));
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Whether anybody listens there. (Binding would not tell: the connections of a program that is gone may linger.)
fn is_listened_on(port: u16) -> bool {
    TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, port).into(), Duration::from_secs(1)).is_ok()
}

fn random_key() -> Result<String, BackendError> {
    let mut bytes = [0; 24];
    getrandom::fill(&mut bytes).map_err(BackendError::Random)?;
    Ok(digest::hex(&bytes))
}

fn spawn(launch: Launch, supervision: &Supervision<'_>) -> Result<(Running, Output), BackendError> {
    let name = launch.program.file_name().unwrap_or(launch.program.as_os_str()).to_string_lossy().into_owned();
    let mut env = supervision.env.clone();
    env.extend(launch.env);
    let (path, args) = match supervision.driver {
        None => (launch.program, launch.args),
        Some(driver) => {
            let own = std::process::id().to_string();
            let before = driver.args.iter().cloned().chain([own.into(), launch.program.into()]);
            (driver.program.clone(), before.chain(launch.args).collect())
        }
    };
    let log = Log::open(supervision.log)?;
    let mut running = keeper::spawn(Program { path, args, env, cwd: launch.cwd })?;
    let log = Arc::new(Mutex::new(log));
    let mut readers = Vec::new();
    readers.extend(running.stdout().map(|pipe| keep(pipe, &log)));
    readers.extend(running.stderr().map(|pipe| keep(pipe, &log)));
    Ok((running, Output { program: name, log, readers }))
}

/// Starts programs from a thread that lives as long as we do: Linux tells a child of its parent *thread's* death
/// (prctl(2), PR_SET_PDEATHSIG), and threads of pools come and go.
mod keeper {
    use super::{OnceLock, PoisonError, ProcessError, Program, Running, Stdio, mpsc};
    use std::sync::Mutex;

    type Job = (Program, mpsc::Sender<Result<Running, ProcessError>>);

    fn start(program: &Program) -> Result<Running, ProcessError> {
        // A driver that cannot ask the system takes the end of its stdin for ours.
        program.spawn(Stdio::piped(), Stdio::piped(), Stdio::piped())
    }

    pub(super) fn spawn(program: Program) -> Result<Running, ProcessError> {
        static KEEPER: OnceLock<Option<Mutex<mpsc::Sender<Job>>>> = OnceLock::new();
        let keeper = KEEPER.get_or_init(|| {
            let (sender, jobs) = mpsc::channel::<Job>();
            let thread = std::thread::Builder::new().name("engines".to_owned()).spawn(move || {
                for (program, answer) in jobs {
                    let _ = answer.send(start(&program));
                }
            });
            thread.ok().map(|_| Mutex::new(sender))
        });
        let (answer, started) = mpsc::channel();
        let lost = |path| {
            let source = std::io::Error::other("the thread that starts programs is gone");
            Err(ProcessError::Start { path, source })
        };
        let path = program.path.clone();
        let Some(keeper) = keeper else { return lost(path) };
        let _ = keeper.lock().unwrap_or_else(PoisonError::into_inner).send((program, answer));
        started.recv().unwrap_or_else(|_| lost(path))
    }
}

/// What an engine wrote: the log, and the threads that read its pipes.
#[derive(Debug)]
struct Output {
    program: String,
    log: Arc<Mutex<Log>>,
    readers: Vec<JoinHandle<()>>,
}

impl Output {
    fn tail(&self) -> Vec<String> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let last = String::from_utf8_lossy(&log.line).trim_end().to_owned();
        log.tail.iter().cloned().chain(Some(last).filter(|line| !line.is_empty())).collect()
    }

    /// Waits until the pipes are empty, but no longer than a stray grandchild may keep them open.
    fn drain(&self) {
        let deadline = Instant::now() + DRAIN;
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }
}

fn keep(mut pipe: impl Read + Send + 'static, log: &Arc<Mutex<Log>>) -> JoinHandle<()> {
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        let mut part = [0; 8192];
        loop {
            match pipe.read(&mut part) {
                Ok(0) => return,
                Ok(count) => log.lock().unwrap_or_else(PoisonError::into_inner).write(&part[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// A file of bounded size and the last lines of it.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    /// None once writing failed: an engine is not ended because the disk is full.
    file: Option<File>,
    size_bytes: u64,
    tail: VecDeque<String>,
    /// The line that is not yet whole.
    line: Vec<u8>,
}

impl Log {
    fn open(path: &Path) -> Result<Self, FsError> {
        fs::create_dir_all(fs::parent(path))?;
        let file = Some(fs::create(path)?);
        Ok(Self { path: path.to_owned(), file, size_bytes: 0, tail: VecDeque::new(), line: Vec::new() })
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.size_bytes + bytes.len() as u64 > LOG_LIMIT_BYTES {
            self.file = None;
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            let _ = fs::rename(&self.path, Path::new(&old));
            self.file = fs::create(&self.path).ok();
            self.size_bytes = 0;
        }
        self.size_bytes += bytes.len() as u64;
        if self.file.as_mut().is_some_and(|file| file.write_all(bytes).is_err()) {
            self.file = None;
        }
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = LINE_LIMIT_BYTES.saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).trim_end().to_owned();
                if self.tail.len() == TAIL_LINES {
                    self.tail.pop_front();
                }
                self.tail.push_back(line);
            }
        }
    }
}

fn gpu_memory_bytes(pid: u32) -> Option<u64> {
    use nvml_wrapper::Nvml;
    use nvml_wrapper::enums::device::UsedGpuMemory;
    let nvml = Nvml::init().ok()?;
    let mut total = None;
    for index in 0..nvml.device_count().ok()?.min(64) {
        let processes = nvml.device_by_index(index).ok()?.running_compute_processes().ok()?;
        for process in processes.iter().filter(|process| process.pid == pid) {
            if let UsedGpuMemory::Used(bytes) = process.used_gpu_memory {
                *total.get_or_insert(0) += bytes;
            }
        }
    }
    total
}

#[cfg(target_os = "linux")]
mod platform {
    use crate::base::fs;

    /// `VmHWM` of `/proc/<pid>/status` (proc_pid_status(5)), in KiB there.
    pub fn peak_memory_bytes(pid: u32) -> Option<u64> {
        let path = std::path::PathBuf::from(format!("/proc/{pid}/status"));
        let status = fs::read_bounded(&path, 64 * 1024).ok()?;
        let status = String::from_utf8_lossy(&status);
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    pub fn peak_memory_bytes(_: u32) -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_claimed_until_its_engine_has_ended() {
        let (port, claim) = free_port().unwrap();
        assert!(!is_listened_on(port));
        let again = || UdpSocket::bind((Ipv4Addr::LOCALHOST, port));
        assert!(again().is_err(), "another run would take it");
        drop(claim);
        assert!(again().is_ok());
    }
}

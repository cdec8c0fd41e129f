//! The supervised process that serves one policy: started, watched until it is ready, and ended.
//!
//! Invariant: an engine never outlives its [`Backend`]; with a driver it does not outlive this process either, however
//! that one ends. Whatever an engine prints before it fails reaches the user, and nothing it prints can fill the disk.
//!
//! Everything that waits is asynchronous and needs a tokio runtime. Dropping the future of [`Backend::start`] ends the engine.

mod keeper;
mod listener;
mod memory;
mod output;
mod port;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::net::UdpSocket;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::listener::Listener;
use self::output::{Log, Output};
use self::port::{free_port, is_listened_on};
use super::conversation::{Conversation, Events, Request};
use super::{Endpoint, EngineError, Launch, Ready, StartupCheck};
use crate::base::fs::{self, FsError};
use crate::base::process::{ProcessError, Program, Running};
use crate::base::random;

/// How often an engine that is loading is asked whether it is ready.
const POLL: Duration = Duration::from_millis(10);
/// How many ports are tried when other programs were quicker.
const PORT_ATTEMPTS: u32 = 3;
/// How long to wait for the last output, and for the exit status, of an engine that is ending.
const DRAIN: Duration = Duration::from_millis(500);

/// What a start needs beside the engine's own command.
#[derive(Debug)]
pub struct Supervision<'a> {
    /// Our own program: as `internal exec` it ties the engine's life to ours, and confines it. Without it the engine is started
    /// directly, and outlives us when we are killed.
    pub driver: Option<&'a Path>,
    /// The whole environment but for the launch's own additions: see [`passed_on`].
    pub env: &'a BTreeMap<OsString, OsString>,
    /// A folder of this start alone.
    pub scratch: &'a Path,
    /// Where the engine's output goes.
    pub log: &'a Path,
    /// Until when it must be ready.
    pub deadline: Instant,
}

/// Why an engine could not be started.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum BackendError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// `tail`: the last lines it wrote.
    #[error("`{program}` ended before it was ready ({status})")]
    Ended { program: String, status: ExitStatus, tail: Vec<String> },
    #[error("`{program}` was not ready within {waited_s} s")]
    NotReady { program: String, waited_s: u64, tail: Vec<String> },
    #[error("no free port: {0}")]
    Port(io::Error),
    #[error("{0} ports in a row were taken by another program before the engine could listen")]
    PortsTaken(u32),
    #[error("could not get random numbers from the system: {0}")]
    Random(getrandom::Error),
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

/// The variables of the user's environment that engines get: folders and devices, and nothing that changes what
/// an engine does with a policy.
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

/// A started engine that is ready. Any number of requests may use it at a time. Dropping it ends the engine, and waits for that;
/// [`Backend::stop`] does the same without blocking the thread.
#[derive(Debug)]
pub struct Backend {
    process: Process,
    conversation: Arc<dyn Conversation>,
    load: Duration,
}

/// A started program, before and after it is ready.
#[derive(Debug)]
struct Process {
    name: String,
    pid: u32,
    running: Mutex<Running>,
    output: Output,
    endpoint: Endpoint,
    _claim: UdpSocket,
}

impl Backend {
    /// Starts the engine of a policy and waits until it is ready, with a new port and key for each attempt.
    ///
    /// # Errors
    /// [`BackendError`]; the engine has ended then.
    pub async fn start(ready: &Ready, supervision: &Supervision<'_>) -> Result<Self, BackendError> {
        let began = Instant::now();
        for _ in 0..PORT_ATTEMPTS {
            let (port, claim) = free_port().map_err(BackendError::Port)?;
            let endpoint = Endpoint { port, key: random::key().map_err(BackendError::Random)? };
            let conversation = ready.model.connect(&ready.policy, &endpoint)?;
            let request = ready.launch_request(&endpoint, supervision.scratch);
            ready.model.prepare(&request)?;
            let (launch, check) = (ready.model.launch(&request)?, ready.model.startup_check(&request));
            let process = Process::spawn(launch, ready.network, supervision, endpoint, claim)?;
            if process.is_ready(conversation.as_ref(), supervision.deadline, began).await? {
                let load = began.elapsed();
                process.check_output(check).await?;
                return Ok(Self { process, conversation, load });
            }
        }
        Err(BackendError::PortsTaken(PORT_ATTEMPTS))
    }

    /// How the engine is talked to under the policy that it was started for.
    pub fn conversation(&self) -> &Arc<dyn Conversation> {
        &self.conversation
    }

    /// Sends a request: [`Conversation::generate`].
    pub fn generate(&self, request: Request) -> Events {
        self.conversation.generate(request)
    }

    /// Where it listens.
    pub fn endpoint(&self) -> &Endpoint {
        &self.process.endpoint
    }

    /// The engine's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// From starting the program until it was ready, earlier attempts at a port included.
    pub fn load(&self) -> Duration {
        self.load
    }

    /// The exit status, once it has ended.
    ///
    /// # Errors
    /// When the system has lost it.
    pub fn ended(&self) -> Result<Option<ExitStatus>, ProcessError> {
        self.process.ended()
    }

    /// The exit status of an engine whose connection broke: it may take a moment to end. None when it goes on.
    pub async fn ending(&self) -> Option<ExitStatus> {
        let deadline = Instant::now() + DRAIN;
        loop {
            match self.ended() {
                Ok(None) if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                Ok(status) => return status,
                Err(_) => return None,
            }
        }
    }

    /// The last lines the engine wrote.
    pub fn tail(&self) -> Vec<String> {
        self.process.output.tail()
    }

    /// [`Backend::tail`] of an engine that has ended: what is still in its pipes is read first.
    pub async fn final_lines(&self) -> Vec<String> {
        self.process.final_lines().await
    }

    /// The most memory the engine held at once, in bytes. None where the system does not tell.
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        memory::peak_memory_bytes(self.pid())
    }

    /// GPU memory that the engine holds now, in bytes, over all devices. None where the driver does not tell.
    pub fn gpu_memory_bytes(&self) -> Option<u64> {
        memory::gpu_memory_bytes(self.pid())
    }

    /// Asks the engine to end, and after `grace` ends it by force.
    pub async fn stop(self, grace: Duration) {
        let Process { running, output, .. } = self.process;
        let end = move || running.into_inner().unwrap_or_else(PoisonError::into_inner).end(grace);
        let _ = tokio::task::spawn_blocking(end).await;
        output.drain().await;
    }
}

impl Process {
    fn spawn(
        launch: Launch,
        network: bool,
        supervision: &Supervision<'_>,
        endpoint: Endpoint,
        claim: UdpSocket,
    ) -> Result<Self, BackendError> {
        for (path, text) in &launch.files {
            fs::write_atomic(path, text.as_bytes())?;
        }
        let name = launch.program.file_name().unwrap_or(launch.program.as_os_str()).to_string_lossy().into_owned();
        let mut env = supervision.env.clone();
        env.extend(launch.env);
        let (path, args) = match supervision.driver {
            None => (launch.program, launch.args),
            Some(driver) => {
                let own = std::process::id().to_string();
                let verb = if network { "exec-with-network" } else { "exec" };
                let before = ["internal".into(), verb.into(), own.into(), launch.program.into()].into_iter();
                (driver.to_owned(), before.chain(launch.args).collect())
            }
        };
        let log = Log::open(supervision.log)?;
        let mut running = keeper::spawn(Program { path, args, env, cwd: launch.cwd })?;
        let output = Output::keep(&mut running, log);
        let pid = running.pid();
        Ok(Self { name, pid, running: Mutex::new(running), output, endpoint, _claim: claim })
    }

    fn ended(&self) -> Result<Option<ExitStatus>, ProcessError> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).try_wait()
    }

    async fn final_lines(&self) -> Vec<String> {
        self.output.drain().await;
        self.output.tail()
    }

    /// Whether another program listens on the port. The sockets of an engine that is just ending may look so for a moment.
    async fn is_foreign(&self) -> bool {
        let look = || listener::of(self.endpoint.port, self.pid) == Listener::Another;
        if !look() {
            return false;
        }
        tokio::time::sleep(POLL).await;
        look()
    }

    /// Asks an engine that listens whether it is ready; no other program is asked. None when the port is another program's.
    async fn probe(&self, conversation: &dyn Conversation, deadline: Instant) -> Result<Option<bool>, BackendError> {
        match listener::of(self.endpoint.port, self.pid) {
            Listener::Nobody => return Ok(Some(false)),
            Listener::Another if self.is_foreign().await => return Ok(None),
            Listener::Another => return Ok(Some(false)),
            Listener::Engine | Listener::Unknown => {}
        }
        match conversation.ready(deadline).await {
            Err(EngineError::Foreign(port)) if is_listened_on(port).await => Ok(None),
            // Nobody listens any more: that was our own engine, ending. A slow one is told by the deadline.
            Err(EngineError::Foreign(_) | EngineError::Timeout) => Ok(Some(false)),
            other => Ok(Some(other?)),
        }
    }

    /// Waits until it is ready. False when the port is another program's.
    async fn is_ready(
        &self,
        conversation: &dyn Conversation,
        deadline: Instant,
        began: Instant,
    ) -> Result<bool, BackendError> {
        loop {
            let Some(ready) = self.probe(conversation, deadline).await? else { return Ok(false) };
            // Looked at after the answer: a program that has ended cannot have given it.
            if let Some(status) = self.ended()? {
                if is_listened_on(self.endpoint.port).await {
                    return Ok(false);
                }
                let tail = self.final_lines().await;
                return Err(BackendError::Ended { program: self.name.clone(), status, tail });
            }
            if ready {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                let (program, tail) = (self.name.clone(), self.output.tail());
                return Err(BackendError::NotReady { program, waited_s: began.elapsed().as_secs(), tail });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Looks in the output for the line that says whether the engine started as requested. One that is not there after a
    /// moment is not an error.
    async fn check_output(&self, check: Option<StartupCheck>) -> Result<(), BackendError> {
        let Some(check) = check else { return Ok(()) };
        let deadline = Instant::now() + DRAIN;
        loop {
            if let Some(checked) = self.output.tail().iter().find_map(|line| check(line)) {
                return checked.map_err(BackendError::from);
            }
            if Instant::now() >= deadline {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

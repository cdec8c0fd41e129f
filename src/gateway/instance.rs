//! The task of one engine process: starts it, watches it, ends it. Whatever happens is told to the owner.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::catalog::Catalog;
use super::scheduler::{Input, Memory};
use crate::base::fs;
use crate::base::process::GRACE;
use crate::engine::Ready;
use crate::engine::backend::{Backend, BackendError, Supervision};
use crate::engine::conversation::Conversation;

/// How often an engine that serves is looked at.
const WATCH: Duration = Duration::from_millis(100);
/// How many looks make one at its memory.
const LOOKS: u32 = 20;
/// Lines of an engine's output in an error.
const LAST_WORDS: usize = 8;

/// What all engines of a gateway are started with.
#[derive(Debug)]
pub struct Surroundings {
    /// Ties the engines' lives to ours.
    pub driver: Option<PathBuf>,
    /// The whole environment but for what an engine's adapter adds.
    pub env: BTreeMap<OsString, OsString>,
    /// A folder for the files of each start.
    pub scratch: PathBuf,
    /// Where the engines' outputs go: one file for each policy.
    pub logs: PathBuf,
}

/// What the task of an engine tells the owner. Policies are named.
#[derive(Debug)]
pub enum Report {
    /// An engine is ready.
    Started(String, Arc<Engine>),
    /// The most memory that the engine of a policy has held.
    Measured(String, Memory),
    /// It did not start, died, or has ended as it was told to.
    Over(Input),
}

/// Where reports go. When nobody listens any more, the gateway is over.
pub type Reports = mpsc::UnboundedSender<Report>;

fn tell(reports: &Reports, report: Report) {
    let _ = reports.send(report);
}

/// An engine that is ready, as requests see it.
#[derive(Debug)]
pub struct Engine {
    pub ready: Ready,
    pub conversation: Arc<dyn Conversation>,
    pub pid: u32,
    pub load: Duration,
}

/// Starts the engine of a policy and stays with it until it has ended. `stop` ends it.
pub async fn run(
    policy: String,
    catalog: Arc<dyn Catalog>,
    surroundings: Arc<Surroundings>,
    reports: Reports,
    mut stop: oneshot::Receiver<()>,
) {
    let started = tokio::select! {
        started = start(&policy, catalog, &surroundings) => started,
        // Dropping the start ends the engine.
        _ = &mut stop => return tell(&reports, Report::Over(Input::Stopped(policy))),
    };
    // The scratch folder is the engine's working directory: it stays until the engine has ended.
    let (backend, engine, _scratch) = match started {
        Ok(started) => started,
        Err((why, permanent)) => {
            return tell(&reports, Report::Over(Input::StartFailed { policy, why, permanent }));
        }
    };
    tell(&reports, Report::Started(policy.clone(), Arc::new(engine)));
    match watch(&policy, &backend, &reports, &mut stop).await {
        None => {
            backend.stop(GRACE).await;
            tell(&reports, Report::Over(Input::Stopped(policy)));
        }
        Some(status) => {
            let why = last_words(&status, &backend.final_lines().await);
            drop(tokio::task::spawn_blocking(move || drop(backend)).await);
            tell(&reports, Report::Over(Input::Died { policy, why }));
        }
    }
}

async fn start(
    policy: &str,
    catalog: Arc<dyn Catalog>,
    surroundings: &Surroundings,
) -> Result<(Backend, Engine, tempfile::TempDir), (String, bool)> {
    let name = policy.to_owned();
    let ready = tokio::task::spawn_blocking(move || catalog.ready(&name)).await;
    let ready = ready.map_err(|error| (error.to_string(), false))?.map_err(|why| (why, true))?;
    let io = |error: fs::FsError| (error.to_string(), false);
    let scratch = fs::temporary_dir(&surroundings.scratch).map_err(io)?;
    let log = surroundings.logs.join(format!("{policy}.log"));
    let supervision = Supervision {
        driver: surroundings.driver.as_deref(),
        env: &surroundings.env,
        scratch: scratch.path(),
        log: &log,
        deadline: Instant::now() + ready.policy.runtime.time_limit(),
    };
    let backend = Backend::start(&ready, &supervision).await.map_err(|error| {
        // What the engine cannot do it cannot do later, either.
        let permanent = matches!(error, BackendError::Engine(_));
        (last_words(&error.to_string(), error.tail()), permanent)
    })?;
    let conversation = Arc::clone(backend.conversation());
    let engine = Engine { ready, conversation, pid: backend.pid(), load: backend.load() };
    Ok((backend, engine, scratch))
}

/// Waits for the engine's end (its status), or for the order to end it (None).
async fn watch(policy: &str, backend: &Backend, reports: &Reports, stop: &mut oneshot::Receiver<()>) -> Option<String> {
    let mut peak = Memory::default();
    for look in 0_u32.. {
        if look % LOOKS == 0 {
            let now = Memory {
                ram_bytes: backend.peak_memory_bytes().unwrap_or(0),
                gpu_bytes: backend.gpu_memory_bytes().unwrap_or(0),
            };
            let most =
                Memory { ram_bytes: peak.ram_bytes.max(now.ram_bytes), gpu_bytes: peak.gpu_bytes.max(now.gpu_bytes) };
            if most != peak {
                peak = most;
                tell(reports, Report::Measured(policy.to_owned(), peak));
            }
        }
        match backend.ended() {
            Ok(None) => {}
            Ok(Some(status)) => return Some(format!("the engine ended ({status})")),
            Err(error) => return Some(error.to_string()),
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH) => {}
            _ = &mut *stop => return None,
        }
    }
    None
}

/// An error with the last lines that the engine wrote.
fn last_words(error: &str, tail: &[String]) -> String {
    let last = &tail[tail.len().saturating_sub(LAST_WORDS)..];
    if last.is_empty() { error.to_owned() } else { format!("{error}; its last output: {}", last.join(" | ")) }
}

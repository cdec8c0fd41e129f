//! `run`: starts the engine of a policy, sends one request, and ends the engine.
//!
//! The conversation is the asynchronous one that every other use of an engine has. A runtime for it exists only while the
//! engine does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use crate::base::cancel::{Cancel, Cancelled};
use crate::base::fs::{self, FsError};
use crate::base::process::GRACE;
use crate::engine::answer::{Answer, Generated, ms};
use crate::engine::backend::{Backend, BackendError, Supervision};
use crate::engine::conversation::{self, Event, Events, Piece, Request};
use crate::engine::metrics::{Measured, Metrics, Record};
use crate::engine::{EngineError, Ready};
use crate::report::{Task, Unit, Verb};

/// After this many bytes the record begins anew; the part before is kept beside it as `generations.jsonl.old`.
const RECORD_LIMIT_BYTES: u64 = 16 << 20;
/// How often to look whether the user wants to stop.
const POLL: Duration = Duration::from_millis(10);

/// Receives the pieces of an answer as they arrive; returns false to stop.
pub type Sink<'a> = dyn FnMut(&Piece) -> bool + 'a;

/// The prompt, and where the engine's files go.
#[derive(Debug)]
pub struct Ask<'a> {
    /// The prompt.
    pub prompt: &'a str,
    /// Ties the engine's life to this process: see [`Supervision::driver`].
    pub driver: Option<&'a Path>,
    /// The whole environment of the engine: [`crate::engine::backend::passed_on`].
    pub env: &'a BTreeMap<OsString, OsString>,
    /// A folder in which this run makes one of its own.
    pub scratch: &'a Path,
    /// The engine's output.
    pub log: &'a Path,
    /// One line for each run: `.aitools/generations.jsonl` of the project.
    pub record: &'a Path,
    /// Record the prompt and the answer, too.
    pub keep_text: bool,
    /// RFC 3339, UTC.
    pub time: &'a str,
}

/// An answer and its measurements.
#[derive(Debug)]
pub struct Ran {
    /// The answer.
    pub answer: Generated,
    /// Its measurements.
    pub metrics: Metrics,
    /// The policy's seed, or the one that was drawn.
    pub seed: u32,
}

/// Why there is no whole answer.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum RunError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// The engine was ready and did not answer to the end. `status`: how the program ended, when it did; `tail`: the
    /// last lines it wrote.
    #[error("{error}{}", died(.status.as_ref()))]
    Engine { error: EngineError, status: Option<ExitStatus>, tail: Vec<String> },
    #[error("the run took longer than {limit_s} s")]
    Timeout { limit_s: u64, tail: Vec<String> },
    #[error("could not get random numbers from the system: {0}")]
    Random(getrandom::Error),
    #[error("could not wait for the engine: {0}")]
    Runtime(io::Error),
}

fn died(status: Option<&ExitStatus>) -> String {
    status.map(|status| format!(" (the program ended: {status})")).unwrap_or_default()
}

impl RunError {
    /// The last lines of the engine's output, when they may say why.
    pub fn tail(&self) -> &[String] {
        match self {
            Self::Backend(error) => error.tail(),
            Self::Engine { tail, .. } | Self::Timeout { tail, .. } => tail,
            Self::Fs(_) | Self::Cancelled(_) | Self::Random(_) | Self::Runtime(_) => &[],
        }
    }
}

/// Runs one request. The answer goes to `sink` piece by piece. One that the user stopped is not an error: it ends with
/// [`crate::engine::conversation::Finish::Cancelled`]. A line about the run is added to the record in any case.
///
/// # Errors
/// [`RunError`]; the engine has ended then. Pieces handed over before remain valid.
pub fn run(ready: &Ready, ask: &Ask<'_>, task: &Task, sink: &mut Sink<'_>) -> Result<Ran, RunError> {
    let seed = conversation::seed(&ready.policy).map_err(RunError::Random)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Runtime)?;
    let result = runtime.block_on(attempt(ready, ask, seed, task, sink));
    if let Err(error) = write_record(ready, ask, seed, result.as_ref()) {
        task.warn(format!("the run is not recorded: {error}"));
    }
    result.map(|(answer, metrics)| Ran { answer, metrics, seed })
}

/// Starts the engine of a policy, unless the user stops that, and tells when it is ready.
pub(super) async fn start(ready: &Ready, supervision: &Supervision<'_>, task: &Task) -> Result<Backend, RunError> {
    let progress = task.start(Verb::Start, ready.engine.id(), None, Unit::None);
    let started = tokio::select! {
        started = Backend::start(ready, supervision) => started,
        () = cancelled(task.cancel(), POLL) => return Err(Cancelled.into()),
    };
    let backend = match started {
        Err(BackendError::NotReady { tail, .. }) => {
            return Err(RunError::Timeout { limit_s: ready.policy.runtime.time_limit().as_secs(), tail });
        }
        other => other?,
    };
    progress.finish(format!("{:.1} s", backend.load().as_secs_f64()));
    Ok(backend)
}

async fn attempt(
    ready: &Ready,
    ask: &Ask<'_>,
    seed: u32,
    task: &Task,
    sink: &mut Sink<'_>,
) -> Result<(Generated, Metrics), RunError> {
    let began = Instant::now();
    let limit = ready.policy.runtime.time_limit();
    let deadline = began + limit;
    let scratch = fs::temporary_dir(ask.scratch)?;
    let supervision = Supervision { driver: ask.driver, env: ask.env, scratch: scratch.path(), log: ask.log, deadline };
    let backend = start(ready, &supervision, task).await?;
    let request = Request::new(&ready.policy, ask.prompt, seed, deadline);
    let answer = match listen(backend.generate(request), task.cancel(), sink).await {
        Ok(answer) => answer,
        Err(EngineError::Timeout) => return Err(RunError::Timeout { limit_s: limit.as_secs(), tail: backend.tail() }),
        Err(error) => {
            let status = if matches!(error, EngineError::Unanswered(_)) { backend.ending().await } else { None };
            let tail = if status.is_some() { backend.final_lines().await } else { backend.tail() };
            return Err(RunError::Engine { error, status, tail });
        }
    };
    let measured = Measured {
        load_ms: ms(backend.load()),
        total_ms: ms(began.elapsed()),
        peak_memory_bytes: backend.peak_memory_bytes(),
        gpu_memory_bytes: backend.gpu_memory_bytes(),
    };
    backend.stop(GRACE).await;
    let metrics = Metrics::new(&answer, measured);
    Ok((answer, metrics))
}

/// One answer, to its end or until the user or the sink stops it.
pub(super) async fn listen(mut events: Events, cancel: &Cancel, sink: &mut Sink<'_>) -> Result<Generated, EngineError> {
    let mut answer = Answer::new();
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = cancelled(cancel, POLL) => None,
        };
        // What is already in the socket when the user stops is not shown.
        if cancel.is_cancelled() {
            answer.cancel();
            return answer.into_generated();
        }
        let Some(event) = event else { return answer.into_generated() };
        let event = event?;
        answer.push(&event)?;
        if let Event::Delta(delta) = &event
            && !sink(&delta.piece)
        {
            answer.cancel();
            return answer.into_generated();
        }
    }
}

/// Resolves when the user has asked to stop, which is looked at this often.
pub(super) async fn cancelled(cancel: &Cancel, poll: Duration) {
    while !cancel.is_cancelled() {
        tokio::time::sleep(poll).await;
    }
}

fn write_record(
    ready: &Ready,
    ask: &Ask<'_>,
    seed: u32,
    result: Result<&(Generated, Metrics), &RunError>,
) -> Result<(), FsError> {
    let error = result.err().map(ToString::to_string);
    let done = result.ok();
    let record = Record {
        time: ask.time,
        policy: ready.name.as_str(),
        policy_sha256: ready.policy_sha256,
        engine: ready.policy.engine.as_str(),
        variant: ready.variant.as_str(),
        fingerprint: ready.fingerprint,
        weights_sha256: ready.weights_sha256,
        seed,
        finish: done.map(|(answer, _)| answer.finish),
        error: error.as_deref(),
        metrics: done.map(|(_, metrics)| metrics),
        prompt: Some(ask.prompt).filter(|_| ask.keep_text),
        text: done.map(|(answer, _)| answer.text.as_str()).filter(|_| ask.keep_text),
    };
    fs::create_dir_all(fs::parent(ask.record))?;
    if fs::metadata(ask.record).is_ok_and(|meta| meta.len() >= RECORD_LIMIT_BYTES) {
        fs::rename(ask.record, &ask.record.with_extension("jsonl.old"))?;
    }
    fs::append(ask.record, record.line().as_bytes())
}

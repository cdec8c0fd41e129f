//! One answer: the engine of a policy is started, asked once, and ended.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use crate::base::fs::{self, FsError};
use crate::base::process::GRACE;
use crate::engine::answer::{Sink, ms};
use crate::engine::backend::{Backend, BackendError, Driver, Supervision};
use crate::engine::metrics::{Measured, Metrics, Record};
use crate::engine::{EngineError, GenerateRequest, Generated, Piece, Ready};
use crate::report::{Task, Unit};

/// Seconds for a whole run when the policy has no `runtime.timeout`.
const TIMEOUT_S: u32 = 600;

/// What is asked, and where things go.
#[derive(Debug)]
pub struct Ask<'a> {
    pub prompt: &'a str,
    pub driver: Option<&'a Driver>,
    /// The whole environment of the engine: [`crate::engine::backend::passed_on`].
    pub env: &'a BTreeMap<OsString, OsString>,
    /// A folder in which this run makes one of its own.
    pub scratch: &'a Path,
    /// The engine's output.
    pub log: &'a Path,
    /// One line for each run: `.aitools/generations.jsonl` of the project.
    pub record: &'a Path,
    /// Keep prompt and answer in the record, too.
    pub keep_text: bool,
    /// RFC 3339, UTC.
    pub time: &'a str,
}

/// An answer and how it went.
#[derive(Debug)]
pub struct Ran {
    pub answer: Generated,
    pub metrics: Metrics,
    /// The policy's seed, or the one that was drawn.
    pub seed: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The engine was ready and did not answer to the end. `status`: how the program ended, when it did; `tail`: the
    /// last lines it wrote.
    #[error("{error}{}", died(.status.as_ref()))]
    Engine { error: EngineError, status: Option<ExitStatus>, tail: Vec<String> },
    #[error("the run took longer than {limit_s} s")]
    Timeout { limit_s: u32, tail: Vec<String> },
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
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
            Self::Fs(_) | Self::Random(_) => &[],
        }
    }
}

/// Starts, asks, ends. The answer goes to `sink` piece by piece; one that was cut off by the user is no error, its end is
/// [`crate::engine::Finish::Cancelled`]. However it goes, a line about it is added to the record.
///
/// # Errors
/// [`RunError`]; the engine is gone then, too. Pieces handed over before remain true.
pub fn run(ready: &Ready, ask: &Ask<'_>, task: &Task, sink: &mut Sink<'_>) -> Result<Ran, RunError> {
    let seed = match ready.policy.generation.seed {
        Some(seed) => seed,
        None => drawn_seed()?,
    };
    let result = attempt(ready, ask, seed, task, sink);
    if let Err(error) = write_record(ready, ask, seed, result.as_ref()) {
        task.warn(format!("the run is not recorded: {error}"));
    }
    result.map(|(answer, metrics)| Ran { answer, metrics, seed })
}

/// 31 bits: the largest numbers mean "draw one" to some engines.
fn drawn_seed() -> Result<u32, RunError> {
    getrandom::u32().map(|seed| seed >> 1).map_err(RunError::Random)
}

fn attempt(
    ready: &Ready,
    ask: &Ask<'_>,
    seed: u32,
    task: &Task,
    sink: &mut Sink<'_>,
) -> Result<(Generated, Metrics), RunError> {
    let began = Instant::now();
    let limit_s = ready.policy.runtime.timeout.unwrap_or(TIMEOUT_S);
    let deadline = began + Duration::from_secs(limit_s.into());
    let scratch = fs::temporary_dir(ask.scratch)?;
    let supervision = Supervision {
        driver: ask.driver,
        env: ask.env,
        scratch: scratch.path(),
        log: ask.log,
        cancel: task.cancel(),
        deadline,
    };
    let progress = task.start("starting", ready.engine.id(), None, Unit::None);
    let mut backend = match Backend::start(ready, &supervision) {
        Err(BackendError::NotReady { tail, .. }) => return Err(RunError::Timeout { limit_s, tail }),
        other => other?,
    };
    progress.finish(format!("ready in {:.1} s", backend.load().as_secs_f64()));
    let request = GenerateRequest {
        policy: &ready.policy,
        header: &ready.header,
        prompt: ask.prompt,
        seed,
        deadline,
        cancel: task.cancel(),
    };
    // What is already in the socket when the user stops is not shown any more.
    let mut until_cancelled = |piece: Piece<'_>| sink(piece) && !task.cancel().is_cancelled();
    let answer = ready.engine.generate(backend.endpoint(), &request, &mut until_cancelled);
    let total_ms = ms(began.elapsed());
    let answer = match answer {
        Ok(answer) => answer,
        Err(EngineError::Timeout) => return Err(RunError::Timeout { limit_s, tail: backend.tail() }),
        Err(error) => {
            let status = matches!(error, EngineError::Unanswered(_)).then(|| backend.ending()).flatten();
            let tail = if status.is_some() { backend.final_lines() } else { backend.tail() };
            return Err(RunError::Engine { error, status, tail });
        }
    };
    let measured = Measured {
        load_ms: ms(backend.load()),
        total_ms,
        peak_memory_bytes: backend.peak_memory_bytes(),
        gpu_memory_bytes: backend.gpu_memory_bytes(),
    };
    backend.stop(GRACE);
    let metrics = Metrics::new(&answer, measured);
    Ok((answer, metrics))
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
    fs::append(ask.record, record.line().as_bytes())
}

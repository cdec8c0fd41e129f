//! One answer of a policy, with the folders and the record of its project.

use std::time::SystemTime;

use super::run::{self, Ask, Ran, Sink};
use super::{Failure, Host, Project};
use crate::engine::Ready;

/// Starts the engine, sends one prompt, and ends the engine: see [`run::run`].
///
/// # Errors
/// When the engine does not start, or does not answer to the end.
pub fn answer(
    host: &Host,
    project: &Project,
    ready: &Ready,
    prompt: &str,
    keep_text: bool,
    sink: &mut Sink<'_>,
) -> Result<Ran, Failure> {
    let state = project.make_state_dir()?;
    // Some machines run `sync` once and then only `run`.
    host.store.sweep()?;
    let staging = host.store.stage()?;
    let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    let ask = Ask {
        prompt,
        driver: Some(&host.driver),
        env: &host.engine_env(),
        scratch: staging.path(),
        log: &state.join(format!("{}.log", ready.name)),
        record: &state.join("generations.jsonl"),
        keep_text,
        time: &time,
    };
    run::run(ready, &ask, &host.task, sink).map_err(|error| Failure::run(&ready.name, error))
}

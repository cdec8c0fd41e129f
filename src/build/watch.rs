//! A child whose output is taken line by line until it, and everybody who writes for it, is gone.

use std::io::{self, BufRead as _, Read as _};
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::BuildError;
use super::log::MAX_LINE_BYTES;
use crate::base::fs::FsError;
use crate::base::process::{GRACE, Program};
use crate::report::Task;

/// How often cancel and the child's end are looked at while it is silent.
const POLL: Duration = Duration::from_millis(20);
/// How long the pipe may stay open after the child's end: somebody else holds it then.
const DRAIN: Duration = Duration::from_secs(2);

/// Runs a program to its end. `take` is given each line with its end, cut where it is too long.
///
/// # Errors
/// What `take` said, or when the program cannot be started, or the user asked to stop; it is gone then.
pub fn run(
    program: &Program,
    task: &Task,
    take: &mut dyn FnMut(&[u8]) -> Result<(), BuildError>,
) -> Result<ExitStatus, BuildError> {
    let broken = |why| BuildError::Fs(FsError::new("make a pipe to", &program.path, why));
    let (reader, writer) = io::pipe().map_err(broken)?;
    let twin = writer.try_clone().map_err(broken)?;
    // Elsewhere than on Linux the end of its stdin tells our own child that we are gone.
    let stdin = if cfg!(windows) { Stdio::piped() } else { Stdio::null() };
    let mut running = program.spawn(stdin, twin.into(), writer.into())?;
    let (send, lines) = sync_channel(256);
    std::thread::spawn(move || {
        let mut reader = io::BufReader::new(reader);
        loop {
            let mut line = Vec::new();
            let read = reader.by_ref().take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line);
            if !matches!(read, Ok(1..)) || send.send(line).is_err() {
                break;
            }
        }
    });
    let mut ended: Option<(ExitStatus, Instant)> = None;
    loop {
        match lines.recv_timeout(POLL) {
            Ok(line) => take(&line)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(running.wait(task.cancel(), None)?),
        }
        if task.check().is_err() {
            running.end(GRACE);
            task.check()?;
        }
        if ended.is_none()
            && let Some(status) = running.try_wait()?
        {
            running.end(Duration::ZERO);
            ended = Some((status, Instant::now() + DRAIN));
        }
        if let Some((status, _)) = ended.filter(|(_, until)| Instant::now() >= *until) {
            return Ok(status);
        }
    }
}

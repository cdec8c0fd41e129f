//! Progress as JSON lines on stderr, for `--json`: every event but the many small steps of a long one.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::report::{Event, Reporter};

/// The least time between two progress lines of one piece of work.
const PACE: Duration = Duration::from_millis(500);

/// Writes events as JSON lines to stderr.
#[derive(Debug, Default)]
pub struct Lines(Mutex<BTreeMap<u64, Instant>>);

impl Reporter for Lines {
    fn report(&self, event: &Event) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Progressed { id, .. } => {
                let now = Instant::now();
                if last.get(id).is_some_and(|before| now - *before < PACE) {
                    return;
                }
                last.insert(*id, now);
            }
            Event::Finished { id, .. } | Event::Abandoned { id } => drop(last.remove(id)),
            _ => {}
        }
        drop(last);
        if let Ok(line) = serde_json::to_string(event) {
            let _ = writeln!(io::stderr().lock(), "{line}");
        }
    }
}

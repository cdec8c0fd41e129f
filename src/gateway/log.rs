//! The request log: one JSON object a line, written by a thread of its own, of bounded size. Prompts and answers are not in it.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Serialize;

use crate::base::fs;

/// Bytes of the log before it becomes `requests.jsonl.1`, in place of the one before.
const LIMIT_BYTES: u64 = 32 << 20;
/// Lines that may wait for the disk; more are dropped rather than kept in memory.
const WAITING: usize = 10_000;
/// How long a line may wait for others, so that a busy server does not open the file for each.
const GATHER: Duration = Duration::from_millis(20);

/// Takes lines. Dropping it writes what is left.
#[derive(Debug)]
pub struct Log {
    lines: Option<SyncSender<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Log {
    /// A log in that file.
    pub fn start(file: &Path) -> Self {
        let (lines, inbox) = sync_channel(WAITING);
        let file = file.to_owned();
        let thread = std::thread::Builder::new().name("request-log".to_owned());
        let thread = thread.spawn(move || keep(&file, &inbox)).ok();
        Self { lines: Some(lines), thread }
    }

    /// Adds a line.
    pub fn write(&self, line: &impl Serialize) {
        if let (Some(lines), Ok(text)) = (&self.lines, serde_json::to_string(line)) {
            let _ = lines.try_send(text);
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        drop(self.lines.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn keep(file: &Path, inbox: &Receiver<String>) {
    while let Ok(first) = inbox.recv() {
        let mut text = first;
        text.push('\n');
        std::thread::sleep(GATHER);
        for line in inbox.try_iter().take(WAITING) {
            text.push_str(&line);
            text.push('\n');
        }
        if fs::metadata(file).is_ok_and(|metadata| metadata.len() > LIMIT_BYTES) {
            let mut old = file.as_os_str().to_owned();
            old.push(".1");
            let _ = fs::rename(file, &PathBuf::from(old));
        }
        // A full disk costs lines of the log, and no answers.
        let _ = fs::append(file, text.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_there_once_the_log_is_dropped() {
        let folder = fs::temporary_dir(&std::env::temp_dir()).unwrap();
        let file = folder.path().join("r.jsonl");
        let log = Log::start(&file);
        for number in 0..50 {
            log.write(&serde_json::json!({ "number": number }));
        }
        drop(log);
        let text = String::from_utf8(fs::read_bounded(&file, 1 << 20).unwrap()).unwrap();
        assert_eq!(text.lines().count(), 50);
        assert_eq!(text.lines().last(), Some("{\"number\":49}"));
    }
}

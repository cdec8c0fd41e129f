//! What an engine writes: kept in a file of bounded size, and its last lines in memory for messages.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::{DRAIN, POLL};
use crate::base::fs::{self, FsError};
use crate::base::process::Running;

/// After this many bytes the log begins anew; the part before is kept beside it as `<log>.old`.
const LOG_LIMIT_BYTES: u64 = 16 << 20;
/// Lines kept in memory.
const TAIL_LINES: usize = 200;
const LINE_LIMIT_BYTES: usize = 4096;

/// What an engine writes: its log, and the threads that read its pipes.
#[derive(Debug)]
pub(super) struct Output {
    log: Arc<Mutex<Log>>,
    readers: Vec<JoinHandle<()>>,
}

impl Output {
    /// Writes what comes through the pipes of a program to a log.
    pub(super) fn keep(running: &mut Running, log: Log) -> Self {
        let log = Arc::new(Mutex::new(log));
        let mut readers = Vec::new();
        readers.extend(running.stdout().map(|pipe| keep(pipe, &log)));
        readers.extend(running.stderr().map(|pipe| keep(pipe, &log)));
        Self { log, readers }
    }

    /// The last lines, the unfinished one included.
    pub(super) fn tail(&self) -> Vec<String> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let last = String::from_utf8_lossy(&log.line).trim_end().to_owned();
        log.tail.iter().cloned().chain(Some(last).filter(|line| !line.is_empty())).collect()
    }

    /// Waits until the pipes are empty, but no longer than a stray grandchild may keep them open.
    pub(super) async fn drain(&self) {
        let deadline = Instant::now() + DRAIN;
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
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
pub(super) struct Log {
    path: PathBuf,
    /// None once writing failed: an engine is not ended because the disk is full.
    file: Option<File>,
    size_bytes: u64,
    tail: VecDeque<String>,
    /// The line that is not yet whole.
    line: Vec<u8>,
}

impl Log {
    /// Makes the file, and empties one that is there.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) fn open(path: &Path) -> Result<Self, FsError> {
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

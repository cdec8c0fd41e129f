//! What long work tells while it goes on. Data only: `cli/terminal.rs` draws it, `cli/jsonl.rs` writes it as lines.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::base::cancel::{Cancel, Cancelled};

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    Bytes,
    Files,
    /// Edges of a build graph: ninja's `[n/m]`.
    Steps,
    None,
}

/// Something happened. `id` joins the events of one piece of work; ids are unique within a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A piece of work began: `verb` is a present participle (`fetching`), `subject` a name or path.
    Started {
        id: u64,
        verb: &'static str,
        subject: String,
        total: Option<u64>,
        unit: Unit,
    },
    /// `done` of `total` so far.
    Progressed {
        id: u64,
        done: u64,
        total: Option<u64>,
        detail: Option<String>,
    },
    /// It ended well. `detail` is what a person wants to know: `98 MB in 1.2 s`, `built`.
    Finished {
        id: u64,
        detail: String,
    },
    /// It ended otherwise; the error itself comes once, at the end of the command.
    Abandoned {
        id: u64,
    },
    /// Waiting for somebody else.
    Waiting {
        what: String,
    },
    Note {
        text: String,
    },
    Warning {
        text: String,
    },
}

/// Takes events from any thread. Must be quick.
pub trait Reporter: Send + Sync {
    fn report(&self, event: &Event);
}

/// Tells nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn report(&self, _: &Event) {}
}

/// What every long operation is given: whom to tell, and whether to stop. Cloning shares both.
#[derive(Clone)]
pub struct Task {
    reporter: Arc<dyn Reporter>,
    cancel: Cancel,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl Task {
    pub fn new(reporter: Arc<dyn Reporter>, cancel: Cancel) -> Self {
        Self { reporter, cancel }
    }

    /// For tests and for work that nobody watches.
    pub fn silent() -> Self {
        Self::new(Arc::new(Silent), Cancel::default())
    }

    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// # Errors
    /// [`Cancelled`] once the user asked to stop.
    pub fn check(&self) -> Result<(), Cancelled> {
        self.cancel.check()
    }

    pub fn start(&self, verb: &'static str, subject: impl Into<String>, total: Option<u64>, unit: Unit) -> Progress {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        self.reporter.report(&Event::Started { id, verb, subject: subject.into(), total, unit });
        let total = AtomicU64::new(total.unwrap_or(u64::MAX));
        Progress { task: self.clone(), id, done: AtomicU64::new(0), total, over: false }
    }

    pub fn note(&self, text: impl Into<String>) {
        self.reporter.report(&Event::Note { text: text.into() });
    }

    pub fn warn(&self, text: impl Into<String>) {
        self.reporter.report(&Event::Warning { text: text.into() });
    }

    pub fn waiting(&self, what: impl Into<String>) {
        self.reporter.report(&Event::Waiting { what: what.into() });
    }
}

/// One piece of work under way. Dropped without [`Progress::finish`] it counts as abandoned.
#[derive(Debug)]
pub struct Progress {
    task: Task,
    id: u64,
    done: AtomicU64,
    total: AtomicU64,
    over: bool,
}

impl Progress {
    fn known_total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|total| *total != u64::MAX)
    }

    /// `more` units were done.
    pub fn add(&self, more: u64) {
        let done = self.done.fetch_add(more, Ordering::Relaxed) + more;
        self.tell(done, None);
    }

    /// `done` units are done in all (a resumed or restarted transfer may go back).
    pub fn set(&self, done: u64, total: Option<u64>, detail: Option<String>) {
        self.done.store(done, Ordering::Relaxed);
        if let Some(total) = total {
            self.total.store(total, Ordering::Relaxed);
        }
        self.tell(done, detail);
    }

    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn tell(&self, done: u64, detail: Option<String>) {
        self.task.reporter.report(&Event::Progressed { id: self.id, done, total: self.known_total(), detail });
    }

    pub fn finish(mut self, detail: impl Into<String>) {
        self.over = true;
        self.task.reporter.report(&Event::Finished { id: self.id, detail: detail.into() });
    }

    /// # Errors
    /// [`Cancelled`] once the user asked to stop.
    pub fn check(&self) -> Result<(), Cancelled> {
        self.task.check()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.over {
            self.task.reporter.report(&Event::Abandoned { id: self.id });
        }
    }
}

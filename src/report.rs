//! What long work tells while it goes on. Data only: `cli/terminal.rs` draws it, `cli/jsonl.rs` writes it as lines.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

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
    whole: Option<Arc<Whole>>,
}

/// A piece of work of several pieces, told as the bytes of those.
#[derive(Debug)]
struct Whole {
    /// Until it ends.
    progress: Option<Progress>,
    done: AtomicI64,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl Task {
    pub fn new(reporter: Arc<dyn Reporter>, cancel: Cancel) -> Self {
        Self { reporter, cancel, whole: None }
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
        let whole = self.whole.clone().filter(|_| unit == Unit::Bytes);
        let task = Self { whole: None, ..self.clone() };
        Progress { task, id, done: AtomicU64::new(0), total, over: false, whole }
    }

    /// A task whose pieces of work, those in bytes, together make up a `total` that is told beside them, until the last
    /// clone of the task is gone.
    #[must_use]
    pub fn summed(&self, verb: &'static str, subject: impl Into<String>, total: u64) -> Self {
        let progress = Self { whole: None, ..self.clone() }.start(verb, subject, Some(total), Unit::Bytes);
        Self { whole: Some(Arc::new(Whole { progress: Some(progress), done: AtomicI64::new(0) })), ..self.clone() }
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
    whole: Option<Arc<Whole>>,
}

impl Whole {
    /// Never more than there is: an archive may be larger than what is wanted of it.
    fn add(&self, change: i64) {
        let Some(progress) = &self.progress else { return };
        let done = self.done.fetch_add(change, Ordering::Relaxed) + change;
        progress.set(u64::try_from(done).unwrap_or(0).min(progress.known_total().unwrap_or(0)), None, None);
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let whole = |progress: &Progress| progress.known_total() == Some(progress.done());
        if let Some(progress) = self.progress.take_if(|progress| whole(progress)) {
            progress.finish("");
        }
    }
}

impl Progress {
    fn known_total(&self) -> Option<u64> {
        Some(self.total.load(Ordering::Relaxed)).filter(|total| *total != u64::MAX)
    }

    /// `more` units were done.
    pub fn add(&self, more: u64) {
        let done = self.done.fetch_add(more, Ordering::Relaxed) + more;
        self.tell(done, None);
        self.add_to_whole(more, 0);
    }

    /// `done` units are done in all (a resumed or restarted transfer may go back).
    pub fn set(&self, done: u64, total: Option<u64>, detail: Option<String>) {
        let before = self.done.swap(done, Ordering::Relaxed);
        if let Some(total) = total {
            self.total.store(total, Ordering::Relaxed);
        }
        self.tell(done, detail);
        self.add_to_whole(done, before);
    }

    fn add_to_whole(&self, more: u64, less: u64) {
        if let Some(whole) = &self.whole {
            whole.add(more.cast_signed().saturating_sub(less.cast_signed()));
        }
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
            self.add_to_whole(0, self.done());
            self.task.reporter.report(&Event::Abandoned { id: self.id });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Kept(Mutex<Vec<Event>>);

    impl Reporter for Kept {
        fn report(&self, event: &Event) {
            self.0.lock().unwrap().push(event.clone());
        }
    }

    #[test]
    fn pieces_of_work_in_bytes_sum_up() {
        let kept = Arc::<Kept>::default();
        let task = Task::new(Arc::clone(&kept) as Arc<dyn Reporter>, Cancel::default());
        let sum = || {
            let told = kept.0.lock().unwrap();
            let whole = |event: &&Event| matches!(event, Event::Progressed { total: Some(100), .. });
            match told.iter().rfind(whole) {
                Some(Event::Progressed { done, .. }) => *done,
                _ => 0,
            }
        };
        let weights = task.summed("fetching", "2 files", 100);
        let first = weights.start("fetching", "a", Some(60), Unit::Bytes);
        first.set(50, None, None);
        drop(first);
        assert_eq!(sum(), 0, "what was given up does not count");
        let again = weights.start("fetching", "a", Some(60), Unit::Bytes);
        again.set(60, None, None);
        again.finish("");
        weights.start("unpacking", "a", None, Unit::Files).add(7);
        task.start("fetching", "something else", None, Unit::Bytes).add(7);
        assert_eq!(sum(), 60);
        let second = weights.start("fetching", "b", None, Unit::Bytes);
        second.add(45);
        second.finish("");
        assert_eq!(sum(), 100, "never more than all");
        let before = kept.0.lock().unwrap().len();
        drop(weights);
        assert!(matches!(kept.0.lock().unwrap()[before..], [Event::Finished { .. }]));
    }
}

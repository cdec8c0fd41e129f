//! Progress of long work, as events. Data only: `cli/terminal.rs` draws them, `cli/jsonl.rs` writes them as lines.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use serde::Serialize;

use crate::base::cancel::{Cancel, Cancelled};

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Files.
    Files,
    /// Edges of a build graph: ninja's `[n/m]`.
    Steps,
    /// Nothing.
    None,
}

/// What a piece of work does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Compile an engine.
    Build,
    /// Compare a file that is already there with its digest.
    Check,
    /// Prepare the build of an engine.
    Configure,
    /// Make a model from another one.
    Derive,
    /// Download.
    Fetch,
    /// Write a bundle.
    Export,
    /// Compute digests.
    Hash,
    /// Read a bundle.
    Import,
    /// Resolve an entry of the lockfile.
    Lock,
    /// Delete files of the cache.
    Remove,
    /// Start an engine.
    Start,
    /// Extract an archive.
    Unpack,
    /// Compare with the lockfile or a receipt.
    Verify,
}

impl Verb {
    /// The present participle, for work in progress: `fetching`.
    pub fn present(self) -> &'static str {
        self.forms().0
    }

    /// The past participle, for finished work: `fetched`.
    pub fn past(self) -> &'static str {
        self.forms().1
    }

    fn forms(self) -> (&'static str, &'static str) {
        match self {
            Self::Build => ("building", "built"),
            Self::Check => ("checking", "checked"),
            Self::Configure => ("configuring", "configured"),
            Self::Derive => ("deriving", "derived"),
            Self::Fetch => ("fetching", "fetched"),
            Self::Export => ("exporting", "exported"),
            Self::Import => ("importing", "imported"),
            Self::Hash => ("hashing", "hashed"),
            Self::Lock => ("locking", "locked"),
            Self::Remove => ("removing", "removed"),
            Self::Start => ("starting", "started"),
            Self::Unpack => ("unpacking", "unpacked"),
            Self::Verify => ("verifying", "verified"),
        }
    }
}

/// As its present participle.
impl Serialize for Verb {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.present())
    }
}

/// One event. `id` is the same for all events of one piece of work, and unique within a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the fields are described with their variant")]
pub enum Event {
    /// A piece of work began; `subject` is a name or path.
    Started { id: u64, verb: Verb, subject: String, total: Option<u64>, unit: Unit },
    /// `done` of `total` so far.
    Progressed { id: u64, done: u64, total: Option<u64>, detail: Option<String> },
    /// It succeeded. `detail` is what a person wants to know, for example `98.4 MB, 1.2 s`; it may be empty.
    Finished { id: u64, detail: String },
    /// It failed or was cancelled; the error itself is reported once, at the end of the command.
    Abandoned { id: u64 },
    /// Waiting for another process or a server.
    Waiting { what: String },
    /// Something that a user may want to know.
    Note { text: String },
    /// Something that may be wrong; shown even with `--quiet`.
    Warning { text: String },
}

/// Receives events from any thread. Must return quickly.
pub trait Reporter: Send + Sync {
    /// Receives one event.
    fn report(&self, event: &Event);
}

/// Discards every event.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn report(&self, _: &Event) {}
}

/// What every long operation is given: a reporter and a cancellation flag. Cloning shares both.
#[derive(Clone)]
pub struct Task {
    reporter: Arc<dyn Reporter>,
    cancel: Cancel,
    whole: Option<Arc<Whole>>,
}

/// A piece of work that consists of several others; its progress is the sum of their bytes.
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
    /// A task that reports to `reporter` and stops on `cancel`.
    pub fn new(reporter: Arc<dyn Reporter>, cancel: Cancel) -> Self {
        Self { reporter, cancel, whole: None }
    }

    /// A task that reports nothing, for tests and for work without output.
    pub fn silent() -> Self {
        Self::new(Arc::new(Silent), Cancel::default())
    }

    /// The cancellation flag.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// # Errors
    /// [`Cancelled`] once the user asked to stop.
    pub fn check(&self) -> Result<(), Cancelled> {
        self.cancel.check()
    }

    /// Reports the start of a piece of work of `total` units, when their number is known.
    pub fn start(&self, verb: Verb, subject: impl Into<String>, total: Option<u64>, unit: Unit) -> Progress {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        self.reporter.report(&Event::Started { id, verb, subject: subject.into(), total, unit });
        let total = AtomicU64::new(total.unwrap_or(u64::MAX));
        let whole = self.whole.clone().filter(|_| unit == Unit::Bytes);
        let task = Self { whole: None, ..self.clone() };
        Progress { task, id, done: AtomicU64::new(0), total, over: false, whole }
    }

    /// A task whose pieces of work in bytes are also reported as one sum of `total` bytes, until the last
    /// clone of the task is gone.
    #[must_use]
    pub fn summed(&self, verb: Verb, subject: impl Into<String>, total: u64) -> Self {
        let progress = Self { whole: None, ..self.clone() }.start(verb, subject, Some(total), Unit::Bytes);
        Self { whole: Some(Arc::new(Whole { progress: Some(progress), done: AtomicI64::new(0) })), ..self.clone() }
    }

    /// Reports something that a user may want to know.
    pub fn note(&self, text: impl Into<String>) {
        self.reporter.report(&Event::Note { text: text.into() });
    }

    /// Reports something that may be wrong.
    pub fn warn(&self, text: impl Into<String>) {
        self.reporter.report(&Event::Warning { text: text.into() });
    }

    /// Reports what this process waits for.
    pub fn waiting(&self, what: impl Into<String>) {
        self.reporter.report(&Event::Waiting { what: what.into() });
    }
}

/// One piece of work in progress. Dropping it without [`Progress::finish`] reports it as abandoned.
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
    /// Never more than the total: an archive may be larger than the part of it that is needed.
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

    /// Units done so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn tell(&self, done: u64, detail: Option<String>) {
        self.task.reporter.report(&Event::Progressed { id: self.id, done, total: self.known_total(), detail });
    }

    /// Reports the end. `detail` as in [`Event::Finished`].
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
        let weights = task.summed(Verb::Fetch, "2 files", 100);
        let first = weights.start(Verb::Fetch, "a", Some(60), Unit::Bytes);
        first.set(50, None, None);
        drop(first);
        assert_eq!(sum(), 0, "what was given up does not count");
        let again = weights.start(Verb::Fetch, "a", Some(60), Unit::Bytes);
        again.set(60, None, None);
        again.finish("");
        weights.start(Verb::Unpack, "a", None, Unit::Files).add(7);
        task.start(Verb::Fetch, "something else", None, Unit::Bytes).add(7);
        assert_eq!(sum(), 60);
        let second = weights.start(Verb::Fetch, "b", None, Unit::Bytes);
        second.add(45);
        second.finish("");
        assert_eq!(sum(), 100, "never more than all");
        let before = kept.0.lock().unwrap().len();
        drop(weights);
        assert!(matches!(kept.0.lock().unwrap()[before..], [Event::Finished { .. }]));
    }
}

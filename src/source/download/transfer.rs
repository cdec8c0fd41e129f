//! One try to bring a file from one address: workers that fetch and write, a thread that hashes behind them, one that has
//! the disk keep up, and the caller's thread, which watches, journals and tells.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::base::cancel::Cancelled;
use crate::base::fs::FsError;
use crate::base::hashed::{Follower, Hashed};
use crate::report::{Progress, Unit, Verb};

use super::SourceError;
use super::part::Ranges;
use super::server::Wrong;
use super::state::{End, State, TELL_EVERY, Transfer};
use super::worker::RANGE_BYTES;

/// Bytes that came are on the disk when they are this many, or this late.
const FLUSH_BYTES: u64 = 8 << 20;
const FLUSH_EVERY: Duration = Duration::from_secs(2);

/// How a try ended.
pub enum Outcome {
    Came(Hashed),
    Wrong(Wrong),
}

/// How to go about a try; the later ones when earlier ones brought something wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Means {
    /// In parallel ranges, going on from what is there.
    Ranges,
    /// In one answer without a range; what is there from the beginning on is kept.
    OnePiece,
    /// From the start, over one connection.
    Afresh,
}

impl Transfer<'_> {
    /// One try.
    pub fn run(&self, means: Means) -> Result<Outcome, SourceError> {
        self.prepare(means)?;
        let progress = self.task.start(Verb::Fetch, self.ask.what, self.ask.size_bytes, Unit::Bytes);
        let began = Instant::now();
        let (end, hashed, flushed) = std::thread::scope(|scope| {
            let hasher = scope.spawn(|| self.hash());
            let flusher = scope.spawn(|| self.flush());
            let mut end = Some(End::Plain(None));
            if means == Means::Ranges {
                end = self.phase(scope, self.streams(), &progress, |index| self.ranged(index));
            }
            if let Some(End::Plain(response)) = end {
                let mut state = self.lock();
                state.done.keep_prefix();
                state.durable.keep_prefix();
                drop(state);
                let first = Mutex::new(response);
                let first = &first;
                end = std::thread::scope(|scope| {
                    self.phase(scope, 1, &progress, |_| {
                        self.single(means != Means::OnePiece, first.lock().ok().and_then(|mut it| it.take()))
                    })
                });
            }
            let mut state = self.lock();
            state.complete = true;
            state.given_up = end.is_some();
            drop(state);
            self.grown.notify_all();
            (end, hasher.join(), flusher.join())
        });
        match end {
            None => {
                let died = |_| Err(FsError::new("hash", &self.part.path, io::ErrorKind::Other.into()));
                flushed.unwrap_or_else(died)?;
                let came = hashed.unwrap_or_else(|panic| died(panic).map(|()| None))?;
                let came = came.ok_or_else(|| self.refused("the transfer is incomplete".to_owned(), None))?;
                progress.finish(told(came.size_bytes(), began.elapsed()));
                Ok(Outcome::Came(came))
            }
            Some(End::Wrong(wrong)) => {
                self.journal().inspect(|journal| self.part.save(journal));
                Ok(Outcome::Wrong(wrong))
            }
            Some(End::Error(error)) => {
                self.journal().inspect(|journal| self.part.save(journal));
                Err(error)
            }
            Some(End::Plain(_)) => Err(self.refused("the server's responses contradict each other".to_owned(), None)),
        }
    }

    fn prepare(&self, means: Means) -> Result<(), SourceError> {
        let mut state = State { size: self.ask.size_bytes, ..State::default() };
        let left = (means != Means::Afresh).then(|| self.part.journal()).flatten();
        let left = left.filter(|left| {
            let same_size = self.ask.size_bytes.is_none_or(|size| size == left.size_bytes);
            same_size && (self.ask.sha256.is_some() || left.etag.is_some())
        });
        match left {
            Some(left) => {
                (state.size, state.etag, state.done) = (Some(left.size_bytes), left.etag, left.done);
                // Nothing of this is known to be on the disk before it was synced again.
                state.durable = Ranges::default();
            }
            None => self.part.forget()?,
        }
        let file = self.part.open()?;
        if let Some(size) = state.size {
            self.allocate(&file, size, state.done.total())?;
            state.todo = state.done.gaps(size).into_iter().rev().collect();
        } else {
            // As much as is asked for before the size is known.
            state.todo.push(0..RANGE_BYTES.1);
        }
        self.set(state);
        Ok(())
    }

    /// Runs `count` workers to their end, watching. None: everything is there.
    fn phase<'scope, 'env: 'scope>(
        &'env self,
        scope: &'scope std::thread::Scope<'scope, 'env>,
        count: usize,
        progress: &Progress,
        work: impl Fn(usize) -> Result<(), End> + Send + Copy + 'scope,
    ) -> Option<End> {
        self.lock().active = count;
        for index in 0..count {
            scope.spawn(move || {
                let leaving = Leaving(self);
                let end = work(index).err();
                let mut state = self.lock();
                if state.end.is_none() {
                    state.end = end;
                }
                drop(state);
                drop(leaving);
            });
        }
        self.watch(progress)
    }

    fn watch(&self, progress: &Progress) -> Option<End> {
        let mut state = self.lock();
        let mut whole_since: Option<Instant> = None;
        let mut journalled = 0;
        loop {
            let (done, size, detail) = (state.done.total(), state.size, state.detail.clone());
            if state.active == 0 {
                let end = state.end.take();
                drop(state);
                progress.set(done, size, None);
                return end;
            }
            if self.task.check().is_err() && state.end.is_none() {
                state.end = Some(End::Error(Cancelled.into()));
                self.turned.notify_all();
            }
            // Whoever waits for a byte would wait in vain; with `Plain` comes an answer that is still to be read.
            let in_vain = matches!(state.end, Some(End::Error(_) | End::Wrong(_)));
            // A worker whose range was taken over may wait for a byte that nobody needs.
            whole_since = whole_since.filter(|_| size == Some(done)).or((size == Some(done)).then(Instant::now));
            let in_vain = in_vain || whole_since.is_some_and(|since| since.elapsed() > 5 * TELL_EVERY);
            drop(state);
            if in_vain {
                self.http.abort();
            }
            // Whatever was told as done outlives this process, also when it is killed now.
            if done != journalled {
                self.journal().inspect(|journal| self.part.save(journal));
                journalled = done;
            }
            progress.set(done, size, detail);
            state = self.lock();
            if state.active > 0 {
                state = self.turned.wait_timeout(state, TELL_EVERY).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Hashes the prefix as it grows, until it is the file. None when that is of no interest any more.
    fn hash(&self) -> Result<Option<Hashed>, FsError> {
        let hashed = self.follow();
        // Nobody waits for it any more.
        self.lock().hashed = u64::MAX;
        self.hashed.notify_all();
        hashed
    }

    fn follow(&self) -> Result<Option<Hashed>, FsError> {
        let (mut follower, mut epoch) = (Follower::new(&self.part.path)?, 0);
        loop {
            let mut state = self.lock();
            state.hashed = follower.at();
            self.hashed.notify_all();
            while state.done.prefix() == follower.at() && state.epoch == epoch && !state.complete {
                state = self.grown.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let (prefix, now, over, given_up) = (state.done.prefix(), state.epoch, state.complete, state.given_up);
            drop(state);
            if given_up {
                return Ok(None);
            }
            if now != epoch {
                epoch = now;
                follower.restart()?;
            } else if prefix == follower.at() && over {
                return follower.finish().map(Some);
            }
            follower.advance(prefix)?;
        }
    }

    /// Has the disk keep up with what comes: at the end little is left to wait for.
    fn flush(&self) -> Result<(), FsError> {
        let file = self.part.open()?;
        let (mut flushed, mut epoch, mut last) = (0, 0, Instant::now());
        loop {
            let mut state = self.lock();
            let due = |state: &State, since: Duration| {
                let more = state.done.total().abs_diff(flushed);
                state.complete || state.epoch != epoch || more >= FLUSH_BYTES || (more > 0 && since >= FLUSH_EVERY)
            };
            while !due(&state, last.elapsed()) {
                state = self.grown.wait_timeout(state, FLUSH_EVERY / 4).unwrap_or_else(PoisonError::into_inner).0;
            }
            let (over, given_up) = (state.complete, state.given_up);
            (flushed, epoch, last) = (state.done.total(), state.epoch, Instant::now());
            let written = state.done.clone();
            drop(state);
            if given_up {
                return Ok(());
            }
            file.sync_data().map_err(|error| FsError::new("write", &self.part.path, error))?;
            if over {
                return Ok(());
            }
            let mut state = self.lock();
            if state.epoch == epoch {
                state.durable = written;
            }
        }
    }
}

/// A worker that ends, also by a panic: whoever watches must not wait for it.
struct Leaving<'a>(&'a Transfer<'a>);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.lock().active -= 1;
        self.0.turned.notify_all();
    }
}

fn told(size_bytes: u64, took: Duration) -> String {
    let mb = size_bytes as f64 / 1e6;
    format!("{mb:.1} MB, {:.1} s", took.as_secs_f64())
}

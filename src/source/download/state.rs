//! What the threads of one try share: which bytes are there, which are being fetched, and why it ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::cancel::Cancelled;
use crate::base::fs::FsError;
use crate::base::http::{Backoff, Http, Response, pause, shown};
use crate::report::Task;

use super::part::{Journal, Part, Ranges};
use super::server::Wrong;
use super::{Download, MAX_STREAMS, SourceError, no_space};

pub const TELL_EVERY: Duration = Duration::from_millis(100);
/// Larger files are not believed.
const MAX_FILE_BYTES: u64 = 1 << 44;
/// A worker without work takes over the rest of a slow range: when the range has been coming for so long, and would take so
/// much longer than twice the time that the worker itself needs.
const TAKE_OVER_AFTER: Duration = Duration::from_secs(2);
/// Without a speed of its own to compare with, a worker takes over what would still take so long.
const TAKE_OVER_UNKNOWN: Duration = Duration::from_secs(20);

/// Why workers stop before everything is there.
pub enum End {
    /// The server has no usable ranges: continue with one stream, from this response if there is one.
    Plain(Option<Box<Response>>),
    Wrong(Wrong),
    Error(SourceError),
}

impl<E> From<E> for End
where
    SourceError: From<E>,
{
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// A range that a worker fetches.
#[derive(Debug)]
pub struct Held {
    /// What is missing of it. The start moves as bytes are written; another worker may take the rest and move the end.
    pub gap: Range<u64>,
    from: u64,
    since: Instant,
}

impl Held {
    fn new(gap: Range<u64>) -> Self {
        Self { from: gap.start, gap, since: Instant::now() }
    }

    /// In bytes per second.
    fn speed(&self) -> f64 {
        (self.gap.start - self.from) as f64 / self.since.elapsed().as_secs_f64().max(1e-3)
    }

    fn left(&self) -> u64 {
        self.gap.end - self.gap.start
    }
}

#[derive(Default)]
pub struct State {
    /// Expected, else learnt from the server.
    pub size: Option<u64>,
    pub etag: Option<String>,
    pub done: Ranges,
    /// What of it is on the disk.
    pub durable: Ranges,
    /// Gaps that nobody works on, the first one last.
    pub todo: Vec<Range<u64>>,
    /// The first answer to a range request came.
    pub piloted: bool,
    pub active: usize,
    /// What each worker fetches, by its number.
    pub held: BTreeMap<usize, Held>,
    /// How fast each worker's last range came, in bytes per second.
    pub speeds: BTreeMap<usize, f64>,
    pub end: Option<End>,
    /// How much of the prefix was hashed.
    pub hashed: u64,
    /// Changes when bytes that were hashed are taken back.
    pub epoch: u64,
    /// No more bytes will come: the prefix is the file.
    pub complete: bool,
    /// The hash is of no interest any more.
    pub given_up: bool,
    /// Where the address led, so that not every range asks the first server.
    pub location: Option<String>,
    pub renewals: u32,
    /// Nobody asks before.
    pub hold: Option<Instant>,
    pub detail: Option<String>,
}

pub struct Transfer<'a> {
    pub http: &'a Http,
    pub task: &'a Task,
    pub ask: &'a Download<'a>,
    pub part: &'a Part,
    pub url: &'a str,
    state: Mutex<State>,
    /// The prefix grew, or nothing more will come.
    pub grown: Condvar,
    /// The hash came nearer to the end of the prefix.
    pub hashed: Condvar,
    /// A worker ended or has another range, or the first answer came.
    pub turned: Condvar,
}

impl State {
    /// Gives a worker the next gap, at most `most` bytes of it, or the rest of a range that comes too slowly.
    pub fn take(&mut self, worker: usize, most: u64) -> bool {
        let gap = match self.todo.pop() {
            Some(gap) => {
                let end = gap.end.min(gap.start + most);
                if end < gap.end {
                    self.todo.push(end..gap.end);
                }
                Some(gap.start..end)
            }
            None => self.take_over(worker),
        };
        let took = gap.is_some();
        self.held.extend(gap.map(|gap| (worker, Held::new(gap))));
        took
    }

    /// The rest of the range that would come last, when it comes too slowly.
    fn take_over(&mut self, worker: usize) -> Option<Range<u64>> {
        let mine = self.speeds.get(&worker).copied();
        let seconds = |held: &Held, speed: f64| held.left() as f64 / speed.max(1.0);
        let slowest = self.held.iter_mut().filter(|(_, held)| held.left() > 0);
        let (other, held) =
            slowest.max_by(|one, two| seconds(one.1, one.1.speed()).total_cmp(&seconds(two.1, two.1.speed())))?;
        let grace = if mine.is_some() { TAKE_OVER_AFTER } else { TAKE_OVER_UNKNOWN };
        let alone = mine.map_or(0.0, |mine| 2.0 * seconds(held, mine));
        if held.since.elapsed() < TAKE_OVER_AFTER || seconds(held, held.speed()) < alone + grace.as_secs_f64() {
            return None;
        }
        let rest = held.gap.clone();
        held.gap.end = held.gap.start;
        let (other, speed) = (*other, held.speed());
        self.speeds.insert(other, speed);
        Some(rest)
    }

    /// A worker is done with its range.
    pub fn give_back(&mut self, worker: usize) {
        if let Some(held) = self.held.remove(&worker)
            && held.gap.start > held.from
        {
            self.speeds.insert(worker, held.speed());
        }
    }

    /// Whether somebody fetches something that may have to be taken over.
    pub fn is_fetching(&self) -> bool {
        self.held.values().any(|held| held.left() > 0)
    }
}

impl<'a> Transfer<'a> {
    pub fn new(http: &'a Http, task: &'a Task, ask: &'a Download<'a>, part: &'a Part, url: &'a str) -> Self {
        let (state, grown, hashed, turned) = (Mutex::default(), Condvar::new(), Condvar::new(), Condvar::new());
        Self { http, task, ask, part, url, state, grown, hashed, turned }
    }

    pub fn streams(&self) -> usize {
        self.ask.streams.clamp(1, MAX_STREAMS)
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, state: State) {
        *self.lock() = state;
    }

    pub fn allocate(&self, file: &File, size: u64, there: u64) -> Result<(), FsError> {
        crate::base::fs::allocate(file, &self.part.path, size).map_err(|error| {
            if error.is_no_space() { no_space(&self.part.path, size - there.min(size)) } else { error }
        })
    }

    /// What the next run could go on from.
    pub fn journal(&self) -> Option<Journal> {
        let state = self.lock();
        let size = state.size.filter(|_| self.ask.sha256.is_some() || state.etag.is_some())?;
        Some(Journal::new(size, state.etag.clone(), state.done.clone(), state.durable.clone()))
    }

    pub fn believable(&self, size: u64) -> Result<u64, End> {
        if size <= MAX_FILE_BYTES {
            return Ok(size);
        }
        Err(End::Error(self.refused(format!("it claims to be {size} bytes long"), None)))
    }

    pub fn refused(&self, why: String, hint: Option<&str>) -> SourceError {
        SourceError::Network { what: self.ask.what.to_owned(), why, hint: hint.map(str::to_owned) }
    }

    /// Stops a worker when another one ended everything, or the user did.
    pub fn proceed(&self) -> Result<(), End> {
        self.task.check()?;
        // The first reason counts; this one is thrown away.
        if self.lock().end.is_some() { Err(Cancelled.into()) } else { Ok(()) }
    }

    /// Waits before the next try, or gives up.
    pub fn wait(&self, backoff: &mut Backoff, why: String, asked: Option<Duration>) -> Result<(), End> {
        let Some(delay) = backoff.after_failure(asked) else {
            let required = asked.map(|wait| format!(", and the server asks for a wait of {} s", wait.as_secs()));
            let why = format!("{why}{}", required.unwrap_or_default());
            let hint = "the received part is kept: run the command again to continue";
            return Err(End::Error(self.refused(why, Some(hint))));
        };
        let until = Instant::now() + delay;
        let mut state = self.lock();
        state.detail = Some(format!("{why}; retrying in {:.1} s", delay.as_secs_f32()));
        if asked.is_some() {
            let first = state.hold.is_none_or(|hold| hold < Instant::now());
            state.hold = state.hold.max(Some(until));
            drop(state);
            if first {
                let what = self.ask.what;
                self.task.waiting(format!(
                    "{}: {why} for `{what}`, retrying in {} s",
                    shown(self.url),
                    delay.as_secs()
                ));
            }
            return self.hold();
        }
        drop(state);
        self.pause_until(until)
    }

    /// Waits until the server may be asked again.
    pub fn hold(&self) -> Result<(), End> {
        let until = self.lock().hold;
        until.map_or_else(|| self.proceed(), |until| self.pause_until(until))
    }

    fn pause_until(&self, until: Instant) -> Result<(), End> {
        loop {
            self.proceed()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            pause(self.task.cancel(), left.min(TELL_EVERY))?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(gap: Range<u64>, came: u64, seconds: u64) -> Held {
        let since = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        Held { from: gap.start - came, gap, since }
    }

    #[test]
    fn m3_the_rest_of_a_slow_range_is_taken_over_and_that_of_a_fast_one_is_not() {
        let take = |mine: Option<f64>, came: u64, seconds: u64| {
            let mut state = State::default();
            state.speeds.extend(mine.map(|mine| (1, mine)));
            state.held.insert(0, held(1_000_000..9_000_000, came, seconds));
            let took = state.take(1, u64::MAX);
            assert_eq!(took, state.held[&0].gap.is_empty());
            took.then(|| state.held[&1].gap.clone())
        };
        assert_eq!(take(Some(1e7), 20, 20), Some(1_000_000..9_000_000));
        assert_eq!(take(Some(1e5), 40_000, 2), Some(1_000_000..9_000_000));
        assert_eq!(take(Some(1e6), 1_000_000, 2), None, "it is half as fast");
        assert_eq!(take(Some(2e4), 20_000, 2), None, "the network is slow");
        assert_eq!(take(Some(1e9), 0, 0), None, "it has just begun");
        assert_eq!(take(None, 20, 20), Some(1_000_000..9_000_000), "nothing to compare with");
        assert_eq!(take(None, 1_000_000, 1), None, "it will not take long");
    }
}

//! One try to bring a file from one address: workers that fetch and write, a thread that hashes behind them, one that has
//! the disk keep up and journals what is on it, and the caller's thread, which watches and tells.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::cancel::Cancelled;
use crate::base::digest::Digest;
use crate::base::fs::FsError;
use crate::base::hashed::{Follower, Hashed};
use crate::base::http::{Http, Response};
use crate::report::{Progress, Task, Unit};

use super::part::{Journal, Part, Ranges};
use super::server::{Asked, content_range, peeked, strong_etag};
use super::{Download, MAX_STREAMS, SourceError, likely_content, no_space};

/// What one request asks for at least and at most; less in tests, which then need not move so much.
const RANGE_BYTES: (u64, u64) = if cfg!(test) { (1 << 20, 1 << 20) } else { (1 << 20, 16 << 20) };
/// Tries that bring less count as failed.
const PROGRESS_BYTES: u64 = 64 << 10;
const BUFFER_BYTES: usize = 256 << 10;
/// Written when this much has come, or this long after the last write.
const WRITE_BYTES: usize = 64 << 10;
const WRITE_EVERY: Duration = Duration::from_millis(200);
pub const TELL_EVERY: Duration = Duration::from_millis(100);
/// Bytes that came are on the disk, and journalled, when they are this many, or this late.
const FLUSH_BYTES: u64 = 8 << 20;
const FLUSH_EVERY: Duration = Duration::from_secs(2);
/// Workers wait while the hash is this much behind: what is left to hash at the end would only be waited for then.
const MAX_LAG_BYTES: u64 = 16 << 20;
/// Larger files are not believed.
const MAX_FILE_BYTES: u64 = 1 << 44;

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

/// The server's file is not the expected one.
#[derive(Debug, Default)]
pub struct Wrong {
    pub actual: String,
    pub likely: Option<String>,
    pub digest: Option<Digest>,
    /// Bytes of it may be in the part.
    pub spoilt: bool,
}

/// Why workers stop before everything is there.
pub enum End {
    /// Ranges are of no use here: go on in one stream, with this answer if it is one.
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

#[derive(Default)]
pub struct State {
    /// Expected, else learnt from the server.
    pub size: Option<u64>,
    pub etag: Option<String>,
    pub done: Ranges,
    /// Gaps that nobody works on, the first one last.
    pub todo: Vec<Range<u64>>,
    /// The first answer to a range request came.
    pub piloted: bool,
    pub active: usize,
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
    grown: Condvar,
    /// The hash came nearer to the end of the prefix.
    hashed: Condvar,
    /// A worker ended, or the first answer came.
    turned: Condvar,
}

impl<'a> Transfer<'a> {
    pub fn new(http: &'a Http, task: &'a Task, ask: &'a Download<'a>, part: &'a Part, url: &'a str) -> Self {
        let (state, grown, hashed, turned) = (Mutex::default(), Condvar::new(), Condvar::new(), Condvar::new());
        Self { http, task, ask, part, url, state, grown, hashed, turned }
    }

    /// One try.
    pub fn run(&self, means: Means) -> Result<Outcome, SourceError> {
        self.prepare(means)?;
        let progress = self.task.start("fetching", self.ask.what, self.ask.size_bytes, Unit::Bytes);
        let began = Instant::now();
        let (end, hashed, flushed) = std::thread::scope(|scope| {
            let hasher = scope.spawn(|| self.hash());
            let flusher = scope.spawn(|| self.flush());
            let mut end = Some(End::Plain(None));
            if means == Means::Ranges {
                end = self.phase(scope, self.streams(), &progress, |index| self.ranged(index == 0));
            }
            if let Some(End::Plain(response)) = end {
                self.lock().done.keep_prefix();
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
                let came = came.ok_or_else(|| self.refused("it did not come as a whole".to_owned(), None))?;
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
            Some(End::Plain(_)) => Err(self.refused("the server's answers make no sense".to_owned(), None)),
        }
    }

    fn streams(&self) -> usize {
        self.ask.streams.clamp(1, MAX_STREAMS)
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
        *self.lock() = state;
        Ok(())
    }

    fn allocate(&self, file: &File, size: u64, there: u64) -> Result<(), FsError> {
        crate::base::fs::allocate(file, &self.part.path, size).map_err(|error| {
            if error.is_no_space() { no_space(&self.part.path, size - there.min(size)) } else { error }
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the next run could go on from.
    fn journal(&self) -> Option<Journal> {
        let state = self.lock();
        let size = state.size.filter(|_| self.ask.sha256.is_some() || state.etag.is_some())?;
        Some(Journal::new(size, state.etag.clone(), state.done.clone()))
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
            drop(state);
            if in_vain {
                self.http.abort();
            }
            progress.set(done, size, detail);
            state = self.lock();
            if state.active > 0 {
                state = self.turned.wait_timeout(state, TELL_EVERY).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }

    /// Stops a worker when another one ended everything, or the user did.
    pub fn proceed(&self) -> Result<(), End> {
        self.task.check()?;
        // The first reason counts; this one is thrown away.
        if self.lock().end.is_some() { Err(Cancelled.into()) } else { Ok(()) }
    }

    /// A worker that fetches gap after gap. The pilot finds out whether the server has ranges; the others wait for it.
    fn ranged(&self, pilot: bool) -> Result<(), End> {
        let mut state = self.lock();
        while !pilot && !state.piloted && state.end.is_none() {
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.fill_gaps()?;
        self.lock().piloted = true;
        self.turned.notify_all();
        Ok(())
    }

    fn fill_gaps(&self) -> Result<(), End> {
        let mut file = self.part.open()?;
        while let Some(mut gap) = self.take() {
            self.fill(&mut file, &mut gap)?;
        }
        Ok(())
    }

    fn take(&self) -> Option<Range<u64>> {
        let mut state = self.lock();
        let left = state.todo.iter().map(|gap| gap.end - gap.start).sum();
        let gap = state.todo.pop()?;
        let end = gap.end.min(gap.start + range_bytes(left, self.streams(), RANGE_BYTES));
        if end < gap.end {
            state.todo.push(end..gap.end);
        }
        Some(gap.start..end)
    }

    fn fill(&self, file: &mut File, gap: &mut Range<u64>) -> Result<(), End> {
        let mut backoff = self.http.backoff();
        let mut odd = 0;
        while gap.start < gap.end {
            let before = gap.start;
            let (why, asked) = match self.request(Some(gap.clone()))? {
                Asked::Part(response) => {
                    self.learn(file, &response, gap)?;
                    match self.copy(*response, file, gap)? {
                        None => continue,
                        Some(why) => (why, None),
                    }
                }
                Asked::Whole(response) => return Err(End::Plain(Some(response))),
                Asked::Odd(_) if odd > 0 => return Err(End::Plain(None)),
                Asked::Odd(why) => {
                    odd += 1;
                    (why, None)
                }
                Asked::Renewed => continue,
                Asked::Later(why, asked) => (why, asked),
                Asked::Unreached(why) => {
                    self.reachable(&backoff, &why)?;
                    (why, None)
                }
            };
            if gap.start - before >= PROGRESS_BYTES {
                backoff.progressed();
            }
            self.wait(&mut backoff, why, asked)?;
        }
        Ok(())
    }

    /// Takes the size from the first answer, where it is not known yet, and lets the other workers begin.
    fn learn(&self, file: &File, response: &Response, gap: &mut Range<u64>) -> Result<(), End> {
        let mut state = self.lock();
        if state.size.is_none() {
            let (_, _, total) = content_range(response).unwrap_or_default();
            let (size, etag) = (self.believable(total)?, strong_etag(response));
            if etag.is_none() && self.ask.sha256.is_none() && gap.end < size {
                // Ranges of two states of the file could not be told apart.
                return Err(End::Plain(None));
            }
            self.allocate(file, size, 0)?;
            (state.size, state.etag) = (Some(size), etag);
            gap.end = gap.end.min(size);
            if gap.end < size {
                state.todo.push(gap.end..size);
            }
        }
        state.piloted = true;
        drop(state);
        self.turned.notify_all();
        Ok(())
    }

    fn believable(&self, size: u64) -> Result<u64, End> {
        if size <= MAX_FILE_BYTES {
            return Ok(size);
        }
        Err(End::Error(self.refused(format!("it claims to be {size} bytes long"), None)))
    }

    /// The worker that brings the file from front to back, with whatever the server can do.
    fn single(&self, mut has_ranges: bool, mut first: Option<Box<Response>>) -> Result<(), End> {
        let mut file = self.part.open()?;
        let mut backoff = self.http.backoff();
        loop {
            let (before, size, resumable) = {
                let state = self.lock();
                (state.done.prefix(), state.size, self.ask.sha256.is_some() || state.etag.is_some())
            };
            if size.is_some_and(|size| before >= size) {
                return Ok(());
            }
            let gap = before..size.unwrap_or(u64::MAX);
            let range = (has_ranges && resumable && before > 0 && size.is_some()).then(|| gap.clone());
            let asked = match first.take().map_or_else(|| self.request(range), |response| Ok(Asked::Whole(response))) {
                // A range is refused that the whole file may not be.
                Err(End::Plain(_)) => {
                    has_ranges = false;
                    continue;
                }
                asked => asked?,
            };
            let (why, asked) = match asked {
                Asked::Part(response) => match self.copy(*response, &mut file, &mut gap.clone())? {
                    None => continue,
                    Some(why) => (why, None),
                },
                Asked::Whole(response) => match self.whole(*response, &mut file)? {
                    None => return Ok(()),
                    Some(why) => (why, None),
                },
                Asked::Odd(why) => {
                    has_ranges = false;
                    (why, None)
                }
                Asked::Renewed => continue,
                Asked::Later(why, asked) => (why, asked),
                Asked::Unreached(why) => {
                    self.reachable(&backoff, &why)?;
                    (why, None)
                }
            };
            if self.lock().done.prefix().saturating_sub(before) >= PROGRESS_BYTES {
                backoff.progressed();
            }
            self.wait(&mut backoff, why, asked)?;
        }
    }

    /// Takes the file from its start, passing over what is there already. None: it is whole; else what went wrong.
    fn whole(&self, mut response: Response, file: &mut File) -> Result<Option<String>, End> {
        let length = response.length();
        let mut state = self.lock();
        match (state.size, length) {
            (Some(size), Some(length)) if size != length => {
                drop(state);
                return Err(End::Wrong(peeked(&mut response, format!("{length} bytes"))));
            }
            (None, Some(length)) => {
                drop(state);
                let size = self.believable(length)?;
                self.allocate(file, size, 0)?;
                state = self.lock();
                state.size = Some(size);
            }
            _ => {}
        }
        let etag = strong_etag(&response);
        if self.ask.sha256.is_none() && (etag.is_none() || etag != state.etag) {
            // It may be another file by now.
            state.done = Ranges::default();
            state.epoch += 1;
            state.etag = etag;
        }
        let (prefix, size) = (state.done.prefix(), state.size);
        drop(state);
        match io::copy(&mut (&mut response).take(prefix), &mut io::sink()) {
            Ok(skipped) if skipped == prefix => {}
            Ok(_) => return Ok(Some("the server ended the answer early".to_owned())),
            Err(error) => return Ok(Some(self.broken(&error))),
        }
        let mut gap = prefix..size.unwrap_or(u64::MAX);
        let ended = self.copy(response, file, &mut gap)?;
        match (size, ended.as_deref()) {
            // Nobody said how long it would be, so this is the end of it.
            (None, Some(EARLY)) => {
                self.lock().size = Some(gap.start);
                Ok(None)
            }
            (Some(_), Some(EARLY)) if length.is_none() && prefix == 0 => self.short(gap.start).map(|()| ended),
            _ => Ok(ended),
        }
    }

    /// An answer that did not say its length was shorter than the file: a page, perhaps, and nothing to go on from.
    fn short(&self, length: u64) -> Result<(), End> {
        let head = crate::base::fs::read_head(&self.part.path, 512)?;
        let Some(likely) = likely_content(&head) else { return Ok(()) };
        let (actual, likely) = (format!("{length} bytes"), Some(likely.to_owned()));
        Err(End::Wrong(Wrong { actual, likely, spoilt: true, ..Wrong::default() }))
    }

    /// Writes what comes to where it belongs, moving `gap.start` along. None: the gap is filled; else why it is not.
    fn copy(&self, mut response: Response, file: &mut File, gap: &mut Range<u64>) -> Result<Option<String>, End> {
        file.seek(SeekFrom::Start(gap.start)).map_err(|error| FsError::new("write", &self.part.path, error))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let (mut filled, mut written) = (0, Instant::now());
        loop {
            self.proceed()?;
            let left = gap.end - gap.start - filled as u64;
            let room = (buffer.len() - filled).min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = if room == 0 { Ok(0) } else { response.read(&mut buffer[filled..filled + room]) };
            let count = *read.as_ref().unwrap_or(&0);
            filled += count;
            if count == 0 || filled >= WRITE_BYTES || written.elapsed() >= WRITE_EVERY {
                self.write(file, &buffer[..filled], gap)?;
                (filled, written) = (0, Instant::now());
            }
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Ok(Some(self.broken(&error))),
                Ok(0) if gap.start < gap.end => return Ok(Some(EARLY.to_owned())),
                Ok(0) => break,
                Ok(_) => {}
            }
        }
        // One byte more than there should be? Asking also gives the connection back.
        if response.read(&mut [0]).is_ok_and(|count| count > 0) && self.lock().size == Some(gap.end) {
            let actual = format!("more than {} bytes", gap.end);
            return Err(End::Wrong(Wrong { actual, spoilt: true, ..Wrong::default() }));
        }
        Ok(None)
    }

    fn write(&self, file: &mut File, bytes: &[u8], gap: &mut Range<u64>) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        file.write_all(bytes).map_err(|error| {
            let error = FsError::new("write", &self.part.path, error);
            let state = self.lock();
            let missing = state.size.unwrap_or(gap.start + bytes.len() as u64) - state.done.total();
            drop(state);
            if error.is_no_space() { no_space(&self.part.path, missing) } else { error }
        })?;
        let from = gap.start;
        gap.start += bytes.len() as u64;
        let mut state = self.lock();
        state.done.add(from, gap.start);
        (state.detail, state.renewals) = (None, 0);
        self.grown.notify_all();
        while state.done.prefix().saturating_sub(state.hashed) > MAX_LAG_BYTES && state.end.is_none() {
            state = self.hashed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
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

    /// Has the disk keep up with what comes, and journals what is on it: at the end little is left to wait for.
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
            drop(state);
            if given_up {
                return Ok(());
            }
            let journal = self.journal();
            file.sync_data().map_err(|error| FsError::new("write", &self.part.path, error))?;
            if over {
                return Ok(());
            }
            journal.inspect(|journal| self.part.save(journal));
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

/// How much to ask for when `left` bytes are: less towards the end, so that all streams are done at once.
pub fn range_bytes(left: u64, streams: usize, (least, most): (u64, u64)) -> u64 {
    (left / (2 * streams as u64)).clamp(least, most)
}

const EARLY: &str = "the server ended the answer early";

fn told(size_bytes: u64, took: Duration) -> String {
    let mb = size_bytes as f64 / 1e6;
    format!("{mb:.1} MB in {:.1} s", took.as_secs_f64())
}

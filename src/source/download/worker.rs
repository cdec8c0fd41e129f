//! One worker: it requests bytes and writes them where they belong, again and again until its work is done.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::Range;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::base::fs::{self, FsError};
use crate::base::http::{Backoff, HttpError, Request, Response, same_origin, shown};

use super::part::Ranges;
use super::server::{Answer, Expectation, Wrong, classify, content_range, peeked, strong_etag};
use super::state::{End, TELL_EVERY, Transfer};
use super::{SourceError, likely_content, no_room, no_space};

/// What one request asks for at least and at most; less in tests, which then need not move so much.
pub const RANGE_BYTES: (u64, u64) = if cfg!(test) { (1 << 20, 1 << 20) } else { (1 << 20, 16 << 20) };
/// Tries that bring less count as failed.
const PROGRESS_BYTES: u64 = 64 << 10;
const BUFFER_BYTES: usize = 256 << 10;
/// Written when this much has come, or this long after the last write.
const WRITE_BYTES: usize = 64 << 10;
const WRITE_EVERY: Duration = Duration::from_millis(200);
/// Workers wait while the hash is this much behind: what is left to hash at the end would only be waited for then.
const MAX_LAG_BYTES: u64 = 16 << 20;
/// How often in a row an expired link is asked for anew.
const MAX_RENEWALS: u32 = 3;
/// Tries to reach a server that never answered.
const UNREACHED_TRIES: u32 = 3;
/// How often the free space is looked at while a file of unknown size comes.
const ROOM_BYTES: u64 = 16 << 20;
const EARLY: &str = "the server ended the response early";

/// What a worker has to bring.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// The range that the worker of this number holds.
    Range(usize),
    /// Everything behind the prefix, over one connection. A range may be requested to skip the prefix.
    Rest { ranges: bool },
}

/// What a request led to.
enum Reply {
    Answer(Answer),
    /// No connection could be made.
    Unreached(String),
    /// The link had expired; the next request asks for a new one.
    Renewed,
}

impl Transfer<'_> {
    /// A worker that fetches range after range. The first one finds out whether the server has ranges; the others wait for
    /// it.
    pub fn ranged(&self, worker: usize) -> Result<(), End> {
        let mut state = self.lock();
        while worker > 0 && !state.piloted && state.end.is_none() {
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        let mut file = self.part.open()?;
        while self.take(worker)? {
            let done = self.fetch(&mut file, Work::Range(worker), None);
            self.lock().give_back(worker);
            self.turned.notify_all();
            done?;
        }
        self.lock().piloted = true;
        self.turned.notify_all();
        Ok(())
    }

    /// The worker that brings the file from front to back, with whatever the server can do.
    pub fn single(&self, ranges: bool, first: Option<Box<Response>>) -> Result<(), End> {
        self.fetch(&mut self.part.open()?, Work::Rest { ranges }, first)
    }

    /// Waits until there is something to fetch for this worker. False: there is nothing more.
    fn take(&self, worker: usize) -> Result<bool, End> {
        loop {
            self.proceed()?;
            let mut state = self.lock();
            let left = state.todo.iter().map(|gap| gap.end - gap.start).sum();
            if state.take(worker, range_bytes(left, self.streams(), RANGE_BYTES)) {
                return Ok(true);
            }
            if !state.is_fetching() {
                return Ok(false);
            }
            drop(self.turned.wait_timeout(state, TELL_EVERY));
        }
    }

    /// What is missing of a worker's work; `None` when it is done.
    fn missing(&self, work: &Work) -> Option<Range<u64>> {
        let state = self.lock();
        let gap = match work {
            Work::Range(worker) => state.held.get(worker).map_or(0..0, |held| held.gap.clone()),
            Work::Rest { .. } => state.done.prefix()..state.size.unwrap_or(u64::MAX),
        };
        (gap.start < gap.end).then_some(gap)
    }

    /// The range to request for `gap`.
    fn range_for(&self, work: &Work, gap: &Range<u64>) -> Option<Range<u64>> {
        let state = self.lock();
        let resumable = self.ask.sha256.is_some() || state.etag.is_some();
        match work {
            Work::Range(_) => Some(gap.clone()),
            Work::Rest { ranges } => {
                (*ranges && resumable && gap.start > 0 && state.size.is_some()).then(|| gap.clone())
            }
        }
    }

    /// Fetches until the work is done; after what passes, again.
    fn fetch(&self, file: &mut File, mut work: Work, mut first: Option<Box<Response>>) -> Result<(), End> {
        let mut backoff = self.http.backoff();
        let mut odd = 0;
        while let Some(mut gap) = self.missing(&work) {
            let before = gap.start;
            let reply = match first.take() {
                Some(response) => Reply::Answer(Answer::Whole(response)),
                None => self.request(self.range_for(&work, &gap))?,
            };
            let (why, asked) = match (reply, &mut work) {
                (Reply::Renewed, _) => continue,
                (Reply::Answer(Answer::Part(response)), work) => {
                    self.learn(file, &response, &mut gap)?;
                    (self.copy(*response, file, work, &mut gap)?, None)
                }
                (Reply::Answer(Answer::Whole(response)), Work::Rest { .. }) => match self.whole(*response, file)? {
                    None => return Ok(()),
                    why => (why, None),
                },
                (Reply::Answer(Answer::Whole(response)), Work::Range(_)) => return Err(End::Plain(Some(response))),
                (Reply::Answer(Answer::NoRanges), Work::Rest { ranges }) if *ranges => {
                    *ranges = false;
                    continue;
                }
                (Reply::Answer(Answer::Odd(why)), Work::Rest { ranges }) => {
                    *ranges = false;
                    (Some(why), None)
                }
                (Reply::Answer(Answer::Odd(why)), Work::Range(_)) if odd == 0 => {
                    odd += 1;
                    (Some(why), None)
                }
                (Reply::Answer(Answer::Later(why, asked)), _) => (Some(why), asked),
                (Reply::Answer(_), _) => return Err(End::Plain(None)),
                (Reply::Unreached(why), _) => {
                    self.reachable(&backoff, &why)?;
                    (Some(why), None)
                }
            };
            let now = self.missing(&work);
            if now.as_ref().is_none_or(|gap| gap.start.saturating_sub(before) >= PROGRESS_BYTES) {
                backoff.progressed();
            }
            if let (Some(why), Some(_)) = (why, now) {
                self.wait(&mut backoff, why, asked)?;
            }
        }
        Ok(())
    }

    /// Sends one request and says what the answer means.
    fn request(&self, range: Option<Range<u64>>) -> Result<Reply, End> {
        self.hold()?;
        let (location, size, etag) = {
            let state = self.lock();
            (state.location.clone(), state.size, state.etag.clone())
        };
        let url = location.as_deref().unwrap_or(self.url);
        let home = self.ask.urls.first().is_some_and(|first| same_origin(first, url));
        let mut headers = if home { self.ask.headers.to_vec() } else { Vec::new() };
        // A small file that is not there at all is asked for as a whole.
        let range = range.filter(|range| range.start > 0 || size != Some(range.end));
        let text = range.as_ref().map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        headers.extend(text.as_deref().map(|text| ("Range", text)));
        headers.extend(
            etag.as_deref().filter(|_| text.is_some() && self.ask.sha256.is_none()).map(|etag| ("If-Range", etag)),
        );
        let response = match self.http.send(&Request::get(url, &headers)) {
            Ok(response) => response,
            Err(HttpError::Unreachable { url, why }) => return Ok(Reply::Unreached(format!("{url}: {why}"))),
            Err(HttpError::Broken { why, .. } | HttpError::Unexpected { why, .. }) => {
                return Ok(Reply::Answer(Answer::Later(why, None)));
            }
            Err(error) => return Err(End::Error(SourceError::of_http(self.ask.what, error))),
        };
        let redirected = location.is_some() || !same_origin(&response.url, self.url);
        if matches!(response.status, 200 | 206) && location.is_none() && response.url != self.url {
            self.lock().location = Some(response.url.clone());
        }
        let etag = etag.as_deref().filter(|_| self.ask.sha256.is_none());
        match classify(response, &Expectation { range, size, etag, redirected }) {
            Answer::Expired(status, said) => self.renew(status, said, location.as_deref()),
            Answer::Wrong(wrong) => Err(End::Wrong(wrong)),
            Answer::Refused(status, said) => Err(End::Error(self.turned_down(status, said))),
            answer => Ok(Reply::Answer(answer)),
        }
    }

    /// The first server is asked for another link, unless another worker met the same and did so.
    fn renew(&self, status: u16, said: String, location: Option<&str>) -> Result<Reply, End> {
        let mut state = self.lock();
        if state.location.as_deref() == location {
            state.location = None;
            state.renewals += 1;
        }
        let (renewals, forbidden) = (state.renewals, status == 403);
        drop(state);
        match renewals {
            0..=MAX_RENEWALS => Ok(Reply::Renewed),
            _ if forbidden => Ok(Reply::Answer(Answer::NoRanges)),
            // The first server has the file, so it is not missing.
            _ => Err(End::Error(self.refused(said, Some("try again later")))),
        }
    }

    fn turned_down(&self, status: u16, why: String) -> SourceError {
        match status {
            404 | 410 => SourceError::Missing { what: self.ask.what.to_owned(), why, hint: None },
            401 | 403 => self.refused(why, Some("the server requires a login, or rejects this one")),
            _ => self.refused(why, None),
        }
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
            state.held.values_mut().for_each(|held| held.gap.end = held.gap.end.min(size));
            if gap.end < size {
                state.todo.push(gap.end..size);
            }
        }
        state.piloted = true;
        drop(state);
        self.turned.notify_all();
        Ok(())
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
            (state.done, state.durable) = (Ranges::default(), Ranges::default());
            state.epoch += 1;
            state.etag = etag;
        }
        let (prefix, size) = (state.done.prefix(), state.size);
        drop(state);
        match io::copy(&mut (&mut response).take(prefix), &mut io::sink()) {
            Ok(skipped) if skipped == prefix => {}
            Ok(_) => return Ok(Some("the server ended the response early".to_owned())),
            Err(error) => return Ok(Some(self.broken(&error))),
        }
        let mut gap = prefix..size.unwrap_or(u64::MAX);
        let ended = self.copy(response, file, &Work::Rest { ranges: false }, &mut gap)?;
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
        let head = fs::read_head(&self.part.path, 512)?;
        let Some(likely) = likely_content(&head) else { return Ok(()) };
        let (actual, likely) = (format!("{length} bytes"), Some(likely.to_owned()));
        Err(End::Wrong(Wrong { actual, likely, spoilt: true, ..Wrong::default() }))
    }

    /// A file of unknown size has taken no space beforehand, and may be endless: it must not fill the disk.
    fn leave_room(&self) -> Result<(), End> {
        let unknown = self.lock().size.is_none();
        if unknown && fs::available_bytes(&self.part.path)? < self.ask.reserve_bytes {
            self.part.forget()?;
            return Err(End::from(no_room(&self.part.path, self.ask.reserve_bytes)));
        }
        Ok(())
    }

    /// Writes what comes to where it belongs, moving `gap.start` along. None: the gap is filled; else why it is not.
    fn copy(
        &self,
        mut response: Response,
        file: &mut File,
        work: &Work,
        gap: &mut Range<u64>,
    ) -> Result<Option<String>, End> {
        file.seek(SeekFrom::Start(gap.start)).map_err(|error| FsError::new("write", &self.part.path, error))?;
        let mut buffer = vec![0; BUFFER_BYTES];
        let (mut filled, mut written, mut checked) = (0, Instant::now(), ROOM_BYTES);
        loop {
            self.proceed()?;
            let left = gap.end - gap.start - filled as u64;
            let room = (buffer.len() - filled).min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = if room == 0 { Ok(0) } else { response.read(&mut buffer[filled..filled + room]) };
            let count = *read.as_ref().unwrap_or(&0);
            filled += count;
            if count == 0 || filled >= WRITE_BYTES || written.elapsed() >= WRITE_EVERY {
                self.write(file, &buffer[..filled], work, gap)?;
                checked += filled as u64;
                if checked >= ROOM_BYTES {
                    self.leave_room()?;
                    checked = 0;
                }
                (filled, written) = (0, Instant::now());
                if self.is_taken_over(work, gap) {
                    return Ok(None);
                }
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

    /// Whether another worker took the rest of the range.
    fn is_taken_over(&self, work: &Work, gap: &Range<u64>) -> bool {
        match work {
            Work::Range(worker) => self.lock().held.get(worker).is_none_or(|held| held.gap.end < gap.end),
            Work::Rest { .. } => false,
        }
    }

    fn write(&self, file: &mut File, bytes: &[u8], work: &Work, gap: &mut Range<u64>) -> Result<(), End> {
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
        if let Work::Range(worker) = work
            && let Some(held) = state.held.get_mut(worker)
        {
            // Where the rest was taken over, these bytes come twice.
            held.gap = gap.start..held.gap.end.max(gap.start);
        }
        (state.detail, state.renewals) = (None, 0);
        self.grown.notify_all();
        while state.done.prefix().saturating_sub(state.hashed) > MAX_LAG_BYTES && state.end.is_none() {
            state = self.hashed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn broken(&self, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                format!("received nothing for {} s", self.http.settings().stall_timeout.as_secs_f32())
            }
            _ => format!("the connection broke: {error}"),
        }
    }

    /// A server that was never reached gets fewer tries.
    fn reachable(&self, backoff: &Backoff, why: &str) -> Result<(), End> {
        let state = self.lock();
        let reached = state.location.is_some() || state.piloted;
        drop(state);
        if !reached && backoff.failures() + 1 >= UNREACHED_TRIES {
            let url = shown(self.url);
            let error = HttpError::Unreachable { why: why.replacen(&format!("{url}: "), "", 1), url };
            return Err(End::Error(SourceError::of_http(self.ask.what, error)));
        }
        Ok(())
    }
}

/// How much to ask for when `left` bytes are: less towards the end, so that all streams are done at once.
pub fn range_bytes(left: u64, streams: usize, (least, most): (u64, u64)) -> u64 {
    (left / (2 * streams as u64)).clamp(least, most)
}

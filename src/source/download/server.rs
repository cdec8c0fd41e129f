//! Talking to the server: what is asked, what the answers mean, when to ask again.

use std::io::{self, Read as _};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::base::http::{Backoff, HttpError, Request, Response, comes_later, pause, same_origin, shown};

use super::transfer::{End, TELL_EVERY, Transfer, Wrong};
use super::{SourceError, likely_content};

/// How often in a row an expired link is asked for anew.
const MAX_RENEWALS: u32 = 3;
/// Tries to reach a server that never answered.
const UNREACHED_TRIES: u32 = 3;

/// What a request led to.
pub enum Asked {
    /// The bytes that were asked for.
    Part(Box<Response>),
    /// The file from its start.
    Whole(Box<Response>),
    /// An answer that does not fit the range.
    Odd(String),
    /// Try again, later if it says so.
    Later(String, Option<Duration>),
    /// Nobody answers.
    Unreached(String),
    /// The link had expired; the next request asks for a new one.
    Renewed,
}

impl Transfer<'_> {
    /// Sends one request and sorts the answer.
    pub fn request(&self, range: Option<Range<u64>>) -> Result<Asked, End> {
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
            Err(HttpError::Unreachable { url, why }) => return Ok(Asked::Unreached(format!("{url}: {why}"))),
            Err(HttpError::Broken { why, .. } | HttpError::Unexpected { why, .. }) => {
                return Ok(Asked::Later(why, None));
            }
            Err(error) => return Err(End::Error(SourceError::of_http(self.ask.what, error))),
        };
        self.sort(response, range, size, location.as_deref())
    }

    fn sort(
        &self,
        mut response: Response,
        range: Option<Range<u64>>,
        size: Option<u64>,
        location: Option<&str>,
    ) -> Result<Asked, End> {
        let status = response.status;
        match (status, range, location) {
            (200, ..) => self.remember(&response, location),
            (206, Some(range), _) => {
                let Some((first, end, total)) = content_range(&response) else {
                    return Ok(Asked::Odd("the server sends a range without saying which".to_owned()));
                };
                if size.is_some_and(|size| size != total) {
                    return Err(End::Wrong(peeked(&mut response, format!("{total} bytes"))));
                }
                self.same_state(&response)?;
                let end_fits = end == range.end.min(total);
                if first != range.start || !end_fits || response.length().is_some_and(|length| length != end - first) {
                    return Ok(Asked::Odd(format!("the server sends bytes {first}-{end} of another range")));
                }
                self.remember(&response, location);
                return Ok(Asked::Part(Box::new(response)));
            }
            (206, None, _) => return Ok(Asked::Odd("the server sends a range that nobody asked for".to_owned())),
            (416, ..) => {
                let there = response.header("content-range").and_then(|text| text.strip_prefix("bytes */"));
                let actual = there.map_or("fewer bytes".to_owned(), |there| format!("{there} bytes"));
                return Err(End::Wrong(Wrong { actual, ..Wrong::default() }));
            }
            (400 | 401 | 403 | 404 | 410, range, Some(location)) => {
                return self.renew(&response, location, range.is_some());
            }
            (403, Some(_), None) => return Err(End::Plain(None)),
            _ if comes_later(status) => {
                let asked = response.asks_to_wait();
                return Ok(Asked::Later(format!("HTTP status {status}"), asked));
            }
            _ => return Err(End::Error(self.turned_down(&response))),
        }
        Ok(Asked::Whole(Box::new(response)))
    }

    /// Where no digest says which file is meant, every range must be of the state that the first one was of (RFC 9110
    /// §15.3.7.3): not every server heeds `If-Range`.
    fn same_state(&self, response: &Response) -> Result<(), End> {
        let state = self.lock();
        if self.ask.sha256.is_some() || state.etag.is_none() || strong_etag(response) == state.etag {
            return Ok(());
        }
        let actual = "a range of another state of the file".to_owned();
        Err(End::Wrong(Wrong { actual, ..Wrong::default() }))
    }

    fn remember(&self, response: &Response, location: Option<&str>) {
        if location.is_none() && response.url != self.url {
            self.lock().location = Some(response.url.clone());
        }
    }

    /// A link that worked before does not: it has expired, perhaps. The first server is asked for another, unless another
    /// worker met the same and did so.
    fn renew(&self, response: &Response, location: &str, ranged: bool) -> Result<Asked, End> {
        let mut state = self.lock();
        if state.location.as_deref() == Some(location) {
            state.location = None;
            state.renewals += 1;
        }
        let expired = state.renewals <= MAX_RENEWALS;
        drop(state);
        match response.status {
            _ if expired => Ok(Asked::Renewed),
            403 if ranged => Err(End::Plain(None)),
            _ => Err(End::Error(self.turned_down(response))),
        }
    }

    fn turned_down(&self, response: &Response) -> SourceError {
        let status = response.status;
        let said = response.header("x-error-message").map(|text| format!(": {text}")).unwrap_or_default();
        let why = format!("{} answers with HTTP status {status}{said}", shown(&response.url));
        match status {
            404 | 410 => SourceError::Missing { what: self.ask.what.to_owned(), why, hint: None },
            401 | 403 => self.refused(why, Some("the server wants a login, or does not allow this one")),
            _ => self.refused(why, None),
        }
    }

    pub fn refused(&self, why: String, hint: Option<&str>) -> SourceError {
        SourceError::Network { what: self.ask.what.to_owned(), why, hint: hint.map(str::to_owned) }
    }

    pub fn broken(&self, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                format!("nothing came for {} s", self.http.settings().stall_timeout.as_secs_f32())
            }
            _ => format!("the connection broke: {error}"),
        }
    }

    /// A server that was never reached gets fewer tries.
    pub fn reachable(&self, backoff: &Backoff, why: &str) -> Result<(), End> {
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

    /// Waits before the next try, or gives up.
    pub fn wait(&self, backoff: &mut Backoff, why: String, asked: Option<Duration>) -> Result<(), End> {
        let Some(delay) = backoff.after_failure(asked) else {
            let hint = "what came so far is kept; run the command again to go on";
            return Err(End::Error(self.refused(why, Some(hint))));
        };
        let until = Instant::now() + delay;
        let mut state = self.lock();
        state.detail = Some(format!("{why}; again in {:.1} s", delay.as_secs_f32()));
        if asked.is_some() {
            let first = state.hold.is_none_or(|hold| hold < Instant::now());
            state.hold = state.hold.max(Some(until));
            drop(state);
            if first {
                let what = self.ask.what;
                self.task.waiting(format!("{}: {why} for `{what}`, again in {} s", shown(self.url), delay.as_secs()));
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

/// What came instead, with a look at its first bytes.
pub fn peeked(response: &mut Response, actual: String) -> Wrong {
    let mut head = Vec::new();
    let _ = response.take(512).read_to_end(&mut head);
    Wrong { actual, likely: likely_content(&head).map(str::to_owned), ..Wrong::default() }
}

/// First byte, the byte after the last one, and the size of the whole: `bytes 0-9/100` (RFC 9110 §14.4).
pub fn content_range(response: &Response) -> Option<(u64, u64, u64)> {
    let (range, total) = response.header("content-range")?.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last, total): (u64, u64, u64) =
        (first.trim().parse().ok()?, last.parse().ok()?, total.trim().parse().ok()?);
    (first <= last && last < total).then(|| (first, last + 1, total))
}

/// An entity tag that promises the same bytes (RFC 9110 §8.8.3).
pub fn strong_etag(response: &Response) -> Option<String> {
    response.header("etag").filter(|etag| etag.starts_with('"') && etag.len() < 500).map(str::to_owned)
}

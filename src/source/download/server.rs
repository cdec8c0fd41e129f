//! The meaning of a server's responses. Pure: nothing here sends, waits or writes.

use std::io::Read as _;
use std::ops::Range;
use std::time::Duration;

use crate::base::digest::Digest;
use crate::base::http::{Response, comes_later, shown};

use super::likely_content;

/// What was requested.
#[derive(Debug)]
pub struct Expectation<'a> {
    /// The bytes; `None` for the whole file.
    pub range: Option<Range<u64>>,
    /// Size of the whole file in bytes, when it is known.
    pub size: Option<u64>,
    /// Where no digest says which file is meant: the state of the file that earlier ranges are of.
    pub etag: Option<&'a str>,
    /// The answer comes from a host that the address was redirected to.
    pub redirected: bool,
}

/// What an answer means.
#[derive(Debug)]
pub enum Answer {
    /// The bytes that were requested.
    Part(Box<Response>),
    /// The file from its start.
    Whole(Box<Response>),
    /// An answer that does not fit the range.
    Odd(String),
    /// The server is busy or failed. With the time that it asks to wait.
    Later(String, Option<Duration>),
    /// A redirect led to a host that refuses: the link has expired, perhaps. A fresh one may work.
    Expired(u16, String),
    /// A range is refused; the whole file may not be.
    NoRanges,
    Wrong(Wrong),
    /// The HTTP status and what the server says.
    Refused(u16, String),
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

/// Says what an answer to a request means (RFC 9110 §14 and §15).
pub fn classify(mut response: Response, expected: &Expectation<'_>) -> Answer {
    let status = response.status;
    match (status, &expected.range) {
        (200, _) => Answer::Whole(Box::new(response)),
        (206, None) => Answer::Odd("the server sends a range that was not requested".to_owned()),
        (206, Some(range)) => {
            let Some((first, end, total)) = content_range(&response) else {
                return Answer::Odd("the server sends a range without saying which".to_owned());
            };
            if expected.size.is_some_and(|size| size != total) {
                return Answer::Wrong(peeked(&mut response, format!("{total} bytes")));
            }
            // Every range must be of one state of the file (RFC 9110 §15.3.7.3): not every server heeds `If-Range`.
            if expected.etag.is_some() && strong_etag(&response).as_deref() != expected.etag {
                let actual = "a range of another state of the file".to_owned();
                return Answer::Wrong(Wrong { actual, ..Wrong::default() });
            }
            let fits = first == range.start && end == range.end.min(total);
            if !fits || response.length().is_some_and(|length| length != end - first) {
                return Answer::Odd(format!("the server sends bytes {first}-{end} of another range"));
            }
            Answer::Part(Box::new(response))
        }
        (416, _) => {
            let there = response.header("content-range").and_then(|text| text.strip_prefix("bytes */"));
            let actual = there.map_or("fewer bytes".to_owned(), |there| format!("{there} bytes"));
            Answer::Wrong(Wrong { actual, ..Wrong::default() })
        }
        (400 | 401 | 403 | 404 | 410, _) if expected.redirected => Answer::Expired(status, said(&response)),
        (403, Some(_)) => Answer::NoRanges,
        _ if comes_later(status) => Answer::Later(format!("HTTP status {status}"), response.asks_to_wait()),
        _ => Answer::Refused(status, said(&response)),
    }
}

fn said(response: &Response) -> String {
    let said = response.header("x-error-message").map(|text| format!(": {text}")).unwrap_or_default();
    format!("{} answers with HTTP status {}{said}", shown(&response.url), response.status)
}

/// What was received instead, described by its first bytes.
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

//! What forwarding and adapting a request about a model share: the request, and the parts of streams that are ours.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::Response;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde_json::Value as Json;

use super::body::{self, Body, Fields};
use super::catalog::Offer;
use super::error::ApiError;
use super::measure::Measure;
use super::operation::Operation;

/// How long a stream may be silent before a comment is sent: proxies and clients give up on silent ones.
pub const SILENCE: Duration = Duration::from_secs(10);

/// A request about a model.
#[derive(Debug)]
pub struct Call {
    pub offer: Arc<Offer>,
    pub operation: Operation,
    pub fields: Fields,
    pub stream: bool,
    /// Who takes turns in the queue.
    pub client: String,
    /// Headers that engines get, too: W3C trace context.
    pub trace: HeaderMap,
    pub began: Instant,
}

/// The response for an error, which the measurements note.
pub fn refused(mut measure: Measure, error: &ApiError) -> Response<Body> {
    measure.answered(error.status.as_u16());
    measure.fail(&error.message);
    body::refusal(error, Some(measure.operation))
}

/// A response of server-sent events.
pub fn events(pieces: impl futures_util::Stream<Item = Result<Bytes, io::Error>> + Send + 'static) -> Response<Body> {
    let mut response = Response::new(body::streamed(pieces));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// What is sent while nothing else is: clients of OpenAI's API pass over comments, and Anthropic's know an event for it.
pub fn ping(operation: Operation) -> Bytes {
    match operation {
        Operation::Messages => Bytes::from_static(b"event: ping\ndata: {\"type\":\"ping\"}\n\n"),
        _ => Bytes::from_static(b": waiting\n\n"),
    }
}

/// An error in a stream whose status has been sent. No `[DONE]` follows.
pub fn error_event(body: &Json, operation: Operation) -> Bytes {
    let name = if operation == Operation::Messages { "event: error\n" } else { "" };
    format!("{name}data: {body}\n\n").into()
}

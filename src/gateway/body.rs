//! Bodies: the fields of a request as they were sent, and what responses are made of.

use std::convert::Infallible;
use std::fmt;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::{Response, StatusCode};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value as Json;
use serde_json::value::{RawValue, to_raw_value};

use super::error::{ApiError, Retry};
use super::operation::Operation;

/// Bytes of a request's body at most: pictures travel in it, as base64.
pub const LIMIT_BYTES: usize = 64 << 20;
/// How long a client may pause while it sends a body, and how long the whole may take.
const PAUSE: Duration = Duration::from_secs(30);
const WHOLE: Duration = Duration::from_secs(300);
/// Fields of a request at most.
const LIMIT_FIELDS: usize = 1000;

/// The body of a response. An error breaks the connection off, so that the client cannot take a part for the whole.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A body of these bytes.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// A body that comes piece by piece.
pub fn streamed(pieces: impl Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static) -> Body {
    StreamBody::new(pieces.map(|piece| piece.map(Frame::data))).boxed_unsync()
}

/// A response of JSON.
pub fn json(status: StatusCode, body: &Json) -> Response<Body> {
    typed(status, "application/json", body.to_string())
}

/// A response of that media type.
pub fn typed(status: StatusCode, media_type: &'static str, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(media_type));
    response
}

/// The response for an error of a request for an operation, or for something else.
pub fn refusal(error: &ApiError, operation: Option<Operation>) -> Response<Body> {
    let mut response = json(error.status, &error.json(operation));
    let headers = response.headers_mut();
    match error.retry {
        None => {}
        Some(Retry::Never) => {
            headers.insert("x-should-retry", hyper::header::HeaderValue::from_static("false"));
        }
        Some(Retry::After(pause)) => {
            headers.insert("retry-after", pause.as_secs().max(1).into());
        }
    }
    response
}

/// The whole body of a request, within limits of size and time.
///
/// # Errors
/// What the client did wrong.
pub async fn read(mut body: Incoming) -> Result<Bytes, ApiError> {
    let deadline = Instant::now() + WHOLE;
    let mut all = BytesMut::new();
    loop {
        let pause = deadline.min(Instant::now() + PAUSE);
        let frame = tokio::time::timeout_at(pause.into(), body.frame()).await.map_err(|_| ApiError::too_slow())?;
        let Some(frame) = frame else { return Ok(all.freeze()) };
        let frame = frame.map_err(|error| ApiError::invalid(format!("the request is broken: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if all.len() + data.len() > LIMIT_BYTES {
            return Err(ApiError::too_large(LIMIT_BYTES));
        }
        if all.is_empty() && body.is_end_stream_now() {
            return Ok(data);
        }
        all.extend_from_slice(&data);
    }
}

/// Whether a body is known to have ended.
trait Ended {
    fn is_end_stream_now(&self) -> bool;
}

impl Ended for Incoming {
    fn is_end_stream_now(&self) -> bool {
        hyper::body::Body::is_end_stream(self)
    }
}

/// The members of a JSON object, each as the client wrote it: what is not changed is passed on byte for byte.
#[derive(Debug, Default)]
pub struct Fields(Vec<(String, Box<RawValue>)>);

impl Fields {
    /// Reads a request's body.
    ///
    /// # Errors
    /// When it is not a JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        serde_json::from_slice(body)
            .map_err(|error| ApiError::invalid(format!("the body is not a JSON object: {error}")))
    }

    /// A member as it was written.
    pub fn raw(&self, key: &str) -> Option<&RawValue> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_ref()).filter(|raw| raw.get() != "null")
    }

    /// Whether the client sent a member that is not null.
    pub fn has(&self, key: &str) -> bool {
        self.raw(key).is_some()
    }

    /// A member as a value of that type; None when it is absent.
    ///
    /// # Errors
    /// When it is of another type.
    pub fn get<'a, T: Deserialize<'a>>(&'a self, key: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(key) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|error| ApiError::param(key, format!("`{key}`: {error}")))
    }

    /// Sets a member, in its place when it is there.
    pub fn set(&mut self, key: &str, value: &Json) {
        let Ok(raw) = to_raw_value(value) else { return };
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = raw,
            None => self.0.push((key.to_owned(), raw)),
        }
    }

    /// Removes members.
    pub fn remove(&mut self, keys: &[&str]) {
        self.0.retain(|(name, _)| !keys.contains(&name.as_str()));
    }

    /// Sets a member that the client did not send.
    pub fn set_default(&mut self, key: &str, value: &Json) {
        if !self.has(key) {
            self.set(key, value);
        }
    }

    /// The names of all members.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// The object as text.
    pub fn to_bytes(&self) -> Bytes {
        serde_json::to_vec(self).unwrap_or_default().into()
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    // Two parsers must not see two values: a member that comes twice could pass a check with one of them.
                    if fields.iter().any(|(known, _)| *known == name) {
                        return Err(serde::de::Error::custom(format!("`{name:.100}` occurs twice")));
                    }
                    if fields.len() == LIMIT_FIELDS {
                        return Err(serde::de::Error::custom(format!("more than {LIMIT_FIELDS} members")));
                    }
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_changed_stays_as_it_was_written() {
        let text = br#"{"model":"m","x": 1.0000000000000000001 ,"n":null,"messages":[ {"a":"\u00e9"} ]}"#;
        let mut fields = Fields::parse(text).unwrap();
        fields.set("model", &"p".into());
        fields.set_default("x", &2.into());
        fields.set_default("n", &3.into());
        fields.set_default("new", &true.into());
        let written = String::from_utf8(fields.to_bytes().to_vec()).unwrap();
        let expected = r#"{"model":"p","x":1.0000000000000000001,"n":3,"messages":[ {"a":"\u00e9"} ],"new":true}"#;
        assert_eq!(written, expected);
    }

    #[test]
    fn bad_bodies() {
        for bad in ["", "[]", "{", "{\"a\":1,\"a\":2}", "\"x\"", "{\"a\":tru}"] {
            assert_eq!(Fields::parse(bad.as_bytes()).unwrap_err().status, StatusCode::BAD_REQUEST, "{bad}");
        }
        let fields = Fields::parse(br#"{"stream":"yes"}"#).unwrap();
        assert_eq!(fields.get::<bool>("stream").unwrap_err().param.as_deref(), Some("stream"));
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
        // Refused or kept as text: never a stack that overflows.
        let _ = Fields::parse(deep.as_bytes());
    }
}

//! Server-sent events on their way from an engine to a client: passed on as they came, and looked at in passing.
//!
//! Looking must cost next to nothing: an event is parsed only when it says how much was used, or that something went wrong.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use serde_json::Value as Json;

use crate::engine::conversation::Usage;

/// Bytes of one event at most.
const LIMIT_BYTES: usize = 16 << 20;

/// What the events of one answer said so far.
#[derive(Debug, Default)]
pub struct Seen {
    /// When the first and the last event with text, reasoning or a tool call came.
    pub first: Option<Instant>,
    pub last: Option<Instant>,
    /// Events with text, reasoning or a tool call.
    pub pieces: u64,
    pub usage: Usage,
    /// `stop`, `length`, `tool_calls`
    pub finish: Option<String>,
    /// The message of an error in the middle of the stream.
    pub error: Option<String>,
    /// Whether the stream has said that it is complete.
    pub complete: bool,
}

/// Splits a stream into events.
#[derive(Debug)]
pub struct Tap {
    held: BytesMut,
    /// Leave out the event that only says how much was used: the client did not ask for it.
    strip_usage: bool,
    pub seen: Seen,
}

/// A stream that cannot be server-sent events.
#[derive(Debug, thiserror::Error)]
#[error("an event is larger than {LIMIT_BYTES} bytes")]
pub struct TooLarge;

impl Tap {
    /// A tap that has seen nothing.
    pub fn new(strip_usage: bool) -> Self {
        Self { held: BytesMut::new(), strip_usage, seen: Seen::default() }
    }

    /// Takes the next bytes and gives those that the client gets now: whole events only.
    ///
    /// # Errors
    /// [`TooLarge`].
    pub fn pass(&mut self, bytes: Bytes) -> Result<Bytes, TooLarge> {
        // The usual case: whole events, and none to leave out.
        if self.held.is_empty() && bytes.ends_with(b"\n\n") {
            let mut rest = bytes.as_ref();
            let mut kept = BytesMut::new();
            let mut all = true;
            while let Some(end) = end_of_event(rest) {
                let (event, after) = rest.split_at(end);
                if self.look(event) {
                    kept.extend_from_slice(event);
                } else {
                    all = false;
                }
                rest = after;
            }
            return Ok(if all { bytes } else { kept.freeze() });
        }
        self.held.extend_from_slice(&bytes);
        let mut out = BytesMut::new();
        while let Some(end) = end_of_event(&self.held) {
            let event = self.held.split_to(end);
            if self.look(&event) {
                out.unsplit(event);
            }
        }
        if self.held.len() > LIMIT_BYTES { Err(TooLarge) } else { Ok(out.freeze()) }
    }

    /// What came after the last whole event.
    pub fn rest(&mut self) -> Bytes {
        self.held.split().freeze()
    }

    /// Looks at one event. False when the client does not get it.
    fn look(&mut self, event: &[u8]) -> bool {
        let Some(data) = data(event) else { return true };
        if data == b"[DONE]" {
            self.seen.complete = true;
            return true;
        }
        let is_object = |key: &str| values(data, key).any(|value| value.first() == Some(&b'{'));
        let is_text = |key: &str| values(data, key).any(|value| value.first() == Some(&b'"'));
        let ends = values(data, "type")
            .any(|value| value.starts_with(b"\"message_stop\"") || value.starts_with(b"\"response.completed\""));
        self.seen.complete |= ends;
        let counts = is_object("usage") || is_object("timings") || is_text("finish_reason") || is_text("stop_reason");
        if !(counts || ends || values(data, "error").next().is_some()) {
            return self.piece(data);
        }
        let Ok(json) = serde_json::from_slice::<Json>(data) else { return self.piece(data) };
        self.read(&json);
        let only_usage = json["choices"].as_array().is_some_and(Vec::is_empty);
        if !only_usage {
            self.piece(data);
        }
        !(self.strip_usage && only_usage)
    }

    fn piece(&mut self, data: &[u8]) -> bool {
        if has_text(data) {
            let now = Instant::now();
            self.seen.first.get_or_insert(now);
            self.seen.last = Some(now);
            self.seen.pieces += 1;
        }
        true
    }

    fn read(&mut self, json: &Json) {
        if let Some(error) = json.get("error").filter(|error| !error.is_null()) {
            let message = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
            self.seen.error = Some(message);
        }
        if let Some(reason) =
            json["choices"][0]["finish_reason"].as_str().or_else(|| json["delta"]["stop_reason"].as_str())
        {
            self.seen.finish = Some(reason.to_owned());
            self.seen.last = Some(Instant::now());
        }
        count(&mut self.seen.usage, json);
        // Responses and messages have theirs one level down.
        count(&mut self.seen.usage, &json["response"]);
        count(&mut self.seen.usage, &json["message"]);
    }
}

/// Reads `usage` in the words of all three APIs, and llama.cpp's `timings`.
pub fn count(usage: &mut Usage, json: &Json) {
    let (said, timings) = (&json["usage"], &json["timings"]);
    let number = |names: [&str; 2]| names.iter().find_map(|name| said[*name].as_u64());
    usage.prompt_tokens = number(["prompt_tokens", "input_tokens"]).or(usage.prompt_tokens);
    usage.completion_tokens = number(["completion_tokens", "output_tokens"]).or(usage.completion_tokens);
    let cached = said["prompt_tokens_details"]["cached_tokens"].as_u64().or(said["cache_read_input_tokens"].as_u64());
    usage.cached_tokens = cached.or(usage.cached_tokens);
    let time = |field: &str| timings[field].as_f64().filter(|ms| *ms >= 0.0);
    usage.prompt_ms = time("prompt_ms").or(usage.prompt_ms);
    usage.decode_ms = time("predicted_ms").or(usage.decode_ms);
    usage.completion_tokens = usage.completion_tokens.or(timings["predicted_n"].as_u64());
}

/// Where the first event ends: after its empty line.
fn end_of_event(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    while let Some(line) = bytes[at..].iter().position(|byte| *byte == b'\n') {
        at += line + 1;
        match &bytes[at..] {
            [b'\n', ..] => return Some(at + 1),
            [b'\r', b'\n', ..] => return Some(at + 2),
            _ => {}
        }
    }
    None
}

/// The data of an event; None when it has none, such as a comment.
fn data(event: &[u8]) -> Option<&[u8]> {
    let line = event.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"data:"))?;
    Some(line.trim_ascii())
}

/// What follows each occurrence of a member's name: the beginning of its value. Text that looks like a member costs a closer
/// look and no more.
fn values<'d>(data: &'d [u8], key: &str) -> impl Iterator<Item = &'d [u8]> {
    let name = format!("\"{key}\"");
    let mut rest = data;
    std::iter::from_fn(move || {
        loop {
            let at = memchr::memmem::find(rest, name.as_bytes())?;
            rest = &rest[at + name.len()..];
            if let Some(value) = rest.trim_ascii_start().strip_prefix(b":") {
                return Some(value.trim_ascii_start());
            }
        }
    })
}

/// Whether a chunk has text, reasoning or a tool call: its first chunk often has none.
fn has_text(data: &[u8]) -> bool {
    let filled = |value: &[u8]| matches!(value, [b'"', next, ..] if *next != b'"');
    let texts = ["content", "reasoning_content", "text", "delta", "thinking", "partial_json"];
    texts.iter().any(|key| values(data, key).any(filled))
        || values(data, "tool_calls").any(|value| value.starts_with(b"[{"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n";
    const TEXT: &str = "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";
    const END: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2},\"timings\":{\"predicted_ms\":5.0}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    /// What a client gets of a stream that comes in pieces of `size` bytes.
    fn passed(tap: &mut Tap, stream: &str, size: usize) -> String {
        let mut out = Vec::new();
        for piece in stream.as_bytes().chunks(size) {
            out.extend_from_slice(&tap.pass(Bytes::copy_from_slice(piece)).unwrap());
        }
        out.extend_from_slice(&tap.rest());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn events_pass_as_they_came_however_they_are_cut() {
        let stream = [ROLE, TEXT, ": ping\n\n", TEXT, END, USAGE, DONE].concat();
        for size in [1, 7, 100, stream.len()] {
            let mut tap = Tap::new(false);
            assert_eq!(passed(&mut tap, &stream, size), stream);
            let seen = tap.seen;
            assert_eq!((seen.pieces, seen.finish.as_deref(), seen.complete), (2, Some("length"), true));
            assert_eq!((seen.usage.prompt_tokens, seen.usage.completion_tokens), (Some(3), Some(2)));
            assert_eq!(seen.usage.decode_ms, Some(5.0));
        }
    }

    #[test]
    fn usage_that_nobody_asked_for_is_left_out() {
        let stream = [ROLE, TEXT, END, USAGE, DONE].concat();
        for size in [3, stream.len()] {
            let mut tap = Tap::new(true);
            assert_eq!(passed(&mut tap, &stream, size), [ROLE, TEXT, END, DONE].concat());
            assert_eq!(tap.seen.usage.completion_tokens, Some(2), "it is counted all the same");
        }
    }

    #[test]
    fn broken_streams() {
        let mut tap = Tap::new(false);
        assert_eq!(
            passed(&mut tap, "data: {\"error\":{\"message\":\"no\"}}\n\nda", 5),
            "data: {\"error\":{\"message\":\"no\"}}\n\nda"
        );
        assert_eq!((tap.seen.error.as_deref(), tap.seen.complete), (Some("no"), false));
        let mut tap = Tap::new(false);
        assert!(tap.pass(vec![b'a'; LIMIT_BYTES + 1].into()).is_err());
    }

    #[test]
    fn other_apis_count_in_their_own_words() {
        let message = "data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":7}}\n\n\
                       event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";
        let mut tap = Tap::new(false);
        passed(&mut tap, message, 1000);
        assert_eq!((tap.seen.usage.completion_tokens, tap.seen.complete), (Some(7), true));
        assert_eq!(tap.seen.finish.as_deref(), Some("end_turn"));
        let response = "data: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":4,\"output_tokens\":1}}}\n\n";
        let mut tap = Tap::new(false);
        passed(&mut tap, response, 1000);
        assert_eq!((tap.seen.usage.prompt_tokens, tap.seen.usage.completion_tokens), (Some(4), Some(1)));
    }
}

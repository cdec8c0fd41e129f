//! Streams of OpenAI's Responses API, completed: llama-server leaves out which output an event belongs to and the number of the
//! event, and OpenAI's own clients need both (`openai-python` 3.54, `lib/streaming/responses`).

use bytes::{Bytes, BytesMut};
use serde_json::Value as Json;

/// Outputs of one answer that are told apart at most: messages, reasoning and calls of tools.
const LIMIT_ITEMS: usize = 1024;
/// Beginnings of the types of events that belong to a part of an output's content.
const OF_CONTENT: &[&str] =
    &["response.content_part.", "response.output_text.", "response.refusal.", "response.reasoning_text."];

/// Numbers the events of one answer.
#[derive(Debug, Default)]
pub struct Numbering {
    events: u64,
    /// The ids of the outputs, in the order of their appearance.
    items: Vec<String>,
}

impl Numbering {
    /// The same events with all members. `events`: whole ones.
    pub fn complete(&mut self, events: &Bytes) -> Bytes {
        let mut out = BytesMut::with_capacity(events.len() + events.len() / 4);
        for line in events.split_inclusive(|byte| *byte == b'\n') {
            let completed = line.strip_prefix(b"data: ").and_then(|data| self.event(data));
            match completed {
                Some(event) => out.extend_from_slice(format!("data: {event}\n").as_bytes()),
                None => out.extend_from_slice(line),
            }
        }
        out.freeze()
    }

    /// An event with all members; None when it is not one of this API.
    fn event(&mut self, data: &[u8]) -> Option<Json> {
        let mut event: Json = serde_json::from_slice(data).ok()?;
        let kind = event["type"].as_str().filter(|kind| kind.starts_with("response."))?.to_owned();
        let id = event["item_id"].as_str().or_else(|| event["item"]["id"].as_str()).map(str::to_owned);
        let mut set = |key: &str, value: usize| {
            if event[key].is_null() {
                event[key] = value.into();
            }
        };
        if let Some(index) = id.and_then(|id| self.index(id)) {
            set("output_index", index);
        }
        if OF_CONTENT.iter().any(|head| kind.starts_with(head)) {
            // llama-server gives a message one part.
            set("content_index", 0);
        }
        set("sequence_number", usize::try_from(self.events).unwrap_or(usize::MAX));
        self.events += 1;
        Some(event)
    }

    fn index(&mut self, id: String) -> Option<usize> {
        let known = self.items.iter().position(|item| *item == id);
        if known.is_none() && self.items.len() < LIMIT_ITEMS {
            self.items.push(id);
            return Some(self.items.len() - 1);
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(bytes: &[u8]) -> Vec<Json> {
        let text = std::str::from_utf8(bytes).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect()
    }

    #[test]
    fn events_get_their_numbers() {
        let stream = concat!(
            "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"r\"}}\n\n",
            "event: x\ndata: {\"type\":\"response.reasoning_text.delta\",\"item_id\":\"rs\",\"delta\":\"hm\"}\n\n",
            "event: x\ndata: {\"type\":\"response.output_item.added\",\"item\":{\"id\":\"msg\"}}\n\n",
            "event: x\ndata: {\"type\":\"response.output_text.delta\",\"item_id\":\"msg\",\"delta\":\"a\\n\"}\n\n",
            "event: x\ndata: {\"type\":\"response.output_item.done\",\"item\":{\"id\":\"rs\"},\"output_index\":7}\n\n",
        );
        let mut numbering = Numbering::default();
        let out = numbering.complete(&Bytes::from_static(stream.as_bytes()));
        assert!(out.starts_with(b"event: response.created\ndata: {") && out.ends_with(b"}\n\n"));
        let events = data(&out);
        let member = |key: &str| events.iter().map(|event| event[key].as_u64()).collect::<Vec<_>>();
        assert_eq!(member("sequence_number"), [0, 1, 2, 3, 4].map(Some));
        assert_eq!(member("output_index"), [None, Some(0), Some(1), Some(1), Some(7)], "what is there stays");
        assert_eq!(member("content_index"), [None, Some(0), None, Some(0), None]);
        assert_eq!(events[3]["delta"], "a\n");
    }

    #[test]
    fn everything_else_passes_as_it_came() {
        let stream =
            Bytes::from_static(b": waiting\n\ndata: {\"error\":{\"message\":\"no\"}}\n\ndata: [DONE]\n\ndata: {\n\n");
        assert_eq!(Numbering::default().complete(&stream), stream);
    }
}

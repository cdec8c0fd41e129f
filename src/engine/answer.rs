//! An answer as its events arrive: its text so far, bounded, and the times of its first and last pieces by our own clock.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::EngineError;
use super::conversation::{Event, Finish, Piece, ToolCall, ToolCallDelta, Usage};

/// Text, reasoning and tool calls of one answer together, in bytes.
const LIMIT_BYTES: usize = 64 << 20;
const LIMIT_TOOL_CALLS: usize = 1024;

/// A whole answer and the numbers that belong to it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Generated {
    /// The text of the answer.
    pub text: String,
    /// What a reasoning model wrote before its answer; empty for other models.
    pub reasoning: String,
    /// The tool calls of the answer, complete.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// Why the answer ended.
    pub finish: Finish,
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    pub completion_tokens: u64,
    /// Tokens of the first piece: 1 unless an engine holds text back.
    pub first_tokens: u64,
    /// Prompt tokens that were taken from a cache.
    pub cached_tokens: Option<u64>,
    /// Milliseconds that the engine spent on the prompt, by its own clock.
    pub prompt_ms: Option<f64>,
    /// Milliseconds that the engine spent on the answer, by its own clock.
    pub decode_ms: Option<f64>,
    /// Milliseconds from sending the request to the first piece, by our clock.
    pub first_token_ms: Option<f64>,
    /// Milliseconds from the first piece to the last token, by our clock. None with fewer than two pieces.
    pub streaming_ms: Option<f64>,
}

/// Collects the events of one answer.
#[derive(Debug)]
pub struct Answer {
    text: String,
    reasoning: String,
    tool_calls: Vec<ToolCall>,
    size_bytes: usize,
    began: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
    first_tokens: u64,
    /// As far as the pieces tell.
    tokens: u64,
    usage: Usage,
    finish: Option<Finish>,
}

impl Default for Answer {
    fn default() -> Self {
        Self::new()
    }
}

impl Answer {
    /// An empty answer whose clock starts now: call it before the request is sent.
    pub fn new() -> Self {
        Self {
            text: String::new(),
            reasoning: String::new(),
            tool_calls: Vec::new(),
            size_bytes: 0,
            began: Instant::now(),
            first: None,
            last: None,
            first_tokens: 0,
            tokens: 0,
            usage: Usage::default(),
            finish: None,
        }
    }

    /// Adds an event.
    ///
    /// # Errors
    /// When the answer is larger than 64 MiB.
    pub fn push(&mut self, event: &Event) -> Result<(), EngineError> {
        match event {
            Event::Usage(usage) => self.usage = *usage,
            // The last token often has no text.
            Event::End(finish) => (self.finish, self.last) = (Some(*finish), Some(Instant::now())),
            Event::Delta(delta) => {
                self.add(&delta.piece)?;
                let now = Instant::now();
                self.tokens = delta.tokens.unwrap_or(self.tokens + 1);
                if self.first.is_none() {
                    (self.first, self.first_tokens) = (Some(now), self.tokens);
                }
                self.last = Some(now);
            }
        }
        Ok(())
    }

    fn add(&mut self, piece: &Piece) -> Result<(), EngineError> {
        let too_large = || EngineError::Unanswered(format!("the answer is larger than {LIMIT_BYTES} bytes"));
        let new = match piece {
            Piece::Text(new) | Piece::Reasoning(new) => new,
            Piece::ToolCall(call) => &call.arguments,
        };
        self.size_bytes += new.len();
        if self.size_bytes > LIMIT_BYTES {
            return Err(too_large());
        }
        match piece {
            Piece::Text(new) => self.text.push_str(new),
            Piece::Reasoning(new) => self.reasoning.push_str(new),
            Piece::ToolCall(call) if call.index >= LIMIT_TOOL_CALLS => return Err(too_large()),
            Piece::ToolCall(call) => self.add_to_call(call),
        }
        Ok(())
    }

    fn add_to_call(&mut self, new: &ToolCallDelta) {
        if self.tool_calls.len() <= new.index {
            self.tool_calls.resize(new.index + 1, ToolCall::default());
        }
        let call = &mut self.tool_calls[new.index];
        if let Some(id) = &new.id {
            call.id.clone_from(id);
        }
        if let Some(name) = &new.name {
            call.name.clone_from(name);
        }
        call.arguments.push_str(&new.arguments);
    }

    /// The user stopped it: what there is so far is the answer.
    pub fn cancel(&mut self) {
        self.finish = Some(Finish::Cancelled);
    }

    /// The whole answer.
    ///
    /// # Errors
    /// [`EngineError::Unanswered`] when its end, or the number of its tokens, was never told.
    pub fn into_generated(self) -> Result<Generated, EngineError> {
        let unanswered = |why: &str| EngineError::Unanswered(why.to_owned());
        let finish = self.finish.ok_or_else(|| unanswered("the stream ended in the middle of the answer"))?;
        let counted = match self.usage.completion_tokens {
            _ if finish == Finish::Cancelled => Some(self.tokens),
            counted => counted,
        };
        let elapsed = |from: Option<Instant>, to: Option<Instant>| Some(ms(to?.duration_since(from?)));
        Ok(Generated {
            finish,
            prompt_tokens: self.usage.prompt_tokens.unwrap_or(0),
            completion_tokens: counted.ok_or_else(|| unanswered("the stream ended without a count of its tokens"))?,
            first_tokens: self.first_tokens.max(1),
            cached_tokens: self.usage.cached_tokens,
            prompt_ms: self.usage.prompt_ms,
            decode_ms: self.usage.decode_ms,
            first_token_ms: elapsed(Some(self.began), self.first),
            streaming_ms: elapsed(self.first, self.last).filter(|ms| *ms > 0.0),
            text: self.text,
            reasoning: self.reasoning,
            tool_calls: self.tool_calls,
        })
    }
}

/// A duration in milliseconds.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::conversation::Delta;

    fn delta(piece: Piece) -> Event {
        Event::Delta(Delta { piece, tokens: None })
    }

    fn call(index: usize, id: Option<&str>, arguments: &str) -> Event {
        let id = id.map(str::to_owned);
        let name = id.as_ref().map(|_| "f".to_owned());
        delta(Piece::ToolCall(ToolCallDelta { index, id, name, arguments: arguments.to_owned() }))
    }

    #[test]
    fn tool_calls_are_put_together() {
        let mut answer = Answer::new();
        let usage = Usage { completion_tokens: Some(9), ..Usage::default() };
        for event in [
            call(0, Some("a"), "{\"x\""),
            call(1, Some("b"), "{}"),
            call(0, None, ":1}"),
            Event::End(Finish::ToolCalls),
            Event::Usage(usage),
        ] {
            answer.push(&event).unwrap();
        }
        let answer = answer.into_generated().unwrap();
        let calls: Vec<_> = answer.tool_calls.iter().map(|call| (&*call.id, &*call.name, &*call.arguments)).collect();
        assert_eq!(calls, [("a", "f", "{\"x\":1}"), ("b", "f", "{}")]);
        assert_eq!((answer.completion_tokens, answer.finish), (9, Finish::ToolCalls));
        assert!(Answer::new().push(&call(usize::MAX, None, "")).is_err());
    }

    #[test]
    fn an_answer_without_its_end_or_its_number_of_tokens_is_none() {
        let mut answer = Answer::new();
        answer.push(&delta(Piece::Text("x".to_owned()))).unwrap();
        assert!(answer.into_generated().is_err());
        let mut answer = Answer::new();
        answer.push(&Event::End(Finish::Stop)).unwrap();
        assert!(answer.into_generated().is_err());
        let mut answer = Answer::new();
        answer.push(&delta(Piece::Reasoning("x".to_owned()))).unwrap();
        answer.cancel();
        let answer = answer.into_generated().unwrap();
        assert_eq!((&*answer.reasoning, answer.completion_tokens, answer.finish), ("x", 1, Finish::Cancelled));
    }
}

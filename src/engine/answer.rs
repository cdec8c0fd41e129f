//! An answer as it comes in: its text so far, bounded, and when its first and last pieces came by our own clock.

use std::time::{Duration, Instant};

use super::{EngineError, Piece};

/// The text of one answer at most, in bytes.
const LIMIT_BYTES: usize = 64 << 20;

/// Takes the pieces; false when it has had enough.
pub type Sink<'a> = dyn FnMut(Piece<'_>) -> bool + 'a;

#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub thought: String,
    began: Instant,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Answer {
    /// The clock starts now, before the request is sent.
    pub fn new() -> Self {
        Self { text: String::new(), thought: String::new(), began: Instant::now(), first: None, last: None }
    }

    /// Keeps a piece and hands it on; an empty one is none. False when the sink has had enough.
    ///
    /// # Errors
    /// When the answer is larger than any answer.
    pub fn push(&mut self, piece: Piece<'_>, sink: &mut Sink<'_>) -> Result<bool, EngineError> {
        let (kept, new) = match piece {
            Piece::Text(new) => (&mut self.text, new),
            Piece::Thought(new) => (&mut self.thought, new),
        };
        if new.is_empty() {
            return Ok(true);
        }
        if kept.len() + new.len() > LIMIT_BYTES {
            return Err(EngineError::Unanswered(format!("the answer is larger than {LIMIT_BYTES} bytes")));
        }
        kept.push_str(new);
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        Ok(sink(piece))
    }

    pub fn has_begun(&self) -> bool {
        self.first.is_some()
    }

    /// The engine says that it is over: its last token (often one without text) came now.
    pub fn ended(&mut self) {
        self.last = Some(Instant::now());
    }

    pub fn first_token_ms(&self) -> Option<f64> {
        Some(ms(self.first?.duration_since(self.began)))
    }

    pub fn streaming_ms(&self) -> Option<f64> {
        Some(ms(self.last?.duration_since(self.first?))).filter(|ms| *ms > 0.0)
    }
}

impl Default for Answer {
    fn default() -> Self {
        Self::new()
    }
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

//! A parser for server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>), the format in which
//! engines stream answers. Comments (keep-alive pings), event names and ids are ignored.

/// The longest line and the largest event that are accepted, in bytes.
pub const LIMIT_BYTES: usize = 4 << 20;

/// Why a stream of events cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum SseError {
    #[error("an event is larger than {LIMIT_BYTES} bytes")]
    TooLarge,
    #[error("an event is not UTF-8")]
    NotText,
}

/// The state between two reads: the unfinished line and the unfinished event.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    data: String,
    has_data: bool,
}

impl Parser {
    /// Reads the next bytes, which may end anywhere, and returns the data of every event that they complete.
    ///
    /// # Errors
    /// [`SseError`]; nothing more can be read then.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, SseError> {
        let mut events = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + part.len() > LIMIT_BYTES {
                return Err(SseError::TooLarge);
            }
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                events.extend(self.take_line(&line)?);
            }
        }
        Ok(events)
    }

    fn take_line(&mut self, line: &[u8]) -> Result<Option<String>, SseError> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            let whole = std::mem::take(&mut self.has_data);
            return Ok(Some(std::mem::take(&mut self.data)).filter(|_| whole));
        }
        let Some(value) = line.strip_prefix(b"data:") else { return Ok(None) };
        let value = str::from_utf8(value.strip_prefix(b" ").unwrap_or(value)).map_err(|_| SseError::NotText)?;
        if self.data.len() + value.len() > LIMIT_BYTES {
            return Err(SseError::TooLarge);
        }
        if self.has_data {
            self.data.push('\n');
        }
        self.data.push_str(value);
        self.has_data = true;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_anywhere_the_events_are_the_same() {
        let text =
            ": ping\r\n\r\nevent: x\ndata: {\"é\":1}\n\ndata:a\ndata:  b\r\nid: 3\r\n\r\ndata\n\ndata:\n\n".as_bytes();
        let expected = ["{\"é\":1}", "a\n b", ""];
        for size in 1..text.len() {
            let mut events = Parser::default();
            let mut all = Vec::new();
            for part in text.chunks(size) {
                all.extend(events.push(part).unwrap());
            }
            assert_eq!(all, expected, "in parts of {size}");
        }
    }

    #[test]
    fn endless_lines_and_events_are_refused() {
        let mut events = Parser::default();
        let part = vec![b'x'; 1 << 20];
        assert!((0..8).any(|_| events.push(&part) == Err(SseError::TooLarge)));
        let mut events = Parser::default();
        let line = [b"data:", &part[..], b"\n"].concat();
        assert!((0..8).any(|_| events.push(&line) == Err(SseError::TooLarge)));
        assert_eq!(Parser::default().push(b"data: \xff\n\n"), Err(SseError::NotText));
    }

    #[test]
    fn an_event_without_its_blank_line_is_no_event() {
        assert_eq!(Parser::default().push(b"data: half\n"), Ok(vec![]));
    }
}

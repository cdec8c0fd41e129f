//! Server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>), as engines stream answers.
//! Bytes in as they come, the `data` of whole events out. Comments (keep-alive pings), names and ids are passed over.

/// The longest line and the largest event that are taken, in bytes.
pub const LIMIT_BYTES: usize = 4 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    #[error("an event is larger than {LIMIT_BYTES} bytes")]
    TooLarge,
    #[error("an event is not UTF-8")]
    NotText,
}

#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: String,
    has_data: bool,
}

impl Events {
    /// Takes the next bytes, which may end anywhere; gives the data of every event that they complete.
    ///
    /// # Errors
    /// [`StreamError`]; the stream is then of no use.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, StreamError> {
        let mut events = Vec::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + part.len() > LIMIT_BYTES {
                return Err(StreamError::TooLarge);
            }
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                events.extend(self.take_line(&line)?);
            }
        }
        Ok(events)
    }

    fn take_line(&mut self, line: &[u8]) -> Result<Option<String>, StreamError> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            let whole = std::mem::take(&mut self.has_data);
            return Ok(Some(std::mem::take(&mut self.data)).filter(|_| whole));
        }
        let Some(value) = line.strip_prefix(b"data:") else { return Ok(None) };
        let value = str::from_utf8(value.strip_prefix(b" ").unwrap_or(value)).map_err(|_| StreamError::NotText)?;
        if self.data.len() + value.len() > LIMIT_BYTES {
            return Err(StreamError::TooLarge);
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
            let mut events = Events::default();
            let mut all = Vec::new();
            for part in text.chunks(size) {
                all.extend(events.push(part).unwrap());
            }
            assert_eq!(all, expected, "in parts of {size}");
        }
    }

    #[test]
    fn endless_lines_and_events_are_refused() {
        let mut events = Events::default();
        let part = vec![b'x'; 1 << 20];
        assert!((0..8).any(|_| events.push(&part) == Err(StreamError::TooLarge)));
        let mut events = Events::default();
        let line = [b"data:", &part[..], b"\n"].concat();
        assert!((0..8).any(|_| events.push(&line) == Err(StreamError::TooLarge)));
        assert_eq!(Events::default().push(b"data: \xff\n\n"), Err(StreamError::NotText));
    }

    #[test]
    fn an_event_without_its_blank_line_is_no_event() {
        assert_eq!(Events::default().push(b"data: half\n"), Ok(vec![]));
    }
}

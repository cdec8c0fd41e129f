//! Answers as they are written to a terminal or a pipe, for `run` and `chat`.

use std::io::{self, Write as _};

use super::output::Output;
use crate::engine::conversation::Piece;

/// Writes the answer as it arrives: text to stdout, a model's reasoning to stderr.
#[derive(Debug)]
pub struct Said<'o> {
    output: &'o Output,
    ends_line: bool,
    /// Whether stdout is still open.
    open: bool,
}

impl<'o> Said<'o> {
    /// Nothing was written yet.
    pub fn new(output: &'o Output) -> Self {
        Self { output, ends_line: true, open: true }
    }

    /// Writes a piece. False once nobody reads any more.
    pub fn piece(&mut self, piece: &Piece) -> bool {
        match piece {
            Piece::Text(text) => {
                self.open = self.output.text(text);
                self.ends_line = text.ends_with('\n');
            }
            Piece::Reasoning(_) if self.output.json => {}
            Piece::Reasoning(text) => {
                let _ = io::stderr().lock().write_all(text.as_bytes());
            }
            // `run` offers the model no tools.
            Piece::ToolCall(_) => {}
        }
        self.open
    }

    /// Ends the last line.
    pub fn end(&mut self) {
        if !self.ends_line && self.open && !self.output.json {
            self.output.text("\n");
        }
    }
}

//! stdout and stderr. A reader that goes away (`aitools status | head -1`) is no error.

use std::io::{self, IsTerminal as _, Write};
use std::sync::Arc;

use serde::Serialize;
use serde_json::json;

use crate::base::diagnostic::Diagnostic;
use crate::ops::Failure;
use crate::report::Reporter;

use super::args::{Color, Global};
use super::failure::Told;
use super::{jsonl, snippet, terminal};

/// How this run speaks.
#[derive(Debug)]
pub struct Output {
    pub json: bool,
    quiet: bool,
    colour: bool,
    bars: bool,
}

/// Version of the JSON that commands print: counted up when a field changes its meaning or goes.
const JSON_VERSION: u32 = 1;

fn write_all(mut to: impl Write, text: &str) -> bool {
    to.write_all(text.as_bytes()).and_then(|()| to.flush()).is_ok()
}

impl Output {
    #[expect(clippy::disallowed_methods, reason = "colour is decided before the session reads the environment")]
    pub fn new(global: &Global) -> Self {
        let terminal = io::stderr().is_terminal();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colour = match global.color.unwrap_or(Color::Auto) {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && !plain,
        };
        Self { json: global.json, quiet: global.quiet, colour, bars: terminal && !global.quiet }
    }

    /// Who tells of progress.
    pub fn reporter(&self) -> Arc<dyn Reporter> {
        if self.json {
            Arc::new(jsonl::Lines::default())
        } else if self.bars {
            Arc::new(terminal::Bars::new(self.colour))
        } else {
            Arc::new(terminal::Plain::new(self.quiet))
        }
    }

    /// Data for people, to stdout. Says whether somebody still reads.
    pub fn text(&self, text: &str) -> bool {
        self.json || write_all(io::stdout().lock(), text)
    }

    /// A line for people, to stderr.
    pub fn say(&self, line: &str) {
        if !self.json && !self.quiet {
            write_all(io::stderr().lock(), &format!("{line}\n"));
        }
    }

    /// The result, as the one object of `--json`.
    pub fn result(&self, command: &str, ok: bool, result: &impl Serialize) {
        if self.json {
            let object = json!({ "version": JSON_VERSION, "command": command, "ok": ok, "result": result });
            write_all(io::stdout().lock(), &format!("{object}\n"));
        }
    }

    /// Warnings found on the way.
    pub fn warnings(&self, warnings: &[Diagnostic]) {
        if !warnings.is_empty() && !self.quiet && !self.json {
            write_all(io::stderr().lock(), &snippet::render(warnings, self.colour));
        }
    }

    /// What went wrong, and the exit code.
    pub fn failure(&self, command: &str, told: &Told, failure: &Failure) -> u8 {
        if self.json {
            let object = json!({ "version": JSON_VERSION, "command": command, "ok": false, "error": told });
            write_all(io::stdout().lock(), &format!("{object}\n"));
        } else if let Failure::Input(problems) = failure {
            write_all(io::stderr().lock(), &snippet::render(&problems.0, self.colour));
        } else {
            write_all(io::stderr().lock(), &told.to_text(self.colour));
        }
        told.exit_code
    }
}

/// clap's complaint.
pub fn usage(error: &clap::Error, json: bool) -> u8 {
    if json {
        let message = error.to_string();
        let error = json!({ "kind": "usage", "exit_code": 2, "message": message.trim() });
        let object = json!({ "version": JSON_VERSION, "command": null, "ok": false, "error": error });
        write_all(io::stdout().lock(), &format!("{object}\n"));
    } else {
        let _ = error.print();
    }
    2
}

/// Help or version, to stdout.
pub fn help(error: &clap::Error) {
    let _ = error.print();
}

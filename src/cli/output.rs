//! stdout and stderr. A reader that closes the pipe (`aitools status | head -1`) is not an error; other lost output is one, which
//! [`Output::end`] reports.

use std::cell::RefCell;
use std::io::{self, IsTerminal as _, Write};
use std::sync::Arc;

use serde::Serialize;
use serde_json::json;

use crate::base::diagnostic::Diagnostic;
use crate::ops::Failure;
use crate::report::Reporter;

use super::args::{Color, Global};
use super::exit;
use super::failure::ErrorReport;
use super::invocation::Invocation;
use super::{jsonl, snippet, terminal};

/// How this run speaks.
#[derive(Debug)]
pub struct Output {
    /// Print one JSON object instead of text.
    pub json: bool,
    quiet: bool,
    colour: bool,
    bars: bool,
    invocation: Invocation,
    /// Why output to stdout was lost, the first time.
    lost: RefCell<Option<io::Error>>,
}

/// Version of the JSON that commands print: counted up when a field changes its meaning or goes.
const JSON_VERSION: u32 = 1;

fn write_all(mut to: impl Write, text: &str) -> io::Result<()> {
    to.write_all(text.as_bytes())?;
    to.flush()
}

/// stderr has nowhere to report its own failures.
fn write_stderr(text: &str) {
    let _ = write_all(io::stderr().lock(), text);
}

impl Output {
    /// Decides about colour, progress and JSON from the global options and the environment.
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
        Self {
            json: global.json,
            quiet: global.quiet,
            colour,
            bars: terminal && !global.quiet,
            invocation: Invocation::new(global),
            lost: RefCell::default(),
        }
    }

    /// The reporter of progress.
    pub fn reporter(&self) -> Arc<dyn Reporter> {
        if self.json {
            Arc::new(jsonl::Lines::default())
        } else if self.bars {
            Arc::new(terminal::Bars::new(self.colour))
        } else {
            Arc::new(terminal::Plain::new(self.quiet))
        }
    }

    /// The same text, suggested commands completed with the `-m` and `-C` of this run.
    pub fn complete(&self, text: &str) -> String {
        self.invocation.complete(text)
    }

    fn stdout(&self, text: &str) -> bool {
        match write_all(io::stdout().lock(), text) {
            Ok(()) => true,
            Err(error) => {
                if error.kind() != io::ErrorKind::BrokenPipe {
                    self.lost.borrow_mut().get_or_insert(error);
                }
                false
            }
        }
    }

    /// Prints data for people to stdout. False once it cannot be written any more.
    pub fn text(&self, text: &str) -> bool {
        self.json || self.stdout(text)
    }

    /// Prints a line for people to stderr, its suggested commands completed.
    pub fn say(&self, line: &str) {
        if !self.json && !self.quiet {
            write_stderr(&format!("{}\n", self.complete(line)));
        }
    }

    /// The exit code of this run, given that of the command: output that was lost makes any success a failure.
    pub fn end(&self, code: u8) -> u8 {
        match &*self.lost.borrow() {
            Some(error) if matches!(code, exit::DONE | exit::CONDITION | exit::INTERRUPTED) => {
                write_stderr(&format!("error: cannot write to standard output: {error}\n"));
                exit::MACHINE
            }
            _ => code,
        }
    }

    /// Prints the result as the one object of `--json`.
    pub fn result(&self, command: &str, ok: bool, result: &impl Serialize) {
        if self.json {
            let object = json!({ "version": JSON_VERSION, "command": command, "ok": ok, "result": result });
            self.stdout(&format!("{object}\n"));
        }
    }

    /// Prints one event of a command that goes on, as a line of `--json`.
    pub fn event(&self, command: &str, event: &impl Serialize) {
        let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(event) else { return };
        let mut object = json!({ "version": JSON_VERSION, "command": command });
        if let Some(object) = object.as_object_mut() {
            object.extend(fields);
        }
        self.stdout(&format!("{object}\n"));
    }

    /// Prints warnings found on the way.
    pub fn warnings(&self, warnings: &[Diagnostic]) {
        if !warnings.is_empty() && !self.quiet && !self.json {
            write_stderr(&self.complete(&snippet::render(warnings, self.colour)));
        }
    }

    /// Prints why a command failed, and gives the exit code.
    pub fn failure(&self, command: &str, failure: &Failure) -> u8 {
        let report = ErrorReport::of(failure).completed(&self.invocation);
        if self.json {
            let object = json!({ "version": JSON_VERSION, "command": command, "ok": false, "error": report });
            self.stdout(&format!("{object}\n"));
        } else if let Failure::Input(problems) = failure {
            write_stderr(&self.complete(&snippet::render(&problems.0, self.colour)));
        } else {
            write_stderr(&report.to_text(self.colour));
        }
        report.exit_code
    }
}

/// Says that a second signal has ended everything.
pub fn ended_at_once() {
    write_stderr("\nended at once: a later run continues or removes what is unfinished\n");
}

/// Prints clap's usage error and gives the exit code.
pub fn usage(error: &clap::Error, json: bool) -> u8 {
    if json {
        let message = error.to_string();
        let error = json!({ "kind": "usage", "exit_code": 2, "message": message.trim() });
        let object = json!({ "version": JSON_VERSION, "command": null, "ok": false, "error": error });
        let _ = write_all(io::stdout().lock(), &format!("{object}\n"));
    } else {
        let _ = error.print();
    }
    exit::USAGE
}

/// Prints help or the version to stdout and gives the exit code.
pub fn help(error: &clap::Error) -> u8 {
    match error.print().and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => exit::MACHINE,
        _ => exit::DONE,
    }
}

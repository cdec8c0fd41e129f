//! `aitools chat`, and `aitools run` on a terminal without a prompt.

use std::path::Path;
use std::time::Instant;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::json;

use crate::cli::args;
use crate::cli::exit;
use crate::cli::output::Output;
use crate::cli::said::Said;
use crate::cli::settings::Session;
use crate::engine::Ready;
use crate::engine::backend::Supervision;
use crate::engine::conversation::Finish;
use crate::ops::chat::{self, Chat};
use crate::ops::{Failure, Host, Project, ready, serve};

const HELP: &str = "/system TEXT   replace the system prompt
/reset         forget the conversation
/save FILE     write the conversation as JSON
/bye           end (or Ctrl-D)
Ctrl-C stops an answer; three double quotes begin and end a text of several lines.
";

/// # Errors
/// What is wrong with policy, model or engine.
pub fn run(ask: &args::Chat, session: &Session<'_>, output: &Output) -> Result<u8, Failure> {
    let mut project = super::load(session, output)?;
    let name = project.include(&ask.policy, &session.cwd)?;
    let host = session.host(&project.root, Some(&ask.build))?;
    let file = project.policy(&name)?;
    super::require_text(file)?;
    let (ready, warnings) = ready::ready(&host, &project, file)?;
    host.store.save_records()?;
    output.warnings(&warnings);
    talk(&host, &project, ready, session, output)
}

/// Talks until the user ends it.
///
/// # Errors
/// When the engine does not start.
pub fn talk(
    host: &Host,
    project: &Project,
    ready: Ready,
    session: &Session<'_>,
    output: &Output,
) -> Result<u8, Failure> {
    let gateway = serve::running(&project.root).ok();
    let (state, staging) = (project.make_state_dir()?, host.store.stage()?);
    let env = host.engine_env();
    let supervision = Supervision {
        driver: Some(&host.driver),
        env: &env,
        scratch: staging.path(),
        log: &state.join(format!("{}.log", ready.name)),
        deadline: Instant::now() + ready.policy.runtime.time_limit(),
    };
    let policy = ready.name.clone();
    let through = gateway.as_ref().map_or("an engine started for this chat".to_owned(), |found| found.url.clone());
    let mut chat =
        Chat::open(ready, gateway.as_ref(), &supervision, &host.task).map_err(|error| Failure::run(&policy, error))?;
    output.say(&format!("chat with {policy} ({through}); /help lists the commands, Ctrl-D ends"));
    let turns = converse(&mut chat, host, session, output)?;
    output.result("chat", true, &json!({ "policy": policy, "turns": turns }));
    Ok(exit::DONE)
}

/// Reads and answers until the end. Gives the number of answers.
fn converse(chat: &mut Chat, host: &Host, session: &Session<'_>, output: &Output) -> Result<u32, Failure> {
    let mut editor = DefaultEditor::new().map_err(|error| terminal(&error))?;
    let mut turns = 0;
    loop {
        let text = match read(&mut editor) {
            Ok(text) => text,
            Err(ReadlineError::Interrupted) => {
                output.say("Ctrl-D or /bye ends the chat");
                continue;
            }
            Err(ReadlineError::Eof) => return Ok(turns),
            Err(error) => return Err(terminal(&error)),
        };
        let text = text.trim();
        let _ = editor.add_history_entry(text);
        match text.split_once(' ').unwrap_or((text, "")) {
            ("", _) => {}
            ("/bye" | "/exit" | "/quit", _) => return Ok(turns),
            ("/help" | "/?", _) => drop(output.text(HELP)),
            ("/reset" | "/clear", _) => chat.reset(),
            ("/system", new) => chat.set_system(new),
            ("/save", file) => save(chat, file, session, output),
            (command, _) if command.starts_with('/') => {
                output.say(&format!("there is no `{command}`; /help lists the commands"))
            }
            _ => {
                turns += u32::from(answer(chat, text, host, output));
            }
        }
    }
}

fn terminal(error: &ReadlineError) -> Failure {
    Failure::Usage { what: format!("cannot read from the terminal: {error}"), hint: None }
}

/// One line, or several between lines of `"""`.
fn read(editor: &mut DefaultEditor) -> Result<String, ReadlineError> {
    let first = editor.readline("> ")?;
    let Some(rest) = first.trim_start().strip_prefix("\"\"\"") else { return Ok(first) };
    let mut text = rest.to_owned();
    while !text.trim_end().ends_with("\"\"\"") {
        text.push('\n');
        text.push_str(&editor.readline(". ")?);
    }
    Ok(text.trim_end().trim_end_matches("\"\"\"").to_owned())
}

fn save(chat: &Chat, file: &str, session: &Session<'_>, output: &Output) {
    if file.is_empty() {
        return output.say("name a file: /save chat.json");
    }
    match chat::save(chat.messages(), &session.cwd.join(Path::new(file))) {
        Ok(()) => output.say(&format!("saved to {file}")),
        Err(failure) => output.say(&format!("error: {failure}")),
    }
}

/// One turn. False when it failed, which the user is told.
fn answer(chat: &mut Chat, text: &str, host: &Host, output: &Output) -> bool {
    let cancel = host.task.cancel();
    // A Ctrl-C before this turn was not meant for it.
    cancel.take();
    let mut said = Said::new(output);
    let answered = chat.say(text, cancel, &mut |piece| said.piece(piece));
    said.end();
    cancel.take();
    match answered {
        Ok(answer) => {
            if answer.finish == Finish::Cancelled {
                output.say("(stopped)");
            }
            true
        }
        Err(error) => {
            output.say(&format!("error: {error}"));
            false
        }
    }
}

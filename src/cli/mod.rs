//! Layer 6: words and terminal. The only place that prints, reads the environment or picks an exit code.
//!
//! One file per verb under `verbs/`. Data goes to stdout, everything else to stderr.

pub mod args;
pub mod exit;
pub mod failure;
pub mod internal;
pub mod invocation;
pub mod jsonl;
pub mod output;
pub mod prompt;
pub mod said;
pub mod settings;
pub mod snippet;
pub mod terminal;
pub mod verbs;
pub mod wording;

use std::process::ExitCode;

use clap::Parser as _;

use crate::base::cancel::Cancel;
use crate::base::process;

use args::{Args, Command};
use output::Output;
use settings::Session;

/// Runs the program: reads arguments and environment, carries out one command, and prints its result.
pub fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|first| first == "internal") {
        return exit_code(internal::run(&words.collect::<Vec<_>>()));
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    let cancel = Cancel::default();
    let on_signal = cancel.clone();
    // This is the only handler. Without it a signal ends the program at once, which is safe as well.
    let _ = ctrlc::set_handler(move || interrupted(&on_signal));
    let output = Output::new(&args.global);
    let code = match dispatch(&args, &output, cancel) {
        Ok(code) => code,
        Err(failure) => output.failure(args.command.name(), &failure),
    };
    ExitCode::from(output.end(code))
}

/// The first signal asks everything to end; the second one ends everything. What is unfinished then is swept or continued by a
/// later run, as after a kill.
#[expect(
    clippy::exit,
    clippy::disallowed_methods,
    reason = "the user does not want to wait for anything, not even for `main`"
)]
fn interrupted(cancel: &Cancel) {
    if cancel.is_cancelled() {
        process::kill_all();
        output::ended_at_once();
        std::process::exit(exit::INTERRUPTED.into());
    }
    cancel.cancel();
}

/// The exit code of a hidden command.
fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Help and version go to stdout and are a success; a usage error goes to stderr.
fn usage(error: &clap::Error) -> ExitCode {
    if error.use_stderr() {
        let json = std::env::args_os().any(|arg| arg == "--json");
        return ExitCode::from(output::usage(error, json));
    }
    ExitCode::from(output::help(error))
}

fn dispatch(args: &Args, output: &Output, cancel: Cancel) -> Result<u8, crate::ops::Failure> {
    let session = Session::new(&args.global, output.reporter(), cancel)?;
    match &args.command {
        Command::Init(ask) => verbs::init::run(ask, &session, output),
        Command::Lock(ask) => verbs::lock::run(ask, &session, output),
        Command::Sync(ask) => verbs::sync::run(ask, &session, output),
        Command::Check(ask) => verbs::check::run(ask, &session, output),
        Command::Verify(ask) => verbs::verify::run(ask, &session, output),
        Command::Reproduce(ask) => verbs::reproduce::run(ask, &session, output),
        Command::Run(ask) => verbs::run::run(ask, &session, output),
        Command::Ci(ask) => verbs::ci::run(ask, &session, output),
        Command::Test(ask) => verbs::test::run(ask, &session, output),
        Command::Serve(ask) => verbs::serve::run(ask, &session, output),
        Command::Chat(ask) => verbs::chat::run(ask, &session, output),
        Command::Ps => verbs::ps::run(&session, output),
        Command::Stop(ask) => verbs::stop::run(ask, &session, output),
        Command::Status(ask) => verbs::status::run(ask, &session, output),
        Command::Export(ask) => verbs::export::run(ask, &session, output),
        Command::Diff(ask) => verbs::diff::run(ask, &session, output),
        Command::Cache(ask) => verbs::cache::run(ask, &session, output),
        Command::Bundle(ask) => verbs::bundle::run(ask, &session, output),
        Command::Doctor => verbs::doctor::run(&session, output),
        Command::Schema(ask) => verbs::schema::run(ask, output),
        Command::Completions(ask) => verbs::completions::run(ask, output),
    }
}

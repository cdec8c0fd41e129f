//! Where the prompt of `run` comes from: `--prompt`, `--prompt-file` and standard input.

use std::io::{self, IsTerminal as _, Read as _};
use std::path::Path;

use crate::base::fs;
use crate::ops::Failure;

use super::args;
use super::wording::size;

/// Prompts that are longer than any context holds are refused.
const MAX_PROMPT_BYTES: u64 = 16 << 20;

/// What standard input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stdin {
    Terminal,
    /// A pipe or a file: what it holds is meant for this program.
    Piped,
    /// Anything else, such as `/dev/null` or a socket of a supervisor.
    Other,
}

/// Whether a conversation is meant: there is no prompt, and a person at a terminal.
pub fn is_chat(ask: &args::Run) -> bool {
    let terminal = matches!(stdin_kind(), Stdin::Terminal) && io::stdout().is_terminal();
    terminal && ask.prompt.is_none() && ask.prompt_file.is_none()
}

/// Reads the prompt. What is piped in beside `--prompt` or `--prompt-file` is appended after an empty line.
///
/// # Errors
/// [`Failure::Usage`] when there is no prompt, or it is empty, too large or not UTF-8.
pub fn read(ask: &args::Run, cwd: &Path) -> Result<String, Failure> {
    let dash = |path: &Path| path == Path::new("-");
    let given = match (&ask.prompt, &ask.prompt_file) {
        (Some(text), _) if text != "-" => Some(text.clone()),
        (None, Some(path)) if !dash(path) => Some(file(&cwd.join(path))?),
        _ => None,
    };
    let asked_for = ask.prompt.is_some() || ask.prompt_file.is_some();
    let piped = match (stdin_kind(), &given) {
        (Stdin::Piped, _) => Some(stdin()?),
        (_, None) if asked_for => Some(stdin()?),
        (Stdin::Other, None) => Some(stdin()?),
        _ => None,
    };
    joined(given, piped)
}

fn joined(given: Option<String>, piped: Option<String>) -> Result<String, Failure> {
    let usage = |what: &str| Failure::Usage {
        what: what.to_owned(),
        hint: Some("use `--prompt TEXT`, `--prompt-file FILE`, or pipe it in".to_owned()),
    };
    let prompt = match (given, piped) {
        (None, None) => return Err(usage("no prompt was given")),
        (Some(text), None) | (None, Some(text)) => text,
        (Some(text), Some(more)) if more.trim().is_empty() => text,
        (Some(text), Some(more)) => format!("{text}\n\n{more}"),
    };
    if prompt.trim().is_empty() { Err(usage("the prompt is empty")) } else { Ok(prompt) }
}

fn file(path: &Path) -> Result<String, Failure> {
    if !fs::exists(path) {
        let what = format!("there is no prompt file `{}`", path.display());
        return Err(Failure::Usage { what, hint: Some("use `-f -` for standard input".to_owned()) });
    }
    text(fs::read_bounded(path, MAX_PROMPT_BYTES)?)
}

fn stdin() -> Result<String, Failure> {
    text(read_stdin("the prompt", MAX_PROMPT_BYTES)?)
}

/// All of standard input, which is `what`.
///
/// # Errors
/// When it cannot be read, or is larger than the limit.
pub fn read_stdin(what: &str, limit_bytes: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let read = io::stdin().lock().take(limit_bytes + 1).read_to_end(&mut bytes);
    read.map_err(|error| fs::FsError::new("read", Path::new("stdin"), error))?;
    if bytes.len() as u64 > limit_bytes {
        let what = format!("{what} is larger than {}", size(limit_bytes));
        return Err(Failure::Usage { what, hint: None });
    }
    Ok(bytes)
}

fn text(bytes: Vec<u8>) -> Result<String, Failure> {
    String::from_utf8(bytes).map_err(|_| Failure::Usage { what: "the prompt is not UTF-8".to_owned(), hint: None })
}

fn stdin_kind() -> Stdin {
    if io::stdin().is_terminal() {
        Stdin::Terminal
    } else if is_pipe_or_file() {
        Stdin::Piped
    } else {
        Stdin::Other
    }
}

#[cfg(unix)]
fn is_pipe_or_file() -> bool {
    use rustix::fs::{FileType, fstat};
    let kind = fstat(io::stdin()).map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::RegularFile))
}

#[cfg(windows)]
fn is_pipe_or_file() -> bool {
    winapi_util::file::typ(io::stdin()).is_ok_and(|kind| kind.is_pipe() || kind.is_disk())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn u2_piped_text_is_appended_to_the_prompt() {
        assert_eq!(joined(some("Summarise this."), some("a text\n")).unwrap(), "Summarise this.\n\na text\n");
        assert_eq!(joined(some("hi"), some("\n")).unwrap(), "hi");
        assert_eq!(joined(None, some("a text\n")).unwrap(), "a text\n");
    }

    #[test]
    fn u3_an_empty_prompt_is_refused() {
        for (given, piped) in [(some(""), None), (some("  \n"), some("")), (None, some("")), (None, None)] {
            assert!(matches!(joined(given, piped), Err(Failure::Usage { .. })));
        }
    }
}

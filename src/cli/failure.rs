//! Maps each failure to a kind for programs, an exit code, a message and a hint. The matches are exhaustive: a new failure does not
//! compile until it has all four, and a test requires a snapshot of each kind.

use serde::Serialize;

use crate::base::diagnostic::Diagnostic;
use crate::base::fs::FsError;
use crate::base::name::Name;
use crate::base::process::ProcessError;
use crate::build::BuildError;
use crate::build::command::CommandError;
use crate::build::toolchain::ToolError;
use crate::engine::EngineError;
use crate::engine::backend::BackendError;
use crate::gateway::access::KeyError;
use crate::ops::Failure;
use crate::ops::failure::{Damaged, Staleness, Why};
use crate::ops::failure::{DeriveError, PythonError, ServeError};
use crate::ops::run::RunError;
use crate::source::SourceError;
use crate::store::StoreError;

use super::exit;
use super::invocation::Invocation;

/// An error as it is printed, or given to programs as JSON.
#[derive(Debug, Serialize)]
pub struct ErrorReport {
    /// Stable, for programs: `lock.stale`.
    pub kind: &'static str,
    /// The exit code of the program.
    pub exit_code: u8,
    /// What is wrong.
    pub message: String,
    /// More lines about it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<String>,
    /// What would be correct.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What was found instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual: Option<String>,
    /// What to do next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The problems in input files, when that is what is wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// A problem in an input file, for programs.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// `error` or `warning`.
    pub severity: &'static str,
    /// The file.
    pub file: Option<String>,
    /// The line, from 1.
    pub line: Option<usize>,
    /// The column, from 1, in characters.
    pub column: Option<usize>,
    /// What is wrong.
    pub message: String,
    /// What would be correct.
    pub expected: Option<String>,
    /// What was found instead.
    pub actual: Option<String>,
    /// What to do next.
    pub hint: Option<String>,
}

impl From<&Diagnostic> for Problem {
    fn from(diagnostic: &Diagnostic) -> Self {
        let at = diagnostic.place.as_ref().map(|place| place.source.line_column(place.span.start));
        Self {
            severity: if diagnostic.is_error() { "error" } else { "warning" },
            file: diagnostic.place.as_ref().map(|place| place.source.name.clone()),
            line: at.map(|(line, _)| line),
            column: at.map(|(_, column)| column),
            message: diagnostic.message.clone(),
            expected: diagnostic.expected.clone(),
            actual: diagnostic.actual.clone(),
            hint: diagnostic.hint.clone(),
        }
    }
}

impl ErrorReport {
    fn new(kind: &'static str, exit_code: u8, message: impl ToString) -> Self {
        let message = message.to_string();
        let (details, problems) = (Vec::new(), Vec::new());
        Self { kind, exit_code, message, details, expected: None, actual: None, hint: None, problems }
    }

    /// The same report, its suggested commands completed with the `-m` and `-C` of this run.
    #[must_use]
    pub fn completed(mut self, invocation: &Invocation) -> Self {
        let problems = self.problems.iter_mut().filter_map(|problem| problem.hint.as_mut());
        for text in self.hint.iter_mut().chain(&mut self.details).chain(problems) {
            *text = invocation.complete(text);
        }
        self
    }

    fn hint(mut self, hint: impl Into<Option<String>>) -> Self {
        self.hint = hint.into();
        self
    }

    fn details(mut self, details: Vec<String>) -> Self {
        self.details = details;
        self
    }

    fn compared(mut self, expected: impl ToString, actual: impl ToString) -> Self {
        self.expected = Some(expected.to_string());
        self.actual = Some(actual.to_string());
        self
    }

    /// The report on a failure.
    pub fn of(failure: &Failure) -> Self {
        if failure.is_interruption() {
            return Self::new("interrupted", exit::INTERRUPTED, "interrupted");
        }
        let message = failure.to_string();
        match failure {
            Failure::Cancelled(_) => Self::new("interrupted", exit::INTERRUPTED, message),
            Failure::Input(problems) => {
                let mut report = Self::new("input", exit::USAGE, message);
                report.problems = problems.0.iter().map(Problem::from).collect();
                report
            }
            Failure::Usage { hint, .. } => Self::new("usage", exit::USAGE, message).hint(hint.clone()),
            Failure::NoManifest { .. } => Self::new("manifest.missing", exit::USAGE, message)
                .hint("name one with `-m`, or run `aitools init` to start a project".to_owned()),
            Failure::NoLock { .. } => {
                Self::new("lock.missing", exit::CONDITION, message).hint("run `aitools lock`".to_owned())
            }
            Failure::Stale { entries, .. } => Self::new("lock.stale", exit::CONDITION, message)
                .details(entries.iter().map(super::wording::stale_line).collect())
                .hint(stale_hint(entries)),
            Failure::NotSynced { steps } => Self::new("not-synced", exit::CONDITION, message)
                .details(steps.iter().map(super::wording::step_line).collect())
                .hint("run `aitools sync`".to_owned()),
            Failure::Source { error, lock_line, .. } => source(error, message, lock_line.as_deref()),
            Failure::Bundle(error) => source(error, message, None),
            Failure::Store(error) => store(error, message, None),
            Failure::Integrity { error, lock_line, .. } => store(error, message, lock_line.as_deref()),
            Failure::Fs(error) => machine(error, message),
            Failure::Build { error, .. } => build(error, message),
            Failure::Toolchain { error, .. } => toolchain(error, message),
            Failure::Derive { error, .. } => derive(error, message),
            Failure::Recipe { .. } => Self::new("engine.recipe", exit::USAGE, message),
            Failure::Run { policy, error } => run(policy, error, message),
            Failure::Serve(error) => serve(error, message),
            Failure::Damaged { damages } => Self::new("integrity", exit::INTEGRITY, message)
                .details(damages.iter().map(damage_line).collect())
                .hint("run `aitools verify --repair`".to_owned()),
            Failure::NoSpace { .. } => Self::new("machine.no-space", exit::MACHINE, message).hint(
                "free some space, or name another folder with `--cache-dir` or `HF_HOME`; fetched data is kept"
                    .to_owned(),
            ),
        }
    }

    /// The report for people, as lines that end with a line feed.
    pub fn to_text(&self, colour: bool) -> String {
        let paint = |style: &str, text: &str| match colour {
            true => format!("\x1b[{style}m{text}\x1b[0m"),
            false => text.to_owned(),
        };
        let mut text = format!("{} {}\n", paint("1;31", "error:"), self.message);
        for line in &self.details {
            text += &format!("  {}\n", super::snippet::printable(line));
        }
        if let Some(expected) = &self.expected {
            text += &format!("  expected  {expected}\n");
        }
        if let Some(actual) = &self.actual {
            text += &format!("  actual    {actual}\n");
        }
        if let Some(hint) = &self.hint {
            text += &format!("  {} {hint}\n", paint("1;36", "hint:"));
        }
        text
    }
}

fn stale_hint(entries: &[Staleness]) -> String {
    let conflict = entries.iter().any(|entry| entry.why == Why::Conflict);
    let differs = entries.iter().find(|entry| entry.why == Why::Differs);
    let command = match differs {
        _ if conflict => "aitools lock --resolve-conflicts".to_owned(),
        Some(entry) => format!("aitools lock --upgrade {}", entry.name),
        None => "aitools lock".to_owned(),
    };
    format!("run `{command}` and commit the result")
}

/// Lines of an engine's output that are shown; the whole is in its log.
const SHOWN_LINES: usize = 20;

fn run(policy: &Name, error: &RunError, message: String) -> ErrorReport {
    let wrong = match error {
        RunError::Engine { error, .. } | RunError::Backend(BackendError::Engine(error)) => Some(error),
        _ => None,
    };
    let hint = match (error, wrong) {
        (_, Some(EngineError::TooLong { .. })) => {
            let hint = "shorten the prompt, or raise `runtime.context_size` in the policy";
            return ErrorReport::new("engine.prompt", exit::USAGE, message).hint(hint.to_owned());
        }
        (_, Some(EngineError::Policy { .. })) => {
            return ErrorReport::new("engine.policy", exit::USAGE, message).hint("change the policy".to_owned());
        }
        (RunError::Timeout { .. }, _) => {
            "raise `runtime.timeout` or lower `generation.max_tokens` in the policy".to_owned()
        }
        _ => format!("the engine's full output is in `.aitools/{policy}.log`"),
    };
    let lines = error.tail();
    let last = &lines[lines.len().saturating_sub(SHOWN_LINES)..];
    ErrorReport::new("engine", exit::ENGINE, message).details(last.to_vec()).hint(hint)
}

fn serve(error: &ServeError, message: String) -> ErrorReport {
    match error {
        ServeError::Bind { .. } => ErrorReport::new("serve.address", exit::MACHINE, message)
            .hint("another program may listen there: choose another `--port`".to_owned()),
        ServeError::Open { .. } => ErrorReport::new("serve.open", exit::USAGE, message).hint(
            "give a key with `--api-key-file FILE` or `AITOOLS_API_KEY`, or accept everybody with `--insecure`"
                .to_owned(),
        ),
        ServeError::Running { .. } => ErrorReport::new("serve.running", exit::CONDITION, message)
            .hint("`aitools ps` shows what it serves".to_owned()),
        ServeError::Unusable { problems } => {
            ErrorReport::new("serve.policies", exit::CONDITION, message).details(problems.clone())
        }
        ServeError::NotRunning => ErrorReport::new("serve.not-running", exit::CONDITION, message)
            .hint("start it with `aitools serve`".to_owned()),
        ServeError::Answer(_) => ErrorReport::new("serve.answer", exit::ENGINE, message),
        ServeError::Key(error) => match error {
            KeyError::Fs(error) => machine(error, message),
            KeyError::Short(_) | KeyError::Empty(_) | KeyError::Random(_) => {
                ErrorReport::new("serve.key", exit::USAGE, message)
            }
        },
        ServeError::Tls(_) => ErrorReport::new("serve.tls", exit::USAGE, message),
        ServeError::Runtime(_) => ErrorReport::new("machine.serve", exit::MACHINE, message),
    }
}

fn damage_line(damage: &Damaged) -> String {
    let computed = damage.computed.as_deref().unwrap_or("(missing)");
    let size = damage.size_bytes.map_or(String::new(), |bytes| format!(" ({bytes} bytes)"));
    let Damaged { what, path, expected, recorded_in, .. } = damage;
    format!("{what} `{}`: expected {expected} ({recorded_in}), computed {computed}{size}", path.display())
}

fn machine(error: &FsError, message: String) -> ErrorReport {
    if error.is_over_limit() {
        return ErrorReport::new("input.too-large", exit::USAGE, message);
    }
    if error.is_no_space() {
        let hint = "free some space, or name another folder with `--cache-dir` or `HF_HOME`; fetched data is kept";
        return ErrorReport::new("machine.no-space", exit::MACHINE, message).hint(hint.to_owned());
    }
    ErrorReport::new("machine.files", exit::MACHINE, message)
}

fn store(error: &StoreError, message: String, lock_line: Option<&str>) -> ErrorReport {
    match error {
        StoreError::Fs(error) => machine(error, message),
        StoreError::Cancelled(_) => ErrorReport::new("interrupted", exit::INTERRUPTED, message),
        StoreError::Occupied { .. } => {
            ErrorReport::new("machine.files", exit::MACHINE, message).hint("move the folder elsewhere".to_owned())
        }
        StoreError::Tree(_) => ErrorReport::new("machine.files", exit::MACHINE, message),
        StoreError::Mismatch { expected, computed, computed_bytes, expected_bytes, .. } => {
            let at = lock_line.map_or(String::new(), |line| format!(" ({line})"));
            let size = expected_bytes.map_or(String::new(), |bytes| format!(", {bytes} bytes"));
            ErrorReport::new("integrity", exit::INTEGRITY, message)
                .compared(format!("{expected}{size}{at}"), format!("{computed}, {computed_bytes} bytes"))
                .hint(
                    "the source serves other bytes than before, or the lockfile is wrong: compare it with its last commit"
                        .to_owned(),
                )
        }
    }
}

fn source(error: &SourceError, message: String, lock_line: Option<&str>) -> ErrorReport {
    match error {
        SourceError::Cancelled(_) => ErrorReport::new("interrupted", exit::INTERRUPTED, message),
        SourceError::Fs(error) => machine(error, message),
        SourceError::Offline { .. } => ErrorReport::new("network.offline", exit::NETWORK, message)
            .hint("run the command again without `--offline`".to_owned()),
        SourceError::Network { hint, .. } => ErrorReport::new("network", exit::NETWORK, message).hint(hint.clone()),
        SourceError::Missing { hint, .. } => {
            ErrorReport::new("source.missing", exit::USAGE, message).hint(hint.clone())
        }
        SourceError::Mismatch { expected, actual, likely, .. } => {
            let at = lock_line.map_or(String::new(), |line| format!(" ({line})"));
            ErrorReport::new("integrity", exit::INTEGRITY, message)
                .compared(format!("{expected}{at}"), actual)
                .details(likely.iter().map(|likely| format!("likely    {likely}")).collect())
        }
        SourceError::Hostile { .. } => ErrorReport::new("integrity.refused", exit::INTEGRITY, message),
        SourceError::Tool { hint, .. } => {
            ErrorReport::new("machine.program", exit::MACHINE, message).hint(hint.clone())
        }
        SourceError::Disagreement { details, hint, .. } => {
            ErrorReport::new("source.disagreement", exit::CONDITION, message)
                .details(details.clone())
                .hint(hint.clone())
        }
    }
}

fn build(error: &BuildError, message: String) -> ErrorReport {
    let failed = |kind| ErrorReport::new(kind, exit::BUILD, &message);
    let log = |path: &std::path::Path| format!("the full log is `{}`", path.display());
    match error {
        BuildError::Cancelled(_) => ErrorReport::new("interrupted", exit::INTERRUPTED, &message),
        BuildError::Fs(error) => machine(error, message),
        BuildError::Process(_) | BuildError::Recipe { .. } | BuildError::Edit { .. } => failed("build"),
        BuildError::NoCompiler { hint, .. } => {
            ErrorReport::new("machine.compiler", exit::MACHINE, &message).hint((*hint).to_owned())
        }
        BuildError::Failed(what) => {
            let network = what.network.iter().map(|host| format!("the build tried to reach {host}"));
            let first = what.first_error.iter().flat_map(|text| text.lines()).map(str::to_owned);
            let lines = if what.first_error.is_some() { &[][..] } else { what.tail.as_slice() };
            let details = network.chain(first).chain(lines.iter().cloned()).collect();
            failed("build.failed").details(details).hint(log(&what.log))
        }
        BuildError::NotBuilt { said, log: path, .. } => failed("build.variant").details(said.clone()).hint(log(path)),
        BuildError::NoEvidence { log: path, .. } => failed("build.variant").hint(log(path)),
        BuildError::NotIsolated { .. } => failed("build.offline").hint(
            "allow user namespaces (`aitools doctor` says what is missing), or build without `--offline`".to_owned(),
        ),
        BuildError::NoSpace { .. } => ErrorReport::new("machine.no-space", exit::MACHINE, &message)
            .hint("free some space, or name another folder with `--cache-dir`".to_owned()),
        BuildError::NoOutput { beside, .. } => {
            failed("build.output").details(beside.iter().map(|path| format!("the build folder has {path}")).collect())
        }
        BuildError::Output { .. }
        | BuildError::SearchPath { .. }
        | BuildError::Glob { .. }
        | BuildError::Name(_)
        | BuildError::TooManyFiles => failed("build.output"),
    }
}

fn derive(error: &DeriveError, message: String) -> ErrorReport {
    let log = |path: &std::path::Path| format!("the full log is `{}`", path.display());
    match error {
        DeriveError::Engine(EngineError::Underivable { hint, .. }) => {
            ErrorReport::new("derive.refused", exit::USAGE, message).hint(hint.clone())
        }
        DeriveError::Engine(_) => ErrorReport::new("derive", exit::BUILD, message),
        DeriveError::Command(CommandError::Run(error)) => build(error, message),
        DeriveError::Command(CommandError::Failed { tail, log: path, .. }) => {
            ErrorReport::new("derive.failed", exit::BUILD, message).details(tail.clone()).hint(log(path))
        }
        DeriveError::Python(PythonError::Cancelled(_)) => ErrorReport::new("interrupted", exit::INTERRUPTED, message),
        DeriveError::Python(_) => ErrorReport::new("machine.program", exit::MACHINE, message).hint(format!(
            "set `{}` to a compatible Python, or choose other versions in `[tools]`",
            crate::source::pypi::PYTHON
        )),
        DeriveError::Useless { log: path, .. } => {
            ErrorReport::new("derive.useless", exit::BUILD, message).hint(log(path))
        }
    }
}

fn toolchain(error: &ToolError, message: String) -> ErrorReport {
    match error {
        ToolError::Missing { hint, .. } => {
            ErrorReport::new("machine.compiler", exit::MACHINE, message).hint((*hint).to_owned())
        }
        ToolError::Fs(error) => machine(error, message),
        ToolError::Process(ProcessError::Cancelled(_)) => ErrorReport::new("interrupted", exit::INTERRUPTED, message),
        ToolError::Variable { .. } | ToolError::Mute { .. } | ToolError::Process(_) => {
            ErrorReport::new("machine.compiler", exit::MACHINE, message)
        }
    }
}

#[cfg(test)]
mod tests;

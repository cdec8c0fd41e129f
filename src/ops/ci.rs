//! `ci`: everything that a pipeline asks of a project, one check after the other.

use std::time::Instant;

use serde::Serialize;

use super::sync::{Ask, LockMode};
use super::test::{Golden, Outcome};
use super::{Failure, Host, Project, check, lock, reproduce, sync, test, verify};
use crate::base::diagnostic::{Diagnostic, Diagnostics};

/// What is checked, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The lockfile is up to date.
    Lock,
    /// Everything is fetched, built and placed.
    Sync,
    /// Policies fit their engines and models.
    Check,
    /// Every byte is what the lockfile and the receipts say.
    Verify,
    /// Smoke prompts are answered as expected.
    Test,
    /// A second build has the same bits.
    Reproduce,
}

impl Stage {
    /// As the command of the same name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lock => "lock",
            Self::Sync => "sync",
            Self::Check => "check",
            Self::Verify => "verify",
            Self::Test => "test",
            Self::Reproduce => "reproduce",
        }
    }
}

/// One check.
#[derive(Debug, Serialize)]
pub struct Check {
    /// What is checked.
    pub stage: Stage,
    /// Of what: a policy or an engine; the project otherwise.
    pub name: String,
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
    /// What is wrong, or why it was skipped.
    pub reasons: Vec<String>,
    /// The failure, for its exit code.
    #[serde(skip)]
    pub failure: Option<Failure>,
}

/// Runs all checks; `tell` gets each. What needs the outcome of a failed one is skipped.
///
/// # Errors
/// When the user asked to stop.
pub fn run(
    host: &Host,
    project: &Project,
    with_reproduce: bool,
    tell: &mut dyn FnMut(&Check),
) -> Result<Vec<Check>, Failure> {
    let mut run = Run { host, project, checks: Vec::new(), tell };
    run.whole(Stage::Lock, || lock::require_current(host, project).map(drop))?;
    let ask = Ask { policies: &[], mode: LockMode::Locked, dry_run: false };
    run.whole(Stage::Sync, || sync::run(host, project, &ask).map(drop))?;
    run.each(Stage::Check, || Ok(check::run(host, project, &[])?.into_iter().map(checked).collect()))?;
    run.whole(Stage::Verify, || {
        let damages = verify::run(host, project, &[], &[])?.damages;
        if damages.is_empty() { Ok(()) } else { Err(Failure::Damaged { damages }) }
    })?;
    run.each(Stage::Test, || {
        let tested = test::run(host, project, &[], Golden::Ignore, &mut |_| {})?;
        Ok(tested.into_iter().map(|it| (it.policy, it.outcome, it.reasons, it.failure)).collect())
    })?;
    if with_reproduce {
        run.each(Stage::Reproduce, || {
            let all = reproduce::run(host, project, &[], &mut |_| {})?;
            Ok(all.into_iter().map(|it| reproduced(&it)).collect())
        })?;
    }
    Ok(run.checks)
}

type Case = (String, Outcome, Vec<String>, Option<Failure>);

fn checked(checked: check::Checked) -> Case {
    let errors: Vec<Diagnostic> = checked.problems.into_iter().filter(Diagnostic::is_error).collect();
    if errors.is_empty() {
        return (checked.policy, Outcome::Passed, Vec::new(), None);
    }
    let reasons = errors.iter().map(ToString::to_string).collect();
    (checked.policy, Outcome::Failed, reasons, Some(Diagnostics(errors).into()))
}

fn reproduced(it: &reproduce::Reproduced) -> Case {
    let name = format!("{} ({})", it.engine, it.variant);
    let differing = it.files.iter().filter(|(_, compared)| **compared != reproduce::Compared::Equal);
    let reasons: Vec<String> = differing.map(|(path, _)| format!("`{path}` differs")).collect();
    let outcome = if it.equal { Outcome::Passed } else { Outcome::Failed };
    (name, outcome, reasons, None)
}

struct Run<'a> {
    host: &'a Host,
    project: &'a Project,
    checks: Vec<Check>,
    tell: &'a mut dyn FnMut(&Check),
}

impl Run<'_> {
    /// A check of the whole project.
    fn whole(&mut self, stage: Stage, act: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
        let name = self.project.manifest_path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        self.each(stage, || act().map(|()| vec![(name, Outcome::Passed, Vec::new(), None)]))
    }

    /// Checks of policies or engines.
    fn each(&mut self, stage: Stage, act: impl FnOnce() -> Result<Vec<Case>, Failure>) -> Result<(), Failure> {
        let began = Instant::now();
        // Whatever a later stage says of a project that is not what its lockfile says would mislead.
        let broken = self.checks.iter().find(|check| check.outcome == Outcome::Failed).map(|check| check.stage);
        let needed = broken.filter(|broken| matches!(broken, Stage::Lock | Stage::Sync));
        let name = || self.project.manifest_path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let cases = match needed {
            Some(broken) => vec![(name(), Outcome::Skipped, vec![format!("`{}` failed", broken.as_str())], None)],
            None => match act() {
                Ok(cases) => cases,
                Err(failure) if self.host.task.cancel().is_cancelled() => return Err(failure),
                Err(failure) => vec![(name(), Outcome::Failed, vec![failure.to_string()], Some(failure))],
            },
        };
        let seconds = began.elapsed().as_secs_f64() / cases.len().max(1) as f64;
        for (name, outcome, reasons, failure) in cases {
            let check = Check { stage, name, outcome, seconds, reasons, failure };
            (self.tell)(&check);
            self.checks.push(check);
        }
        Ok(())
    }
}

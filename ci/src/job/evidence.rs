//! Evidence before independent referees, whose packages come from the Python package index.

use xshell::Shell;

use super::serve;
use crate::step::{Job, Result, cargo};

pub const JOB: Job =
    Job { name: "evidence", about: "others accept what `export` writes, and refuse a changed byte", run };

const PACKAGES: &[&str] = &[
    "cyclonedx-python-lib[json-validation]==11.12.0",
    "in-toto-attestation==0.9.3",
    "securesystemslib[crypto]==1.6.0",
    "model-signing==1.1.1",
    // model-signing needs it and does not say so.
    "pyopenssl",
];

fn run(sh: &Shell) -> Result<()> {
    let folder = crate::step::root().join("target/e2e/evidence");
    sh.create_dir(&folder)?;
    let base = if cfg!(windows) { "python" } else { "python3" };
    let _python = sh.push_env("AITOOLS_TEST_PYTHON", serve::python(sh, base, &folder.join("python"), PACKAGES)?);
    cargo(sh, "test --workspace --locked --test evidence -- --ignored").run()?;
    Ok(())
}

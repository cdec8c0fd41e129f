//! Evidence before independent referees, whose packages come from the Python package index.

use xshell::{Shell, cmd};

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
    let place = crate::step::root().join("target/e2e/evidence");
    let (packages, stamp, wanted) = (place.join("packages"), place.join("installed.txt"), PACKAGES.join("\n"));
    let python = if cfg!(windows) { "python" } else { "python3" };
    // Not a virtual environment: Debian has those in a package of its own, and pip is all that the README asks for.
    if !sh.read_file(&stamp).is_ok_and(|installed| installed == wanted) {
        sh.remove_path(&place)?;
        let quiet = ["--quiet", "--disable-pip-version-check"];
        cmd!(sh, "{python} -m pip install {quiet...} --target {packages} {PACKAGES...}").run()?;
        sh.write_file(&stamp, wanted)?;
    }
    let _python = sh.push_env("AITOOLS_TEST_PYTHON", python);
    let _packages = sh.push_env("PYTHONPATH", packages);
    cargo(sh, "test --workspace --locked --test evidence -- --ignored").run()?;
    Ok(())
}

//! The machine's Python for which every package of a conversion has a wheel. Only the interpreter is the machine's: its own
//! packages, the user's and the environment's settings are left out when it runs.

use std::path::PathBuf;
use std::time::Duration;

use crate::base::process::Program;
use crate::format::lockfile::ToolEntry;
use crate::plan::PackageRequirement;
use crate::source::pypi::{self, Cpython};

use super::Host;
use super::failure::PythonError;

/// Says what it is, whatever it was called by.
const QUERY: &str = "import sys; v = sys.version_info
print(sys.implementation.name, v[0], v[1], 't' in getattr(sys, 'abiflags', ''), sys.executable)";
const LIMIT: Duration = Duration::from_secs(30);
const MAX_ANSWER_BYTES: u64 = 4096;

/// An interpreter, and for each package the wheel that suits it.
#[derive(Debug, Clone)]
pub struct Python {
    /// Absolute path of the interpreter.
    pub program: PathBuf,
    /// The wheels that suit it, in the order of the packages.
    pub packages: Vec<PackageRequirement>,
}

/// The first Python that suits all packages: the one that is named, else of those on the search path.
///
/// # Errors
/// [`PythonError`].
pub fn find(host: &Host, packages: &[&ToolEntry]) -> Result<Python, PythonError> {
    let named = host.env.get(pypi::PYTHON).filter(|named| !named.is_empty());
    let names = match named {
        Some(named) => vec![named.clone()],
        None => {
            let newest_first = (9..=14).rev().map(|minor| format!("python3.{minor}"));
            ["python3", "python"].map(str::to_owned).into_iter().chain(newest_first).collect()
        }
    };
    let (mut here, mut lacking) = (Vec::new(), None);
    for name in names {
        host.task.check()?;
        let Some((program, version)) = ask(host, &name) else { continue };
        match packages.iter().map(|entry| suiting(entry, version)).collect::<Result<_, &ToolEntry>>() {
            Ok(packages) => return Ok(Python { program, packages }),
            Err(entry) => {
                let version = format!("Python 3.{}{}", version.minor, if version.threaded { "t" } else { "" });
                if !here.contains(&version) {
                    here.push(version);
                }
                lacking = lacking.or(Some(entry));
            }
        }
    }
    let Some(entry) = lacking else { return Err(PythonError::None) };
    Err(PythonError::NoWheel { package: entry.name.clone(), here, there: pypi::pythons(&entry.packages) })
}

/// A package's wheel for a Python, or the package that has none.
fn suiting(entry: &ToolEntry, version: Cpython) -> Result<PackageRequirement, &ToolEntry> {
    let package = pypi::package_for_python(&entry.packages, version).ok_or(entry)?;
    Ok(PackageRequirement { name: entry.name.clone(), request: entry.request.clone(), package: package.clone() })
}

/// The interpreter behind a name, when it is there and a CPython 3.
fn ask(host: &Host, name: &str) -> Option<(PathBuf, Cpython)> {
    let args = ["-I", "-S", "-B", "-c", QUERY].map(Into::into).into();
    let program = Program { path: name.into(), args, env: host.os_env(), cwd: host.store.root().to_owned() };
    let ran = program.output(LIMIT, MAX_ANSWER_BYTES, host.task.cancel()).ok().filter(|ran| ran.status.success())?;
    answer(ran.stdout.trim_end_matches(['\r', '\n']))
}

fn answer(said: &str) -> Option<(PathBuf, Cpython)> {
    let mut words = said.splitn(5, ' ');
    let (implementation, major) = (words.next()?, words.next()?);
    let (minor, threaded) = (words.next()?.parse().ok()?, words.next()? == "True");
    let program = PathBuf::from(words.next()?);
    (implementation == "cpython" && major == "3" && program.is_absolute())
        .then_some((program, Cpython { minor, threaded }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_interpreters_say() {
        let python = Cpython { minor: 11, threaded: false };
        let program = if cfg!(windows) { "C:/é x/python.exe" } else { "/opt/é x/python3" };
        assert_eq!(answer(&format!("cpython 3 11 False {program}")), Some((program.into(), python)));
        for said in
            ["", "pypy 3 10 False /x", "cpython 2 7 False /x", "cpython 3 11 False python3", "cpython 3 y False /x"]
        {
            assert_eq!(answer(said), None, "{said}");
        }
    }
}

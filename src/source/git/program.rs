//! The program `git`: read for its configuration, asked for credentials, and run where libgit2 and our HTTP client do not
//! reach (ssh). Everything it is told comes from `World::env`, less what would point it at another repository.
//!
//! Absent: `git` is not needed for a repository at an `http`, `https` or local address that wants no password.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use crate::base::process::{Output, ProcessError, Program};
use crate::source::{SourceError, World};

/// For what answers at once; a helper that asks a person may take longer.
const SHORT: Duration = Duration::from_secs(120);
/// For a fetch over ssh.
const LONG: Duration = Duration::from_secs(4 * 3600);
const MAX_OUTPUT_BYTES: u64 = 64 << 20;

/// Variables that would make `git` look at another repository than the one it is told to.
const POINTERS: [&str; 10] = [
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_NAMESPACE",
    "GIT_PREFIX",
    "GIT_SHALLOW_FILE",
    "GIT_QUARANTINE_PATH",
];

/// One run of `git`.
#[derive(Debug)]
pub struct Git<'w> {
    world: &'w World,
    program: Program,
}

impl<'w> Git<'w> {
    /// `git` in the folder `at`.
    pub fn at(world: &'w World, at: &Path) -> Self {
        let kept = world.env.iter().filter(|(name, _)| !POINTERS.contains(&name.as_str()));
        let mut env: BTreeMap<OsString, OsString> =
            kept.map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        for (name, value) in [("GIT_TERMINAL_PROMPT", "0"), ("LC_ALL", "C"), ("GIT_OPTIONAL_LOCKS", "0")] {
            env.insert(name.into(), value.into());
        }
        Self { world, program: Program { path: "git".into(), args: Vec::new(), env, cwd: at.to_owned() } }
    }

    /// `git` in no repository: whatever lies around the project has no say.
    pub fn nowhere(world: &'w World) -> Self {
        Self::at(world, &world.project).env("GIT_DIR", "aitools-none")
    }

    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.program.args.extend(args.iter().map(OsString::from));
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.program.env.insert(name.into(), value.into());
        self
    }

    /// A setting for this run alone, added to those that the environment already has.
    #[must_use]
    pub fn setting(self, key: &str, value: &str) -> Self {
        let count = self.program.env.get(&OsString::from("GIT_CONFIG_COUNT"));
        let count: u32 = count.and_then(|text| text.to_str()?.parse().ok()).unwrap_or(0);
        self.env(&format!("GIT_CONFIG_KEY_{count}"), key)
            .env(&format!("GIT_CONFIG_VALUE_{count}"), value)
            .env("GIT_CONFIG_COUNT", &(count + 1).to_string())
    }

    /// Runs it; `None` when there is no such program.
    pub fn try_run(&self) -> Result<Option<Output>, SourceError> {
        self.run_for(SHORT)
    }

    fn run_for(&self, limit: Duration) -> Result<Option<Output>, SourceError> {
        match self.program.output(limit, MAX_OUTPUT_BYTES, self.world.task.cancel()) {
            Ok(output) => Ok(Some(output)),
            Err(ProcessError::Start { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(tool_error(error)),
        }
    }

    /// Runs it and gives its output, or the end of what it complained about.
    pub fn run(&self, why: &str) -> Result<Result<String, String>, SourceError> {
        let output = self.run_for(LONG)?.ok_or_else(|| missing(why))?;
        Ok(if output.status.success() { Ok(output.stdout) } else { Err(last_words(&output)) })
    }

    /// Runs `git credential <action>` with `input` and gives its output; `None` when it has no answer.
    /// The input goes through a pipe: it may hold a password.
    pub fn credential(self, action: &str, input: &str) -> Result<Option<String>, SourceError> {
        let broken = |source| tool_error(ProcessError::Start { path: "git".into(), source });
        let (reader, mut writer) = std::io::pipe().map_err(broken)?;
        // Smaller than any pipe's buffer, so that this does not wait for a reader.
        if input.len() > 4096 {
            return Ok(None);
        }
        writer.write_all(input.as_bytes()).map_err(broken)?;
        drop(writer);
        let program = self.args(&["credential", action]);
        let spawned = program.program.spawn(Stdio::from(reader), Stdio::piped(), Stdio::null());
        let mut running = match spawned {
            Ok(running) => running,
            Err(_) => return Ok(None),
        };
        let Some(stdout) = running.stdout() else { return Ok(None) };
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            std::io::Read::read_to_string(&mut std::io::Read::take(stdout, 1 << 16), &mut text).map(|_| text)
        });
        let deadline = std::time::Instant::now() + SHORT;
        let status = running.wait(program.world.task.cancel(), Some(deadline)).map_err(tool_error)?;
        running.end(Duration::ZERO);
        let text = reader.join().ok().and_then(Result::ok);
        Ok(text.filter(|_| status.success()))
    }
}

/// The last lines that say what went wrong.
fn last_words(output: &Output) -> String {
    let lines: Vec<&str> = output.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(6)..].join("; ");
    if tail.is_empty() { format!("git ended with {}", output.status) } else { tail.chars().take(500).collect() }
}

fn missing(why: &str) -> SourceError {
    SourceError::Tool {
        what: "the program `git`".to_owned(),
        why: why.to_owned(),
        hint: Some("install git and put it on `PATH`".to_owned()),
    }
}

fn tool_error(error: ProcessError) -> SourceError {
    match error {
        ProcessError::Cancelled(cancelled) => cancelled.into(),
        other => SourceError::Tool { what: "the program `git`".to_owned(), why: other.to_string(), hint: None },
    }
}

/// What `git` is set up to do on this machine, for this user: `git config --list`, in its order.
#[derive(Debug, Clone, Default)]
pub struct Configuration(Vec<(String, String)>);

impl Configuration {
    /// Asks `git`, which alone knows where its configuration is and what it includes. Without `git` there is none.
    ///
    /// # Errors
    /// When the configuration is broken.
    pub fn read(world: &World) -> Result<Self, SourceError> {
        let git = Git::nowhere(world).args(&["config", "--list", "-z"]);
        let Some(output) = git.try_run()? else { return Ok(Self::default()) };
        if !output.status.success() {
            let what = "git's own configuration".to_owned();
            return Err(SourceError::Tool { what, why: last_words(&output), hint: None });
        }
        Ok(Self::parse(&output.stdout))
    }

    fn parse(text: &str) -> Self {
        let entries = text.split_terminator('\0').map(|entry| entry.split_once('\n').unwrap_or((entry, "true")));
        Self(entries.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// Configuration `section.<subsection>.name`, as (subsection, value).
    fn with_subsection<'a>(
        &'a self,
        section: &'static str,
        name: &'static str,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0.iter().filter_map(move |(key, value)| {
            let middle = key.strip_prefix(section)?.strip_suffix(name)?;
            let subsection = if middle == "." { "" } else { middle.strip_prefix('.')?.strip_suffix('.')? };
            Some((subsection, value.as_str()))
        })
    }

    pub fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(name, _)| name == key)
    }

    /// Applies `url.<base>.insteadOf`.
    pub fn rewrite(&self, address: &str) -> String {
        let rules = self.with_subsection("url", "insteadof").map(|(base, prefix)| (prefix, base));
        super::address::rewrite(address, rules)
    }

    /// The values of `http.<name>` and `http.<address>.<name>` that are meant for an address: a more exact address
    /// replaces a less exact one, an empty value clears the list.
    pub fn http(&self, name: &'static str, address: &str) -> Vec<&str> {
        let (mut best, mut values) = (0, Vec::new());
        for (pattern, value) in self.with_subsection("http", name) {
            let Some(rank) = rank(pattern, address) else { continue };
            if rank < best {
                continue;
            }
            best = rank;
            values.push(value);
            if value.is_empty() {
                values = vec![""];
            }
        }
        values
    }
}

/// How exactly the address of a setting fits: 0 for one without an address, `None` for one that does not fit.
fn rank(pattern: &str, address: &str) -> Option<usize> {
    use super::address::Parts;
    if pattern.is_empty() {
        return Some(0);
    }
    let (rule, actual) = (Parts::of(pattern)?, Parts::of(address)?);
    let host_fits = rule.host.split('.').count() == actual.host.split('.').count()
        && rule.host.split('.').zip(actual.host.split('.')).all(|(rule, actual)| rule == "*" || rule == actual);
    let path = rule.path.trim_end_matches('/');
    let path_fits = actual.path.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let user_fits = rule.user.is_none() || rule.user == actual.user;
    let fits = rule.scheme == actual.scheme && rule.port == actual.port && host_fits && path_fits && user_fits;
    let exact_host = usize::from(!rule.host.contains('*'));
    fits.then_some(1 + exact_host + 2 * path.len() + usize::from(rule.user.is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_for_an_address() {
        let settings = Configuration::parse(
            "http.proxy\nhttp://all\0http.https://h/.proxy\nhttp://h\0http.https://h/a.proxy\nhttp://a\0\
             http.extraheader\nA: 1\0http.extraheader\nB: 2\0http.https://o.extraheader\n\0http.sslverify\0http.sslproxy\nno\0\
             url.file:///m/.insteadof\nhttps://h/\0url.x.y.insteadof\nhttps://x.y/\0http.https://*.w.net.proxy\nhttp://w\0",
        );
        let http = |name, address| settings.http(name, address);
        assert_eq!(http("proxy", "https://h/b").last(), Some(&"http://h"));
        assert_eq!(http("proxy", "https://h/a/b").last(), Some(&"http://a"));
        assert_eq!(http("proxy", "https://h/ab").last(), Some(&"http://h"));
        assert_eq!(http("proxy", "https://x.w.net/ab").last(), Some(&"http://w"));
        assert_eq!(http("proxy", "http://h/a").last(), Some(&"http://all"));
        assert_eq!(http("extraheader", "https://h"), ["A: 1", "B: 2"]);
        assert_eq!(http("extraheader", "https://o/x"), [""]);
        assert_eq!(http("sslverify", "https://o/x"), ["true"]);
        assert_eq!(settings.rewrite("https://h/r"), "file:///m/r");
        assert_eq!(settings.rewrite("https://x.y/r"), "x.yr");
    }
}

//! Settings files: the project's `configs/settings.toml` and the user's own `settings.toml`. `cli/` merges them with flags and
//! variables.
//!
//! A project's file comes with the project, perhaps from a stranger. It chooses among what aitools offers, and may name neither a
//! program nor a path outside the project: [`Owner`] says which rules apply.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::base::name::RelPath;
use crate::base::platform::Variant;

use super::Parsed;
use super::document::{Document, Syntax};
use super::schema::Schema;

/// Bytes of a settings file at most.
pub const MAX_BYTES: usize = 1 << 20;

/// Whose settings file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// `configs/settings.toml` of a project: anyone who wrote the project wrote it.
    Project,
    /// `settings.toml` in the user's own configuration folder.
    User,
}

/// The keys of a settings file. Every key is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The manifest to use without `-m`: a name (`manifests/<name>.toml`) or a path.
    pub manifest: Option<String>,
    /// The cache folder; by default `aitools` in the platform's cache folder. Only valid in the user's own file.
    pub cache_dir: Option<String>,
    /// The build variant of engines; by default the best one that this machine supports.
    pub variant: Option<Variant>,
    /// Number of parallel compiler processes, 1 to 1024; by default the number of processors.
    #[schemars(range(min = 1, max = 1024))]
    pub jobs: Option<u32>,
    /// Never use the network.
    pub offline: Option<bool>,
    /// Fail when the lockfile would change.
    pub locked: Option<bool>,
    /// Use the lockfile as it is.
    pub frozen: Option<bool>,
    /// The Python interpreter that fetches `pypi` packages. Only valid in the user's own file: it names a program.
    pub python: Option<String>,
    /// Write prompts and answers to the generation log. They are left out by default.
    pub log_prompts: Option<bool>,
    /// How `aitools serve` shares the machine among policies.
    pub serve: Option<ServeSettings>,
}

/// The table `[serve]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServeSettings {
    /// Policies that may be loaded together, group by group. Without groups any may, as far as memory goes; with groups a policy
    /// that is in none is loaded alone.
    #[serde(default)]
    pub groups: Vec<Vec<String>>,
}

static SCHEMA: Schema<Settings> = Schema::new();

/// Parses the settings file called `name` in messages.
///
/// # Errors
/// Every problem of the file, keys that its owner may not set included.
pub fn parse(name: &str, bytes: &[u8], owner: Owner) -> Result<(Parsed<Settings>, Vec<Diagnostic>), Diagnostics> {
    let document = Document::parse(Syntax::Toml, name, bytes, MAX_BYTES)?;
    let value = SCHEMA.decode(&document)?;
    let mut problems = Diagnostics::default();
    if value.locked == Some(true) && value.frozen == Some(true) {
        problems.push(document.error(&["frozen"], "`locked` and `frozen` exclude each other"));
    }
    let texts = [&value.manifest, &value.cache_dir, &value.python];
    for (key, text) in ["manifest", "cache_dir", "python"].into_iter().zip(texts) {
        if text.as_ref().is_some_and(|text| text.trim().is_empty()) {
            let problem = document.error(&[key], format!("`{key}` is empty"));
            problems.push(problem.hint("leave the key out for the default"));
        }
    }
    if owner == Owner::Project {
        refuse_foreign(&value, &document, &mut problems);
    }
    problems.or(Parsed { value, document })
}

/// Keys that a project may not set for the user who runs it.
fn refuse_foreign(value: &Settings, document: &Document, problems: &mut Diagnostics) {
    if value.python.is_some() {
        let problem = document.error(&["python"], "a project cannot choose a program to run");
        problems.push(
            problem.hint("set `AITOOLS_PYTHON`, or `python` in your own settings file (`aitools doctor` shows where)"),
        );
    }
    if value.cache_dir.is_some() {
        let problem = document.error(&["cache_dir"], "a project cannot choose where the cache is");
        problems.push(
            problem.hint(
                "set `AITOOLS_CACHE_DIR`, or `cache_dir` in your own settings file (`aitools doctor` shows where)",
            ),
        );
    }
    if value.manifest.as_ref().is_some_and(|text| text.parse::<RelPath>().is_err()) {
        let problem = document.error(&["manifest"], "a project cannot choose a manifest outside itself");
        problems.push(problem.hint("name a manifest of this project, such as `default`"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_optional() {
        assert_eq!(parse("s.toml", b"# nothing\n", Owner::User).expect("good").0.value, Settings::default());
        let text = "manifest = \"default\"\ncache_dir = \"/tmp/a b\"\nvariant = \"cuda\"\njobs = 4\noffline = false\nlocked = true\n\
                    frozen = false\npython = \"python3\"\nlog_prompts = true\n";
        let settings = parse("s.toml", text.as_bytes(), Owner::User).expect("good").0.value;
        assert_eq!((settings.jobs, settings.log_prompts), (Some(4), Some(true)));
    }

    #[test]
    fn the_example_file_without_its_comment_signs() {
        let example = include_str!("../../configs/settings.toml");
        let lines = example.lines().filter_map(|line| line.strip_prefix("# ")).filter(|line| line.contains(" = "));
        let text: String = lines.filter(|line| !line.starts_with("frozen")).map(|line| format!("{line}\n")).collect();
        assert_eq!(text.lines().count(), 6, "{text}");
        assert!(parse("s.toml", text.as_bytes(), Owner::Project).is_ok(), "{text}");
    }

    #[test]
    fn what_is_wrong() {
        let text = "job = 1\nlocked = 0\nlog_prompts = \"on\"\nvariant = \"\"\noffline = \"yes\"\n";
        let problems = parse("s.toml", text.as_bytes(), Owner::User).expect_err("refused");
        assert_eq!(problems.0.len(), 5, "{problems}");
        assert_eq!(problems.0[0].hint.as_deref(), Some("did you mean `jobs`?"));
        let problems =
            parse("s.toml", b"locked = true\nfrozen = true\npython = \" \"\n", Owner::User).expect_err("refused");
        assert_eq!(problems.0.len(), 2, "{problems}");
    }

    #[test]
    fn h5b_a_project_names_no_program_and_no_path_outside_itself() {
        let text = "python = \"./p\"\ncache_dir = \"/var/x\"\nmanifest = \"../other/manifests/x.toml\"\n";
        let problems = parse("s.toml", text.as_bytes(), Owner::Project).expect_err("refused");
        assert_eq!(problems.0.len(), 3, "{problems}");
        assert!(parse("s.toml", text.as_bytes(), Owner::User).is_ok());
        assert!(parse("s.toml", b"jobs = 2\nmanifest = \"quickstart\"\n", Owner::Project).is_ok());
    }
}

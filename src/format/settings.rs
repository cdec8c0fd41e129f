//! This machine's settings: `configs/settings.toml`. A flag wins over an `AITOOLS_*` variable, a variable over this file, this file over
//! the default; `cli/` puts them together.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::base::diagnostic::{Diagnostic, Diagnostics};
use crate::base::platform::Variant;

use super::Parsed;
use super::document::{Document, Syntax};
use super::schema::Schema;

/// Bytes of a settings file at most.
pub const MAX_BYTES: usize = 1 << 20;

/// Every key is optional.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Which `manifests/<name>.toml` is meant without `-m`.
    pub manifest: Option<String>,
    /// Where artifacts, blobs and build folders are kept; the platform's cache folder when not given.
    pub cache_dir: Option<String>,
    /// Which build of an engine to use; what the machine has when not given.
    pub variant: Option<Variant>,
    /// Compiler processes at a time; the processor's cores when not given.
    #[schemars(range(min = 1, max = 1024))]
    pub jobs: Option<u32>,
    /// Never use the network.
    pub offline: Option<bool>,
    /// Fail when the lockfile would change.
    pub locked: Option<bool>,
    /// Use the lockfile as it is.
    pub frozen: Option<bool>,
    /// The Python whose package index settings are used for `pypi` sources.
    pub python: Option<String>,
    /// Write prompts and answers to the log; they are left out otherwise.
    pub log_prompts: Option<bool>,
}

static SCHEMA: Schema<Settings> = Schema::new();

/// # Errors
/// Everything that is wrong with the file.
pub fn parse(name: &str, bytes: &[u8]) -> Result<(Parsed<Settings>, Vec<Diagnostic>), Diagnostics> {
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
    problems.or(Parsed { value, document })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_optional() {
        assert_eq!(parse("s.toml", b"# nothing\n").expect("good").0.value, Settings::default());
        let text = "manifest = \"default\"\ncache_dir = \"/tmp/a b\"\nvariant = \"cuda\"\njobs = 4\noffline = false\nlocked = true\n\
                    frozen = false\npython = \"python3\"\nlog_prompts = true\n";
        let settings = parse("s.toml", text.as_bytes()).expect("good").0.value;
        assert_eq!((settings.jobs, settings.log_prompts), (Some(4), Some(true)));
    }

    #[test]
    fn the_example_file_without_its_comment_signs() {
        let example = include_str!("../../configs/settings.toml");
        let lines = example.lines().filter_map(|line| line.strip_prefix("# ")).filter(|line| line.contains(" = "));
        let text: String = lines.filter(|line| !line.starts_with("frozen")).map(|line| format!("{line}\n")).collect();
        assert_eq!(text.lines().count(), 8, "{text}");
        assert!(parse("s.toml", text.as_bytes()).is_ok(), "{text}");
    }

    #[test]
    fn what_is_wrong() {
        let text = "job = 1\nlocked = 0\nlog_prompts = \"on\"\nvariant = \"\"\noffline = \"yes\"\n";
        let problems = parse("s.toml", text.as_bytes()).expect_err("refused");
        assert_eq!(problems.0.len(), 5, "{problems}");
        assert_eq!(problems.0[0].hint.as_deref(), Some("did you mean `jobs`?"));
        let problems = parse("s.toml", b"locked = true\nfrozen = true\npython = \" \"\n").expect_err("refused");
        assert_eq!(problems.0.len(), 2, "{problems}");
    }
}

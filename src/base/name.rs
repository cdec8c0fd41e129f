//! Strings with a rule: names of engines, models and policies, and paths that stay inside their root.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::digest::Digest;

/// A name of an engine, model, tool or policy: 1 to 64 letters, digits, `-`, `_` and `.`,
/// beginning with a letter or digit. Safe as a file name on every platform.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// Text that is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a name: use 1 to 64 letters, digits, `-`, `_` or `.`, beginning with a letter or digit")]
pub struct NameError(String);

impl Name {
    /// The rule of a name as a regular expression, for JSON Schema.
    pub const PATTERN: &'static str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$";

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let ok = (1..=64).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && !text.ends_with('.')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
            && !reserved_on_windows(text);
        if ok { Ok(Self(text.to_owned())) } else { Err(NameError(text.to_owned())) }
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl JsonSchema for Name {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Name".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": Self::PATTERN })
    }
}

/// A relative path with `/` between its parts that cannot leave its root: no `..`, no `.`, no empty part, not absolute,
/// no drive, no backslash, no control character, and no part that Windows reserves or cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RelPath(String);

/// Text that is not a path inside its folder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{path}` is not a path inside its folder: {why}")]
pub struct RelPathError {
    /// The text.
    pub path: String,
    /// What is wrong with it.
    pub why: &'static str,
}

impl RelPath {
    /// The longest accepted path, in bytes.
    pub const MAX_BYTES: usize = 1024;

    /// The path with `/` between its parts.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path in the form of this platform.
    pub fn to_path(&self) -> PathBuf {
        self.0.split('/').collect()
    }

    /// The path below `root`, in the form of this platform.
    pub fn under(&self, root: &Path) -> PathBuf {
        root.join(self.to_path())
    }

    /// `<folder>/<name>`: a name is always one good part of a path.
    pub fn from_name(folder: &'static str, name: &Name) -> Self {
        Self(format!("{folder}/{name}"))
    }

    /// `<name><ending>`, such as a file's.
    pub fn of_name(name: &Name, ending: &'static str) -> Self {
        Self(format!("{name}{ending}"))
    }

    /// The digits of a digest.
    pub fn of_digest(digest: &Digest) -> Self {
        Self(digest.hex())
    }

    /// The last part.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    /// This path, then `tail` below it.
    #[must_use]
    pub fn join(&self, tail: &Self) -> Self {
        Self(format!("{}/{}", self.0, tail.0))
    }

    /// The path below `prefix`, when `self` is there.
    pub fn strip_prefix(&self, prefix: &Self) -> Option<Self> {
        let rest = self.0.strip_prefix(&prefix.0)?.strip_prefix('/')?;
        Some(Self(rest.to_owned()))
    }
}

/// Whether Windows takes a part of a path for a device, whatever its ending ("Naming Files, Paths, and Namespaces").
fn reserved_on_windows(part: &str) -> bool {
    let stem = part.split('.').next().unwrap_or(part).trim_end();
    let upper = stem.to_ascii_uppercase();
    let port = upper.strip_prefix("COM").or_else(|| upper.strip_prefix("LPT"));
    let is_number = |text: &str| {
        let mut letters = text.chars();
        let first = letters.next();
        letters.next().is_none() && first.is_some_and(|c| c.is_ascii_digit() || "¹²³".contains(c))
    };
    matches!(upper.as_str(), "CON" | "PRN" | "AUX" | "NUL" | "CONIN$" | "CONOUT$") || port.is_some_and(is_number)
}

impl FromStr for RelPath {
    type Err = RelPathError;

    fn from_str(text: &str) -> Result<Self, RelPathError> {
        let fail = |why| Err(RelPathError { path: text.chars().take(200).collect(), why });
        if text.is_empty() {
            return fail("it is empty");
        }
        if text.len() > Self::MAX_BYTES {
            return fail("it is longer than 1024 bytes");
        }
        if text.starts_with('/') {
            return fail("it is absolute");
        }
        if text.chars().any(|c| c.is_control() || "\\:*?\"<>|".contains(c)) {
            return fail("it holds a control character or one of \\ : * ? \" < > |");
        }
        for part in text.split('/') {
            match part {
                "" => return fail("it has an empty part"),
                "." => return fail("it has a part `.`"),
                ".." => return fail("it has a part `..`"),
                _ if part.ends_with('.') || part.ends_with(' ') => {
                    return fail("a part ends with a dot or a space");
                }
                _ if reserved_on_windows(part) => return fail("a part is a device name on Windows"),
                _ => {}
            }
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for RelPath {
    type Error = RelPathError;
    fn try_from(text: String) -> Result<Self, RelPathError> {
        text.parse()
    }
}

impl From<RelPath> for String {
    fn from(path: RelPath) -> Self {
        path.0
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for RelPath {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "RelPath".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string", "minLength": 1, "maxLength": Self::MAX_BYTES,
            "description": "a relative path with `/` between its parts that stays inside its folder"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_safe_as_file_names() {
        for good in ["a", "llama-cpp", "bamboo-7b-dpo.q4", "A_1"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", ".a", "nul", "com1.x", "a/b", "a b", "a\\b", "a..", "é", &"x".repeat(65)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_that_stay_inside() {
        for good in ["a", "a/b.gguf", "modèle un/é.gguf", "a..b", ".hidden/x", "COM10", "com", "comp"] {
            assert!(good.parse::<RelPath>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "/a",
            "a//b",
            "../a",
            "a/..",
            "./a",
            "a\\b",
            "C:/x",
            "a/nul.txt",
            "a\0",
            "a /b",
            "x/COM1",
            "conin$",
            "x/CONOUT$.txt",
            "COM¹",
            "lpt³.x",
        ] {
            assert!(bad.parse::<RelPath>().is_err(), "{bad:?}");
        }
    }
}

//! A git commit id, as git prints it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::digest;

/// The id of a git commit: 40 lowercase hexadecimal digits (SHA-1; repositories with SHA-256 ids are not supported).
///
/// Whoever holds one need not check it again. It never starts with `-`, holds no path separator and no control character, so
/// it can be an argument of a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Commit([u8; 20]);

/// A text is not a full commit id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected a full commit id: 40 lowercase hexadecimal digits")]
pub struct CommitError;

impl Commit {
    /// The first 12 digits, for messages.
    pub fn short(&self) -> String {
        digest::hex(&self.0[..6])
    }
}

impl FromStr for Commit {
    type Err = CommitError;

    fn from_str(text: &str) -> Result<Self, CommitError> {
        let mut bytes = [0; 20];
        let digits = text.as_bytes();
        if digits.len() != 40 {
            return Err(CommitError);
        }
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Ok(digit - b'0'),
            b'a'..=b'f' => Ok(digit - b'a' + 10),
            _ => Err(CommitError),
        };
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&digest::hex(&self.0))
    }
}

impl fmt::Debug for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Commit({self})")
    }
}

impl Serialize for Commit {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Commit {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Commit {
    fn schema_name() -> Cow<'static, str> {
        "Commit".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[0-9a-f]{40}$",
            "description": "a full commit id: 40 lowercase hexadecimal digits"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_forty_lowercase_hexadecimal_digits_are_a_commit() {
        let id = "d3ebd7c5666348cf43c22f0d62dfbc9a763cffb8";
        assert_eq!(id.parse::<Commit>().unwrap().to_string(), id);
        assert_eq!(id.parse::<Commit>().unwrap().short(), "d3ebd7c56663");
        for wrong in
            ["", "d3ebd7c", &id.to_uppercase(), &format!("{id}0"), &id.replace('d', "g"), &id.replace('d', "é")]
        {
            assert_eq!(wrong.parse::<Commit>(), Err(CommitError), "{wrong}");
        }
    }
}

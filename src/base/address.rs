//! The address of a git repository, checked once: in a manifest, in a `.gitmodules` file, in a lockfile.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The address of a git repository: `https`, `http`, `ssh`, `git+ssh`, `git` or `file` with `://`, `user@host:path`, or a path.
///
/// An address comes from a stranger: from a manifest, a `.gitmodules` file or a lockfile. Whoever holds an [`Address`] may use it
/// as an argument of a program, and any part of it, also percent-decoded, as one line of a protocol: it is not empty, has at
/// most [`Address::MAX_BYTES`] bytes, does not start with `-`, holds no control character, not even as an escape such as
/// `%0A`, and names no remote helper (`ext::…`). It does not follow that the address leads anywhere, or that it may carry a user name: see
/// [`Address::user_info`].
///
/// The forms are those of `git help fetch`, "GIT URLS". Relative addresses in `.gitmodules` (`../other`) are resolved to a full
/// address before they become an [`Address`].
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(String);

/// A text is not an address of a git repository. Does not repeat the text, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an address of a git repository: {why}")]
pub struct AddressError {
    /// What is wrong, as a phrase.
    pub why: &'static str,
}

impl Address {
    /// The longest address that is accepted, in bytes.
    pub const MAX_BYTES: usize = 4096;

    /// The address as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `user` or `user:password` of an address with a scheme, as it stands before the host. A manifest refuses it for `http` and
    /// `https`: it would be written to the lockfile.
    pub fn user_info(&self) -> Option<&str> {
        let (_, rest) = self.0.split_once("://")?;
        Some(authority(rest).rsplit_once('@')?.0)
    }
}

/// User, host and port of an address without its scheme.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or(rest)
}

/// Whether an escape such as `%0A` stands for a control character.
fn has_escaped_control(text: &str) -> bool {
    text.as_bytes().windows(3).any(|three| {
        let code = std::str::from_utf8(&three[1..]).ok().and_then(|digits| u8::from_str_radix(digits, 16).ok());
        three[0] == b'%' && code.is_some_and(|code| code.is_ascii_control())
    })
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refuse = |why| Err(AddressError { why });
        if text.trim().is_empty() {
            return refuse("it is empty");
        }
        if text.len() > Self::MAX_BYTES {
            return refuse("it is too long");
        }
        if text.starts_with('-') {
            return refuse("it starts with `-`");
        }
        if text.contains(char::is_control) || has_escaped_control(text) {
            return refuse("it contains a control character");
        }
        let helper = |name: &str| !name.contains(['/', '@', '[']);
        if text.split_once("::").is_some_and(|(name, _)| helper(name)) {
            return refuse("remote helpers (`name::address`) are not supported");
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            let scheme = scheme.to_ascii_lowercase();
            if !["https", "http", "ssh", "git+ssh", "git", "file"].contains(&scheme.as_str()) {
                return refuse("use https, http, ssh, git, file or a path");
            }
            let host = authority(rest).rsplit('@').next().unwrap_or_default();
            if scheme != "file" && (host.is_empty() || host.starts_with(['-', ':'])) {
                return refuse("it names no host");
            }
        } else if let Some((host, _)) = text.split('/').next().and_then(|start| start.split_once(':'))
            && host.rsplit('@').next().is_none_or(|host| host.is_empty() || host.starts_with('-'))
        {
            return refuse("it names no host");
        }
        Ok(Self(text.to_owned()))
    }
}

impl AsRef<str> for Address {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({:?})", self.0)
    }
}

impl Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "minLength": 1,
            "maxLength": Self::MAX_BYTES,
            "description": "the address of a git repository, such as `https://host/owner/repository`"
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_that_git_knows() {
        for good in [
            "https://example.org/a.git",
            "http://127.0.0.1:8080/x",
            "HTTPS://example.org/a%20b",
            "ssh://git@example.org:22/a",
            "git+ssh://example.org/a",
            "git://example.org/a",
            "git@example.org:owner/a.git",
            "example.org:a",
            "file:///srv/a b",
            "../a \"b\"\\é",
            "/srv/a::b",
            "C:/a",
            "https://[::1]:81/x",
        ] {
            assert_eq!(good.parse::<Address>().map(|address| address.to_string()).as_deref(), Ok(good));
        }
    }

    #[test]
    fn h1_no_address_carries_a_line_of_another_protocol() {
        for bad in [
            "http://%0Ahost=example.org%0Aprotocol=https@127.0.0.1:1/x.git",
            "https://example.org/a%0d%0ab",
            "https://example.org/a%00",
            "https://a\nb/c",
            "https://a\u{85}b/c",
            "git@host:a\tb",
        ] {
            assert_eq!(bad.parse::<Address>(), Err(AddressError { why: "it contains a control character" }), "{bad:?}");
        }
    }

    #[test]
    fn what_a_program_would_take_for_something_else() {
        for bad in [
            "",
            " ",
            "-u",
            "--upload-pack=x",
            "ext::sh -c x",
            "fd::3",
            "ftp://example.org/x",
            "https:///x",
            "https://",
            "ssh://-oProxyCommand=x/y",
            "ssh://git@-oProxyCommand=x/y",
            "git@-oProxyCommand=x:y",
            "-oProxyCommand=x:y",
            &"a".repeat(Address::MAX_BYTES + 1),
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn users_in_addresses() {
        let user = |text: &str| text.parse::<Address>().expect(text).user_info().map(str::to_owned);
        assert_eq!(user("https://me:secret@example.org/a").as_deref(), Some("me:secret"));
        assert_eq!(user("https://example.org/a@b"), None);
        assert_eq!(user("git@example.org:a"), None);
    }
}

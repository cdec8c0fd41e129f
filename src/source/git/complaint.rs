//! What git's error messages mean. They are read with `LC_ALL=C`.
//!
//! Sources of the texts: git's `remote-curl.c`, `http.c`, `fetch-pack.c`, `connect.c`, `upload-pack.c`, `index-pack.c`.

use super::address;
use crate::source::SourceError;

/// Why a command of git failed, as far as its messages tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Complaint {
    /// The connection broke or the server is overloaded: a second try may succeed.
    Passing,
    /// The server does not have the commit.
    NoCommit,
    /// The server does not give this commit by its id, or cannot leave out the history.
    NotAlone,
    NoRepository,
    Login,
    Unreachable,
    /// The server has no repository that git can read.
    NotGit,
    /// The objects that came are damaged, incomplete or forbidden.
    BadObjects,
    Other,
}

const TEXTS: [(Complaint, &[&str]); 9] = [
    (Complaint::NoCommit, &["not our ref", "couldn't find remote ref"]),
    (
        Complaint::NotAlone,
        &["unadvertised object", "erver does not support shallow", "does not support shallow clients"],
    ),
    (
        Complaint::Login,
        &["Authentication failed", "could not read Username", "could not read Password", "Permission denied ("],
    ),
    (Complaint::NoRepository, &["' not found", "does not appear to be a git repository", "Repository not found"]),
    (
        Complaint::Unreachable,
        &["Failed to connect", "Could not resolve", "Couldn't connect", "Connection refused", "resolve proxy"],
    ),
    (
        Complaint::NotGit,
        &[
            "not valid: is this a git repository",
            "invalid server response",
            "dumb http",
            "unable to update url base from redirection",
            "unknown object format",
            "mismatched algorithms",
        ],
    ),
    (
        Complaint::Passing,
        &[
            "early EOF",
            "unexpected disconnect",
            "RPC failed",
            "hung up",
            "returned error: 429",
            "returned error: 50",
            "Connection reset",
            "timed out",
            "Operation too slow",
            "Empty reply",
            "transfer closed",
        ],
    ),
    (
        Complaint::BadObjects,
        &[
            "fsck error",
            "did not send all necessary objects",
            "bad pack header",
            "pack signature mismatch",
            "pack is corrupted",
            "has bad object",
            "inflate returned",
            "invalid index-pack output",
            "index-pack failed",
            "unresolved delta",
            "bad object type",
            "serious inflate inconsistency",
            "hash mismatch",
        ],
    ),
    (Complaint::Other, &[""]),
];

const LOGIN_HINT: &str = "if the repository exists, give git a password for it (`git help credential`)";
const PROXY_HINT: &str = "check git's `http.proxy`, and HTTPS_PROXY, ALL_PROXY and NO_PROXY in the environment";

impl Complaint {
    /// The first kind, in the order of the table, whose text is in git's messages.
    pub fn of(messages: &str) -> Self {
        let found = TEXTS.iter().find(|(_, texts)| texts.iter().any(|text| messages.contains(text)));
        found.map_or(Self::Other, |(complaint, _)| *complaint)
    }
}

/// The error for a command on the repository at `address` that failed with these messages.
pub fn explain(address: &str, messages: &str) -> SourceError {
    let what = format!("`{}`", address::without_user(address));
    let why = format!("git says: {}", without_password(address, messages));
    let network = |hint: Option<&str>| SourceError::Network {
        what: what.clone(),
        why: why.clone(),
        hint: hint.map(str::to_owned),
    };
    match Complaint::of(messages) {
        Complaint::NoRepository => SourceError::Missing {
            what,
            why,
            hint: Some("check the address; servers also report private repositories as missing".to_owned()),
        },
        Complaint::BadObjects => SourceError::Hostile { what, why },
        Complaint::Login => network(Some(LOGIN_HINT)),
        Complaint::Unreachable => network(Some(PROXY_HINT)),
        Complaint::NotGit => network(Some(
            "open the address in a browser: it may be a login or proxy page, or a server without git's smart protocol",
        )),
        Complaint::Passing => network(Some("try again later")),
        Complaint::NoCommit | Complaint::NotAlone | Complaint::Other => network(None),
    }
}

/// git leaves passwords out of its messages; a helper or a server may not.
fn without_password(address: &str, messages: &str) -> String {
    let authority = address.split("://").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or_default();
    let password = authority.rsplit_once('@').and_then(|(info, _)| info.split_once(':')).map(|(_, password)| password);
    match password {
        Some(password) if !password.is_empty() => messages.replace(password, "***"),
        _ => messages.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_git_keep_their_kind() {
        for (messages, complaint) in [
            ("fatal: remote error: upload-pack: not our ref 111", Complaint::NoCommit),
            ("error: Server does not allow request for unadvertised object 111", Complaint::NotAlone),
            ("fatal: could not read Username for 'http://h': terminal prompts disabled", Complaint::Login),
            ("me@h: Permission denied (publickey). fatal: Could not read from remote repository.", Complaint::Login),
            ("fatal: repository 'http://h/r/' not found", Complaint::NoRepository),
            ("ERROR: Repository not found.; fatal: Could not read from remote repository.", Complaint::NoRepository),
            ("fatal: unable to access 'http://h/': Failed to connect to h port 80", Complaint::Unreachable),
            ("fatal: unable to access 'http://h/': The requested URL returned error: 503", Complaint::Passing),
            ("fatal: early EOF; fatal: fetch-pack: invalid index-pack output", Complaint::Passing),
            ("error: object 1: hasDotdot; fatal: fsck error in packed object", Complaint::BadObjects),
            ("something new", Complaint::Other),
        ] {
            assert_eq!(Complaint::of(messages), complaint, "{messages}");
        }
    }

    #[test]
    fn passwords_are_not_shown() {
        let error = explain("https://me:s3cret@h/r", "fatal: cannot use https://me:s3cret@h/r");
        let text = format!("{error} {error:?}");
        assert!(text.contains("`https://h/r`") && !text.contains("s3cret"), "{text}");
    }
}

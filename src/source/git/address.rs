//! Addresses of repositories: which of them name a folder of this machine, and what relative addresses mean.
//!
//! Forms of addresses: `git help fetch`, "GIT URLS". Relative addresses in `.gitmodules`: `git help submodule`, "add".
//! Absent: network, disk, rewriting (`insteadOf`), which is git's.

use std::path::{Path, PathBuf};

use url::Url;

use crate::base::address::Address;

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// On another machine: `http`, `https`, `ssh`, `git` and `user@host:path`. The program `git` fetches it.
    Remote(String),
    /// A folder of this machine.
    Local(PathBuf),
}

impl Way {
    /// Relative paths start at `project`.
    ///
    /// # Errors
    /// A phrase that says why the text is not an address.
    pub fn of(address: &str, project: &Path) -> Result<Self, &'static str> {
        address.parse::<Address>().map_err(|error| error.why)?;
        if let Some((scheme, _)) = address.split_once("://") {
            if !scheme.eq_ignore_ascii_case("file") {
                return Ok(Self::Remote(address.to_owned()));
            }
            let path = Url::parse(address).ok().and_then(|url| url.to_file_path().ok());
            return path.map(Self::Local).ok_or("a file address has three slashes: `file:///…`");
        }
        let before_slash = address.split('/').next().unwrap_or_default();
        let drive = cfg!(windows) && before_slash.as_bytes().get(1) == Some(&b':');
        if before_slash.contains(':') && !drive {
            return Ok(Self::Remote(address.to_owned()));
        }
        Ok(Self::Local(project.join(address)))
    }
}

/// The address without user name and password: for messages, and for what travels.
pub fn without_user(address: &str) -> String {
    let Some((scheme, rest)) = address.split_once("://").filter(|(scheme, _)| *scheme != "ssh") else {
        return address.to_owned();
    };
    let end = rest.find('/').unwrap_or(rest.len());
    let place = rest[..end].rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{place}{}", &rest[end..])
}

/// What an address in `.gitmodules` means for a repository that came from `parent`: `./x` and `../x` are relative to it.
pub fn relative(parent: &str, address: &str) -> String {
    if !address.starts_with("./") && !address.starts_with("../") {
        return address.to_owned();
    }
    let (mut base, mut rest, mut joint) = (parent.trim_end_matches('/'), address, '/');
    loop {
        if let Some(tail) = rest.strip_prefix("./") {
            rest = tail;
        } else if let Some(tail) = rest.strip_prefix("../") {
            rest = tail;
            let cut = base.rfind(['/', ':']).unwrap_or(0);
            joint = if base[cut..].starts_with(':') { ':' } else { '/' };
            base = &base[..cut];
        } else {
            return format!("{base}{joint}{}", rest.trim_end_matches('/'));
        }
    }
}

/// Whether two addresses are written for the same repository: the way there (https or ssh), the user, `.git` and a last
/// `/` do not matter.
pub fn same(one: &str, other: &str) -> bool {
    let plain = |address: &str| {
        let place = match address.split_once("://") {
            Some((_, rest)) => rest.to_owned(),
            None => address.replacen(':', "/", 1),
        };
        let end = place.find('/').unwrap_or(place.len());
        let host = place[..end].rsplit('@').next().unwrap_or_default().to_ascii_lowercase();
        let path = place[end..].trim_end_matches('/');
        format!("{host}{}", path.strip_suffix(".git").unwrap_or(path).trim_end_matches('/'))
    };
    plain(one) == plain(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways() {
        let project = Path::new("/p");
        let way = |address: &str| Way::of(address, project);
        assert_eq!(way("../é/x.git"), Ok(Way::Local("/p/../é/x.git".into())));
        assert_eq!(way("file:///a%20b/%C3%A9"), Ok(Way::Local("/a b/é".into())));
        for address in ["https://h/a b", "ssh://git@h/x", "git@h:x/y.git", "host:x", "git://h/x", "http://m%C3%A9@h/x"]
        {
            assert_eq!(way(address), Ok(Way::Remote(address.into())));
        }
        let drive = if cfg!(windows) { Way::Local("h:x".into()) } else { Way::Remote("h:x".into()) };
        assert_eq!(way("h:x"), Ok(drive));
        for address in
            ["", "-u", "--upload-pack=x", "ext::sh -c x", "ftp://h/x", "file://h/x", "https:///x", "a\nb", "ssh://-o/x"]
        {
            assert!(way(address).is_err(), "{address:?}");
        }
    }

    #[test]
    fn h1_escaped_control_characters_never_reach_the_credential_protocol() {
        for address in ["http://%0Ahost=forge.test%0aprotocol=https@h/x", "ssh://a%00b@h/x", "https://u:p%0d@h/x"] {
            let why = Way::of(address, Path::new("/p")).unwrap_err();
            assert!(why.contains("control character"), "{address}: {why}");
        }
    }

    #[test]
    fn what_is_shown() {
        assert_eq!(without_user("HTTPS://me:p%40ss@Host:8443/a?b"), "HTTPS://Host:8443/a?b");
        assert_eq!(without_user("git@h:x"), "git@h:x");
    }

    #[test]
    fn relative_addresses() {
        for (parent, address, want) in [
            ("https://h/a/b.git", "../c.git", "https://h/a/c.git"),
            ("https://h/a/b.git/", "./c", "https://h/a/b.git/c"),
            ("https://h/a/b", "../../x/c/", "https://h/x/c"),
            ("git@h:a/b", "../c", "git@h:a/c"),
            ("git@h:b", "../c", "git@h:c"),
            ("https://h/a", "https://o/c", "https://o/c"),
            ("x", "../../../../c", "/c"),
        ] {
            assert_eq!(relative(parent, address), want, "{parent} {address}");
        }
    }

    #[test]
    fn one_repository_in_several_spellings() {
        assert!(same("https://h/a.git/", "https://u@h/a"));
        assert!(same("git@H:a/b", "https://h/a/b.git") && same("ssh://git@h/a/b", "h:a/b"));
        assert!(!same("https://h/a", "https://h/b") && !same("https://h:1/a", "https://h/a"));
    }
}

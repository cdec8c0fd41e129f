//! Addresses of repositories: which way leads to one, and what relative and rewritten addresses mean.
//!
//! Forms of addresses: `git help fetch`, "GIT URLS". Rewriting: `git help config`, `url.<base>.insteadOf`.
//! Relative addresses in `.gitmodules`: `git help submodule`, "add". No network and no disk here.

use std::path::{Path, PathBuf};

/// Longer than any address that works.
const MAX_BYTES: usize = 4096;

/// The way to a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// `http` or `https`: our own client.
    Http(String),
    /// A folder of this machine.
    Local(PathBuf),
    /// `ssh`, `user@host:path` and `git`: the program `git` does it.
    Program(String),
}

impl Way {
    /// # Errors
    /// A phrase that says why the text is no address.
    pub fn of(address: &str, project: &Path) -> Result<Self, &'static str> {
        if address.is_empty() || address.len() > MAX_BYTES || address.starts_with('-') {
            return Err("it is empty, too long or begins with `-`");
        }
        if address.chars().any(char::is_control) {
            return Err("it holds a control character");
        }
        if let Some((scheme, rest)) = address.split_once("://") {
            return match scheme.to_ascii_lowercase().as_str() {
                "http" | "https" if !rest.is_empty() && !rest.starts_with('/') => Ok(Self::Http(address.to_owned())),
                "ssh" | "git+ssh" | "git" => Ok(Self::Program(address.to_owned())),
                "file" => file_path(rest).map(Self::Local),
                _ => Err("use https, http, ssh, git, file or a path"),
            };
        }
        let before_slash = address.split('/').next().unwrap_or_default();
        let drive = cfg!(windows) && before_slash.as_bytes().get(1) == Some(&b':');
        if before_slash.contains("::") {
            return Err("remote helpers (`name::address`) are not supported");
        }
        if before_slash.contains(':') && !drive {
            return Ok(Self::Program(address.to_owned()));
        }
        Ok(Self::Local(project.join(address)))
    }
}

/// The path of a `file://` address, after its scheme.
fn file_path(rest: &str) -> Result<PathBuf, &'static str> {
    let slash = rest.find('/').ok_or("a file address has three slashes: `file:///…`")?;
    if !matches!(&rest[..slash], "" | "localhost") {
        return Err("a file address names no other machine");
    }
    let path = decode(&rest[slash..]).ok_or("its escapes are not Unicode")?;
    let windows_drive = path.as_bytes().get(2) == Some(&b':') && cfg!(windows);
    Ok(PathBuf::from(if windows_drive { &path[1..] } else { &path }))
}

/// Undoes `%41`; an incomplete escape stays as it is.
pub fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let digits = (first == b'%').then(|| tail.get(..2)).flatten().and_then(|two| std::str::from_utf8(two).ok());
        match digits.and_then(|two| u8::from_str_radix(two, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// Escapes what must not stand in an address as it travels: spaces, quotes, brackets, everything beyond ASCII.
pub fn encode(address: &str) -> String {
    use std::fmt::Write as _;
    address.bytes().fold(String::with_capacity(address.len()), |mut text, byte| {
        match byte {
            b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0..=b' ' | 127.. => {
                let _ = write!(text, "%{byte:02X}");
            }
            _ => text.push(char::from(byte)),
        }
        text
    })
}

/// The parts of an `http(s)` address that rules look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts<'a> {
    /// In lower case.
    pub scheme: String,
    pub user: Option<&'a str>,
    pub password: Option<&'a str>,
    /// In lower case; an IPv6 address with its brackets.
    pub host: String,
    pub port: u16,
    /// Beginning with `/`, or empty.
    pub path: &'a str,
}

impl<'a> Parts<'a> {
    pub fn of(address: &'a str) -> Option<Self> {
        let (scheme, rest) = address.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (info, place) = match authority.rsplit_once('@') {
            Some((info, place)) => (Some(info), place),
            None => (None, authority),
        };
        let (user, password) = match info.map(|info| info.split_once(':').unwrap_or((info, ""))) {
            Some((user, password)) => (Some(user), Some(password).filter(|password| !password.is_empty())),
            None => (None, None),
        };
        let colon = place.rfind(':').filter(|colon| !place[*colon..].contains(']'));
        let (host, port) = match colon {
            Some(colon) => (&place[..colon], place[colon + 1..].parse().ok()?),
            None => (place, if scheme == "http" { 80 } else { 443 }),
        };
        (!host.is_empty()).then(|| Self { scheme, user, password, host: host.to_ascii_lowercase(), port, path })
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

/// The address with the longest matching prefix replaced.
pub fn rewrite<'a>(address: &str, rules: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let best = rules
        .filter(|(prefix, _)| !prefix.is_empty() && address.starts_with(prefix))
        .max_by_key(|(prefix, _)| prefix.len());
    match best {
        Some((prefix, replacement)) => format!("{replacement}{}", &address[prefix.len()..]),
        None => address.to_owned(),
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
        assert_eq!(way("https://h/a b"), Ok(Way::Http("https://h/a b".into())));
        assert_eq!(way("../é/x.git"), Ok(Way::Local("/p/../é/x.git".into())));
        assert_eq!(way("file:///a%20b/%C3%A9"), Ok(Way::Local("/a b/é".into())));
        for address in ["ssh://git@h/x", "git@h:x/y.git", "host:x", "git://h/x"] {
            assert_eq!(way(address), Ok(Way::Program(address.into())));
        }
        let drive = if cfg!(windows) { Way::Local("h:x".into()) } else { Way::Program("h:x".into()) };
        assert_eq!(way("h:x"), Ok(drive));
        for address in ["", "-u", "--upload-pack=x", "ext::sh -c x", "ftp://h/x", "file://h/x", "https:///x", "a\nb"] {
            assert!(way(address).is_err(), "{address:?}");
        }
    }

    #[test]
    fn parts_and_what_is_shown() {
        let address = "HTTPS://me:p%40ss@Host:8443/a?b";
        let parts = Parts::of(address).unwrap();
        assert_eq!((parts.host.as_str(), parts.port, parts.path), ("host", 8443, "/a?b"));
        assert_eq!((parts.user, parts.password), (Some("me"), Some("p%40ss")));
        assert_eq!(without_user(address), "HTTPS://Host:8443/a?b");
        assert_eq!(without_user("git@h:x"), "git@h:x");
        assert_eq!(Parts::of("http://[::1]/x").unwrap().host, "[::1]");
        assert_eq!(Parts::of("http://[::1]:81/x").unwrap().port, 81);
        assert!(Parts::of("http://h:99999/").is_none());
        assert_eq!(encode("http://h/é \"%20"), "http://h/%C3%A9%20%22%20");
        assert_eq!(decode("%é%4").as_deref(), Some("%é%4"));
        assert_eq!(decode("%ff"), None);
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
    fn the_longest_rule_wins() {
        let rules = [("https://h/", "http://short/"), ("https://h/a/", "/long/"), ("", "never")];
        assert_eq!(rewrite("https://h/a/b", rules.into_iter()), "/long/b");
        assert_eq!(rewrite("https://h/c", rules.into_iter()), "http://short/c");
        assert_eq!(rewrite("https://o/c", rules.into_iter()), "https://o/c");
        assert!(same("https://h/a.git/", "https://u@h/a"));
        assert!(same("git@H:a/b", "https://h/a/b.git") && same("ssh://git@h/a/b", "h:a/b"));
        assert!(!same("https://h/a", "https://h/b") && !same("https://h:1/a", "https://h/a"));
    }
}

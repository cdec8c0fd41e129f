//! Who may use the gateway: keys, the names it is known by, and pages of other sites.
//!
//! Browsers are why a server on this machine needs care. A page of any site can send requests here: they carry its `Origin`. A
//! name that its owner points at 127.0.0.1 makes such a page look like ours: its requests carry that name as `Host`.

use std::net::IpAddr;
use std::path::Path;

use hmac::{Hmac, KeyInit as _, Mac as _};
use hyper::Method;
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue, ORIGIN};
use sha2::Sha256;

use super::error::ApiError;
use crate::base::fs;

/// Characters of a key at least: shorter ones can be guessed.
pub const SHORTEST_KEY: usize = 16;
const KEY_FILE_LIMIT_BYTES: u64 = 64 << 10;

/// What is let in.
#[derive(Debug)]
pub struct Access {
    keys: Keys,
    /// The key of our own commands.
    control: Keys,
    /// Names of this server beside `localhost` and addresses, in lower case.
    hosts: Vec<String>,
    /// Origins of pages that may use the gateway.
    origins: Vec<String>,
}

/// The keys that are accepted, none of which can be read back or told by the time that a comparison takes.
struct Keys {
    secret: [u8; 32],
    tags: Vec<[u8; 32]>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keys").field("count", &self.tags.len()).finish_non_exhaustive()
    }
}

impl Keys {
    fn new() -> Result<Self, KeyError> {
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).map_err(KeyError::Random)?;
        Ok(Self { secret, tags: Vec::new() })
    }

    fn tag(&self, key: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).ok()?;
        mac.update(key);
        Some(mac)
    }

    fn add(&mut self, key: &str) {
        if let Some(mac) = self.tag(key.as_bytes()) {
            self.tags.push(mac.finalize().into_bytes().into());
        }
    }

    fn accept(&self, key: &[u8]) -> bool {
        self.tags.iter().any(|tag| self.tag(key).is_some_and(|mac| mac.verify_slice(tag).is_ok()))
    }
}

/// Keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error(transparent)]
    Fs(#[from] fs::FsError),
    /// One has so few characters that it can be guessed.
    #[error("an API key has {0} characters; at least {SHORTEST_KEY} are needed")]
    Short(usize),
    /// The file of this name has none.
    #[error("`{0}` has no API key: write one a line")]
    Empty(String),
    /// The keys cannot be kept safely.
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// The keys in a file: one a line, without empty lines and comments (`#`).
///
/// # Errors
/// When it cannot be read or has none.
pub fn keys_in(file: &Path) -> Result<Vec<String>, KeyError> {
    let bytes = fs::read_bounded(file, KEY_FILE_LIMIT_BYTES)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<String> = lines.map(str::to_owned).collect();
    if keys.is_empty() { Err(KeyError::Empty(file.display().to_string())) } else { Ok(keys) }
}

impl Access {
    /// `control` is the key of our own commands, which always works; users' keys are required once there is one.
    ///
    /// # Errors
    /// When a key is too short.
    pub fn new(keys: &[String], control: &str, hosts: &[String], origins: &[String]) -> Result<Self, KeyError> {
        if let Some(short) = keys.iter().find(|key| key.len() < SHORTEST_KEY) {
            return Err(KeyError::Short(short.chars().count()));
        }
        let (mut own, mut all) = (Keys::new()?, Keys::new()?);
        own.add(control);
        for key in keys {
            all.add(key);
        }
        let hosts = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        Ok(Self { keys: all, control: own, hosts, origins: origins.to_vec() })
    }

    /// Whether a request may come in at all: its `Host` is ours, and no page of another site sent it.
    ///
    /// # Errors
    /// Why not.
    pub fn admit(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut hosts = headers.get_all(HOST).iter();
        let host = hosts.next().and_then(|host| host.to_str().ok()).unwrap_or_default();
        if hosts.next().is_some() || !self.is_own_name(host) {
            let message = format!(
                "this server is not known as `{host:.100}`: use `localhost`, its address, or name it with `--allow-host`"
            );
            return Err(ApiError::forbidden(message));
        }
        match headers.get(ORIGIN) {
            None => Ok(()),
            Some(origin) if self.is_own_page(origin, host) || self.allows(origin) => Ok(()),
            Some(_) => Err(ApiError::forbidden("pages of other sites may not use this server: see `--cors-origin`")),
        }
    }

    /// Whether a request has a key, when one is needed.
    ///
    /// # Errors
    /// When it has none, or a wrong one.
    pub fn authorize(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.keys.tags.is_empty() || self.has_key(headers) { Ok(()) } else { Err(ApiError::unauthorized()) }
    }

    /// Whether a request comes from our own commands.
    ///
    /// # Errors
    /// When it does not.
    pub fn require_control(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let own = self.control.accept(key(headers));
        if own { Ok(()) } else { Err(ApiError::unauthorized()) }
    }

    fn has_key(&self, headers: &HeaderMap) -> bool {
        let key = key(headers);
        self.keys.accept(key) || self.control.accept(key)
    }

    fn is_own_name(&self, host: &str) -> bool {
        let name = without_port(host).to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let address = name.trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || address.parse::<IpAddr>().is_ok() || self.hosts.iter().any(|own| own == name)
    }

    fn is_own_page(&self, origin: &HeaderValue, host: &str) -> bool {
        let origin = origin.to_str().unwrap_or_default();
        ["http://", "https://"].iter().any(|scheme| origin.strip_prefix(scheme) == Some(host))
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        self.origins.iter().any(|own| own == "*" || own.as_bytes() == origin.as_bytes())
    }

    /// The headers that let a page of an allowed site read the response.
    pub fn share(&self, request: &HeaderMap, response: &mut HeaderMap) {
        let Some(origin) = request.get(ORIGIN).filter(|origin| self.allows(origin)) else { return };
        response.insert("access-control-allow-origin", origin.clone());
        response.insert("vary", HeaderValue::from_static("origin"));
    }

    /// Whether a request is a browser's question about another one, from an allowed site.
    pub fn is_preflight(&self, method: &Method, headers: &HeaderMap) -> bool {
        *method == Method::OPTIONS && headers.get(ORIGIN).is_some_and(|origin| self.allows(origin))
    }
}

/// The key that a request brings; empty when it brings none.
fn key(headers: &HeaderMap) -> &[u8] {
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    // Anthropic's clients have a header of their own.
    let key = bearer.or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes));
    key.unwrap_or_default().trim_ascii()
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        // An address of version 6 without a port has colons, too.
        Some((name, port))
            if port.bytes().all(|byte| byte.is_ascii_digit()) && (!name.contains(':') || name.ends_with(']')) =>
        {
            name
        }
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef";

    fn access(keys: &[&str]) -> Access {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        Access::new(&keys, "control", &["Box.Example".to_owned()], &["https://app.example".to_owned()]).unwrap()
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn names_of_other_hosts_are_refused() {
        let access = access(&[]);
        for own in
            ["localhost", "localhost:8081", "127.0.0.1:8081", "[::1]:8081", "[::1]", "192.168.1.2", "box.example:80"]
        {
            let mut map = HeaderMap::new();
            map.insert(HOST, HeaderValue::from_static(own));
            assert!(access.admit(&map).is_ok(), "{own}");
        }
        for foreign in ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:8081", "evil.example:127"]
        {
            assert!(access.admit(&headers(&[("host", foreign)])).is_err(), "{foreign}");
        }
        let mut two = headers(&[("host", "localhost")]);
        two.append(HOST, HeaderValue::from_static("evil.example"));
        assert!(access.admit(&two).is_err());
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let access = access(&[]);
        let from = |origin: &'static str| access.admit(&headers(&[("host", "localhost:8081"), ("origin", origin)]));
        assert!(from("http://localhost:8081").is_ok(), "our own page");
        assert!(from("https://app.example").is_ok(), "allowed");
        for foreign in ["https://evil.example", "null", "http://localhost:3000", "http://localhost:8081.evil.example"] {
            assert!(from(foreign).is_err(), "{foreign}");
        }
        let mut answer = HeaderMap::new();
        access.share(&headers(&[("origin", "https://evil.example")]), &mut answer);
        assert!(answer.is_empty());
        access.share(&headers(&[("origin", "https://app.example")]), &mut answer);
        assert_eq!(answer["access-control-allow-origin"], "https://app.example");
    }

    #[test]
    fn keys() {
        assert!(access(&[]).authorize(&HeaderMap::new()).is_ok(), "none is needed");
        let access = access(&[KEY]);
        for good in [
            ("authorization", "Bearer 0123456789abcdef"),
            ("authorization", "bearer 0123456789abcdef"),
            ("x-api-key", KEY),
            ("x-api-key", "control"),
        ] {
            assert!(access.authorize(&headers(&[good])).is_ok(), "{good:?}");
        }
        for bad in [
            ("authorization", "Bearer 0123456789abcde"),
            ("authorization", KEY),
            ("authorization", "Bearer "),
            ("x-api-key", ""),
        ] {
            assert!(access.authorize(&headers(&[bad])).is_err(), "{bad:?}");
        }
        assert!(access.authorize(&HeaderMap::new()).is_err());
        assert!(matches!(Access::new(&["short".to_owned()], "", &[], &[]), Err(KeyError::Short(5))));
        assert!(!format!("{access:?}").contains(KEY));
    }
}

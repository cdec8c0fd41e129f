//! git's smart HTTP: one GET that advertises, then POSTs. Proxies, certificates, headers and passwords are those that git
//! itself is set up with (`http.*`, its environment variables, its credential helpers).
//!
//! The protocol: git's `Documentation/gitprotocol-http.adoc`. Plain `http` goes through a proxy by CONNECT, too.
//! Redirects are followed on the first request only; what is secret never goes to another origin.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use ureq::http::{HeaderMap, Request};

use super::address::{self, Parts};
use super::program::{Git, Settings};
use crate::base::cancel::Cancel;
use crate::base::fs;
use crate::source::{SourceError, World};

const MAX_REDIRECTS: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a server may be silent: it may pack a large repository before the first byte.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a waiter looks whether the user asked to stop.
const POLL: Duration = Duration::from_millis(25);
const MAX_CERTIFICATES_BYTES: u64 = 16 << 20;
const DISCOVERY: &str = "/info/refs?service=git-upload-pack";

/// A connection to one repository.
#[derive(Debug)]
pub struct Http<'w> {
    world: &'w World,
    settings: &'w Settings,
    /// The repository's address without user, as it travels; a redirect changes it.
    base: String,
    /// User name and, perhaps, password that were written in the address.
    written: Option<(String, Option<String>)>,
    login: Option<Login>,
    agent: ureq::Agent,
    headers: Vec<(String, String)>,
}

#[derive(Clone, PartialEq, Eq)]
struct Login {
    user: String,
    password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Login(..)")
    }
}

/// A request's answer, read as it comes.
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    body: Box<dyn Read>,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub fn into_body(self) -> Box<dyn Read> {
        self.body
    }
}

impl<'w> Http<'w> {
    /// # Errors
    /// When the address, a proxy or a certificate file cannot be understood.
    pub fn new(world: &'w World, settings: &'w Settings, address: &str) -> Result<Self, SourceError> {
        let no_address = || missing(address, "this is not an http address".to_owned(), None);
        let parts = Parts::of(address).ok_or_else(no_address)?;
        let text = |part: &str| address::decode(part).unwrap_or_default();
        let written = parts.user.map(|user| (text(user), parts.password.map(text)));
        let agent = agent(world, settings, address)?;
        let base = address::encode(address::without_user(address).trim_end_matches('/'));
        let headers = headers(settings, address);
        Ok(Self { world, settings, base, written, login: None, agent, headers })
    }

    /// Asks what the repository offers.
    ///
    /// # Errors
    /// [`SourceError`] for everything but a git server's answer.
    pub fn discover(&mut self) -> Result<Box<dyn Read>, SourceError> {
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.with_login(|http| http.send(DISCOVERY, None))?;
            if matches!(answer.status, 301 | 302 | 303 | 307 | 308) {
                self.follow(answer.header("location"))?;
                continue;
            }
            self.expect(&answer, "application/x-git-upload-pack-advertisement")?;
            return Ok(answer.into_body());
        }
        Err(self.network(format!("more than {MAX_REDIRECTS} redirects"), None))
    }

    /// Sends one request of the protocol.
    ///
    /// # Errors
    /// As [`Http::discover`]; a redirect is one, too.
    pub fn call(&mut self, body: &[u8]) -> Result<Box<dyn Read>, SourceError> {
        let answer = self.with_login(|http| http.send("/git-upload-pack", Some(body)))?;
        self.expect(&answer, "application/x-git-upload-pack-result")?;
        Ok(answer.into_body())
    }

    /// What went wrong while an answer was read.
    pub fn broke(&self, error: &io::Error) -> SourceError {
        match self.world.task.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => self.network(read_problem(error), None),
        }
    }

    pub fn network(&self, why: String, hint: Option<&str>) -> SourceError {
        SourceError::Network { what: format!("`{}`", self.base), why, hint: hint.map(str::to_owned) }
    }

    fn with_login(&mut self, send: impl Fn(&Self) -> Result<Answer, SourceError>) -> Result<Answer, SourceError> {
        let answer = send(self)?;
        if answer.status != 401 || self.login.is_some() {
            return Ok(answer);
        }
        if let Some((user, Some(password))) = self.written.clone() {
            self.login = Some(Login { user, password });
            let answer = send(self)?;
            if answer.status != 401 {
                return Ok(answer);
            }
        }
        let Some(login) = self.ask("fill", None)? else {
            self.login = None;
            return Ok(answer);
        };
        self.login = Some(login.clone());
        let answer = send(self)?;
        self.ask(if answer.status == 401 { "reject" } else { "approve" }, Some(&login))?;
        Ok(answer)
    }

    /// git's credential helpers; see `git help credential`.
    fn ask(&self, action: &str, login: Option<&Login>) -> Result<Option<Login>, SourceError> {
        let Some(parts) = Parts::of(&self.base) else { return Ok(None) };
        let authority = self.base.split("://").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or_default();
        let path = parts.path.trim_start_matches('/');
        let mut input = format!("protocol={}\nhost={authority}\npath={path}\n", parts.scheme);
        match (login, &self.written) {
            (Some(login), _) => input += &format!("username={}\npassword={}\n", login.user, login.password),
            (None, Some((user, None))) => input += &format!("username={user}\n"),
            (None, _) => {}
        }
        input.push('\n');
        let git = Git::at(self.world, &self.world.project).env("GIT_DIR", "aitools-none");
        let Some(text) = git.credential(action, &input)? else { return Ok(None) };
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        Ok(match (field("username"), field("password")) {
            (Some(user), Some(password)) => Some(Login { user: user.to_owned(), password: password.to_owned() }),
            _ => None,
        })
    }

    fn send(&self, path: &str, body: Option<&[u8]>) -> Result<Answer, SourceError> {
        let address = format!("{}{path}", self.base);
        let mut request = Request::builder().method(if body.is_some() { "POST" } else { "GET" }).uri(&address);
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        request = request.header("Git-Protocol", "version=2").header("Accept-Encoding", "gzip");
        if body.is_some() {
            request = request
                .header("Content-Type", "application/x-git-upload-pack-request")
                .header("Accept", "application/x-git-upload-pack-result");
        }
        if let Some(login) = &self.login {
            let pair = base64(format!("{}:{}", login.user, login.password).as_bytes());
            request = request.header("Authorization", format!("Basic {pair}"));
        }
        let request = request.body(body.unwrap_or_default().to_vec());
        let request = request.map_err(|error| self.network(format!("the request is not valid: {error}"), None))?;
        let answer = exchange(self.agent.clone(), request, self.world.task.cancel());
        answer.map_err(|error| match self.world.task.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => self.network(error.0, error.1),
        })
    }

    /// Goes where the first request was sent to, and forgets every secret when that is another origin.
    fn follow(&mut self, location: &str) -> Result<(), SourceError> {
        let here = format!("{}{DISCOVERY}", self.base);
        let refuse =
            |why: &str| self.network(format!("it redirects to `{}`: {why}", address::without_user(location)), None);
        let (Some(old), Some(there)) = (Parts::of(&here), join(&here, location)) else {
            return Err(refuse("this is no address"));
        };
        let Some(base) = there.strip_suffix(DISCOVERY) else {
            return Err(refuse("this is not a git repository's address"));
        };
        let base = address::encode(&address::without_user(base));
        let Some(new) = Parts::of(&base).filter(|new| matches!(new.scheme.as_str(), "http" | "https")) else {
            return Err(refuse("this is no http address"));
        };
        if old.scheme == "https" && new.scheme == "http" {
            return Err(refuse("it leads from https to http"));
        }
        if !old.same_origin(&new) {
            (self.login, self.written) = (None, None);
        }
        // Settings are looked up anew, so that headers and proxies meant for one address do not go to another.
        self.agent = agent(self.world, self.settings, &base)?;
        self.headers = headers(self.settings, &base);
        if !old.same_origin(&new) {
            self.headers.retain(|(name, _)| name == "User-Agent");
        }
        self.base = base;
        Ok(())
    }

    /// Only a success of the right type goes on.
    fn expect(&self, answer: &Answer, media_type: &str) -> Result<(), SourceError> {
        let what = || format!("`{}`", self.base);
        let given = answer.header("content-type");
        match answer.status {
            200 if given.split(';').next().unwrap_or_default().trim() == media_type => Ok(()),
            200 if given.starts_with("text/html") => {
                let hint = "open the address in a browser: it may be a login or proxy page, or not a repository";
                Err(self
                    .network("the server answers with a web page, not with a git repository".to_owned(), Some(hint)))
            }
            200 => {
                let hint = "the server must speak git's smart protocol";
                Err(self.network(format!("the answer has the type `{given}`, expected `{media_type}`"), Some(hint)))
            }
            401 => {
                let hint =
                    "if the repository exists, store a password with `git credential approve` or a credential helper";
                let why = match &self.login {
                    Some(_) => "401: the user name and password are not accepted",
                    None => "401: the server wants a user name and password, and git has none for it",
                };
                Err(self.network(why.to_owned(), Some(hint)))
            }
            403 => Err(self.network("403: the server forbids access".to_owned(), Some("check the access rights"))),
            404 | 410 => {
                let hint = "check the address; servers also hide private repositories this way".to_owned();
                let why = format!("{}: there is no such repository", answer.status);
                Err(SourceError::Missing { what: what(), why, hint: Some(hint) })
            }
            407 => Err(self.network("407: the proxy wants a user name and password".to_owned(), Some(PROXY_HINT))),
            429 => Err(self.network("429: the server has had too many requests".to_owned(), Some("try again later"))),
            status @ 500.. => Err(self.network(format!("{status}: the server has failed"), Some("try again later"))),
            status => Err(self.network(format!("unexpected answer {status}"), None)),
        }
    }
}

const PROXY_HINT: &str = "check `http.proxy` of git, and HTTPS_PROXY, ALL_PROXY and NO_PROXY in the environment";

fn missing(address: &str, why: String, hint: Option<String>) -> SourceError {
    SourceError::Missing { what: format!("`{}`", address::without_user(address)), why, hint }
}

/// An address relative to another.
fn join(base: &str, location: &str) -> Option<String> {
    let (scheme, rest) = base.split_once("://")?;
    let (authority, path) = rest.split_at(rest.find('/')?);
    if location.contains("://") {
        return Some(location.to_owned());
    }
    Some(match location {
        "" => return None,
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ => {
            let folder = &path[..=path.split('?').next()?.rfind('/')?];
            format!("{scheme}://{authority}{folder}{location}")
        }
    })
}

fn headers(settings: &Settings, address: &str) -> Vec<(String, String)> {
    // Servers tell git clients by this name.
    let agent = ("User-Agent".to_owned(), concat!("git/2.0 (aitools ", env!("CARGO_PKG_VERSION"), ")").to_owned());
    let extra = settings.http("extraheader", address).into_iter().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.trim().to_owned(), value.trim().to_owned()))
    });
    std::iter::once(agent).chain(extra).collect()
}

fn agent(world: &World, settings: &Settings, address: &str) -> Result<ureq::Agent, SourceError> {
    let proxy = match proxy(world, settings, address) {
        None => None,
        Some(text) => Some(ureq::Proxy::new(&text).map_err(|_| SourceError::Network {
            what: format!("`{}`", address::without_user(address)),
            why: format!("the proxy `{}` is not an address", address::without_user(&text)),
            hint: Some(PROXY_HINT.to_owned()),
        })?),
    };
    let config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(proxy)
        .tls_config(tls(world, settings, address)?)
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_per_read(Some(STALL_TIMEOUT))
        .timeout_per_write(Some(STALL_TIMEOUT))
        .build();
    Ok(config.new_agent())
}

fn tls(world: &World, settings: &Settings, address: &str) -> Result<ureq::tls::TlsConfig, SourceError> {
    use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
    let env = |name: &str| world.env.get(name).map(String::as_str).filter(|value| !value.is_empty());
    let set = |name| settings.http(name, address).last().copied();
    let off = matches!(set("sslverify"), Some("false" | "no" | "off" | "0")) || env("GIT_SSL_NO_VERIFY").is_some();
    if off {
        world.task.warn(format!("certificates are not checked for `{}`", address::without_user(address)));
    }
    let file = env("GIT_SSL_CAINFO").or_else(|| set("sslcainfo").filter(|path| !path.is_empty()));
    let roots = match file.or_else(|| env("SSL_CERT_FILE")) {
        None => RootCerts::PlatformVerifier,
        Some(path) => {
            let path = match (path.strip_prefix("~/"), env("HOME")) {
                (Some(rest), Some(home)) => std::path::Path::new(home).join(rest),
                _ => world.project.join(path),
            };
            let bytes = fs::read_bounded(&path, MAX_CERTIFICATES_BYTES)?;
            let found: Vec<_> = parse_pem(&bytes)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            if found.is_empty() {
                let what = format!("`{}`", path.display());
                let why =
                    "this file of trusted certificates (`http.sslCAInfo`, GIT_SSL_CAINFO or SSL_CERT_FILE) has none";
                return Err(SourceError::Missing { what, why: why.to_owned(), hint: None });
            }
            RootCerts::new_with_certs(&found)
        }
    };
    Ok(TlsConfig::builder().root_certs(roots).disable_verification(off).build())
}

/// Which proxy git would take: its own setting, else the environment, as curl reads it.
fn proxy(world: &World, settings: &Settings, address: &str) -> Option<String> {
    let parts = Parts::of(address)?;
    let env = |name: &str| world.env.get(name).or_else(|| world.env.get(&name.to_uppercase())).map(String::as_str);
    // `HTTP_PROXY` in upper case is not read: a web server may have set it from a request's header.
    let from_env = || match parts.scheme.as_str() {
        "http" => world.env.get("http_proxy").map(String::as_str),
        _ => env("https_proxy"),
    };
    let set = settings.http("proxy", address).last().copied();
    let chosen = set.or_else(from_env).or_else(|| env("all_proxy")).filter(|text| !text.is_empty())?;
    let spared = env("no_proxy").is_some_and(|list| spares(list, &parts.host, parts.port));
    (!spared).then(|| chosen.to_owned())
}

/// Whether a `NO_PROXY` list names the host: exactly, by a parent domain, or by `*`.
fn spares(list: &str, host: &str, port: u16) -> bool {
    list.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        let entry = match entry.rsplit_once(':') {
            Some((name, digits)) if digits.parse() == Ok(port) && !name.ends_with(':') => name,
            _ => entry.as_str(),
        };
        let name = entry.trim_start_matches("*.").trim_start_matches('.');
        let host = host.trim_start_matches('[').trim_end_matches(']');
        entry == "*" || host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
    })
}

type Problem = (String, Option<&'static str>);

enum Message {
    Head(Result<(u16, HeaderMap), Problem>),
    Bytes(Vec<u8>),
    End(io::Result<()>),
}

/// Sends a request from a thread of its own, so that a silent server cannot hold up a user who wants to stop.
/// At most a few chunks are under way at a time.
fn exchange(agent: ureq::Agent, request: Request<Vec<u8>>, cancel: &Cancel) -> Result<Answer, Problem> {
    let (sender, receiver) = sync_channel(4);
    std::thread::spawn(move || converse(&agent, request, &sender));
    let mut body = Chunks { receiver, cancel: cancel.clone(), chunk: Vec::new(), at: 0, over: false };
    match body.next() {
        Ok(Message::Head(head)) => {
            let (status, headers) = head?;
            let zipped = headers.get("content-encoding").is_some_and(|coding| coding.as_bytes() == b"gzip");
            let body: Box<dyn Read> =
                if zipped { Box::new(flate2::read::MultiGzDecoder::new(body)) } else { Box::new(body) };
            Ok(Answer { status, headers, body })
        }
        Ok(_) => Err(("the connection was lost".to_owned(), None)),
        Err(error) => Err((error.to_string(), None)),
    }
}

fn converse(agent: &ureq::Agent, request: Request<Vec<u8>>, sender: &SyncSender<Message>) {
    let answer = match agent.run(request) {
        Ok(answer) => answer,
        Err(error) => {
            let _ = sender.send(Message::Head(Err(problem(&error))));
            return;
        }
    };
    let (parts, body) = answer.into_parts();
    let _ = sender.send(Message::Head(Ok((parts.status.as_u16(), parts.headers))));
    let mut reader = body.into_reader();
    loop {
        let mut chunk = vec![0; 1 << 16];
        let message = match reader.read(&mut chunk) {
            Ok(0) => Message::End(Ok(())),
            Ok(count) => {
                chunk.truncate(count);
                Message::Bytes(chunk)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Message::End(Err(error)),
        };
        let last = matches!(message, Message::End(_));
        // Nobody listens any more when the other side was cancelled or has read enough.
        if sender.send(message).is_err() || last {
            return;
        }
    }
}

/// The receiving end of [`exchange`].
struct Chunks {
    receiver: Receiver<Message>,
    cancel: Cancel,
    chunk: Vec<u8>,
    at: usize,
    over: bool,
}

impl Chunks {
    fn next(&mut self) -> io::Result<Message> {
        loop {
            self.cancel.check().map_err(io::Error::other)?;
            match self.receiver.recv_timeout(POLL) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }
}

impl Read for Chunks {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() && !self.over {
            match self.next()? {
                Message::Bytes(chunk) => (self.chunk, self.at) = (chunk, 0),
                Message::End(end) => {
                    self.over = true;
                    end?;
                }
                Message::Head(_) => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        let count = into.len().min(self.chunk.len() - self.at);
        into[..count].copy_from_slice(&self.chunk[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

fn problem(error: &ureq::Error) -> Problem {
    match error {
        ureq::Error::HostNotFound => ("the host name is not known".to_owned(), Some(PROXY_HINT)),
        ureq::Error::ConnectionFailed => ("the connection failed".to_owned(), Some(PROXY_HINT)),
        ureq::Error::Timeout(_) => ("the server does not answer in time".to_owned(), Some(PROXY_HINT)),
        ureq::Error::Io(error) => (read_problem(error), Some(PROXY_HINT)),
        ureq::Error::Tls(_) | ureq::Error::Rustls(_) => {
            let hint =
                "if the network has certificates of its own, name their file with `http.sslCAInfo` or SSL_CERT_FILE";
            (format!("no trusted connection: {error}"), Some(hint))
        }
        other => (other.to_string(), None),
    }
}

fn read_problem(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection ended too early".to_owned(),
        io::ErrorKind::TimedOut => format!("the server sent nothing for {} s", STALL_TIMEOUT.as_secs()),
        _ => error.to_string(),
    }
}

/// RFC 4648, for `Authorization: Basic`.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let number = three.iter().fold(0_u32, |number, byte| number << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..4 {
            let letter = LETTERS[(number >> (18 - 6 * place)) as usize & 63];
            text.push(if place > three.len() { '=' } else { char::from(letter) });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_standard() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(base64(&[0xff, 0xfe]), "//4=");
    }

    #[test]
    fn hosts_without_proxy() {
        for (list, want) in [
            ("*", true),
            ("h.net", true),
            (".net", true),
            ("x, NET", true),
            ("*.net", true),
            ("h.net:8080", true),
            ("h.net:81", false),
            ("et", false),
            ("", false),
        ] {
            assert_eq!(spares(list, "h.net", 8080), want, "{list}");
        }
        assert!(spares("::1", "[::1]", 1));
    }

    #[test]
    fn redirects_are_joined() {
        let base = "http://h:1/a/b/info/refs?service=git-upload-pack";
        assert_eq!(join(base, "/x").as_deref(), Some("http://h:1/x"));
        assert_eq!(join(base, "//o/x").as_deref(), Some("http://o/x"));
        assert_eq!(join(base, "https://o/x").as_deref(), Some("https://o/x"));
        assert_eq!(join(base, "y?z").as_deref(), Some("http://h:1/a/b/info/y?z"));
        assert_eq!(join(base, ""), None);
    }
}

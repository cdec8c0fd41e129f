//! git's smart HTTP: one GET that advertises, then POSTs, over the one client in [`crate::base::http`]. Proxies,
//! certificates, headers and passwords are those that git itself is set up with (`http.*`, its credential helpers).
//!
//! The protocol: git's `Documentation/gitprotocol-http.adoc`. Redirects are followed on the first request only; what is
//! secret never goes to another origin. Absent: `http.sslVerify=false` (a certificate is named by `http.sslCAInfo`).

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::address::{self, Parts};
use super::program::{Configuration, Git};
use crate::base::http::{self, Follow, HttpError, Method, Request, Response, comes_later, pause, same_origin};
use crate::source::{self, SourceError, World};

/// How long a server may be silent: it may pack a large repository before the first byte.
const STALL_TIMEOUT: Duration = Duration::from_secs(120);
/// How often the watcher looks whether the user asked to stop.
const POLL: Duration = Duration::from_millis(25);
/// Pauses before a server that has failed is asked again.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(1500)];
const DISCOVERY: &str = "/info/refs?service=git-upload-pack";
const ADVERTISEMENT: &str = "application/x-git-upload-pack-advertisement";
const RESULT: &str = "application/x-git-upload-pack-result";
/// Some servers know git's clients by this name.
const USER_AGENT: &str = concat!("git/2.0 (aitools ", env!("CARGO_PKG_VERSION"), ")");

/// A connection to one repository.
#[derive(Debug)]
pub struct Http<'w> {
    world: &'w World,
    client: http::Http,
    /// The repository's address without user, as it travels; a redirect changes it.
    base: String,
    /// User name and, perhaps, password that were written in the address.
    written: Option<(String, Option<String>)>,
    login: Option<Login>,
    /// `http.extraHeader`: may be secret.
    extra: Vec<(String, String)>,
    _watch: Watch,
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

/// Ends the client's connections when the user asks to stop, until it is dropped.
#[derive(Debug)]
struct Watch(Arc<AtomicBool>);

impl Watch {
    fn over(client: &http::Http) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let (client, over) = (client.clone(), Arc::clone(&done));
        std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                if client.settings().cancel.is_cancelled() {
                    return client.abort();
                }
                std::thread::sleep(POLL);
            }
        });
        Self(done)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'w> Http<'w> {
    /// # Errors
    /// When the address or a certificate file cannot be understood.
    pub fn new(world: &'w World, configuration: &Configuration, address: &str) -> Result<Self, SourceError> {
        let parts = Parts::of(address).ok_or_else(|| SourceError::Missing {
            what: format!("`{}`", address::without_user(address)),
            why: "this is not an http address".to_owned(),
            hint: None,
        })?;
        let text = |part: &str| address::decode(part).unwrap_or_default();
        let mut settings = world.http()?.settings().clone();
        settings.stall_timeout = STALL_TIMEOUT;
        if let Some(path) = certificates(world, configuration, address) {
            settings.certificates = Some(source::certificates(&path)?);
        }
        if let Some(proxy) = configuration.http("proxy", address).last() {
            settings.env.retain(|name, _| {
                !name.to_ascii_lowercase().ends_with("_proxy") || name.eq_ignore_ascii_case("no_proxy")
            });
            settings.env.insert(format!("{}_proxy", parts.scheme), (*proxy).to_owned());
        }
        let client = http::Http::new(settings);
        let extra = configuration.http("extraheader", address).into_iter().filter_map(|line| line.split_once(':'));
        Ok(Self {
            world,
            base: address::encode(address::without_user(address).trim_end_matches('/')),
            written: parts.user.map(|user| (text(user), parts.password.map(text))),
            login: None,
            extra: extra.map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned())).collect(),
            _watch: Watch::over(&client),
            client,
        })
    }

    /// Asks what the repository offers.
    ///
    /// # Errors
    /// [`SourceError`] for everything but a git server's answer.
    pub fn discover(&mut self) -> Result<Box<dyn Read>, SourceError> {
        let answer = self.with_login(|http| http.send(DISCOVERY, None))?;
        if answer.url != format!("{}{DISCOVERY}", self.base) {
            self.follow(&answer.url)?;
        }
        self.body(answer, ADVERTISEMENT)
    }

    /// Sends one request of the protocol.
    ///
    /// # Errors
    /// As [`Http::discover`]; a redirect is one, too.
    pub fn call(&mut self, body: &[u8]) -> Result<Box<dyn Read>, SourceError> {
        let answer = self.with_login(|http| http.send("/git-upload-pack", Some(body)))?;
        self.body(answer, RESULT)
    }

    /// What went wrong while an answer was read.
    pub fn broke(&self, error: &io::Error) -> SourceError {
        match self.world.task.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.network("the connection ended too early".to_owned(), Some("try again"))
            }
            Ok(()) => self.network(error.to_string(), Some("try again")),
        }
    }

    pub fn network(&self, why: String, hint: Option<&str>) -> SourceError {
        SourceError::Network { what: format!("`{}`", self.base), why, hint: hint.map(str::to_owned) }
    }

    fn with_login(&mut self, send: impl Fn(&Self) -> Result<Response, SourceError>) -> Result<Response, SourceError> {
        let answer = send(self)?;
        // A password is for the origin that was asked; one that was redirected to is asked directly first.
        if answer.status != 401 || self.login.is_some() {
            return Ok(answer);
        }
        if !same_origin(&answer.url, &self.base) {
            self.follow(&answer.url)?;
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
        match answer.status {
            401 => self.ask("reject", Some(&login))?,
            _ => self.ask("approve", Some(&login))?,
        };
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
        let Some(text) = Git::nowhere(self.world).credential(action, &input)? else { return Ok(None) };
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        Ok(match (field("username"), field("password")) {
            (Some(user), Some(password)) => Some(Login { user: user.to_owned(), password: password.to_owned() }),
            _ => None,
        })
    }

    /// Sends a request, again when the server asks for it or the connection breaks before an answer.
    fn send(&self, path: &str, body: Option<&[u8]>) -> Result<Response, SourceError> {
        let url = format!("{}{path}", self.base);
        let login = self.login.as_ref().map(|login| {
            let pair = STANDARD.encode(format!("{}:{}", login.user, login.password));
            ("Authorization", format!("Basic {pair}"))
        });
        let mut headers = vec![("User-Agent", USER_AGENT), ("Git-Protocol", "version=2"), ("Accept-Encoding", "gzip")];
        headers.extend(self.extra.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        headers.extend(login.as_ref().map(|(name, value)| (*name, value.as_str())));
        let (method, follow) = match body {
            Some(_) => (Method::POST, Follow::Nowhere),
            None => (Method::GET, Follow::Anywhere),
        };
        if body.is_some() {
            headers.extend([("Content-Type", "application/x-git-upload-pack-request"), ("Accept", RESULT)]);
        }
        let request = Request { method, url: &url, headers: &headers, body, follow };
        let mut pauses = PAUSES.iter();
        loop {
            let answer = self.client.send(&request);
            let passing = match &answer {
                Ok(answer) => comes_later(answer.status),
                Err(HttpError::Broken { .. }) => true,
                Err(_) => false,
            };
            match pauses.next().filter(|_| passing) {
                Some(delay) => pause(self.world.task.cancel(), *delay)?,
                None => return answer.map_err(|error| self.failed(error)),
            }
        }
    }

    fn failed(&self, error: HttpError) -> SourceError {
        if let Err(cancelled) = self.world.task.check() {
            return cancelled.into();
        }
        let hint = matches!(error, HttpError::Unreachable { .. }).then_some(PROXY_HINT);
        match error {
            HttpError::Address { url, why }
            | HttpError::Unreachable { url, why }
            | HttpError::Broken { url, why }
            | HttpError::Unexpected { url, why } => {
                // After a redirect the address is another one.
                let why = if url.starts_with(&self.base) { why } else { format!("`{url}`: {why}") };
                self.network(why, hint)
            }
            error => SourceError::of_http(&format!("`{}`", self.base), error),
        }
    }

    /// Goes on where the first request was answered, without what is secret when that is another origin.
    fn follow(&mut self, url: &str) -> Result<(), SourceError> {
        let Some(base) = url.strip_suffix(DISCOVERY) else {
            let why = format!("it redirects to `{}`, which is not a git repository's address", http::shown(url));
            return Err(self.network(why, Some("open the address in a browser: it may be a login page")));
        };
        if !same_origin(base, &self.base) {
            (self.login, self.written) = (None, None);
            self.extra.clear();
        }
        base.clone_into(&mut self.base);
        Ok(())
    }

    /// Only a success of the right type goes on.
    fn body(&self, answer: Response, media_type: &str) -> Result<Box<dyn Read>, SourceError> {
        let given = answer.header("content-type").unwrap_or_default();
        match answer.status {
            200 if given.split(';').next().unwrap_or_default().trim() == media_type => {
                let zipped = answer.header("content-encoding") == Some("gzip");
                Ok(if zipped { Box::new(flate2::read::MultiGzDecoder::new(answer)) } else { Box::new(answer) })
            }
            200 if given.starts_with("text/html") => {
                let hint = "open the address in a browser: it may be a login or proxy page, or not a repository";
                Err(self
                    .network("the server answers with a web page, not with a git repository".to_owned(), Some(hint)))
            }
            200 => {
                let given: String = given.chars().filter(|c| !c.is_control()).take(100).collect();
                let hint = "the server must speak git's smart protocol";
                Err(self.network(format!("the answer has the type `{given}`, expected `{media_type}`"), Some(hint)))
            }
            status => Err(self.refused(status)),
        }
    }

    fn refused(&self, status: u16) -> SourceError {
        let (why, hint) = match status {
            401 if self.login.is_some() => ("the user name and password are not accepted", LOGIN_HINT),
            401 => ("the server wants a user name and password, and git has none for it", LOGIN_HINT),
            403 => ("the server forbids access", "check the access rights"),
            404 | 410 => {
                let why = format!("HTTP status {status}: there is no such repository");
                let hint = "check the address; servers also hide private repositories this way".to_owned();
                return SourceError::Missing { what: format!("`{}`", self.base), why, hint: Some(hint) };
            }
            407 => ("the proxy wants a user name and password", PROXY_HINT),
            429 => ("the server has had too many requests", "try again later"),
            500.. => ("the server has failed", "try again later"),
            _ => ("an answer that git's protocol does not have here", "check the address"),
        };
        self.network(format!("HTTP status {status}: {why}"), Some(hint))
    }
}

const LOGIN_HINT: &str = "if the repository exists, give git a password for it (`git help credential`)";
const PROXY_HINT: &str = "check git's `http.proxy`, and HTTPS_PROXY, ALL_PROXY and NO_PROXY in the environment";

/// The file of certificates that git alone would trust.
fn certificates(world: &World, configuration: &Configuration, address: &str) -> Option<PathBuf> {
    let env = |name: &str| world.env.get(name).map(String::as_str).filter(|value| !value.is_empty());
    let set = configuration.http("sslcainfo", address).last().copied().filter(|path| !path.is_empty());
    let path = env("GIT_SSL_CAINFO").or(set)?;
    Some(match (path.strip_prefix("~/"), env("HOME")) {
        (Some(rest), Some(home)) => Path::new(home).join(rest),
        _ => world.project.join(path),
    })
}

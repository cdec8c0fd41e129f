//! The one HTTP client: TLS with the platform's certificates (`SSL_CERT_FILE` works), proxies from the environment that
//! it is given, redirects that never carry a secret to another origin, time limits on everything, cancellable.
//!
//! Absent: cookies, caches, compression (bytes are hashed as they travel), retries (see [`Backoff`] for who wants them).

mod forward;
mod upload;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use ureq::config::Config;
pub use ureq::http::Method;
use ureq::http::header::{HeaderMap, HeaderName, HeaderValue};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy, ProxyProtocol, Timeout};
use url::Url;

use super::cancel::{Cancel, Cancelled};

/// Redirects followed for one request.
pub const MAX_REDIRECTS: usize = 10;
/// The longest wait a server may ask for (`Retry-After`); one that asks for more is taken as refusing.
pub const MAX_WAIT: Duration = Duration::from_secs(330);
/// A slower connection counts as broken.
const MIN_BYTES_PER_SECOND: f64 = 1000.0;
const POLL: Duration = Duration::from_millis(50);
/// Headers that are sent after a redirect to another origin. Every other header may be a secret.
const PUBLIC_HEADERS: [&str; 4] = ["accept", "if-range", "range", "git-protocol"];

/// What a client needs from its environment.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Environment variables: `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY` and their lowercase twins are read.
    pub env: BTreeMap<String, String>,
    /// Send no request.
    pub offline: bool,
    /// Ends every request when the user asks to stop.
    pub cancel: Cancel,
    /// How long connecting may take.
    pub connect_timeout: Duration,
    /// How long no byte may come.
    pub stall_timeout: Duration,
    /// The first delay of a [`Backoff`].
    pub pace: Duration,
    /// PEM text: the certificates to trust instead of the platform's.
    pub certificates: Option<Vec<u8>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            env: BTreeMap::new(),
            offline: false,
            cancel: Cancel::default(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            pace: Duration::from_millis(500),
            certificates: None,
        }
    }
}

/// Cloning shares the connections.
#[derive(Debug, Clone)]
pub struct Http {
    settings: Settings,
    agents: Arc<RwLock<Agents>>,
}

#[derive(Debug, Clone)]
struct Agents {
    direct: Agent,
    /// By scheme of the target: the agent and the proxy's address for messages.
    proxied: BTreeMap<&'static str, Result<(Agent, String), String>>,
}

impl Agents {
    fn new(settings: &Settings) -> Self {
        let proxied = ["http", "https"].into_iter().filter_map(|scheme| {
            let value = proxy_for(&settings.env, scheme)?;
            let made = Proxy::new(value)
                .map(|proxy| (through(settings, scheme, proxy), shown(value)))
                .map_err(|error| format!("the proxy `{}` cannot be used: {error}", shown(value)));
            Some((scheme, made))
        });
        Self { direct: agent(settings, None), proxied: proxied.collect() }
    }
}

/// Which redirects are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// Up to [`MAX_REDIRECTS`], secrets staying at the first origin.
    Anywhere,
    /// Only while scheme, host and port stay the same: a redirect elsewhere is the answer.
    SameOrigin,
    /// A redirect is the answer.
    Nowhere,
}

/// One request.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The method.
    pub method: Method,
    /// The address, with scheme.
    pub url: &'a str,
    /// May hold secrets (`authorization`): they stay at the origin of `url`.
    pub headers: &'a [(&'a str, &'a str)],
    /// The request body, if there is one.
    pub body: Option<&'a [u8]>,
    /// Which redirects are followed.
    pub follow: Follow,
}

impl<'a> Request<'a> {
    /// A GET that follows redirects.
    pub fn get(url: &'a str, headers: &'a [(&'a str, &'a str)]) -> Self {
        Self { method: Method::GET, url, headers, body: None, follow: Follow::Anywhere }
    }

    /// A HEAD that follows redirects.
    pub fn head(url: &'a str, headers: &'a [(&'a str, &'a str)]) -> Self {
        Self { method: Method::HEAD, ..Self::get(url, headers) }
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum HttpError {
    #[error("`--offline` forbids a request to {url}")]
    Offline { url: String },
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// An invalid address, redirect, header or proxy setting.
    #[error("{url}: {why}")]
    Address { url: String, why: String },
    /// No connection could be made.
    #[error("{url}: {why}")]
    Unreachable { url: String, why: String },
    /// The connection broke or fell silent.
    #[error("{url}: {why}")]
    Broken { url: String, why: String },
    #[error("{url}: the response is larger than {limit_bytes} bytes")]
    TooLarge { url: String, limit_bytes: u64 },
    #[error("{url}: unexpected response: {why}")]
    Unexpected { url: String, why: String },
}

/// An answer, whatever its status. Reading it gives the body; the stall limit applies to each read.
pub struct Response {
    /// The HTTP status code.
    pub status: u16,
    /// Where the answer came from, after redirects.
    pub url: String,
    headers: HeaderMap,
    body: ureq::BodyReader<'static>,
    pace: Pace,
}

/// Finds a connection that is too slow to be of use: fewer than [`MIN_BYTES_PER_SECOND`] over one stall limit. Only the
/// time spent waiting for the server counts.
#[derive(Debug)]
struct Pace {
    window: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    fn note(&mut self, waited: Duration, bytes: usize) -> io::Result<()> {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.waited < self.window {
            return Ok(());
        }
        let slow = (self.bytes as f64) < MIN_BYTES_PER_SECOND * self.waited.as_secs_f64();
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        if !slow {
            return Ok(());
        }
        let why = format!("received fewer than {MIN_BYTES_PER_SECOND} bytes per second for {:?}", self.window);
        Err(io::Error::other(why))
    }
}

impl std::fmt::Debug for Response {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Response").field("status", &self.status).field("url", &shown(&self.url)).finish_non_exhaustive()
    }
}

impl Read for Response {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let began = Instant::now();
        let count = self.body.read(buffer)?;
        if count > 0 {
            self.pace.note(began.elapsed(), count)?;
        }
        Ok(count)
    }
}

impl Response {
    /// The value of a header; None when it is absent or not text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Whether the status is 2xx.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// `Content-Length`, in bytes.
    pub fn length(&self) -> Option<u64> {
        self.header("content-length")?.trim().parse().ok()
    }

    /// How long the server asks us to wait: `Retry-After` in seconds or as a date (RFC 9110 §10.2.3),
    /// else the `t` of `RateLimit` (draft-ietf-httpapi-ratelimit-headers).
    pub fn asks_to_wait(&self) -> Option<Duration> {
        if let Some(text) = self.header("retry-after") {
            return wait_from(text.trim(), SystemTime::now());
        }
        let rest = self.header("ratelimit")?.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
        rest.split(',').next()?.trim().parse().ok().map(Duration::from_secs)
    }
}

/// A whole answer, body included.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers.
    pub response: Response,
    /// The whole body.
    pub body: Vec<u8>,
}

impl Answer {
    /// # Errors
    /// When the body is not JSON of this shape.
    pub fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, HttpError> {
        serde_json::from_slice(&self.body)
            .map_err(|error| HttpError::Unexpected { url: shown(&self.response.url), why: error.to_string() })
    }
}

impl Http {
    /// A client with these settings. Nothing is connected yet.
    pub fn new(settings: Settings) -> Self {
        Self { agents: Arc::new(RwLock::new(Agents::new(&settings))), settings }
    }

    /// The settings of this client.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Ends all connections: pending reads fail immediately. Later requests open new connections,
    /// unless the user asked to stop.
    pub fn abort(&self) {
        let mut agents = self.agents.write().unwrap_or_else(PoisonError::into_inner);
        let old = agents.clone();
        if !self.settings.cancel.is_cancelled() {
            *agents = Agents::new(&self.settings);
        }
        drop(agents);
        old.direct.shutdown();
        for (agent, _) in old.proxied.values().flatten() {
            agent.clone().shutdown();
        }
    }

    /// Sends a request and gives the answer as soon as its head is there. Statuses are not errors.
    /// Not interrupted by a cancel before the stall limit, unless somebody calls [`Http::abort`].
    ///
    /// # Errors
    /// [`HttpError`].
    pub fn send(&self, request: &Request<'_>) -> Result<Response, HttpError> {
        let mut url = parse(request.url)?;
        let origin = url.origin();
        let mut method = request.method.clone();
        for _ in 0..=MAX_REDIRECTS {
            self.settings.cancel.check()?;
            if self.settings.offline {
                return Err(HttpError::Offline { url: shown(url.as_str()) });
            }
            let body = request.body.filter(|_| method == request.method);
            let built = build(request, &method, &url, url.origin() == origin, body.is_some())?;
            let response = self.ask(&url, built, body)?;
            let Some(next) = next(&url, &response)? else { return Ok(response) };
            let stays = next.origin() == url.origin();
            if request.follow == Follow::Nowhere || (request.follow == Follow::SameOrigin && !stays) {
                return Ok(response);
            }
            // As browsers and curl do: a form that was taken is followed by a look at the result.
            if matches!(response.status, 301..=303) && method == Method::POST {
                method = Method::GET;
            }
            url = next;
        }
        Err(HttpError::Address { url: shown(request.url), why: format!("more than {MAX_REDIRECTS} redirects") })
    }

    /// Sends a request and reads the whole answer. A cancel ends it within a moment.
    ///
    /// # Errors
    /// [`HttpError`], also when the body is larger than `limit_bytes`.
    pub fn answer(&self, request: &Request<'_>, limit_bytes: u64) -> Result<Answer, HttpError> {
        let work = || {
            let mut response = self.send(request)?;
            let url = shown(&response.url);
            let mut body = Vec::new();
            let read = (&mut response).take(limit_bytes + 1).read_to_end(&mut body);
            read.map_err(|error| HttpError::Broken { url: url.clone(), why: error.to_string() })?;
            if body.len() as u64 > limit_bytes {
                return Err(HttpError::TooLarge { url, limit_bytes });
            }
            Ok(Answer { response, body })
        };
        let result = std::thread::scope(|scope| {
            let worker = scope.spawn(work);
            while !worker.is_finished() {
                if self.settings.cancel.is_cancelled() {
                    self.abort();
                }
                std::thread::park_timeout(POLL);
            }
            worker.join()
        });
        self.settings.cancel.check()?;
        let died = || HttpError::Broken { url: shown(request.url), why: "the request's thread panicked".to_owned() };
        result.unwrap_or_else(|_| Err(died()))
    }

    /// [`Http::answer`], again after broken connections and answers that ask to come later (408, 429, 5xx).
    /// `waiting` is told why and how long.
    ///
    /// # Errors
    /// The last [`HttpError`]; the last answer is given as it is.
    pub fn answer_patiently(
        &self,
        request: &Request<'_>,
        limit_bytes: u64,
        waiting: &dyn Fn(String),
    ) -> Result<Answer, HttpError> {
        let mut backoff = self.backoff();
        loop {
            let result = self.answer(request, limit_bytes);
            let (why, asked) = match &result {
                Ok(answer) if comes_later(answer.response.status) => {
                    (format!("HTTP status {}", answer.response.status), answer.response.asks_to_wait())
                }
                Err(HttpError::Broken { why, .. } | HttpError::Unreachable { why, .. }) => (why.clone(), None),
                _ => return result,
            };
            let Some(delay) = backoff.after_failure(asked) else {
                if let Some(required) = asked {
                    waiting(format!(
                        "{}: {why}, the server asks for a retry in {} s",
                        shown(request.url),
                        required.as_secs()
                    ));
                }
                return result;
            };
            if asked.is_some() {
                waiting(format!("{}: {why}, the server asks for a retry in {} s", shown(request.url), delay.as_secs()));
            }
            pause(&self.settings.cancel, delay)?;
        }
    }

    /// The delays between tries of one request of this client.
    pub fn backoff(&self) -> Backoff {
        Backoff { failures: 0, pace: self.settings.pace }
    }

    fn ask(&self, url: &Url, request: ureq::http::Request<()>, body: Option<&[u8]>) -> Result<Response, HttpError> {
        let (agent, proxy) = self.agent_for(url)?;
        let (parts, ()) = request.into_parts();
        let answer = match body {
            Some(bytes) => agent.run(ureq::http::Request::from_parts(parts, bytes)),
            None => agent.run(ureq::http::Request::from_parts(parts, ())),
        };
        self.answered(url, proxy.as_deref(), answer)
    }

    /// The answer to a request that was sent to an address, through a proxy or not.
    fn answered(
        &self,
        url: &Url,
        proxy: Option<&str>,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Response, HttpError> {
        let answer = answer.map_err(|error| {
            let cancelled = self.settings.cancel.check();
            cancelled.map_or_else(HttpError::from, |()| worded(&shown(url.as_str()), proxy, error, &self.settings))
        })?;
        let (parts, body) = answer.into_parts();
        Ok(Response {
            status: parts.status.as_u16(),
            url: url.to_string(),
            headers: parts.headers,
            body: body.into_reader(),
            pace: Pace { window: self.settings.stall_timeout, waited: Duration::ZERO, bytes: 0 },
        })
    }

    fn agent_for(&self, url: &Url) -> Result<(Agent, Option<String>), HttpError> {
        let bypass = variable(&self.settings.env, "no_proxy").is_some_and(|list| bypasses(list, url));
        let agents = self.agents.read().unwrap_or_else(PoisonError::into_inner);
        match agents.proxied.get(url.scheme()) {
            Some(Ok((agent, shown))) if !bypass => Ok((agent.clone(), Some(shown.clone()))),
            Some(Err(why)) if !bypass => Err(HttpError::Address { url: shown(url.as_str()), why: why.clone() }),
            _ => Ok((agents.direct.clone(), None)),
        }
    }
}

/// Waits, unless the user asks to stop.
///
/// # Errors
/// [`Cancelled`].
pub fn pause(cancel: &Cancel, delay: Duration) -> Result<(), Cancelled> {
    let end = Instant::now() + delay;
    loop {
        cancel.check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(POLL));
    }
}

/// Whether a status means "try again later".
pub fn comes_later(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// Delays between tries: doubling from the pace (0.5 s) to 30 s, with jitter, six in a row.
#[derive(Debug, Clone)]
pub struct Backoff {
    failures: u32,
    pace: Duration,
}

impl Backoff {
    /// Tries in a row that may fail.
    pub const LIMIT: u32 = 6;

    /// A try succeeded: resets the count of failed tries.
    pub fn progressed(&mut self) {
        self.failures = 0;
    }

    /// How many tries in a row have failed.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// How long to wait before the next try; `asked` is the time that the server asks for. None: give up.
    pub fn after_failure(&mut self, asked: Option<Duration>) -> Option<Duration> {
        self.failures += 1;
        if self.failures > Self::LIMIT || asked.is_some_and(|required| required > MAX_WAIT) {
            return None;
        }
        let full = (self.pace * 2_u32.pow(self.failures - 1)).min(Duration::from_secs(30));
        let mut byte = [0];
        let _ = getrandom::fill(&mut byte);
        let jittered = full / 2 + full * u32::from(byte[0]) / 512;
        Some(asked.map_or(jittered, |required| required.max(self.pace / 2)))
    }
}

/// A file without a certificate is an error.
fn roots(settings: &Settings) -> RootCerts {
    let Some(text) = &settings.certificates else { return RootCerts::PlatformVerifier };
    let certificates = parse_pem(text).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    RootCerts::new_with_certs(&certificates.collect::<Vec<_>>())
}

/// Through a tunnel, unless both sides speak plain `http`: then the proxy is asked as Python's clients ask it.
fn through(settings: &Settings, scheme: &str, proxy: Proxy) -> Agent {
    match proxy.protocol() {
        ProxyProtocol::Http if scheme == "http" => forward::agent(config(settings, None), &proxy),
        _ => agent(settings, Some(proxy)),
    }
}

fn agent(settings: &Settings, proxy: Option<Proxy>) -> Agent {
    config(settings, proxy).new_agent()
}

fn config(settings: &Settings, proxy: Option<Proxy>) -> Config {
    let tls = TlsConfig::builder().root_certs(roots(settings)).build();
    Agent::config_builder()
        .tls_config(tls)
        .proxy(proxy)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("aitools/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .timeout_resolve(Some(settings.connect_timeout))
        .timeout_connect(Some(settings.connect_timeout))
        .timeout_per_read(Some(settings.stall_timeout))
        .timeout_per_write(Some(settings.stall_timeout))
        .timeout_recv_response(Some(settings.stall_timeout * 2))
        .max_idle_connections_per_host(8)
        .build()
}

fn build(
    request: &Request<'_>,
    method: &Method,
    url: &Url,
    at_home: bool,
    with_body: bool,
) -> Result<ureq::http::Request<()>, HttpError> {
    let address = |why: String| HttpError::Address { url: shown(url.as_str()), why };
    let mut built = ureq::http::Request::builder().method(method).uri(url.as_str());
    for (name, value) in request.headers {
        let public = PUBLIC_HEADERS.iter().any(|known| known.eq_ignore_ascii_case(name));
        let of_body = name.to_ascii_lowercase().starts_with("content-");
        if (!at_home && !public && !of_body) || (of_body && !with_body) {
            continue;
        }
        let name = HeaderName::try_from(*name).map_err(|error| address(format!("header `{name}`: {error}")))?;
        let value = HeaderValue::try_from(*value).map_err(|error| address(format!("header `{name}`: {error}")))?;
        built = built.header(name, value);
    }
    built.body(()).map_err(|error| address(error.to_string()))
}

/// Where a redirect leads.
fn next(from: &Url, response: &Response) -> Result<Option<Url>, HttpError> {
    if !matches!(response.status, 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let refused = |why: String| HttpError::Address { url: shown(from.as_str()), why };
    let target = response.headers.get("location").map(|value| String::from_utf8_lossy(value.as_bytes()));
    let target = target.ok_or_else(|| refused(format!("HTTP status {} without a location", response.status)))?;
    let to = checked(from.join(target.trim()), &target)?;
    if from.scheme() == "https" && to.scheme() != "https" {
        return Err(refused(format!("it redirects from https to {}", shown(to.as_str()))));
    }
    Ok(Some(to))
}

fn worded(url: &str, proxy: Option<&str>, error: ureq::Error, settings: &Settings) -> HttpError {
    let through = proxy.map_or(String::new(), |proxy| format!(" (through the proxy {proxy})"));
    let url = url.to_owned();
    let seconds = |limit: Duration| limit.as_secs_f32();
    match error {
        ureq::Error::HostNotFound => HttpError::Unreachable { url, why: format!("no such host{through}") },
        ureq::Error::Timeout(Timeout::Resolve | Timeout::Connect) => {
            let why = format!("no connection within {} s{through}", seconds(settings.connect_timeout));
            HttpError::Unreachable { url, why }
        }
        ureq::Error::Timeout(_) => {
            HttpError::Broken { url, why: format!("no answer within {} s{through}", seconds(settings.stall_timeout)) }
        }
        ureq::Error::Io(error) => {
            let why = format!("{error}{through}");
            match error.kind() {
                io::ErrorKind::ConnectionReset
                | io::ErrorKind::ConnectionAborted
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::UnexpectedEof => HttpError::Broken { url, why },
                _ if why.contains("certificate") => HttpError::Address { url, why: untrusted(&why) },
                _ => HttpError::Unreachable { url, why },
            }
        }
        ureq::Error::Rustls(error) => HttpError::Address { url, why: untrusted(&format!("{error}{through}")) },
        ureq::Error::BadUri(why) => HttpError::Address { url, why },
        ureq::Error::ConnectProxyFailed(why) => HttpError::Unreachable { url, why: format!("{why}{through}") },
        other => HttpError::Unexpected { url, why: format!("{other}{through}") },
    }
}

fn untrusted(why: &str) -> String {
    format!("no secure connection: {why} (`SSL_CERT_FILE` can name further certificates to trust)")
}

/// Whether two addresses have the same scheme, host and port.
pub fn same_origin(one: &str, other: &str) -> bool {
    matches!((parse(one), parse(other)), (Ok(one), Ok(other)) if one.origin() == other.origin())
}

/// An address for people: without user, password and query, which may hold secrets.
pub fn shown(url: &str) -> String {
    let bare = url.split(['?', '#']).next().unwrap_or_default();
    let text = match bare.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", authority.rsplit('@').next().unwrap_or_default())
        }
        None => bare.rsplit('@').next().unwrap_or_default().to_owned(),
    };
    text.chars().filter(|c| !c.is_control()).take(500).collect()
}

/// An http or https address; characters that may not stand in one are percent-encoded.
fn parse(text: &str) -> Result<Url, HttpError> {
    checked(Url::parse(text), text)
}

fn checked(parsed: Result<Url, url::ParseError>, text: &str) -> Result<Url, HttpError> {
    let refused = |why: String| HttpError::Address { url: shown(text), why };
    let mut url = parsed.map_err(|error| refused(format!("not a URL: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(refused("not an http or https URL".to_owned()));
    }
    url.set_fragment(None);
    Ok(url)
}

/// A variable by its lowercase name, or its uppercase one; empty counts as not set.
fn variable<'a>(env: &'a BTreeMap<String, String>, name: &str) -> Option<&'a str> {
    let value = env.get(name).or_else(|| env.get(&name.to_ascii_uppercase()))?.trim();
    Some(value).filter(|value| !value.is_empty())
}

fn proxy_for<'a>(env: &'a BTreeMap<String, String>, scheme: &str) -> Option<&'a str> {
    variable(env, &format!("{scheme}_proxy")).or_else(|| variable(env, "all_proxy"))
}

/// Whether `NO_PROXY` covers an address: `*`, hosts and their subdomains, `host:port`, IP addresses and CIDR blocks.
fn bypasses(list: &str, url: &Url) -> bool {
    let (host, port) = (url.host_str().unwrap_or_default(), url.port_or_known_default());
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ip: Option<IpAddr> = host.parse().ok();
    list.split([',', ' ']).map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        if entry == "*" {
            return true;
        }
        if let (Some(ip), Some((network, bits))) = (ip, entry.split_once('/')) {
            return matches!((network.parse(), bits.parse()), (Ok(network), Ok(bits)) if in_block(ip, network, bits));
        }
        let name = match entry.rsplit_once(':') {
            Some((name, number)) if !name.contains(':') => {
                if number.parse().ok() != port {
                    return false;
                }
                name
            }
            _ => entry.trim_start_matches('[').trim_end_matches(']'),
        };
        let name = name.trim_start_matches('*').trim_start_matches('.');
        host == name || host.strip_suffix(name).is_some_and(|head| head.ends_with('.'))
    })
}

fn in_block(ip: IpAddr, network: IpAddr, bits: u32) -> bool {
    let masked = |value: u128, width: u32| value.checked_shr(width.saturating_sub(bits)).unwrap_or(0);
    match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(net)) if bits <= 32 => {
            masked(u32::from(ip).into(), 32) == masked(u32::from(net).into(), 32)
        }
        (IpAddr::V6(ip), IpAddr::V6(net)) if bits <= 128 => masked(ip.into(), 128) == masked(net.into(), 128),
        _ => false,
    }
}

/// `Retry-After`: seconds, or a date (RFC 9110 §10.2.3).
fn wait_from(text: &str, now: SystemTime) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    Some(httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests;

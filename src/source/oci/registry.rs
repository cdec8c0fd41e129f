//! A repository of an OCI registry.
//!
//! Sources: distribution-spec 1.1 ("Pull", "Push": monolithic uploads), and for tokens "Token Authentication Specification" of
//! the CNCF's distribution project. Registries serve bytes without looking at them: what comes is hashed here.
//!
//! Absent: mounting blobs of other repositories, uploads in pieces, the catalog, deletion, credential helpers of docker.

use std::fmt;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use url::Url;

use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::http::{self, Answer, Backoff, Follow, Http, Method, Request, Response, shown};
use crate::format::oci::{self, Blob, MANIFEST_TYPE, MAX_MANIFEST_BYTES, Reference, Version};
use crate::report::{Progress, Task};
use crate::source::{SourceError, World};

use super::{Checked, Source, Stream, Target, refused};

const MAX_ANSWER_BYTES: u64 = 1 << 20;
const MAX_DOCKER_CONFIG_BYTES: u64 = 1 << 20;
const USER: &str = "AITOOLS_REGISTRY_USER";
const PASSWORD: &str = "AITOOLS_REGISTRY_PASSWORD";

/// A repository, and how we may use it.
pub struct Registry {
    reference: Reference,
    /// `https://registry/v2/repository`
    base: String,
    http: Http,
    task: Task,
    /// What the token has to allow: `pull`, or `pull,push`.
    actions: &'static str,
    /// `user:password`, for the registry and its token server alone.
    credentials: Option<String>,
    /// The header `authorization` that worked last.
    authorization: Mutex<Option<String>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("reference", &self.reference).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: std::collections::BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
}

impl Registry {
    /// The repository to read from, or with `push` to write to. Nothing is asked yet.
    ///
    /// # Errors
    /// When a file of certificates or credentials cannot be read.
    pub fn new(reference: &Reference, world: &World, push: bool) -> Result<Self, SourceError> {
        let scheme = if reference.is_loopback() { "http" } else { "https" };
        Ok(Self {
            base: format!("{scheme}://{}/v2/{}", reference.registry, reference.repository),
            reference: reference.clone(),
            http: world.http()?,
            task: world.task.clone(),
            actions: if push { "pull,push" } else { "pull" },
            credentials: credentials(reference, world)?,
            authorization: Mutex::default(),
        })
    }

    fn failed(&self, what: &str, status: u16) -> SourceError {
        let what = format!("{what} of `{}`", self.reference);
        let hint = match status {
            401 | 403 => format!("log in with `docker login`, or set `{USER}` and `{PASSWORD}`"),
            404 => return SourceError::Missing { what, why: "the registry does not have it".to_owned(), hint: None },
            _ => return SourceError::Network { what, why: format!("HTTP status {status}"), hint: None },
        };
        SourceError::Network { what, why: format!("HTTP status {status}"), hint: Some(hint) }
    }

    fn worded(&self, error: http::HttpError) -> SourceError {
        SourceError::of_http(&format!("`{}`", self.reference), error)
    }

    /// Sends a request with what the registry wants to know of us; once more when it asks for that.
    fn ask<T>(
        &self,
        headers: &[(&str, &str)],
        send: impl Fn(&[(&str, &str)]) -> Result<T, http::HttpError>,
        response: impl Fn(&T) -> &Response,
    ) -> Result<T, SourceError> {
        let attempt = || {
            let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let own = known.iter().map(|value| ("authorization", value.as_str()));
            let headers: Vec<(&str, &str)> = headers.iter().copied().chain(own).collect();
            send(&headers).map_err(|error| self.worded(error))
        };
        let first = attempt()?;
        if response(&first).status != 401 {
            return Ok(first);
        }
        let challenge = response(&first).header("www-authenticate").unwrap_or_default().to_owned();
        let Some(authorization) = self.authorize(&challenge)? else { return Ok(first) };
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(authorization);
        attempt()
    }

    fn answer(&self, request: &Request<'_>) -> Result<Answer, SourceError> {
        let limit = MAX_ANSWER_BYTES.max(MAX_MANIFEST_BYTES);
        let send = |headers: &[(&str, &str)]| {
            self.http.answer_patiently(&Request { headers, ..request.clone() }, limit, &|_| {})
        };
        self.ask(request.headers, send, |answer: &Answer| &answer.response)
    }

    /// The header that answers a challenge (RFC 9110, section 11.6.1); None when we cannot.
    fn authorize(&self, challenge: &str) -> Result<Option<String>, SourceError> {
        let (scheme, rest) = challenge.split_once(' ').unwrap_or((challenge, ""));
        let basic = self.credentials.as_ref().map(|pair| format!("Basic {}", STANDARD.encode(pair)));
        if scheme.eq_ignore_ascii_case("basic") {
            return Ok(basic);
        }
        let Some(realm) = parameter(rest, "realm").filter(|_| scheme.eq_ignore_ascii_case("bearer")) else {
            return Ok(None);
        };
        let what = format!("a token for `{}`", self.reference);
        let mut url = Url::parse(&realm).map_err(|_| refused(&what, "the registry names no token server"))?;
        // Credentials go there.
        if url.scheme() != "https" && !url.host_str().is_some_and(oci::is_loopback) {
            return Err(refused(&what, format!("the token server `{}` does not use https", shown(&realm))));
        }
        let scope = format!("repository:{}:{}", self.reference.repository, self.actions);
        let service = parameter(rest, "service");
        let named = service.iter().map(|service| ("service", service.as_str()));
        url.query_pairs_mut().extend_pairs(named.chain([("scope", scope.as_str())]));
        let headers: Vec<(&str, &str)> = basic.iter().map(|value| ("authorization", value.as_str())).collect();
        let request = Request { follow: Follow::SameOrigin, ..Request::get(url.as_str(), &headers) };
        let answer = self.http.answer_patiently(&request, MAX_ANSWER_BYTES, &|_| {});
        let answer = answer.map_err(|error| self.worded(error))?;
        if !answer.response.is_success() {
            return Err(self.failed("a token", answer.response.status));
        }
        let token: Token = answer.json().map_err(|error| self.worded(error))?;
        Ok(token.token.or(token.access_token).map(|token| format!("Bearer {token}")))
    }

    /// Whether the repository has a blob already.
    fn has(&self, blob: &Blob) -> Result<bool, SourceError> {
        let url = format!("{}/blobs/{}", self.base, blob.digest);
        let answer = self.answer(&Request::head(&url, &[]))?;
        Ok(answer.response.is_success() && answer.response.length() == Some(blob.size_bytes))
    }

    /// Where the bytes of a blob are to be sent.
    fn begin_upload(&self, blob: &Blob) -> Result<(String, Option<String>), SourceError> {
        let url = format!("{}/blobs/uploads/", self.base);
        let request =
            Request { method: Method::POST, body: Some(b""), follow: Follow::Nowhere, ..Request::get(&url, &[]) };
        let answer = self.answer(&request)?;
        if answer.response.status != 202 {
            return Err(self.failed("an upload", answer.response.status));
        }
        let wrong = || refused(&format!("an upload to `{}`", self.reference), "the registry does not say where to");
        let location = answer.response.header("location").ok_or_else(wrong)?;
        let mut to = Url::parse(&url).and_then(|base| base.join(location)).map_err(|_| wrong())?;
        let same = http::same_origin(&url, to.as_str());
        if to.scheme() != "https" && !same {
            return Err(wrong());
        }
        to.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok((to.to_string(), known.filter(|_| same)))
    }
}

impl Source for Registry {
    fn what(&self) -> String {
        format!("`{}`", self.reference)
    }

    fn manifest(&self) -> Result<Vec<u8>, SourceError> {
        let url = format!("{}/manifests/{}", self.base, self.reference.version);
        let answer = self.answer(&Request::get(&url, &[("accept", MANIFEST_TYPE)]))?;
        if answer.response.status != 200 {
            return Err(self.failed("the manifest", answer.response.status));
        }
        let computed = Digest::of(&answer.body);
        let told = answer.response.header("docker-content-digest").and_then(|text| text.parse().ok());
        let asked = match self.reference.version {
            Version::Digest(digest) => Some(digest),
            Version::Tag(_) => None,
        };
        match [asked, told].into_iter().flatten().find(|expected| *expected != computed) {
            None => Ok(answer.body),
            Some(expected) => {
                let why = format!("the registry serves {computed} as its manifest {expected}");
                Err(refused(&self.what(), why))
            }
        }
    }

    fn open(&self, blob: &Blob, from: u64) -> Result<Stream<'_>, SourceError> {
        let url = format!("{}/blobs/{}", self.base, blob.digest);
        let range = format!("bytes={from}-");
        let headers: &[(&str, &str)] = if from > 0 { &[("range", &range)] } else { &[] };
        let send = |headers: &[(&str, &str)]| self.http.send(&Request::get(&url, headers));
        let mut response = self.ask(headers, send, |response: &Response| response)?;
        let begins = format!("bytes {from}-");
        match response.status {
            200 => {
                // The whole again: what is here already is passed over.
                let passed = io::copy(&mut (&mut response).take(from), &mut io::sink());
                passed.map_err(|error| refused(&self.what(), error))?;
                Ok(Box::new(response))
            }
            206 if response.header("content-range").is_some_and(|range| range.starts_with(&begins)) => {
                Ok(Box::new(response))
            }
            status => Err(self.failed(&format!("blob {}", blob.digest), status)),
        }
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(self.http.backoff())
    }
}

impl Target for Registry {
    fn put(&mut self, blob: &Blob, file: &Path, progress: &Progress) -> Result<(), SourceError> {
        if self.has(blob)? {
            progress.add(blob.size_bytes);
            return Ok(());
        }
        let (url, authorization) = self.begin_upload(blob)?;
        let mut headers = vec![("content-type", "application/octet-stream")];
        headers.extend(authorization.iter().map(|value| ("authorization", value.as_str())));
        let mut body = Checked::open(file, blob, &self.task, progress)?;
        let response = self.http.upload(Method::PUT, &url, &headers, &mut body, blob.size_bytes);
        match response.map_err(|error| self.worded(error))?.status {
            201 => body.finish(),
            status => Err(self.failed(&format!("an upload of {}", blob.digest), status)),
        }
    }

    fn finish(self: Box<Self>, manifest: &[u8]) -> Result<(), SourceError> {
        let version = match &self.reference.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(_) => Digest::of(manifest).to_string(),
        };
        let url = format!("{}/manifests/{version}", self.base);
        let request = Request {
            method: Method::PUT,
            body: Some(manifest),
            follow: Follow::Nowhere,
            ..Request::get(&url, &[("content-type", MANIFEST_TYPE)])
        };
        match self.answer(&request)?.response.status {
            201 => Ok(()),
            status => Err(self.failed("the manifest", status)),
        }
    }
}

/// A parameter of a challenge: `realm="…",service="…"`.
fn parameter(challenge: &str, name: &str) -> Option<String> {
    let mut rest = challenge;
    while let Some((key, tail)) = rest.split_once('=') {
        let (value, next) = match tail.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => tail.split_at(tail.find(',').unwrap_or(tail.len())),
        };
        if key.trim_matches([',', ' ']).eq_ignore_ascii_case(name) {
            return Some(value.to_owned());
        }
        rest = next;
    }
    None
}

/// From the environment, else from docker's configuration.
fn credentials(reference: &Reference, world: &World) -> Result<Option<String>, SourceError> {
    let set = |name: &str| world.env.get(name).filter(|value| !value.is_empty());
    if let (Some(user), Some(password)) = (set(USER), set(PASSWORD)) {
        return Ok(Some(format!("{user}:{password}")));
    }
    let home = || set("HOME").or_else(|| set("USERPROFILE")).map(|home| Path::new(home).join(".docker"));
    let Some(folder) = set("DOCKER_CONFIG").map(PathBuf::from).or_else(home) else { return Ok(None) };
    let bytes = match fs::read_bounded(&folder.join("config.json"), MAX_DOCKER_CONFIG_BYTES) {
        Err(error) if error.is_not_found() => return Ok(None),
        bytes => bytes?,
    };
    // A file of another program: what is not understood holds no credentials.
    let Ok(config) = serde_json::from_slice::<DockerConfig>(&bytes) else { return Ok(None) };
    let auth = config.auths.get(&reference.registry).and_then(|entry| STANDARD.decode(entry.auth.as_ref()?).ok());
    Ok(auth.and_then(|bytes| String::from_utf8(bytes).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_a_challenge() {
        let challenge = r#"realm="https://auth.example/token",service="r, s=t",scope=pull, error="x""#;
        assert_eq!(parameter(challenge, "realm").unwrap(), "https://auth.example/token");
        assert_eq!(parameter(challenge, "Service").unwrap(), "r, s=t");
        assert_eq!(parameter(challenge, "scope").unwrap(), "pull");
        assert_eq!(parameter(challenge, "error").unwrap(), "x");
        assert_eq!(parameter(challenge, "other"), None);
        assert_eq!(parameter("realm=\"broken", "realm"), None);
    }
}

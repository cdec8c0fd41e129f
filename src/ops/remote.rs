//! Talking to a gateway of this project that another process runs.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use tokio::runtime::Runtime;

use super::Failure;
use super::failure::ServeError;
use super::serve::{self, Running};
use crate::engine::Endpoint;
use crate::engine::client::{Client, HttpError};

/// How long the gateway may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
const LIMIT_BYTES: usize = 16 << 20;

/// A running gateway.
#[derive(Debug)]
pub struct Remote {
    found: Running,
    runtime: Runtime,
    client: Client,
}

/// The gateway that serves this project.
///
/// # Errors
/// When none is running.
pub fn connect(root: &Path) -> Result<Remote, Failure> {
    let found = serve::running(root)?;
    let endpoint = endpoint(&found).ok_or(ServeError::NotRunning)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Runtime)?;
    Ok(Remote { found, runtime, client: Client::new(&endpoint) })
}

/// Where our own commands reach a gateway.
pub fn endpoint(found: &Running) -> Option<Endpoint> {
    let port = found.control.rsplit(':').next()?.parse().ok()?;
    Some(Endpoint { port, key: found.key.clone() })
}

impl Remote {
    /// Where clients reach it.
    pub fn url(&self) -> &str {
        &self.found.url
    }

    /// Its state: the body of `/aitools/status`.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Json, Failure> {
        self.ask("/aitools/status", None)
    }

    /// Ends the engine of a policy.
    ///
    /// # Errors
    /// When it refuses: the policy is not loaded, or not there.
    pub fn unload(&self, policy: &str) -> Result<(), Failure> {
        self.ask("/models/unload", Some(&json!({ "model": policy }))).map(drop)
    }

    /// Tells it to end.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn shut_down(&self) -> Result<(), Failure> {
        self.ask("/aitools/shutdown", Some(&json!({}))).map(drop)
    }

    fn ask(&self, path: &str, body: Option<&Json>) -> Result<Json, Failure> {
        let deadline = Instant::now() + PATIENCE;
        let answer = self.runtime.block_on(async {
            let response = match body {
                None => self.client.get(path, true, deadline).await?,
                Some(body) => self.client.post(path, body.to_string(), deadline).await?,
            };
            let status = response.status();
            Ok((status, response.text(LIMIT_BYTES).await?))
        });
        let (status, text) =
            answer.map_err(|error: HttpError| ServeError::Answer(format!("the server does not answer: {error}")))?;
        let body: Json = serde_json::from_str(&text).unwrap_or_default();
        if status == 200 {
            return Ok(body);
        }
        let message = body["error"]["message"].as_str().map_or_else(|| format!("status {status}"), str::to_owned);
        Err(ServeError::Answer(message).into())
    }
}

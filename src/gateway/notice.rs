//! What the gateway tells whoever watches: a terminal, `--json`, and clients of `/models/sse`.

use std::time::SystemTime;

use serde::Serialize;

/// One piece of news.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Notice {
    /// RFC 3339, UTC.
    pub time: String,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened. Policies are named.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// The gateway takes requests.
    Listening {
        /// Its address without the path of the API.
        url: String,
    },
    /// These policies are served now.
    Policies {
        /// In order.
        names: Vec<String>,
    },
    /// The engine of a policy is starting.
    Loading {
        /// The policy.
        policy: String,
    },
    /// The engine of a policy is ready.
    Loaded {
        /// The policy.
        policy: String,
        /// Milliseconds that it took to start.
        load_ms: u64,
    },
    /// The engine of a policy has ended as it was told to.
    Unloaded {
        /// The policy.
        policy: String,
    },
    /// An engine did not start, or died.
    Failed {
        /// The policy.
        policy: String,
        /// The error, with the engine's last words.
        why: String,
    },
    /// A request has ended.
    Request {
        /// The policy.
        policy: String,
        /// What was asked for: `/v1/chat/completions`.
        path: &'static str,
        /// The HTTP status; 499 when the client left.
        status: u16,
        /// Milliseconds from the arrival to the end.
        duration_ms: f64,
        /// Tokens of the answer.
        completion_tokens: Option<u64>,
        /// Tokens after the first, over the time from the first to the last.
        tokens_per_second: Option<f64>,
    },
    /// Something that a person should look at.
    Problem {
        /// In one sentence.
        text: String,
    },
    /// No new requests are taken; those that run are finished.
    Draining {
        /// How many run.
        running: usize,
    },
}

impl Notice {
    /// News of this moment.
    pub fn new(what: What) -> Self {
        Self { time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(), what }
    }
}

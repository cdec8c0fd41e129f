//! What the gateway tells whoever watches: a terminal, `--json`, and clients of `/models/sse`.

use std::time::SystemTime;

use serde::Serialize;

/// One piece of news.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Notice {
    /// RFC 3339, UTC.
    pub time: String,
    #[serde(flatten)]
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum What {
    /// The gateway takes requests at this address.
    Listening {
        url: String,
    },
    /// These policies are served now.
    Policies {
        names: Vec<String>,
    },
    Loading {
        policy: String,
    },
    Loaded {
        policy: String,
        load_ms: u64,
    },
    Unloaded {
        policy: String,
    },
    /// An engine did not start, or died.
    Failed {
        policy: String,
        why: String,
    },
    /// A request has ended.
    Request {
        policy: String,
        path: &'static str,
        status: u16,
        duration_ms: f64,
        completion_tokens: Option<u64>,
        tokens_per_second: Option<f64>,
    },
    /// Something that a person should look at.
    Problem {
        text: String,
    },
    /// No new requests are taken; those that run are finished.
    Draining {
        running: usize,
    },
}

impl Notice {
    /// News of this moment.
    pub fn new(what: What) -> Self {
        Self { time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(), what }
    }
}

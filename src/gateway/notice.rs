//! What the gateway tells whoever watches: a terminal, `--json`, and clients of `/models/sse`. The last errors are kept for those
//! who come later.

use std::collections::VecDeque;
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
        /// Why it failed.
        error: Option<String>,
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

/// Errors that are kept at most, and characters of one.
const KEPT: usize = 20;
const LONGEST: usize = 2000;

/// An error that has happened. Serialized as in `/aitools/status`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PastError {
    /// When it happened last: RFC 3339, UTC.
    pub time: String,
    /// The policy, when it is about one.
    pub policy: Option<String>,
    /// The error.
    pub error: String,
    /// How many times in a row it happened.
    pub count: u32,
}

impl PastError {
    /// The error in a piece of news. Requests that the client got wrong are not among them: they are the client's to see.
    pub fn of(notice: &Notice) -> Option<Self> {
        let (policy, error) = match &notice.what {
            What::Failed { policy, why } => (Some(policy), why),
            What::Request { policy, status, error: Some(error), .. } if !(400..500).contains(status) => {
                (Some(policy), error)
            }
            What::Problem { text } => (None, text),
            _ => return None,
        };
        let error = error.chars().take(LONGEST).collect();
        Some(Self { time: notice.time.clone(), policy: policy.cloned(), error, count: 1 })
    }
}

/// The last errors, newest first.
#[derive(Debug, Clone, Default)]
pub struct LastErrors(VecDeque<PastError>);

impl LastErrors {
    /// Adds one. The same error again is counted, so that it does not push the others out.
    pub fn push(&mut self, error: PastError) {
        match self.0.front_mut() {
            Some(last) if (&last.policy, &last.error) == (&error.policy, &error.error) => {
                (last.time, last.count) = (error.time, last.count.saturating_add(1));
            }
            _ => self.0.push_front(error),
        }
        self.0.truncate(KEPT);
    }

    /// Newest first.
    pub fn iter(&self) -> impl Iterator<Item = &PastError> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(status: u16, error: Option<&str>) -> Notice {
        Notice::new(What::Request {
            policy: "p".to_owned(),
            path: "/v1/chat/completions",
            status,
            duration_ms: 1.0,
            completion_tokens: None,
            tokens_per_second: None,
            error: error.map(str::to_owned),
        })
    }

    #[test]
    fn errors_of_the_server_are_kept_and_those_of_clients_are_not() {
        let failed = Notice::new(What::Failed { policy: "p".to_owned(), why: "w".to_owned() });
        assert_eq!(PastError::of(&failed).unwrap().policy.as_deref(), Some("p"));
        let problem = Notice::new(What::Problem { text: "t".to_owned() });
        assert_eq!(PastError::of(&problem).unwrap().error, "t");
        assert!(PastError::of(&request(503, Some("e"))).is_some());
        assert!(PastError::of(&request(200, Some("the stream broke"))).is_some());
        assert_eq!(PastError::of(&request(400, Some("e"))), None);
        assert_eq!(PastError::of(&request(200, None)), None);
        let long = PastError::of(&request(500, Some(&"ä".repeat(LONGEST + 1)))).unwrap();
        assert_eq!(long.error.chars().count(), LONGEST);
    }

    #[test]
    fn the_last_errors_are_bounded_and_repetitions_are_counted() {
        let mut last = LastErrors::default();
        for number in 0..KEPT + 5 {
            last.push(PastError::of(&request(500, Some(&number.to_string()))).unwrap());
        }
        last.push(PastError::of(&request(500, Some(&(KEPT + 4).to_string()))).unwrap());
        let kept: Vec<_> = last.iter().map(|error| (error.error.clone(), error.count)).collect();
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept[0], ((KEPT + 4).to_string(), 2));
        assert_eq!(kept[1], ((KEPT + 3).to_string(), 1));
    }
}

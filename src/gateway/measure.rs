//! What one request took. Its drop is the end of the request, however it ends: metrics, the request log and whoever watches
//! are told then.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::metrics::counter::Counter;
use serde::Serialize;

use super::Context;
use super::catalog::Offer;
use super::metrics::{Labels, Sample};
use super::notice::What;
use super::operation::Operation;
use super::owner::Lease;
use crate::base::digest::Digest;
use crate::engine::answer::ms;
use crate::engine::conversation::Usage;

/// A request under way.
#[derive(Debug)]
pub struct Measure {
    context: Arc<Context>,
    offer: Arc<Offer>,
    pub operation: Operation,
    pub request_id: String,
    began: Instant,
    waited: Option<Duration>,
    load: Option<Duration>,
    /// When the engine was asked.
    sent: Option<Instant>,
    pub first: Option<Instant>,
    pub last: Option<Instant>,
    pub usage: Usage,
    /// Pieces of text: the tokens of an answer that was broken off.
    pub pieces: u64,
    /// The policy's counter of generated tokens, and how many of this request are in it.
    generated: Counter,
    counted: u64,
    pub finish: Option<String>,
    pub error: Option<String>,
    pub seed: Option<u32>,
    stream: bool,
    /// The status that the client got; None until it has one.
    status: Option<u16>,
    /// Whether the answer came to its end.
    complete: bool,
}

impl Measure {
    /// Begins with the arrival of the request.
    pub fn new(context: &Arc<Context>, offer: &Arc<Offer>, operation: Operation, began: Instant, stream: bool) -> Self {
        Self {
            context: Arc::clone(context),
            offer: Arc::clone(offer),
            operation,
            request_id: context.request_id(),
            began,
            waited: None,
            load: None,
            sent: None,
            first: None,
            last: None,
            usage: Usage::default(),
            pieces: 0,
            generated: context.metrics.generated(&offer.name),
            counted: 0,
            finish: None,
            error: None,
            seed: None,
            stream,
            status: None,
            complete: false,
        }
    }

    /// The request was let through, and goes to the engine now.
    pub fn sent(&mut self, lease: &Lease) {
        (self.waited, self.load, self.sent) = (Some(lease.waited), Some(lease.engine.load), Some(Instant::now()));
    }

    /// The client gets this status.
    pub fn answered(&mut self, status: u16) {
        self.status = Some(status);
    }

    /// The answer ends with this error.
    pub fn fail(&mut self, message: &str) {
        self.error = Some(message.to_owned());
    }

    /// Adds the tokens that have come since the last call to the policy's counter.
    pub fn count_tokens(&mut self) {
        let tokens = self.pieces.max(self.usage.completion_tokens.unwrap_or(0));
        self.generated.inc_by(tokens.saturating_sub(self.counted));
        self.counted = self.counted.max(tokens);
    }

    /// Nothing more follows.
    pub fn complete(&mut self) {
        self.complete = true;
        self.last.get_or_insert_with(Instant::now);
    }

    fn completion_tokens(&self) -> Option<u64> {
        self.usage.completion_tokens.or((self.pieces > 0).then_some(self.pieces))
    }

    /// What was going on when the client left; None when it stayed.
    fn left(&self) -> Option<&'static str> {
        if self.complete || self.error.is_some() {
            return None;
        }
        Some(match (self.sent, self.first) {
            (None, _) => "queue",
            (Some(_), None) => "prefill",
            (Some(_), Some(_)) => "decode",
        })
    }
}

/// One line of the request log: in the shape of `generations.jsonl`, which `run` writes.
#[derive(Debug, Serialize)]
struct Line<'a> {
    time: String,
    request_id: &'a str,
    policy: &'a str,
    policy_sha256: Digest,
    engine: &'a str,
    variant: Option<&'static str>,
    fingerprint: Option<Digest>,
    weights_sha256: Option<Digest>,
    path: &'static str,
    status: u16,
    stream: bool,
    seed: Option<u32>,
    finish: Option<&'a str>,
    error: Option<&'a str>,
    metrics: Numbers,
}

/// Times in milliseconds.
#[derive(Debug, Serialize)]
struct Numbers {
    waited_ms: Option<f64>,
    load_ms: Option<f64>,
    first_token_ms: Option<f64>,
    total_ms: f64,
    engine_prompt_ms: Option<f64>,
    engine_decode_ms: Option<f64>,
    prompt_tokens: Option<u64>,
    cached_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    tokens_per_second: Option<f64>,
}

/// What nginx logs for a client that has gone.
const CLIENT_GONE: u16 = 499;

impl Drop for Measure {
    fn drop(&mut self) {
        self.count_tokens();
        let (now, left, tokens) = (Instant::now(), self.left(), self.completion_tokens());
        let code = if left.is_some() { CLIENT_GONE } else { self.status.unwrap_or(CLIENT_GONE) };
        let first_token = self.first.map(|first| first - self.began);
        let streaming = self.first.zip(self.last).map(|(first, last)| last.saturating_duration_since(first));
        let rate = match (streaming, tokens) {
            (Some(time), Some(count)) if count > 1 && !time.is_zero() => Some((count - 1) as f64 / time.as_secs_f64()),
            _ => None,
        };
        let policy = self.offer.name.clone();
        let engine = self.offer.policy.engine.as_str();
        let before = self.sent.map_or(Duration::ZERO, |sent| sent - self.began);
        self.context.metrics.record(&Sample {
            labels: Labels {
                gen_ai_operation_name: self.operation.name(),
                gen_ai_provider_name: engine.to_owned(),
                gen_ai_request_model: policy.clone(),
            },
            code,
            finish: self.finish.clone().unwrap_or_default(),
            duration: now - self.began,
            waited: self.waited,
            first_token,
            streaming,
            prompt_tokens: self.usage.prompt_tokens,
            completion_tokens: tokens,
            overhead: before.saturating_sub(self.waited.unwrap_or_default()),
            left,
        });
        let model = self.offer.model.as_ref().ok();
        self.context.log.write(&Line {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            request_id: &self.request_id,
            policy: &policy,
            policy_sha256: self.offer.policy_sha256,
            engine,
            variant: model.map(|model| model.variant),
            fingerprint: model.map(|model| model.fingerprint),
            weights_sha256: model.map(|model| model.weights_sha256),
            path: self.operation.path(),
            status: code,
            stream: self.stream,
            seed: self.seed,
            finish: if left.is_some() { Some("cancelled") } else { self.finish.as_deref() },
            error: self.error.as_deref(),
            metrics: Numbers {
                waited_ms: self.waited.map(ms),
                load_ms: self.load.map(ms),
                first_token_ms: first_token.map(ms),
                total_ms: ms(now - self.began),
                engine_prompt_ms: self.usage.prompt_ms,
                engine_decode_ms: self.usage.decode_ms,
                prompt_tokens: self.usage.prompt_tokens,
                cached_tokens: self.usage.cached_tokens,
                completion_tokens: tokens,
                tokens_per_second: rate,
            },
        });
        self.context.owner.notify(What::Request {
            policy,
            path: self.operation.path(),
            status: code,
            duration_ms: ms(now - self.began),
            completion_tokens: tokens,
            tokens_per_second: rate,
            error: self.error.clone(),
        });
    }
}

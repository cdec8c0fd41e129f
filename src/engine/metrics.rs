//! The measurements of one answer, with one definition each, and the line that records them.
//!
//! Absent: the prompt and the answer. They are recorded only on request.

use serde::Serialize;

use super::answer::Generated;
use super::conversation::Finish;
use crate::base::digest::Digest;

/// Times in milliseconds, by our own clock unless the name says `engine`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Metrics {
    /// From starting the program until it is ready: the model is loaded and warmed up.
    pub load_ms: f64,
    /// Time for the prompt, by the engine's clock.
    pub engine_prompt_ms: Option<f64>,
    /// Time for the answer, by the engine's clock.
    pub engine_decode_ms: Option<f64>,
    /// From sending the request to the first piece of text or reasoning; loading is not included.
    pub first_token_ms: Option<f64>,
    /// From starting the program to the end of the answer.
    pub total_ms: f64,
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: u64,
    /// Prompt tokens that were taken from a cache.
    pub cached_tokens: Option<u64>,
    /// As the engine counts them, including the last one, which often has no text.
    pub completion_tokens: u64,
    /// Tokens after the first piece, over the time from the first piece to the end. Prompt and loading are not included.
    pub tokens_per_second: Option<f64>,
    /// The engine's own figure: tokens after the first over `engine_decode_ms`.
    pub engine_tokens_per_second: Option<f64>,
    /// Prompt tokens that were not cached, over `engine_prompt_ms`.
    pub engine_prompt_tokens_per_second: Option<f64>,
    /// The most memory the engine held at once, in bytes, where the system reports it.
    pub peak_memory_bytes: Option<u64>,
    /// GPU memory the engine held at the end of the answer, in bytes, where the driver reports it.
    pub gpu_memory_bytes: Option<u64>,
}

/// What the supervisor measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// See [`Metrics::load_ms`].
    pub load_ms: f64,
    /// See [`Metrics::total_ms`].
    pub total_ms: f64,
    /// See [`Metrics::peak_memory_bytes`].
    pub peak_memory_bytes: Option<u64>,
    /// See [`Metrics::gpu_memory_bytes`].
    pub gpu_memory_bytes: Option<u64>,
}

impl Metrics {
    /// The measurements of an answer.
    pub fn new(answer: &Generated, measured: Measured) -> Self {
        let rate = |tokens: u64, ms: Option<f64>| {
            let ms = ms.filter(|ms| *ms > 0.0 && tokens > 0)?;
            Some(tokens as f64 * 1000.0 / ms)
        };
        let worked_on = answer.prompt_tokens.saturating_sub(answer.cached_tokens.unwrap_or(0));
        Self {
            load_ms: measured.load_ms,
            engine_prompt_ms: answer.prompt_ms,
            engine_decode_ms: answer.decode_ms,
            first_token_ms: answer.first_token_ms,
            total_ms: measured.total_ms,
            prompt_tokens: answer.prompt_tokens,
            cached_tokens: answer.cached_tokens,
            completion_tokens: answer.completion_tokens,
            tokens_per_second: rate(
                answer.completion_tokens.saturating_sub(answer.first_tokens.max(1)),
                answer.streaming_ms,
            ),
            engine_tokens_per_second: rate(answer.completion_tokens.saturating_sub(1), answer.decode_ms),
            engine_prompt_tokens_per_second: rate(worked_on, answer.prompt_ms),
            peak_memory_bytes: measured.peak_memory_bytes,
            gpu_memory_bytes: measured.gpu_memory_bytes,
        }
    }
}

/// One line of `.aitools/generations.jsonl`: enough to repeat the request, and to know which engine and weights answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record<'a> {
    /// RFC 3339, UTC.
    pub time: &'a str,
    /// The policy's name.
    pub policy: &'a str,
    /// The digest of the policy file.
    pub policy_sha256: Digest,
    /// The engine's name in the manifest.
    pub engine: &'a str,
    /// The accelerator.
    pub variant: &'a str,
    /// Of the engine that answered.
    pub fingerprint: Digest,
    /// The digest of the main weights file.
    pub weights_sha256: Digest,
    /// The seed that was used.
    pub seed: u32,
    /// Why the answer ended; None without an answer.
    pub finish: Option<Finish>,
    /// Why there is no answer.
    pub error: Option<&'a str>,
    /// The measurements; None without an answer.
    pub metrics: Option<&'a Metrics>,
    /// Only on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<&'a str>,
    /// The answer, only on request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<&'a str>,
}

impl Record<'_> {
    /// The line, including its line feed.
    pub fn line(&self) -> String {
        // Numbers, strings and fixed names always serialize.
        serde_json::to_string(self).map(|line| line + "\n").unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Generated {
        Generated {
            text: "é".to_owned(),
            reasoning: String::new(),
            tool_calls: Vec::new(),
            finish: Finish::Stop,
            prompt_tokens: 30,
            completion_tokens: 11,
            first_tokens: 1,
            cached_tokens: Some(10),
            prompt_ms: Some(100.0),
            decode_ms: Some(50.0),
            first_token_ms: Some(120.0),
            streaming_ms: Some(100.0),
        }
    }

    const MEASURED: Measured =
        Measured { load_ms: 1.0, total_ms: 2.0, peak_memory_bytes: None, gpu_memory_bytes: None };

    #[test]
    fn rates_by_their_definitions() {
        let metrics = Metrics::new(&answer(), MEASURED);
        assert_eq!(metrics.tokens_per_second, Some(100.0));
        assert_eq!(metrics.engine_tokens_per_second, Some(200.0));
        assert_eq!(metrics.engine_prompt_tokens_per_second, Some(200.0));
        let one = Generated { completion_tokens: 1, streaming_ms: None, decode_ms: Some(0.0), ..answer() };
        let metrics = Metrics::new(&one, MEASURED);
        assert_eq!((metrics.tokens_per_second, metrics.engine_tokens_per_second), (None, None));
        let held_back = Generated { first_tokens: 6, ..answer() };
        assert_eq!(Metrics::new(&held_back, MEASURED).tokens_per_second, Some(50.0));
    }

    #[test]
    fn a_record_is_one_line_without_the_prompt() {
        let digest = Digest::of(b"x");
        let metrics = Metrics::new(&answer(), MEASURED);
        let record = Record {
            time: "2026-11-23T01:02:03Z",
            policy: "p",
            policy_sha256: digest,
            engine: "llama-cpp",
            variant: "cpu",
            fingerprint: digest,
            weights_sha256: digest,
            seed: 7,
            finish: Some(Finish::Stop),
            error: Some("a\nb"),
            metrics: Some(&metrics),
            prompt: None,
            text: None,
        };
        let line = record.line();
        assert_eq!(line.matches('\n').count(), 1);
        let back: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&back["finish"], back.get("prompt")), (&"stop".into(), None));
    }
}

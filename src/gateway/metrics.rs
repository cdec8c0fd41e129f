//! The gateway's own metrics, for Prometheus, under OpenTelemetry's GenAI names where those exist
//! (<https://github.com/open-telemetry/semantic-conventions-genai>, November 2026), and the engines' metrics beside them.
//!
//! Labels are policies, never what clients write: their number is bounded.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::memory;
use super::owner::Snapshot;
use super::scheduler::State;

/// Seconds: the conventions' bounds for whole requests.
const DURATION: [f64; 14] = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
/// Seconds: the conventions' bounds for the first token, and more above them: an engine may have to start first.
const FIRST_TOKEN: [f64; 19] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 300.0];
/// Seconds: the conventions' bounds for each further token.
const PER_TOKEN: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];
/// Tokens: powers of four.
const TOKENS: [f64; 14] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
/// Seconds that the gateway itself adds.
const OVERHEAD: [f64; 10] = [0.000_05, 0.000_1, 0.000_2, 0.000_3, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.1];

/// Whose request it was.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    pub gen_ai_operation_name: &'static str,
    pub gen_ai_provider_name: String,
    pub gen_ai_request_model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TokenLabels {
    gen_ai_operation_name: &'static str,
    gen_ai_provider_name: String,
    gen_ai_request_model: String,
    gen_ai_token_type: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    policy: String,
    code: u16,
    finish_reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPolicy {
    policy: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    policy: String,
    phase: &'static str,
}

#[derive(Debug, Clone)]
struct Bounds(&'static [f64]);

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

type Seconds<L> = Family<L, Histogram, Bounds>;

/// One request that has ended, as metrics see it.
#[derive(Debug)]
pub struct Sample {
    pub labels: Labels,
    pub code: u16,
    pub finish: String,
    /// From the arrival to the end.
    pub duration: Duration,
    /// In the queue, the start of the engine included. None when it was never let through.
    pub waited: Option<Duration>,
    /// From the arrival to the first token.
    pub first_token: Option<Duration>,
    /// From the first token to the last.
    pub streaming: Option<Duration>,
    pub prompt_tokens: Option<u64>,
    pub completion_tokens: Option<u64>,
    /// What the gateway itself took.
    pub overhead: Duration,
    /// What was going on when the client left.
    pub left: Option<&'static str>,
}

/// All metrics of a gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    duration: Seconds<Labels>,
    first_token: Seconds<Labels>,
    per_token: Seconds<Labels>,
    tokens: Seconds<TokenLabels>,
    requests: Family<Outcome, Counter>,
    generated: Family<OfPolicy, Counter>,
    waits: Seconds<OfPolicy>,
    left: Family<Phase, Counter>,
    overhead: Histogram,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let metrics = Self {
            duration: Family::new_with_constructor(Bounds(&DURATION)),
            first_token: Family::new_with_constructor(Bounds(&FIRST_TOKEN)),
            per_token: Family::new_with_constructor(Bounds(&PER_TOKEN)),
            tokens: Family::new_with_constructor(Bounds(&TOKENS)),
            requests: Family::default(),
            generated: Family::default(),
            waits: Family::new_with_constructor(Bounds(&FIRST_TOKEN)),
            left: Family::default(),
            overhead: Histogram::new(OVERHEAD),
            registry: Registry::default(),
        };
        let mut seconds = |name: &str, help: &str, family: &Seconds<Labels>| {
            registry.register_with_unit(name, help, Unit::Seconds, family.clone());
        };
        seconds("gen_ai_server_request_duration", "From the arrival of a request to its end", &metrics.duration);
        let help = "From the arrival of a request to its first token, queue and start of the engine included";
        seconds("gen_ai_server_time_to_first_token", help, &metrics.first_token);
        seconds("gen_ai_server_time_per_output_token", "Between two tokens after the first", &metrics.per_token);
        let help = "Tokens of a request: input is the prompt, output the answer";
        registry.register("gen_ai_client_token_usage", help, metrics.tokens.clone());
        let help = "Requests that have ended, by HTTP status and reason";
        registry.register("aitools_requests", help, metrics.requests.clone());
        let help = "Tokens that an engine has generated, those of unfinished answers included";
        registry.register("aitools_generated_tokens", help, metrics.generated.clone());
        let help = "Time in the queue, the start of the engine included";
        registry.register_with_unit("aitools_queue_wait", help, Unit::Seconds, metrics.waits.clone());
        let help = "Requests whose client left, by what was going on: queue, prefill or decode";
        registry.register("aitools_client_cancelled", help, metrics.left.clone());
        let help = "Time that the gateway itself took for a request";
        registry.register_with_unit("aitools_gateway_overhead", help, Unit::Seconds, metrics.overhead.clone());
        Self { registry, ..metrics }
    }

    /// The counter of the tokens that the engine of a policy generates: it rises while an answer is generated.
    pub fn generated(&self, policy: &str) -> Counter {
        self.generated.get_or_create_owned(&OfPolicy { policy: policy.to_owned() })
    }

    /// Counts a request that has ended.
    pub fn record(&self, sample: &Sample) {
        let Labels { gen_ai_operation_name, gen_ai_provider_name, gen_ai_request_model: policy } = &sample.labels;
        self.duration.get_or_create(&sample.labels).observe(sample.duration.as_secs_f64());
        if let Some(first) = sample.first_token {
            self.first_token.get_or_create(&sample.labels).observe(first.as_secs_f64());
        }
        if let (Some(streaming), Some(count)) = (sample.streaming, sample.completion_tokens.filter(|count| *count > 1))
        {
            self.per_token.get_or_create(&sample.labels).observe(streaming.as_secs_f64() / (count - 1) as f64);
        }
        for (kind, count) in [("input", sample.prompt_tokens), ("output", sample.completion_tokens)] {
            let Some(count) = count else { continue };
            let labels = TokenLabels {
                gen_ai_operation_name,
                gen_ai_provider_name: gen_ai_provider_name.clone(),
                gen_ai_request_model: policy.clone(),
                gen_ai_token_type: kind,
            };
            self.tokens.get_or_create(&labels).observe(count as f64);
        }
        let outcome = Outcome { policy: policy.clone(), code: sample.code, finish_reason: sample.finish.clone() };
        self.requests.get_or_create(&outcome).inc();
        if let Some(waited) = sample.waited {
            self.waits.get_or_create(&OfPolicy { policy: policy.clone() }).observe(waited.as_secs_f64());
            self.overhead.observe(sample.overhead.as_secs_f64());
        }
        if let Some(phase) = sample.left {
            self.left.get_or_create(&Phase { policy: policy.clone(), phase }).inc();
        }
    }

    /// Everything in Prometheus' text format, with what a snapshot says and the engines' own metrics.
    pub fn text(&self, snapshot: &Snapshot, engines: &[(String, String)]) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        let _ = prometheus_client::encoding::text::encode(&mut text, &gauges(snapshot));
        let mut text = in_prometheus_format(&text);
        text.push_str(&relabelled(engines));
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EngineState {
    policy: String,
    engine: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfGpu {
    gpu: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// The name of a state in metrics and in the API of llama.cpp's router, which knows no more than these.
pub fn word(state: &State) -> &'static str {
    match state {
        State::Stopped | State::Stopping | State::Failed { .. } => "unloaded",
        State::Starting => "loading",
        State::Ready => "loaded",
    }
}

fn gauges(snapshot: &Snapshot) -> Registry {
    let mut registry = Registry::default();
    let (states, depth) = (Family::<EngineState, Gauge>::default(), Family::<OfPolicy, Gauge>::default());
    let (running, peak) = (Family::<OfPolicy, Gauge>::default(), Family::<OfPolicy, Gauge<f64, AtomicU64>>::default());
    for status in &snapshot.policies {
        let policy = status.offer.name.clone();
        for state in ["unloaded", "loading", "loaded", "failed"] {
            let failed = matches!(status.view.state, State::Failed { .. });
            let is = if failed { state == "failed" } else { state == word(&status.view.state) };
            let labels = EngineState { policy: policy.clone(), engine: status.offer.policy.engine.to_string(), state };
            states.get_or_create(&labels).set(i64::from(is));
        }
        let labels = OfPolicy { policy };
        depth.get_or_create(&labels).set(i64::try_from(status.view.waiting).unwrap_or(i64::MAX));
        running.get_or_create(&labels).set(status.view.running.into());
        if let Some(memory) = status.peak {
            peak.get_or_create(&labels).set((memory.ram_bytes + memory.gpu_bytes) as f64);
        }
    }
    registry.register("aitools_engine_state", "1 for the state that the engine of a policy is in", states);
    registry.register("aitools_queue_depth", "Requests that wait", depth);
    registry.register("aitools_requests_in_flight", "Requests that were let through and have not ended", running);
    registry.register_with_unit("aitools_engine_memory", "What an engine needs, as measured", Unit::Bytes, peak);
    let (total, free) =
        (Family::<OfGpu, Gauge<f64, AtomicU64>>::default(), Family::<OfGpu, Gauge<f64, AtomicU64>>::default());
    for (gpu, (all, unused)) in (0_u32..).zip(memory::gpus()) {
        total.get_or_create(&OfGpu { gpu }).set(all as f64);
        free.get_or_create(&OfGpu { gpu }).set(unused as f64);
    }
    registry.register_with_unit("aitools_gpu_memory_total", "Memory of a GPU", Unit::Bytes, total);
    registry.register_with_unit("aitools_gpu_memory_free", "Free memory of a GPU", Unit::Bytes, free);
    let build = Family::<Build, Gauge>::default();
    build.get_or_create(&Build { version: env!("CARGO_PKG_VERSION") }).set(1);
    registry.register("aitools_build_info", "The version of the gateway", build);
    registry
}

/// OpenMetrics, as the encoder writes it, in Prometheus' own format, which the engines write: there a counter's family is named as
/// its samples are, and no mark ends the text.
fn in_prometheus_format(text: &str) -> String {
    let is_counter = |family: &str| text.contains(&format!("\n# TYPE {family} counter\n"));
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(kind @ ("HELP" | "TYPE")), Some(family), Some(rest)) if is_counter(family) => {
                let _ = writeln!(out, "# {kind} {family}_total {rest}");
            }
            _ => {
                let _ = writeln!(out, "{line}");
            }
        }
    }
    out
}

/// Metrics of engines, by policy, in one text: each sample with the label `policy`, and each family once.
fn relabelled(engines: &[(String, String)]) -> String {
    let mut families: BTreeMap<&str, (Vec<&str>, Vec<String>)> = BTreeMap::new();
    for (policy, text) in engines {
        let mut comments: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE ")) {
                comments.entry(rest.split(' ').next().unwrap_or_default()).or_default().push(line);
            } else if let Some(sample) = with_policy(line, policy) {
                let name = line.split(['{', ' ']).next().unwrap_or_default();
                // The samples of a histogram have endings that its family has not.
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
                let family = base.filter(|base| comments.contains_key(base)).unwrap_or(name);
                let (known, samples) = families.entry(family).or_default();
                if known.is_empty() {
                    *known = comments.get(family).cloned().unwrap_or_default();
                }
                samples.push(sample);
            }
        }
    }
    let mut out = String::new();
    for (comments, samples) in families.into_values() {
        for line in comments.into_iter().map(str::to_owned).chain(samples) {
            let _ = writeln!(out, "{line}");
        }
    }
    out
}

/// A sample with one more label; None for a line that is none.
fn with_policy(line: &str, policy: &str) -> Option<String> {
    let name_end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(name_end);
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    if name.is_empty() || !name.chars().all(valid) {
        return None;
    }
    match rest.strip_prefix('{') {
        Some(labels) => Some(format!("{name}{{policy=\"{policy}\",{labels}")),
        None => Some(format!("{name}{{policy=\"{policy}\"}}{rest}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::notice::LastErrors;
    use super::*;

    #[test]
    fn metrics_of_engines_get_the_policy_and_each_family_once() {
        let text = "# HELP llamacpp:n_total Number.\n# TYPE llamacpp:n_total counter\nllamacpp:n_total 3\n\
                    # HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_sum 1\nbad line here {\n";
        let both = relabelled(&[("a".to_owned(), text.to_owned()), ("b".to_owned(), text.to_owned())]);
        assert_eq!(both.matches("# TYPE llamacpp:n_total").count(), 1, "{both}");
        assert!(both.contains("llamacpp:n_total{policy=\"a\"} 3\nllamacpp:n_total{policy=\"b\"} 3\n"), "{both}");
        assert!(both.contains("h_bucket{policy=\"b\",le=\"1\"} 2"), "{both}");
        let last = both.find("h_sum{policy=\"b\"}").unwrap();
        assert!(both[..last].matches("# TYPE").count() == 1, "a family is together: {both}");
    }

    #[test]
    fn requests_are_counted_by_policy() {
        let metrics = Metrics::new();
        metrics.record(&Sample {
            labels: Labels {
                gen_ai_operation_name: "chat",
                gen_ai_provider_name: "llama.cpp".to_owned(),
                gen_ai_request_model: "p".to_owned(),
            },
            code: 200,
            finish: "stop".to_owned(),
            duration: Duration::from_millis(300),
            waited: Some(Duration::from_millis(1)),
            first_token: Some(Duration::from_millis(100)),
            streaming: Some(Duration::from_millis(200)),
            prompt_tokens: Some(5),
            completion_tokens: Some(11),
            overhead: Duration::from_micros(80),
            left: None,
        });
        metrics.generated("p").inc_by(11);
        let snapshot = Snapshot {
            policies: Vec::new(),
            running: 0,
            free: None,
            budget: None,
            uptime: Duration::from_secs(1),
            errors: LastErrors::default(),
        };
        let text = metrics.text(&snapshot, &[]);
        let labels = "gen_ai_operation_name=\"chat\",gen_ai_provider_name=\"llama.cpp\",gen_ai_request_model=\"p\"";
        assert!(text.contains(&format!("gen_ai_server_time_per_output_token_seconds_sum{{{labels}}} 0.02")), "{text}");
        assert!(text.contains("aitools_requests_total{policy=\"p\",code=\"200\",finish_reason=\"stop\"} 1"), "{text}");
        assert!(text.contains("aitools_generated_tokens_total{policy=\"p\"} 11"), "{text}");
        assert!(text.contains("# TYPE aitools_requests_total counter\n"), "{text}");
        assert!(text.contains("aitools_build_info{version="), "{text}");
        assert!(!text.contains("# EOF"), "{text}");
    }
}

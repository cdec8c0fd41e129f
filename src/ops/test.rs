//! `test`: answers the `smoke` of each policy with its engine, and judges the answer. One start of the engine for a policy.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::answer::answer;
use super::project::PolicyFile;
use super::proven::smoke_subject;
use super::run::Ran;
use super::{Failure, Host, Project, ready};
use crate::base::digest::Digest;
use crate::base::fs;
use crate::engine::Ready;
use crate::engine::conversation::Finish;
use crate::engine::metrics::Metrics;
use crate::format::policy::{Output, Smoke};
use crate::store::proofs::Claim;

/// Bytes of a golden answer's file at most.
const MAX_GOLDEN_BYTES: u64 = 1 << 20;
/// Characters of an answer that a message quotes.
const QUOTED: usize = 160;

/// Whether answers are compared with golden ones: greedy answers that were recorded before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Golden {
    /// They are not.
    Ignore,
    /// They must be equal.
    Compare,
    /// They are recorded.
    Record,
}

/// What came of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Its answer is as expected.
    Passed,
    /// It is not, or there is none.
    Failed,
    /// There is nothing to test.
    Skipped,
}

/// The test of one policy.
#[derive(Debug, Serialize)]
pub struct Tested {
    /// The policy's name.
    pub policy: String,
    /// What came of it.
    pub outcome: Outcome,
    /// What is wrong with the answer, or why nothing was tested; empty when it passed.
    pub reasons: Vec<String>,
    /// The answer.
    pub text: Option<String>,
    /// Its measurements.
    pub metrics: Option<Metrics>,
    /// The file that the answer was recorded in.
    pub recorded: Option<PathBuf>,
    /// Why there is no answer.
    #[serde(skip)]
    pub failure: Option<Failure>,
}

/// A greedy answer, beside its policy as `<policy>.golden.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GoldenAnswer {
    prompt: String,
    text: String,
    tokens: u64,
    variant: String,
    /// Of the installation that answered.
    fingerprint: Digest,
    weights_sha256: Digest,
}

impl Tested {
    fn new(policy: &str, outcome: Outcome, reasons: Vec<String>) -> Self {
        let policy = policy.to_owned();
        Self { policy, outcome, reasons, text: None, metrics: None, recorded: None, failure: None }
    }
}

/// Tests the named policies, or all that the manifest includes; `tell` gets each result.
///
/// # Errors
/// When a name is unknown, or the user asked to stop. Whatever is wrong with a policy is its result.
pub fn run(
    host: &Host,
    project: &Project,
    names: &[String],
    golden: Golden,
    tell: &mut dyn FnMut(&Tested),
) -> Result<Vec<Tested>, Failure> {
    let mut all = Vec::new();
    for file in super::demand::select(project, names)? {
        host.task.check()?;
        let tested = match one(host, project, file, golden) {
            Err(failure) if host.task.cancel().is_cancelled() => return Err(failure),
            Err(failure) => {
                let reasons = vec![failure.to_string()];
                Tested { failure: Some(failure), ..Tested::new(&file.name, Outcome::Failed, reasons) }
            }
            Ok(tested) => tested,
        };
        tell(&tested);
        all.push(tested);
    }
    host.store.save_records()?;
    Ok(all)
}

fn one(host: &Host, project: &Project, file: &PolicyFile, golden: Golden) -> Result<Tested, Failure> {
    let skipped = |why: &str| Ok(Tested::new(&file.name, Outcome::Skipped, vec![why.to_owned()]));
    let Some(smoke) = &file.policy.value.smoke else { return skipped("it has no `smoke`") };
    if matches!(file.policy.value.runtime.output, Some(Output::Embeddings | Output::Ranking)) {
        return skipped("its engine gives no text (`runtime.output`)");
    }
    let (mut ready, _) = ready::ready(host, project, file)?;
    prepare(&mut ready, smoke, golden);
    let ran = answer(host, project, &ready, &smoke.prompt, false, &mut |_| true)?;
    if ran.answer.finish == Finish::Cancelled {
        host.task.check()?;
    }
    let mut reasons = judge(smoke, &ran.answer.text, &ran.metrics);
    let path = file.path.with_extension("golden.json");
    let mut recorded = None;
    match golden {
        Golden::Ignore => {}
        Golden::Compare => reasons.extend(differs(&path, &answer_of(smoke, &ready, &ran))?),
        // A wrong answer is no example.
        Golden::Record if !reasons.is_empty() => {}
        Golden::Record => {
            let text = serde_json::to_string_pretty(&answer_of(smoke, &ready, &ran)).unwrap_or_default() + "\n";
            fs::write_atomic(&path, text.as_bytes())?;
            recorded = Some(path);
        }
    }
    let subject = smoke_subject(&ready.policy_sha256, &ready.fingerprint, &ready.weights_sha256);
    host.store.add_proofs([(Claim::Smoke, subject, reasons.is_empty())])?;
    let outcome = if reasons.is_empty() { Outcome::Passed } else { Outcome::Failed };
    let (text, metrics) = (Some(ran.answer.text), Some(ran.metrics));
    Ok(Tested { text, metrics, recorded, ..Tested::new(&file.name, outcome, reasons) })
}

/// The policy as the smoke changes it: fewer tokens, less time, and for golden answers always the likeliest token.
fn prepare(ready: &mut Ready, smoke: &Smoke, golden: Golden) {
    let (generation, runtime) = (&mut ready.policy.generation, &mut ready.policy.runtime);
    generation.max_tokens = smoke.max_tokens.or(generation.max_tokens);
    runtime.timeout = smoke.max_seconds.into_iter().chain(runtime.timeout).min();
    if golden != Golden::Ignore {
        generation.temperature = Some(0.0);
        generation.seed = generation.seed.or(Some(1));
    }
}

/// Everything that is wrong with an answer.
fn judge(smoke: &Smoke, text: &str, metrics: &Metrics) -> Vec<String> {
    let mut wrong = Vec::new();
    let quoted = || quote(text);
    if let Some(expected) = &smoke.expect
        && !text.to_lowercase().contains(&expected.to_lowercase())
    {
        wrong.push(format!("the answer lacks {expected:?}: {}", quoted()));
    }
    if let Some(pattern) = &smoke.matches
        && !regex::Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(text))
    {
        wrong.push(format!("the answer does not match `{pattern}`: {}", quoted()));
    }
    if let Some(schema) = &smoke.schema {
        wrong.extend(breaks(schema, text).map(|why| format!("{why}: {}", quoted())));
    }
    if let Some(least) = smoke.min_tokens_per_second {
        match metrics.tokens_per_second {
            Some(rate) if rate >= least => {}
            Some(rate) => wrong.push(format!("{rate:.1} tokens/s, expected at least {least}")),
            None => wrong.push("the answer is too short to tell tokens/s".to_owned()),
        }
    }
    wrong
}

/// How a text breaks a JSON Schema.
fn breaks(schema: &str, text: &str) -> Option<String> {
    let Ok(answer) = serde_json::from_str(text.trim()) else { return Some("the answer is not JSON".to_owned()) };
    let validator = serde_json::from_str(schema).ok().and_then(|schema| jsonschema::validator_for(&schema).ok());
    let Some(validator) = validator else { return Some("`smoke.schema` is not a JSON Schema".to_owned()) };
    let error = validator.iter_errors(&answer).next()?;
    Some(format!("the answer breaks the schema at `{}`: {error}", error.instance_path()))
}

fn quote(text: &str) -> String {
    let short: String = text.chars().take(QUOTED).collect();
    let rest = if text.chars().count() > QUOTED { "…" } else { "" };
    format!("{short:?}{rest}")
}

fn answer_of(smoke: &Smoke, ready: &Ready, ran: &Ran) -> GoldenAnswer {
    GoldenAnswer {
        prompt: smoke.prompt.clone(),
        text: ran.answer.text.clone(),
        tokens: ran.metrics.completion_tokens,
        variant: ready.variant.as_str().to_owned(),
        fingerprint: ready.fingerprint,
        weights_sha256: ready.weights_sha256,
    }
}

/// How an answer differs from the one that was recorded.
fn differs(path: &Path, now: &GoldenAnswer) -> Result<Option<String>, Failure> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let again = "to record it, run `aitools test --record-golden`";
    let bytes = match fs::read_bounded(path, MAX_GOLDEN_BYTES) {
        Err(error) if error.is_not_found() => return Ok(Some(format!("there is no golden answer `{name}`; {again}"))),
        bytes => bytes?,
    };
    let Ok(golden) = serde_json::from_slice::<GoldenAnswer>(&bytes) else {
        return Ok(Some(format!("`{name}` is not a golden answer; {again}")));
    };
    Ok(difference(&golden, now).map(|why| format!("{why} (`{name}`)")))
}

fn difference(golden: &GoldenAnswer, now: &GoldenAnswer) -> Option<String> {
    if golden.prompt != now.prompt {
        return Some("the golden answer is to another prompt; run `aitools test --record-golden`".to_owned());
    }
    if golden.text == now.text && golden.tokens == now.tokens {
        return None;
    }
    let mut cause = match (golden.weights_sha256 == now.weights_sha256, golden.fingerprint == now.fingerprint) {
        (false, _) => "other weights gave the golden answer".to_owned(),
        (true, false) => format!("another build gave the golden answer ({})", golden.variant),
        (true, true) => "the same build and weights gave the golden answer".to_owned(),
    };
    if now.variant != "cpu" {
        cause += "; on a GPU, greedy answers may differ between runs";
    } else if golden.fingerprint == now.fingerprint {
        cause += "; another kind of processor or number of threads may round differently";
    }
    let at = golden.text.chars().zip(now.text.chars()).take_while(|(one, other)| one == other).count();
    let rest = |text: &str| quote(&text.chars().skip(at).collect::<String>());
    let text = format!("expected {}, got {}", rest(&golden.text), rest(&now.text));
    Some(format!("the answer differs from the golden one after {at} characters: {text}; {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(rate: Option<f64>) -> Metrics {
        Metrics {
            load_ms: 1.0,
            engine_prompt_ms: None,
            engine_decode_ms: None,
            first_token_ms: None,
            total_ms: 2.0,
            prompt_tokens: 3,
            cached_tokens: None,
            completion_tokens: 4,
            tokens_per_second: rate,
            engine_tokens_per_second: None,
            engine_prompt_tokens_per_second: None,
            peak_memory_bytes: None,
            gpu_memory_bytes: None,
        }
    }

    fn smoke() -> Smoke {
        Smoke {
            prompt: "?".to_owned(),
            expect: None,
            matches: None,
            schema: None,
            max_tokens: None,
            max_seconds: None,
            min_tokens_per_second: None,
        }
    }

    #[test]
    fn each_expectation_is_judged() {
        let expect = Smoke { expect: Some("paris".to_owned()), ..smoke() };
        assert_eq!(judge(&expect, "It is Paris.", &metrics(None)), [""; 0]);
        assert_eq!(judge(&expect, "Rome", &metrics(None)), ["the answer lacks \"paris\": \"Rome\""]);
        let matches = Smoke { matches: Some("^[0-9]+$".to_owned()), ..smoke() };
        assert_eq!(judge(&matches, "42", &metrics(None)), [""; 0]);
        assert_eq!(judge(&matches, "a 42", &metrics(None)).len(), 1);
        let schema = r#"{"type":"object","required":["city"],"properties":{"city":{"type":"string"}}}"#;
        let schema = Smoke { schema: Some(schema.to_owned()), ..smoke() };
        assert_eq!(judge(&schema, " {\"city\":\"Paris\"}\n", &metrics(None)), [""; 0]);
        assert!(judge(&schema, "{\"city\":1}", &metrics(None))[0].contains("breaks the schema at `/city`"));
        assert!(judge(&schema, "Paris", &metrics(None))[0].contains("is not JSON"));
        let fast = Smoke { min_tokens_per_second: Some(10.0), ..smoke() };
        assert_eq!(judge(&fast, "", &metrics(Some(10.0))), [""; 0]);
        assert_eq!(judge(&fast, "", &metrics(Some(9.96))), ["10.0 tokens/s, expected at least 10"]);
        assert_eq!(judge(&fast, "", &metrics(None)).len(), 1);
        let both = Smoke { expect: Some("x".to_owned()), min_tokens_per_second: Some(10.0), ..smoke() };
        assert_eq!(judge(&both, "y", &metrics(Some(1.0))).len(), 2, "all problems at once");
    }

    #[test]
    fn a_golden_answer_is_compared_and_the_likely_cause_named() {
        let golden = GoldenAnswer {
            prompt: "?".to_owned(),
            text: "It is Paris.".to_owned(),
            tokens: 5,
            variant: "cpu".to_owned(),
            fingerprint: Digest::of(b"f"),
            weights_sha256: Digest::of(b"w"),
        };
        assert_eq!(difference(&golden, &golden.clone()), None);
        let other = |text: &str, fingerprint: &[u8]| GoldenAnswer {
            text: text.to_owned(),
            fingerprint: Digest::of(fingerprint),
            ..golden.clone()
        };
        assert_eq!(difference(&golden, &other("It is Paris.", b"g")), None, "the same text from another build");
        let why = difference(&golden, &other("It is Päris.", b"g")).unwrap();
        assert!(why.contains("after 7 characters: expected \"aris.\", got \"äris.\"; another build"), "{why}");
        let why = difference(&golden, &other("It", b"f")).unwrap();
        assert!(why.contains("the same build"), "{why}");
        let prompt = GoldenAnswer { prompt: "!".to_owned(), ..golden.clone() };
        assert!(difference(&golden, &prompt).unwrap().contains("another prompt"));
    }
}

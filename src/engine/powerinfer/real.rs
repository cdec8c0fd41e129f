//! The adapter against real servers that variables name: PowerInfer's own, and that of the llama.cpp it left in November 2023
//! (in `llama-cpp-python` 0.2.19), which speaks the same and loads dense models alone. The end-to-end jobs build and name them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use super::PowerInfer;
use super::tests::{DENSE, SPARSE, model_at, policy};
use super::tiny::{self, Tiny};
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::platform::{Variant, executable};
use crate::engine::answer::{Answer, Generated};
use crate::engine::backend::{Backend, Supervision};
use crate::engine::client::{Client, HttpError};
use crate::engine::conversation::{Event, Finish, Request};
use crate::engine::{EngineError, Ready};

/// PowerInfer's own, or the one that it grew from.
const WIRE: &str = "AITOOLS_TEST_POWERINFER_WIRE_SERVER";
/// PowerInfer's own, built for the processor.
const OWN: &str = "AITOOLS_TEST_POWERINFER_SERVER";

#[expect(clippy::disallowed_methods, reason = "a test that only runs where somebody names a program")]
fn named(variable: &str) -> PathBuf {
    std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} names no program")).into()
}

struct Served {
    backend: Backend,
    ready: Ready,
    _folder: tempfile::TempDir,
}

/// One thread: with more, sparse answers differ from run to run.
async fn serve(model: &Tiny, program: &Path) -> Served {
    serve_with(model, program, 64).await
}

async fn serve_with(model: &Tiny, program: &Path, context: u32) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("un modèle");
    fs::create_dir_all(&root.join("scratch")).unwrap();
    let weights = root.join("tiny.gguf");
    fs::write_atomic(&weights, &model.to_bytes()).unwrap();
    let server = root.join("artifact/bin").join(executable("server"));
    fs::place(program, &server).unwrap();
    let policy = policy(&format!("runtime: {{threads: 1, context_size: {context}}}\ngeneration: {{temperature: 0}}"));
    let ready = Ready {
        engine: &PowerInfer,
        model: Arc::new(model_at(model, &weights)),
        name: "tiny".parse().unwrap(),
        policy,
        policy_sha256: Digest::of(b""),
        variant: Variant::Cpu,
        artifact: root.join("artifact"),
        fingerprint: Digest::of(b""),
        weights_sha256: Digest::of(b""),
        cores: 1,
        network: false,
    };
    let supervision = Supervision {
        driver: None,
        env: &BTreeMap::new(),
        scratch: &root.join("scratch"),
        log: &root.join("log"),
        deadline: Instant::now() + Duration::from_secs(60),
    };
    let backend = Backend::start(&ready, &supervision).await.unwrap();
    Served { backend, ready, _folder: folder }
}

impl Served {
    async fn ask(&self, generation: &str, prompt: &str) -> Result<Generated, EngineError> {
        self.ask_until(generation, prompt, usize::MAX).await
    }

    async fn ask_until(&self, generation: &str, prompt: &str, pieces: usize) -> Result<Generated, EngineError> {
        let text = format!("runtime: {{context_size: 64}}\ngeneration: {{temperature: 0, {generation}}}");
        self.ask_under(&text, prompt, |came| came < pieces).await
    }

    /// One answer under another policy, whose pieces are counted until `go_on` says no.
    async fn ask_under(
        &self,
        policy_text: &str,
        prompt: &str,
        mut go_on: impl FnMut(usize) -> bool,
    ) -> Result<Generated, EngineError> {
        let policy = policy(policy_text);
        let request = Request::new(&policy, prompt, 1, Instant::now() + Duration::from_secs(30));
        let mut answer = Answer::new();
        let mut came = 0;
        let mut events = self.ready.model.connect(&policy, self.backend.endpoint())?.generate(request);
        while let Some(event) = events.next().await {
            let event = event?;
            answer.push(&event)?;
            if matches!(event, Event::Delta(_)) {
                came += 1;
                if !go_on(came) {
                    answer.cancel();
                    break;
                }
            }
        }
        answer.into_generated()
    }
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_says_what_the_model_says() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let expected = tiny::greedy(&DENSE, &tiny::hi(), 8);
    let answer = served.ask("max_tokens: 8", "hi").await.unwrap();
    assert_eq!(answer.text, tiny::words(&expected), "{expected:?}");
    assert_eq!((answer.prompt_tokens, answer.completion_tokens, answer.finish), (3, 8, Finish::Length), "{answer:?}");
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_SERVER"]
async fn powerinfer_says_what_the_sparse_model_says() {
    let program = named(OWN);
    let served = serve(&SPARSE, &program).await;
    let expected = tiny::greedy(&SPARSE, &tiny::hi(), 8);
    assert_eq!(served.ask("max_tokens: 8", "hi").await.unwrap().text, tiny::words(&expected), "{expected:?}");
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_keeps_to_its_limits() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let expected = tiny::greedy(&DENSE, &tiny::hi(), 8);
    for limit in 1..=7 {
        let answer = served.ask(&format!("max_tokens: {limit}"), "hi").await.unwrap();
        assert_eq!((answer.completion_tokens, answer.finish), (limit as u64, Finish::Length), "{answer:?}");
        assert_eq!(answer.text, tiny::words(&expected[..limit]));
    }
    let long = served.ask("", &"x".repeat(63)).await;
    assert!(matches!(long, Err(EngineError::TooLong { prompt_tokens: 64.., context_size: 64 })), "{long:?}");
    // The context is filled to its last token, and the server lives on.
    let full = served.ask("max_tokens: 500", "hi").await.unwrap();
    assert!(full.finish == Finish::Stop || full.completion_tokens == 61, "{full:?}");
    served.ask("max_tokens: 4", "hi").await.unwrap();
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_stops_where_we_say() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let whole = served.ask("max_tokens: 8", "hi").await.unwrap().text;
    let (first, stop) = (whole.chars().take(3).collect::<String>(), whole.chars().skip(3).take(2).collect::<String>());
    let stopped = served.ask(&format!("max_tokens: 30, stop: [{}]", serde_json::json!(stop)), "hi").await.unwrap();
    assert_eq!(
        (stopped.text.as_str(), stopped.finish),
        (&whole[..whole.find(&stop).unwrap()], Finish::Stop),
        "{first}"
    );
    // The beginning of a stop text at the end of an answer is a part of the answer.
    let begun = serde_json::json!(format!("{}\u{e000}", whole.chars().last().unwrap()));
    assert_eq!(served.ask(&format!("max_tokens: 8, stop: [{begun}]"), "hi").await.unwrap().text, whole);
    let cancelled = served.ask_until("max_tokens: 50", "hi", 2).await.unwrap();
    assert_eq!((cancelled.finish, cancelled.completion_tokens), (Finish::Cancelled, 2));
}

/// A slot is free only a moment after its answer has ended, and later when the answer was cut.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_is_asked_many_times_in_a_row() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let whole = served.ask("max_tokens: 4", "hi").await.unwrap().text;
    for round in 0..40 {
        let answer = served.ask("max_tokens: 4", "hi").await.unwrap();
        assert_eq!(answer.text, whole, "{round}");
        served.ask_until("max_tokens: 50", "hi", 1).await.unwrap();
    }
    // More at a time than it has slots.
    let answers = futures_util::future::join_all((0..6).map(|_| served.ask("max_tokens: 4", "hi"))).await;
    answers.into_iter().for_each(|answer| assert_eq!(answer.unwrap().text, whole));
}

/// With `cache_prompt` it does not: the second answer is another one.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_answers_the_same_again() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let asked = async |prompt: &str| served.ask("max_tokens: 8", prompt).await.unwrap().text;
    let first = asked("hello world").await;
    for prompt in ["hello", "hello world again", "other"] {
        let before = asked(prompt).await;
        assert_eq!((asked(prompt).await, asked("hello world").await), (before, first.clone()));
    }
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_gets_special_tokens_from_templates_alone() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let plain = served.ask("max_tokens: 4, chat_template: chatml", "x").await.unwrap();
    let forged = served.ask("max_tokens: 4, chat_template: chatml", "<|im_end|>").await.unwrap();
    // Ten characters are at least five tokens of this vocabulary; one special token would be one.
    assert!(forged.prompt_tokens >= plain.prompt_tokens + 4, "{} and {}", forged.prompt_tokens, plain.prompt_tokens);
}

/// A request as no adapter of ours sends it, and what comes back of the answer within two seconds.
async fn raw(served: &Served, body: &str) -> Result<String, HttpError> {
    let client = Client::new(served.backend.endpoint());
    let response = client.post("/completion", body.to_owned(), Instant::now() + Duration::from_secs(2)).await?;
    response.text(1 << 20).await
}

/// One request of somebody else ends the server: whoever waits for an answer is told at once, and how it ended.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_SERVER"]
async fn powerinfer_that_a_request_kills_is_not_waited_for() {
    let program = named(OWN);
    for field in [r#""n_predict": "x""#, r#""temperature": "x""#, r#""stop": [5]"#, r#""grammar": "root ::= (""#] {
        let served = serve(&SPARSE, &program).await;
        // While the slot is taken it is refused; after that it kills.
        let fatal = format!(r#"{{"prompt": "hi", {field}}}"#);
        let kill = async {
            for _ in 0..1000 {
                if matches!(raw(&served, &fatal).await, Err(HttpError::Connect { .. })) {
                    return;
                }
            }
            panic!("{field} is harmless now");
        };
        let (answer, ()) = tokio::join!(served.ask("max_tokens: 60", "hi"), kill);
        assert!(served.backend.ending().await.is_some(), "{field}");
        let after = served.ask("max_tokens: 4", "hi").await;
        assert!(matches!(after, Err(EngineError::Unanswered(_))), "{field}: {after:?} after {answer:?}");
    }
}

/// A full context without context shift: the server still reports its settings and never answers again.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_SERVER"]
async fn powerinfer_that_hangs_is_not_called_ready() {
    let program = named(OWN);
    let served = serve(&SPARSE, &program).await;
    let endless = r#"{"prompt": "hi", "n_predict": -1, "ignore_eos": true, "temperature": 1.5, "repeat_penalty": 1.0}"#;
    let mut hung = false;
    for _ in 0..10 {
        hung = hung || matches!(raw(&served, endless).await, Err(HttpError::Timeout));
    }
    assert!(hung, "it does not hang any more");
    let ready = served.backend.conversation().ready(Instant::now() + Duration::from_secs(2)).await;
    assert!(matches!(ready, Ok(false) | Err(EngineError::Timeout)), "{ready:?}");
    served.backend.stop(Duration::from_secs(2)).await;
}

/// The one slot is taken by somebody else: ours waits for it, and is right.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_that_is_busy_is_asked_again() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program).await;
    let alone = served.ask("max_tokens: 8", "hi").await.unwrap().text;
    let other = r#"{"prompt": "hello", "n_predict": 50, "stream": true, "ignore_eos": true}"#;
    let ours = async {
        for _ in 0..5 {
            assert_eq!(served.ask("max_tokens: 8", "hi").await.unwrap().text, alone);
        }
    };
    let others = futures_util::future::join_all((0..3).map(|_| raw(&served, other)));
    let ((), others) = tokio::join!(ours, others);
    others.into_iter().for_each(|other| drop(other.unwrap()));
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
async fn a_real_server_that_dies_in_the_middle_leaves_half_an_answer_and_an_error() {
    let program = named(WIRE);
    // Long enough not to be over, or on its way to us, when the server dies.
    let served = serve_with(&DENSE, &program, 512).await;
    let pid = served.backend.pid().to_string();
    let mut pieces = 0;
    let policy = "runtime: {context_size: 512}\ngeneration: {temperature: 0, max_tokens: 500}";
    let answer = served.ask_under(policy, "hi", |came| {
        pieces = came;
        if came == 3 {
            kill(&pid);
        }
        true
    });
    let answer = answer.await;
    assert!(matches!(answer, Err(EngineError::Unanswered(_))) && pieces >= 3, "{answer:?} after {pieces} pieces");
}

fn kill(pid: &str) {
    let _ = std::process::Command::new("kill").args(["-9", pid]).status();
}

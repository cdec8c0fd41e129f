//! The adapter against real servers that variables name: PowerInfer's own, and that of the llama.cpp it left in November 2023
//! (in `llama-cpp-python` 0.2.19), which speaks the same and loads dense models alone. The end-to-end jobs build and name them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::PowerInfer;
use super::tests::{DENSE, SPARSE, header, policy};
use super::tiny::{self, Tiny};
use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::fs;
use crate::base::platform::{Variant, executable};
use crate::engine::backend::{Backend, Supervision};
use crate::engine::http::{self, HttpError, Patience, Request};
use crate::engine::{Engine as _, EngineError, Finish, GenerateRequest, Generated, Piece, Ready};

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
fn serve(model: &Tiny, program: &Path) -> Served {
    serve_with(model, program, 64)
}

fn serve_with(model: &Tiny, program: &Path, context: u32) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("un modèle");
    fs::create_dir_all(&root.join("scratch")).unwrap();
    fs::write_atomic(&root.join("tiny.gguf"), &model.to_bytes()).unwrap();
    let server = root.join("artifact/bin").join(executable("server"));
    fs::place(program, &server).unwrap();
    let policy = policy(&format!("runtime: {{threads: 1, context_size: {context}}}\ngeneration: {{temperature: 0}}"));
    let ready = Ready {
        engine: &PowerInfer,
        name: "tiny".parse().unwrap(),
        policy,
        policy_sha256: Digest::of(b""),
        variant: Variant::Cpu,
        artifact: root.join("artifact"),
        fingerprint: Digest::of(b""),
        weights: root.join("tiny.gguf"),
        weights_sha256: Digest::of(b""),
        header: header(model),
        cores: 1,
    };
    let supervision = Supervision {
        driver: None,
        env: &BTreeMap::new(),
        scratch: &root.join("scratch"),
        log: &root.join("log"),
        cancel: &Cancel::default(),
        deadline: Instant::now() + Duration::from_secs(60),
    };
    let backend = Backend::start(&ready, &supervision).unwrap();
    Served { backend, ready, _folder: folder }
}

impl Served {
    fn ask(&self, generation: &str, prompt: &str) -> Result<Generated, EngineError> {
        self.ask_until(generation, prompt, usize::MAX)
    }

    fn ask_until(&self, generation: &str, prompt: &str, pieces: usize) -> Result<Generated, EngineError> {
        let policy = policy(&format!("runtime: {{context_size: 64}}\ngeneration: {{temperature: 0, {generation}}}"));
        let (deadline, cancel) = (Instant::now() + Duration::from_secs(30), Cancel::default());
        let header = &self.ready.header;
        let ask = GenerateRequest { policy: &policy, header, prompt, seed: 1, deadline, cancel: &cancel };
        let mut came = 0;
        PowerInfer.generate(self.backend.endpoint(), &ask, &mut |_: Piece<'_>| {
            came += 1;
            came < pieces
        })
    }
}

#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_says_what_the_model_says() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let expected = tiny::greedy(&DENSE, &tiny::hi(), 8);
    let answer = served.ask("max_tokens: 8", "hi").unwrap();
    assert_eq!(answer.text, tiny::words(&expected), "{expected:?}");
    assert_eq!((answer.prompt_tokens, answer.completion_tokens, answer.finish), (3, 8, Finish::Length), "{answer:?}");
}

#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_SERVER"]
fn powerinfer_says_what_the_sparse_model_says() {
    let program = named(OWN);
    let served = serve(&SPARSE, &program);
    let expected = tiny::greedy(&SPARSE, &tiny::hi(), 8);
    assert_eq!(served.ask("max_tokens: 8", "hi").unwrap().text, tiny::words(&expected), "{expected:?}");
}

#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_keeps_to_its_limits() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let expected = tiny::greedy(&DENSE, &tiny::hi(), 8);
    for limit in 1..=7 {
        let answer = served.ask(&format!("max_tokens: {limit}"), "hi").unwrap();
        assert_eq!((answer.completion_tokens, answer.finish), (limit as u64, Finish::Length), "{answer:?}");
        assert_eq!(answer.text, tiny::words(&expected[..limit]));
    }
    let long = served.ask("", &"x".repeat(63));
    assert!(matches!(long, Err(EngineError::TooLong { prompt_tokens: 64.., context_size: 64 })), "{long:?}");
    // The context is filled to its last token, and the server lives on.
    let full = served.ask("max_tokens: 500", "hi").unwrap();
    assert!(full.finish == Finish::Stop || full.completion_tokens == 61, "{full:?}");
    served.ask("max_tokens: 4", "hi").unwrap();
}

#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_stops_where_we_say() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let whole = served.ask("max_tokens: 8", "hi").unwrap().text;
    let (first, stop) = (whole.chars().take(3).collect::<String>(), whole.chars().skip(3).take(2).collect::<String>());
    let stopped = served.ask(&format!("max_tokens: 30, stop: [{}]", serde_json::json!(stop)), "hi").unwrap();
    assert_eq!(
        (stopped.text.as_str(), stopped.finish),
        (&whole[..whole.find(&stop).unwrap()], Finish::Stop),
        "{first}"
    );
    // The beginning of a stop text at the end of an answer is a part of the answer.
    let begun = serde_json::json!(format!("{}\u{e000}", whole.chars().last().unwrap()));
    assert_eq!(served.ask(&format!("max_tokens: 8, stop: [{begun}]"), "hi").unwrap().text, whole);
    let cancelled = served.ask_until("max_tokens: 50", "hi", 2).unwrap();
    assert_eq!((cancelled.finish, cancelled.completion_tokens), (Finish::Cancelled, 2));
}

/// A slot is free only a moment after its answer has ended, and later when the answer was cut.
#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_is_asked_many_times_in_a_row() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let whole = served.ask("max_tokens: 4", "hi").unwrap().text;
    for round in 0..40 {
        let answer = served.ask("max_tokens: 4", "hi").unwrap();
        assert_eq!(answer.text, whole, "{round}");
        served.ask_until("max_tokens: 50", "hi", 1).unwrap();
    }
    std::thread::scope(|scope| {
        let ask = || served.ask("max_tokens: 4", "hi").unwrap().text;
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().for_each(|thread| assert_eq!(thread.join().unwrap(), whole));
    });
}

/// With `cache_prompt` it does not: the second answer is another one.
#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_answers_the_same_again() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let asked = |prompt: &str| served.ask("max_tokens: 8", prompt).unwrap().text;
    let first = asked("hello world");
    for prompt in ["hello", "hello world again", "other"] {
        let before = asked(prompt);
        assert_eq!((asked(prompt), asked("hello world")), (before, first.clone()));
    }
}

#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_gets_special_tokens_from_templates_alone() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let plain = served.ask("max_tokens: 4, chat_template: chatml", "x").unwrap();
    let forged = served.ask("max_tokens: 4, chat_template: chatml", "<|im_end|>").unwrap();
    // Ten characters are at least five tokens of this vocabulary; one special token would be one.
    assert!(forged.prompt_tokens >= plain.prompt_tokens + 4, "{} and {}", forged.prompt_tokens, plain.prompt_tokens);
}

/// A request as no adapter of ours sends it, and what comes back of the answer within two seconds.
fn raw(port: u16, body: &str) -> Result<String, HttpError> {
    let cancel = Cancel::default();
    let patience = Patience { cancel: &cancel, deadline: Instant::now() + Duration::from_secs(2) };
    http::send(port, Request { path: "/completion", key: None, json: Some(body) }, patience)?.text(1 << 20)
}

/// One request of somebody else ends the server: whoever waits for an answer hears of it at once, and how it ended.
#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_SERVER"]
fn powerinfer_that_a_request_kills_is_not_waited_for() {
    let program = named(OWN);
    for field in [r#""n_predict": "x""#, r#""temperature": "x""#, r#""stop": [5]"#, r#""grammar": "root ::= (""#] {
        let mut served = serve(&SPARSE, &program);
        let port = served.backend.endpoint().port;
        let answer = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| served.ask("max_tokens: 60", "hi"));
            // While the slot is taken it is refused; after that it kills.
            let fatal = format!(r#"{{"prompt": "hi", {field}}}"#);
            let gone = |_: &u32| matches!(raw(port, &fatal), Err(HttpError::Connect { .. }));
            assert!((0..1000).any(|round| gone(&round)), "{field} is harmless now");
            waiting.join().unwrap()
        });
        assert!(served.backend.ending().is_some(), "{field}");
        let after = served.ask("max_tokens: 4", "hi");
        assert!(matches!(after, Err(EngineError::Unanswered(_))), "{field}: {after:?} after {answer:?}");
    }
}

/// A full context without context shift: the server still tells its settings and never answers again.
#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_SERVER"]
fn powerinfer_that_hangs_is_not_called_ready() {
    let program = named(OWN);
    let served = serve(&SPARSE, &program);
    let port = served.backend.endpoint().port;
    let endless = r#"{"prompt": "hi", "n_predict": -1, "ignore_eos": true, "temperature": 1.5, "repeat_penalty": 1.0}"#;
    let hung = |_: &u32| matches!(raw(port, endless), Err(HttpError::Timeout));
    assert!((0..10).any(|round| hung(&round)), "it hangs no more");
    let cancel = Cancel::default();
    let patience = Patience { cancel: &cancel, deadline: Instant::now() + Duration::from_secs(2) };
    let ready = PowerInfer.ready(served.backend.endpoint(), patience);
    assert!(matches!(ready, Ok(false) | Err(EngineError::Timeout)), "{ready:?}");
    served.backend.stop(Duration::from_secs(2));
}

/// The one slot is taken by somebody else: ours waits for it, and is right.
#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_that_is_busy_is_asked_again() {
    let program = named(WIRE);
    let served = serve(&DENSE, &program);
    let (port, alone) = (served.backend.endpoint().port, served.ask("max_tokens: 8", "hi").unwrap().text);
    std::thread::scope(|scope| {
        let other = r#"{"prompt": "hello", "n_predict": 50, "stream": true, "ignore_eos": true}"#;
        let others: Vec<_> = (0..3).map(|_| scope.spawn(move || raw(port, other))).collect();
        for _ in 0..5 {
            assert_eq!(served.ask("max_tokens: 8", "hi").unwrap().text, alone);
        }
        others.into_iter().for_each(|other| drop(other.join().unwrap()));
    });
}

#[test]
#[ignore = "needs AITOOLS_TEST_POWERINFER_WIRE_SERVER"]
fn a_real_server_that_dies_in_the_middle_leaves_half_an_answer_and_an_error() {
    let program = named(WIRE);
    // Long enough not to be over, or on its way to us, when the server dies.
    let served = serve_with(&DENSE, &program, 512);
    let pid = served.backend.pid().to_string();
    let (deadline, cancel) = (Instant::now() + Duration::from_secs(30), Cancel::default());
    let policy = policy("runtime: {context_size: 512}\ngeneration: {temperature: 0, max_tokens: 500}");
    let ask = GenerateRequest {
        policy: &policy,
        header: &served.ready.header,
        prompt: "hi",
        seed: 1,
        deadline,
        cancel: &cancel,
    };
    let mut came = 0;
    let answer = PowerInfer.generate(served.backend.endpoint(), &ask, &mut |_: Piece<'_>| {
        came += 1;
        if came == 3 {
            kill(&pid);
        }
        true
    });
    assert!(matches!(answer, Err(EngineError::Unanswered(_))) && came >= 3, "{answer:?} after {came} pieces");
}

fn kill(pid: &str) {
    let _ = std::process::Command::new("kill").args(["-9", pid]).status();
}

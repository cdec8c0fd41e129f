//! The llama.cpp adapter with a real `llama-server` and real weights. Runs where `AITOOLS_TEST_LLAMA_SERVER` (a program) and
//! `AITOOLS_TEST_WEIGHTS` (a chat model such as SmolLM2-135M-Instruct) name them: the job `quickstart` does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, clippy::print_stderr, reason = "where the engine is comes from the environment")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use aitools::base::cancel::Cancel;
use aitools::base::digest::Digest;
use aitools::base::fs;
use aitools::base::platform::{Variant, executable};
use aitools::engine::answer::{Answer, Generated};
use aitools::engine::backend::{Backend, Supervision, passed_on};
use aitools::engine::conversation::{Event, Finish, Piece, Request};
use aitools::engine::gguf::Gguf;
use aitools::engine::llama_cpp::{LlamaCpp, LlamaModel};
use aitools::engine::{EngineError, Model as _, ModelFiles, Ready};
use aitools::format::policy::{Policy, parse};
use aitools::ops::run::{Ask, Ran, RunError, run};
use aitools::report::{Silent, Task};

const DEFAULTS: &str = "engine: llama-cpp\nmodel: m\n";
/// What this model answers at temperature 0 under its own system message is French poetry.
const PLAIN: &str = "system_prompt: You are a helpful assistant., temperature: 0, seed: 1";

struct Scene {
    folder: tempfile::TempDir,
    ready: Ready,
    model: LlamaModel,
    env: BTreeMap<OsString, OsString>,
    driver: PathBuf,
    cancel: Cancel,
}

fn policy(text: &str) -> Policy {
    parse("policy.yaml", format!("{DEFAULTS}{text}\n").as_bytes()).unwrap().0.value
}

impl Scene {
    fn new(text: &str) -> Self {
        let [server, weights] =
            ["AITOOLS_TEST_LLAMA_SERVER", "AITOOLS_TEST_WEIGHTS"].map(|name| std::env::var_os(name).unwrap());
        let folder = tempfile::Builder::new().prefix("aitools é ").tempdir().unwrap();
        let program = folder.path().join("artifact/bin").join(executable("llama-server"));
        fs::place(&PathBuf::from(server), &program).unwrap();
        let gguf = Gguf::open(&ModelFiles { weights: &[PathBuf::from(weights)], beside: &[] }).unwrap();
        let model = LlamaModel(gguf);
        let ready = Ready {
            engine: &LlamaCpp,
            model: Arc::new(model.clone()),
            name: "real".parse().unwrap(),
            policy: policy(text),
            policy_sha256: Digest::of(text.as_bytes()),
            variant: Variant::Cpu,
            artifact: folder.path().join("artifact"),
            fingerprint: Digest::of(b"artifact"),
            weights_sha256: Digest::of(b"weights"),
            cores: 2,
            network: false,
        };
        let vars: Vec<_> = std::env::vars_os().collect();
        let env = passed_on(vars.iter().map(|(name, value)| (name.as_os_str(), value.as_os_str())));
        let program = env!("CARGO_BIN_EXE_aitools").into();
        Self { folder, ready, model, env, driver: program, cancel: Cancel::default() }
    }

    async fn start(&self) -> Backend {
        let scratch = self.folder.path().join("scratch");
        fs::create_dir_all(&scratch).unwrap();
        let supervision = Supervision {
            driver: Some(&self.driver),
            env: &self.env,
            scratch: &scratch,
            log: &self.folder.path().join("engine.log"),
            deadline: Instant::now() + Duration::from_secs(120),
        };
        Backend::start(&self.ready, &supervision).await.unwrap()
    }

    /// One answer of a running engine under another policy's `generation`.
    async fn ask(&self, backend: &Backend, generation: &str, prompt: &str) -> Result<Generated, EngineError> {
        self.ask_until(backend, generation, prompt, usize::MAX).await
    }

    /// The same, but no more than so many pieces.
    async fn ask_until(
        &self,
        backend: &Backend,
        generation: &str,
        prompt: &str,
        pieces: usize,
    ) -> Result<Generated, EngineError> {
        let policy = policy(&format!("generation: {{{generation}}}"));
        let seed = policy.generation.seed.unwrap_or(1);
        let request = Request::new(&policy, prompt, seed, Instant::now() + Duration::from_secs(120));
        let (mut answer, mut came) = (Answer::new(), 0);
        let mut events = self.model.connect(&policy, backend.endpoint())?.generate(request);
        while let Some(event) = events.next().await {
            let event = event?;
            answer.push(&event)?;
            came += usize::from(matches!(event, Event::Delta(_)));
            if came >= pieces {
                answer.cancel();
                break;
            }
        }
        answer.into_generated()
    }

    fn run(&self, prompt: &str, sink: &mut dyn FnMut(&Piece) -> bool) -> Result<Ran, RunError> {
        let ask = Ask {
            prompt,
            driver: Some(&self.driver),
            env: &self.env,
            scratch: self.folder.path(),
            log: &self.folder.path().join("engine.log"),
            record: &self.folder.path().join("generations.jsonl"),
            keep_text: true,
            time: "2026-11-23T01:02:03Z",
        };
        run(&self.ready, &ask, &Task::new(Arc::new(Silent), self.cancel.clone()), sink)
    }
}

#[test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
fn one_shot_says_paris_with_sane_metrics() {
    let scene = Scene::new(&format!("generation: {{{PLAIN}, max_tokens: 32}}"));
    let mut heard = String::new();
    let ran = scene
        .run("What is the capital of France?", &mut |piece| {
            if let Piece::Text(text) = piece {
                heard.push_str(text);
            }
            true
        })
        .unwrap();
    eprintln!("{heard:?} {:#?}", ran.metrics);
    assert!(heard.contains("Paris") && heard == ran.answer.text, "{heard}");
    let metrics = &ran.metrics;
    assert!((20..100).contains(&metrics.prompt_tokens) && (2..=32).contains(&metrics.completion_tokens));
    let (first, total) = (metrics.first_token_ms.unwrap(), metrics.total_ms);
    assert!(metrics.load_ms > 0.0 && first > 0.0 && metrics.load_ms + first <= total, "{metrics:?}");
    assert!(metrics.engine_prompt_ms.unwrap() <= first * 1.05, "{metrics:?}");
    let (ours, engines) = (metrics.tokens_per_second.unwrap(), metrics.engine_tokens_per_second.unwrap());
    assert!((0.5..2.0).contains(&(ours / engines)), "{ours} and {engines} tokens a second");
    if cfg!(target_os = "linux") {
        let estimate = scene.model.memory_bytes(&scene.ready.policy);
        let ratio = metrics.peak_memory_bytes.unwrap() as f64 / estimate as f64;
        assert!((0.5..4.0).contains(&ratio), "{estimate} bytes were estimated: {metrics:?}");
    }
    let record = fs::read_bounded(&scene.folder.path().join("generations.jsonl"), 1 << 20).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    assert_eq!((&record["text"], &record["seed"]), (&heard.into(), &1.into()));
}

#[tokio::test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
async fn answers_follow_the_policy() {
    let scene = Scene::new("runtime: {context_size: 512}");
    let backend = scene.start().await;
    let ask = async |generation: &str, prompt: &str| scene.ask(&backend, generation, prompt).await.unwrap();
    let raw = "chat_template: none, temperature: 0";
    // The same at temperature 0, and with a seed at any other; another with another seed.
    let hot =
        async |seed: u32| ask(&format!("temperature: 1.5, max_tokens: 40, seed: {seed}"), "Tell me a story").await.text;
    let third = hot(3).await;
    assert_eq!(third, hot(3).await);
    assert_ne!(third, hot(4).await);
    let story = ask(&format!("{raw}, max_tokens: 24"), "Once upon a time").await;
    assert_eq!(story.text, ask(&format!("{raw}, max_tokens: 24"), "Once upon a time").await.text);
    // Exactly as many tokens as were asked for.
    assert_eq!((story.completion_tokens, story.finish), (24, Finish::Length));
    let one = ask(&format!("{raw}, max_tokens: 1"), "The capital of France is").await;
    assert_eq!((&*one.text, one.completion_tokens, one.streaming_ms.is_some()), (" Paris", 1, true));
    // A stop text is not part of the answer, and nothing follows.
    let counted = ask(&format!("{raw}, max_tokens: 40, stop: ['5']"), "1, 2, 3,").await;
    assert_eq!((&*counted.text, counted.finish), (" 4, ", Finish::Stop));
    // Whole characters, also where one is several tokens.
    let request = "Repeat exactly: żółć 日本語 🦀🦀";
    let text = ask(&format!("{PLAIN}, max_tokens: 60"), request).await.text;
    assert!(!text.contains('\u{fffd}') && !text.is_ascii(), "{text}");
    // A prompt that does not fit says so with numbers, and the engine goes on.
    let long = "word ".repeat(2000);
    let refused = scene.ask(&backend, PLAIN, &long).await.unwrap_err();
    assert!(matches!(refused, EngineError::TooLong { prompt_tokens: 2000.., context_size: 512 }), "{refused}");
    assert!(ask(PLAIN, "What is the capital of France?").await.text.contains("Paris"));
    assert!(backend.tail().iter().all(|line| !line.contains(&backend.endpoint().key)), "the key is in the log");
    backend.stop(Duration::from_secs(5)).await;
}

/// M8: the server counts tokens, and a control token is one where its letters are several.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
async fn m8_a_real_server_gets_control_tokens_from_templates_alone() {
    let scene = Scene::new("runtime: {context_size: 512}");
    let backend = scene.start().await;
    let tokens =
        async |prompt: &str| scene.ask(&backend, "max_tokens: 1, temperature: 0", prompt).await.unwrap().prompt_tokens;
    let empty = tokens("x").await;
    for control in ["<|im_end|>", "<|im_start|>", "<|endoftext|>"] {
        let raw = scene.ask(&backend, "max_tokens: 1, chat_template: none", &control.repeat(20)).await.unwrap();
        assert_eq!(raw.prompt_tokens, 20, "a raw prompt holds control tokens");
        let grown = tokens(&format!("x{}", control.repeat(20))).await - empty;
        assert!(grown > 60, "20 times {control} are {grown} tokens in a message");
    }
    backend.stop(Duration::from_secs(5)).await;
}

#[test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
fn templates_of_ones_own_are_used() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %} The capital of France is";
    let mut scene = Scene::new(&format!("generation: {{chat_template: '{template}', max_tokens: 2, temperature: 0}}"));
    assert!(scene.run("Geography.", &mut |_| true).unwrap().answer.text.contains("Paris"));
    scene.ready.policy.generation.chat_template = Some("{% if %}".to_owned());
    let error = scene.run("x", &mut |_| true).unwrap_err();
    assert!(!error.tail().is_empty(), "{error}");
}

#[test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
fn an_interrupted_answer_is_kept() {
    let scene = Scene::new("");
    let ran = scene
        .run("Count to a thousand.", &mut |_| {
            scene.cancel.cancel();
            true
        })
        .unwrap();
    // Its first piece and nothing after it, however much was already in the socket.
    assert_eq!((ran.answer.finish, ran.answer.completion_tokens), (Finish::Cancelled, ran.answer.first_tokens));
    assert!(!ran.answer.text.is_empty());
}

/// An engine that stays, as a gateway's would: after the connection is closed the slot is free for the next request.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
async fn an_engine_stops_working_for_a_request_that_is_dropped() {
    let scene = Scene::new("runtime: {parallel: 1}");
    let backend = scene.start().await;
    let long = "max_tokens: 1500, chat_template: none";
    let cut = scene.ask_until(&backend, long, "1, 2, 3,", 1).await.unwrap();
    assert_eq!(cut.finish, Finish::Cancelled);
    let next = scene.ask(&backend, "max_tokens: 16, chat_template: none, temperature: 0", "1, 2, 3,").await.unwrap();
    let token_ms = next.streaming_ms.unwrap() / 15.0;
    let waited_ms = next.first_token_ms.unwrap();
    assert!(waited_ms < 500.0 * token_ms, "the slot was busy for {waited_ms} ms, {token_ms} ms a token");
}

/// Four requests at a time to an engine with four slots get what each gets alone.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
async fn requests_at_a_time_get_their_own_answers() {
    let scene = Scene::new("runtime: {parallel: 4, context_size: 512}");
    let backend = scene.start().await;
    let backend = &backend;
    let prompts = ["1, 2, 3,", "a, b, c,", "Monday, Tuesday,", "The capital of France is"];
    let ask = async |prompt: &str| {
        scene.ask(backend, "max_tokens: 8, chat_template: none, temperature: 0", prompt).await.unwrap().text
    };
    let mut alone = Vec::new();
    for prompt in prompts {
        alone.push(ask(prompt).await);
    }
    assert_eq!(futures_util::future::join_all(prompts.map(ask)).await, alone);
}

#[test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
fn weights_that_are_none_are_refused_with_the_engines_words() {
    let mut scene = Scene::new("");
    let weights = scene.folder.path().join("no model.gguf");
    fs::write_atomic(&weights, b"GGUF, they said").unwrap();
    scene.ready.model = Arc::new(LlamaModel(Gguf { weights, ..scene.model.0.clone() }));
    let error = scene.run("x", &mut |_| true).unwrap_err();
    assert!(error.to_string().contains("ended before it was ready"), "{error}");
    assert!(error.tail().iter().any(|line| line.contains("no model.gguf")), "{:?}", error.tail());
}

/// Is started by the next test as a process of its own, and killed.
#[tokio::test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
async fn holder() {
    if std::env::var_os("AITOOLS_TEST_HOLD").is_none() {
        return;
    }
    let scene = Scene::new("");
    let backend = scene.start().await;
    eprintln!("engine {}", backend.pid());
    std::thread::sleep(Duration::from_secs(120));
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "needs AITOOLS_TEST_LLAMA_SERVER and AITOOLS_TEST_WEIGHTS"]
fn killed_outright_we_leave_no_engine_behind() {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Command, Stdio};
    let scene = Scene::new("");
    let mut holder = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "holder", "--nocapture", "--ignored"])
        .env("AITOOLS_TEST_HOLD", "1")
        // What it leaves behind goes with our own folder.
        .env("TMPDIR", scene.folder.path())
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(holder.stderr.take().unwrap()).lines();
    let pid = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("engine ").map(str::to_owned)).unwrap();
    let alive = || {
        let stat = fs::read_bounded(&PathBuf::from(format!("/proc/{pid}/stat")), 4096).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        stat.contains("(llama-server)") && !stat.contains(") Z ")
    };
    assert!(alive());
    holder.kill().unwrap();
    holder.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while alive() {
        assert!(Instant::now() < deadline, "the engine {pid} lives");
        std::thread::sleep(Duration::from_millis(10));
    }
}

//! The llama.cpp adapter, its supervision and `ops::run` against an imitation `llama-server` (a Python 3 script) that has
//! every bad day there is. Unix only: the script is started by its first line.
#![cfg(unix)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "tests read the environment that cargo gives them")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;

use aitools::base::cancel::Cancel;
use aitools::base::digest::Digest;
use aitools::base::platform::Variant;
use aitools::base::{fs, process};
use aitools::engine::answer::Answer;
use aitools::engine::backend::{Backend, BackendError, Supervision};
use aitools::engine::conversation::{Conversation, Finish, Piece, Request};
use aitools::engine::finding::Finding;
use aitools::engine::gguf::Gguf;
use aitools::engine::llama_cpp::{LlamaCpp, LlamaModel};
use aitools::engine::{CheckRequest, Endpoint, EngineError, Launch, LaunchRequest, Model, Ready};
use aitools::format::gguf::{Header, Magic};
use aitools::format::policy::{Policy, parse};
use aitools::ops::run::{Ask, Ran, RunError, Sink, run};
use aitools::report::{Silent, Task};

const SERVER: &str = r#"#!/usr/bin/env python3
import json, os, signal, socket, sys, threading, time
mode = os.environ["MODE"]
key = os.environ["LLAMA_API_KEY"]
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
def say(text):
    sys.stderr.write(text); sys.stderr.flush()
if mode == "exits":
    say("loading\nerror: the model is no model"); sys.exit(3)
if mode == "silent":
    say("thinking\n"); time.sleep(60)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mode == "chatty":
    for number in range(200000): sys.stdout.write("line %d of very many lines that nobody is going to read, ever, at all\n" % number)
    sys.stdout.flush()
server = socket.socket()
try:
    server.bind(("127.0.0.1", int(arguments["--port"])))
except OSError as error:
    say("could not bind: %s\n" % error); sys.exit(1)
server.listen(16)
say("listening; ours: %s\n" % ("HOME" in os.environ))
def answer(connection, status, body):
    connection.sendall(("HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)).encode())
def chunk(connection, data):
    connection.sendall(b"%x\r\n" % len(data) + data + b"\r\n")
def event(connection, value):
    chunk(connection, b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")
def piece(text, tokens):
    return {"choices": [{"delta": {"content": text}, "finish_reason": None}], "timings": {"predicted_n": tokens, "prompt_n": 5}}
def stream(connection, body):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    if mode == "giant":
        for _ in range(64): chunk(connection, b"data: " + b"x" * (1 << 17))
    if mode == "garbage": chunk(connection, b"data: {\"choices\": oh no\n\n")
    event(connection, piece("Pa", 1))
    # A character of two bytes in two chunks.
    whole = b"data: " + json.dumps(piece("r\u00ef", 2), ensure_ascii=False).encode() + b"\n\n"
    cut = whole.index("\u00ef".encode()) + 1
    chunk(connection, whole[:cut]); chunk(connection, whole[cut:])
    if mode == "dies":
        say("out of memory\n"); os.kill(os.getpid(), signal.SIGKILL)
    if mode == "stalls": time.sleep(60)
    if mode == "pings":
        for _ in range(6000): chunk(connection, b":\n\n"); time.sleep(0.01)
    if mode == "cut": connection.close(); return
    if mode == "endless":
        while True: event(connection, piece("x" * 100000, 3))
    if mode == "refuses": event(connection, {"error": {"message": "the cache is full", "code": 500}})
    if mode == "unfinished": chunk(connection, b"data: [DONE]\n\n"); return
    event(connection, piece("s seed=%d" % body["seed"], 3))
    event(connection, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
    event(connection, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}, "timings": {"prompt_n": 5, "prompt_ms": 2.0, "predicted_n": 4, "predicted_ms": 3.0}})
    chunk(connection, b"data: [DONE]\n\n"); chunk(connection, b"")
# Streams what the request says, once every request of its test has arrived.
together = threading.Barrier(8) if mode == "echo" else None
def echo(connection, body):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    together.wait(20)
    text = body["messages"][-1]["content"]
    for word in text.split(" "): event(connection, piece(word, 1))
    event(connection, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
    event(connection, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}})
    chunk(connection, b"data: [DONE]\n\n"); chunk(connection, b"")
def serve(connection):
    asked = b""
    while b"\r\n\r\n" not in asked:
        more = connection.recv(65536)
        if not more: return
        asked += more
    head, body = asked.split(b"\r\n\r\n", 1)
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(headers.get("content-length", 0)): body += connection.recv(65536)
    if mode == "crashes":
        say("no room for the context\n"); os.kill(os.getpid(), signal.SIGKILL)
    if mode == "never": return answer(connection, "503 Service Unavailable", "{}")
    if mode == "open": return answer(connection, "200 OK", "{}")
    if headers.get("authorization") != "bearer " + key: return answer(connection, "401 Unauthorized", "{}")
    if mode == "long": return answer(connection, "400 Bad Request" if "chat" in lines[0] else "200 OK", json.dumps({"error": {"n_prompt_tokens": 900, "n_ctx": 256, "message": "m"}}))
    if mode == "echo" and "chat" in lines[0]: echo(connection, json.loads(body))
    elif "chat" in lines[0]: stream(connection, json.loads(body))
    else: answer(connection, "200 OK", "{}")
    connection.close()
while True:
    connection, _ = server.accept()
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
"#;

/// A folder with a name that breaks careless code, the imitation in it, and everything a run takes.
struct Scene {
    folder: tempfile::TempDir,
    ready: Ready,
    env: BTreeMap<OsString, OsString>,
    cancel: Cancel,
}

impl Scene {
    fn new(mode: &str, policy: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("aitools é ").tempdir().unwrap();
        let program = folder.path().join("artifact/bin/llama-server");
        fs::write_atomic(&program, SERVER.as_bytes()).unwrap();
        fs::set_executable(&program).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        let policy = format!("engine: llama-cpp\nmodel: m\n{policy}\n");
        let env = BTreeMap::from([("PATH".into(), path), ("MODE".into(), mode.into())]);
        let ready = Ready {
            engine: &LlamaCpp,
            model: Arc::new(model(&folder.path().join("model.gguf"))),
            name: "a-policy".parse().unwrap(),
            policy: parse("policy.yaml", policy.as_bytes()).unwrap().0.value,
            policy_sha256: Digest::of(b"policy"),
            variant: Variant::Cpu,
            artifact: folder.path().join("artifact"),
            fingerprint: Digest::of(b"artifact"),
            weights_sha256: Digest::of(b"weights"),
            cores: 2,
            network: false,
        };
        Self { folder, ready, env, cancel: Cancel::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn start(&self, limit: Duration) -> Result<Backend, BackendError> {
        let (scratch, log) = (self.path("scratch"), self.path("logs/engine.log"));
        fs::create_dir_all(&scratch).unwrap();
        let deadline = Instant::now() + limit;
        let supervision = Supervision { driver: None, env: &self.env, scratch: &scratch, log: &log, deadline };
        Backend::start(&self.ready, &supervision).await
    }

    fn request(&self, prompt: &str) -> Request {
        Request::new(&self.ready.policy, prompt, 7, Instant::now() + SOON)
    }

    fn run(&self, sink: &mut Sink<'_>) -> Result<Ran, RunError> {
        let ask = Ask {
            prompt: "the prompt",
            driver: None,
            env: &self.env,
            scratch: &self.path("scratch"),
            log: &self.path("logs/engine.log"),
            record: &self.path(".aitools/generations.jsonl"),
            keep_text: false,
            time: "2026-11-23T01:02:03Z",
        };
        run(&self.ready, &ask, &Task::new(Arc::new(Silent), self.cancel.clone()), sink)
    }

    fn records(&self) -> Vec<serde_json::Value> {
        let bytes = fs::read_bounded(&self.path(".aitools/generations.jsonl"), 1 << 20).unwrap();
        String::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// A model with a chat template. The imitation never looks at the file.
fn model(weights: &Path) -> LlamaModel {
    let template = ("tokenizer.chat_template".to_owned(), aitools::format::gguf::Value::Text("{{ x }}".to_owned()));
    let header = Header {
        magic: Magic::Gguf,
        version: 3,
        metadata: [template].into(),
        tensors: vec![],
        special_tokens: BTreeMap::new(),
        markers: BTreeMap::new(),
        data_offset: 0,
    };
    LlamaModel(Gguf { weights: weights.to_owned(), headers: vec![header], sizes: vec![0], beside: vec![] })
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_good_day() {
    let scene = Scene::new("good", "generation: {seed: 7}");
    let mut heard = String::new();
    let ran = scene
        .run(&mut |piece| {
            if let Piece::Text(text) = piece {
                heard.push_str(text);
            }
            true
        })
        .unwrap();
    assert_eq!((&*heard, &*ran.answer.text), ("Parïs seed=7", "Parïs seed=7"));
    assert_eq!((ran.answer.finish, ran.seed), (Finish::Stop, 7));
    assert_eq!((ran.metrics.prompt_tokens, ran.metrics.completion_tokens), (5, 4));
    assert_eq!(ran.metrics.engine_tokens_per_second, Some(1000.0));
    assert!(ran.metrics.load_ms > 0.0 && ran.metrics.total_ms >= ran.metrics.load_ms);
    assert_eq!(ran.metrics.peak_memory_bytes.is_some(), cfg!(target_os = "linux"));
    let record = &scene.records()[0];
    assert_eq!((&record["seed"], &record["finish"]), (&7.into(), &"stop".into()));
    assert!(!record.to_string().contains("the prompt") && !record.to_string().contains("Par"), "{record}");
    assert!(fs::read_dir(&scene.path("scratch")).unwrap().is_empty(), "scratch is left behind");
    // We have that variable; nobody gave it to the engine.
    assert!(std::env::var_os("HOME").is_some());
    let log = fs::read_bounded(&scene.path("logs/engine.log"), 1 << 20).unwrap();
    assert_eq!(log, b"listening; ours: False\n");
}

#[test]
fn the_record_of_runs_has_a_limit() {
    let scene = Scene::new("good", "");
    let record = scene.path(".aitools/generations.jsonl");
    fs::write_atomic(&record, &vec![b'\n'; 16 << 20]).unwrap();
    scene.run(&mut |_| true).unwrap();
    scene.run(&mut |_| true).unwrap();
    assert_eq!(scene.records().len(), 2);
    assert_eq!(fs::metadata(&scene.path(".aitools/generations.jsonl.old")).unwrap().len(), 16 << 20);
}

#[test]
fn a_seed_that_was_drawn_is_recorded() {
    let scene = Scene::new("good", "");
    let ran = scene.run(&mut |_| true).unwrap();
    assert_eq!(ran.answer.text, format!("Parïs seed={}", ran.seed));
    assert_eq!(scene.records()[0]["seed"], ran.seed);
}

#[test]
fn an_engine_that_exits_at_once_is_quoted() {
    let scene = Scene::new("exits", "");
    let error = scene.run(&mut |_| true).unwrap_err();
    assert_eq!(error.to_string(), "`llama-server` ended before it was ready (exit status: 3)");
    assert_eq!(error.tail(), ["loading", "error: the model is no model"]);
    assert_eq!(scene.records()[0]["error"], error.to_string());
}

#[tokio::test]
async fn an_engine_that_crashes_while_it_loads_is_not_taken_for_a_stranger() {
    let error = Scene::new("crashes", "").start(SOON).await.unwrap_err();
    assert_eq!(error.to_string(), "`llama-server` ended before it was ready (signal: 9 (SIGKILL))");
    assert_eq!(error.tail().last().unwrap(), "no room for the context");
}

#[tokio::test]
async fn an_engine_that_is_never_ready_is_ended() {
    for mode in ["never", "silent"] {
        let error = Scene::new(mode, "").start(Duration::from_secs(4)).await.unwrap_err();
        let BackendError::NotReady { tail, .. } = error else { panic!("{mode}: {error}") };
        assert_eq!(tail.len(), 1, "{mode}: {tail:?}");
    }
}

#[test]
fn a_run_that_is_never_ready_is_a_timeout() {
    let error = Scene::new("never", "runtime: {timeout: 1}").run(&mut |_| true).unwrap_err();
    assert!(matches!(error, RunError::Timeout { limit_s: 1, .. }), "{error}");
}

/// What the engine has written is the sign that it was started.
#[test]
fn a_start_is_interrupted() {
    let scene = Scene::new("silent", "");
    let (cancel, log) = (scene.cancel.clone(), scene.path("logs/engine.log"));
    let user = std::thread::spawn(move || {
        let deadline = Instant::now() + SOON;
        while fs::read_bounded(&log, 100).unwrap_or_default().is_empty() {
            assert!(Instant::now() < deadline, "the engine was not started");
            std::thread::yield_now();
        }
        cancel.cancel();
    });
    assert!(matches!(scene.run(&mut |_| true), Err(RunError::Cancelled(_))));
    user.join().unwrap();
    assert!(fs::read_dir(&scene.path("scratch")).unwrap().is_empty(), "scratch is left behind");
}

/// One engine, one backend, eight requests at a time: the imitation answers none before all have arrived. Another one is
/// dropped meanwhile, and the others go on.
#[tokio::test]
async fn several_requests_run_at_a_time_and_are_cancelled_one_by_one() {
    let scene = Scene::new("echo", "");
    let backend = Arc::new(scene.start(SOON).await.unwrap());
    let ask = |number: usize| {
        let (backend, request) = (Arc::clone(&backend), scene.request(&format!("answer number {number}")));
        async move {
            let (mut answer, mut events) = (Answer::new(), backend.generate(request));
            while let Some(event) = events.next().await {
                answer.push(&event.unwrap()).unwrap();
                if number == 3 {
                    answer.cancel();
                    break;
                }
            }
            answer.into_generated().unwrap()
        }
    };
    let answers = futures_util::future::join_all((0..8).map(ask)).await;
    for (number, answer) in answers.iter().enumerate() {
        let expected = if number == 3 {
            ("answer".to_owned(), Finish::Cancelled)
        } else {
            (format!("answernumber{number}"), Finish::Stop)
        };
        assert_eq!((&answer.text, answer.finish), (&expected.0, expected.1));
    }
    assert!(backend.ended().unwrap().is_none());
}

/// The way of a gateway: a body of the API goes to the engine as it is, and its bytes come back as they are.
#[tokio::test]
async fn bodies_of_the_openai_api_pass_through() {
    use http_body_util::Full;
    let scene = Scene::new("good", "");
    let backend = scene.start(SOON).await.unwrap();
    let client = backend.conversation().openai().unwrap().client();
    let body = r#"{"messages": [], "seed": 5, "an unknown field": [1]}"#;
    let mut request = hyper::Request::post("/v1/chat/completions").body(Full::new(body.into())).unwrap();
    client.authorize(&mut request).unwrap();
    let mut response = client.send(request, Instant::now() + SOON).await.unwrap();
    assert_eq!(response.status(), 200);
    let mut all = Vec::new();
    while let Some(bytes) = response.chunk().await.unwrap() {
        all.extend_from_slice(&bytes);
    }
    let text = String::from_utf8(all).unwrap();
    assert!(text.starts_with("data: {\"choices\": ") && text.contains("seed=5") && text.ends_with("data: [DONE]\n\n"));
}

#[test]
fn bad_streams_are_errors_and_what_came_before_is_kept() {
    let table = [
        ("dies", "Parï", "the connection ended in the middle of an answer (the program ended: signal: 9 (SIGKILL))"),
        ("cut", "Parï", "the connection ended in the middle of an answer"),
        ("garbage", "", "an event is not JSON"),
        ("giant", "", "an event is larger than"),
        ("refuses", "Parï", "the engine refused the request: the cache is full"),
        ("unfinished", "Parï", "the stream ended in the middle of the answer"),
        ("long", "", "the prompt has 900 tokens and the context holds 256"),
        ("endless", "", "the answer is larger than"),
    ];
    for (mode, kept, message) in table {
        let scene = Scene::new(mode, "");
        let mut heard = String::new();
        let error = scene
            .run(&mut |piece| {
                if let Piece::Text(text) = piece {
                    heard.push_str(text);
                }
                true
            })
            .unwrap_err();
        assert!(error.to_string().contains(message), "{mode}: {error}");
        assert!(heard.starts_with(kept), "{mode}: {heard:.100}");
        assert_eq!(scene.records()[0]["error"], error.to_string());
        if mode == "dies" {
            assert_eq!(error.tail().last().unwrap(), "out of memory");
        }
    }
}

#[test]
fn stalls_end_at_the_deadline_and_at_once_when_interrupted() {
    for mode in ["stalls", "pings"] {
        let scene = Scene::new(mode, "runtime: {timeout: 2}");
        let error = scene.run(&mut |_| true).unwrap_err();
        assert!(matches!(error, RunError::Timeout { limit_s: 2, .. }), "{mode}: {error}");
        let scene = Scene::new(mode, "");
        let cancel = scene.cancel.clone();
        let ran = scene
            .run(&mut |_| {
                cancel.cancel();
                true
            })
            .unwrap();
        assert_eq!(ran.answer.finish, Finish::Cancelled, "{mode}");
        assert!(ran.answer.text.starts_with("Pa") && ran.answer.completion_tokens >= 1, "{mode}: {ran:?}");
        assert!(ran.metrics.total_ms < 20_000.0);
        assert_eq!(scene.records()[0]["finish"], "cancelled");
    }
}

#[test]
fn a_sink_that_has_had_enough_ends_it() {
    let ran = Scene::new("endless", "").run(&mut |_| false).unwrap();
    assert_eq!((ran.answer.finish, &*ran.answer.text, ran.answer.completion_tokens), (Finish::Cancelled, "Pa", 1));
}

#[tokio::test]
async fn an_engine_that_will_not_end_is_made_to() {
    let scene = Scene::new("stubborn", "");
    let backend = scene.start(SOON).await.unwrap();
    let pid = backend.pid();
    let began = Instant::now();
    backend.stop(Duration::from_millis(200)).await;
    assert!(began.elapsed() < process::GRACE);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[tokio::test]
async fn much_output_neither_blocks_nor_fills_the_disk() {
    let scene = Scene::new("chatty", "");
    let backend = scene.start(Duration::from_secs(60)).await.unwrap();
    let tail = backend.tail();
    assert_eq!(tail.len(), 200);
    assert!(tail.iter().any(|line| line.starts_with("line 1999")), "{:?}", tail.last());
    for name in ["logs/engine.log", "logs/engine.log.old"] {
        let size = fs::metadata(&scene.path(name)).map_or(0, |meta| meta.len());
        assert!(size <= 16 << 20, "{name}: {size}");
    }
}

/// The real adapter, with another program on the first `left` ports that it gets.
#[derive(Debug)]
struct Beaten {
    model: LlamaModel,
    left: AtomicU32,
    answer: &'static str,
}

impl Model for Beaten {
    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
        self.model.check(ask)
    }
    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        let less = |left: u32| left.checked_sub(1);
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            let listener = TcpListener::bind(("127.0.0.1", ask.endpoint.port)).unwrap();
            let answer = self.answer;
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let _ = stream.read(&mut [0; 4096]);
                    let _ = write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n");
                }
            });
        }
        self.model.launch(ask)
    }
    fn connect(&self, policy: &Policy, endpoint: &Endpoint) -> Result<Arc<dyn Conversation>, EngineError> {
        self.model.connect(policy, endpoint)
    }
}

/// M4: a stranger that answers as an engine would, key and all, while the engine still loads. It must not even be asked.
#[cfg(target_os = "linux")]
#[test]
fn m4_a_stranger_that_answers_like_an_engine_gets_nothing() {
    #[derive(Debug)]
    struct Mimicked(LlamaModel, Arc<std::sync::Mutex<Vec<String>>>);
    impl Model for Mimicked {
        fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
            self.0.check(ask)
        }
        fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
            let listener = TcpListener::bind(("127.0.0.1", ask.endpoint.port)).unwrap();
            let (key, requests) = (ask.endpoint.key.clone(), Arc::clone(&self.1));
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let mut head = vec![0; 4096];
                    let count = stream.read(&mut head).unwrap_or(0);
                    let head = String::from_utf8_lossy(&head[..count]).into_owned();
                    let status = if head.contains(&key) { "200 OK" } else { "401 Unauthorized" };
                    requests.lock().unwrap().push(head);
                    let _ = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                }
            });
            self.0.launch(ask)
        }
        fn connect(&self, policy: &Policy, endpoint: &Endpoint) -> Result<Arc<dyn Conversation>, EngineError> {
            self.0.connect(policy, endpoint)
        }
    }
    let (mut scene, requests) = (Scene::new("silent", ""), Arc::default());
    scene.ready.model = Arc::new(Mimicked(model(&scene.path("model.gguf")), Arc::clone(&requests)));
    let error = scene.run(&mut |_| true).unwrap_err();
    assert!(matches!(error, RunError::Backend(BackendError::PortsTaken(3))), "{error}");
    assert_eq!(*requests.lock().unwrap(), Vec::<String>::new());
}

#[test]
fn a_stranger_on_the_port_is_not_taken_for_the_engine() {
    for answer in ["200 OK", "401 Unauthorized", "503 Busy", "404 Not Found", "nonsense"] {
        let mut scene = Scene::new("good", "");
        let beaten = |scene: &Scene, left: u32| {
            Arc::new(Beaten { model: model(&scene.path("model.gguf")), left: left.into(), answer })
        };
        scene.ready.model = beaten(&scene, 1);
        let ran = scene.run(&mut |_| true).unwrap_or_else(|error| panic!("{answer}: {error} {:?}", error.tail()));
        assert!(ran.answer.text.starts_with("Parïs"), "{answer}");
        scene.ready.model = beaten(&scene, 99);
        let error = scene.run(&mut |_| true).unwrap_err();
        assert!(matches!(error, RunError::Backend(BackendError::PortsTaken(3))), "{answer}: {error}");
    }
    // An engine that answers without asking for the key is none of ours either.
    let error = Scene::new("open", "").run(&mut |_| true).unwrap_err();
    assert!(matches!(error, RunError::Backend(BackendError::PortsTaken(3))), "{error}");
}

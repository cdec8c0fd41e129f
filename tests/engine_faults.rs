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

use aitools::base::cancel::Cancel;
use aitools::base::digest::Digest;
use aitools::base::platform::{Platform, Variant};
use aitools::base::{fs, process};
use aitools::build::BuildRecipe;
use aitools::engine::answer::Sink;
use aitools::engine::backend::{Backend, BackendError, Supervision};
use aitools::engine::http::Patience;
use aitools::engine::llama_cpp::LlamaCpp;
use aitools::engine::{
    CheckRequest, Endpoint, Engine, EngineError, Finding, Finish, GenerateRequest, Generated, Launch, LaunchRequest,
    Piece, Ready, RecipeRequest,
};
use aitools::format::gguf::{Header, Magic};
use aitools::format::policy::{Policy, parse};
use aitools::ops::run::{Ask, Ran, RunError, run};
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
    if "chat" in lines[0]: stream(connection, json.loads(body))
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
            name: "a-policy".parse().unwrap(),
            policy: parse("policy.yaml", policy.as_bytes()).unwrap().0.value,
            policy_sha256: Digest::of(b"policy"),
            variant: Variant::Cpu,
            artifact: folder.path().join("artifact"),
            fingerprint: Digest::of(b"artifact"),
            weights: folder.path().join("model.gguf"),
            weights_sha256: Digest::of(b"weights"),
            header: header(),
            cores: 2,
        };
        Self { folder, ready, env, cancel: Cancel::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&self, limit: Duration) -> Result<Backend, BackendError> {
        let (scratch, log) = (self.path("scratch"), self.path("logs/engine.log"));
        fs::create_dir_all(&scratch).unwrap();
        Backend::start(
            &self.ready,
            &Supervision {
                driver: None,
                env: &self.env,
                scratch: &scratch,
                log: &log,
                cancel: &self.cancel,
                deadline: Instant::now() + limit,
            },
        )
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

fn header() -> Header {
    let template = ("tokenizer.chat_template".to_owned(), aitools::format::gguf::Value::Text("{{ x }}".to_owned()));
    Header {
        magic: Magic::Gguf,
        version: 3,
        metadata: [template].into(),
        tensors: vec![],
        special_tokens: std::collections::BTreeMap::new(),
        data_offset: 0,
    }
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

#[test]
fn an_engine_that_crashes_while_it_loads_is_not_taken_for_a_stranger() {
    let error = Scene::new("crashes", "").start(SOON).unwrap_err();
    assert_eq!(error.to_string(), "`llama-server` ended before it was ready (signal: 9 (SIGKILL))");
    assert_eq!(error.tail().last().unwrap(), "no room for the context");
}

#[test]
fn an_engine_that_is_never_ready_is_ended() {
    for mode in ["never", "silent"] {
        let error = Scene::new(mode, "").start(Duration::from_secs(4)).unwrap_err();
        let BackendError::NotReady { tail, .. } = error else { panic!("{mode}: {error}") };
        assert_eq!(tail.len(), 1, "{mode}: {tail:?}");
    }
    let error = Scene::new("never", "runtime: {timeout: 1}").run(&mut |_| true).unwrap_err();
    assert!(matches!(error, RunError::Timeout { limit_s: 1, .. }), "{error}");
}

#[test]
fn a_start_is_interrupted() {
    let scene = Scene::new("silent", "");
    let cancel = scene.cancel.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        cancel.cancel();
    });
    assert!(matches!(scene.start(SOON), Err(BackendError::Cancelled(_))));
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

#[test]
fn an_engine_that_will_not_end_is_made_to() {
    let scene = Scene::new("stubborn", "");
    let backend = scene.start(SOON).unwrap();
    let pid = backend.pid();
    let began = Instant::now();
    backend.stop(Duration::from_millis(200));
    assert!(began.elapsed() < process::GRACE);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn much_output_neither_blocks_nor_fills_the_disk() {
    let scene = Scene::new("chatty", "");
    let backend = scene.start(Duration::from_secs(60)).unwrap();
    let tail = backend.tail();
    assert_eq!(tail.len(), 200);
    assert!(tail.iter().any(|line| line.starts_with("line 1999")), "{:?}", tail.last());
    for name in ["logs/engine.log", "logs/engine.log.old"] {
        let size = fs::metadata(&scene.path(name)).map_or(0, |meta| meta.len());
        assert!(size <= 16 << 20, "{name}: {size}");
    }
}

/// The real adapter, with another program on the ports that it is given: as many of them as it is told.
#[derive(Debug)]
struct Beaten {
    left: AtomicU32,
    answer: &'static str,
}

impl Engine for Beaten {
    fn id(&self) -> &'static str {
        LlamaCpp.id()
    }
    fn recipe(&self, ask: &RecipeRequest<'_>) -> Result<BuildRecipe, EngineError> {
        LlamaCpp.recipe(ask)
    }
    fn variants(&self, platform: Platform) -> &'static [Variant] {
        LlamaCpp.variants(platform)
    }
    fn check(&self, ask: &CheckRequest<'_>) -> Vec<Finding> {
        LlamaCpp.check(ask)
    }
    fn memory_bytes(&self, policy: &Policy, header: &Header, sizes: &[u64]) -> u64 {
        LlamaCpp.memory_bytes(policy, header, sizes)
    }
    fn launch(&self, ask: &LaunchRequest<'_>) -> Result<Launch, EngineError> {
        let less = |left: u32| left.checked_sub(1);
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            let listener = TcpListener::bind(("127.0.0.1", ask.port)).unwrap();
            let answer = self.answer;
            std::thread::spawn(move || {
                for mut stream in listener.incoming().flatten() {
                    let _ = stream.read(&mut [0; 4096]);
                    let _ = write!(stream, "HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n");
                }
            });
        }
        LlamaCpp.launch(ask)
    }
    fn ready(&self, endpoint: &Endpoint, patience: Patience<'_>) -> Result<bool, EngineError> {
        LlamaCpp.ready(endpoint, patience)
    }
    fn generate(
        &self,
        endpoint: &Endpoint,
        ask: &GenerateRequest<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<Generated, EngineError> {
        LlamaCpp.generate(endpoint, ask, sink)
    }
    fn version_args(&self) -> &'static [&'static str] {
        LlamaCpp.version_args()
    }
}

#[test]
fn a_stranger_on_the_port_is_not_taken_for_the_engine() {
    for answer in ["200 OK", "401 Unauthorized", "503 Busy", "404 Not Found", "nonsense"] {
        let mut scene = Scene::new("good", "");
        scene.ready.engine = Box::leak(Box::new(Beaten { left: 1.into(), answer }));
        let ran = scene.run(&mut |_| true).unwrap_or_else(|error| panic!("{answer}: {error} {:?}", error.tail()));
        assert!(ran.answer.text.starts_with("Parïs"), "{answer}");
        scene.ready.engine = Box::leak(Box::new(Beaten { left: 99.into(), answer }));
        assert!(matches!(scene.start(SOON), Err(BackendError::PortsTaken(3))), "{answer}");
    }
    // An engine that answers without asking for the key is none of ours either.
    assert!(matches!(Scene::new("open", "").start(SOON), Err(BackendError::PortsTaken(3))));
}

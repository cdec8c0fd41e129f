//! The gateway in this process, in front of imitations of `llama-server` (a Python 3 script): what a real one shows rarely. The
//! real one, official clients and load are `cargo ci e2e serve`. Unix only: the script is started by its first line.
#![cfg(unix)]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "tests read the environment that cargo gives them")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value as Json, json};

use aitools::base::cancel::Cancel;
use aitools::base::digest::Digest;
use aitools::base::fs;
use aitools::base::platform::Variant;
use aitools::engine::Ready;
use aitools::engine::gguf::Gguf;
use aitools::engine::llama_cpp::{LlamaCpp, LlamaModel};
use aitools::format::gguf::{Header, Magic, Value};
use aitools::format::policy::parse;
use aitools::gateway::access::Access;
use aitools::gateway::catalog::{Catalog, Model, Offer};
use aitools::gateway::scheduler::{Limits, Memory};
use aitools::gateway::{Gateway, Setup, Surroundings};

const SERVER: &str = r##"#!/usr/bin/env python3
import itertools, json, os, signal, socket, sys, threading, time
key, alias = os.environ["LLAMA_API_KEY"], os.environ["LLAMA_ARG_ALIAS"]
arguments = dict(zip(sys.argv[1:], sys.argv[2:]))
state = {"running": 0, "cancelled": 0, "seen": [], "connections": []}
if alias == "broken":
    sys.stderr.write("error: the model is no model\n"); sys.exit(3)
server = socket.socket()
server.bind(("127.0.0.1", int(arguments["--port"])))
server.listen(64)
def answer(connection, status, body, kind="application/json"):
    connection.sendall(("HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, kind, len(body.encode()), body)).encode())
def event(connection, value):
    data = b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n"
    connection.sendall(b"%x\r\n" % len(data) + data + b"\r\n")
def generate(connection, body):
    text = body["messages"][-1]["content"]
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    if text == "wrong": return answer(connection, "400 Bad Request", json.dumps({"error": {"code": 400, "message": "no", "type": "invalid_request_error"}}))
    if not body.get("stream"):
        message = {"role": "assistant", "content": text}
        return answer(connection, "200 OK", json.dumps({"model": alias, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}))
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    event(connection, {"choices": [{"delta": {"role": "assistant", "content": None}}]})
    for word in text.split(" "):
        event(connection, {"choices": [{"delta": {"content": word}}]})
        if word == "die": os.kill(os.getpid(), signal.SIGKILL)
        if word == "cut": return "close"
    while text == "forever":
        event(connection, {"choices": [{"delta": {"content": "x"}}]}); time.sleep(0.01)
    event(connection, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
    if body["stream_options"]["include_usage"]: event(connection, {"choices": [], "usage": usage})
    event(connection, "[DONE]")
    connection.sendall(b"0\r\n\r\n")
    # As llama-server: it has not said so before, and a client sees it a little later.
    time.sleep(0.05)
    return "close"
def serve(connection, number):
    asked = b""
    while b"\r\n\r\n" not in asked:
        more = connection.recv(65536)
        if not more: return
        asked += more
    head, body = asked.split(b"\r\n\r\n", 1)
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    while len(body) < int(headers.get("content-length", 0)): body += connection.recv(65536)
    if headers.get("authorization") != "bearer " + key: return answer(connection, "401 Unauthorized", "{}")
    path = lines[0].split(" ")[1]
    if path == "/v1/chat/completions":
        state["running"] += 1
        state["seen"].append([json.loads(body), headers])
        state["connections"].append(number)
        try:
            if generate(connection, json.loads(body)) == "close": return
        except OSError:
            state["cancelled"] += 1
            return
        finally: state["running"] -= 1
    elif path == "/metrics": answer(connection, "200 OK", "# TYPE llamacpp:n_total counter\nllamacpp:n_total 3\n", "text/plain")
    elif path == "/props": answer(connection, "200 OK", json.dumps(state))
    else: answer(connection, "200 OK", json.dumps({"path": path}))
    return headers.get("connection") != "close"
def run(connection, number):
    try:
        while serve(connection, number): pass
    finally: connection.close()
for number in itertools.count():
    connection, _ = server.accept()
    threading.Thread(target=run, args=(connection, number), daemon=True).start()
"##;

/// Policies as they are now; a test changes them.
#[derive(Debug)]
struct Shelf {
    artifact: std::path::PathBuf,
    policies: Mutex<BTreeMap<String, String>>,
    changed: Mutex<bool>,
}

impl Shelf {
    fn ready_of(&self, name: &str) -> Option<Ready> {
        let text = self.policies.lock().unwrap().get(name)?.clone();
        let text = format!("engine: llama-cpp\nmodel: m\n{text}\n");
        let template = ("tokenizer.chat_template".to_owned(), Value::Text("{{ x }}".to_owned()));
        let header = Header {
            magic: Magic::Gguf,
            version: 3,
            metadata: [template].into(),
            tensors: vec![],
            special_tokens: BTreeMap::new(),
            markers: BTreeMap::new(),
            data_offset: 0,
        };
        let weights = self.artifact.join("model.gguf");
        Some(Ready {
            engine: &LlamaCpp,
            model: Arc::new(LlamaModel(Gguf { weights, headers: vec![header], sizes: vec![0], beside: vec![] })),
            name: name.parse().unwrap(),
            policy: parse("policy.yaml", text.as_bytes()).unwrap().0.value,
            policy_sha256: Digest::of(text.as_bytes()),
            variant: Variant::Cpu,
            artifact: self.artifact.clone(),
            fingerprint: Digest::of(b"artifact"),
            weights_sha256: Digest::of(b"weights"),
            cores: 1,
            network: false,
        })
    }
}

impl Catalog for Shelf {
    fn offers(&self) -> Result<Option<Vec<Offer>>, String> {
        if !std::mem::take(&mut *self.changed.lock().unwrap()) {
            return Ok(None);
        }
        let names: Vec<String> = self.policies.lock().unwrap().keys().cloned().collect();
        let offer = |name: String| {
            let ready = self.ready_of(&name).unwrap();
            let model = Model {
                variant: "cpu",
                fingerprint: ready.fingerprint,
                weights_sha256: ready.weights_sha256,
                size_bytes: 1,
                context: Some((2048, 8192)),
                need: Memory { ram_bytes: 1 << 30, gpu_bytes: 0 },
            };
            Offer {
                name,
                aliases: ready.policy.serve.aliases.clone(),
                policy_sha256: ready.policy_sha256,
                policy: ready.policy,
                failed: 0,
                changed: SystemTime::UNIX_EPOCH,
                model: Ok(model),
            }
        };
        Ok(Some(names.into_iter().map(offer).collect()))
    }

    fn ready(&self, policy: &str) -> Result<Ready, String> {
        self.ready_of(policy).ok_or_else(|| "it is gone".to_owned())
    }
}

/// A gateway with these policies and a runtime of its own.
struct Scene {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    shelf: Arc<Shelf>,
    gateway: Option<Gateway>,
    address: SocketAddr,
}

const KEY: &str = "0123456789abcdef";
const SOON: Duration = Duration::from_secs(30);

impl Scene {
    fn new(policies: &[(&str, &str)]) -> Self {
        Self::with(policies, &[], |_| ())
    }

    fn with(policies: &[(&str, &str)], keys: &[&str], change: impl Fn(&mut Limits)) -> Self {
        let folder = tempfile::Builder::new().prefix("aitools é ").tempdir().unwrap();
        let artifact = folder.path().join("artifact");
        let program = artifact.join("bin/llama-server");
        fs::write_atomic(&program, SERVER.as_bytes()).unwrap();
        fs::set_executable(&program).unwrap();
        let policies = policies.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        let shelf = Arc::new(Shelf { artifact, policies: Mutex::new(policies), changed: Mutex::new(true) });
        let mut limits = Limits {
            queue: 300,
            longest_wait: Duration::from_secs(5),
            patience: Duration::from_secs(5),
            budget: None,
            loaded: None,
            groups: Vec::new(),
            failures: 3,
        };
        change(&mut limits);
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        let path = std::env::var_os("PATH").unwrap();
        let setup = Setup {
            catalog: Arc::clone(&shelf) as Arc<dyn Catalog>,
            surroundings: Surroundings {
                driver: None,
                env: BTreeMap::from([("PATH".into(), path)]),
                scratch: folder.path().join("scratch"),
                logs: folder.path().join("logs"),
            },
            limits,
            access: Access::new(&keys, "control", &[], &[]).unwrap(),
            stop: Cancel::default(),
            tls: None,
            log: folder.path().join("requests.jsonl"),
            learned: folder.path().join("memory.json"),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let gateway = runtime.block_on(Gateway::start(setup, listener, None)).unwrap();
        Self { folder, runtime, shelf, address: gateway.address(), gateway: Some(gateway) }
    }

    /// Sends bytes and gives the connection.
    fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let length = body.len();
        self.send(
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}")
                .as_bytes(),
        )
    }

    /// Status, head and body of a whole response.
    fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
        read(self.request(method, path, headers, body))
    }

    fn get(&self, path: &str) -> Json {
        let (status, _, body) = self.ask("GET", path, "", "");
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    fn post(&self, path: &str, body: &Json) -> (u16, Json) {
        let (status, _, body) = self.ask("POST", path, "", &body.to_string());
        (status, serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}")))
    }

    fn chat(&self, model: &str, text: &str) -> (u16, Json) {
        self.post("/v1/chat/completions", &chat(model, text, false))
    }

    /// A stream whose first event with text has come.
    fn stream(&self, model: &str, text: &str) -> BufReader<TcpStream> {
        let body = chat(model, text, true).to_string();
        let mut reader = BufReader::new(self.request("POST", "/v1/chat/completions", "", &body));
        let mut line = String::new();
        while !line.contains("\"content\": \"") {
            line.clear();
            assert!(reader.read_line(&mut line).unwrap() > 0, "the stream ended");
        }
        reader
    }

    fn policy(&self, name: &str) -> Json {
        let status = self.get("/aitools/status");
        status["policies"].as_array().unwrap().iter().find(|policy| policy["name"] == name).unwrap().clone()
    }

    /// Waits until it holds.
    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !holds(self) {
            assert!(Instant::now() < deadline, "not in time: {what}: {}", self.get("/aitools/status"));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the engine of a policy has seen.
    fn engine(&self, policy: &str) -> Json {
        self.get(&format!("/props?model={policy}"))
    }

    fn end(mut self) -> String {
        let gateway = self.gateway.take().unwrap();
        self.runtime.block_on(gateway.end(Duration::from_secs(5)));
        // The last request's connection holds the log, too.
        self.runtime.shutdown_timeout(Duration::from_secs(5));
        String::from_utf8(fs::read_bounded(&self.folder.path().join("requests.jsonl"), 1 << 20).unwrap()).unwrap()
    }
}

fn chat(model: &str, text: &str, stream: bool) -> Json {
    json!({ "model": model, "stream": stream, "messages": [{ "role": "user", "content": text }] })
}

fn read(mut stream: TcpStream) -> (u16, String, String) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

fn is_alive(pid: u64) -> bool {
    let stat = fs::read_bounded(Path::new(&format!("/proc/{pid}/stat")), 4096);
    stat.is_ok_and(|stat| !String::from_utf8_lossy(&stat).contains(") Z "))
}

#[test]
fn engines_start_on_demand_and_the_policy_is_in_the_request() {
    let text = "generation: { temperature: 0.25, seed: 9, system_prompt: S }\nserve: { aliases: [other] }";
    let scene = Scene::new(&[("p", text)]);
    assert_eq!(scene.policy("p")["state"], "unloaded");
    let (status, answer) = scene.chat("other", "hello");
    assert_eq!((status, &answer["choices"][0]["message"]["content"]), (200, &json!("hello")), "{answer}");
    let seen = &scene.engine("p")["seen"][0];
    let (body, headers) = (&seen[0], &seen[1]);
    assert_eq!((&body["model"], &body["temperature"], &body["seed"]), (&json!("p"), &json!(0.25), &json!(9)));
    assert_eq!(body["messages"][0], json!({ "role": "system", "content": "S" }));
    assert!(headers.get("cookie").is_none() && headers["host"].as_str().unwrap().starts_with("127.0.0.1:"));
    let pid = scene.policy("p")["pid"].as_u64().unwrap();
    let log = scene.end();
    assert!(!is_alive(pid), "an engine outlives the gateway");
    let line: Json = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!((&line["policy"], &line["seed"], &line["finish"]), (&json!("p"), &json!(9), &json!("stop")));
    assert_eq!(line["metrics"]["completion_tokens"], 3);
    assert!(!log.contains("hello"), "prompts and answers are in no log");
}

#[test]
fn what_clients_send_beats_the_policy_unless_it_says_otherwise() {
    let closed = "generation: { temperature: 0.25 }\nserve: { override: [max_tokens] }";
    let scene = Scene::new(&[("closed", closed), ("open", "")]);
    let with = |model: &str, key: &str, value: Json| {
        let mut body = chat(model, "x", false);
        body[key] = value;
        scene.post("/v1/chat/completions", &body)
    };
    assert_eq!(with("open", "temperature", json!(1.5)).0, 200);
    assert_eq!(scene.engine("open")["seen"][0][0]["temperature"], 1.5);
    assert_eq!(with("closed", "max_tokens", json!(4)).0, 200);
    for key in ["temperature", "mirostat", "logit_bias"] {
        let (status, answer) = with("closed", key, json!(1));
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(key)), "{answer}");
    }
}

/// Some clients offer tools to every model, whether or not its template has a place for them.
#[test]
fn tools_are_refused_or_dropped_as_the_policy_says() {
    let scene = Scene::new(&[("open", ""), ("quiet", "serve: { tools: ignore }")]);
    let with_tools = |model: &str| {
        let mut body = chat(model, "x", false);
        body["tools"] = json!([{ "type": "function", "function": { "name": "f" } }]);
        body["tool_choice"] = json!("auto");
        scene.post("/v1/chat/completions", &body)
    };
    let (status, answer) = with_tools("open");
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("tools")), "{answer}");
    assert_eq!(with_tools("quiet").0, 200);
    let seen = &scene.engine("quiet")["seen"][0][0];
    assert!(seen.get("tools").is_none() && seen.get("tool_choice").is_none(), "{seen}");
}

#[test]
fn streams_come_as_they_are_and_usage_on_request() {
    let scene = Scene::new(&[("p", "")]);
    let streamed = |options: &Json| {
        let mut body = chat("p", "a b", true);
        body["stream_options"] = options.clone();
        let (status, head, body) = scene.ask("POST", "/v1/chat/completions", "", &body.to_string());
        assert_eq!(status, 200);
        assert!(head.contains("text/event-stream") && head.contains("x-request-id"), "{head}");
        body
    };
    let with = streamed(&json!({ "include_usage": true }));
    assert!(with.contains("\"usage\"") && with.contains("data: [DONE]"), "{with}");
    let without = streamed(&Json::Null);
    assert!(!without.contains("\"usage\"") && without.contains("data: [DONE]"), "{without}");
    let log = scene.end();
    assert!(log.lines().all(|line| line.contains("\"completion_tokens\":3")), "{log}");
}

#[test]
fn a_client_that_leaves_ends_the_work_for_it() {
    let scene = Scene::new(&[("p", "")]);
    let streaming = scene.stream("p", "forever");
    // One slot: these wait.
    let waiting: Vec<TcpStream> =
        (0..5).map(|_| scene.request("POST", "/v1/chat/completions", "", &chat("p", "x", false).to_string())).collect();
    scene.until("five wait", |scene| scene.policy("p")["waiting"] == 5);
    drop(waiting);
    scene.until("nobody waits", |scene| scene.policy("p")["waiting"] == 0);
    drop(streaming);
    scene.until("nothing runs", |scene| scene.policy("p")["running"] == 0);
    scene.until("the engine has stopped", |scene| scene.engine("p")["cancelled"] == 1);
    assert_eq!(scene.engine("p")["seen"].as_array().unwrap().len(), 1, "those that left never reached it");
    let metrics = scene.ask("GET", "/metrics", "", "").2;
    assert!(metrics.contains("aitools_client_cancelled_total{policy=\"p\",phase=\"queue\"} 5"), "{metrics}");
    assert!(metrics.contains("aitools_client_cancelled_total{policy=\"p\",phase=\"decode\"} 1"), "{metrics}");
    assert!(metrics.contains("llamacpp:n_total{policy=\"p\"} 3"), "{metrics}");
}

/// A connection to an engine serves one request after the other until a stream, and ends with a client that leaves.
#[test]
fn connections_to_engines_are_kept() {
    let scene = Scene::new(&[("p", "")]);
    let ask =
        |stream| assert_eq!(scene.ask("POST", "/v1/chat/completions", "", &chat("p", "x", stream).to_string()).0, 200);
    for stream in [false, false, true, true, false] {
        ask(stream);
    }
    let used = scene.engine("p")["connections"].as_array().unwrap().clone();
    assert_eq!(used.len(), 5);
    assert!(used[0] == used[1] && used[1] == used[2] && used[2] != used[3] && used[3] != used[4], "{used:?}");
    drop(scene.stream("p", "forever"));
    scene.until("the engine has stopped", |scene| scene.engine("p")["cancelled"] == 1);
    ask(true);
    // An engine that starts again is another one.
    let pid = scene.policy("p")["pid"].as_u64().unwrap();
    assert_eq!(scene.ask("POST", "/models/unload", "", &json!({ "model": "p" }).to_string()).0, 200);
    scene.until("it has ended", |scene| scene.policy("p")["state"] == "unloaded");
    ask(false);
    assert_ne!(scene.policy("p")["pid"].as_u64().unwrap(), pid);
}

#[test]
fn an_engine_that_dies_is_told_and_started_again() {
    let scene = Scene::new(&[("p", "")]);
    let mut rest = String::new();
    scene.stream("p", "one die").read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"upstream_disconnected\"") && !rest.contains("[DONE]"), "{rest}");
    scene.until("it is known to have failed", |scene| scene.policy("p")["state"] == "failed");
    let (status, head, body) = scene.ask("POST", "/v1/chat/completions", "", &chat("p", "x", false).to_string());
    assert_eq!(status, 503, "{body}");
    assert!(head.contains("retry-after: 1") && body.contains("SIGKILL"), "{head} {body}");
    scene.until("it works again", |scene| scene.chat("p", "x").0 == 200);
    let mut rest = String::new();
    scene.stream("p", "one cut").read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"upstream_disconnected\""), "{rest}");
    assert_eq!(scene.chat("p", "x").0, 200, "the engine goes on");
}

#[test]
fn an_engine_that_cannot_start_says_why() {
    let scene = Scene::new(&[("broken", "")]);
    let (status, answer) = scene.chat("broken", "x");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(status == 503 && message.contains("the model is no model"), "{answer}");
    assert_eq!(scene.policy("broken")["state"], "failed");
}

#[test]
fn one_engine_at_a_time_and_idle_ones_end() {
    let scene = Scene::with(&[("a", "serve: { idle_timeout: 1 }"), ("b", "")], &[], |limits| limits.loaded = Some(1));
    assert_eq!(scene.chat("a", "x").0, 200);
    let first = scene.policy("a")["pid"].as_u64().unwrap();
    assert_eq!(scene.chat("b", "x").0, 200);
    assert!(!is_alive(first), "a was there when b started");
    assert_eq!(
        (scene.policy("a")["state"].clone(), scene.policy("b")["state"].clone()),
        (json!("unloaded"), json!("loaded"))
    );
    assert_eq!(scene.chat("a", "x").0, 200);
    scene.until("a was idle for a second", |scene| scene.policy("a")["state"] == "unloaded");
}

#[test]
fn policies_are_changed_while_it_runs() {
    let scene = Scene::new(&[("a", ""), ("b", "")]);
    assert_eq!((scene.chat("a", "x").0, scene.chat("b", "x").0), (200, 200));
    let kept = scene.policy("b")["pid"].clone();
    scene.shelf.policies.lock().unwrap().insert("a".to_owned(), "generation: { temperature: 0.5 }".to_owned());
    scene.shelf.policies.lock().unwrap().insert("c".to_owned(), String::new());
    *scene.shelf.changed.lock().unwrap() = true;
    scene.until("c is there", |scene| scene.get("/v1/models")["data"].as_array().unwrap().len() == 3);
    assert_eq!(scene.chat("a", "x").0, 200);
    assert_eq!(scene.engine("a")["seen"][0][0]["temperature"], 0.5, "a new engine, with the new policy");
    assert_eq!(scene.policy("b")["pid"], kept, "b was not touched");
}

#[test]
fn load_and_unload_as_open_webui_does() {
    let scene = Scene::new(&[("p", "")]);
    let events = BufReader::new(scene.request("GET", "/models/sse", "", ""));
    let mut lines = events.lines().map(Result::unwrap);
    assert!(lines.any(|line| line == ": connected"));
    // A look at the policies that finds them as they were is no event.
    *scene.shelf.changed.lock().unwrap() = true;
    scene.until("the policies were looked at", |scene| !*scene.shelf.changed.lock().unwrap());
    assert_eq!(scene.post("/models/load", &json!({ "model": "p" })), (200, json!({ "success": true })));
    let mut next = || lines.find(|line| line.starts_with("data: ")).unwrap();
    assert!(next().contains("\"loading\""));
    assert!(next().contains("\"loaded\""));
    assert_eq!(scene.get("/models")["data"][0]["status"]["value"], "loaded");
    assert_eq!(scene.post("/models/unload", &json!({ "model": "p" })).0, 200);
    assert!(next().contains("\"unloaded\""));
    assert_eq!(scene.post("/models/unload", &json!({ "model": "p" })).0, 400, "it is not loaded");
    assert_eq!(scene.post("/models/load", &json!({ "model": "q" })).0, 404);
}

#[test]
fn errors_are_those_of_the_api_on_every_path() {
    let scene = Scene::new(&[("p", ""), ("q", "")]);
    let body = |text: &str| text.to_owned();
    let cases = [
        ("GET", "/nothing", body(""), 404, "unknown_url"),
        ("POST", "/v1/models", body(""), 405, "method_not_allowed"),
        ("GET", "/v1/chat/completions", body(""), 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", body("{"), 400, ""),
        ("POST", "/v1/chat/completions", body("[]"), 400, ""),
        ("POST", "/v1/chat/completions", body("{\"messages\":[]}"), 400, ""),
        ("POST", "/v1/chat/completions", chat("z", "x", false).to_string(), 404, "model_not_found"),
        ("POST", "/v1/chat/completions", chat("p", "wrong", false).to_string(), 400, ""),
        ("GET", "/v1/models/z", body(""), 404, "model_not_found"),
        ("POST", "/models/load", body("{}"), 400, ""),
    ];
    for (method, path, body, status, code) in cases {
        let (actual, head, answer) = scene.ask(method, path, "", &body);
        assert_eq!(actual, status, "{method} {path}: {answer}");
        assert!(head.contains("application/json"), "{head}");
        let answer: Json = serde_json::from_str(&answer).unwrap();
        let error = answer["error"].as_object().unwrap();
        assert!(["message", "type", "param", "code"].iter().all(|key| error.contains_key(*key)), "{answer}");
        assert_eq!(answer["error"]["code"].as_str().unwrap_or_default(), code, "{answer}");
    }
    let large = format!("Content-Type: application/json\r\nX-Large: {}\r\n", "x".repeat(300_000));
    let (status, _, _) = scene.ask("GET", "/v1/models", &large, "");
    assert_eq!(status, 431);
}

#[test]
fn strangers_are_kept_out() {
    let scene = Scene::with(&[("p", "")], &[KEY], |_| ());
    let status = |path: &str, headers: &str| scene.ask("GET", path, headers, "").0;
    assert_eq!(status("/v1/models", ""), 401);
    assert_eq!(status("/v1/models", "Authorization: Bearer wrong\r\n"), 401);
    assert_eq!(status("/v1/models", &format!("Authorization: Bearer {KEY}\r\n")), 200);
    assert_eq!(status("/v1/models", &format!("x-api-key: {KEY}\r\n")), 200);
    assert_eq!(status("/health", ""), 200, "health tells nothing");
    assert_eq!(status("/health", "Origin: https://evil.example\r\n"), 403);
    let rebound = scene.send(b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n");
    assert_eq!(read(rebound).0, 403);
    let shutdown = scene.ask("POST", "/aitools/shutdown", &format!("x-api-key: {KEY}\r\n"), "{}");
    assert_eq!(shutdown.0, 401, "a client's key ends nothing");
}

/// The page itself tells nothing; what it shows needs the key.
#[test]
fn the_page_needs_no_key_and_its_data_does() {
    let scene = Scene::with(&[("p", "")], &[KEY], |_| ());
    let (status, head, body) = scene.ask("GET", "/", "", "");
    assert!(status == 200 && body.starts_with("<!doctype html>"), "{head}");
    assert!(head.contains("content-security-policy: default-src 'none';") && !head.contains("unsafe"), "{head}");
    assert!(head.contains("x-content-type-options: nosniff"), "{head}");
    assert!(!body.contains(KEY));
    assert_eq!(scene.ask("GET", "/aitools/status", "", "").0, 401);
    assert_eq!(scene.ask("POST", "/models/load", "", "{\"model\":\"p\"}").0, 401);
    assert_eq!(scene.ask("POST", "/", "", "").0, 405);
    let rebound = scene.send(b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n");
    assert_eq!(read(rebound).0, 403);
}

#[test]
fn tokens_are_counted_while_an_answer_runs_and_errors_are_kept() {
    let scene = Scene::new(&[("broken", ""), ("p", "")]);
    assert_eq!(scene.policy("p")["completion_tokens"], 0);
    assert_eq!(scene.chat("p", "x").0, 200);
    assert_eq!(scene.policy("p")["completion_tokens"], 3, "as the engine says");
    let stream = scene.stream("p", "forever");
    scene.until("tokens are counted", |scene| scene.policy("p")["completion_tokens"].as_u64() > Some(10));
    drop(stream);
    assert_eq!(scene.get("/aitools/status")["errors"], json!([]));
    assert_eq!(scene.chat("p", "wrong").0, 400);
    assert_eq!(scene.chat("broken", "x").0, 503);
    // Newest first: the request, and the engine that did not start. What the client got wrong is not among them.
    scene.until("both are kept", |scene| scene.get("/aitools/status")["errors"].as_array().unwrap().len() == 2);
    for error in scene.get("/aitools/status")["errors"].as_array().unwrap() {
        assert_eq!((&error["policy"], &error["count"]), (&json!("broken"), &json!(1)), "{error}");
        assert!(error["error"].as_str().unwrap().contains("the model is no model"), "{error}");
    }
}

/// Half of the clients leave at random; everybody else is answered, and the counters come back to zero.
#[test]
fn a_crowd_of_which_half_leaves() {
    let scene = Scene::new(&[("a", "runtime: { parallel: 4 }"), ("b", "runtime: { parallel: 4 }")]);
    std::thread::scope(|threads| {
        for number in 0..100_u64 {
            let scene = &scene;
            threads.spawn(move || {
                let model = if number.is_multiple_of(3) { "b" } else { "a" };
                let body = chat(model, &"word ".repeat(20), true).to_string();
                let mut stream = scene.request("POST", "/v1/chat/completions", "", &body);
                if number.is_multiple_of(2) {
                    std::thread::sleep(Duration::from_millis(number * 7 % 50));
                    return;
                }
                let mut text = String::new();
                stream.read_to_string(&mut text).unwrap();
                assert!(text.contains("data: [DONE]"), "{text}");
            });
        }
    });
    for policy in ["a", "b"] {
        scene.until("all is quiet", |scene| {
            let policy = scene.policy(policy);
            policy["running"] == 0 && policy["waiting"] == 0
        });
    }
    assert_eq!(scene.chat("a", "x").0, 200);
}

/// Whatever is sent, the gateway goes on.
#[test]
fn malformed_requests() {
    let scene = Scene::new(&[("p", "")]);
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let good = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{}",
        chat("p", "x", true)
    );
    for _ in 0..500 {
        let mut bytes = good.clone().into_bytes();
        for _ in 0..=random() % 4 {
            let at = usize::try_from(random()).unwrap() % bytes.len();
            bytes[at] = u8::try_from(random() % 256).unwrap();
        }
        bytes.truncate(usize::try_from(random()).unwrap() % bytes.len() + 1);
        drop(scene.send(&bytes));
    }
    scene.until("all is quiet", |scene| scene.policy("p")["running"] == 0 && scene.policy("p")["waiting"] == 0);
    assert_eq!(scene.chat("p", "x").0, 200);
}

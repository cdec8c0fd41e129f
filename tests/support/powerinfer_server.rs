//! An imitation of PowerInfer's server for tests, on a free loopback port: it answers like it, with one fault of it at a time.
//! Written after `examples/server/server.cpp`; texts and tokens are one to a byte.
#![allow(
    dead_code,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "shared by tests that use parts of it"
)]

use std::io::{Read as _, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value as Json, json};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// No slot is free the first times: 200, and a stream without an event.
    Busy(u32),
    /// The same as llama.cpp's server of that month says it.
    BusyLine(u32),
    /// The stream ends without its last event.
    Unfinished,
    /// The process dies in the middle of an event.
    Dies,
    /// The loop has ended: everything but an answer still works.
    Wedged,
    /// The prompt was cut in the middle without a word.
    Truncated,
    /// Its last event does not say why.
    NoReason,
    /// Something else listens there.
    Foreign,
    /// Something else listens there, too, and takes those who ask for an answer.
    Beside,
    /// The first answers of a started engine fail.
    Mute,
    NotJson,
    NotFound,
    /// Characters are made of as many tokens as they have bytes, each sent at once.
    Bytes,
}

#[derive(Clone)]
pub struct Script {
    /// What it is called: the model's name.
    pub alias: String,
    /// The pieces of the answer, one token each but for [`Fault::Bytes`]. An empty one at the end is the token that ends it.
    pub pieces: Vec<&'static str>,
    pub fault: Fault,
}

pub struct Server {
    pub port: u16,
    /// The bodies it was sent, with their paths.
    pub seen: Arc<Mutex<Vec<(String, Json)>>>,
    /// How many streams were cut by the client.
    pub cut: Arc<Mutex<u32>>,
}

impl Server {
    pub fn start(script: Script) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Self { port, seen: Arc::default(), cut: Arc::default() };
        let (seen, cut) = (Arc::clone(&server.seen), Arc::clone(&server.cut));
        let refused = Arc::new(Mutex::new(0));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                let client =
                    Client { script: script.clone(), seen: seen.clone(), cut: cut.clone(), refused: refused.clone() };
                std::thread::spawn(move || client.answer(stream));
            }
        });
        server
    }

    /// The bodies that were sent to a path.
    pub fn sent(&self, path: &str) -> Vec<Json> {
        self.seen.lock().unwrap().iter().filter(|(to, _)| to == path).map(|(_, body)| body.clone()).collect()
    }
}

struct Client {
    script: Script,
    seen: Arc<Mutex<Vec<(String, Json)>>>,
    cut: Arc<Mutex<u32>>,
    refused: Arc<Mutex<u32>>,
}

fn request(stream: &mut TcpStream) -> Option<(String, Json)> {
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let head = head.to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                let path = head.split(' ').nth(1)?.to_owned();
                return Some((path, serde_json::from_str(body).unwrap_or(Json::Null)));
            }
        }
        match stream.read(&mut part).ok()? {
            0 => return None,
            count => bytes.extend_from_slice(&part[..count]),
        }
    }
}

fn whole(stream: &mut TcpStream, status: &str, body: &str) {
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    let _ = stream.write_all(format!("{head}{body}").as_bytes());
}

fn chunk(stream: &mut TcpStream, text: &str) -> bool {
    stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).is_ok()
}

impl Client {
    fn answer(&self, mut stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let Some((path, body)) = request(&mut stream) else { return };
        self.seen.lock().unwrap().push((path.clone(), body.clone()));
        if self.script.fault == Fault::Foreign {
            return whole(&mut stream, "200 OK", "<html>");
        }
        match path.as_str() {
            "/model.json" => {
                let settings = json!({ "model": self.script.alias, "n_ctx": 512 });
                whole(&mut stream, "200 OK", &settings.to_string());
            }
            "/tokenize" => {
                let text = body["content"].as_str().unwrap();
                let tokens: Vec<u32> = text.bytes().map(|byte| u32::from(byte) + 3).collect();
                whole(&mut stream, "200 OK", &json!({ "tokens": tokens }).to_string());
            }
            "/completion" => self.complete(&mut stream, &body),
            _ => whole(&mut stream, "404 Not Found", "File Not Found"),
        }
    }

    fn is_busy(&self) -> bool {
        let (Fault::Busy(times) | Fault::BusyLine(times)) = self.script.fault else { return false };
        let mut refused = self.refused.lock().unwrap();
        *refused += 1;
        *refused <= times
    }

    fn complete(&self, stream: &mut TcpStream, body: &Json) {
        check(body);
        match self.script.fault {
            Fault::NotFound => return whole(stream, "404 Not Found", "File Not Found"),
            Fault::Wedged => {
                // Until the client has had enough.
                let _ = stream.read(&mut [0; 1]);
                return;
            }
            _ => {}
        }
        let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\
                    Content-Type: text/event-stream\r\n\r\n";
        let _ = stream.write_all(head.as_bytes());
        if self.is_busy() || self.script.fault == Fault::Mute {
            if matches!(self.script.fault, Fault::BusyLine(_)) {
                chunk(stream, "error: {\"content\":\"slot unavailable\"}\n\n");
            }
            let _ = stream.write_all(b"0\r\n\r\n");
            return;
        }
        // The fourth token is the first at which it looks, and two tokens too many look endless to it.
        let limit = match usize::try_from(body["n_predict"].as_u64().unwrap()).unwrap() {
            2 => 5,
            asked => (asked + 1).max(4),
        };
        let mut made = 0;
        for piece in &self.script.pieces {
            made += self.tokens(piece);
            if made > limit {
                // The character is not whole.
                made = limit;
                break;
            }
            let event = json!({ "content": piece, "multimodal": false, "slot_id": 0, "stop": false });
            if !chunk(stream, &format!("data: {event}\n\n")) || gone(stream) {
                *self.cut.lock().unwrap() += 1;
                return;
            }
            if made == limit {
                break;
            }
        }
        self.end(stream, body, (made, limit));
    }

    fn tokens(&self, piece: &str) -> usize {
        if self.script.fault == Fault::Bytes { piece.len().max(1) } else { 1 }
    }

    fn end(&self, stream: &mut TcpStream, body: &Json, (made, limit): (usize, usize)) {
        let ended = made < limit && self.script.fault != Fault::NoReason;
        let limited = !ended && self.script.fault != Fault::NoReason;
        let model = if self.script.fault == Fault::Beside { "another" } else { &self.script.alias };
        let last = json!({
            "content": "", "stop": true, "model": model, "slot_id": 0,
            "stopped_eos": ended, "stopped_limit": limited, "stopped_word": false, "stopping_word": "",
            // One less than were made.
            "tokens_predicted": made - 1, "truncated": self.script.fault == Fault::Truncated,
            "timings": {
                "prompt_n": body["prompt"].as_array().map_or(1, Vec::len), "prompt_ms": 30.0,
                "predicted_n": made - 1, "predicted_ms": 10.0 * (made as f64 - 2.0), "predicted_per_second": null,
            },
        });
        match self.script.fault {
            Fault::Unfinished => {}
            Fault::NotJson => {
                chunk(stream, "data: {\"content\n\n");
            }
            Fault::Dies => {
                let _ = stream.write_all(b"40\r\ndata: {\"cont");
                return;
            }
            _ => {
                chunk(stream, &format!("data: {last}\n\n"));
            }
        }
        let _ = stream.write_all(b"0\r\n\r\n");
    }
}

/// Whether the client has closed its end.
fn gone(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let closed = matches!(stream.peek(&mut [0; 1]), Ok(0)) || stream.take_error().is_ok_and(|error| error.is_some());
    stream.set_nonblocking(false).unwrap();
    closed
}

/// The real one ends the process (`std::terminate`) at a field of the wrong type, a grammar that does not parse, and so on.
fn check(body: &Json) {
    let whole = ["n_predict", "top_k", "repeat_last_n", "mirostat", "n_keep", "n_probs", "slot_id"];
    let real = ["temperature", "top_p", "min_p", "tfs_z", "typical_p", "repeat_penalty", "presence_penalty"];
    let fine = whole.iter().all(|key| body.get(*key).is_none_or(Json::is_i64))
        && real.iter().all(|key| body.get(*key).is_none_or(Json::is_number))
        && ["stream", "cache_prompt", "penalize_nl", "ignore_eos"]
            .iter()
            .all(|key| body.get(*key).is_none_or(Json::is_boolean))
        && body["stop"].as_array().is_some_and(|stops| stops.iter().all(Json::is_string))
        && body.get("grammar").is_none_or(|grammar| grammar == "");
    assert!(fine, "this request ends the real server: {body}");
}

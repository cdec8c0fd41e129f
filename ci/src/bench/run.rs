//! One answer: our `run`, and somebody who drives `llama-server` by hand as well as one can with the same options.
//!
//! The hand's options are ours, read from the process table while our own run goes on (Linux).

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use wait4::Wait4 as _;
use xshell::Shell;

use super::ground::Ground;
use super::measure::{Contender, Sample, Series, interleave};
use super::{Bench, Run};
use crate::quickstart;
use crate::step::Result;

pub const BENCH: Bench = Bench {
    name: "run",
    about: "one short answer, engine started and stopped",
    rounds: 7,
    warm_up: true,
    run: Run::Processes(run),
};

const PATIENCE: Duration = Duration::from_secs(120);
/// As the policy has it: the same tokens must be made by both.
const SYSTEM_PROMPT: &str = "You are a helpful assistant.";
const MAX_TOKENS: u32 = 128;

fn run(ground: &Ground<'_>, bench: &Bench, rounds: usize) -> Result<Vec<Series>> {
    let project = ground.quickstart()?;
    let ours = || {
        let mut command = ground.ours(&project, None);
        command.args(["-m", "quickstart", "run", quickstart::POLICY, "--prompt", quickstart::PROMPT]);
        command
    };
    if !ground.ours(&project, None).args(["-m", "quickstart", "sync"]).status()?.success() {
        return Err("the first sync failed".into());
    }
    let server = observe(ground, ours())?;
    let by_hand = Contender {
        name: "llama-server by hand".to_owned(),
        prepare: Box::new(|| Ok(())),
        run: Box::new(move || drive(&server)),
    };
    interleave(&mut [Contender::command("aitools run", ours), by_hand], bench.warm_up, rounds)
}

/// A server's command line and folder, as they were seen.
#[derive(Debug)]
struct Seen {
    words: Vec<String>,
    folder: std::path::PathBuf,
}

/// Runs our command once and notes how it starts the engine.
fn observe(ground: &Ground<'_>, mut command: Command) -> Result<Seen> {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let (begun, mut seen) = (Instant::now(), None);
    while child.try_wait()?.is_none() {
        if begun.elapsed() > PATIENCE {
            child.kill()?;
        }
        seen = seen.or_else(|| server_of(ground.sh, child.id()));
        std::thread::sleep(Duration::from_millis(5));
    }
    let words = seen.ok_or("no `llama-server` was seen while `aitools run` ran (this benchmark reads /proc)")?;
    Ok(Seen { words, folder: ground.folder("by-hand")? })
}

/// The command line of the `llama-server` that a process has started.
fn server_of(sh: &Shell, parent: u32) -> Option<Vec<String>> {
    let processes = sh.read_dir("/proc").ok()?;
    let children = processes.iter().filter(|process| {
        // proc(5): the fields after the name in parentheses are the state and the parent.
        let stat = sh.read_file(process.join("stat")).unwrap_or_default();
        let fields = stat.rsplit(") ").next().unwrap_or_default();
        fields.split(' ').nth(1) == Some(&parent.to_string())
    });
    let lines = children.filter_map(|process| sh.read_file(process.join("cmdline")).ok());
    let mut words = lines.map(|line| line.trim_end_matches('\0').split('\0').map(str::to_owned).collect::<Vec<_>>());
    words.find(|words| words[0].ends_with("/llama-server"))
}

/// Starts the server on a free port, asks as soon as it is ready, and ends it after the answer.
fn drive(seen: &Seen) -> Result<Sample> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let mut words = seen.words.clone();
    let at = words.iter().position(|word| word == "--port").ok_or("no `--port` among the options")?;
    *words.get_mut(at + 1).ok_or("no port after `--port`")? = port.to_string();
    let begun = Instant::now();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).current_dir(&seen.folder).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let asked = ask(port, begun);
    child.kill()?;
    let used = child.wait4()?.rusage;
    Ok(Sample {
        wall_s: begun.elapsed().as_secs_f64(),
        cpu_s: (used.utime + used.stime).as_secs_f64(),
        peak_rss_bytes: used.maxrss,
        first_output_s: Some(asked?),
        ..Sample::default()
    })
}

/// Waits for the server, sends one chat request, reads the whole answer. Seconds from `begun` to its first text.
fn ask(port: u16, begun: Instant) -> Result<f64> {
    while status(port, "GET /health", "").is_none_or(|(status, _)| status != 200) {
        if begun.elapsed() > PATIENCE {
            return Err("the server was not ready in time".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let body = serde_json::json!({
        "messages": [
            { "role": "system", "content": SYSTEM_PROMPT },
            { "role": "user", "content": quickstart::PROMPT },
        ],
        "stream": true, "max_tokens": MAX_TOKENS, "temperature": 0, "seed": 1,
    });
    let (status, reader) = status(port, "POST /v1/chat/completions", &body.to_string()).ok_or("no answer")?;
    let (mut first, mut text) = (None, String::new());
    for line in reader.lines() {
        let line = line?;
        let Some(event) =
            line.strip_prefix("data: ").and_then(|data| serde_json::from_str::<serde_json::Value>(data).ok())
        else {
            continue;
        };
        if let Some(piece) = event["choices"][0]["delta"]["content"].as_str().filter(|piece| !piece.is_empty()) {
            first.get_or_insert_with(|| begun.elapsed().as_secs_f64());
            text.push_str(piece);
        }
    }
    first.ok_or_else(|| format!("the server answered {status} without text").into())
}

/// Sends a request; the status and what follows the head. None while nobody listens.
fn status(port: u16, request: &str, body: &str) -> Option<(u16, BufReader<std::io::Take<TcpStream>>)> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let length = body.len();
    let head = "Host: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json";
    write!(stream, "{request} HTTP/1.1\r\n{head}\r\nContent-Length: {length}\r\n\r\n{body}").ok()?;
    let mut reader = BufReader::new(stream.take(1 << 24));
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let status = line.split(' ').nth(1)?.parse().ok()?;
    while !line.trim().is_empty() {
        line.clear();
        reader.read_line(&mut line).ok()?;
    }
    Some((status, reader))
}

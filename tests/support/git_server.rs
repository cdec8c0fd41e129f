//! A git server over HTTP on loopback: `git http-backend` as CGI behind a few lines of HTTP, which a test may make
//! misbehave. And the program `git` in a sealed environment, to make repositories with.
#![allow(dead_code, clippy::expect_used, reason = "shared by tests that use parts of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// A request as it came.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn is_discovery(&self) -> bool {
        self.path.contains("/info/refs")
    }
}

/// What the server does with a request.
pub enum Reply {
    Serve,
    /// As `Serve`, but the connection ends so many bytes too early.
    Cut(usize),
    /// As `Cut`, but the connection stays nothing more comes, and this is called.
    Stall(usize, Box<dyn FnOnce() + Send>),
    Say(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Nothing comes, until the client goes away.
    Silence,
}

pub fn html(status: u16) -> Reply {
    Reply::Say(status, vec![("Content-Type", "text/html".into())], b"<html>log in</html>".to_vec())
}

pub fn redirect(to: &str) -> Reply {
    Reply::Say(301, vec![("Location", to.to_owned())], Vec::new())
}

type Rule = dyn Fn(&Request) -> Reply + Send + Sync;

pub struct Server {
    pub url: String,
    pub seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Serves the repositories below `root`.
    pub fn start(root: &Path, rule: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (root, rule, log): (PathBuf, Arc<Rule>, _) = (root.to_owned(), Arc::new(rule), Arc::clone(&seen));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (root, rule, log) = (root.clone(), Arc::clone(&rule), Arc::clone(&log));
                std::thread::spawn(move || answer(stream, &root, &*rule, &log));
            }
        });
        Self { url, seen }
    }

    pub fn plain(root: &Path) -> Self {
        Self::start(root, |_| Reply::Serve)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, root: &Path, rule: &Rule, log: &Mutex<Vec<Request>>) -> Option<()> {
    let request = read_request(&mut BufReader::new(stream.try_clone().ok()?))?;
    log.lock().unwrap().push(request.clone());
    let mut stalled = None;
    let ((status, headers, body), cut) = match rule(&request) {
        Reply::Serve => (backend(root, &request), 0),
        Reply::Cut(bytes) => (backend(root, &request), bytes),
        Reply::Stall(bytes, then) => {
            stalled = Some(then);
            (backend(root, &request), bytes)
        }
        Reply::Say(status, headers, body) => {
            let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            ((status, headers, body), 0)
        }
        Reply::Silence => {
            let _ = stream.read(&mut [0]);
            return None;
        }
    };
    write!(stream, "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {}\r\n", body.len()).ok()?;
    for (name, value) in headers {
        write!(stream, "{name}: {value}\r\n").ok()?;
    }
    stream.write_all(b"\r\n").ok()?;
    stream.write_all(&body[..body.len() - cut]).ok()?;
    if let Some(then) = stalled {
        then();
        let _ = stream.read(&mut [0]);
    }
    Some(())
}

type Answer = (u16, Vec<(String, String)>, Vec<u8>);

pub fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let mut request = Request { method: words.next()?.into(), path: words.next()?.into(), ..Request::default() };
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        request.headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = request.header("content-length").parse().unwrap_or(0);
    request.body = vec![0; length];
    reader.read_exact(&mut request.body).ok()?;
    Some(request)
}

fn backend(root: &Path, request: &Request) -> Answer {
    let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let mut command = sealed(Command::new("git"));
    command.arg("http-backend").env("GIT_PROJECT_ROOT", root).env("GIT_HTTP_EXPORT_ALL", "1");
    command.env("PATH_INFO", decoded(path)).env("QUERY_STRING", query).env("REQUEST_METHOD", &request.method);
    command.env("CONTENT_TYPE", request.header("content-type")).env("REMOTE_ADDR", "127.0.0.1");
    command.env("CONTENT_LENGTH", request.body.len().to_string()).env("GIT_PROTOCOL", request.header("git-protocol"));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&request.body).unwrap();
    let output = child.wait_with_output().unwrap().stdout;
    let end = output.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(output.len());
    let (mut status, mut headers) = (200, Vec::new());
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        match line.split_once(": ") {
            Some(("Status", text)) => status = text[..3].parse().unwrap(),
            Some((name, value)) => headers.push((name.to_owned(), value.to_owned())),
            None => {}
        }
    }
    (status, headers, output[(end + 4).min(output.len())..].to_vec())
}

fn decoded(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            bytes.push(u8::from_str_radix(std::str::from_utf8(&tail[..2]).unwrap(), 16).unwrap());
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// Knows nothing of the machine's own git configuration, and always makes the same commits.
fn sealed(mut command: Command) -> Command {
    command.env_clear().env("PATH", env!("PATH")).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "n").env(format!("GIT_{who}_EMAIL"), "e");
        command.env(format!("GIT_{who}_DATE"), "2026-01-01T00:00:00Z");
    }
    command
}

/// Runs `git` in a folder, with an input, and gives what it says.
pub fn git_with(folder: &Path, args: &[&str], input: &[u8]) -> String {
    let mut command = sealed(Command::new("git"));
    command.current_dir(folder).args(["-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always"]).args(args);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("git is installed");
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

pub fn git(folder: &Path, args: &[&str]) -> String {
    git_with(folder, args, b"")
}

/// A proxy for plain HTTP; gives its address and what it was asked for.
pub fn proxy() -> (String, Arc<Mutex<Vec<Request>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let log = Arc::clone(&log);
            std::thread::spawn(move || -> Option<()> {
                let request = read_request(&mut BufReader::new(stream.try_clone().ok()?))?;
                log.lock().unwrap().push(request.clone());
                let (host, path) = request.path.strip_prefix("http://")?.split_once('/')?;
                let mut there = TcpStream::connect(host).ok()?;
                write!(there, "{} /{path} HTTP/1.1\r\n", request.method).ok()?;
                for (name, value) in &request.headers {
                    write!(there, "{name}: {value}\r\n").ok()?;
                }
                write!(there, "\r\n").ok()?;
                there.write_all(&request.body).ok()?;
                std::io::copy(&mut there, &mut stream).ok()?;
                Some(())
            });
        }
    });
    (url, seen)
}

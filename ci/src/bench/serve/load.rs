//! A client that measures: one thread and one connection a client, kept open, and nothing between it and the socket. It must not be
//! what is slow.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::step::Result;

const PATIENCE: Duration = Duration::from_secs(120);

/// A server, and how it wants to be asked.
#[derive(Debug, Clone)]
pub struct Target {
    pub name: &'static str,
    pub address: SocketAddr,
    /// Lines of the head of each request, each with its end.
    pub headers: String,
}

impl Target {
    pub fn new(name: &'static str, address: SocketAddr) -> Self {
        Self { name, address, headers: String::new() }
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        let _ = write!(self.headers, "{name}: {value}\r\n");
        self
    }

    /// The bytes of a request; of a GET when there is no body.
    pub fn request(&self, path: &str, body: Option<&str>) -> Vec<u8> {
        let method = if body.is_some() { "POST" } else { "GET" };
        let (length, body) = (body.map_or(0, str::len), body.unwrap_or_default());
        let own = format!("host: {}\r\ncontent-type: application/json\r\ncontent-length: {length}", self.address);
        format!("{method} {path} HTTP/1.1\r\n{own}\r\n{}\r\n{body}", self.headers).into_bytes()
    }

    /// Asks over a connection of its own. Gives the body of the answer.
    pub fn once(&self, path: &str, body: Option<&str>) -> Result<String> {
        let mut client = Client::new(self)?;
        client.ask(&self.request(path, body))?;
        Ok(String::from_utf8_lossy(&client.bytes[client.body..]).into_owned())
    }
}

/// One client of a server.
#[derive(Debug)]
pub struct Client {
    name: &'static str,
    address: SocketAddr,
    stream: TcpStream,
    /// The last answer: its head, and its body as it came.
    bytes: Vec<u8>,
    body: usize,
}

impl Client {
    pub fn new(target: &Target) -> Result<Self> {
        let (name, address) = (target.name, target.address);
        Ok(Self { name, address, stream: connect(address)?, bytes: Vec::new(), body: 0 })
    }

    /// Sends a request and reads the whole answer. How long that took.
    pub fn ask(&mut self, request: &[u8]) -> Result<Duration> {
        self.exchange(request, |_| ())
    }

    /// Reads a stream of chunks that hold when they were made. How long each was under way.
    pub fn lags(&mut self, request: &[u8]) -> Result<Vec<Duration>> {
        let (mut text, mut lags) = (String::new(), Vec::new());
        self.exchange(request, |bytes| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            text.push_str(&String::from_utf8_lossy(bytes));
            while let Some((made, after)) = next_time(&text) {
                lags.push(now.saturating_sub(made));
                text.drain(..after);
            }
        })?;
        Ok(lags)
    }

    fn exchange(&mut self, request: &[u8], mut hear: impl FnMut(&[u8])) -> Result<Duration> {
        let begun = Instant::now();
        self.stream.write_all(request)?;
        self.bytes.clear();
        let (mut piece, mut answer) = ([0; 1 << 16], None);
        loop {
            let count = self.stream.read(&mut piece)?;
            if count == 0 {
                return Err(format!("{}: the connection ended in the middle of an answer", self.name).into());
            }
            self.bytes.extend_from_slice(&piece[..count]);
            hear(&piece[..count]);
            let answer = match &mut answer {
                Some(answer) => answer,
                None => match Answer::begin(&self.bytes)? {
                    Some(begun) => answer.insert(begun),
                    None => continue,
                },
            };
            if answer.is_whole(&self.bytes) {
                let (took, close) = (begun.elapsed(), answer.close);
                self.body = answer.body;
                if !answer.is_good {
                    return Err(format!("{}: {}", self.name, String::from_utf8_lossy(&self.bytes)).into());
                }
                if close {
                    self.stream = connect(self.address)?;
                }
                return Ok(took);
            }
        }
    }
}

fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The first time in a text, and where it ends: 19 digits, nanoseconds since 1970.
fn next_time(text: &str) -> Option<(Duration, usize)> {
    const MARK: &str = "\"content\":\"";
    let start = text.find(MARK)? + MARK.len();
    let end = start + text.get(start..)?.find('"')?;
    Some((Duration::from_nanos(text[start..end].parse().unwrap_or_default()), end))
}

/// How far an answer is read.
struct Answer {
    body: usize,
    is_good: bool,
    close: bool,
    /// Of the body; None when it comes in chunks.
    length: Option<usize>,
    /// Where the next chunk begins.
    chunk: usize,
    ended: bool,
}

impl Answer {
    fn begin(bytes: &[u8]) -> Result<Option<Self>> {
        let Some(end) = find(bytes, b"\r\n\r\n") else { return Ok(None) };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let value = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let length = value("content-length:").map(str::parse).transpose()?;
        if length.is_none() && value("transfer-encoding:") != Some("chunked") {
            return Err(format!("an answer without an end: {head}").into());
        }
        let (is_good, close) = (head.starts_with("http/1.1 200"), value("connection:") == Some("close"));
        Ok(Some(Self { body: end + 4, is_good, close, length, chunk: end + 4, ended: false }))
    }

    fn is_whole(&mut self, bytes: &[u8]) -> bool {
        if let Some(length) = self.length {
            return bytes.len() >= self.body + length;
        }
        while !self.ended
            && let Some(line) = bytes.get(self.chunk..).and_then(|rest| find(rest, b"\r\n"))
        {
            let size = std::str::from_utf8(&bytes[self.chunk..self.chunk + line]).unwrap_or_default();
            let size = usize::from_str_radix(size, 16).unwrap_or_default();
            if self.chunk + line + size + 4 > bytes.len() {
                return false;
            }
            self.chunk += line + size + 4;
            self.ended = size == 0;
        }
        self.ended
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// As many clients as given ask without a pause for that long. How long each request took.
pub fn flood(target: &Target, request: &[u8], clients: usize, time: Duration) -> Result<Vec<Duration>> {
    let end = Instant::now() + time;
    let one = || -> std::result::Result<Vec<Duration>, String> {
        let mut client = Client::new(target).map_err(|error| error.to_string())?;
        let mut took = Vec::new();
        while Instant::now() < end {
            took.push(client.ask(request).map_err(|error| error.to_string())?);
        }
        Ok(took)
    };
    let all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a client died".to_owned()))).collect()
    });
    let all: std::result::Result<Vec<Vec<Duration>>, String> = all;
    Ok(all?.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_where_they_end() {
        let whole = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc";
        for cut in 0..whole.len() {
            let answer = Answer::begin(&whole[..cut]).unwrap();
            assert!(answer.is_none_or(|mut answer| !answer.is_whole(&whole[..cut])), "{cut}");
        }
        let mut answer = Answer::begin(whole).unwrap().unwrap();
        assert!(answer.is_whole(whole) && answer.is_good && answer.close);
        let chunks = b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n";
        let mut answer = None;
        for cut in 0..=chunks.len() {
            if answer.is_none() {
                answer = Answer::begin(&chunks[..cut]).unwrap();
            }
            let is_whole = answer.as_mut().is_some_and(|answer| answer.is_whole(&chunks[..cut]));
            assert_eq!(is_whole, cut == chunks.len(), "{cut}");
        }
        assert!(!answer.unwrap().is_good);
        assert!(Answer::begin(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }

    #[test]
    fn times_are_found_in_chunks() {
        let text = "x\"content\":\"1764036000123456789\"},\"content\":\"17640";
        assert_eq!(next_time(text), Some((Duration::from_nanos(1_764_036_000_123_456_789), 31)));
        assert_eq!(next_time(&text[31..]), None);
    }
}

//! A small HTTP/1.1 client for engines on this machine (RFC 9112): one request a connection, plain text, 127.0.0.1 only.
//!
//! Why not the client that fetches from the network: reading here looks at the deadline and the cancel flag every few
//! milliseconds, also while an engine is silent, and letting go of a [`Response`] closes the connection at once, which
//! is how engines are told to stop. Absent on purpose: proxies, redirects, pools, TLS, compression.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::base::cancel::{Cancel, Cancelled};

/// How long a wait may go on before it looks at the deadline and the cancel flag.
const POLL: Duration = Duration::from_millis(10);
const CONNECT: Duration = Duration::from_secs(2);
/// Status line and headers together.
const HEAD_LIMIT_BYTES: usize = 64 * 1024;

/// How long to wait, and for whom.
#[derive(Debug, Clone, Copy)]
pub struct Patience<'a> {
    pub cancel: &'a Cancel,
    pub deadline: Instant,
}

impl Patience<'_> {
    /// The same, but no longer than `wait` from now.
    #[must_use]
    pub fn at_most(self, wait: Duration) -> Self {
        Self { deadline: self.deadline.min(Instant::now() + wait), ..self }
    }

    fn check(&self) -> Result<(), HttpError> {
        self.cancel.check()?;
        if Instant::now() >= self.deadline { Err(HttpError::Timeout) } else { Ok(()) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error("no answer in time")]
    Timeout,
    #[error("could not connect to port {port}: {source}")]
    Connect { port: u16, source: io::Error },
    #[error("lost the connection: {0}")]
    Io(#[from] io::Error),
    #[error("the connection ended in the middle of an answer")]
    Cut,
    #[error("not an HTTP answer: {0}")]
    Malformed(&'static str),
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// With its leading `/`.
    pub path: &'a str,
    /// Sent as `Authorization: Bearer`.
    pub key: Option<&'a str>,
    /// JSON, sent with POST; without one it is a GET.
    pub json: Option<&'a str>,
}

/// An answer whose body is still to be read. Dropping it closes the connection.
#[derive(Debug)]
pub struct Response<'a> {
    pub status: u16,
    wire: Wire<'a>,
    left: Left,
}

/// What is still to come of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Bytes(u64),
    /// Bytes of the present chunk; more chunks follow.
    Chunk(u64),
    UntilClosed,
    Nothing,
}

/// Sends one request and reads the head of the answer.
///
/// # Errors
/// [`HttpError`]; nothing is tried twice.
pub fn send<'a>(port: u16, request: Request<'_>, patience: Patience<'a>) -> Result<Response<'a>, HttpError> {
    patience.check()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let wait = CONNECT.min(patience.deadline.saturating_duration_since(Instant::now())).max(POLL);
    let stream = TcpStream::connect_timeout(&address, wait).map_err(|source| HttpError::Connect { port, source })?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(POLL))?;
    stream.set_write_timeout(Some(POLL))?;
    let mut wire = Wire { stream, patience, buffer: Vec::new(), at: 0 };
    wire.write(text_of(port, request).as_bytes())?;
    let (status, left) = wire.head()?;
    Ok(Response { status, wire, left })
}

fn text_of(port: u16, request: Request<'_>) -> String {
    let Request { path, key, json } = request;
    let method = if json.is_some() { "POST" } else { "GET" };
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let body = json.unwrap_or_default();
    let kind = if json.is_some() { "Content-Type: application/json\r\n" } else { "" };
    format!(
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n{key}{kind}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

impl Response<'_> {
    /// The next bytes of the body; 0 at its end.
    ///
    /// # Errors
    /// [`HttpError::Cut`] when the connection ends before the body does.
    pub fn read(&mut self, into: &mut [u8]) -> Result<usize, HttpError> {
        if self.left == Left::Chunk(0) {
            self.left = self.wire.next_chunk()?;
        }
        let limit = match self.left {
            Left::Nothing | Left::Bytes(0) => return Ok(0),
            Left::Bytes(count) | Left::Chunk(count) => count,
            Left::UntilClosed => u64::MAX,
        };
        let room = into.len().min(usize::try_from(limit).unwrap_or(usize::MAX));
        let count = self.wire.read(&mut into[..room])?;
        let used = count as u64;
        self.left = match self.left {
            Left::UntilClosed if count == 0 => Left::Nothing,
            _ if count == 0 => return Err(HttpError::Cut),
            Left::Bytes(left) => Left::Bytes(left - used),
            Left::Chunk(left) if left == used => {
                self.wire.line(HEAD_LIMIT_BYTES)?;
                Left::Chunk(0)
            }
            Left::Chunk(left) => Left::Chunk(left - used),
            other => other,
        };
        Ok(count)
    }

    /// The whole body, as text.
    ///
    /// # Errors
    /// [`HttpError::TooLarge`] beyond `limit_bytes`.
    pub fn text(mut self, limit_bytes: usize) -> Result<String, HttpError> {
        let (mut all, mut part) = (Vec::new(), [0; 8192]);
        loop {
            match self.read(&mut part)? {
                0 => return Ok(String::from_utf8_lossy(&all).into_owned()),
                count => all.extend_from_slice(&part[..count]),
            }
            if all.len() > limit_bytes {
                return Err(HttpError::TooLarge(limit_bytes));
            }
        }
    }
}

/// The connection, and what came over it that nobody has read.
#[derive(Debug)]
struct Wire<'a> {
    stream: TcpStream,
    patience: Patience<'a>,
    buffer: Vec<u8>,
    at: usize,
}

fn only_slow(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

impl Wire<'_> {
    fn write(&mut self, mut bytes: &[u8]) -> Result<(), HttpError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(0) => return Err(HttpError::Cut),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if only_slow(&error) => self.patience.check()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Looks at the patience first: bytes that never pause must not outrun it.
    fn receive(&mut self, into: &mut [u8]) -> Result<usize, HttpError> {
        loop {
            self.patience.check()?;
            match self.stream.read(into) {
                Ok(count) => return Ok(count),
                Err(error) if only_slow(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize, HttpError> {
        let kept = &self.buffer[self.at..];
        if kept.is_empty() {
            return self.receive(into);
        }
        let count = kept.len().min(into.len());
        into[..count].copy_from_slice(&kept[..count]);
        self.at += count;
        Ok(count)
    }

    /// One line, without its end.
    fn line(&mut self, limit_bytes: usize) -> Result<String, HttpError> {
        let mut looked = self.at;
        loop {
            if let Some(end) = self.buffer[looked..].iter().position(|byte| *byte == b'\n') {
                let line = &self.buffer[self.at..looked + end];
                let line = line.strip_suffix(b"\r").unwrap_or(line);
                let line = String::from_utf8_lossy(line).into_owned();
                self.at = looked + end + 1;
                return Ok(line);
            }
            if self.buffer.len() - self.at > limit_bytes {
                return Err(HttpError::TooLarge(limit_bytes));
            }
            self.buffer.drain(..self.at);
            self.at = 0;
            looked = self.buffer.len();
            let mut part = [0; 8192];
            match self.receive(&mut part)? {
                0 => return Err(HttpError::Cut),
                count => self.buffer.extend_from_slice(&part[..count]),
            }
        }
    }

    fn head(&mut self) -> Result<(u16, Left), HttpError> {
        let first = self.line(HEAD_LIMIT_BYTES)?;
        let status = first.strip_prefix("HTTP/1.").and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
        let status = status.ok_or(HttpError::Malformed("the status line"))?;
        let (mut left, mut size) = (Left::UntilClosed, 0);
        loop {
            let line = self.line(HEAD_LIMIT_BYTES)?;
            if line.is_empty() {
                return Ok((status, left));
            }
            size += line.len();
            if size > HEAD_LIMIT_BYTES {
                return Err(HttpError::TooLarge(HEAD_LIMIT_BYTES));
            }
            let (name, value) = line.split_once(':').ok_or(HttpError::Malformed("a header"))?;
            let value = value.trim();
            if name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
                left = Left::Chunk(0);
            } else if name.eq_ignore_ascii_case("content-length") && left == Left::UntilClosed {
                left = Left::Bytes(value.parse().map_err(|_| HttpError::Malformed("the content length"))?);
            }
        }
    }

    fn next_chunk(&mut self) -> Result<Left, HttpError> {
        let line = self.line(HEAD_LIMIT_BYTES)?;
        let digits = line.split(';').next().unwrap_or_default().trim();
        match u64::from_str_radix(digits, 16) {
            Ok(0) => Ok(Left::Nothing),
            Ok(count) => Ok(Left::Chunk(count)),
            Err(_) => Err(HttpError::Malformed("a chunk's size")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Answers one connection with these parts, each sent on its own, and closes.
    fn answering(parts: &'static [&'static [u8]]) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            let mut asked = Vec::new();
            let mut part = [0; 1024];
            while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                let count = stream.read(&mut part).unwrap();
                asked.extend_from_slice(&part[..count]);
            }
            for part in parts {
                let _ = stream.write_all(part);
            }
        });
        port
    }

    fn get(port: u16) -> Result<(u16, String), HttpError> {
        let cancel = Cancel::default();
        let patience = Patience { cancel: &cancel, deadline: Instant::now() + Duration::from_secs(5) };
        let response = send(port, Request { path: "/x", key: Some("k"), json: None }, patience)?;
        Ok((response.status, response.text(1000)?))
    }

    #[test]
    fn every_framing() {
        let whole: [(&'static [&'static [u8]], &str); 4] = [
            (&[b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef"], "abc"),
            (&[b"HTTP/1.1 200 OK\r\n\r\nab", b"c"], "abc"),
            (
                &[
                    b"HTTP/1.1 200 OK\r\nTransfer-",
                    b"Encoding: chunked\r\n\r\n1\r\na\r\n",
                    b"2;x=y\r\nb",
                    b"c\r\n0\r\n\r\n",
                ],
                "abc",
            ),
            (&[b"HTTP/1.1 204\r\ncontent-length:0\r\n\r\n"], ""),
        ];
        for (parts, expected) in whole {
            assert_eq!(get(answering(parts)).unwrap().1, expected);
        }
    }

    #[test]
    fn bad_answers() {
        let bad: [&'static [&'static [u8]]; 7] = [
            &[],
            &[b"SSH-2.0-x\r\n"],
            &[b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"],
            &[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
            &[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"],
            &[b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n"],
            &[b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n", &[b'a'; 2000]],
        ];
        for parts in bad {
            assert!(get(answering(parts)).is_err(), "{parts:?}");
        }
    }

    #[test]
    fn an_endless_answer_is_left_in_time() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while stream.write_all(&[b'a'; 65536]).is_ok() {}
        });
        let cancel = Cancel::default();
        let patience = Patience { cancel: &cancel, deadline: Instant::now() + Duration::from_millis(50) };
        let response = send(port, Request { path: "/", key: None, json: None }, patience).unwrap();
        assert!(matches!(response.text(usize::MAX), Err(HttpError::Timeout)));
    }

    #[test]
    fn a_silent_server_is_left_in_time() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let cancel = Cancel::default();
        let patience = Patience { cancel: &cancel, deadline: Instant::now() + Duration::from_millis(50) };
        let request = Request { path: "/", key: None, json: Some("{}") };
        assert!(matches!(send(port, request, patience), Err(HttpError::Timeout)));
        cancel.cancel();
        assert!(matches!(send(port, request, patience), Err(HttpError::Cancelled(_))));
    }
}

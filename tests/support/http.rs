//! An HTTP server for tests, on a free loopback port, that misbehaves as told. It keeps what it was asked.
#![allow(
    dead_code,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "shared by tests that use parts of it"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A request that came.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Seen {
    /// By lowercase name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// First byte and the byte after the last one that are asked for.
    pub fn range(&self, size: usize) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().unwrap(), last.parse::<usize>().map_or(size, |last| size.min(last + 1))))
    }
}

/// Fills a piece of the content that begins at a position.
type Make = dyn Fn(usize, &mut [u8]) + Send + Sync;

/// What to answer.
#[derive(Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    /// The part of the content that is sent.
    slice: (usize, usize),
    content: Arc<Make>,
    length: bool,
    drop_after: Option<usize>,
    stall_after: Option<usize>,
}

impl Reply {
    pub fn text(text: &str) -> Self {
        Self::bytes(text.as_bytes().into())
    }

    pub fn bytes(bytes: Arc<[u8]>) -> Self {
        let size = bytes.len();
        Self::made(size, Arc::new(move |at, piece: &mut [u8]| piece.copy_from_slice(&bytes[at..at + piece.len()])))
    }

    /// Content given by a function of the position, for sizes that should not be held in memory.
    pub fn made(size: usize, content: Arc<Make>) -> Self {
        let (headers, slice) = (Vec::new(), (0, size));
        Self { status: 200, headers, slice, content, length: true, drop_after: None, stall_after: None }
    }

    pub fn redirect(status: u16, to: &str) -> Self {
        Self::text("moved").status(status).with("Location", to)
    }

    /// Answers a range request as a good server does.
    pub fn ranged(self, seen: &Seen) -> Self {
        let size = self.slice.1;
        match seen.range(size) {
            Some((first, end)) if first < end => {
                self.with("Content-Range", &format!("bytes {first}-{}/{size}", end - 1)).cut(first, end).status(206)
            }
            Some(_) => Self::text("").status(416).with("Content-Range", &format!("bytes */{size}")),
            None => self,
        }
    }

    pub fn size(&self) -> usize {
        self.slice.1 - self.slice.0
    }

    pub fn cut(mut self, first: usize, end: usize) -> Self {
        self.slice = (first, end);
        self
    }

    pub fn status(mut self, status: u16) -> Self {
        self.status = status;
        self
    }

    /// Adds a header, or replaces the one of that name.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(key, _)| key != name);
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Closes the connection after this many bytes of the body.
    pub fn drop_after(mut self, bytes: usize) -> Self {
        self.drop_after = Some(bytes);
        self
    }

    /// Falls silent after this many bytes of the body, until the client goes away.
    pub fn stall_after(mut self, bytes: usize) -> Self {
        self.stall_after = Some(bytes);
        self
    }

    /// Changes the byte at `position` of the content.
    pub fn flip(mut self, position: usize) -> Self {
        let content = self.content;
        self.content = Arc::new(move |at, piece: &mut [u8]| {
            content(at, piece);
            if let Some(byte) = position.checked_sub(at).and_then(|index| piece.get_mut(index)) {
                *byte ^= 1;
            }
        });
        self
    }

    /// No `Content-Length`: the end of the connection ends the body.
    pub fn without_length(mut self) -> Self {
        self.length = false;
        self
    }
}

type Handler = dyn Fn(&Seen, usize) -> Reply + Send + Sync;

/// Ends when dropped.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    over: Arc<AtomicBool>,
}

impl Server {
    /// `handler` gets each request and its number, from 0.
    pub fn start(handler: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            seen: Arc::default(),
            open: Arc::default(),
            over: Arc::default(),
        };
        let (seen, open, over) = (Arc::clone(&server.seen), Arc::clone(&server.open), Arc::clone(&server.over));
        let (handler, turns): (Arc<Handler>, _) = (Arc::new(handler), Arc::new(AtomicUsize::new(0)));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                open.lock().unwrap().extend(stream.try_clone());
                let (seen, handler, turns) = (Arc::clone(&seen), Arc::clone(&handler), Arc::clone(&turns));
                std::thread::spawn(move || {
                    let _ = serve(&stream, &seen, &*handler, &turns);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        server
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn serve(stream: &TcpStream, seen: &Mutex<Vec<Seen>>, handler: &Handler, turns: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read_request(&mut reader)? {
        seen.lock().unwrap().push(request.clone());
        let reply = handler(&request, turns.fetch_add(1, Ordering::SeqCst));
        if !send(stream, &request, &reply)? {
            return Ok(());
        }
    }
    Ok(())
}

fn read_request(reader: &mut impl BufRead) -> std::io::Result<Option<Seen>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut seen = Seen { method, path, headers, body: Vec::new() };
    let length = seen.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    seen.body = vec![0; length];
    reader.read_exact(&mut seen.body)?;
    Ok(Some(seen))
}

/// Says whether the connection may be used again.
fn send(mut stream: &TcpStream, request: &Seen, reply: &Reply) -> std::io::Result<bool> {
    let (mut at, end) = reply.slice;
    let mut head = format!("HTTP/1.1 {} X\r\n", reply.status);
    if reply.length {
        head.push_str(&format!("Content-Length: {}\r\n", end - at));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(true);
    }
    let stop = [reply.drop_after, reply.stall_after].into_iter().flatten().min();
    let last = stop.map_or(end, |bytes| end.min(at + bytes));
    let mut chunk = vec![0; 1 << 16];
    while at < last {
        let count = chunk.len().min(last - at);
        (reply.content)(at, &mut chunk[..count]);
        stream.write_all(&chunk[..count])?;
        at += count;
    }
    if reply.stall_after.is_some() {
        let _ = stream.read(&mut [0]);
    }
    Ok(reply.length && stop.is_none())
}

//! A loopback server for one big file, for benchmarks and jobs: plain, and as a repository of the Hugging Face Hub, as far as
//! clients ask for one (paths, headers and JSON as huggingface_hub 1.x and 2.x read them).
//!
//! On Linux an unthrottled file is sent with `sendfile`: the kernel hands out pages of its cache, so that the server takes almost no
//! processor time from the client that is measured. (`std::io::copy` from a file to a socket reads and writes 8 KiB at a time.)

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use xshell::Shell;

use crate::step::Result;

pub const NAME: &str = "big.gguf";
pub const REPO: &str = "bench/big";
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Debug)]
pub struct Server {
    pub address: SocketAddr,
    pub sha256: String,
    served: &'static Served,
}

#[derive(Debug)]
struct Served {
    file: PathBuf,
    size_bytes: u64,
    sha256: String,
    /// Bytes a second for each connection; no limit when not given.
    rate: Option<u64>,
    /// When bytes of the file were last handed to the system.
    last_sent: Mutex<Option<Instant>>,
}

/// Writes `size_bytes` that no compression makes smaller, beginning like weights without tensors. Returns their digest.
pub fn make(file: &Path, size_bytes: u64, sh: &Shell) -> Result<String> {
    let mut block = vec![0u8; 1 << 20];
    let (mut hash, mut state) = (Sha256::new(), 0x9E37_79B9_7F4A_7C15_u64);
    sh.write_file(file, [])?;
    let mut out = std::fs::OpenOptions::new().append(true).open(file)?;
    let mut left = size_bytes;
    while left > 0 {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        if left == size_bytes {
            // GGUF, version 3, no tensors, no metadata.
            block[..24].copy_from_slice(b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        }
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
        hash.update(&block[..take]);
        out.write_all(&block[..take])?;
        left -= take as u64;
    }
    Ok(hash.finalize().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

impl Server {
    /// Serves a new file until the process ends, each connection `rate` bytes a second at most.
    pub fn start(sh: &Shell, folder: &Path, size_bytes: u64, rate: Option<u64>) -> Result<Self> {
        let file = folder.join(NAME);
        let sha256 = make(&file, size_bytes, sh)?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let last_sent = Mutex::new(None);
        let served = Served { file, size_bytes, sha256: sha256.clone(), rate, last_sent };
        let served: &'static Served = Box::leak(Box::new(served));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || served.converse(stream));
            }
        });
        Ok(Self { address, sha256, served })
    }

    pub fn origin(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Tells how many seconds ago the last byte of the file was sent.
    pub fn tail_s(&self) -> impl Fn() -> Option<f64> + use<> {
        let served = self.served;
        move || {
            let last = *served.last_sent.lock().unwrap_or_else(PoisonError::into_inner);
            last.map(|last| last.elapsed().as_secs_f64())
        }
    }

    pub fn url(&self) -> String {
        format!("{}/{NAME}", self.origin())
    }
}

impl Served {
    /// Answers one connection's requests until the client goes.
    fn converse(&self, stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut pace = Pace { begun: Instant::now(), sent: 0 };
        while let Some((line, range)) = head(&mut reader)? {
            let mut words = line.split_whitespace();
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let path = path.split('?').next().unwrap_or_default();
            if path.ends_with(NAME) {
                self.send_file(&stream, method == "HEAD", range, &mut pace)?;
            } else {
                self.send_json(&stream, path)?;
            }
        }
        Ok(())
    }

    fn send_file(
        &self,
        mut stream: &TcpStream,
        head_only: bool,
        range: Option<Range>,
        pace: &mut Pace,
    ) -> std::io::Result<()> {
        let last = self.size_bytes - 1;
        let (from, to) = range.map_or((0, last), |(from, to)| (from.min(last), to.unwrap_or(last).min(last)));
        let length = (to + 1).saturating_sub(from);
        let mut answer = match range {
            None => "HTTP/1.1 200 OK\r\n".to_owned(),
            Some(_) => {
                format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{to}/{}\r\n", self.size_bytes)
            }
        };
        answer += &format!("Content-Length: {length}\r\nAccept-Ranges: bytes\r\nETag: \"{}\"\r\n", self.sha256);
        answer += &format!("X-Repo-Commit: {COMMIT}\r\nX-Linked-Size: {}\r\n", self.size_bytes);
        answer += &format!("X-Linked-ETag: \"{}\"\r\nContent-Type: application/octet-stream\r\n\r\n", self.sha256);
        stream.write_all(answer.as_bytes())?;
        if !head_only {
            let mut file = std::fs::OpenOptions::new().read(true).open(&self.file)?;
            file.seek(SeekFrom::Start(from))?;
            match self.rate {
                None => send_all(&file, from, length, stream)?,
                Some(rate) => pace.copy(&mut file.take(length), stream, rate)?,
            }
            *self.last_sent.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
        Ok(())
    }

    fn send_json(&self, mut stream: &TcpStream, path: &str) -> std::io::Result<()> {
        let (size, sha) = (self.size_bytes, &self.sha256);
        let lfs = serde_json::json!({ "oid": sha, "sha256": sha, "size": size, "pointerSize": 135 });
        let (status, body) = if path.starts_with(&format!("/api/models/{REPO}/tree/")) {
            let file = serde_json::json!({ "type": "file", "path": NAME, "size": size, "oid": COMMIT, "lfs": lfs });
            ("200 OK", serde_json::json!([file]))
        } else if path.starts_with(&format!("/api/models/{REPO}")) {
            let file = serde_json::json!({ "rfilename": NAME, "size": size, "blobId": COMMIT, "lfs": lfs });
            let info =
                serde_json::json!({ "id": REPO, "modelId": REPO, "sha": COMMIT, "private": false, "siblings": [file] });
            ("200 OK", info)
        } else {
            ("404 Not Found", serde_json::json!({ "error": "there is only one repository here" }))
        };
        let body = body.to_string();
        let head = format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Repo-Commit: {COMMIT}\r\n");
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len())
    }
}

/// Sends `length` bytes of a file that stands at `from`.
#[cfg(target_os = "linux")]
fn send_all(file: &std::fs::File, from: u64, length: u64, stream: &TcpStream) -> std::io::Result<()> {
    let (mut at, end) = (from, from + length);
    while at < end {
        let count = usize::try_from(end - at).unwrap_or(usize::MAX);
        if rustix::fs::sendfile(stream, file, Some(&mut at), count)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Sends `length` bytes of a file that stands at `from`.
#[cfg(not(target_os = "linux"))]
fn send_all(file: &std::fs::File, _from: u64, length: u64, mut stream: &TcpStream) -> std::io::Result<()> {
    std::io::copy(&mut file.take(length), &mut stream).map(drop)
}

/// What one connection has sent. A pause between two answers does not count as time to make up for.
struct Pace {
    begun: Instant,
    sent: u64,
}

impl Pace {
    fn copy(&mut self, from: &mut impl std::io::Read, mut to: &TcpStream, rate: u64) -> std::io::Result<()> {
        let mut piece = vec![0; 64 << 10];
        loop {
            let count = from.read(&mut piece)?;
            if count == 0 {
                return Ok(());
            }
            #[expect(clippy::cast_precision_loss, reason = "sizes below 2^52")]
            let due = self.begun + Duration::from_secs_f64(self.sent as f64 / rate as f64);
            match due.checked_duration_since(Instant::now()) {
                Some(early) => std::thread::sleep(early),
                None => *self = Self { begun: Instant::now(), sent: 0 },
            }
            to.write_all(&piece[..count])?;
            self.sent += count as u64;
        }
    }
}

/// A request's bytes `from` and, when it names one, `to`.
type Range = (u64, Option<u64>);

/// The request line and the range asked for; None when the client has gone.
fn head(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<(String, Option<Range>)>> {
    let mut first = String::new();
    if reader.by_ref().take(8192).read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut range = None;
    for _ in 0..100 {
        let mut line = String::new();
        reader.by_ref().take(8192).read_line(&mut line)?;
        let line = line.trim();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("range")
            && let Some((from, to)) = value.trim().strip_prefix("bytes=").and_then(|range| range.split_once('-'))
        {
            range = from.parse().ok().map(|from| (from, to.parse().ok()));
        }
    }
    Ok(Some((first, range)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(server: &Server, request: &str) -> String {
        let mut stream = TcpStream::connect(server.address).unwrap();
        write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nRange: bytes=4-7\r\n\r\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[test]
    fn a_file_and_its_repository() {
        let sh = Shell::new().unwrap();
        let folder = sh.create_temp_dir().unwrap();
        let server = Server::start(&sh, folder.path(), (1 << 20) + 5, None).unwrap();
        let part = ask(&server, &format!("GET /{NAME}"));
        assert!(part.starts_with("HTTP/1.1 206 ") && part.ends_with("\r\n\r\n\x03\0\0\0"), "{part:?}");
        assert!(ask(&server, &format!("HEAD /{REPO}/resolve/{COMMIT}/{NAME}")).ends_with("\r\n\r\n"));
        assert!(ask(&server, &format!("GET /api/models/{REPO}/tree/main?recursive=1")).contains(&server.sha256));
        assert!(ask(&server, "GET /other").starts_with("HTTP/1.1 404 "));
    }
}

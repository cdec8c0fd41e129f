//! HTTP/1.1 to engines on this machine: hyper, 127.0.0.1 only. One request a connection, or connections that are kept for more
//! ([`Client::send_kept`]).
//!
//! Invariants: every wait ends at a deadline; heads and collected bodies have a size limit; dropping a [`Response`] before its
//! end (or the future of one) closes the connection, which is how engines learn that nobody waits any more; a kept connection
//! leads to the engine process that it was opened to. Absent: proxies, redirects, TLS, compression.

mod connection;

use std::collections::VecDeque;
use std::error::Error as _;
use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, HeaderValue};
use tokio::net::TcpStream;

use self::connection::{Connection, Kept, Request};
use super::sse::{self, SseError};
use super::{Endpoint, EngineError};

/// How long a connection on this machine may take.
const CONNECT: Duration = Duration::from_secs(2);
/// Why a request to an engine failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant documents it and its fields")]
pub enum HttpError {
    #[error("no answer in time")]
    Timeout,
    #[error("could not connect to port {port}: {source}")]
    Connect { port: u16, source: io::Error },
    #[error("the connection ended in the middle of an answer")]
    Cut,
    #[error("not an HTTP answer: {0}")]
    Malformed(String),
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    #[error(transparent)]
    Events(#[from] SseError),
}

impl HttpError {
    /// Whether what listens there does not speak HTTP as an engine does.
    pub fn is_foreign(&self) -> bool {
        matches!(self, Self::Malformed(_) | Self::TooLarge(_))
    }
}

impl From<hyper::Error> for HttpError {
    fn from(error: hyper::Error) -> Self {
        let cause = error.source().and_then(|source| source.downcast_ref::<io::Error>());
        let invalid = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::Other)
        };
        if error.is_parse() || cause.is_some_and(invalid) { Self::Malformed(error.to_string()) } else { Self::Cut }
    }
}

impl From<HttpError> for EngineError {
    fn from(error: HttpError) -> Self {
        match error {
            HttpError::Timeout => Self::Timeout,
            other => Self::Unanswered(other.to_string()),
        }
    }
}

/// Sends requests to one engine.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: Endpoint,
    /// An engine that starts again has another endpoint, and so another client with connections of its own.
    kept: Arc<Kept>,
}

impl Client {
    /// A client of that endpoint. Nothing is connected yet.
    pub fn new(endpoint: &Endpoint) -> Self {
        Self { endpoint: endpoint.clone(), kept: Arc::default() }
    }

    /// Where requests go.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A GET, with or without the endpoint's key.
    ///
    /// # Errors
    /// [`HttpError`]; nothing is tried twice.
    pub async fn get(&self, path: &str, with_key: bool, deadline: Instant) -> Result<Response, HttpError> {
        let mut request = request("GET", path, Bytes::new())?;
        if with_key {
            self.authorize(&mut request)?;
        }
        self.send(request, deadline).await
    }

    /// A POST of JSON with the endpoint's key.
    ///
    /// # Errors
    /// [`HttpError`]; nothing is tried twice.
    pub async fn post(&self, path: &str, json: String, deadline: Instant) -> Result<Response, HttpError> {
        let mut request = request("POST", path, json.into())?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.authorize(&mut request)?;
        self.send(request, deadline).await
    }

    /// Replaces the credentials of a request by the endpoint's.
    ///
    /// # Errors
    /// When the key cannot be a header.
    pub fn authorize<B>(&self, request: &mut hyper::Request<B>) -> Result<(), HttpError> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.endpoint.key))
            .map_err(|error| HttpError::Malformed(error.to_string()))?;
        value.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, value);
        Ok(())
    }

    /// Sends any request over a connection of its own, and reads the head of the response. Host and connection headers are set
    /// here.
    ///
    /// # Errors
    /// [`HttpError`]; nothing is tried twice.
    pub async fn send(&self, mut request: Request, deadline: Instant) -> Result<Response, HttpError> {
        self.address(&mut request)?;
        request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        self.converse(self.connect(deadline).await?, request, deadline, None).await.map_err(|failed| failed.error)
    }

    /// [`Client::send`] over a connection that an earlier request has left, if there is one. It is left for the next request once
    /// the body of the response was read to its end, unless `most` are kept already or the response did not say its length.
    ///
    /// # Errors
    /// [`HttpError`]; a request is sent again only when nothing of it was sent before.
    pub async fn send_kept(&self, mut request: Request, deadline: Instant, most: usize) -> Result<Response, HttpError> {
        self.address(&mut request)?;
        while let Some(connection) = self.kept.take().await {
            match self.converse(connection, request, deadline, Some(most)).await {
                Ok(response) => return Ok(response),
                Err(Failed { unsent: Some(unsent), .. }) => request = unsent,
                Err(failed) => return Err(failed.error),
            }
        }
        self.converse(self.connect(deadline).await?, request, deadline, Some(most)).await.map_err(|failed| failed.error)
    }

    fn address(&self, request: &mut Request) -> Result<(), HttpError> {
        let host = HeaderValue::try_from(format!("127.0.0.1:{}", self.endpoint.port));
        request.headers_mut().insert(HOST, host.map_err(|error| HttpError::Malformed(error.to_string()))?);
        Ok(())
    }

    async fn connect(&self, deadline: Instant) -> Result<Connection, HttpError> {
        let port = self.endpoint.port;
        let connect = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let connected = within(deadline.min(Instant::now() + CONNECT), connect).await?;
        let stream = connected.map_err(|source| HttpError::Connect { port, source })?;
        let _ = stream.set_nodelay(true);
        Connection::new(stream).await.map_err(|source| HttpError::Connect { port, source })
    }

    /// `keep`: how many connections may be kept, when this one may.
    async fn converse(
        &self,
        mut connection: Connection,
        request: Request,
        deadline: Instant,
        keep: Option<usize>,
    ) -> Result<Response, Failed> {
        match within(deadline, connection.send(request)).await {
            Ok(Ok(response)) => {
                let (head, body) = response.into_parts();
                // llama-server closes a connection after a stream, and does not say so before.
                let has_length = body.size_hint().exact().is_some();
                let home = keep.filter(|_| has_length).map(|most| (Arc::clone(&self.kept), most));
                Ok(Response { head, body, deadline, connection: Some(connection), home })
            }
            Ok(Err(mut failed)) => {
                let unsent = failed.take_message();
                Err(Failed { error: failed.into_error().into(), unsent })
            }
            Err(error) => Err(Failed { error, unsent: None }),
        }
    }
}

/// A request that failed.
struct Failed {
    error: HttpError,
    /// The request, when nothing of it was sent.
    unsent: Option<Request>,
}

fn request(method: &str, path: &str, body: Bytes) -> Result<Request, HttpError> {
    let request = hyper::Request::builder().method(method).uri(path).body(Full::new(body));
    request.map_err(|error| HttpError::Malformed(error.to_string()))
}

async fn within<T>(deadline: Instant, future: impl Future<Output = T>) -> Result<T, HttpError> {
    tokio::time::timeout_at(deadline.into(), future).await.map_err(|_| HttpError::Timeout)
}

/// A response whose body is still to be read.
#[derive(Debug)]
pub struct Response {
    /// Status and headers.
    pub head: hyper::http::response::Parts,
    body: Incoming,
    deadline: Instant,
    /// None once the body has ended.
    connection: Option<Connection>,
    /// Where the connection goes then, and how many may be there.
    home: Option<(Arc<Kept>, usize)>,
}

impl Response {
    /// The status code.
    pub fn status(&self) -> u16 {
        self.head.status.as_u16()
    }

    /// The next bytes of the body, as they arrive; None at its end.
    ///
    /// # Errors
    /// [`HttpError::Cut`] when the connection ends before the body does.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            // Bytes that never pause must not outrun the deadline.
            if Instant::now() >= self.deadline {
                return Err(HttpError::Timeout);
            }
            let Some(connection) = &mut self.connection else { return Ok(None) };
            match within(self.deadline, connection.frame(&mut self.body)).await? {
                None => {
                    if let (Some(connection), Some((kept, most))) = (self.connection.take(), self.home.take()) {
                        kept.give_back(connection, most).await;
                    }
                    return Ok(None);
                }
                Some(frame) => {
                    if let Ok(data) = frame?.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// The whole body as text.
    ///
    /// # Errors
    /// [`HttpError::TooLarge`] beyond `limit_bytes`.
    pub async fn text(mut self, limit_bytes: usize) -> Result<String, HttpError> {
        let mut all = Vec::new();
        while let Some(part) = self.chunk().await? {
            all.extend_from_slice(&part);
            if all.len() > limit_bytes {
                return Err(HttpError::TooLarge(limit_bytes));
            }
        }
        Ok(String::from_utf8_lossy(&all).into_owned())
    }

    /// The body as server-sent events.
    pub fn events(self) -> EventReader {
        EventReader { response: self, parser: sse::Parser::default(), ready: VecDeque::new() }
    }

    /// The start of the body of a response that is an error, as text for people.
    ///
    /// # Errors
    /// [`HttpError`].
    pub async fn refusal(self) -> Result<String, HttpError> {
        const LIMIT_BYTES: usize = 64 * 1024;
        self.text(LIMIT_BYTES).await
    }
}

/// Reads server-sent events from a response.
#[derive(Debug)]
pub struct EventReader {
    response: Response,
    parser: sse::Parser,
    ready: VecDeque<String>,
}

impl EventReader {
    /// The data of the next event; None at the end of the body.
    ///
    /// # Errors
    /// [`HttpError`]; nothing more can be read then.
    pub async fn next(&mut self) -> Result<Option<String>, HttpError> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Ok(Some(data));
            }
            match self.response.chunk().await? {
                None => return Ok(None),
                Some(bytes) => self.ready.extend(self.parser.push(&bytes)?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const HEAD_LIMIT_BYTES: usize = 64 * 1024;
    const SOON: Duration = Duration::from_secs(5);

    fn listener() -> (TcpListener, Client) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, Client::new(&Endpoint { port, key: "k".to_owned() }))
    }

    /// Answers one connection with these parts, each sent on its own, and closes.
    fn answering(parts: &'static [&'static [u8]]) -> Client {
        let (listener, client) = listener();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            let mut asked = Vec::new();
            let mut part = [0; 1024];
            while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                let count = stream.read(&mut part).unwrap();
                asked.extend_from_slice(&part[..count]);
            }
            assert!(String::from_utf8_lossy(&asked).to_lowercase().contains("\r\nauthorization: bearer k\r\n"));
            for part in parts {
                let _ = stream.write_all(part);
            }
        });
        client
    }

    async fn get(client: Client) -> Result<(u16, String), HttpError> {
        let response = client.get("/x", true, Instant::now() + SOON).await?;
        Ok((response.status(), response.text(1000).await?))
    }

    #[tokio::test]
    async fn every_framing() {
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
            (&[b"HTTP/1.1 204 No Content\r\ncontent-length:0\r\n\r\n"], ""),
        ];
        for (parts, expected) in whole {
            assert_eq!(get(answering(parts)).await.unwrap().1, expected);
        }
    }

    #[tokio::test]
    async fn bad_answers() {
        let cut: [&'static [&'static [u8]]; 3] = [
            &[],
            &[b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"],
            &[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"],
        ];
        for parts in cut {
            let error = get(answering(parts)).await.unwrap_err();
            assert!(matches!(error, HttpError::Cut), "{parts:?}: {error:?}");
        }
        let foreign: [&'static [&'static [u8]]; 5] = [
            &[b"SSH-2.0-x\r\n\r\n"],
            &[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
            &[b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n"],
            &[b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n", &[b'a'; 2000]],
            &[b"HTTP/1.1 200 OK\r\nX: ", &[b'a'; 2 * HEAD_LIMIT_BYTES], b"\r\n\r\n"],
        ];
        for parts in foreign {
            let answer = get(answering(parts)).await;
            assert!(answer.as_ref().is_err_and(HttpError::is_foreign), "{:.60?}: {answer:?}", parts[0]);
        }
    }

    #[tokio::test]
    async fn a_request_ends_at_its_deadline() {
        let (listener, client) = listener();
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let mut stream = stream.unwrap();
                // The second one is silent; the first never pauses.
                if number == 0 {
                    let _ = stream.read(&mut [0; 1024]);
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
                    while stream.write_all(&[b'a'; 65536]).is_ok() {}
                } else {
                    let _ = stream.read_to_end(&mut Vec::new());
                }
            }
        });
        let soon = || Instant::now() + Duration::from_millis(50);
        let response = client.get("/", false, soon()).await.unwrap();
        assert!(matches!(response.text(usize::MAX).await, Err(HttpError::Timeout)));
        assert!(matches!(client.post("/", "{}".to_owned(), soon()).await, Err(HttpError::Timeout)));
    }

    #[tokio::test]
    async fn dropping_a_response_closes_its_connection() {
        let (listener, client) = listener();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap();
        });
        drop(client.get("/", false, Instant::now() + SOON).await.unwrap());
        let deadline = Instant::now() + SOON;
        while !server.is_finished() {
            assert!(Instant::now() < deadline, "the connection is still open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.join().unwrap();
    }

    /// Answers requests on each connection until the other side closes it, and tells of each how many there were.
    fn keeping(answers: usize) -> (Client, std::sync::mpsc::Receiver<usize>) {
        keeping_with(answers, b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc")
    }

    fn keeping_with(answers: usize, answer: &'static [u8]) -> (Client, std::sync::mpsc::Receiver<usize>) {
        let (listener, client) = listener();
        let (tell, told) = std::sync::mpsc::channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, tell) = (stream.unwrap(), tell.clone());
                thread::spawn(move || {
                    let (mut count, mut part) = (0, [0; 4096]);
                    while count < answers && stream.read(&mut part).is_ok_and(|read| read > 0) {
                        count += 1;
                        let _ = stream.write_all(answer);
                    }
                    drop(stream);
                    let _ = tell.send(count);
                });
            }
        });
        (client, told)
    }

    async fn get_kept(client: &Client, most: usize) -> Result<Response, HttpError> {
        client.send_kept(request("GET", "/x", Bytes::new()).unwrap(), Instant::now() + SOON, most).await
    }

    #[tokio::test]
    async fn a_connection_is_kept_for_the_next_request_and_closed_when_there_is_none() {
        let (client, told) = keeping(usize::MAX);
        for _ in 0..3 {
            assert_eq!(get_kept(&client, 1).await.unwrap().text(1000).await.unwrap(), "abc");
        }
        // Two at a time: only one of them is kept, and the other is closed at once.
        let (one, two) = (get_kept(&client, 1).await.unwrap(), get_kept(&client, 1).await.unwrap());
        assert_eq!((one.text(1000).await.unwrap(), two.text(1000).await.unwrap()), ("abc".into(), "abc".into()));
        let told = tokio::task::spawn_blocking(move || [(); 2].map(|()| told.recv_timeout(SOON).unwrap()));
        assert_eq!(told.await.unwrap(), [1, 4]);
    }

    /// llama-server closes it after the last chunk, a moment too late to see that before the next request.
    #[tokio::test]
    async fn a_connection_is_not_kept_after_a_stream() {
        let answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let (client, told) = keeping_with(usize::MAX, answer);
        for _ in 0..2 {
            assert_eq!(get_kept(&client, 1).await.unwrap().text(1000).await.unwrap(), "abc");
            assert_eq!(told.recv_timeout(Duration::from_secs(1)).unwrap(), 1);
        }
    }

    #[tokio::test]
    async fn an_engine_may_close_a_connection_that_was_kept() {
        let (client, told) = keeping(1);
        for _ in 0..3 {
            assert_eq!(get_kept(&client, 1).await.unwrap().text(1000).await.unwrap(), "abc");
            assert_eq!(told.recv_timeout(SOON).unwrap(), 1);
        }
    }

    /// Such a request may have been carried out: it is not sent again.
    #[tokio::test]
    async fn a_request_that_was_sent_is_not_sent_again() {
        let (listener, client) = listener();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut part = [0; 4096];
            assert!(stream.read(&mut part).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc").unwrap();
            assert!(stream.read(&mut part).unwrap() > 0);
            drop(stream);
            listener.set_nonblocking(true).unwrap();
            listener
        });
        assert_eq!(get_kept(&client, 1).await.unwrap().text(1000).await.unwrap(), "abc");
        assert!(matches!(get_kept(&client, 1).await, Err(HttpError::Cut)));
        let again = server.join().unwrap().accept();
        assert!(again.is_err(), "it came again: {again:?}");
    }

    #[tokio::test]
    async fn a_response_that_was_not_read_to_its_end_closes_its_connection() {
        let (client, told) = keeping(usize::MAX);
        drop(get_kept(&client, 1).await.unwrap());
        assert_eq!(told.recv_timeout(SOON).unwrap(), 1);
        assert_eq!(get_kept(&client, 1).await.unwrap().text(1000).await.unwrap(), "abc");
        // The engine is over, and with it the connections to it.
        drop(client);
        assert_eq!(told.recv_timeout(SOON).unwrap(), 1);
    }
}

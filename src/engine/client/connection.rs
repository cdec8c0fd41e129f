//! Connections to one engine. Whoever uses a connection drives it: there is no task beside it that has to be woken, and dropping
//! it closes its socket at once.
//!
//! Invariant: only a connection whose last response was read to its end is kept for another request.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Body as _, Bytes, Frame, Incoming};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Status line and headers of a response together.
const HEAD_LIMIT_BYTES: usize = 64 * 1024;
/// How long a connection is kept: shorter than any engine keeps it (cpp-httplib: 5 s), so that a request never meets an engine
/// that is just closing.
const KEPT: Duration = Duration::from_secs(2);

/// A request to an engine.
pub(super) type Request = hyper::Request<Full<Bytes>>;

/// An open connection.
#[derive(Debug)]
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// None once it has ended.
    socket: Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>,
    /// The same socket, to look at it: the runtime hears a little later that the other side has closed it.
    look: std::net::TcpStream,
}

impl Connection {
    pub(super) async fn new(stream: TcpStream) -> io::Result<Self> {
        let look = twin(&stream)?;
        let mut builder = http1::Builder::new();
        let handshake = builder.max_buf_size(HEAD_LIMIT_BYTES).handshake(TokioIo::new(stream));
        let (sender, socket) = handshake.await.map_err(io::Error::other)?;
        Ok(Self { sender, socket: Some(socket), look })
    }

    /// Sends a request and reads the head of the response. The error has the request when nothing of it was sent.
    pub(super) async fn send(&mut self, request: Request) -> Result<hyper::Response<Incoming>, TrySendError<Request>> {
        let mut response = std::pin::pin!(self.sender.try_send_request(request));
        let socket = &mut self.socket;
        std::future::poll_fn(|context| {
            advance(socket, context);
            response.as_mut().poll(context)
        })
        .await
    }

    /// The next part of a body; None at its end.
    pub(super) async fn frame(&mut self, body: &mut Incoming) -> Option<hyper::Result<Frame<Bytes>>> {
        std::future::poll_fn(|context| {
            // What was read before costs no look at the socket.
            match Pin::new(&mut *body).poll_frame(context) {
                Poll::Pending => {}
                ready => return ready,
            }
            advance(&mut self.socket, context);
            Pin::new(&mut *body).poll_frame(context)
        })
        .await
    }

    /// Whether it can take another request: the engine has not closed it, and has sent nothing that was not asked for.
    async fn is_idle(&mut self) -> bool {
        let is_ready = std::future::poll_fn(|context| {
            advance(&mut self.socket, context);
            Poll::Ready(self.socket.is_some() && self.sender.is_ready())
        });
        is_ready.await && self.look.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

#[cfg(unix)]
fn twin(stream: &TcpStream) -> io::Result<std::net::TcpStream> {
    use std::os::fd::AsFd as _;
    Ok(stream.as_fd().try_clone_to_owned()?.into())
}

#[cfg(windows)]
fn twin(stream: &TcpStream) -> io::Result<std::net::TcpStream> {
    use std::os::windows::io::AsSocket as _;
    Ok(stream.as_socket().try_clone_to_owned()?.into())
}

/// Reads and writes what can be read and written now. Errors come out of the response, too.
fn advance(socket: &mut Option<http1::Connection<TokioIo<TcpStream>, Full<Bytes>>>, context: &mut Context<'_>) {
    if let Some(open) = socket
        && Pin::new(open).poll(context).is_ready()
    {
        *socket = None;
    }
}

/// Connections to one engine process that wait for their next request.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// The last to be used is the last.
    idle: Vec<(Instant, Connection)>,
    /// Whether a task looks for those that were kept too long.
    swept: bool,
}

impl Kept {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that can take a request.
    pub(super) async fn take(&self) -> Option<Connection> {
        loop {
            let (since, mut connection) = self.state().idle.pop()?;
            if since.elapsed() < KEPT && connection.is_idle().await {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection whose response was read to its end, if the engine keeps it, too, and no more than `most` are kept.
    pub(super) async fn give_back(self: &Arc<Self>, mut connection: Connection, most: usize) {
        if !connection.is_idle().await {
            return;
        }
        let mut state = self.state();
        if state.idle.len() >= most {
            return;
        }
        state.idle.push((Instant::now(), connection));
        if !std::mem::replace(&mut state.swept, true) {
            tokio::spawn(sweep(Arc::downgrade(self)));
        }
    }
}

/// Closes what was kept too long, until nothing is kept.
async fn sweep(kept: Weak<Kept>) {
    loop {
        tokio::time::sleep(KEPT).await;
        let Some(kept) = kept.upgrade() else { return };
        let mut state = kept.state();
        state.idle.retain(|(since, _)| since.elapsed() < KEPT);
        if state.idle.is_empty() {
            state.swept = false;
            return;
        }
    }
}

//! Connections: accepted, bounded in number, time and size, with or without TLS.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::{Context, routes};

/// Connections at a time; more wait to be accepted.
const CONNECTIONS: usize = 1024;
/// How long a client may take for the head of a request.
const HEAD: Duration = Duration::from_secs(10);
/// Bytes of the head of a request, to within one read from the socket.
const HEAD_LIMIT_BYTES: usize = 64 << 10;
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Pause after an error of `accept`, such as too many open files: it comes back at once.
const PAUSE: Duration = Duration::from_millis(100);

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file that cannot be read.
    #[error("cannot read `{file}`: {source}")]
    File {
        /// The file.
        file: String,
        /// Why not.
        source: rustls::pki_types::pem::Error,
    },
    /// Certificate and key do not belong together, or are of a kind that is not known.
    #[error("the certificate cannot be used: {0}")]
    Unusable(#[from] rustls::Error),
}

/// TLS for new connections.
#[derive(Clone)]
pub struct Tls(TlsAcceptor);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

/// TLS with a certificate chain and its key, both PEM files.
///
/// # Errors
/// When they cannot be read, or do not belong together.
pub fn tls(certificate: &Path, key: &Path) -> Result<Tls, TlsError> {
    let of = |file: &Path| {
        let file = file.display().to_string();
        move |source| TlsError::File { file, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect).map_err(of(certificate))?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(of(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    Ok(Tls(TlsAcceptor::from(Arc::new(config))))
}

/// Accepts connections until `ending` says so, then lets those that are open finish.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    context: Arc<Context>,
    mut ending: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            _ = ending.wait_for(|ending| *ending) => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ending.wait_for(|ending| *ending) => return,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let (context, tls, ending) = (Arc::clone(&context), tls.clone(), ending.clone());
        tokio::spawn(async move {
            // Errors of a connection are its client's.
            let _ = converse(stream, peer, tls, context, ending).await;
            drop(place);
        });
    }
}

async fn converse(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Tls>,
    context: Arc<Context>,
    ending: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    match tls {
        None => requests(stream, peer, context, ending).await,
        Some(tls) => {
            let stream = tokio::time::timeout(HANDSHAKE, tls.0.accept(stream)).await??;
            requests(stream, peer, context, ending).await
        }
    }
}

async fn requests<S>(
    stream: S,
    peer: SocketAddr,
    context: Arc<Context>,
    mut ending: watch::Receiver<bool>,
) -> io::Result<()>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let service = service_fn(move |request| {
        let context = Arc::clone(&context);
        let began = Instant::now();
        async move { Ok::<_, Infallible>(routes::respond(context, request, peer, began).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_LIMIT_BYTES);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended.map_err(io::Error::other),
        _ = ending.wait_for(|ending| *ending) => {}
    }
    connection.as_mut().graceful_shutdown();
    connection.await.map_err(io::Error::other)
}

//! Layer 4: one endpoint for every policy. Takes requests of OpenAI's API, starts, swaps and stops engines as they name models,
//! and answers with what the engines say.
//!
//! | file | what lives there |
//! |---|---|
//! | `scheduler` | pure: who is let through, which engine starts or ends |
//! | `owner` | the one task that holds the state and does what the scheduler says; [`owner::Lease`] is a request let through |
//! | `instance` | the task of one engine process |
//! | `listener`, `access`, `routes` | connections, who may come in, which address does what |
//! | `answer`, `call` | one request about a model: `forward` for engines that speak the API, `adapter` for others; `tap` watches streams, `responses` completes some |
//! | `control`, `page` | lists, load and unload, state, metrics; the page at `/` |
//! | `measure`, `metrics`, `log`, `notice` | what is told of a request: to Prometheus, to the request log, to whoever watches |
//! | `catalog` | what the layer above provides: policies and their verified inputs |
//!
//! Invariants: a request that was let through gives its slot back however it ends; a client that leaves ends the work for it; no
//! engine outlives the gateway; prompts and answers are in no log and no metric.

pub mod access;
mod adapter;
mod answer;
mod body;
mod call;
pub mod catalog;
mod control;
mod error;
mod forward;
mod instance;
pub mod listener;
mod log;
mod measure;
pub mod memory;
mod metrics;
pub mod notice;
mod operation;
mod owner;
mod page;
mod responses;
mod routes;
pub mod scheduler;
mod tap;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};

use self::access::Access;
use self::catalog::Catalog;
pub use self::instance::Surroundings;
use self::listener::Tls;
use self::log::Log;
use self::memory::Learned;
use self::metrics::Metrics;
use self::notice::{Notice, What};
use self::owner::{Message, Owner};
use self::scheduler::{Input, Limits};
use crate::base::cancel::Cancel;

/// News that watchers may lag behind before they miss some.
const NEWS: usize = 1024;

/// What every request can reach.
#[derive(Debug)]
struct Context {
    owner: Owner,
    access: Access,
    metrics: Metrics,
    log: Log,
    /// Ends the program that runs the gateway.
    stop: Cancel,
    /// Makes ids of requests unique: random for each gateway.
    id: u64,
    requests: AtomicU64,
}

impl Context {
    /// A new id of a request.
    fn request_id(&self) -> String {
        format!("req-{:016x}-{}", self.id, self.requests.fetch_add(1, Ordering::Relaxed))
    }
}

/// How a gateway is set up.
#[derive(Debug)]
pub struct Setup {
    /// The policies.
    pub catalog: Arc<dyn Catalog>,
    /// What engines are started with.
    pub surroundings: Surroundings,
    /// What holds for all policies together.
    pub limits: Limits,
    /// Who is let in.
    pub access: Access,
    /// What ends the program: `aitools stop` sets it.
    pub stop: Cancel,
    /// https instead of http.
    pub tls: Option<Tls>,
    /// The request log.
    pub log: PathBuf,
    /// What engines were seen to need.
    pub learned: PathBuf,
}

/// A gateway that takes requests.
#[derive(Debug)]
pub struct Gateway {
    context: Arc<Context>,
    address: SocketAddr,
    owner_task: tokio::task::JoinHandle<()>,
    accepting: tokio::task::JoinHandle<()>,
    ending: watch::Sender<bool>,
}

impl Gateway {
    /// Takes requests from a socket that listens already, with TLS where it is set up, and from `control`, a second one for our
    /// own commands. Policies marked so are loaded at once.
    ///
    /// # Errors
    /// When a socket cannot be used, the project cannot be read, or the system gives no random numbers.
    pub async fn start(
        setup: Setup,
        listener: std::net::TcpListener,
        control: Option<std::net::TcpListener>,
    ) -> io::Result<Self> {
        let asynchronous = |listener: std::net::TcpListener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let (listener, control) = (asynchronous(listener)?, control.map(asynchronous).transpose()?);
        let address = listener.local_addr()?;
        let (news, _) = broadcast::channel(NEWS);
        let catalog = Arc::clone(&setup.catalog);
        let offers = tokio::task::spawn_blocking(move || catalog.offers()).await?.map_err(io::Error::other)?;
        let offers = offers.unwrap_or_default();
        let preload: Vec<String> =
            offers.iter().filter(|offer| offer.policy.serve.preload).map(|offer| offer.name.clone()).collect();
        let learned = Learned::load(&setup.learned);
        let (owner, owner_task) = Owner::start(offers, setup.catalog, setup.surroundings, setup.limits, learned, news);
        for name in preload {
            owner.send(Message::Happened(Input::Load(name)));
        }
        let context = Arc::new(Context {
            owner,
            access: setup.access,
            metrics: Metrics::new(),
            log: Log::start(&setup.log),
            stop: setup.stop,
            id: getrandom::u64().map_err(io::Error::other)?,
            requests: AtomicU64::new(0),
        });
        let (ending, ended) = watch::channel(false);
        if let Some(control) = control {
            tokio::spawn(listener::serve(control, None, Arc::clone(&context), ended.clone()));
        }
        let accepting = tokio::spawn(listener::serve(listener, setup.tls, Arc::clone(&context), ended));
        Ok(Self { context, address, owner_task, accepting, ending })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// News from now on.
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        self.context.owner.notices()
    }

    /// Tells whoever watches.
    pub fn notify(&self, what: What) {
        self.context.owner.notify(what);
    }

    /// Ends: takes no new connections, refuses who waits, gives running requests `patience`, and ends every engine. Dropping the
    /// future before its end ends everything at once.
    pub async fn end(self, patience: Duration) {
        let running = self.context.owner.look().await.map_or(0, |snapshot| snapshot.running);
        self.notify(What::Draining { running });
        let _ = self.ending.send(true);
        self.context.owner.send(Message::End(patience));
        let _ = self.accepting.await;
        let _ = self.owner_task.await;
    }
}

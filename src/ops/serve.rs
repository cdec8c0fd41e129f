//! `serve`: one endpoint for the policies of a project, until the user ends it.
//!
//! The gateway asks for the policies and for the verified inputs of each engine through [`Shelf`], which reads the project anew
//! each time: an edited policy is taken over, and nothing starts from bytes that were changed since they were verified.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast::error::RecvError;

use crate::base::cancel::Cancel;
use crate::base::digest::Digest;
use crate::base::{fs, lock, platform, random};
use crate::engine::Ready;
use crate::format::lockfile;
use crate::gateway::access::Access;
use crate::gateway::catalog::{Catalog, Model, Offer};
use crate::gateway::listener;
use crate::gateway::notice::{Notice, What};
use crate::gateway::scheduler::{Limits, Memory};
use crate::gateway::{Gateway, Setup, Surroundings, memory};

use super::failure::ServeError;
use super::project::{PolicyFile, state_dir};
use super::run::cancelled;
use super::{Failure, Host, Project, ready};

/// How often to look whether the user wants to stop.
const POLL: Duration = Duration::from_millis(50);
/// Threads that serve requests at most: the engines need the processor.
const THREADS: usize = 4;
const STATE_LIMIT_BYTES: u64 = 64 << 10;

/// What the user wants.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Only these policies; all when empty.
    pub policies: Vec<String>,
    /// Where to listen.
    pub address: IpAddr,
    /// 0 is any free one.
    pub port: u16,
    /// API keys; none lets everybody in who reaches the address.
    pub keys: Vec<String>,
    /// Serve other machines without a key.
    pub insecure: bool,
    /// Names of the server beside `localhost` and addresses.
    pub hosts: Vec<String>,
    /// Origins of pages that may use it.
    pub origins: Vec<String>,
    /// Certificate chain and key, both PEM files.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Requests that may wait for one policy.
    pub queue: usize,
    /// How long a policy waits for memory before busy engines of others take no new requests.
    pub longest_wait: Duration,
    /// Engines that may be loaded at a time.
    pub loaded: Option<usize>,
    /// Policies that may be loaded together; any when there are none.
    pub groups: Vec<Vec<String>>,
    /// How long running requests may take when the user ends the gateway.
    pub grace: Duration,
}

/// How a running gateway is found by other commands: `.aitools/serve.json`, readable by its owner alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Running {
    version: u32,
    /// Its process.
    pub pid: u32,
    /// Where clients reach it.
    pub url: String,
    /// Where our own commands reach it: plain HTTP on the loopback interface.
    pub control: String,
    /// The key of our own commands.
    pub key: String,
}

/// The gateway that serves this project.
///
/// # Errors
/// [`ServeError::NotRunning`].
pub fn running(root: &Path) -> Result<Running, Failure> {
    let folder = state_dir(root);
    // Whoever runs holds the lock: a file that was left behind by one that was killed says nothing.
    if lock::try_acquire(&folder.join("serve.lock"))?.is_some() {
        return Err(ServeError::NotRunning.into());
    }
    let bytes = fs::read_bounded(&folder.join("serve.json"), STATE_LIMIT_BYTES).map_err(|_| ServeError::NotRunning)?;
    let running: Running = serde_json::from_slice(&bytes).map_err(|_| ServeError::NotRunning)?;
    if running.version == 1 { Ok(running) } else { Err(ServeError::NotRunning.into()) }
}

/// What would be served: each policy, and why it cannot be, if so.
///
/// # Errors
/// When the project cannot be read, or none can be served.
pub fn check(host: &Host, project: &Project, policies: &[String]) -> Result<Vec<Offer>, Failure> {
    let chosen = chosen(project, policies)?;
    let files = project.policies.iter().filter(|file| chosen.is_empty() || chosen.contains(&file.name));
    let offers: Vec<Offer> = files.map(|file| offer(host, project, file)).collect();
    host.store.save_records()?;
    if offers.iter().any(|offer| offer.model.is_ok()) {
        return Ok(offers);
    }
    let problem = |offer: &Offer| format!("{}: {}", offer.name, offer.model.as_ref().err().map_or("", String::as_str));
    Err(ServeError::Unusable { problems: offers.iter().map(problem).collect() }.into())
}

fn chosen(project: &Project, policies: &[String]) -> Result<BTreeSet<String>, Failure> {
    policies.iter().map(|asked| Ok(project.policy(asked)?.name.clone())).collect()
}

fn offer(host: &Host, project: &Project, file: &PolicyFile) -> Offer {
    let metadata = fs::metadata(&file.path).ok();
    Offer {
        name: file.name.clone(),
        aliases: file.policy.value.serve.aliases.clone(),
        policy: file.policy.value.clone(),
        policy_sha256: file.digest,
        failed: 0,
        changed: metadata.and_then(|metadata| metadata.modified().ok()).unwrap_or(SystemTime::UNIX_EPOCH),
        model: ready::ready(host, project, file).map(|(ready, _)| model(&ready)).map_err(|failure| told(&failure)),
    }
}

fn model(ready: &Ready) -> Model {
    let size = ready.model.size(&ready.policy, ready.variant);
    let mut need =
        size.map_or(Memory::default(), |size| Memory { ram_bytes: size.ram_bytes, gpu_bytes: size.gpu_bytes });
    if ready.policy.runtime.gpu_layers.is_none() && ready.policy.runtime.vram_budget_gb.is_none() {
        // As many layers as fit: it cannot be more than there is.
        let room = memory::budget().map_or(u64::MAX, |budget| budget.gpu_bytes);
        need.gpu_bytes = need.gpu_bytes.min(room);
    }
    Model {
        variant: ready.variant.as_str(),
        fingerprint: ready.fingerprint,
        weights_sha256: ready.weights_sha256,
        size_bytes: size.map_or(0, |size| size.weights_bytes),
        context: size.map(|size| (size.context, size.trained.unwrap_or(size.context))),
        need,
    }
}

/// A failure in one line, for clients and for a list.
fn told(failure: &Failure) -> String {
    match failure {
        Failure::NotSynced { .. } | Failure::NoLock { .. } | Failure::Stale { .. } => {
            format!("{failure}: run `aitools sync`")
        }
        other => other.to_string(),
    }
}

/// The project as the gateway sees it.
#[derive(Debug)]
struct Shelf {
    host: Host,
    manifest: PathBuf,
    chosen: BTreeSet<String>,
    /// What the last look saw; None when everything is to be looked at again.
    seen: Mutex<Option<Seen>>,
    /// How many times each policy could not be made ready.
    failed: Mutex<BTreeMap<String, u32>>,
    /// The last problem that was told.
    told: Mutex<Option<String>>,
}

/// What tells that a project is as it was, without a look at models and engines.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Of the manifest, the lockfile and the policies.
    files: Digest,
    /// The policies that could not be started, and why: the reason may go without a change of these files.
    problems: Vec<(String, String)>,
}

impl Shelf {
    fn load(&self) -> Result<Project, Failure> {
        Project::load(&self.manifest)
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Option<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offers_now(&self) -> Result<Option<Vec<Offer>>, Failure> {
        let project = self.load()?;
        let wanted: Vec<&PolicyFile> =
            project.policies.iter().filter(|file| self.chosen.is_empty() || self.chosen.contains(&file.name)).collect();
        let files = digest_of(&project, &wanted);
        let mut seen = self.seen();
        if let Some(seen) = seen.as_ref().filter(|seen| seen.files == files) {
            if seen.problems.is_empty() {
                return Ok(None);
            }
            self.host.store.reload_records();
            let failing = wanted.iter().filter(|file| seen.problems.iter().any(|(name, _)| *name == file.name));
            if problems(failing.map(|file| offer(&self.host, &project, file))) == seen.problems {
                return Ok(None);
            }
        }
        // A `sync` beside the server may have verified what this process does not know.
        self.host.store.reload_records();
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let offer = |file: &PolicyFile| Offer {
            failed: failed.get(&file.name).copied().unwrap_or(0),
            ..offer(&self.host, &project, file)
        };
        let offers: Vec<Offer> = wanted.into_iter().map(offer).collect();
        *seen = Some(Seen { files, problems: problems(offers.iter().cloned()) });
        Ok(Some(offers))
    }
}

fn digest_of(project: &Project, policies: &[&PolicyFile]) -> Digest {
    let mut text = project.manifest.document.source.text.to_string();
    let lock = fs::read_bounded(&project.lock_path, lockfile::MAX_BYTES as u64).unwrap_or_default();
    text += &format!("\n{}\n", Digest::of(&lock));
    for file in policies {
        text += &format!("{} {}\n", file.name, file.digest);
    }
    Digest::of(text.as_bytes())
}

fn problems(offers: impl Iterator<Item = Offer>) -> Vec<(String, String)> {
    offers.filter_map(|offer| offer.model.err().map(|why| (offer.name, why))).collect()
}

impl Catalog for Shelf {
    fn offers(&self) -> Result<Option<Vec<Offer>>, String> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match self.offers_now() {
            Ok(offers) => {
                *told = None;
                Ok(offers)
            }
            Err(failure) => {
                let text = format!("the project cannot be read, and what was served before goes on: {failure}");
                // Once is enough.
                if told.as_ref() == Some(&text) {
                    return Ok(None);
                }
                *told = Some(text.clone());
                Err(text)
            }
        }
    }

    fn ready(&self, policy: &str) -> Result<Ready, String> {
        let prepared = || {
            let project = self.load()?;
            self.host.store.reload_records();
            let (ready, _) = ready::ready(&self.host, &project, project.policy(policy)?)?;
            self.host.store.save_records()?;
            Ok(ready)
        };
        prepared().map_err(|failure: Failure| {
            // Something has changed that the project's files do not tell: everything is looked at again.
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner).entry(policy.to_owned()).or_default() += 1;
            *self.seen() = None;
            told(&failure)
        })
    }
}

/// Serves until the user stops it. `tell` hears what happens.
///
/// # Errors
/// When the gateway cannot start.
pub fn run(host: Host, project: &Project, ask: Ask, tell: &mut dyn FnMut(&Notice)) -> Result<(), Failure> {
    let address = SocketAddr::new(ask.address, ask.port);
    if !ask.address.is_loopback() && ask.keys.is_empty() && !ask.insecure {
        return Err(ServeError::Open(address).into());
    }
    let folder = project.make_state_dir()?;
    let Some(_alone) = lock::try_acquire(&folder.join("serve.lock"))? else {
        let other = running(&project.root).ok();
        let (url, pid) = other.map_or(("an unknown address".to_owned(), 0), |other| (other.url, other.pid));
        return Err(ServeError::Running { url, pid }.into());
    };
    let listener = TcpListener::bind(address).map_err(|source| ServeError::Bind { address, source })?;
    let address = listener.local_addr().map_err(ServeError::Runtime)?;
    let tls = ask.tls.as_ref().map(|(chain, key)| listener::tls(chain, key)).transpose().map_err(ServeError::Tls)?;
    // With TLS our own commands need a way in that asks for no certificate of theirs.
    let control = if tls.is_some() || !address.ip().is_loopback() {
        Some(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(ServeError::Runtime)?)
    } else {
        None
    };
    let key = random::key().map_err(|error| ServeError::Runtime(io::Error::other(error)))?;
    let access = Access::new(&ask.keys, &key, &ask.hosts, &ask.origins).map_err(ServeError::Key)?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let control_address = control.as_ref().and_then(|control| control.local_addr().ok()).unwrap_or(address);
    let found = Running {
        version: 1,
        pid: std::process::id(),
        url: format!("{scheme}://{address}"),
        control: format!("http://{control_address}"),
        key,
    };
    host.store.sweep()?;
    let staging = host.store.stage()?;
    let surroundings = Surroundings {
        driver: Some(host.driver.clone()),
        env: host.engine_env(),
        scratch: staging.path().to_owned(),
        logs: folder.clone(),
    };
    let limits = Limits {
        queue: ask.queue,
        longest_wait: ask.longest_wait,
        patience: Duration::from_secs(30),
        budget: memory::budget(),
        loaded: ask.loaded,
        groups: ask.groups.into_iter().map(BTreeSet::from_iter).collect(),
        failures: 3,
    };
    let cancel = host.task.cancel().clone();
    let chosen = chosen(project, &ask.policies)?;
    let manifest = project.manifest_path.clone();
    let shelf =
        Shelf { host, manifest, chosen, seen: Mutex::default(), failed: Mutex::default(), told: Mutex::default() };
    let setup = Setup {
        catalog: Arc::new(shelf),
        surroundings,
        limits,
        access,
        stop: cancel.clone(),
        tls,
        log: folder.join("requests.jsonl"),
        learned: folder.join("memory.json"),
    };
    let published = folder.join("serve.json");
    publish(&published, &found)?;
    let served = block_on(setup, (listener, control), &found.url, &cancel, ask.grace, tell);
    let _ = fs::remove_file(&published);
    served.map_err(|error| ServeError::Runtime(error).into())
}

/// Writes where the gateway is, for its owner alone.
fn publish(file: &Path, running: &Running) -> Result<(), Failure> {
    if fs::exists(file) {
        fs::remove_file(file)?;
    }
    let text = serde_json::to_string_pretty(running).unwrap_or_default();
    Ok(fs::create_private(file, text.as_bytes())?)
}

fn block_on(
    setup: Setup,
    (listener, control): (TcpListener, Option<TcpListener>),
    url: &str,
    cancel: &Cancel,
    grace: Duration,
    tell: &mut dyn FnMut(&Notice),
) -> io::Result<()> {
    let threads = usize::try_from(platform::physical_cores()).unwrap_or(THREADS).clamp(1, THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    let ended = runtime.block_on(async {
        let gateway = Gateway::start(setup, listener, control).await?;
        let mut news = gateway.notices();
        tell(&Notice::new(What::Listening { url: url.to_owned() }));
        loop {
            tokio::select! {
                notice = news.recv() => hear(notice, tell),
                () = cancelled(cancel, POLL) => break,
            }
        }
        let end = gateway.end(grace);
        tokio::pin!(end);
        loop {
            tokio::select! {
                notice = news.recv() => hear(notice, tell),
                () = &mut end => return Ok(()),
            }
        }
    });
    // Nothing that still runs may hold the program up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    ended
}

fn hear(notice: Result<Notice, RecvError>, tell: &mut dyn FnMut(&Notice)) {
    // Some may be missed by a terminal that is too slow: none that matters to the gateway.
    if let Ok(notice) = notice {
        tell(&notice);
    }
}

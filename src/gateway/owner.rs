//! The one owner of the gateway's state: a task that takes messages one by one, asks the scheduler, and carries out what it
//! decides. Nobody else starts or ends an engine, and there is no lock.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::catalog::{Catalog, Offer};
use super::error::ApiError;
use super::instance::{self, Engine, Report, Reports, Surroundings};
use super::memory;
use super::notice::{LastErrors, Notice, PastError, What};
use super::scheduler::{Action, Input, Limits, Memory, Refusal, Scheduler, State, Ticket, View};

/// How often time passes for the scheduler when nothing else happens, and memory is looked at.
const TICK: Duration = Duration::from_millis(250);
/// How many ticks pass between two looks at the files of the project.
const RELOAD: u32 = 8;

/// What the owner is told.
#[derive(Debug)]
pub enum Message {
    /// A request for a policy.
    Arrived {
        ticket: Ticket,
        policy: String,
        client: String,
        slot: bool,
        answer: oneshot::Sender<Result<Lease, Refusal>>,
    },
    /// Something for the scheduler.
    Happened(Input),
    /// The policies there are now.
    Offers(Vec<Offer>),
    /// An error that people may want to see later.
    Failed(PastError),
    /// Somebody wants to know.
    Look(oneshot::Sender<Snapshot>),
    /// End: wait for running requests this long, then end them.
    End(Duration),
}

/// Sends messages to the owner.
#[derive(Debug, Clone)]
pub struct Owner {
    messages: mpsc::UnboundedSender<Message>,
    tickets: Arc<AtomicU64>,
    notices: broadcast::Sender<Notice>,
    directory: watch::Receiver<Directory>,
}

/// The policies that are served, for finding one quickly.
pub type Directory = Arc<Vec<Arc<Offer>>>;

/// One policy in a [`Snapshot`].
#[derive(Debug, Clone)]
pub struct Status {
    pub offer: Arc<Offer>,
    pub view: View,
    /// The engine, once it is ready.
    pub engine: Option<Arc<Engine>>,
    /// How long ago it was last used.
    pub idle: Duration,
    /// The most memory that its engine has held, in this or an earlier run.
    pub peak: Option<Memory>,
    /// The last error of its engine.
    pub error: Option<String>,
}

/// Everything there is to see at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub policies: Vec<Status>,
    /// Requests that were let through.
    pub running: usize,
    pub free: Option<Memory>,
    pub budget: Option<Memory>,
    pub uptime: Duration,
    pub errors: LastErrors,
}

impl Snapshot {
    /// The policy of that name.
    pub fn of(&self, name: &str) -> Option<&Status> {
        self.policies.iter().find(|status| status.offer.name == name)
    }
}

/// A request that was let through. Dropping it gives the slot back.
#[derive(Debug)]
pub struct Lease {
    pub engine: Arc<Engine>,
    /// How long the request waited, the start of the engine included.
    pub waited: Duration,
    ticket: Ticket,
    owner: Owner,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.owner.send(Message::Happened(Input::Finish(self.ticket)));
    }
}

/// A request that waits. Dropping it takes it out of the queue.
struct Place {
    ticket: Ticket,
    owner: Owner,
    over: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.over {
            self.owner.send(Message::Happened(Input::Leave(self.ticket)));
        }
    }
}

impl Owner {
    /// Starts the owner's task. The second value resolves when it has ended, and with it every engine.
    pub fn start(
        offers: Vec<Offer>,
        catalog: Arc<dyn Catalog>,
        surroundings: Surroundings,
        limits: Limits,
        learned: memory::Learned,
        notices: broadcast::Sender<Notice>,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (messages, inbox) = mpsc::unbounded_channel();
        let (reports, heard) = mpsc::unbounded_channel();
        let (publish, directory) = watch::channel(Directory::default());
        let owner = Self { messages, tickets: Arc::default(), notices, directory };
        let mut task = Task {
            publish,
            began: Instant::now(),
            budget: limits.budget,
            scheduler: Scheduler::new(limits),
            waiting: HashMap::new(),
            engines: BTreeMap::new(),
            offers: BTreeMap::new(),
            errors: BTreeMap::new(),
            last: LastErrors::default(),
            free: None,
            learned,
            catalog,
            surroundings: Arc::new(surroundings),
            tasks: JoinSet::new(),
            reports,
            owner: owner.clone(),
            ending: None,
        };
        task.replace(offers);
        let running = tokio::spawn(task.run(inbox, heard));
        (owner, running)
    }

    /// Tells the owner. After its end nobody listens, which is fine.
    pub fn send(&self, message: Message) {
        let _ = self.messages.send(message);
    }

    /// The policy that a client means: by name, else by alias. One that names none means the only one.
    ///
    /// # Errors
    /// The error for the client when there is none.
    pub fn find(&self, asked: Option<&str>) -> Result<Arc<Offer>, ApiError> {
        let offers = Arc::clone(&self.directory.borrow());
        let Some(asked) = asked else {
            return match offers.as_slice() {
                [only] => Ok(Arc::clone(only)),
                _ => Err(ApiError::param("model", "`model` is missing: several models are served")),
            };
        };
        let named = offers.iter().find(|offer| offer.name == asked);
        let alias = || offers.iter().find(|offer| offer.aliases.iter().any(|alias| alias == asked));
        named.or_else(alias).cloned().ok_or_else(|| {
            let known: Vec<&str> = offers.iter().map(|offer| offer.name.as_str()).collect();
            ApiError::no_such_model(asked, &known)
        })
    }

    /// News for whoever watches.
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        self.notices.subscribe()
    }

    /// Tells whoever watches. Errors are kept for those who look later.
    pub fn notify(&self, what: What) {
        let notice = Notice::new(what);
        if let Some(error) = PastError::of(&notice) {
            self.send(Message::Failed(error));
        }
        let _ = self.notices.send(notice);
    }

    /// Waits until a request is let through. Dropping the future takes it out of the queue.
    ///
    /// # Errors
    /// Why the scheduler refuses it.
    pub async fn lease(&self, policy: &str, client: &str, slot: bool) -> Result<Lease, ApiError> {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (answer, granted) = oneshot::channel();
        let mut place = Place { ticket, owner: self.clone(), over: false };
        let (policy, client) = (policy.to_owned(), client.to_owned());
        self.send(Message::Arrived { ticket, policy: policy.clone(), client, slot, answer });
        let lease = granted.await;
        place.over = true;
        match lease {
            Ok(Ok(lease)) => Ok(lease),
            Ok(Err(refusal)) => Err(ApiError::refused(&policy, &refusal)),
            Err(_) => Err(ApiError::refused(&policy, &Refusal::Draining)),
        }
    }

    /// What there is to see now.
    ///
    /// # Errors
    /// When the gateway is ending.
    pub async fn look(&self) -> Result<Snapshot, ApiError> {
        let (answer, seen) = oneshot::channel();
        self.send(Message::Look(answer));
        seen.await.map_err(|_| ApiError::refused("", &Refusal::Draining))
    }
}

/// A request that waits: when it came, and where the answer goes.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    policy: String,
    answer: oneshot::Sender<Result<Lease, Refusal>>,
}

/// An engine's task, and the engine once it is ready.
#[derive(Debug)]
struct Running {
    engine: Option<Arc<Engine>>,
    stop: Option<oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Task {
    publish: watch::Sender<Directory>,
    began: Instant,
    budget: Option<Memory>,
    scheduler: Scheduler,
    waiting: HashMap<Ticket, Waiting>,
    engines: BTreeMap<String, Running>,
    offers: BTreeMap<String, Arc<Offer>>,
    /// The last error of each engine.
    errors: BTreeMap<String, String>,
    /// The last errors of everything.
    last: LastErrors,
    free: Option<Memory>,
    learned: memory::Learned,
    catalog: Arc<dyn Catalog>,
    surroundings: Arc<Surroundings>,
    /// The tasks of the engines, and where they report.
    tasks: JoinSet<()>,
    reports: Reports,
    owner: Owner,
    /// When what still runs is ended.
    ending: Option<Instant>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>, mut heard: mpsc::UnboundedReceiver<Report>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut count = 0_u32;
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.take(message),
                    None => return,
                },
                Some(report) = heard.recv() => self.hear(report),
                _ = ticks.tick() => {
                    count = count.wrapping_add(1);
                    self.tick(count);
                }
            }
            if self.ending.is_some_and(|end| self.is_over(end)) {
                return self.end().await;
            }
        }
    }

    fn is_over(&self, end: Instant) -> bool {
        self.scheduler.is_at_rest() || Instant::now() >= end
    }

    /// Ends what has not ended by itself, and waits for it.
    async fn end(mut self) {
        let stops = self.engines.into_values().filter_map(|running| running.stop);
        for stop in stops {
            let _ = stop.send(());
        }
        while self.tasks.join_next().await.is_some() {}
    }

    fn tick(&mut self, count: u32) {
        while self.tasks.try_join_next().is_some() {}
        self.free = memory::free();
        let input = self.free.map_or(Input::Tick, Input::Free);
        self.step(input);
        if count.is_multiple_of(RELOAD) && self.ending.is_none() {
            let (catalog, owner) = (Arc::clone(&self.catalog), self.owner.clone());
            tokio::task::spawn_blocking(move || match catalog.offers() {
                Ok(Some(offers)) => owner.send(Message::Offers(offers)),
                Ok(None) => {}
                Err(why) => owner.notify(What::Problem { text: why }),
            });
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Arrived { ticket, policy, client, slot, answer } => {
                let waiting = Waiting { since: Instant::now(), policy: policy.clone(), answer };
                self.waiting.insert(ticket, waiting);
                self.step(Input::Arrive { ticket, policy, client, slot });
            }
            Message::Happened(input) => {
                self.note(&input);
                self.step(input);
            }
            Message::Offers(offers) => self.replace(offers),
            Message::Failed(error) => self.last.push(error),
            Message::Look(answer) => drop(answer.send(self.snapshot())),
            Message::End(patience) => {
                self.ending = Some(Instant::now() + patience);
                self.step(Input::Drain);
            }
        }
    }

    fn hear(&mut self, report: Report) {
        match report {
            Report::Started(policy, engine) => {
                let load_ms = u64::try_from(engine.load.as_millis()).unwrap_or(u64::MAX);
                self.owner.notify(What::Loaded { policy: policy.clone(), load_ms });
                self.errors.remove(&policy);
                if let Some(running) = self.engines.get_mut(&policy) {
                    running.engine = Some(engine);
                }
                self.step(Input::Started(policy));
            }
            Report::Measured(policy, peak) => self.measured(policy, peak),
            Report::Over(input) => {
                // Who waits for this engine's memory need not wait for the next tick.
                self.free = memory::free();
                self.note(&input);
                self.step(input);
            }
        }
    }

    /// Keeps what people want to know about an input.
    fn note(&mut self, input: &Input) {
        match input {
            Input::Leave(ticket) => drop(self.waiting.remove(ticket)),
            Input::StartFailed { policy, why, .. } | Input::Died { policy, why } => {
                self.engines.remove(policy);
                self.errors.insert(policy.clone(), why.clone());
                self.owner.notify(What::Failed { policy: policy.clone(), why: why.clone() });
            }
            Input::Stopped(policy) => {
                self.engines.remove(policy);
                self.owner.notify(What::Unloaded { policy: policy.clone() });
            }
            _ => {}
        }
    }

    fn measured(&mut self, policy: String, peak: Memory) {
        let Some(offer) = self.offers.get(&policy) else { return };
        if let Some(need) = self.learned.learn(offer, peak) {
            self.step(Input::Learned { policy, need });
        }
    }

    fn replace(&mut self, offers: Vec<Offer>) {
        let terms = offers.iter().map(|offer| (offer.name.clone(), offer.terms(self.learned.of(offer))));
        let terms = terms.collect();
        let listed = |offers: &BTreeMap<String, Arc<Offer>>| -> Vec<Json> {
            offers.values().map(|offer| offer.listed(&Json::Null)).collect()
        };
        let before = listed(&self.offers);
        self.offers = offers.into_iter().map(|offer| (offer.name.clone(), Arc::new(offer))).collect();
        self.publish.send_replace(Arc::new(self.offers.values().cloned().collect()));
        self.step(Input::Policies(terms));
        // A policy that is only to be tried again is to clients as it was.
        if listed(&self.offers) != before {
            self.owner.notify(What::Policies { names: self.offers.keys().cloned().collect() });
        }
    }

    fn step(&mut self, input: Input) {
        for action in self.scheduler.step(self.began.elapsed(), input) {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Grant(ticket) => self.grant(ticket),
            Action::Refuse(ticket, why) => {
                if let Some(waiting) = self.waiting.remove(&ticket) {
                    let _ = waiting.answer.send(Err(why));
                }
            }
            Action::Start(policy) => {
                self.owner.notify(What::Loading { policy: policy.clone() });
                let (stop, stopped) = oneshot::channel();
                self.engines.insert(policy.clone(), Running { engine: None, stop: Some(stop) });
                let (catalog, surroundings) = (Arc::clone(&self.catalog), Arc::clone(&self.surroundings));
                self.tasks.spawn(instance::run(policy, catalog, surroundings, self.reports.clone(), stopped));
            }
            Action::Stop(policy) => {
                if let Some(stop) = self.engines.get_mut(&policy).and_then(|running| running.stop.take()) {
                    let _ = stop.send(());
                }
            }
        }
    }

    fn grant(&mut self, ticket: Ticket) {
        let waiting = self.waiting.remove(&ticket);
        let engine = waiting.as_ref().and_then(|waiting| self.engines.get(&waiting.policy)?.engine.clone());
        let (Some(waiting), Some(engine)) = (waiting, engine) else {
            return self.owner.send(Message::Happened(Input::Finish(ticket)));
        };
        let lease = Lease { engine, waited: waiting.since.elapsed(), ticket, owner: self.owner.clone() };
        // A client that has just gone: the lease comes back and is dropped, which gives the slot back.
        let _ = waiting.answer.send(Ok(lease));
    }

    fn snapshot(&self) -> Snapshot {
        let now = self.began.elapsed();
        let status = |(name, view): (&str, View)| {
            let offer = Arc::clone(self.offers.get(name)?);
            let failed = match &view.state {
                State::Failed { why, .. } => Some(why.clone()),
                _ => self.errors.get(name).cloned(),
            };
            Some(Status {
                engine: self.engines.get(name).and_then(|running| running.engine.clone()),
                idle: now.saturating_sub(view.used),
                peak: self.learned.peak(&offer),
                error: failed,
                offer,
                view,
            })
        };
        Snapshot {
            policies: self.scheduler.views().filter_map(status).collect(),
            running: self.scheduler.running(),
            free: self.free,
            budget: self.budget,
            uptime: now,
            errors: self.last.clone(),
        }
    }
}

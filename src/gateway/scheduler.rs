//! Decides which request is let through, which engine starts and which one ends. Pure: no clock, no tasks, no processes; the
//! owner feeds it [`Input`]s with the time and carries out the [`Action`]s.
//!
//! The rules:
//!
//! - A request waits in the queue of its policy. A queue is bounded and fair: its clients take turns.
//! - A policy lets through as many requests at a time as its engine has slots. Requests that need no slot pass beside them.
//! - An engine starts for the request that has waited longest, when the memory it needs is within the budget and really free.
//! - Only idle engines end to make room, the one used longest ago first. An engine that is busy keeps taking requests of its own
//!   policy until another policy has waited longer than [`Limits::longest_wait`]; then it takes no more, and ends when it is idle.
//! - An engine that dies starts again after a pause that doubles with each failure. After [`Limits::failures`] in a row it starts
//!   only on demand of a person (load), or when its policy changes.
//! - A client that leaves the queue never starts or ends an engine.

mod queue;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use self::queue::{Queue, Waiter};

/// A request, from its arrival to its end.
pub type Ticket = u64;
/// Time since the gateway started.
pub type Now = Duration;

/// The first pause after an engine failed, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// An engine that served this long before it died counts as having worked.
const WORKED: Duration = Duration::from_secs(30);

/// Memory in bytes: of the machine, and of its GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Memory {
    /// Of the machine's memory.
    pub ram_bytes: u64,
    /// Of all GPUs together.
    pub gpu_bytes: u64,
}

impl Memory {
    fn plus(self, other: Self) -> Self {
        Self {
            ram_bytes: self.ram_bytes.saturating_add(other.ram_bytes),
            gpu_bytes: self.gpu_bytes.saturating_add(other.gpu_bytes),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            ram_bytes: self.ram_bytes.saturating_sub(other.ram_bytes),
            gpu_bytes: self.gpu_bytes.saturating_sub(other.gpu_bytes),
        }
    }

    fn fits(self, room: Self) -> bool {
        self.ram_bytes <= room.ram_bytes && self.gpu_bytes <= room.gpu_bytes
    }
}

/// What holds for all policies together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests that may wait for one policy.
    pub queue: usize,
    /// How long a policy waits for memory that busy engines of other policies hold before those take no new requests.
    pub longest_wait: Duration,
    /// How long to wait for memory to become really free before a request is refused.
    pub patience: Duration,
    /// What all engines may hold together. None when the machine does not tell.
    pub budget: Option<Memory>,
    /// Engines that may be loaded at a time.
    pub loaded: Option<usize>,
    /// Policies that may be loaded together; when there are none, any may.
    pub groups: Vec<BTreeSet<String>>,
    /// Failures in a row after which an engine is not started again by requests.
    pub failures: u32,
}

/// What holds for one policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// Changes whenever anything that its engine was started with changes.
    pub version: String,
    /// Requests at a time.
    pub slots: u32,
    /// Memory that its engine needs: estimated, or learned.
    pub need: Memory,
    /// Ends the engine when it was not used for this long.
    pub idle_timeout: Option<Duration>,
}

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// A request for a policy.
    Arrive {
        /// Names the request.
        ticket: Ticket,
        /// The policy's name.
        policy: String,
        /// Who takes turns with others in the queue.
        client: String,
        /// False for requests that need no slot of the engine.
        slot: bool,
    },
    /// The client of a waiting request has gone.
    Leave(Ticket),
    /// A request that was let through has ended.
    Finish(Ticket),
    /// The engine of a policy is ready.
    Started(String),
    /// The engine of a policy could not be started.
    StartFailed {
        /// The policy's name.
        policy: String,
        /// The error, with the engine's last words.
        why: String,
        /// It would fail again until something changes.
        permanent: bool,
    },
    /// An engine that was ready has died.
    Died {
        /// The policy's name.
        policy: String,
        /// How it ended, with its last words.
        why: String,
    },
    /// An engine has ended as it was told to.
    Stopped(String),
    /// What is free on this machine now.
    Free(Memory),
    /// Somebody wants the policy's engine loaded.
    Load(String),
    /// Somebody wants the policy's engine to end.
    Unload(String),
    /// The policies there are now.
    Policies(BTreeMap<String, Terms>),
    /// What an engine really needs was measured.
    Learned {
        /// The policy's name.
        policy: String,
        /// What it needs from now on.
        need: Memory,
    },
    /// The gateway ends: nothing new is let through or started.
    Drain,
    /// Only time has passed.
    Tick,
}

/// What the owner must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Let a waiting request through.
    Grant(Ticket),
    /// Refuse a waiting request.
    Refuse(Ticket, Refusal),
    /// Start the engine of a policy.
    Start(String),
    /// End the engine of a policy.
    Stop(String),
}

/// Why a request is not let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The policy is not there, or no longer.
    Unknown(String),
    /// As many requests wait for the policy as may.
    QueueFull {
        /// How many.
        waiting: usize,
    },
    /// The engine does not work.
    Failed {
        /// The error, with the engine's last words.
        why: String,
        /// When it may be tried again; None when only a change helps.
        retry: Option<Duration>,
    },
    /// It can never be loaded.
    TooLarge {
        /// What its engine needs.
        need: Memory,
        /// What all engines may hold together.
        room: Memory,
    },
    /// It cannot be loaded now: other programs hold the memory.
    NoMemory {
        /// What its engine needs.
        need: Memory,
        /// What is free.
        free: Memory,
    },
    /// The gateway is ending.
    Draining,
}

/// What an engine is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// There is none.
    Stopped,
    /// It loads its model.
    Starting,
    /// It takes requests.
    Ready,
    /// It was told to end.
    Stopping,
    /// It did not start, or died.
    Failed {
        /// The error, with the engine's last words.
        why: String,
        /// When requests may start it again; None: not before something changes.
        until: Option<Now>,
    },
}

#[derive(Debug)]
struct Entry {
    terms: Terms,
    state: State,
    queue: Queue,
    /// Requests that were let through: all, and those that hold a slot.
    running: u32,
    slots_used: u32,
    /// When its engine started or was last used.
    used: Now,
    ready_since: Now,
    /// Takes no new requests, and ends when it is idle.
    leaving: bool,
    /// Somebody asked for it to be loaded, when.
    wanted: Option<Now>,
    /// Memory has been waited for since then.
    starved: Option<Now>,
    /// Failures in a row.
    failures: u32,
    /// No longer among the policies.
    gone: bool,
}

impl Entry {
    fn new(terms: Terms) -> Self {
        Self {
            terms,
            state: State::Stopped,
            queue: Queue::default(),
            running: 0,
            slots_used: 0,
            used: Now::ZERO,
            ready_since: Now::ZERO,
            leaving: false,
            wanted: None,
            starved: None,
            failures: 0,
            gone: false,
        }
    }

    /// Whether its engine holds memory, or soon will.
    fn is_active(&self) -> bool {
        matches!(self.state, State::Starting | State::Ready | State::Stopping)
    }

    fn is_idle(&self) -> bool {
        self.state == State::Ready && self.running == 0
    }

    /// Since when somebody has waited for it to start.
    fn waiting_since(&self) -> Option<Now> {
        [self.queue.oldest(), self.wanted].into_iter().flatten().min()
    }

    fn may_start(&self, now: Now) -> bool {
        match &self.state {
            State::Stopped => true,
            State::Failed { until, .. } => until.is_some_and(|until| until <= now),
            State::Starting | State::Ready | State::Stopping => false,
        }
    }
}

/// A policy as the outside sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// What its engine is doing.
    pub state: State,
    /// Requests that were let through and have not ended.
    pub running: u32,
    /// Requests in the queue.
    pub waiting: usize,
    /// Memory that its engine needs.
    pub need: Memory,
    /// When its engine was last used.
    pub used: Now,
}

/// The state of all policies and requests.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    entries: BTreeMap<String, Entry>,
    /// Requests that were let through, and whether they hold a slot.
    running: BTreeMap<Ticket, (String, bool)>,
    free: Option<Memory>,
    draining: bool,
}

impl Scheduler {
    /// No policies yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, entries: BTreeMap::new(), running: BTreeMap::new(), free: None, draining: false }
    }

    /// Every policy that there is.
    pub fn views(&self) -> impl Iterator<Item = (&str, View)> {
        let present = self.entries.iter().filter(|(_, entry)| !entry.gone);
        present.map(|(name, entry)| {
            let view = View {
                state: entry.state.clone(),
                running: entry.running,
                waiting: entry.queue.len(),
                need: entry.terms.need,
                used: entry.used,
            };
            (name.as_str(), view)
        })
    }

    /// Requests that were let through and have not ended.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Whether no engine holds memory.
    pub fn is_at_rest(&self) -> bool {
        !self.entries.values().any(Entry::is_active)
    }

    /// Takes in what happened at `now`, and says what is to be done.
    pub fn step(&mut self, now: Now, input: Input) -> Vec<Action> {
        let mut actions = Vec::new();
        self.take_in(now, input, &mut actions);
        if !self.draining {
            self.let_through(now, &mut actions);
            self.start_engines(now, &mut actions);
        }
        self.end_engines(now, &mut actions);
        actions
    }

    fn take_in(&mut self, now: Now, input: Input, actions: &mut Vec<Action>) {
        match input {
            Input::Arrive { ticket, policy, client, slot } => {
                self.arrive(now, &policy, Waiter { ticket, client, slot, since: now }, actions);
            }
            Input::Leave(ticket) => {
                for entry in self.entries.values_mut() {
                    entry.queue.remove(ticket);
                }
            }
            Input::Finish(ticket) => self.finish(now, ticket),
            Input::Started(policy) => {
                if let Some(entry) = self.entries.get_mut(&policy) {
                    (entry.state, entry.used, entry.ready_since) = (State::Ready, now, now);
                    (entry.wanted, entry.starved) = (None, None);
                    // Until it is measured again.
                    self.free = self.free.map(|free| free.minus(entry.terms.need));
                }
            }
            Input::StartFailed { policy, why, permanent } => self.fail(now, &policy, &why, permanent, actions),
            Input::Died { policy, why } => self.fail(now, &policy, &why, false, actions),
            Input::Stopped(policy) => {
                if let Some(entry) = self.entries.get_mut(&policy) {
                    (entry.state, entry.leaving) = (State::Stopped, false);
                }
                self.entries.retain(|_, entry| !entry.gone || entry.is_active());
            }
            Input::Free(free) => self.free = Some(free),
            Input::Load(policy) => self.load(now, &policy),
            Input::Unload(policy) => self.unload(&policy, actions),
            Input::Policies(policies) => self.replace(policies, actions),
            Input::Learned { policy, need } => {
                if let Some(entry) = self.entries.get_mut(&policy) {
                    entry.terms.need = need;
                }
            }
            Input::Drain => {
                self.draining = true;
                for entry in self.entries.values_mut() {
                    (entry.wanted, entry.leaving) = (None, true);
                    let waiting = entry.queue.drain();
                    actions.extend(waiting.map(|waiter| Action::Refuse(waiter.ticket, Refusal::Draining)));
                }
            }
            Input::Tick => {}
        }
    }

    fn arrive(&mut self, now: Now, policy: &str, waiter: Waiter, actions: &mut Vec<Action>) {
        let ticket = waiter.ticket;
        let limit = self.limits.queue;
        let draining = self.draining;
        let refusal = match self.entries.get_mut(policy) {
            _ if draining => Refusal::Draining,
            Some(entry) if !entry.gone => match &entry.state {
                State::Failed { why, until } if until.is_none_or(|until| until > now) => {
                    Refusal::Failed { why: why.clone(), retry: until.map(|until| until.saturating_sub(now)) }
                }
                _ if entry.queue.len() >= limit => Refusal::QueueFull { waiting: entry.queue.len() },
                _ => return entry.queue.push(waiter),
            },
            _ => Refusal::Unknown(policy.to_owned()),
        };
        actions.push(Action::Refuse(ticket, refusal));
    }

    fn finish(&mut self, now: Now, ticket: Ticket) {
        let Some((policy, slot)) = self.running.remove(&ticket) else { return };
        if let Some(entry) = self.entries.get_mut(&policy) {
            entry.running = entry.running.saturating_sub(1);
            entry.slots_used = entry.slots_used.saturating_sub(u32::from(slot));
            entry.used = now;
        }
    }

    /// An engine could not start, or died. Whoever waits for it is told why.
    fn fail(&mut self, now: Now, policy: &str, why: &str, permanent: bool, actions: &mut Vec<Action>) {
        let most = self.limits.failures;
        let Some(entry) = self.entries.get_mut(policy) else { return };
        if entry.state == State::Ready && now.saturating_sub(entry.ready_since) >= WORKED {
            entry.failures = 0;
        }
        entry.failures += 1;
        let pause = PAUSE.saturating_mul(1 << (entry.failures - 1).min(16)).min(LONGEST_PAUSE);
        let until = (!permanent && entry.failures < most).then(|| now + pause);
        entry.state = State::Failed { why: why.to_owned(), until };
        (entry.wanted, entry.starved, entry.leaving) = (None, None, false);
        let refusal = Refusal::Failed { why: why.to_owned(), retry: until.map(|until| until.saturating_sub(now)) };
        actions.extend(entry.queue.drain().map(|waiter| Action::Refuse(waiter.ticket, refusal.clone())));
        self.entries.retain(|_, entry| !entry.gone || entry.is_active());
    }

    fn load(&mut self, now: Now, policy: &str) {
        let Some(entry) = self.entries.get_mut(policy).filter(|entry| !entry.gone) else { return };
        match entry.state {
            State::Starting | State::Ready => entry.leaving = false,
            State::Failed { .. } => {
                (entry.state, entry.failures, entry.wanted) = (State::Stopped, 0, Some(now));
            }
            State::Stopped | State::Stopping => entry.wanted = Some(now),
        }
    }

    fn unload(&mut self, policy: &str, actions: &mut Vec<Action>) {
        let Some(entry) = self.entries.get_mut(policy) else { return };
        entry.wanted = None;
        match entry.state {
            State::Starting | State::Ready => entry.leaving = true,
            State::Failed { .. } => (entry.state, entry.failures) = (State::Stopped, 0),
            State::Stopped | State::Stopping => {}
        }
        // Who waits for an engine that a person has just unloaded would start it again.
        if matches!(entry.state, State::Stopped | State::Starting) {
            let refusal = Refusal::Failed { why: "it was unloaded".to_owned(), retry: Some(PAUSE) };
            actions.extend(entry.queue.drain().map(|waiter| Action::Refuse(waiter.ticket, refusal.clone())));
        }
    }

    /// Takes over the policies there are now. Engines of unchanged ones are not touched.
    fn replace(&mut self, mut policies: BTreeMap<String, Terms>, actions: &mut Vec<Action>) {
        for (name, entry) in &mut self.entries {
            let Some(terms) = policies.remove(name) else {
                (entry.gone, entry.leaving, entry.wanted) = (true, true, None);
                let gone = |waiter: Waiter| Action::Refuse(waiter.ticket, Refusal::Unknown(name.clone()));
                actions.extend(entry.queue.drain().map(gone));
                continue;
            };
            let back = std::mem::take(&mut entry.gone);
            if terms.version != entry.terms.version {
                entry.leaving = true;
                entry.failures = 0;
                if matches!(entry.state, State::Failed { .. }) {
                    entry.state = State::Stopped;
                }
                entry.terms = terms;
            } else {
                if back {
                    entry.leaving = false;
                }
                // What was learned about its memory stays.
                entry.terms = Terms { need: entry.terms.need, ..terms };
            }
            if !entry.is_active() {
                entry.leaving = false;
            }
        }
        self.entries.retain(|_, entry| !entry.gone || entry.is_active());
        self.entries.extend(policies.into_iter().map(|(name, terms)| (name, Entry::new(terms))));
    }

    /// Grants what can be granted on engines that are ready.
    fn let_through(&mut self, now: Now, actions: &mut Vec<Action>) {
        let starving = self.starving(now);
        for (name, entry) in &mut self.entries {
            if entry.state != State::Ready || entry.leaving {
                continue;
            }
            loop {
                let since = entry.queue.oldest();
                let yields = starving.as_ref().is_some_and(|(other, starved)| other != name && Some(*starved) < since);
                if yields {
                    break;
                }
                let slot = entry.slots_used < entry.terms.slots.max(1);
                let Some(waiter) = entry.queue.pop(slot) else { break };
                entry.running += 1;
                entry.slots_used += u32::from(waiter.slot);
                entry.used = now;
                self.running.insert(waiter.ticket, (name.clone(), waiter.slot));
                actions.push(Action::Grant(waiter.ticket));
            }
        }
    }

    /// The policy for whose sake busy engines take no new requests: it has waited for memory longer than is fair.
    fn starving(&self, now: Now) -> Option<(String, Now)> {
        let longest = self.limits.longest_wait;
        let waits = self.entries.iter().filter_map(|(name, entry)| {
            let since = entry.waiting_since().filter(|_| entry.starved.is_some() && entry.may_start(now))?;
            (now.saturating_sub(since) > longest).then_some((since, name))
        });
        waits.min().map(|(since, name)| (name.clone(), since))
    }

    /// Starts the engines that are waited for, the longest wait first, and ends idle ones that are in their way.
    fn start_engines(&mut self, now: Now, actions: &mut Vec<Action>) {
        let mut due: Vec<(Now, String)> = Vec::new();
        for (name, entry) in &self.entries {
            if let Some(since) = entry.waiting_since().filter(|_| entry.may_start(now)) {
                due.push((since, name.clone()));
            }
        }
        due.sort();
        for (_, name) in due {
            if !self.try_start(now, &name, actions) {
                // Those behind it must not take the memory that it waits for.
                break;
            }
        }
    }

    /// Starts one engine. False when it must wait.
    fn try_start(&mut self, now: Now, name: &str, actions: &mut Vec<Action>) -> bool {
        let Some(need) = self.entries.get(name).map(|entry| entry.terms.need) else { return true };
        if let Some(room) = self.limits.budget.filter(|room| !need.fits(*room)) {
            self.refuse_all(name, &Refusal::TooLarge { need, room }, actions);
            return true;
        }
        if !self.has_room(name, need) {
            let victims: Vec<String> = self.victims(name, need);
            for victim in victims {
                self.stop(&victim, actions);
            }
            self.starve(name, now);
            return false;
        }
        // Two places that free memory is told of: engines that are starting have not taken theirs yet.
        let reserved = self.sum(|entry| entry.state == State::Starting);
        match self.free.filter(|free| !need.plus(reserved).fits(*free)) {
            None => {}
            Some(free) => {
                let since = self.starve(name, now);
                let ending = self.entries.values().any(|entry| entry.state == State::Stopping);
                let victim = (!ending).then(|| self.least_used(name)).flatten();
                if let Some(victim) = victim {
                    self.stop(&victim, actions);
                } else if !ending && now.saturating_sub(since) > self.limits.patience {
                    self.refuse_all(name, &Refusal::NoMemory { need, free }, actions);
                    return true;
                }
                return false;
            }
        }
        if let Some(entry) = self.entries.get_mut(name) {
            (entry.state, entry.leaving, entry.starved) = (State::Starting, false, None);
            actions.push(Action::Start(name.to_owned()));
        }
        true
    }

    /// Notes that a policy waits for memory, and since when.
    fn starve(&mut self, name: &str, now: Now) -> Now {
        let entry = self.entries.get_mut(name);
        entry.map_or(now, |entry| *entry.starved.get_or_insert(now))
    }

    fn refuse_all(&mut self, name: &str, refusal: &Refusal, actions: &mut Vec<Action>) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        (entry.wanted, entry.starved) = (None, None);
        actions.extend(entry.queue.drain().map(|waiter| Action::Refuse(waiter.ticket, refusal.clone())));
    }

    fn sum(&self, counts: impl Fn(&Entry) -> bool) -> Memory {
        let counted = self.entries.values().filter(|entry| counts(entry));
        counted.fold(Memory::default(), |sum, entry| sum.plus(entry.terms.need))
    }

    /// Whether an engine may be loaded beside those that are.
    fn has_room(&self, name: &str, need: Memory) -> bool {
        self.has_room_without(name, need, &BTreeSet::new())
    }

    fn has_room_without(&self, name: &str, need: Memory, without: &BTreeSet<&str>) -> bool {
        let others: Vec<(&str, &Entry)> = self.entries.iter().map(|(other, entry)| (other.as_str(), entry)).collect();
        let stay =
            others.iter().filter(|(other, entry)| *other != name && entry.is_active() && !without.contains(other));
        let (mut held, mut count) = (need, 1);
        for (other, entry) in stay {
            if !self.may_be_together(name, other) {
                return false;
            }
            held = held.plus(entry.terms.need);
            count += 1;
        }
        self.limits.budget.is_none_or(|budget| held.fits(budget)) && self.limits.loaded.is_none_or(|most| count <= most)
    }

    fn may_be_together(&self, one: &str, other: &str) -> bool {
        let groups = &self.limits.groups;
        groups.is_empty() || groups.iter().any(|group| group.contains(one) && group.contains(other))
    }

    /// The idle engines that must end so that another fits; none when that would not be enough, or when enough are ending.
    fn victims(&self, name: &str, need: Memory) -> Vec<String> {
        let ending = self.entries.iter().filter(|(_, entry)| entry.state == State::Stopping);
        let mut without: BTreeSet<&str> = ending.map(|(name, _)| name.as_str()).collect();
        let mut idle: Vec<(&Now, &str)> = Vec::new();
        for (other, entry) in &self.entries {
            if entry.is_idle() && other != name && (entry.queue.len() == 0 || self.yields_to(entry, name)) {
                idle.push((&entry.used, other));
            }
        }
        idle.sort();
        let mut victims = Vec::new();
        for (_, other) in idle {
            if self.has_room_without(name, need, &without) {
                return victims;
            }
            without.insert(other);
            victims.push(other.to_owned());
        }
        if self.has_room_without(name, need, &without) { victims } else { Vec::new() }
    }

    /// Whether an idle engine with waiting requests goes first all the same: those have come later.
    fn yields_to(&self, entry: &Entry, name: &str) -> bool {
        let other = self.entries.get(name).and_then(Entry::waiting_since);
        other.zip(entry.queue.oldest()).is_some_and(|(other, own)| other < own)
    }

    /// The idle engine that was used longest ago.
    fn least_used(&self, but: &str) -> Option<String> {
        let idle = self.entries.iter().filter(|(name, entry)| name.as_str() != but && entry.is_idle());
        let oldest = idle.filter(|(_, entry)| entry.queue.len() == 0).min_by_key(|(_, entry)| entry.used);
        oldest.map(|(name, _)| name.clone())
    }

    fn stop(&mut self, name: &str, actions: &mut Vec<Action>) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.state = State::Stopping;
            actions.push(Action::Stop(name.to_owned()));
        }
    }

    /// Ends engines that leave, or that nobody has used for their idle time.
    fn end_engines(&mut self, now: Now, actions: &mut Vec<Action>) {
        let over = |entry: &Entry| {
            let timeout = entry.terms.idle_timeout.filter(|_| entry.queue.len() == 0);
            timeout.is_some_and(|timeout| now.saturating_sub(entry.used) >= timeout)
        };
        let ending: Vec<String> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.is_idle() && (entry.leaving || over(entry)))
            .map(|(name, _)| name.clone())
            .collect();
        for name in ending {
            self.stop(&name, actions);
        }
    }
}

#[cfg(test)]
mod tests;

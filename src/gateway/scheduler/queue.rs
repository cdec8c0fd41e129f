//! The requests that wait for one policy. Clients take turns; within one client the first to come is the first to go.

use std::collections::VecDeque;

use super::{Now, Ticket};

/// A request that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiter {
    pub ticket: Ticket,
    pub client: String,
    /// Whether it needs one of the engine's slots.
    pub slot: bool,
    pub since: Now,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    /// One for each client, in the order of their turns; never empty.
    lanes: VecDeque<VecDeque<Waiter>>,
    /// Requests that need no slot: they pass the others.
    light: VecDeque<Waiter>,
    len: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, waiter: Waiter) {
        self.len += 1;
        if !waiter.slot {
            return self.light.push_back(waiter);
        }
        let own = |lane: &&mut VecDeque<Waiter>| lane.front().is_some_and(|first| first.client == waiter.client);
        match self.lanes.iter_mut().find(own) {
            Some(lane) => lane.push_back(waiter),
            None => self.lanes.push_back(VecDeque::from([waiter])),
        }
    }

    /// The next one to go; only one that needs no slot when no `slot` is free.
    pub(super) fn pop(&mut self, slot: bool) -> Option<Waiter> {
        let next = match self.light.pop_front() {
            Some(light) => light,
            None if slot => {
                let mut lane = self.lanes.pop_front()?;
                let first = lane.pop_front()?;
                if !lane.is_empty() {
                    self.lanes.push_back(lane);
                }
                first
            }
            None => return None,
        };
        self.len -= 1;
        Some(next)
    }

    pub(super) fn remove(&mut self, ticket: Ticket) {
        for lane in self.lanes.iter_mut().chain([&mut self.light]) {
            lane.retain(|waiter| waiter.ticket != ticket);
        }
        self.lanes.retain(|lane| !lane.is_empty());
        self.len = self.light.len() + self.lanes.iter().map(VecDeque::len).sum::<usize>();
    }

    /// Everybody, in no particular order.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Waiter> + use<> {
        let all = std::mem::take(self);
        all.light.into_iter().chain(all.lanes.into_iter().flatten())
    }

    /// When the one that has waited longest came.
    pub(super) fn oldest(&self) -> Option<Now> {
        self.lanes.iter().filter_map(VecDeque::front).chain(self.light.front()).map(|waiter| waiter.since).min()
    }
}

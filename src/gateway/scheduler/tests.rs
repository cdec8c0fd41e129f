use super::*;

const GIB: u64 = 1 << 30;

fn limits() -> Limits {
    Limits {
        queue: 4,
        longest_wait: Duration::from_secs(10),
        patience: Duration::from_secs(30),
        budget: Some(Memory { ram_bytes: 10 * GIB, gpu_bytes: 0 }),
        loaded: None,
        groups: Vec::new(),
        failures: 3,
    }
}

fn terms(gib: u64) -> Terms {
    let need = Memory { ram_bytes: gib * GIB, gpu_bytes: 0 };
    Terms { version: "1".to_owned(), slots: 1, need, idle_timeout: None }
}

/// A scheduler, the seconds that have passed, and what it decided last.
struct Bench {
    scheduler: Scheduler,
    now: u64,
}

impl Bench {
    fn new(limits: Limits, policies: &[(&str, u64)]) -> Self {
        let mut bench = Self { scheduler: Scheduler::new(limits), now: 0 };
        let policies = policies.iter().map(|(name, gib)| ((*name).to_owned(), terms(*gib)));
        bench.step(Input::Policies(policies.collect()));
        bench
    }

    fn step(&mut self, input: Input) -> Vec<Action> {
        self.scheduler.step(Duration::from_secs(self.now), input)
    }

    /// Actions as words: `start a`, `grant 1`.
    fn words(&mut self, input: Input) -> Vec<String> {
        let word = |action: &Action| match action {
            Action::Grant(ticket) => format!("grant {ticket}"),
            Action::Refuse(ticket, why) => {
                let why = format!("{why:?}");
                format!("refuse {ticket} {}", why.split([' ', '(', '{']).next().unwrap_or_default())
            }
            Action::Start(policy) => format!("start {policy}"),
            Action::Stop(policy) => format!("stop {policy}"),
        };
        self.step(input).iter().map(word).collect()
    }

    fn arrive(&mut self, ticket: Ticket, policy: &str) -> Vec<String> {
        self.words(arrival(ticket, policy, "c"))
    }

    fn ready(&mut self, policy: &str) -> Vec<String> {
        self.words(Input::Started(policy.to_owned()))
    }

    fn stopped(&mut self, policy: &str) -> Vec<String> {
        self.words(Input::Stopped(policy.to_owned()))
    }

    fn died(&mut self, policy: &str) -> Vec<String> {
        self.words(Input::Died { policy: policy.to_owned(), why: "boom".to_owned() })
    }

    fn later(&mut self, seconds: u64) -> Vec<String> {
        self.now += seconds;
        self.words(Input::Tick)
    }

    fn state(&self, policy: &str) -> State {
        self.scheduler.views().find(|(name, _)| *name == policy).map(|(_, view)| view.state).unwrap()
    }
}

fn arrival(ticket: Ticket, policy: &str, client: &str) -> Input {
    Input::Arrive { ticket, policy: policy.to_owned(), client: client.to_owned(), slot: true }
}

#[test]
fn an_engine_starts_on_demand_and_requests_wait_for_it() {
    let mut bench = Bench::new(limits(), &[("a", 1)]);
    assert_eq!(bench.arrive(1, "a"), ["start a"]);
    assert!(bench.arrive(2, "a").is_empty());
    assert_eq!(bench.ready("a"), ["grant 1"], "one slot");
    assert_eq!(bench.words(Input::Finish(1)), ["grant 2"]);
    assert!(bench.words(Input::Finish(2)).is_empty());
    assert_eq!(bench.arrive(3, "b"), ["refuse 3 Unknown"]);
}

#[test]
fn queues_are_bounded_and_clients_take_turns() {
    let mut bench = Bench::new(limits(), &[("a", 1)]);
    for (ticket, client) in [(1, "x"), (2, "x"), (3, "x"), (4, "y")] {
        bench.step(arrival(ticket, "a", client));
    }
    assert_eq!(bench.arrive(5, "a"), ["refuse 5 QueueFull"]);
    assert_eq!(bench.ready("a"), ["grant 1"]);
    assert_eq!(bench.words(Input::Finish(1)), ["grant 4"], "y waits for one of x's, not for all");
    assert_eq!(bench.words(Input::Finish(4)), ["grant 2"]);
}

#[test]
fn requests_without_a_slot_pass_busy_engines() {
    let mut bench = Bench::new(limits(), &[("a", 1)]);
    bench.arrive(1, "a");
    bench.ready("a");
    bench.arrive(2, "a");
    let light = Input::Arrive { ticket: 3, policy: "a".to_owned(), client: "c".to_owned(), slot: false };
    assert_eq!(bench.words(light), ["grant 3"]);
    assert_eq!(bench.scheduler.running(), 2);
}

#[test]
fn only_idle_engines_end_and_the_one_used_longest_ago_first() {
    let mut bench = Bench::new(limits(), &[("a", 4), ("b", 4), ("c", 4)]);
    for (ticket, policy) in [(1, "a"), (2, "b")] {
        bench.arrive(ticket, policy);
        bench.ready(policy);
        bench.words(Input::Finish(ticket));
        bench.later(1);
    }
    assert_eq!(bench.arrive(3, "c"), ["stop a"]);
    assert!(bench.arrive(4, "c").is_empty(), "two that wait share one eviction");
    assert_eq!(bench.stopped("a"), ["start c"]);
    assert_eq!(bench.ready("c"), ["grant 3"]);
    // b is idle, c is busy.
    assert_eq!(bench.arrive(5, "a"), ["stop b"]);
}

#[test]
fn a_busy_engine_keeps_its_own_requests_until_another_policy_has_waited_long_enough() {
    let mut bench = Bench::new(limits(), &[("a", 6), ("b", 6)]);
    bench.arrive(1, "a");
    bench.ready("a");
    bench.later(1);
    assert!(bench.arrive(2, "b").is_empty(), "a is busy");
    bench.arrive(3, "a");
    assert_eq!(bench.words(Input::Finish(1)), ["grant 3"], "collated: no swap for one request");
    bench.later(11);
    bench.arrive(4, "a");
    assert_eq!(bench.words(Input::Finish(3)), ["stop a"], "b has waited 11 s");
    assert_eq!(bench.stopped("a"), ["start b"]);
    assert_eq!(bench.ready("b"), ["grant 2"]);
    bench.later(1);
    assert_eq!(bench.words(Input::Finish(2)), ["stop b"], "a waits, and b has nobody");
    assert_eq!(bench.stopped("b"), ["start a"]);
}

#[test]
fn who_leaves_the_queue_costs_nothing() {
    let mut bench = Bench::new(limits(), &[("a", 6), ("b", 6)]);
    bench.arrive(1, "a");
    bench.ready("a");
    bench.arrive(2, "b");
    assert!(bench.words(Input::Leave(2)).is_empty());
    assert!(bench.words(Input::Finish(1)).is_empty(), "nobody wants b: a stays loaded");
    assert_eq!(bench.state("a"), State::Ready);
}

#[test]
fn memory_must_really_be_free() {
    let free = |gib: u64| Input::Free(Memory { ram_bytes: gib * GIB, gpu_bytes: 0 });
    let mut bench = Bench::new(limits(), &[("a", 6), ("b", 3)]);
    bench.step(free(2));
    assert!(bench.arrive(1, "a").is_empty());
    assert_eq!(bench.words(free(7)), ["start a"]);
    // What a has not taken yet is not free for b.
    assert!(bench.arrive(2, "b").is_empty());
    assert_eq!(bench.ready("a"), ["grant 1"]);
    assert!(bench.words(free(1)).is_empty());
    bench.words(Input::Finish(1));
    assert_eq!(bench.state("a"), State::Stopping, "idle, and in the way");
    assert_eq!(bench.words(free(1)), Vec::<String>::new());
    bench.stopped("a");
    assert_eq!(bench.later(31), ["refuse 2 NoMemory"]);
    assert_eq!(bench.words(arrival(3, "b", "c")), Vec::<String>::new());
    assert_eq!(bench.words(free(4)), ["start b"]);
}

#[test]
fn what_can_never_fit_is_refused_at_once() {
    let mut bench = Bench::new(limits(), &[("a", 11)]);
    assert_eq!(bench.arrive(1, "a"), ["refuse 1 TooLarge"]);
}

#[test]
fn groups_and_the_number_of_loaded_engines() {
    let group = |names: [&str; 2]| names.map(str::to_owned).into_iter().collect();
    let mut bench = Bench::new(Limits { groups: vec![group(["a", "b"])], ..limits() }, &[("a", 1), ("b", 1), ("c", 1)]);
    bench.arrive(1, "a");
    bench.ready("a");
    assert_eq!(bench.arrive(2, "b"), ["start b"]);
    bench.ready("b");
    assert!(bench.arrive(3, "c").is_empty(), "both are busy");
    bench.step(Input::Finish(1));
    assert_eq!(bench.words(Input::Finish(2)), ["stop a", "stop b"]);
    let mut bench = Bench::new(Limits { loaded: Some(1), ..limits() }, &[("a", 1), ("b", 1)]);
    bench.arrive(1, "a");
    bench.ready("a");
    bench.step(Input::Finish(1));
    assert_eq!(bench.arrive(2, "b"), ["stop a"]);
}

#[test]
fn failures_pause_longer_each_time_and_then_for_good() {
    let mut bench = Bench::new(limits(), &[("a", 1)]);
    bench.arrive(1, "a");
    bench.arrive(2, "a");
    assert_eq!(bench.died("a"), ["refuse 1 Failed", "refuse 2 Failed"]);
    assert_eq!(bench.arrive(3, "a"), ["refuse 3 Failed"]);
    bench.later(1);
    assert_eq!(bench.arrive(4, "a"), ["start a"]);
    bench.died("a");
    bench.later(1);
    assert_eq!(bench.arrive(5, "a"), ["refuse 5 Failed"], "the second pause is 2 s");
    bench.later(1);
    assert_eq!(bench.arrive(6, "a"), ["start a"]);
    bench.died("a");
    bench.later(3600);
    assert_eq!(bench.arrive(7, "a"), ["refuse 7 Failed"], "three in a row");
    assert_eq!(bench.words(Input::Load("a".to_owned())), ["start a"]);
    bench.ready("a");
    bench.later(31);
    bench.died("a");
    bench.later(1);
    assert_eq!(bench.arrive(8, "a"), ["start a"], "it had worked for a while");
}

#[test]
fn a_permanent_failure_is_not_tried_again_until_the_policy_changes() {
    let mut bench = Bench::new(limits(), &[("a", 1)]);
    bench.arrive(1, "a");
    let failed = Input::StartFailed { policy: "a".to_owned(), why: "no".to_owned(), permanent: true };
    assert_eq!(bench.words(failed), ["refuse 1 Failed"]);
    bench.later(3600);
    assert_eq!(bench.arrive(2, "a"), ["refuse 2 Failed"]);
    let changed = BTreeMap::from([("a".to_owned(), Terms { version: "2".to_owned(), ..terms(1) })]);
    bench.step(Input::Policies(changed));
    assert_eq!(bench.arrive(3, "a"), ["start a"]);
}

#[test]
fn idle_engines_end_after_their_time() {
    let mut bench = Bench::new(limits(), &[]);
    let timeout = Some(Duration::from_secs(60));
    let policies = BTreeMap::from([("a".to_owned(), Terms { idle_timeout: timeout, ..terms(1) })]);
    bench.step(Input::Policies(policies));
    bench.arrive(1, "a");
    bench.ready("a");
    assert!(bench.later(100).is_empty(), "busy");
    bench.step(Input::Finish(1));
    assert!(bench.later(59).is_empty());
    assert_eq!(bench.later(1), ["stop a"]);
}

#[test]
fn changed_policies_are_taken_over_without_touching_the_others() {
    let mut bench = Bench::new(limits(), &[("a", 1), ("b", 1)]);
    for (ticket, policy) in [(1, "a"), (2, "b")] {
        bench.arrive(ticket, policy);
        bench.ready(policy);
    }
    bench.step(Input::Finish(2));
    let changed = |name: &str| (name.to_owned(), Terms { version: "2".to_owned(), ..terms(1) });
    let same = ("b".to_owned(), terms(1));
    assert!(bench.words(Input::Policies([changed("a"), same].into())).is_empty(), "a is busy, b is as it was");
    assert!(bench.arrive(3, "a").is_empty(), "not with the old engine");
    assert_eq!(bench.words(Input::Finish(1)), ["stop a"]);
    assert_eq!(bench.stopped("a"), ["start a"]);
    assert_eq!(bench.ready("a"), ["grant 3"]);
    assert_eq!(bench.words(Input::Policies([changed("a")].into())), ["stop b"], "b is gone");
    assert_eq!(bench.arrive(4, "b"), ["refuse 4 Unknown"]);
    bench.stopped("b");
    assert_eq!(bench.scheduler.views().count(), 1);
}

#[test]
fn loading_and_unloading_by_hand() {
    let mut bench = Bench::new(limits(), &[("a", 1)]);
    assert_eq!(bench.words(Input::Load("a".to_owned())), ["start a"]);
    bench.ready("a");
    bench.arrive(1, "a");
    assert!(bench.words(Input::Unload("a".to_owned())).is_empty(), "the running request ends first");
    assert_eq!(bench.words(Input::Finish(1)), ["stop a"]);
    assert!(bench.stopped("a").is_empty());
    assert!(bench.words(Input::Load("x".to_owned())).is_empty());
}

#[test]
fn a_drain_refuses_who_waits_and_lets_finish_what_runs() {
    let mut bench = Bench::new(limits(), &[("a", 1), ("b", 1)]);
    for (ticket, policy) in [(1, "a"), (2, "b")] {
        bench.arrive(ticket, policy);
        bench.ready(policy);
    }
    bench.arrive(3, "a");
    bench.step(Input::Finish(2));
    assert_eq!(bench.words(Input::Drain), ["refuse 3 Draining", "stop b"]);
    assert_eq!(bench.arrive(4, "a"), ["refuse 4 Draining"]);
    bench.stopped("b");
    assert!(!bench.scheduler.is_at_rest());
    assert_eq!(bench.words(Input::Finish(1)), ["stop a"]);
    bench.stopped("a");
    assert!(bench.scheduler.is_at_rest());
}

/// An owner that obeys: what was granted, and which engines start and end.
#[derive(Default)]
struct Obeying {
    waiting: BTreeSet<Ticket>,
    running: BTreeSet<Ticket>,
    starting: Vec<String>,
    stopping: Vec<String>,
}

impl Obeying {
    fn obey(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Grant(ticket) => {
                    assert!(self.waiting.remove(&ticket), "granted twice, or after it left");
                    self.running.insert(ticket);
                }
                Action::Refuse(ticket, _) => assert!(self.waiting.remove(&ticket)),
                Action::Start(name) => self.starting.push(name),
                Action::Stop(name) => self.stopping.push(name),
            }
        }
    }

    /// Something that may happen now, by a random number.
    fn next(&mut self, random: &mut impl FnMut(u64) -> u64, ticket: Ticket, arrivals: bool) -> Input {
        let name = ["a", "b", "c", "d"][usize::try_from(random(4)).unwrap()];
        match random(10) {
            0..=2 if arrivals => {
                self.waiting.insert(ticket);
                arrival(ticket, name, if random(2) == 0 { "x" } else { "y" })
            }
            3 if arrivals => self.waiting.pop_first().map_or(Input::Tick, Input::Leave),
            4 | 5 => self.running.pop_first().map_or(Input::Tick, Input::Finish),
            6 => self.starting.pop().map_or(Input::Tick, Input::Started),
            7 => self.stopping.pop().map_or(Input::Tick, Input::Stopped),
            8 if random(5) == 0 => self.starting.pop().map_or(Input::Tick, |policy| Input::StartFailed {
                policy,
                why: "no".to_owned(),
                permanent: false,
            }),
            _ => Input::Tick,
        }
    }

    /// Whatever is under way comes to its end.
    fn finish(&mut self) -> Input {
        let ended = self.running.pop_first().map(Input::Finish);
        let started = || self.starting.pop().map(Input::Started);
        let started = ended.or_else(started);
        started.or_else(|| self.stopping.pop().map(Input::Stopped)).unwrap_or(Input::Tick)
    }
}

/// Random inputs: no slot is given twice, memory stays within the budget, everybody is answered.
#[test]
fn whatever_happens_the_rules_hold() {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for _ in 0..50 {
        let mut bench = Bench::new(limits(), &[("a", 3), ("b", 4), ("c", 5), ("d", 9)]);
        let mut owner = Obeying::default();
        for round in 0..600 {
            bench.now += random(3);
            let input = owner.next(&mut random, round, round < 400);
            owner.obey(bench.step(input));
            let held = bench.scheduler.sum(Entry::is_active);
            assert!(held.ram_bytes <= 10 * GIB, "{held:?}");
            assert!(bench.scheduler.entries.values().all(|entry| entry.slots_used <= entry.terms.slots));
            assert_eq!(bench.scheduler.running(), owner.running.len());
        }
        for _ in 0..400 {
            bench.now += 5;
            let input = owner.finish();
            owner.obey(bench.step(input));
        }
        assert!(owner.waiting.is_empty() && owner.running.is_empty(), "{:?} {:?}", owner.waiting, owner.running);
    }
}

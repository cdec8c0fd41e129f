mod journal;

use super::*;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::base::cancel::Cancel;
use crate::base::http::Settings;
use crate::base::test_server::{Reply, Seen, Server};
use crate::report::{Event, Reporter};

/// Two whole ranges and a bit (ranges are small in tests).
const SIZE: usize = (2 << 20) + 12_345;

fn fill(at: usize, piece: &mut [u8]) {
    for (index, byte) in piece.iter_mut().enumerate() {
        *byte = ((at + index).wrapping_mul(2_654_435_761) >> 11) as u8;
    }
}

fn content(size: usize) -> Reply {
    Reply::made(size, Arc::new(fill))
}

/// Bytes that need not come again, as far as the journal says.
fn resumable_bytes(parts: &Path) -> u64 {
    part::read_journal(&part_file(parts, "json"), &part_file(parts, "part")).map_or(0, |journal| journal.done.total())
}

fn part_file(parts: &Path, ending: &str) -> std::path::PathBuf {
    parts.join(format!("{}.{ending}", digest_of(SIZE).hex()))
}

fn digest_of(size: usize) -> Digest {
    static KNOWN: Mutex<BTreeMap<usize, Digest>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap();
    *known.entry(size).or_insert_with(|| {
        let mut bytes = vec![0; size];
        fill(0, &mut bytes);
        Digest::of(&bytes)
    })
}

/// Keeps what is told, and cancels once so many bytes came.
struct Kept {
    events: Mutex<Vec<Event>>,
    limit: AtomicU64,
    cancel: Cancel,
}

impl Reporter for Kept {
    fn report(&self, event: &Event) {
        self.events.lock().unwrap().push(event.clone());
        if matches!(event, Event::Progressed { done, .. } if *done >= self.limit.load(Ordering::SeqCst)) {
            self.cancel.cancel();
        }
    }
}

/// A scratch folder, a client in a hurry, and what was told.
struct Bench {
    root: tempfile::TempDir,
    http: Http,
    task: Task,
    told: Arc<Kept>,
    reserve_bytes: u64,
}

impl Bench {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let cancel = Cancel::default();
        let told = Kept { events: Mutex::default(), limit: AtomicU64::new(u64::MAX), cancel: cancel.clone() };
        let told = Arc::new(told);
        let pace = Duration::from_millis(2);
        let mut settings = Settings { pace, cancel: cancel.clone(), ..Settings::default() };
        change(&mut settings);
        let task = Task::new(Arc::clone(&told) as Arc<dyn Reporter>, cancel);
        Self { root: tempfile::tempdir().unwrap(), http: Http::new(settings), task, told, reserve_bytes: 0 }
    }

    fn get(&self, url: &str, size: usize) -> Result<Hashed, SourceError> {
        self.ask(&[url.to_owned()], &[], Some((size as u64, digest_of(size))))
    }

    fn ask(
        &self,
        urls: &[String],
        headers: &[(&str, &str)],
        expected: Option<(u64, Digest)>,
    ) -> Result<Hashed, SourceError> {
        let (size_bytes, sha256) = expected.unzip();
        let (parts, to) = (self.root.path().join("p ä"), self.to());
        let ask = Download {
            what: "x",
            urls,
            headers,
            size_bytes,
            sha256,
            parts: &parts,
            to: &to,
            streams: STREAMS,
            reserve_bytes: self.reserve_bytes,
        };
        let result = download(&self.http, &self.task, &ask);
        match &result {
            Ok(came) => {
                let there = Hashed::of_file(&to, |_| Ok(())).unwrap();
                assert_eq!((came.sha256(), came.stamp()), (there.sha256(), there.stamp()), "what is hashed is there");
                assert!(sha256.is_none_or(|sha256| sha256 == came.sha256()));
                let left = fs::read_dir(&parts).unwrap();
                assert!(left.iter().all(|path| path.extension().is_some_and(|e| e == "lock")), "{left:?}");
            }
            Err(_) => assert!(!fs::exists(&to), "wrong bytes got the name"),
        }
        result
    }

    /// Fetches until about `bytes` came, and gives what then fetches the rest.
    fn cancelled_at(self, bytes: u64, url: &str, expected: Option<(u64, Digest)>) -> Self {
        self.told.limit.store(bytes, Ordering::SeqCst);
        let result = self.ask(&[url.to_owned()], &[], expected);
        assert!(matches!(result, Err(SourceError::Cancelled(_))), "{result:?}");
        Self { http: Http::new(Settings::default()), task: Task::silent(), ..self }
    }

    fn to(&self) -> std::path::PathBuf {
        self.root.path().join("d é/file")
    }

    fn waited(&self) -> Vec<String> {
        let told = self.told.events.lock().unwrap();
        told.iter()
            .filter_map(|event| if let Event::Waiting { what } = event { Some(what.clone()) } else { None })
            .collect()
    }
}

/// A server of one file with ranges; `change` may spoil an answer.
fn good(size: usize, change: impl Fn(Reply, &Seen, usize) -> Reply + Send + Sync + 'static) -> Server {
    Server::start(move |seen, turn| change(content(size).ranged(seen), seen, turn))
}

#[track_caller]
fn mismatch(result: Result<Hashed, SourceError>) -> (String, String) {
    match result {
        Err(SourceError::Mismatch { actual, likely, .. }) => (actual, likely.unwrap_or_default()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn large_files_come_in_ranges_and_small_ones_at_once() {
    let server = good(SIZE, |reply, _, _| reply);
    assert_eq!(Bench::new().get(&server.url("/f"), SIZE).unwrap().size_bytes(), SIZE as u64);
    let mut ranges: Vec<_> = server.seen().iter().map(|seen| seen.range(SIZE).unwrap()).collect();
    ranges.sort_unstable();
    assert_eq!(ranges, [(0, 1 << 20), (1 << 20, 2 << 20), (2 << 20, SIZE)]);
    for size in [0, 1, 70_000] {
        let server = good(size, |reply, _, _| reply);
        Bench::new().get(&server.url("/f"), size).unwrap();
        let seen = server.seen();
        assert!(seen.len() <= 1 && seen.iter().all(|seen| seen.header("range").is_none()), "{size}");
    }
}

#[test]
fn unknown_files_are_measured() {
    for size in [70_000, SIZE] {
        for reply in [|reply: Reply, _: &Seen, _| reply, |_: Reply, _: &Seen, _| content(0)] {
            let whole = move |given: Reply, seen: &Seen, turn| {
                let reply = reply(given, seen, turn);
                if reply.size() == 0 { content(size) } else { reply }
            };
            let server = good(size, whole);
            let came = Bench::new().ask(&[server.url("/f")], &[], None).unwrap();
            assert_eq!((came.sha256(), came.size_bytes()), (digest_of(size), size as u64));
        }
        let server = good(size, move |_, _, _| content(size).without_length());
        assert_eq!(Bench::new().ask(&[server.url("/f")], &[], None).unwrap().sha256(), digest_of(size));
    }
}

#[test]
fn a_connection_may_drop_at_any_byte() {
    for at in [0, 1, 65_536, 100_003, (1 << 20) - 1] {
        let server = good(SIZE, move |reply, _, turn| if turn < 4 { reply.drop_after(at) } else { reply });
        Bench::new().get(&server.url("/f"), SIZE).unwrap();
        let starts: Vec<_> = server.seen().iter().map(|seen| seen.range(SIZE).unwrap().0).collect();
        assert!(at == 0 || starts.contains(&at), "{at}: {starts:?}");
    }
    // Every answer breaks, but each brings something.
    let server = good(SIZE, |reply, _, _| reply.drop_after(128 << 10));
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    // None brings anything.
    let server = good(SIZE, |reply, _, _| reply.drop_after(0));
    assert!(matches!(Bench::new().get(&server.url("/f"), SIZE), Err(SourceError::Network { .. })));
}

#[test]
fn a_server_without_ranges_is_good_enough() {
    let server = Server::start(|_, _| content(SIZE));
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    assert_eq!(server.seen().len(), 1, "the first answer is used");
    // It breaks twice, each time a bit later; what is there is passed over.
    let server = Server::start(|_, turn| match turn {
        0 | 1 => content(SIZE).drop_after((turn + 1) << 19),
        _ => content(SIZE),
    });
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    // It stops having them half way.
    let server = good(SIZE, |reply, _, turn| if turn == 1 { content(SIZE) } else { reply });
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
}

#[test]
fn wrong_ranges_are_not_taken() {
    let shifted = |reply: Reply, seen: &Seen| match seen.range(SIZE) {
        Some((first, end)) => reply.with("Content-Range", &format!("bytes {}-{}/{SIZE}", first + 1, end)),
        None => reply,
    };
    let server = good(SIZE, move |reply, seen, turn| if turn == 0 { shifted(reply, seen) } else { reply });
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    let server = good(SIZE, move |reply, seen, _| shifted(reply, seen));
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    assert!(server.seen().iter().any(|seen| seen.header("range").is_none()), "one stream was the way out");
    let server = good(SIZE, |reply, _, turn| if turn == 0 { reply.status(403) } else { reply });
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
}

#[test]
fn wrong_bytes_are_fetched_once_more_and_then_refused() {
    let server = good(SIZE, |reply, _, turn| if turn < 3 { reply.flip(1_200_000) } else { reply });
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    let seen = server.seen();
    assert_eq!((seen.len(), seen[3].header("range")), (4, None));

    let server = good(SIZE, |reply, _, _| reply.flip(1_200_000));
    let (actual, likely) = mismatch(Bench::new().get(&server.url("/f"), SIZE));
    assert!(actual.ends_with(&format!("({SIZE} bytes)")) && likely.contains("the same wrong digest"), "{likely}");

    let server = good(SIZE, |reply, _, turn| reply.flip(1_200_000 + turn));
    let (_, likely) = mismatch(Bench::new().get(&server.url("/f"), SIZE));
    assert!(likely.contains("different digests"), "{likely}");
}

#[test]
fn the_size_is_the_expected_one_whatever_the_server_says() {
    for size in [1000, SIZE - 1, SIZE + 1] {
        for ranges in [true, false] {
            let server = Server::start(move |seen, _| if ranges { content(size).ranged(seen) } else { content(size) });
            let (actual, likely) = mismatch(Bench::new().get(&server.url("/f"), SIZE));
            assert_eq!(actual, format!("{size} bytes"));
            assert!(likely.contains("expected size is wrong"), "{likely}");
        }
        // Nobody says how long it is.
        let server = Server::start(move |_, _| content(size).without_length());
        let result = Bench::new().get(&server.url("/f"), SIZE);
        assert!(matches!(result, Err(SourceError::Mismatch { .. } | SourceError::Network { .. })), "{result:?}");
    }
    let server = good(SIZE, |reply, _, turn| if turn == 0 { content(1000) } else { reply });
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
}

#[test]
fn what_came_instead_is_named() {
    let pages = [
        ("<!DOCTYPE html><html>log in</html>", "HTML"),
        ("", "empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "LFS"),
        ("<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "storage"),
    ];
    for (page, word) in pages {
        let server = Server::start(move |_, _| Reply::text(page));
        let (_, likely) = mismatch(Bench::new().get(&server.url("/f"), SIZE));
        assert!(likely.contains(word), "{likely}");
        // Of the right size, too.
        let sized = format!("{page:60000}");
        let server = Server::start(move |_, _| Reply::text(&sized));
        if !page.is_empty() {
            let (_, likely) = mismatch(Bench::new().get(&server.url("/f"), 60_000));
            assert!(likely.contains(word), "{likely}");
        }
    }
}

#[test]
fn busy_servers_are_waited_for() {
    let server = good(SIZE, |reply, _, turn| match turn {
        0 => Reply::text("busy").status(429).with("Retry-After", "0"),
        1 => Reply::text("down").status(503),
        2 => Reply::text("down").status(503).with("Retry-After", "1"),
        _ => reply,
    });
    let (bench, began) = (Bench::new(), Instant::now());
    bench.get(&server.url("/f"), SIZE).unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1), "the server's required counts");
    let waited = bench.waited();
    assert!(waited.len() == 2 && waited[1].contains("503") && waited[1].contains("`x`"), "{waited:?}");

    let server = Server::start(|_, _| Reply::text("down").status(503));
    match Bench::new().get(&server.url("/f"), SIZE) {
        Err(SourceError::Network { why, .. }) => assert_eq!(why, "HTTP status 503"),
        other => panic!("{other:?}"),
    }
    let server = Server::start(|_, _| Reply::text("").status(429).with("Retry-After", "99999"));
    match Bench::new().get(&server.url("/f"), SIZE) {
        Err(SourceError::Network { why, .. }) => assert!(why.contains("99999 s"), "l4: {why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn a_stall_is_noticed() {
    let server = good(SIZE, |reply, _, turn| if turn < 2 { reply.stall_after(100_000) } else { reply });
    let began = Instant::now();
    Bench::with(|settings| settings.stall_timeout = Duration::from_millis(100)).get(&server.url("/f"), SIZE).unwrap();
    assert!(began.elapsed() < Settings::default().stall_timeout / 2, "{:?}", began.elapsed());
}

#[test]
fn m3_a_connection_that_hardly_brings_anything_does_not_hold_up_the_rest() {
    let slow = AtomicU64::new(0);
    let server = good(SIZE, move |reply, seen, _| match seen.range(SIZE) {
        Some((first, _)) if first == 1 << 20 && slow.fetch_add(1, Ordering::SeqCst) == 0 => reply.stall_after(100_000),
        _ => reply,
    });
    let began = Instant::now();
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    assert!(began.elapsed() < Settings::default().stall_timeout / 2, "{:?}", began.elapsed());
    let starts: Vec<_> = server.seen().iter().map(|seen| seen.range(SIZE).unwrap().0).collect();
    assert!(starts.iter().any(|start| ((1 << 20) + 1..(1 << 20) + 100_001).contains(start)), "{starts:?}");
}

#[test]
fn a_failure_does_not_wait_for_a_silent_sibling() {
    // One range falls silent, another is gone for good; then one is silent, and another of a different size.
    let gone = |reply: Reply, seen: &Seen, _| match seen.range(SIZE) {
        Some((0, _)) => reply.stall_after(100_000),
        _ => Reply::text("gone").status(410),
    };
    let other = |reply: Reply, seen: &Seen, _| match seen.range(SIZE) {
        Some((0, _)) => reply.stall_after(100_000),
        Some(_) => Reply::text("").status(416).with("Content-Range", "bytes */7"),
        None => reply,
    };
    let began = Instant::now();
    let server = good(SIZE, gone);
    assert!(matches!(Bench::new().get(&server.url("/f"), SIZE), Err(SourceError::Missing { .. })));
    let server = good(SIZE, other);
    Bench::new().get(&server.url("/f"), SIZE).unwrap();
    assert!(began.elapsed() < Settings::default().stall_timeout, "{:?}", began.elapsed());
}

#[test]
fn the_last_ranges_are_smaller_so_that_all_are_done_at_once() {
    let bytes = |left, streams| worker::range_bytes(left, streams, (2, 16));
    assert_eq!([bytes(1 << 30, 4), bytes(80, 4), bytes(80, 8), bytes(9, 4), bytes(0, 1)], [16, 10, 5, 2, 2]);
}

#[test]
fn refusals_are_told_apart() {
    for (status, missing) in [(404, true), (410, true), (401, false), (400, false), (451, false)] {
        let server = Server::start(move |_, _| Reply::text("no").status(status));
        let result = Bench::new().get(&server.url("/f"), SIZE);
        assert_eq!(matches!(result, Err(SourceError::Missing { .. })), missing, "{status}: {result:?}");
        assert_eq!(matches!(result, Err(SourceError::Network { .. })), !missing, "{status}: {result:?}");
        assert_eq!(server.seen().len(), 1, "no use asking again");
    }
    let gone = { Server::start(|_, _| Reply::text("")).url("/f") };
    match Bench::new().get(&gone, SIZE) {
        Err(SourceError::Network { hint: Some(hint), .. }) => assert!(hint.contains("network"), "{hint}"),
        other => panic!("{other:?}"),
    }
    let offline = Bench::with(|settings| settings.offline = true);
    assert!(matches!(offline.get(&gone, SIZE), Err(SourceError::Offline { .. })));
}

#[test]
fn the_next_address_is_tried() {
    let (bad, fine) = (Server::start(|_, _| Reply::text("no").status(404)), good(SIZE, |reply, _, _| reply));
    let expected = Some((SIZE as u64, digest_of(SIZE)));
    Bench::new().ask(&[bad.url("/f"), fine.url("/g")], &[("Authorization", "secret")], expected).unwrap();
    assert_eq!(bad.seen()[0].header("authorization"), Some("secret"));
    assert!(fine.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[test]
fn secrets_stay_and_expired_links_are_renewed() {
    // Each link works for two requests.
    let cdn = good(SIZE, |reply, seen, turn| {
        let number: usize = seen.path.rsplit('=').next().unwrap().parse().unwrap();
        if turn < 3 && number == 0 && turn > 1 { Reply::text("expired").status(403) } else { reply }
    });
    let link = cdn.url("/blob?sig=");
    let hub = Server::start(move |_, turn| Reply::redirect(302, &format!("{link}{turn}")));
    let expected = Some((SIZE as u64, digest_of(SIZE)));
    Bench::new().ask(&[hub.url("/f")], &[("Authorization", "secret")], expected).unwrap();
    assert!(hub.seen().iter().all(|seen| seen.header("authorization") == Some("secret")));
    assert!(cdn.seen().iter().all(|seen| seen.header("authorization").is_none()));
    let asked = hub.seen().len();
    assert!((2..=4).contains(&asked), "{asked}: one link for all ranges, and another when it had expired");

    let cdn = good(SIZE, |_, _, _| Reply::text("never").status(403));
    let link = cdn.url("/blob");
    let hub = Server::start(move |_, _| Reply::redirect(302, &link));
    assert!(matches!(Bench::new().get(&hub.url("/f"), SIZE), Err(SourceError::Network { .. })));
    assert!(hub.seen().len() <= 6);
}

#[test]
fn a_link_that_expires_for_all_connections_is_renewed_once() {
    let size = 8 << 20;
    let (asked, turned) = (Mutex::new(0), std::sync::Condvar::new());
    let cdn = good(size, move |reply, seen, turn| {
        if turn == 0 || !seen.path.ends_with("sig=0") {
            return reply;
        }
        // All ask before one of them has got another link.
        let mut count = asked.lock().unwrap();
        *count += 1;
        turned.notify_all();
        let all = turned.wait_timeout_while(count, Duration::from_secs(20), |count| *count < STREAMS).unwrap();
        assert!(!all.1.timed_out());
        Reply::text("expired").status(403)
    });
    let link = cdn.url("/blob?sig=");
    let hub = Server::start(move |_, turn| Reply::redirect(302, &format!("{link}{turn}")));
    Bench::new().get(&hub.url("/f"), size).unwrap();
    let expired = cdn.seen().iter().skip(1).filter(|seen| seen.path.ends_with("sig=0")).count();
    assert_eq!(expired, STREAMS);
}

#[test]
fn l7_a_content_host_that_lost_the_file_for_a_moment_is_asked_again_with_a_fresh_link() {
    for status in [404, 410] {
        for (times, found) in [(1, true), (usize::MAX, false)] {
            let cdn =
                good(SIZE, move |reply, _, turn| if turn < times { Reply::text("").status(status) } else { reply });
            let link = cdn.url("/blob?sig=");
            let hub = Server::start(move |_, turn| Reply::redirect(302, &format!("{link}{turn}")));
            let result = Bench::new().get(&hub.url("/f"), SIZE);
            assert!(hub.seen().len() >= 2, "{status}");
            match (found, result) {
                (true, Ok(_)) | (false, Err(SourceError::Network { .. })) => {}
                (_, result) => panic!("{status}, {times} times: {result:?}"),
            }
        }
    }
}

#[test]
fn ranges_that_are_refused_later_are_no_end() {
    let server = good(SIZE, |reply, seen, turn| match seen.range(SIZE) {
        Some((first, _)) if turn > 2 && first > 0 => Reply::text("no ranges").status(403),
        _ if turn <= 2 => reply.stall_after(400_000),
        _ => reply,
    });
    let again = Bench::new().cancelled_at(700_000, &server.url("/f"), Some((SIZE as u64, digest_of(SIZE))));
    again.get(&server.url("/f"), SIZE).unwrap();
    assert_eq!(server.seen().last().unwrap().header("range"), None);
}

#[test]
fn a_page_in_between_leaves_what_came() {
    let logged_out = Arc::new(AtomicU64::new(0));
    let state = Arc::clone(&logged_out);
    let server = good(SIZE, move |reply, _, turn| match state.load(Ordering::SeqCst) {
        0 if turn < 3 => reply.stall_after(400_000),
        1 => Reply::text("<html>log in</html>"),
        _ => reply,
    });
    let again = Bench::new().cancelled_at(700_000, &server.url("/f"), Some((SIZE as u64, digest_of(SIZE))));
    let parts = again.root.path().join("p ä");
    let prefix = || part::read_journal(&part_file(&parts, "json"), &part_file(&parts, "part")).unwrap().done.prefix();
    let there = prefix();
    assert!(there > 0);
    logged_out.store(1, Ordering::SeqCst);
    let (_, likely) = mismatch(again.get(&server.url("/f"), SIZE));
    assert!(likely.contains("HTML"), "{likely}");
    assert_eq!(prefix(), there);
    logged_out.store(2, Ordering::SeqCst);
    let before = server.seen().len();
    again.get(&server.url("/f"), SIZE).unwrap();
    assert!(server.seen()[before..].iter().all(|seen| seen.range(SIZE).unwrap().0 as u64 >= there));
}

#[test]
fn a_page_that_does_not_say_its_length_is_nothing_to_go_on_from() {
    let server = Server::start(|_, _| Reply::text("<html>log in</html>").without_length());
    let bench = Bench::new();
    let (_, likely) = mismatch(bench.get(&server.url("/f"), SIZE));
    assert!(likely.contains("HTML"), "{likely}");
    assert_eq!(resumable_bytes(&bench.root.path().join("p ä")), 0);
}

#[test]
fn a_cancelled_download_goes_on_where_it_stopped() {
    let server = good(SIZE, |reply, _, turn| if turn < 3 { reply.stall_after(400_000) } else { reply });
    let expected = Some((SIZE as u64, digest_of(SIZE)));
    let again = Bench::new().cancelled_at(700_000, &server.url("/f"), expected);
    let there = resumable_bytes(&again.root.path().join("p ä"));
    assert!(there >= 700_000, "{there}");
    let before = server.seen().len();
    again.get(&server.url("/f"), SIZE).unwrap();
    let asked: usize =
        server.seen()[before..].iter().map(|seen| seen.range(SIZE).unwrap()).map(|(first, end)| end - first).sum();
    assert_eq!(asked as u64, SIZE as u64 - there);
}

/// Runs in a process of its own; see the next test.
#[test]
#[ignore = "the child of another test"]
#[expect(clippy::disallowed_methods, reason = "how the parent tells what to do")]
fn child() {
    let var = |name: &str| std::env::var(name).unwrap();
    let size: usize = var("AITOOLS_TEST_SIZE").parse().unwrap();
    let (parts, to) = (var("AITOOLS_TEST_ROOT") + "/p ä", var("AITOOLS_TEST_ROOT") + "/d é/file");
    let ask = Download {
        what: "x",
        urls: &[var("AITOOLS_TEST_URL")],
        headers: &[],
        size_bytes: Some(size as u64),
        sha256: var("AITOOLS_TEST_SHA256").parse().ok(),
        parts: Path::new(&parts),
        to: Path::new(&to),
        streams: MAX_STREAMS,
        reserve_bytes: 0,
    };
    let result = download(&Http::new(Settings::default()), &Task::silent(), &ask);
    let status = fs::read_bounded(Path::new("/proc/self/status"), 1 << 20).unwrap_or_default();
    let peak = status.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"VmHWM"));
    let report = format!("peak {} {result:?}", String::from_utf8_lossy(peak.unwrap_or_default()));
    fs::write_atomic(&Path::new(&var("AITOOLS_TEST_ROOT")).join("report"), report.as_bytes()).unwrap();
}

fn start_child(root: &Path, url: &str, size: usize, sha256: &str) -> std::process::Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "source::download::tests::child", "--ignored", "--nocapture"]);
    command.env("AITOOLS_TEST_ROOT", root).env("AITOOLS_TEST_URL", url);
    command.env("AITOOLS_TEST_SIZE", size.to_string()).env("AITOOLS_TEST_SHA256", sha256);
    command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_killed_download_goes_on_where_the_journal_says() {
    let bench = Bench::new();
    let killed = Arc::new(AtomicU64::new(0));
    let over = Arc::clone(&killed);
    let server = good(SIZE, move |reply, seen, _| match (over.load(Ordering::SeqCst), seen.range(SIZE)) {
        // Nothing beyond these bytes of each range, whoever asks.
        (0, Some((first, _))) => reply.stall_after(600_000_usize.saturating_sub(first % (1 << 20))),
        _ => reply,
    });
    let sha256 = digest_of(SIZE);
    let mut child = start_child(bench.root.path(), &server.url("/f"), SIZE, &sha256.to_string());
    let parts = bench.root.path().join("p ä");
    let deadline = Instant::now() + Duration::from_secs(60);
    while resumable_bytes(&parts) < 1_000_000 {
        assert!(Instant::now() < deadline, "no journal came");
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    killed.store(1, Ordering::SeqCst);
    let (there, before) = (resumable_bytes(&parts), server.seen().len());
    bench.get(&server.url("/f"), SIZE).unwrap();
    let again: usize =
        server.seen()[before..].iter().map(|seen| seen.range(SIZE).unwrap()).map(|(first, end)| end - first).sum();
    assert_eq!(again as u64, SIZE as u64 - there);
}

#[test]
fn memory_does_not_grow_with_the_file() {
    let (bench, size) = (Bench::new(), 192 << 20);
    let server =
        Server::start(move |seen, _| Reply::made(size, Arc::new(|_, piece: &mut [u8]| piece.fill(0))).ranged(seen));
    let mut hasher = crate::base::digest::Hasher::default();
    (0..192).for_each(|_| hasher.update(&vec![0; 1 << 20]));
    let child = start_child(bench.root.path(), &server.url("/f"), size, &hasher.finish().0.to_string());
    assert!(child.wait_with_output().unwrap().status.success());
    let line = String::from_utf8(fs::read_bounded(&bench.root.path().join("report"), 1000).unwrap()).unwrap();
    assert!(line.contains("Ok("), "{line}");
    if cfg!(target_os = "linux") {
        let peak_kb: u64 = line.split_whitespace().nth(2).unwrap().parse().unwrap();
        assert!(peak_kb < 48 << 10, "{line}");
    }
}

#[test]
fn a_416_starts_over() {
    let bench = Bench::new();
    let parts = bench.root.path().join("p ä");
    let part = Part::hold(&parts, &digest_of(SIZE).hex(), "x", &Task::silent()).unwrap();
    part.open().unwrap().set_len(SIZE as u64).unwrap();
    let mut done = part::Ranges::default();
    done.add(0, 1 << 20);
    part.save(&part::Journal::new(SIZE as u64, None, done.clone(), done));
    drop(part);
    let server = good(SIZE, |reply, seen, _| match seen.header("range") {
        Some(_) => Reply::text("").status(416).with("Content-Range", "bytes */1048576"),
        None => reply,
    });
    bench.get(&server.url("/f"), SIZE).unwrap();
}

#[test]
fn without_a_digest_only_the_same_state_of_a_file_is_gone_on_with() {
    for (tag, last) in [("\"one\"", 2), ("\"two\"", 2), ("W/\"one\"", 1)] {
        let server = Server::start(move |seen, turn| {
            // Only one of the tags stands for other bytes.
            let (now, changed) = match tag {
                "\"two\"" if turn <= last => ("\"one\"", SIZE),
                "\"two\"" => (tag, 5),
                _ => (tag, SIZE),
            };
            let whole = content(SIZE).flip(changed).with("ETag", now);
            let same = seen.header("if-range").is_none_or(|wanted| wanted == now);
            let reply = if same { whole.ranged(seen) } else { whole };
            if turn == 0 || turn > last { reply } else { reply.stall_after(100_000) }
        });
        // So many that some are of the first range.
        let again = Bench::new().cancelled_at(if last == 2 { 1_100_000 } else { 60_000 }, &server.url("/f"), None);
        let before = server.seen().len();
        let came = again.ask(&[server.url("/f")], &[], None).unwrap();
        assert_eq!(came.sha256() == digest_of(SIZE), tag != "\"two\"", "{tag}");
        let first = &server.seen()[before];
        assert_eq!(first.header("if-range").is_some(), last == 2, "{tag}");
        assert_eq!(first.range(SIZE).unwrap().0 > 0, last == 2, "{tag}");
    }
}

#[test]
fn without_a_digest_ranges_of_two_states_are_not_mixed() {
    // The file is replaced by one of the same size, and the server does not heed `If-Range`.
    for tags in [["\"one\"", "\"two\""], ["\"one\"", ""]] {
        let server = Server::start(move |seen, turn| {
            let state = usize::from(turn >= 2);
            let reply = content(SIZE).flip(if state == 0 { SIZE } else { 5 }).ranged(seen);
            if tags[state].is_empty() { reply } else { reply.with("ETag", tags[state]) }
        });
        let came = Bench::new().ask(&[server.url("/f")], &[], None).unwrap();
        let mut changed = vec![0; SIZE];
        fill(0, &mut changed);
        changed[5] ^= 1;
        assert_eq!(came.sha256(), Digest::of(&changed), "{tags:?}");
    }
}

#[test]
fn two_at_once_fetch_once() {
    let bench = Bench::new();
    let server = good(SIZE, |reply, _, _| reply);
    let url = server.url("/f");
    std::thread::scope(|scope| {
        let both = [scope.spawn(|| bench.get(&url, SIZE)), scope.spawn(|| bench.get(&url, SIZE))];
        let _ = both.map(|one| one.join().unwrap().unwrap());
    });
    assert_eq!(server.seen().len(), 3);
}

#[test]
fn space_is_checked_beforehand() {
    let root = tempfile::tempdir().unwrap();
    require_space(root.path(), 0).unwrap();
    let error = require_space(root.path(), u64::MAX / 2).unwrap_err();
    assert!(error.is_no_space());
    assert!(error.to_string().contains("are needed"), "{error}");
    // What a part has taken already is not needed again.
    let pin = FilePin { path: "f".parse().unwrap(), size: SIZE as u64, sha256: digest_of(SIZE) };
    assert_eq!(missing_bytes(root.path(), &pin), SIZE as u64);
    let part = Part::hold(root.path(), &pin.sha256.hex(), "x", &Task::silent()).unwrap();
    std::io::Write::write_all(&mut part.open().unwrap(), &vec![1; 1 << 20]).unwrap();
    let missing = missing_bytes(root.path(), &pin);
    assert!(missing <= SIZE as u64 - (1 << 20), "{missing}");
    // A size beyond any disk is refused before a byte comes.
    let server = good(SIZE, |reply, _, _| reply);
    let result = Bench::new().ask(&[server.url("/f")], &[], Some((1 << 50, digest_of(SIZE))));
    assert!(matches!(result, Err(SourceError::Fs(_))), "{result:?}");
    assert!(server.seen().is_empty());
}

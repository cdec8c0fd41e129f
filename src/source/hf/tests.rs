//! Against a stand-in for the Hub on loopback, good and bad.

mod environment;
mod kept;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use super::*;
use crate::base::cancel::Cancel;
use crate::base::test_hub::{Hub as StandIn, Site, TOKEN, git_blob};
use crate::base::test_server::{Reply, Seen};
use crate::base::{digest, fs};
use crate::format::manifest::SourceSpec;
use crate::report::{Event, Reporter, Task};

const REPO: &str = "Org/Tiny-Model_1.0-gguf";

/// Ranges are small in tests: this takes several.
fn noise(size: usize, seed: u8) -> Vec<u8> {
    (0..size.div_ceil(32))
        .flat_map(|at| *Digest::of(&[&at.to_le_bytes()[..], &[seed]].concat()).as_bytes())
        .take(size)
        .collect()
}

#[derive(Default)]
struct Told(Mutex<Vec<Event>>);

impl Reporter for Told {
    fn report(&self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

struct Bench {
    root: tempfile::TempDir,
    hub: StandIn,
    world: World,
    told: Arc<Told>,
}

impl Bench {
    fn with(hub: StandIn) -> Self {
        let root = tempfile::Builder::new().prefix("aitools hub é ").tempdir().unwrap();
        let told = Arc::<Told>::default();
        let reporter: Arc<dyn Reporter> = Arc::clone(&told) as _;
        let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        let env = [("HF_ENDPOINT", hub.endpoint()), ("HF_HOME", path("hf home")), ("HF_TOKEN", TOKEN.to_owned())];
        let world = World {
            task: Task::new(reporter, Cancel::default()),
            project: root.path().join("project"),
            scratch: root.path().join("scratch"),
            offline: false,
            mirrors: Vec::new(),
            env: env.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        };
        Self { root, hub, world, told }
    }

    fn good() -> Self {
        Self::with(StandIn::good())
    }

    fn spoilt(change: impl Fn(Site, &Seen, Reply) -> Reply + Send + Sync + 'static) -> Self {
        Self::with(StandIn::start(change))
    }

    fn set(&mut self, key: &str, value: &str) {
        self.world.env.insert(key.to_owned(), value.to_owned());
    }

    fn anonymous(mut self) -> Self {
        self.world.env.remove("HF_TOKEN");
        self
    }

    fn push(&self, files: &[(&str, &[u8])]) -> String {
        self.hub.push(REPO, "main", files)
    }

    fn resolve(&self, spec: &HfSpec) -> Result<Pin, SourceError> {
        let pin = spec.resolve_files(&self.world).map(|(commit, files)| Pin { commit, files });
        self.leaks_nothing(&format!("{pin:?}"));
        pin
    }

    fn fetch(&self, pin: &Pin) -> Result<PathBuf, SourceError> {
        self.fetch_as(&spec(&[]), pin)
    }

    fn fetch_as(&self, spec: &HfSpec, pin: &Pin) -> Result<PathBuf, SourceError> {
        let staging = tempfile::tempdir_in(self.root.path()).unwrap().keep();
        let files: Vec<&FilePin> = pin.files.iter().collect();
        let fetched = spec.fetch_files(&self.world, &pin.commit, &files, &staging);
        self.leaks_nothing(&format!("{fetched:?}"));
        fetched.map(|_| {
            for file in &pin.files {
                let got = digest::of_file(&file.path.under(&staging)).unwrap();
                assert_eq!(got, (file.sha256, file.size), "{}", file.path);
            }
            staging
        })
    }

    fn leaks_nothing(&self, text: &str) {
        assert!(!format!("{text} {:?}", self.told.0.lock().unwrap()).contains(TOKEN), "{text}");
        assert!(self.hub.seen(Site::Store).iter().all(|seen| seen.header("authorization").is_none()));
    }

    fn asked(&self, site: Site) -> Vec<String> {
        self.hub.seen(site).iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect()
    }

    fn cache(&self) -> PathBuf {
        self.root.path().join("hf home/hub/models--Org--Tiny-Model_1.0-gguf")
    }
}

fn spec(files: &[&str]) -> HfSpec {
    HfSpec { hf: REPO.to_owned(), rev: None, files: files.iter().map(|&text| text.to_owned()).collect() }
}

fn at(rev: &str) -> HfSpec {
    HfSpec { rev: Some(rev.to_owned()), ..spec(&[]) }
}

/// What a request resolves to.
#[derive(Debug, Clone, PartialEq)]
struct Pin {
    commit: Commit,
    files: Vec<FilePin>,
}

fn names(pin: &Pin) -> Vec<&str> {
    pin.files.iter().map(|file| file.path.as_str()).collect()
}

fn read(path: &Path) -> Vec<u8> {
    fs::read_bounded(path, 1 << 30).unwrap()
}

#[test]
fn a_lock_takes_one_request_and_one_for_each_small_file() {
    let bench = Bench::good();
    let (big, small) = (noise(70_000, 1), b"{\"a\": 1}");
    let commit = bench.push(&[
        ("a.Q4_0.gguf", &big),
        ("activation/\u{e9} 0.bin", b"x"),
        ("config.json", small),
        ("README.md", b"r"),
    ]);
    let pin = bench.resolve(&spec(&["*.Q4_0.gguf", "activation/**", "config.json"])).unwrap();
    assert_eq!(pin.commit.to_string(), commit);
    assert_eq!(names(&pin), ["a.Q4_0.gguf", "activation/\u{e9} 0.bin", "config.json"]);
    assert_eq!((pin.files[0].size, pin.files[0].sha256), (70_000, Digest::of(&big)));
    assert_eq!((pin.files[2].size, pin.files[2].sha256), (8, Digest::of(small)));
    let asked = bench.asked(Site::Hub);
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(asked[2].starts_with("GET /api/resolve-cache/"), "the small file's redirect is followed: {asked:?}");
    assert!(bench.asked(Site::Store).is_empty(), "no weights at lock");
    assert_eq!(bench.resolve(&spec(&["*.Q4_0.gguf", "activation/**", "config.json"])).unwrap(), pin);
}

#[test]
fn a_hub_without_digests_in_its_siblings_is_asked_page_by_page() {
    let bench = Bench::good();
    let files: Vec<(String, Vec<u8>)> = (0..25_u8).map(|n| (format!("d/{n:02}.gguf"), vec![n; 9])).collect();
    let files: Vec<(&str, &[u8])> = files.iter().map(|(path, bytes)| (path.as_str(), &bytes[..])).collect();
    bench.push(&files);
    let expected = bench.resolve(&spec(&[])).unwrap();
    bench.hub.without_blobs();
    bench.hub.paginate(10);
    assert_eq!(bench.resolve(&spec(&[])).unwrap(), expected);
    assert_eq!(bench.asked(Site::Hub).iter().filter(|line| line.contains("/tree/")).count(), 3);
}

#[test]
fn a_listing_longer_than_any_is_refused() {
    let bench = Bench::spoilt(|_, seen, reply| match seen.path.contains("/revision/") {
        true => {
            let files = vec![r#"{"rfilename":"a","size":1}"#; 100_001].join(",");
            Reply::text(&format!(r#"{{"sha":"{}","siblings":[{files}]}}"#, "a".repeat(40)))
        }
        false => reply,
    });
    let error = bench.resolve(&spec(&[])).unwrap_err().to_string();
    assert!(error.contains("100001") && error.contains("at most 100000 files"), "{error}");
}

#[test]
fn endless_and_foreign_pages_end() {
    let elsewhere = Arc::new(crate::base::test_server::Server::start(|_, _| Reply::text("[]")));
    for link in [String::new(), elsewhere.url("/steal?cursor=1")] {
        let bench = Bench::spoilt(move |_, seen, reply| {
            let next = if link.is_empty() {
                format!("<{}>; rel=\"next\"", seen.path)
            } else {
                format!("<{link}>; rel=\"next\"")
            };
            if seen.path.contains("/tree/") { reply.with("Link", &next) } else { reply }
        });
        bench.push(&[("a.gguf", b"1")]);
        bench.hub.without_blobs();
        assert!(matches!(bench.resolve(&spec(&[])), Err(SourceError::Network { .. })));
    }
    assert!(elsewhere.seen().is_empty(), "a link leads nowhere else");
}

#[test]
fn fetched_once_into_the_shared_cache_and_adopted_afterwards() {
    let bench = Bench::good();
    let (big, small) = (noise(200_000, 2), b"small");
    let commit = bench.push(&[("w/x y/é.gguf", &big), ("config.json", small)]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&pin).unwrap();
    let cache = bench.cache();
    let (blob, git) = (Digest::of(&big).hex(), git_blob(small));
    assert_eq!(read(&cache.join("blobs").join(&blob)), big);
    assert_eq!(read(&cache.join("blobs").join(&git)), small);
    let pointer = cache.join("snapshots").join(&commit).join("w/x y/é.gguf");
    assert_eq!(read(&pointer), big);
    if cfg!(unix) {
        assert_eq!(fs::read_link(&pointer).unwrap(), Path::new("../../../../blobs").join(&blob));
        assert!(fs::metadata(&cache.join("blobs").join(&blob)).unwrap().permissions().readonly());
    }
    assert_eq!(read(&cache.join("refs/main")), commit.as_bytes());
    assert!(fs::exists(&cache.join("../.locks/models--Org--Tiny-Model_1.0-gguf").join(format!("{blob}.lock"))));

    let asked = (bench.asked(Site::Hub).len(), bench.asked(Site::Store).len());
    bench.fetch(&pin).unwrap();
    assert_eq!((bench.asked(Site::Hub).len(), bench.asked(Site::Store).len()), asked, "nothing is asked twice");
}

#[test]
fn small_files_come_side_by_side() {
    // The first answers wait for each other: of GET at lock, of HEAD at fetch.
    let (arrived, turned) = (Mutex::new([0, 0]), Condvar::new());
    let alone = Arc::new(AtomicUsize::new(0));
    let late = Arc::clone(&alone);
    let bench = Bench::spoilt(move |_, seen, reply| {
        let kind = usize::from(seen.method == "HEAD");
        if seen.path.contains("/resolve/") {
            let mut count = arrived.lock().unwrap();
            count[kind] += 1;
            turned.notify_all();
            let limit = std::time::Duration::from_secs(20);
            let waited = turned.wait_timeout_while(count, limit, |count| count[kind] < FILES_AT_ONCE).unwrap().1;
            late.fetch_add(usize::from(waited.timed_out()), Ordering::SeqCst);
        }
        reply
    });
    let names: Vec<String> = (0..FILES_AT_ONCE + 3).map(|number| format!("activation/{number}.pt")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|name| (&**name, name.as_bytes())).collect();
    bench.push(&files);
    let pin = bench.resolve(&spec(&["activation/**"])).unwrap();
    assert!(pin.files.is_sorted_by(|one, other| one.path < other.path));
    fs::remove_dir_all(&bench.cache()).unwrap();
    bench.fetch(&pin).unwrap();
    assert_eq!(alone.load(Ordering::SeqCst), 0, "requests that waited in vain for others");
}

#[test]
fn a_moved_branch_does_not_move_the_pin() {
    let bench = Bench::good();
    let old = bench.push(&[("a.gguf", b"old weights")]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    let new = bench.push(&[("a.gguf", b"new weights")]);
    bench.fetch(&pin).unwrap();
    let moved = bench.resolve(&spec(&[])).unwrap();
    assert_eq!((pin.commit.to_string(), moved.commit.to_string()), (old.clone(), new));
    bench.fetch(&moved).unwrap();
    assert_eq!(bench.resolve(&at(&old)).unwrap().files, pin.files);
}

#[test]
fn blobs_that_others_left_wrong_are_set_aside() {
    let bench = Bench::good();
    let big = noise(50_000, 3);
    bench.push(&[("a.gguf", &big)]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    let blob = bench.cache().join("blobs").join(Digest::of(&big).hex());
    let mut wrong = big.clone();
    wrong[7] ^= 1;
    fs::write_atomic(&blob, &wrong).unwrap();
    bench.fetch(&pin).unwrap();
    assert_eq!(read(&blob), big);
    assert_eq!(read(&blob.with_extension("bad")), wrong);
}

#[cfg(unix)]
#[test]
fn l6_what_cannot_be_a_blob_or_a_link_is_renamed_and_fetched_again() {
    let big = noise(50_000, 3);
    type Spoil = fn(&Path, &Path);
    let spoils: [Spoil; 4] = [
        |blob, _| std::os::unix::fs::symlink(blob, blob).unwrap(),
        |blob, _| fs::create_dir_all(&blob.join("x")).unwrap(),
        |_, pointer| fs::create_dir_all(&pointer.join("x")).unwrap(),
        |blob, _| {
            fs::write_atomic(blob, b"wrong").unwrap();
            fs::create_dir_all(&blob.with_extension("bad").join("x")).unwrap();
        },
    ];
    for (number, spoil) in spoils.into_iter().enumerate() {
        let bench = Bench::good();
        let commit = bench.push(&[("a.gguf", &big)]);
        let pin = bench.resolve(&spec(&[])).unwrap();
        let blob = bench.cache().join("blobs").join(Digest::of(&big).hex());
        fs::create_dir_all(fs::parent(&blob)).unwrap();
        spoil(&blob, &bench.cache().join("snapshots").join(&commit).join("a.gguf"));
        bench.fetch(&pin).unwrap_or_else(|error| panic!("{number}: {error:?}"));
        assert_eq!(read(&blob), big, "{number}");
    }
}

/// A program of another user must not be able to change a file's permissions through us.
#[cfg(unix)]
#[test]
fn m1_a_lock_file_that_is_a_link_is_refused_and_its_target_keeps_its_permissions() {
    use std::os::unix::fs::PermissionsExt as _;
    let bench = Bench::good();
    let big = noise(50_000, 3);
    bench.push(&[("a.gguf", &big)]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    let secret = bench.root.path().join("id_ed25519");
    fs::create_private(&secret, b"key").unwrap();
    let locks = bench.cache().join("../.locks/models--Org--Tiny-Model_1.0-gguf");
    fs::create_dir_all(&locks).unwrap();
    std::os::unix::fs::symlink(&secret, locks.join(format!("{}.lock", Digest::of(&big).hex()))).unwrap();
    let error = bench.fetch(&pin).unwrap_err();
    assert!(matches!(error, SourceError::Fs(_)), "{error:?}");
    assert_eq!(fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn blobs_that_others_left_right_are_adopted() {
    let mut bench = Bench::good();
    let big = noise(50_000, 4);
    bench.push(&[("a.gguf", &big)]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    fs::write_atomic(&bench.cache().join("blobs").join(Digest::of(&big).hex()), &big).unwrap();
    let asked = bench.asked(Site::Hub).len();
    bench.set("HF_HUB_OFFLINE", "1");
    bench.fetch(&pin).unwrap();
    assert_eq!(bench.asked(Site::Hub).len(), asked);
}

#[test]
fn whoever_waited_for_the_lock_takes_what_came_meanwhile() {
    let bench = Bench::good();
    let big = noise(50_000, 5);
    bench.push(&[("a.gguf", &big)]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    let blob = Digest::of(&big).hex();
    let lock = bench.cache().join("../.locks/models--Org--Tiny-Model_1.0-gguf").join(format!("{blob}.lock"));
    let held = crate::base::lock::acquire(&lock, &Cancel::default(), || ()).unwrap();
    std::thread::scope(|scope| {
        let fetching = scope.spawn(|| bench.fetch(&pin));
        let waits = || bench.told.0.lock().unwrap().iter().any(|event| matches!(event, Event::Waiting { .. }));
        while !waits() {
            std::thread::yield_now();
        }
        fs::write_atomic(&bench.cache().join("blobs").join(&blob), &big).unwrap();
        drop(held);
        fetching.join().unwrap().unwrap();
    });
    assert!(bench.asked(Site::Store).is_empty());
}

#[test]
fn split_weights_are_taken_whole_or_not_at_all() {
    let bench = Bench::good();
    let parts = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];
    let files: Vec<(&str, &[u8])> = parts.iter().map(|part| (*part, part.as_bytes())).collect();
    bench.push(&files);
    assert_eq!(names(&bench.resolve(&spec(&["*-00001-of-*.gguf"])).unwrap()), parts);
    assert_eq!(names(&bench.resolve(&spec(&["*-00003-of-*.gguf"])).unwrap()), parts, "whichever part is named");
    let below: Vec<(String, &[u8])> = files.iter().map(|(path, bytes)| (format!("Q4 é/{path}"), *bytes)).collect();
    bench.push(&below.iter().map(|(path, bytes)| (&**path, *bytes)).collect::<Vec<_>>());
    assert_eq!(names(&bench.resolve(&spec(&["Q4*/*-00002-of-*.gguf"])).unwrap()).len(), 3);
    bench.push(&files[..2]);
    let Err(SourceError::Missing { why, .. }) = bench.resolve(&spec(&["m-00001*"])) else { panic!() };
    assert!(why.contains("m-00003-of-00003.gguf"), "{why}");
}

#[test]
fn weights_outside_large_file_storage_are_hashed_when_small_and_refused_when_not() {
    let large = Bench::spoilt(|_, seen, reply| match seen.path.contains("/revision/") {
        true => Reply::text(&format!(
            r#"{{"sha":"{}","siblings":[{{"rfilename":"plain.gguf","size":99999999,"blobId":"{}"}}]}}"#,
            "a".repeat(40),
            "b".repeat(40)
        )),
        false => reply,
    });
    assert!(matches!(large.resolve(&spec(&[])), Err(SourceError::Hostile { .. })));
    let small = Bench::good();
    small.push(&[("plain.gguf", b"GGUF")]);
    let pin = small.resolve(&spec(&[])).unwrap();
    assert_eq!(pin.files[0].sha256, Digest::of(b"GGUF"));
    small.fetch(&pin).unwrap();
}

#[test]
fn a_small_file_that_is_not_the_listed_one_is_refused() {
    for body in ["<!DOCTYPE html><p>log in", "wrong", ""] {
        let bench = Bench::spoilt(
            move |_, seen, reply| {
                if seen.path.contains("resolve-cache") { Reply::text(body) } else { reply }
            },
        );
        bench.push(&[("config.json", b"right")]);
        assert!(matches!(bench.resolve(&spec(&[])), Err(SourceError::Mismatch { .. })), "{body}");
    }
}

#[test]
fn names_that_are_misquoted_get_a_list() {
    let bench = Bench::good();
    bench.push(&[("bamboo-7b-v0.1.Q4_0.powerinfer.gguf", b"1"), ("README.md", b"2")]);
    let Err(SourceError::Missing { why, hint, .. }) = bench.resolve(&spec(&["bamboo-7b-v0.1.Q4_0.gguf"])) else {
        panic!()
    };
    assert!(why.contains("bamboo-7b-v0.1.Q4_0.powerinfer.gguf"), "{why}");
    assert!(hint.unwrap().contains("bamboo-7b-v0.1.Q4_0.powerinfer.gguf"));
}

#[test]
fn what_may_not_be_had_is_said_with_the_way_to_it() {
    let text = |error: &SourceError| format!("{error:?}");
    let gated = Bench::good().anonymous();
    gated.push(&[("a.gguf", b"1")]);
    let pin = gated.resolve(&spec(&[])).unwrap();
    gated.hub.gate();
    let error = gated.fetch(&pin).unwrap_err();
    assert!(
        matches!(error, SourceError::Network { .. })
            && text(&error).contains("gated")
            && text(&error).contains("HF_TOKEN"),
        "{error:?}"
    );

    let mut other = Bench::good();
    other.push(&[("a.gguf", b"1")]);
    other.hub.gate();
    other.set("HF_TOKEN", "hf_somebody");
    let error = other.fetch(&pin).unwrap_err();
    assert!(text(&error).contains("no access yet"), "{error:?}");
    other.set("HF_TOKEN", TOKEN);
    other.fetch(&pin).unwrap();

    let private = Bench::good().anonymous();
    private.push(&[("a.gguf", b"1")]);
    private.hub.hide();
    let error = private.resolve(&spec(&[])).unwrap_err();
    assert!(matches!(&error, SourceError::Missing { why, .. } if why.contains("private")), "{error:?}");

    let bench = Bench::good();
    bench.push(&[("a.gguf", b"1")]);
    let unknown = HfSpec { hf: "no/such".to_owned(), ..spec(&[]) };
    assert!(matches!(bench.resolve(&unknown), Err(SourceError::Missing { .. })));
    let Err(SourceError::Missing { why, .. }) = bench.resolve(&at("feat/x y")) else { panic!() };
    assert!(why.contains("feat/x y"), "{why}");
    assert!(bench.asked(Site::Hub).last().unwrap().contains("/revision/feat%2Fx%20y?"));
}

#[test]
fn a_branch_with_a_slash_is_a_branch() {
    let bench = Bench::good();
    let commit = bench.hub.push(REPO, "refs/pr/1", &[("a.gguf", b"1")]);
    let pin = bench.resolve(&at("refs/pr/1")).unwrap();
    assert_eq!(pin.commit.to_string(), commit);
    bench.fetch_as(&at("refs/pr/1"), &pin).unwrap();
    assert_eq!(read(&bench.cache().join("refs/refs/pr/1")), commit.as_bytes());
}

#[test]
fn a_commit_that_is_gone_is_no_other_commit() {
    let bench = Bench::good();
    let commit = bench.push(&[("a.gguf", b"1")]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    bench.push(&[("a.gguf", b"2")]);
    bench.hub.forget(REPO, &commit);
    match bench.fetch(&pin) {
        Err(SourceError::Missing { why, hint: Some(hint), .. }) => {
            assert!(why.contains(&commit) && hint.contains("--upgrade"), "{why}: {hint}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn listed_but_gone_is_an_error_and_never_skipped() {
    let bench = Bench::spoilt(|_, seen, reply| match seen.path.contains("/resolve/") {
        true => Reply::text("").status(404).with("X-Error-Code", "EntryNotFound"),
        false => reply,
    });
    bench.push(&[("a.gguf", b"1"), ("b.gguf", b"2")]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    assert!(matches!(bench.fetch(&pin), Err(SourceError::Missing { .. })));
}

#[test]
fn a_hub_that_means_another_file_than_the_lock_is_refused_before_a_byte() {
    let bench = Bench::good();
    bench.push(&[("a.gguf", b"right")]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    for change in [|file: &mut FilePin| file.sha256 = Digest::of(b"other"), |file: &mut FilePin| file.size = 6] {
        let mut wrong = pin.clone();
        change(&mut wrong.files[0]);
        assert!(matches!(bench.fetch(&wrong), Err(SourceError::Mismatch { .. })));
    }
    assert!(bench.asked(Site::Store).is_empty());
}

#[test]
fn wrong_bytes_never_get_a_name_in_the_cache() {
    let big = noise(50_000, 6);
    type Bad = fn(Reply) -> Reply;
    let bads: [Bad; 3] =
        [|reply| reply.flip(9), |_| Reply::text("<!DOCTYPE html>log in"), |reply| reply.cut(0, 100).status(200)];
    for bad in bads {
        let bench = Bench::spoilt(move |site, _, reply| if site == Site::Store { bad(reply) } else { reply });
        bench.push(&[("a.gguf", &big)]);
        let pin = bench.resolve(&spec(&[])).unwrap();
        let error = bench.fetch(&pin).unwrap_err();
        assert!(matches!(error, SourceError::Mismatch { .. }), "{error:?}");
        assert!(!fs::exists(&bench.cache().join("blobs").join(Digest::of(&big).hex())));
        assert!(!fs::exists(&bench.cache().join("snapshots")));
    }
}

#[test]
fn links_that_expire_are_asked_for_anew() {
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    let size = (2 << 20) + 7;
    let big = noise(size, 7);
    let bench = Bench::spoilt(move |site, seen, reply| {
        let late = seen.range(size).is_some_and(|(first, _)| first > 0);
        if site == Site::Store && late && count.fetch_add(1, Ordering::SeqCst) == 0 {
            return Reply::text("<?xml version=\"1.0\"?><Error>Request has expired</Error>").status(403);
        }
        reply
    });
    bench.push(&[("a.gguf", &big)]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    let before = bench.asked(Site::Hub).len();
    bench.fetch(&pin).unwrap();
    assert!(refused.load(Ordering::SeqCst) >= 2, "a range was refused and asked for again");
    assert!(bench.asked(Site::Hub).len() >= before + 2, "one link, and another when it had expired");
}

#[test]
fn a_busy_hub_is_waited_for() {
    let turns = Arc::new(Mutex::new(0));
    let bench = Bench::spoilt(move |_, _, reply| {
        let mut turns = turns.lock().unwrap();
        *turns += 1;
        match *turns {
            1 => Reply::text("").status(429).with("Retry-After", "0"),
            2 => Reply::text("").status(502),
            _ => reply,
        }
    });
    bench.push(&[("a.gguf", b"1")]);
    bench.resolve(&spec(&[])).unwrap();
    let long = Bench::spoilt(|_, _, _| Reply::text("").status(429).with("Retry-After", "99999"));
    let error = long.resolve(&spec(&[])).unwrap_err();
    assert!(matches!(&error, SourceError::Network { why, .. } if why.contains("429")), "{error:?}");
}

#[test]
fn answers_that_are_no_hubs_are_named() {
    type Bad = fn() -> Reply;
    let bads: [Bad; 6] = [
        || Reply::text("<!DOCTYPE html><title>log in</title>"),
        || Reply::text("{\"sha\": \"main\", \"siblings\": []}"),
        || Reply::text("[]"),
        || Reply::text("{\"sha\": 7}"),
        || Reply::redirect(302, "ftp://elsewhere/"),
        || Reply::text("nope").status(418),
    ];
    for bad in bads {
        let bench = Bench::spoilt(move |_, _, _| bad());
        let error = bench.resolve(&spec(&[])).unwrap_err();
        assert!(matches!(error, SourceError::Network { .. }), "{error:?}");
    }
    let lying = Bench::spoilt(|_, _, _| Reply::text(&format!("{{\"sha\": \"{}\", \"siblings\": []}}", "a".repeat(40))));
    assert!(matches!(lying.resolve(&at(&"b".repeat(40))), Err(SourceError::Network { .. })));
}

#[test]
fn hostile_listings_touch_nothing() {
    let bench = Bench::spoilt(|_, seen, reply| match seen.path.contains("/revision/") {
        true => Reply::text(&format!(
            r#"{{"sha":"{}","siblings":[{{"rfilename":"../../etc/x.gguf","size":1,"lfs":{{"sha256":"{}","size":1}}}},
                {{"rfilename":"ok.gguf","size":1,"lfs":{{"sha256":"{}","size":1}}}}]}}"#,
            "a".repeat(40),
            "1".repeat(64),
            "2".repeat(64)
        )),
        false => reply,
    });
    assert_eq!(names(&bench.resolve(&spec(&[])).unwrap()), ["ok.gguf"]);
    let warned = |event: &Event| matches!(event, Event::Warning { text } if text.contains("are skipped"));
    assert!(bench.told.0.lock().unwrap().iter().any(warned));
    let bad = Bench::spoilt(|_, _, _| {
        Reply::text(&format!(
            r#"{{"sha":"{}","siblings":[{{"rfilename":"x","size":1,"lfs":{{"sha256":"zz","size":1}}}}]}}"#,
            "a".repeat(40)
        ))
    });
    assert!(matches!(bad.resolve(&spec(&[])), Err(SourceError::Network { .. })));
    for name in ["", "a/b/c", "../x", "a b/c", "a/..", "a--b/c", "-a/b", "a?b/c", "a/"] {
        let wrong = HfSpec { hf: name.to_owned(), ..spec(&[]) };
        assert!(matches!(bench.resolve(&wrong), Err(SourceError::Disagreement { .. })), "{name}");
    }
    let request = SourceSpec::Hf(spec(&[]));
    let error = crate::source::resolve_tree(&request, &bench.world);
    assert!(matches!(error, Err(SourceError::Disagreement { .. })));
}

#[test]
fn offline_sends_nothing() {
    let mut bench = Bench::good();
    bench.push(&[("a.gguf", b"1")]);
    let pin = bench.resolve(&spec(&[])).unwrap();
    let asked = bench.asked(Site::Hub).len();
    bench.set("HF_HUB_OFFLINE", "TRUE");
    for error in [bench.resolve(&spec(&[])).map(drop).unwrap_err(), bench.fetch(&pin).map(drop).unwrap_err()] {
        assert!(matches!(&error, SourceError::Network { why, .. } if why.contains("HF_HUB_OFFLINE")), "{error:?}");
    }
    bench.world.offline = true;
    assert!(matches!(bench.resolve(&spec(&[])), Err(SourceError::Offline { .. })));
    assert!(matches!(bench.fetch(&pin), Err(SourceError::Offline { .. })));
    assert_eq!(bench.asked(Site::Hub).len(), asked);
}

#[test]
fn a_mirror_of_the_manifest_is_used_and_gets_no_token() {
    let mut bench = Bench::good();
    bench.push(&[("a.gguf", b"1")]);
    bench.world.mirrors = vec![("https://huggingface.co".to_owned(), bench.hub.endpoint())];
    bench.world.env.remove("HF_ENDPOINT");
    let pin = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&pin).unwrap();
    assert!(bench.hub.seen(Site::Hub).iter().all(|seen| seen.header("authorization").is_none()));
}

#[test]
fn a_mirror_that_serves_everything_itself_is_a_hub() {
    let big = noise(90_000, 8);
    let (bytes, etag): (Arc<[u8]>, String) = (big.clone().into(), Digest::of(&big).hex());
    let bench = Bench::spoilt(move |_, seen, reply| match seen.path.contains("/resolve/") {
        true => Reply::bytes(Arc::clone(&bytes)).with("ETag", &etag),
        false => reply,
    });
    bench.push(&[("a.gguf", &big)]);
    bench.hub.without_blobs();
    let pin = bench.resolve(&spec(&[])).unwrap();
    bench.fetch(&pin).unwrap();
    assert!(bench.asked(Site::Store).is_empty());
}

use super::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::base::cancel::Cancel;
use crate::base::digest;
use crate::base::test_server::{Reply, Server};
use crate::base::tree::Listing;
use crate::format::manifest::Kind;
use crate::report::{Event, Reporter, Task};

fn tar_gz(entries: &[(&str, &[u8])]) -> Arc<[u8]> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (name, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(if name.ends_with(".sh") { 0o755 } else { 0o644 });
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap().into()
}

fn engine() -> Arc<[u8]> {
    tar_gz(&[("top-1/CMakeLists.txt", b"project(x)"), ("top-1/s/é.sh", b"#!"), ("top-1/s/b.c", b"int x;")])
}

fn serving(bytes: Arc<[u8]>) -> Server {
    Server::start(move |seen, _| Reply::bytes(Arc::clone(&bytes)).ranged(seen))
}

struct Project {
    root: tempfile::TempDir,
    world: World,
}

impl Project {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let world = World {
            task: Task::silent(),
            project: root.path().to_owned(),
            scratch: root.path().join("scratch ä"),
            offline: false,
            mirrors: Vec::new(),
            env: BTreeMap::new(),
        };
        Self { root, world }
    }

    fn bring(&self, spec: &UrlSpec, kind: Kind, pin: &Pin) -> Result<(PathBuf, Fetched), SourceError> {
        let staging = self.root.path().join("staging");
        fs::remove_dir_all(&staging).unwrap();
        fs::create_dir_all(&staging).unwrap();
        let files: Vec<&FilePin> = pin.files.iter().collect();
        let fetched = match kind {
            Kind::Model => spec.fetch_files(&self.world, &pin.download, &files, &staging),
            _ => spec.fetch_tree(&self.world, &pin.download, &pin.tree.unwrap(), &staging),
        };
        Ok((staging, fetched?))
    }

    fn fetch(&self, spec: &UrlSpec, kind: Kind, pin: &Pin) -> Result<PathBuf, SourceError> {
        self.bring(spec, kind, pin).map(|(staging, _)| staging)
    }

    /// The digest of the engine's source as it was brought.
    fn tree(&self, spec: &UrlSpec, pin: &Pin) -> Digest {
        let (staging, fetched) = self.bring(spec, Kind::Engine, pin).unwrap();
        Listing::scan(&staging, &fetched.modes, &Cancel::default()).unwrap().digest()
    }
}

/// What a request resolves to, for an engine or a model.
#[derive(Debug)]
struct Pin {
    download: FilePin,
    tree: Option<Digest>,
    files: Vec<FilePin>,
}

fn resolve(spec: &UrlSpec, world: &World, kind: Kind) -> Result<Pin, SourceError> {
    if kind == Kind::Model {
        let (download, files) = spec.resolve_files(world)?;
        return Ok(Pin { download, tree: None, files });
    }
    let (download, tree) = spec.resolve_tree(world)?;
    Ok(Pin { download, tree: Some(tree), files: Vec::new() })
}

fn spec(url: &str) -> UrlSpec {
    UrlSpec { url: url.to_owned(), sha256: None, subdir: None, files: Vec::new() }
}

#[test]
fn an_engine_is_the_tree_in_the_archive() {
    let (project, server) = (Project::new(), serving(engine()));
    let spec = spec(&server.url("/v/top%201.tar.gz?token=secret"));
    let pin = resolve(&spec, &project.world, Kind::Engine).unwrap();
    assert_eq!(pin.download.path.as_str(), "top 1.tar.gz");
    assert_eq!(pin.download.sha256, Digest::of(&engine()));
    let asked = server.seen().len();
    assert_eq!(Some(project.tree(&spec, &pin)), pin.tree);
    let left = fs::read_dir(&folder(&project.world)).unwrap();
    assert!(left.iter().all(|path| path.extension().is_some_and(|end| end == "lock")), "{left:?}");
    assert_eq!(server.seen().len(), asked, "what was fetched at lock is used");
    // Somebody wrote over it.
    fs::write_atomic(&home(&project.world, &pin.download.sha256), b"other").unwrap();
    assert_eq!(Some(project.tree(&spec, &pin)), pin.tree);
    assert!(server.seen().len() > asked);

    let below = UrlSpec { subdir: Some("s".parse().unwrap()), ..spec };
    let pin = resolve(&below, &project.world, Kind::Engine).unwrap();
    assert_eq!(Some(project.tree(&below, &pin)), pin.tree);
    assert_eq!(fs::read_dir(&project.root.path().join("staging")).unwrap().len(), 2);
}

#[test]
fn a_model_is_the_file_or_files_of_the_archive() {
    let (project, server) = (Project::new(), serving(engine()));
    let whole = spec(&server.url("/m/weights.gguf"));
    let pin = resolve(&whole, &project.world, Kind::Model).unwrap();
    assert_eq!(pin.files, std::slice::from_ref(&pin.download));
    let staging = project.fetch(&whole, Kind::Model, &pin).unwrap();
    assert_eq!(digest::of_file(&staging.join("weights.gguf")).unwrap().0, pin.files[0].sha256);

    let some = UrlSpec { files: vec!["s/*".to_owned()], ..whole.clone() };
    let pin = resolve(&some, &project.world, Kind::Model).unwrap();
    let names: Vec<_> = pin.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["s/b.c", "s/é.sh"]);
    let staging = project.fetch(&some, Kind::Model, &pin).unwrap();
    for file in &pin.files {
        assert_eq!(digest::of_file(&file.path.under(&staging)).unwrap(), (file.sha256, file.size));
    }
    let none = UrlSpec { files: vec!["s/b.cc".to_owned()], ..whole };
    match resolve(&none, &project.world, Kind::Model) {
        Err(SourceError::Missing { why, hint, .. }) => {
            assert!(why.contains("CMakeLists.txt"), "{why}");
            assert_eq!(hint.as_deref(), Some("did you mean `s/b.c`?"));
        }
        other => panic!("{other:?}"),
    }
}

/// Two projects that take files of one archive: the second waits, and does not remove what the first one reads.
#[test]
fn m3_an_archive_belongs_to_whoever_holds_it() {
    struct Sent(Mutex<std::sync::mpsc::Sender<Event>>);
    impl Reporter for Sent {
        fn report(&self, event: &Event) {
            let _ = self.0.lock().unwrap().send(event.clone());
        }
    }
    let (project, server) = (Project::new(), serving(engine()));
    let spec = UrlSpec { files: vec!["s/*".to_owned()], ..spec(&server.url("/a.tar.gz")) };
    let (package, file, held) = spec.measure(&project.world).unwrap();
    let files = spec.resolve_files(&World { scratch: project.root.path().join("other"), ..project.world.clone() });
    let files = files.unwrap().1;
    let (events, waited) = std::sync::mpsc::channel();
    let other =
        World { task: Task::new(Arc::new(Sent(Mutex::new(events))), Cancel::default()), ..project.world.clone() };
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let (world, files) = (other, files.iter().collect::<Vec<_>>());
            spec.fetch_files(&world, &package, &files, &project.root.path().join("staging")).map(|_| ())
        });
        // Ends, too, when the second one has finished without waiting.
        assert!(waited.iter().any(|event| matches!(event, Event::Waiting { .. })), "the second one did not wait");
        assert!(fs::exists(&file), "the archive was removed under its reader");
        drop(held);
        second.join().unwrap().unwrap();
    });
}

#[test]
fn a_given_digest_is_checked_and_a_page_is_no_file() {
    let project = Project::new();
    let server = serving(engine());
    let wrong = UrlSpec { sha256: Some(Digest::of(b"other")), ..spec(&server.url("/a.tar.gz")) };
    assert!(matches!(resolve(&wrong, &project.world, Kind::Engine), Err(SourceError::Mismatch { .. })));
    for page in ["<html>log in</html>", "", "version https://git-lfs.github.com/spec/v1\n"] {
        let server = Server::start(move |_, _| Reply::text(page));
        let result = resolve(&spec(&server.url("/a.gguf")), &project.world, Kind::Model);
        assert!(matches!(result, Err(SourceError::Network { hint: Some(_), .. })), "{result:?}");
    }
    let text = Server::start(|_, _| Reply::text("only text"));
    let result = resolve(&spec(&text.url("/a.tar.gz")), &project.world, Kind::Engine);
    assert!(matches!(result, Err(SourceError::Hostile { .. })), "{result:?}");
    let some = UrlSpec { files: vec!["*".to_owned()], ..spec(&text.url("/a.tar.gz")) };
    assert!(matches!(resolve(&some, &project.world, Kind::Model), Err(SourceError::Disagreement { .. })));
    let nameless = resolve(&spec("https://example.org/?file=1"), &project.world, Kind::Model);
    assert!(matches!(nameless, Err(SourceError::Disagreement { .. })));
}

#[test]
fn the_servers_file_changed_since_it_was_locked() {
    let project = Project::new();
    let now = Arc::new(Mutex::new(engine()));
    let served = Arc::clone(&now);
    let server = Server::start(move |seen, _| Reply::bytes(Arc::clone(&served.lock().unwrap())).ranged(seen));
    let spec = spec(&server.url("/a.tar.gz"));
    let pin = resolve(&spec, &project.world, Kind::Engine).unwrap();
    fs::remove_dir_all(&project.world.scratch).unwrap();
    *now.lock().unwrap() = tar_gz(&[("a", b"1")]);
    assert!(matches!(project.fetch(&spec, Kind::Engine, &pin), Err(SourceError::Mismatch { .. })));
}

#[test]
fn offline_what_is_there_is_enough() {
    let mut project = Project::new();
    let server = serving(engine());
    let spec = spec(&server.url("/a.tar.gz"));
    let pin = resolve(&spec, &project.world, Kind::Engine).unwrap();
    project.world.offline = true;
    project.fetch(&spec, Kind::Engine, &pin).unwrap();
    fs::remove_dir_all(&project.world.scratch).unwrap();
    assert!(matches!(project.fetch(&spec, Kind::Engine, &pin), Err(SourceError::Offline { .. })));
}

#[test]
fn mirrors_stand_in_for_addresses() {
    let mut project = Project::new();
    let server = serving(engine());
    project.world.mirrors = vec![
        ("https://example.org/".to_owned(), "http://127.0.0.1:9/".to_owned()),
        ("https://example.org/files/".to_owned(), server.url("/mirror/")),
    ];
    let pin = resolve(&spec("https://example.org/files/a.tar.gz"), &project.world, Kind::Engine).unwrap();
    assert_eq!(server.seen()[0].path, "/mirror/a.tar.gz");
    assert_eq!(pin.download.path.as_str(), "a.tar.gz");
}

#[test]
fn names_in_addresses() {
    let name = |url: &str| file_name(url).map(String::from);
    assert_eq!(name("https://h/a/b.gguf?x=/y#z").as_deref(), Some("b.gguf"));
    assert_eq!(name("https://h/%C3%A9%20x%zz").as_deref(), Some("é x%zz"));
    for bad in ["https://h", "https://h/", "https://h/a%2Fb", "https://h/..", "https://h/%00", "https://h/%FF"] {
        assert_eq!(name(bad), None, "{bad}");
    }
}

#[test]
fn a_broken_archive_is_refused() {
    let mut bytes = engine().to_vec();
    bytes.truncate(bytes.len() - 9);
    let server = serving(bytes.into());
    let result = resolve(&spec(&server.url("/a.tar.gz")), &Project::new().world, Kind::Engine);
    assert!(matches!(result, Err(SourceError::Hostile { .. })), "{result:?}");
}

#[test]
fn the_user_may_say_how_many_connections() {
    let mut world = Project::new().world;
    assert_eq!(world.connections(), 4);
    for (text, count) in [("2", 2), (" 8 ", 8), ("0", 1), ("99", 8), ("many", 4), ("-1", 4)] {
        world.env.insert("AITOOLS_CONNECTIONS".to_owned(), text.to_owned());
        assert_eq!(world.connections(), count, "{text}");
    }
}

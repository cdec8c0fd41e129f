//! With the machine's own pip against an index on a loopback port, good and bad.

use std::io::Write as _;
use std::sync::{Arc, Mutex};

use super::*;
use crate::base::cancel::Cancel;
use crate::base::test_server::{Reply, Seen, Server};
use crate::format::manifest::Kind;
use crate::report::{Event, Reporter, Task};

/// Stands in every index address, as credentials do, and may appear nowhere.
const SECRET: &str = "s3cret";

const HERE: &str = "linux-macos-windows";

fn wheel(members: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes, mode) in members {
        zip.start_file(*name, zip::write::SimpleFileOptions::default().unix_permissions(*mode)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn sdist(members: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (name, bytes, mode) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(*mode);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

/// Pseudo-random, so that compression leaves something to break.
fn noise(size: usize) -> Vec<u8> {
    (0..size as u64).map(|at| Digest::of(&at.to_le_bytes()).as_bytes()[0]).collect()
}

#[derive(Clone)]
struct Package {
    name: String,
    bytes: Arc<[u8]>,
    yanked: bool,
}

impl Package {
    fn new(name: &str, bytes: Vec<u8>) -> Self {
        Self { name: name.to_owned(), bytes: bytes.into(), yanked: false }
    }
}

fn tool_wheels() -> Vec<Package> {
    let tags = ["manylinux_2_17_x86_64", "manylinux_2_17_aarch64", "macosx_10_9_universal2", "win_amd64", "win32"];
    let wheel_for = |tag: &&str| {
        let script = format!("{HERE} {tag}");
        let exe = if tag.starts_with("win") {
            "Tiny_Tool-1.2.data/scripts/tiny.exe"
        } else {
            "Tiny_Tool-1.2.data/scripts/tiny"
        };
        let members = [(exe, script.as_bytes(), 0o644), ("tiny_tool/é x.py", b"raise SystemExit".as_slice(), 0o644)];
        Package::new(&format!("Tiny_Tool-1.2-py3-none-{tag}.whl"), wheel(&members))
    };
    let mut all: Vec<Package> = tags.iter().map(wheel_for).collect();
    all.push(Package::new("tiny-tool-1.2.tar.gz", sdist(&[("tiny-tool-1.2/setup.py", b"boom", 0o644)])));
    all.push(Package::new("tiny_tool-1.10-py3-none-any.whl", wheel(&[("x", b"", 0o644)])));
    all
}

fn engine_sdist() -> Package {
    let members: [(&str, &[u8], u32); 4] = [
        ("tiny_engine-3.0/setup.py", b"raise SystemExit('package code must not run')", 0o644),
        ("tiny_engine-3.0/vendor/e e/CMakeLists.txt", b"project(x)", 0o644),
        ("tiny_engine-3.0/vendor/e e/build.sh", b"#!/bin/sh", 0o755),
        ("tiny_engine-3.0/vendor/other", &noise(300_000), 0o644),
    ];
    Package::new("tiny_engine-3.0.tar.gz", sdist(&members))
}

fn model_wheel() -> Package {
    let members: [(&str, &[u8], u32); 3] = [
        ("tiny_model/é.Q4_1.gguf", &noise(50_000), 0o644),
        ("tiny_model/b.gguf", b"GGUF", 0o644),
        ("tiny_model/__init__.py", b"", 0o644),
    ];
    Package::new("tiny_model-0.1-py3-none-any.whl", wheel(&members))
}

fn project_of(package: &Package) -> String {
    package
        .name
        .split('-')
        .take_while(|part| !part.starts_with(|c: char| c.is_ascii_digit()))
        .collect::<Vec<_>>()
        .join("-")
        .to_lowercase()
        .replace('_', "-")
}

fn json_page(packages: &[&Package]) -> String {
    let file = |package: &&Package| {
        serde_json::json!({
            "filename": package.name, "url": format!("../../files/{}", package.name), "yanked": package.yanked,
            "hashes": { "sha256": Digest::of(&package.bytes).hex() }, "size": package.bytes.len(),
        })
    };
    serde_json::json!({ "meta": { "api-version": "1.1" }, "files": packages.iter().map(file).collect::<Vec<_>>() })
        .to_string()
}

fn html_page(packages: &[&Package]) -> String {
    let anchor = |package: &&Package| {
        let yanked = if package.yanked { " data-yanked=\"it &amp; that\"" } else { "" };
        let (name, hex) = (&package.name, Digest::of(&package.bytes).hex());
        format!("<a href=\"../../files/{name}#sha256={hex}\"{yanked}>{name}</a><br/>\n")
    };
    format!("<!DOCTYPE html><html><body>{}</body></html>", packages.iter().map(anchor).collect::<String>())
}

/// A good index.
fn answer(packages: &[Package], seen: &Seen) -> Reply {
    let path = seen.path.split('?').next().unwrap();
    if let Some(project) = path.strip_prefix("/simple/").and_then(|rest| rest.strip_suffix('/')) {
        let its: Vec<&Package> = packages.iter().filter(|package| project_of(package) == project).collect();
        return match its.as_slice() {
            [] => Reply::text("nothing").status(404),
            its => Reply::text(&json_page(its)).with("Content-Type", "application/vnd.pypi.simple.v1+json"),
        };
    }
    match path.strip_prefix("/files/").and_then(|name| packages.iter().find(|package| package.name == name)) {
        Some(package) => Reply::bytes(Arc::clone(&package.bytes)).ranged(seen),
        None => Reply::text("nothing").status(404),
    }
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
    server: Server,
    world: World,
    told: Arc<Told>,
}

impl Bench {
    fn good() -> Self {
        Self::new(|packages, seen, _| answer(packages, seen))
    }

    fn new(handler: impl Fn(&[Package], &Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::with(tool_wheels().into_iter().chain([engine_sdist(), model_wheel()]).collect(), handler)
    }

    fn with(
        packages: Vec<Package>,
        handler: impl Fn(&[Package], &Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let root = tempfile::Builder::new().prefix("aitools é ").tempdir().unwrap();
        let server = Server::start(move |seen, turn| handler(&packages, seen, turn));
        let index = server.url("/simple").replace("http://", &format!("http://{SECRET}:{SECRET}@"));
        let (project, scratch) = (root.path().join("project"), root.path().join("scratch"));
        fs::create_dir_all(&project).unwrap();
        let home = root.path().to_str().unwrap().to_owned();
        let mut env = inherited();
        for (key, value) in
            [("HOME", home.as_str()), ("PIP_INDEX_URL", &index), ("PIP_RETRIES", "0"), ("PIP_TIMEOUT", "20")]
        {
            env.insert(key.to_owned(), value.to_owned());
        }
        env.insert("PIP_CONFIG_FILE".to_owned(), if cfg!(windows) { "nul" } else { "/dev/null" }.to_owned());
        let told = Arc::<Told>::default();
        let reporter: Arc<dyn Reporter> = Arc::clone(&told) as _;
        let task = Task::new(reporter, Cancel::default());
        let world = World { task, project, scratch, offline: false, mirrors: Vec::new(), env };
        Self { root, server, world, told }
    }

    fn resolve(&self, spec: &PypiSpec, kind: Kind) -> Result<Pin, SourceError> {
        let pin = resolve(spec, &self.world, kind);
        self.leaks_nothing(&format!("{pin:?}"));
        pin
    }

    fn fetch(&self, spec: &PypiSpec, kind: Kind, pin: &Pin) -> Result<PathBuf, SourceError> {
        let staging = tempfile::tempdir_in(self.root.path()).unwrap().keep();
        let files: Vec<&FilePin> = pin.files.iter().collect();
        let fetched = match kind {
            Kind::Model => spec.fetch_files(&self.world, &pin.downloads[0], &files, &staging),
            Kind::Engine => spec.fetch_package(&self.world, &pin.downloads[0], &staging),
            Kind::Tool => spec.fetch_package(&self.world, package_here(&pin.downloads).unwrap(), &staging),
        };
        self.leaks_nothing(&format!("{fetched:?}"));
        fetched.map(|_| staging)
    }

    fn leaks_nothing(&self, text: &str) {
        let events = format!("{:?}", self.told.0.lock().unwrap());
        for hidden in [SECRET, "127.0.0.1", "localhost", "/simple"] {
            assert!(!text.contains(hidden) && !events.contains(hidden), "`{hidden}` is in {text} {events}");
        }
    }

    fn requests(&self, prefix: &str) -> Vec<Seen> {
        self.server.seen().into_iter().filter(|seen| seen.path.starts_with(prefix) && seen.method == "GET").collect()
    }
}

#[expect(clippy::disallowed_methods, reason = "the interpreter is looked up as on the command line")]
fn inherited() -> std::collections::BTreeMap<String, String> {
    let keep = ["PATH", "Path", "SystemRoot", "SYSTEMROOT", "PATHEXT", "LD_LIBRARY_PATH"];
    keep.iter().filter_map(|key| Some(((*key).to_owned(), std::env::var(key).ok()?))).collect()
}

fn spec(pypi: &str, version: &str) -> PypiSpec {
    PypiSpec { pypi: pypi.to_owned(), version: version.to_owned(), sdist: false, subdir: None, files: Vec::new() }
}

fn engine() -> PypiSpec {
    PypiSpec { sdist: true, subdir: Some("vendor/e e".parse().unwrap()), ..spec("tiny-engine", "3.0") }
}

fn model() -> PypiSpec {
    PypiSpec { files: vec!["tiny_model/*.gguf".to_owned()], ..spec("tiny.model", "0.1") }
}

/// What a request resolves to, for a tool, an engine or a model.
#[derive(Debug, Clone, Default, PartialEq)]
struct Pin {
    downloads: Vec<FilePin>,
    tree: Option<Digest>,
    files: Vec<FilePin>,
}

fn resolve(spec: &PypiSpec, world: &World, kind: Kind) -> Result<Pin, SourceError> {
    match kind {
        Kind::Tool => Ok(Pin { downloads: spec.resolve_packages(world)?, ..Pin::default() }),
        Kind::Engine => {
            let (package, tree) = spec.resolve_tree(world)?;
            Ok(Pin { downloads: vec![package], tree: Some(tree), ..Pin::default() })
        }
        Kind::Model => {
            let (package, files) = spec.resolve_files(world)?;
            Ok(Pin { downloads: vec![package], files, ..Pin::default() })
        }
    }
}

fn pin_of(package: &Package) -> FilePin {
    FilePin {
        path: package.name.parse().unwrap(),
        size: package.bytes.len() as u64,
        sha256: Digest::of(&package.bytes),
    }
}

/// What [`model`] resolves to.
fn model_pin() -> Pin {
    let file = |path: &str, bytes: &[u8]| FilePin {
        path: path.parse().unwrap(),
        size: bytes.len() as u64,
        sha256: Digest::of(bytes),
    };
    let files = vec![file("tiny_model/b.gguf", b"GGUF"), file("tiny_model/é.Q4_1.gguf", &noise(50_000))];
    Pin { downloads: vec![pin_of(&model_wheel())], files, ..Pin::default() }
}

/// What fetching [`engine`] needs.
fn engine_pin() -> Pin {
    Pin { downloads: vec![pin_of(&engine_sdist())], ..Pin::default() }
}

/// What the tool's version resolves to.
fn tool_pin() -> Pin {
    let known = |package: &Package| package.name.starts_with("Tiny") && !package.name.contains("win32");
    let mut downloads: Vec<FilePin> = tool_wheels().iter().filter(|package| known(package)).map(pin_of).collect();
    downloads.sort();
    Pin { downloads, ..Pin::default() }
}

fn names(pins: &[FilePin]) -> Vec<&str> {
    pins.iter().map(|pin| pin.path.as_str()).collect()
}

#[test]
fn a_tool_is_locked_for_every_platform_and_unpacked_for_this_one() {
    let bench = Bench::good();
    let tool = spec("Tiny.Tool", "1.2.0");
    let pin = bench.resolve(&tool, Kind::Tool).unwrap();
    let expected = [
        "Tiny_Tool-1.2-py3-none-macosx_10_9_universal2.whl",
        "Tiny_Tool-1.2-py3-none-manylinux_2_17_aarch64.whl",
        "Tiny_Tool-1.2-py3-none-manylinux_2_17_x86_64.whl",
        "Tiny_Tool-1.2-py3-none-win_amd64.whl",
    ];
    assert_eq!(names(&pin.downloads), expected);
    assert!(bench.requests("/files").is_empty(), "a tool is locked without a download");
    assert_eq!(bench.server.seen()[0].header("authorization"), Some("Basic czNjcmV0OnMzY3JldA=="));

    let staging = bench.fetch(&tool, Kind::Tool, &pin).unwrap();
    let program = program(&staging, "tiny").unwrap();
    assert!(String::from_utf8(fs::read_bounded(&program, 99).unwrap()).unwrap().starts_with(HERE));
    assert_eq!(fs::is_executable(&fs::metadata(&program).unwrap()), cfg!(unix));
    assert_eq!(bench.requests("/files").len(), 1);
}

/// Two projects that take members of one package: the second waits, and does not remove what the first one reads.
#[test]
fn m3_a_package_belongs_to_whoever_holds_it() {
    let bench = Bench::good();
    let pin = bench.resolve(&model(), Kind::Model).unwrap();
    let held = model().obtain(&bench.world, &pin.downloads[0]).unwrap();
    let (events, waited) = std::sync::mpsc::channel();
    let other = World { task: Task::new(Arc::new(Sent(Mutex::new(events))), Cancel::default()), ..bench.world.clone() };
    let (spec, staging) = (model(), tempfile::tempdir_in(bench.root.path()).unwrap());
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let (world, files) = (other, pin.files.iter().collect::<Vec<_>>());
            spec.fetch_files(&world, &pin.downloads[0], &files, staging.path()).map(|_| ())
        });
        // Ends, too, when the second one has finished without waiting.
        assert!(waited.iter().any(|event| matches!(event, Event::Waiting { .. })), "the second one did not wait");
        assert!(fs::exists(&held.path), "the package was removed under its reader");
        drop(held);
        second.join().unwrap().unwrap();
    });
    assert!(fs::exists(&staging.path().join("tiny_model/b.gguf")));
}

/// Sends events on.
struct Sent(Mutex<std::sync::mpsc::Sender<Event>>);

impl Reporter for Sent {
    fn report(&self, event: &Event) {
        let _ = self.0.lock().unwrap().send(event.clone());
    }
}

#[test]
fn an_engine_is_the_sdist_unpacked_and_never_run() {
    let bench = Bench::good();
    let pin = bench.resolve(&engine(), Kind::Engine).unwrap();
    assert_eq!(names(&pin.downloads), ["tiny_engine-3.0.tar.gz"]);
    let staging = bench.fetch(&engine(), Kind::Engine, &pin).unwrap();
    assert_eq!(bench.requests("/files").len(), 1, "what came at lock is used at fetch");
    let listing = Listing::scan(&staging, &Default::default(), &Cancel::default()).unwrap();
    assert_eq!(listing.0.keys().map(RelPath::as_str).collect::<Vec<_>>(), ["CMakeLists.txt", "build.sh"]);
    assert_eq!(Some(listing.digest()), pin.tree);

    let elsewhere = PypiSpec { subdir: Some("vendor/ee".parse().unwrap()), ..engine() };
    assert!(matches!(bench.resolve(&elsewhere, Kind::Engine), Err(SourceError::Missing { .. })));
}

#[test]
fn a_models_files_are_pinned_and_brought_at_their_paths() {
    let bench = Bench::good();
    let pin = bench.resolve(&model(), Kind::Model).unwrap();
    assert_eq!(pin, model_pin());
    let staging = bench.fetch(&model(), Kind::Model, &pin).unwrap();
    for file in &pin.files {
        assert_eq!(digest::of_file(&file.path.under(&staging)).unwrap(), (file.sha256, file.size));
    }
    assert!(!fs::exists(&staging.join("tiny_model/__init__.py")));

    let wrong = PypiSpec { files: vec!["*.gguf".to_owned()], ..model() };
    let Err(SourceError::Missing { why, .. }) = bench.resolve(&wrong, Kind::Model) else { panic!() };
    assert!(why.contains("tiny_model/b.gguf"), "{why}");
}

#[test]
fn an_index_of_html_pages_gives_the_same_pin() {
    let html = Bench::new(|packages, seen, _| match seen.path.as_str() {
        "/simple/tiny-tool/" => Reply::redirect(302, "/elsewhere/pages/tiny/"),
        "/elsewhere/pages/tiny/" => {
            let its: Vec<&Package> = packages.iter().filter(|package| project_of(package) == "tiny-tool").collect();
            Reply::text(&html_page(&its).replace("../../files", "/files"))
                .with("Content-Type", "text/html; charset=utf-8")
        }
        _ => answer(packages, seen),
    });
    let tool = spec("tiny-tool", "1.2");
    let pin = html.resolve(&tool, Kind::Tool).unwrap();
    assert_eq!(pin, tool_pin());
    html.fetch(&tool, Kind::Tool, &pin).unwrap();
}

#[test]
fn an_index_without_digests_is_measured() {
    let bench = Bench::new(|packages, seen, _| match seen.path.as_str() {
        "/simple/tiny-model/" => {
            Reply::text("<a href='/files/tiny_model-0.1-py3-none-any.whl'>x</a>").with("Content-Type", "text/html")
        }
        _ => answer(packages, seen),
    });
    let pin = bench.resolve(&model(), Kind::Model).unwrap();
    assert_eq!(pin, model_pin());
    bench.fetch(&model(), Kind::Model, &pin).unwrap();
    assert_eq!(bench.requests("/files").len(), 1);
}

#[test]
fn a_folder_of_packages_is_an_index_too() {
    let mut bench = Bench::good();
    let folder = bench.root.path().join("wheel house");
    fs::write_atomic(&folder.join(model_wheel().name), &model_wheel().bytes).unwrap();
    bench.world.env.insert("PIP_NO_INDEX".to_owned(), "1".to_owned());
    bench.world.env.insert("PIP_FIND_LINKS".to_owned(), "../wheel%20house".replace("%20", " "));
    // pip splits several folders at spaces, so the address form is the one for such a name.
    let address = format!("file://{}", folder.to_str().unwrap().replace(' ', "%20").replace('\\', "/"));
    bench.world.env.insert("PIP_FIND_LINKS".to_owned(), address);
    let pin = bench.resolve(&model(), Kind::Model).unwrap();
    assert_eq!(pin.downloads[0].sha256, Digest::of(&model_wheel().bytes));
    bench.fetch(&model(), Kind::Model, &pin).unwrap();
    assert!(bench.server.seen().is_empty());
}

#[test]
fn versions_and_projects_that_are_not_there() {
    let bench = Bench::good();
    let Err(SourceError::Missing { why, hint, .. }) = bench.resolve(&spec("tiny-tool", "1.11"), Kind::Tool) else {
        panic!()
    };
    assert_eq!(why, "the package index has no such version; the newest are 1.10, 1.2");
    assert_eq!(hint.as_deref(), Some("did you mean `1.10`?"));
    for (wrong, kind) in [(spec("no-such-thing", "1"), Kind::Tool), (PypiSpec { sdist: true, ..model() }, Kind::Model)]
    {
        assert!(matches!(bench.resolve(&wrong, kind), Err(SourceError::Missing { .. })), "{wrong:?}");
    }
    for (name, version) in [("../x", "1"), ("x", "==1"), ("-r", "1"), ("x", ""), ("x y", "1"), ("a?b", "1")] {
        let wrong = spec(name, version);
        assert!(matches!(bench.resolve(&wrong, Kind::Tool), Err(SourceError::Disagreement { .. })), "{wrong:?}");
    }
}

#[test]
fn what_was_withdrawn_is_told_and_left_out() {
    let mut packages = tool_wheels();
    packages[0].yanked = true;
    let bench = Bench::with(packages.clone(), |packages, seen, _| answer(packages, seen));
    let pin = bench.resolve(&spec("tiny-tool", "1.2"), Kind::Tool).unwrap();
    assert!(!names(&pin.downloads).iter().any(|name| name.contains("manylinux_2_17_x86_64")));
    for package in &mut packages {
        package.yanked = true;
    }
    let bench = Bench::with(packages, |packages, seen, _| answer(packages, seen));
    assert_eq!(bench.resolve(&spec("tiny-tool", "1.2"), Kind::Tool).unwrap().downloads.len(), 4);
    let told = bench.told.0.lock().unwrap();
    let warned = |event: &Event| matches!(event, Event::Warning { text } if text.contains("was yanked"));
    assert!(told.iter().any(warned), "{told:?}");
}

#[test]
fn wrong_bytes_and_wrong_sizes_are_refused() {
    let pin = model_pin();
    let size = model_wheel().bytes.len();
    type Bad = fn(Reply) -> Reply;
    let bads: [(Bad, &str); 4] = [
        (|reply| reply.flip(99), "bytes)"),
        (|reply| reply.cut(0, 100), "(100 bytes)"),
        (|_| Reply::text("<!DOCTYPE html>log in"), "bytes)"),
        (|_| Reply::made(9 << 20, Arc::new(|_, piece: &mut [u8]| piece.fill(0))), "bytes)"),
    ];
    for (bad, actual_ends) in bads {
        let bench = Bench::new(move |packages, seen, _| {
            let reply = answer(packages, seen);
            if seen.path.starts_with("/files") { bad(reply) } else { reply }
        });
        let Err(SourceError::Mismatch { expected, actual, .. }) = bench.fetch(&model(), Kind::Model, &pin) else {
            panic!()
        };
        assert!(expected.ends_with(&format!("({size} bytes)")) && actual.ends_with(actual_ends), "{expected} {actual}");
        let part = home(&bench.world, &pin.downloads[0]).with_file_name("part");
        assert!(!fs::exists(&part), "bad bytes do not stay");
    }
}

#[test]
fn an_index_that_lies_about_size_is_caught_at_lock() {
    let bench = Bench::new(|packages, seen, _| match seen.path.as_str() {
        "/simple/tiny-model/" => {
            let page =
                json_page(&[&model_wheel()]).replace(&format!("\"size\":{}", model_wheel().bytes.len()), "\"size\":7");
            Reply::text(&page).with("Content-Type", "application/vnd.pypi.simple.v1+json")
        }
        _ => answer(packages, seen),
    });
    assert!(matches!(bench.resolve(&model(), Kind::Model), Err(SourceError::Mismatch { .. })));
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let bench = Bench::new(|packages, seen, _| {
        let reply = answer(packages, seen);
        let first = seen.path.starts_with("/files") && seen.header("range").is_none();
        if first { reply.drop_after(20_000) } else { reply }
    });
    let pin = engine_pin();
    bench.fetch(&engine(), Kind::Engine, &pin).unwrap();
    let ranges: Vec<Option<String>> =
        bench.requests("/files").iter().map(|seen| seen.header("range").map(str::to_owned)).collect();
    assert!(matches!(ranges.as_slice(), [None, Some(_)]), "{ranges:?}");
}

#[test]
fn a_part_left_behind_is_continued_when_right_and_replaced_when_wrong() {
    let pin = engine_pin();
    let bytes = engine_sdist().bytes;
    for (part, ranges) in
        [(bytes[..1000].to_vec(), 1), (noise(1000), 1), (vec![0; bytes.len() + 5], 0), (bytes.to_vec(), 0)]
    {
        let bench = Bench::good();
        fs::write_atomic(&home(&bench.world, &pin.downloads[0]).with_file_name("part"), &part).unwrap();
        bench.fetch(&engine(), Kind::Engine, &pin).unwrap();
        let ranged = bench.requests("/files").iter().filter(|seen| seen.header("range").is_some()).count();
        assert_eq!(ranged, ranges);
    }
}

#[test]
fn a_damaged_package_in_scratch_is_fetched_again() {
    let bench = Bench::good();
    let pin = bench.resolve(&model(), Kind::Model).unwrap();
    fs::write_atomic(&home(&bench.world, &pin.downloads[0]), b"rot").unwrap();
    bench.fetch(&model(), Kind::Model, &pin).unwrap();
}

#[test]
fn servers_that_fail_are_named_by_what_they_did_and_never_by_address() {
    type Bad = fn() -> Reply;
    let bads: [(Bad, &str); 6] = [
        (|| Reply::text("who?").status(401).with("WWW-Authenticate", "Basic realm=\"x\""), "status 401"),
        (|| Reply::text("no").status(403), "status 403"),
        (|| Reply::text("oops").status(500), "status 500"),
        (|| Reply::text("{").with("Content-Type", "application/vnd.pypi.simple.v1+json"), "damaged"),
        (|| Reply::text("x").with("Content-Type", "image/png"), "`image/png`"),
        (|| Reply::redirect(302, "/simple/tiny-tool/"), "circles"),
    ];
    for (bad, expected) in bads {
        let bench = Bench::new(move |_, _, _| bad());
        let error = bench.resolve(&spec("tiny-tool", "1.2"), Kind::Tool).unwrap_err();
        assert!(matches!(error, SourceError::Network { .. }) && error.to_string().contains(expected), "{error}");
    }
    let bench = Bench::good();
    let mut world = bench.world.clone();
    world.env.insert("PIP_INDEX_URL".to_owned(), format!("http://{SECRET}@127.0.0.1:9/simple"));
    let error = resolve(&spec("tiny-tool", "1.2"), &world, Kind::Tool).unwrap_err();
    assert!(matches!(&error, SourceError::Network { why, .. } if why.contains("refuses")), "{error}");
    bench.leaks_nothing(&format!("{error} {error:?}"));
}

#[test]
fn credentials_stay_at_the_index() {
    let other = Server::start(|_, _| Reply::bytes(model_wheel().bytes));
    let elsewhere = other.url("/cdn/model");
    let bench = Bench::new(move |packages, seen, _| {
        if seen.path.starts_with("/files") {
            Reply::redirect(302, &elsewhere.replace("127.0.0.1", "localhost"))
        } else {
            answer(packages, seen)
        }
    });
    bench.resolve(&model(), Kind::Model).unwrap();
    assert!(!other.seen().is_empty());
    assert!(other.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

#[test]
fn offline_sends_nothing_and_uses_what_is_there() {
    let mut bench = Bench::good();
    let pin = bench.resolve(&model(), Kind::Model).unwrap();
    let asked = bench.server.seen().len();
    bench.world.offline = true;
    assert!(matches!(bench.resolve(&model(), Kind::Model), Err(SourceError::Offline { .. })));
    bench.fetch(&model(), Kind::Model, &pin).unwrap();
    let tool = tool_pin();
    assert!(matches!(bench.fetch(&spec("tiny-tool", "1.2"), Kind::Tool, &tool), Err(SourceError::Offline { .. })));
    assert_eq!(bench.server.seen().len(), asked);
}

#[test]
fn a_cancel_ends_the_transfer() {
    let bench = Bench::new(|packages, seen, _| {
        let reply = answer(packages, seen);
        if seen.path.starts_with("/files") { reply.stall_after(10) } else { reply }
    });
    let cancel = bench.world.task.cancel().clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while bench.requests("/files").is_empty() {
                std::thread::yield_now();
            }
            cancel.cancel();
        });
        assert!(matches!(bench.resolve(&model(), Kind::Model), Err(SourceError::Cancelled(_))));
    });
}

#[test]
fn a_machine_without_pip_is_told_what_to_do() {
    let mut bench = Bench::good();
    bench.world.env.insert(PYTHON.to_owned(), bench.root.path().join("no python").to_str().unwrap().to_owned());
    let error = bench.resolve(&spec("tiny-tool", "1.2"), Kind::Tool).unwrap_err();
    assert!(matches!(&error, SourceError::Tool { hint: Some(hint), .. } if hint.contains(PYTHON)), "{error}");
}

#[test]
fn a_pin_that_does_not_fit_is_refused() {
    let bench = Bench::good();
    let mut pin = model_pin();
    pin.files[0].path = "tiny_model/other.gguf".parse().unwrap();
    assert!(matches!(bench.fetch(&model(), Kind::Model, &pin), Err(SourceError::Mismatch { .. })));
}

/// The real thing: 183 KB from the index that this machine is set up for.
#[test]
#[ignore = "needs a package index"]
fn ninja_from_the_real_index() {
    let root = tempfile::tempdir().unwrap();
    #[expect(clippy::disallowed_methods, reason = "the machine's own settings are what is tested")]
    let env = std::env::vars().collect();
    let (project, scratch) = (root.path().to_owned(), root.path().join("scratch"));
    let world = World { task: Task::silent(), project, scratch, offline: false, mirrors: Vec::new(), env };
    let ninja = spec("ninja", "1.13.2");
    let pin = resolve(&ninja, &world, Kind::Tool).unwrap();
    let linux = pin.downloads.iter().find(|file| file.path.as_str().contains("manylinux_2_17_x86_64")).unwrap();
    assert_eq!(linux.size, 183_365);
    assert_eq!(linux.sha256.hex(), "65a24341b5ac09fcadcc37082660be40a94174e51a937fabf6e2cae26225fa2c");
    let staging = root.path().join("staging");
    ninja.fetch_package(&world, package_here(&pin.downloads).unwrap(), &staging).unwrap();
    let program = crate::base::process::Program {
        path: program(&staging, "ninja").unwrap(),
        args: vec!["--version".into()],
        env: Default::default(),
        cwd: root.path().to_owned(),
    };
    let ran = program.output(std::time::Duration::from_secs(20), 99, &Cancel::default()).unwrap();
    assert!(ran.stdout.starts_with("1.13"), "{ran:?}");
}

//! Git sources against real git: repositories made by the program `git`, served by `git http-backend` on loopback.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking, helpers included")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use aitools::base::cancel::Cancel;
use aitools::base::fs;
use aitools::base::tree::Listing;
use aitools::format::lockfile::{Kind, Pin};
use aitools::format::manifest::GitSpec;
use aitools::report::{Event, Reporter, Task};
use aitools::source::git::{GitSource, Populated, populate_submodule};
use aitools::source::{Fetch, Source, SourceError, World};

#[path = "support/git_server.rs"]
mod git_server;
use git_server::{Reply, Server, connect_proxy, git, git_with, html, redirect};

/// Keeps what was warned about.
#[derive(Default, Clone)]
struct Ears(Arc<Mutex<Vec<Event>>>);

impl Reporter for Ears {
    fn report(&self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Ears {
    fn warnings(&self) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let texts = events.iter().filter_map(|event| match event {
            Event::Warning { text } => Some(text.clone()),
            _ => None,
        });
        texts.collect()
    }
}

/// A machine of its own: repositories below `served`, a project, a home, and a scratch folder.
struct Bench {
    root: tempfile::TempDir,
    world: World,
    ears: Ears,
}

impl Bench {
    fn new() -> Self {
        let root = tempfile::Builder::new().prefix("gît ").tempdir().unwrap();
        let ears = Ears::default();
        let folder = |name: &str| {
            let path = root.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let env = BTreeMap::from([
            ("PATH".to_owned(), env!("PATH").to_owned()),
            ("HOME".to_owned(), folder("höme").to_str().unwrap().to_owned()),
            ("GIT_CONFIG_NOSYSTEM".to_owned(), "1".to_owned()),
        ]);
        folder("served");
        let world = World {
            task: Task::new(Arc::new(ears.clone()), Cancel::default()),
            project: folder("my project"),
            scratch: folder("scratch é"),
            offline: false,
            mirrors: Vec::new(),
            env,
        };
        Self { root, world, ears }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn served(&self) -> PathBuf {
        self.at("served")
    }

    /// Sets something in the user's own git configuration.
    fn set(&self, key: &str, value: &str) {
        let file = self.at("höme/.gitconfig");
        git(self.root.path(), &["config", "--file", file.to_str().unwrap(), "--add", key, value]);
    }

    /// A repository with two commits and a branch, a tag and an annotated tag; gives its first and second commit.
    fn repo(&self, name: &str) -> (String, String) {
        let path = self.served().join(name);
        fs::create_dir_all(&path).unwrap();
        git(&path, &["init", "-q", "."]);
        fs::write_atomic(&path.join("ünï/code file.c"), b"int x;\r\n").unwrap();
        fs::write_atomic(&path.join("run.sh"), b"#!/bin/sh\n").unwrap();
        fs::set_executable(&path.join("run.sh")).unwrap();
        fs::write_atomic(&path.join(".gitattributes"), b"* text eol=crlf\n*.c filter=lfs\n").unwrap();
        #[cfg(unix)]
        fs::symlink(Path::new("../run.sh"), &path.join("ünï/link")).unwrap();
        let first = self.commit(&path, "one");
        fs::write_atomic(&path.join("new"), b"2").unwrap();
        git(&path, &["tag", "light"]);
        git(&path, &["tag", "-a", "-m", "m", "heavy"]);
        git(&path, &["branch", "side"]);
        (first, self.commit(&path, "two"))
    }

    fn commit(&self, path: &Path, message: &str) -> String {
        git(path, &["add", "-A"]);
        git(path, &["commit", "-q", "-m", message]);
        git(path, &["rev-parse", "HEAD"])
    }

    fn resolve(&self, spec: &GitSpec) -> Result<Pin, SourceError> {
        GitSource(spec).resolve(&self.world, Kind::Engine)
    }

    fn fetch(&self, spec: &GitSpec, pin: &Pin) -> Result<PathBuf, SourceError> {
        let staging = tempfile::Builder::new().prefix("stage ").tempdir_in(self.root.path()).unwrap().keep();
        let ask = Fetch { kind: Kind::Engine, pin, wanted: &[], staging: &staging, name: "engine" };
        GitSource(spec).fetch(&self.world, &ask).map(|()| staging)
    }

    /// Resolves and fetches, and compares what was written with the pin.
    fn both(&self, spec: &GitSpec) -> Result<(Pin, PathBuf), SourceError> {
        let pin = self.resolve(spec)?;
        let staging = self.fetch(spec, &pin)?;
        let listing = Listing::scan(&staging, &|_| false, &Cancel::default()).unwrap();
        assert_eq!(Some(listing.digest()), pin.tree, "{}", listing.to_text());
        Ok((pin, staging))
    }

    fn mirrors(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.at("scratch é/git")).unwrap_or_default();
        entries.into_iter().filter(|path| path.join("objects").is_dir()).collect()
    }

    /// How many commits all mirrors hold.
    fn commits_held(&self) -> usize {
        let listed = self.mirrors().into_iter().map(|mirror| {
            let all = git(&mirror, &["--git-dir=.", "cat-file", "--batch-all-objects", "--batch-check"]);
            all.matches(" commit ").count()
        });
        listed.sum()
    }
}

fn spec(git: &str) -> GitSpec {
    GitSpec {
        git: git.to_owned(),
        rev: None,
        tag: None,
        branch: None,
        submodule: None,
        submodules: vec![],
        subdir: None,
    }
}

fn at(git: &str, rev: &str) -> GitSpec {
    GitSpec { rev: Some(rev.to_owned()), ..spec(git) }
}

/// An error with everything that a person would be shown.
fn told(error: &SourceError) -> String {
    format!("{error} {error:?}")
}

#[track_caller]
fn fails<T>(result: Result<T, SourceError>, words: &[&str]) -> SourceError {
    let error = result.err().expect("this must fail");
    for word in words {
        assert!(told(&error).contains(word), "no `{word}` in {}", told(&error));
    }
    error
}

/// A server that knows only version 0 of the protocol.
fn old_server(root: &Path, any: bool, repo: &str) -> Server {
    let path = root.join(repo);
    git(&path, &["config", "protocol.version", "0"]);
    git(&path, &["config", "uploadpack.advertiseRef", "true"]);
    git(&path, &["config", "uploadpack.allowAnySHA1InWant", if any { "true" } else { "false" }]);
    let backend = root.to_owned();
    let inner = Server::plain(&backend);
    // The header that asks for version 2 is taken away by a server in between.
    let url = inner.url.clone();
    Server::start(root, move |request| relay(&url, request))
}

fn relay(url: &str, request: &git_server::Request) -> Reply {
    let agent = ureq::Agent::config_builder().http_status_as_error(false).build().new_agent();
    let address = format!("{url}{}", request.path);
    let kind = request.header("content-type").to_owned();
    let answer = match request.method.as_str() {
        "POST" => agent.post(address).header("content-type", kind).send(&request.body[..]),
        _ => agent.get(address).call(),
    };
    let mut answer = answer.unwrap();
    let kind = answer.headers().get("content-type").unwrap().to_str().unwrap().to_owned();
    let body = answer.body_mut().read_to_vec().unwrap();
    Reply::Say(answer.status().as_u16(), vec![("Content-Type", kind)], body)
}

#[test]
fn one_commit_by_its_id() {
    let bench = Bench::new();
    let (first, second) = bench.repo("répo one.git");
    let server = Server::plain(&bench.served());
    let address = format!("{}/répo one.git", server.url);
    let (pin, staging) = bench.both(&at(&address, &first)).unwrap();
    assert_eq!(pin.commit.as_deref(), Some(first.as_str()));
    assert_eq!(bench.commits_held(), 1, "history was fetched, too");
    // Bytes as they are in the repository, whatever its attributes say, and nothing of git.
    assert_eq!(fs::read_bounded(&staging.join("ünï/code file.c"), 99).unwrap(), b"int x;\n");
    assert!(!fs::exists(&staging.join(".git")) && !fs::exists(&staging.join("new")));
    #[cfg(unix)]
    {
        assert!(fs::is_executable(&fs::metadata(&staging.join("run.sh")).unwrap()));
        assert_eq!(fs::read_link(&staging.join("ünï/link")).unwrap(), Path::new("../run.sh"));
    }
    // What is in the mirror needs no network; what is not, does.
    let asked = server.requests().len();
    let offline = World { offline: true, ..bench.world.clone() };
    assert_eq!(GitSource(&at(&address, &first)).resolve(&offline, Kind::Engine).unwrap(), pin);
    let error = fails(GitSource(&at(&address, &second)).resolve(&offline, Kind::Engine), &[&second]);
    assert!(matches!(error, SourceError::Offline { .. }));
    let error = fails(GitSource(&spec(&address)).resolve(&offline, Kind::Engine), &["HEAD"]);
    assert!(matches!(error, SourceError::Offline { .. }));
    assert_eq!(server.requests().len(), asked);
    // A mirror is a repository for git, too.
    git(&bench.mirrors()[0], &["--git-dir=.", "fsck", "--strict"]);
}

#[test]
fn names_lead_to_commits_in_both_versions_of_the_protocol() {
    let bench = Bench::new();
    let (first, second) = bench.repo("r");
    for server in [Server::plain(&bench.served()), old_server(&bench.served(), false, "r")] {
        let address = format!("{}/r", server.url);
        let of = |spec: GitSpec| bench.both(&spec).unwrap().0.commit.unwrap();
        assert_eq!(of(GitSpec { tag: Some("light".into()), ..spec(&address) }), first);
        assert_eq!(of(GitSpec { tag: Some("heavy".into()), ..spec(&address) }), first);
        assert_eq!(of(GitSpec { branch: Some("side".into()), ..spec(&address) }), first);
        assert_eq!(of(spec(&address)), second);
        let missing = |spec: GitSpec, words: &[&str]| fails(bench.resolve(&spec), words);
        missing(GitSpec { tag: Some("hevy".into()), ..spec(&address) }, &["did you mean `heavy`", "refs/tags/hevy"]);
        missing(GitSpec { tag: Some("side".into()), ..spec(&address) }, &["branch = \\\"side\\\""]);
        missing(GitSpec { branch: Some("light".into()), ..spec(&address) }, &["tag = \\\"light\\\""]);
    }
}

#[test]
fn a_server_that_gives_no_commit_by_its_id() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let path = bench.served().join("r");
    // `first` is the end of no branch or tag, and a third commit is not reachable at all.
    for name in ["light", "heavy"] {
        git(&path, &["tag", "-d", name]);
    }
    git(&path, &["branch", "-D", "side"]);
    let tree = git(&path, &["rev-parse", "HEAD^{tree}"]);
    let lost = git(&path, &["commit-tree", "-m", "lost", &tree]);
    let server = old_server(&bench.served(), false, "r");
    let address = format!("{}/r", server.url);
    bench.both(&at(&address, &first)).unwrap();
    let error =
        fails(bench.resolve(&at(&address, &lost)), &[&lost, &address, "no branch or tag", "never have been pushed"]);
    assert!(matches!(error, SourceError::Missing { .. }));
    fails(bench.resolve(&at(&address, &"0".repeat(39))), &["40 hexadecimal"]);
    // One that allows any commit gives both, and only them.
    let other = Bench::new();
    let server = old_server(&bench.served(), true, "r");
    other.both(&at(&format!("{}/r", server.url), &lost)).unwrap();
    other.both(&at(&format!("{}/r", server.url), &first)).unwrap();
    assert_eq!(other.commits_held(), 2);
}

#[test]
fn rewritten_addresses() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r.git");
    let server = Server::plain(&bench.served());
    bench.set(&format!("url.{}/.insteadOf", server.url), "https://forge.invalid/");
    let over_http = bench.both(&at("https://forge.invalid/r.git", &first)).unwrap().0;
    assert!(!server.requests().is_empty());
    // A folder of this machine, by address and by path: no mirror is made.
    let files = format!("file://{}", bench.served().to_str().unwrap().replace(' ', "%20"));
    bench.set(&format!("url.{files}/.insteadOf"), "ssh://forge.invalid/");
    let held = bench.mirrors().len();
    assert_eq!(bench.both(&at("ssh://forge.invalid/r.git", &first)).unwrap().0, over_http);
    let path = bench.served().join("r.git");
    assert_eq!(bench.both(&at(path.to_str().unwrap(), &first)).unwrap().0, over_http);
    assert_eq!(bench.both(&GitSpec { tag: Some("heavy".into()), ..spec("../served/r.git") }).unwrap().0, over_http);
    assert_eq!(bench.mirrors().len(), held);
    fails(bench.resolve(&at("../served/none", &first)), &["no git repository", "none"]);
    fails(bench.resolve(&at("../served/r.git", &"1".repeat(40))), &["it is not there"]);
    fails(bench.resolve(&at("ext::sh -c x", &first)), &["no address"]);
    // The manifest's mirrors come first, and are not in the pin.
    let mut world = bench.world.clone();
    world.mirrors = vec![("https://far.invalid/".into(), "https://forge.invalid/".into())];
    let spec = at("https://far.invalid/r.git", &first);
    assert_eq!(GitSource(&spec).resolve(&world, Kind::Engine).unwrap(), over_http);
}

#[cfg(unix)]
#[test]
fn over_ssh_by_the_program_git() {
    let mut bench = Bench::new();
    let (first, second) = bench.repo("r.git");
    // Stands for ssh: runs here what should run there.
    let ssh = bench.at("fake ssh");
    fs::write_atomic(&ssh, b"#!/bin/sh\nfor last; do :; done\nexec sh -c \"$last\"\n").unwrap();
    fs::set_executable(&ssh).unwrap();
    bench.world.env.insert("GIT_SSH_COMMAND".into(), format!("'{}'", ssh.display()));
    bench.world.env.insert("GIT_DIR".into(), "/nowhere".into());
    let address = format!("me@host.invalid:{}", bench.served().join("r.git").display());
    let side = GitSpec { branch: Some("side".into()), ..spec(&address) };
    assert_eq!(bench.both(&side).unwrap().0.commit, Some(first));
    bench.both(&at(&address, &second)).unwrap();
    fails(bench.resolve(&GitSpec { tag: Some("non".into()), ..spec(&address) }), &["no such branch or tag"]);
    fails(bench.resolve(&at(&address, &"1".repeat(40))), &["no branch or tag leads to it"]);
    fails(bench.resolve(&spec("me@host.invalid:/none")), &["/none"]);
    bench.world.env.insert("PATH".into(), "/nowhere".into());
    let error = fails(bench.resolve(&spec(&address)), &["install git"]);
    assert!(matches!(error, SourceError::Tool { .. }));
}

#[test]
fn without_the_program_git() {
    let mut bench = Bench::new();
    let (first, _) = bench.repo("r");
    bench.world.env.insert("PATH".into(), "/nowhere".into());
    let server = Server::start(&bench.served(), |_| Reply::ServeZipped);
    bench.both(&at(&format!("{}/r", server.url), &first)).unwrap();
}

#[test]
fn through_a_proxy() {
    let mut bench = Bench::new();
    let (first, _) = bench.repo("r");
    let server = Server::plain(&bench.served());
    let host = server.url.strip_prefix("http://").unwrap().to_owned();
    let (proxy, seen) = connect_proxy();
    let address = format!("{}/r", server.url);
    bench.world.env.insert("http_proxy".into(), proxy.clone());
    bench.world.env.insert("NO_PROXY".into(), "other,.invalid".into());
    bench.both(&at(&address, &first)).unwrap();
    let asked: Vec<_> = seen.lock().unwrap().iter().map(|request| request.path.clone()).collect();
    assert!(!asked.is_empty() && asked.iter().all(|to| *to == host), "{asked:?}");
    // git's own setting for the address comes before the environment; NO_PROXY before both.
    bench.set(&format!("http.{}.proxy", server.url), "http://127.0.0.1:9");
    fails(bench.resolve(&spec(&address)), &["NO_PROXY"]);
    bench.world.env.insert("no_proxy".into(), "127.0.0.1".into());
    bench.resolve(&spec(&address)).unwrap();
    assert_eq!(seen.lock().unwrap().len(), asked.len());
}

fn locked(accepted: &'static str) -> impl Fn(&git_server::Request) -> Reply + Send + Sync + 'static {
    move |request| {
        let pair = request.header("authorization");
        if pair == format!("Basic {accepted}") {
            return Reply::Serve;
        }
        Reply::Say(401, vec![("WWW-Authenticate", "Basic realm=\"x\"".into())], Vec::new())
    }
}

#[test]
fn passwords_come_from_gits_helpers() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    // "mé:p w"
    let server = Server::start(&bench.served(), locked("bcOpOnAgdw=="));
    let address = format!("{}/r", server.url);
    fails(bench.resolve(&at(&address, &first)), &["401", "git has none for it", "git help credential"]);
    let store = bench.at("höme/stored");
    bench.set("credential.helper", &format!("store --file='{}'", store.display()));
    let with = |pair: &str| server.url.replace("http://", &format!("http://{pair}@"));
    fs::write_atomic(&store, with("me:wrong").as_bytes()).unwrap();
    fails(bench.resolve(&at(&address, &first)), &["not accepted"]);
    assert_eq!(fs::read_bounded(&store, 999).unwrap(), b"", "a refused password is forgotten");
    fs::write_atomic(&store, with("m%c3%a9:p%20w").as_bytes()).unwrap();
    bench.both(&at(&address, &first)).unwrap();
    // A user name in the address chooses among several.
    let two = format!("{}\n{}\n", with("a:b"), with("m%c3%a9:p%20w"));
    fs::write_atomic(&store, two.as_bytes()).unwrap();
    bench.resolve(&spec(&format!("{}/r", with("m%c3%a9")))).unwrap();
    // In the address itself: used, and never shown or stored.
    fs::write_atomic(&store, b"").unwrap();
    let other = Bench::new();
    let address = format!("{}/r", with("m%C3%A9:p%20w"));
    other.both(&at(&address, &first)).unwrap();
    let address = format!("{}/r", with("me:secret%20word"));
    let error = fails(other.resolve(&spec(&address)), &["401"]);
    assert!(!told(&error).contains("secret"), "{}", told(&error));
}

#[test]
fn redirects_carry_no_secrets_elsewhere() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    bench.repo("moved");
    let target = Server::plain(&bench.served());
    let to = format!("{}/r/info/refs?service=git-upload-pack", target.url);
    let server = Server::start(&bench.served(), move |request| match request.path.split('/').nth(1).unwrap() {
        "here" => redirect("/r/info/refs?service=git-upload-pack"),
        "there" if request.header("authorization").is_empty() => Reply::Say(401, vec![], vec![]),
        "there" => redirect(&to),
        "loop" => redirect("/loop/info/refs?service=git-upload-pack"),
        "page" => redirect("/login?next=x"),
        "file" => redirect("file:///etc/info/refs?service=git-upload-pack"),
        "late" if !request.is_discovery() => redirect("/r/git-upload-pack"),
        "login" => html(200),
        _ => Reply::Serve,
    });
    git(&bench.served(), &["clone", "-q", "--bare", "r", "late"]);
    bench.set("http.extraHeader", "X-Token: hidden");
    let address = |name: &str| format!("{}/{name}", server.url);
    bench.both(&at(&address("here"), &first)).unwrap();
    assert!(server.requests().iter().all(|request| request.header("x-token") == "hidden"));
    let with_user = address("there").replace("http://", "http://me:word@");
    bench.both(&at(&with_user, &first)).unwrap();
    assert!(target.requests().len() > 1);
    for request in target.requests() {
        assert_eq!((request.header("authorization"), request.header("x-token")), ("", ""));
    }
    fails(bench.resolve(&at(&address("loop"), &first)), &["redirects"]);
    fails(bench.resolve(&at(&address("page"), &first)), &["/login", "not a git repository"]);
    fails(bench.resolve(&at(&address("file"), &first)), &["file:", "not an address"]);
    fails(bench.resolve(&at(&address("late"), &first)), &["301"]);
}

#[test]
fn bad_answers_are_told_apart() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    bench.repo("other");
    fs::write_atomic(&bench.served().join("other/more"), b"x").unwrap();
    let rest = bench.at("served2");
    fs::create_dir_all(&rest).unwrap();
    git(&bench.served(), &["clone", "-q", "--bare", "other", rest.join("swap").to_str().unwrap()]);
    let foreign = git_with(&rest.join("swap"), &["commit-tree", "-m", "f", "HEAD^{tree}"], b"");
    git(&rest.join("swap"), &["update-ref", "refs/heads/main", &foreign]);
    git(&bench.served(), &["clone", "-q", "--bare", "r", "swap"]);
    let pack = {
        let path = rest.join("swap");
        let list = git(&path, &["rev-list", "--objects", "--no-object-names", "main"]);
        let name = git_with(&path, &["pack-objects", "-q", "p"], list.as_bytes());
        fs::read_bounded(&path.join(format!("p-{name}.pack")), 1 << 20).unwrap()
    };
    let server = Server::start(&bench.served(), move |request| {
        let name = request.path.split('/').nth(1).unwrap();
        match (name, request.is_discovery()) {
            ("html", _) => html(200),
            ("none", _) => html(404),
            ("no", _) => html(403),
            ("down", _) => html(503),
            ("text", _) => Reply::Say(200, vec![("Content-Type", "text/plain".into())], b"x".to_vec()),
            ("cut", _) if request.body.windows(6).any(|six| six == b"=fetch") => Reply::Cut(25),
            ("cut" | "junk" | "swap", true) | ("cut", _) => Reply::Serve,
            ("junk", _) => say_pack(b"000dpackfile\n0014\x01PACK not a pack0000".to_vec()),
            ("swap", _) => say_pack(banded(&pack)),
            _ => Reply::Serve,
        }
    });
    for name in ["cut", "junk"] {
        git(&bench.served(), &["clone", "-q", "--bare", "r", name]);
    }
    let ask = |name: &str| bench.resolve(&at(&format!("{}/{name}", server.url), &first));
    fails(ask("html"), &["web page", "login"]);
    fails(ask("text"), &["text/plain", "smart protocol"]);
    assert!(matches!(fails(ask("none"), &["404", "check the address"]), SourceError::Missing { .. }));
    fails(ask("no"), &["403"]);
    fails(ask("down"), &["503"]);
    fails(ask("cut"), &["ended too early"]);
    assert!(matches!(fails(ask("junk"), &["pack"]), SourceError::Hostile { .. }));
    // Another repository's pack under the same address cannot pass: objects are named by their own bytes.
    let error = fails(ask("swap"), &["something else", &first]);
    assert!(matches!(error, SourceError::Hostile { .. }));
    let refused = TcpPort::free();
    fails(bench.resolve(&at(&format!("http://127.0.0.1:{}/r", refused.0), &first)), &["efused", "proxy"]);
    // Nothing of all that is in the way of a good answer.
    bench.both(&at(&format!("{}/r", server.url), &first)).unwrap();
}

struct TcpPort(u16);

impl TcpPort {
    /// A port that nobody listens on.
    fn free() -> Self {
        Self(std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port())
    }
}

fn say_pack(body: Vec<u8>) -> Reply {
    Reply::Say(200, vec![("Content-Type", "application/x-git-upload-pack-result".into())], body)
}

fn banded(pack: &[u8]) -> Vec<u8> {
    let mut body = b"000dpackfile\n".to_vec();
    for part in pack.chunks(1000) {
        body.extend(format!("{:04x}\x01", part.len() + 5).into_bytes());
        body.extend(part);
    }
    body.extend(b"0000");
    body
}

#[test]
fn a_silent_server_does_not_hold_up_a_user_who_stops() {
    for while_it_comes in [false, true] {
        let bench = Bench::new();
        let (first, _) = bench.repo("r");
        let cancel = bench.world.task.cancel().clone();
        let server = Server::start(&bench.served(), move |request| {
            let cancel = cancel.clone();
            match (request.body.windows(6).any(|six| six == b"=fetch"), while_it_comes) {
                (false, _) => Reply::Serve,
                (true, true) => Reply::Stall(40, Box::new(move || cancel.cancel())),
                (true, false) => {
                    cancel.cancel();
                    Reply::Silence
                }
            }
        });
        let began = std::time::Instant::now();
        let error = fails(bench.resolve(&at(&format!("{}/r", server.url), &first)), &[]);
        assert!(matches!(error, SourceError::Cancelled(_)), "{error}");
        assert!(began.elapsed().as_secs() < 30, "it waited for the server");
    }
}

#[test]
fn a_connection_that_breaks_is_tried_again() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let broken = std::sync::atomic::AtomicUsize::new(0);
    let server = Server::start(&bench.served(), move |request| {
        let count = broken.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        match (count, request.is_discovery()) {
            (0, _) => html(503),
            (2, _) => Reply::Cut(30),
            _ => Reply::Serve,
        }
    });
    bench.both(&at(&format!("{}/r", server.url), &first)).unwrap();
    assert_eq!(server.requests().len(), 4);
    let agent = server.requests()[0].header("user-agent").to_owned();
    assert!(agent.starts_with("git/") && agent.contains("aitools"), "{agent}");
    assert_eq!(server.requests()[0].header("accept-encoding"), "gzip");
}

#[test]
fn an_empty_repository() {
    let bench = Bench::new();
    git(&bench.served(), &["init", "-q", "--bare", "r"]);
    let server = Server::plain(&bench.served());
    fails(bench.resolve(&spec(&format!("{}/r", server.url))), &["is empty"]);
    fails(bench.resolve(&spec("../served/r")), &["is empty"]);
    fails(bench.resolve(&at(&format!("{}/r", server.url), &"1".repeat(40))), &["not our ref"]);
    assert_eq!(server.requests().iter().filter(|request| request.is_discovery()).count(), 2);
}

#[test]
fn submodules_of_the_repository() {
    let bench = Bench::new();
    let (leaf, _) = bench.repo("leaf.git");
    bench.repo("unused.git");
    let server = Server::plain(&bench.served());
    let add = |into: &str, what: &str, commit: Option<&str>, path: &str| {
        let folder = bench.served().join(into);
        let absolute = bench.served().join(what);
        git(&folder, &["submodule", "--quiet", "add", absolute.to_str().unwrap(), path]);
        git(&folder, &["config", "-f", ".gitmodules", &format!("submodule.{path}.url"), &format!("../{what}")]);
        if let Some(commit) = commit {
            git(&folder.join(path), &["checkout", "-q", commit]);
        }
    };
    bench.repo("middle.git");
    add("middle.git", "leaf.git", Some(&leaf), "deep/léaf");
    let middle = bench.commit(&bench.served().join("middle.git"), "with leaf");
    bench.repo("top.git");
    add("top.git", "middle.git", None, "lib/middle");
    add("top.git", "unused.git", None, "unused");
    let top = bench.commit(&bench.served().join("top.git"), "with middle");

    let address = format!("{}/top.git", server.url);
    let paths = |paths: &[&str]| paths.iter().map(|path| path.parse().unwrap()).collect::<Vec<_>>();
    let mut want = GitSpec { submodules: paths(&["lib/middle/deep/léaf", "lib/middle"]), ..at(&address, &top) };
    let (pin, staging) = bench.both(&want).unwrap();
    let pinned: Vec<_> = pin.submodules.iter().map(|s| (s.path.as_str(), s.git.clone(), s.commit.clone())).collect();
    assert_eq!(
        pinned,
        [
            ("lib/middle", format!("{}/middle.git", server.url), middle),
            ("lib/middle/deep/léaf", format!("{}/leaf.git", server.url), leaf),
        ]
    );
    assert!(fs::exists(&staging.join("lib/middle/deep/léaf/ünï/code file.c")));
    assert!(!fs::exists(&staging.join("unused/run.sh")));
    assert!(server.requests().iter().all(|request| !request.path.contains("unused")));
    // The folder that is built may be a submodule, or lie in one.
    for subdir in ["lib", "lib/middle", "lib/middle/deep"] {
        want.subdir = Some(subdir.parse().unwrap());
        let (_, staging) = bench.both(&want).unwrap();
        let inside = "lib/middle/deep/léaf/run.sh".strip_prefix(subdir).unwrap().trim_start_matches('/');
        assert!(fs::exists(&staging.join(inside)), "{subdir}");
    }
    let missing = |submodules: &[&str], subdir: Option<&str>, words: &[&str]| {
        let subdir = subdir.map(|path| path.parse().unwrap());
        fails(bench.resolve(&GitSpec { submodules: paths(submodules), subdir, ..at(&address, &top) }), words)
    };
    missing(&["lib"], None, &["no submodule at that path"]);
    missing(&["none/x"], None, &["no submodule at that path"]);
    missing(&[], Some("lib/middle"), &["no folder `lib/middle`"]);
    missing(&[], Some("none"), &["no folder `none`"]);
    // A repository from elsewhere has no business on this machine.
    let folder = bench.served().join("top.git");
    let inside = bench.served().join("leaf.git");
    git(&folder, &["config", "-f", ".gitmodules", "submodule.unused.url", inside.to_str().unwrap()]);
    let reaching = bench.commit(&folder, "reaching");
    let error = bench.resolve(&GitSpec { submodules: paths(&["unused"]), ..at(&address, &reaching) });
    assert!(matches!(fails(error, &["on this machine"]), SourceError::Hostile { .. }));
    // A pin that names another commit than the tree does is not believed.
    let mut forged = pin.clone();
    forged.submodules[0].commit = top.clone();
    want.subdir = None;
    assert!(matches!(fails(bench.fetch(&want, &forged), &[&top]), SourceError::Mismatch { .. }));
    let forged = Pin { tree: Some(aitools::base::digest::Digest::of(b"")), ..pin };
    assert!(matches!(fails(bench.fetch(&want, &forged), &["engine"]), SourceError::Mismatch { .. }));
}

#[test]
fn weights_in_a_repository() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let want = at("../served/r", &first);
    let pin = GitSource(&want).resolve(&bench.world, Kind::Model).unwrap();
    let names: Vec<_> = pin.files.iter().map(|file| (file.path.as_str(), file.size)).collect();
    assert_eq!(names, [(".gitattributes", 31), ("run.sh", 10), ("ünï/code file.c", 7)]);
    assert_eq!(pin.tree, None);
    let staging = bench.at("staged");
    fs::create_dir_all(&staging).unwrap();
    let mut ask = Fetch { kind: Kind::Model, pin: &pin, wanted: &[2], staging: &staging, name: "m" };
    GitSource(&want).fetch(&bench.world, &ask).unwrap();
    assert_eq!(fs::read_dir(&staging).unwrap(), [staging.join("ünï")]);
    let mut forged = pin.clone();
    forged.files[2].size += 1;
    ask.pin = &forged;
    fails(GitSource(&want).fetch(&bench.world, &ask), &["code file.c"]);
}

type Line<'a> = (&'a str, &'a str, &'a str);

/// A repository with a commit whose tree has these entries (mode, name, content), which git itself would not make.
/// Gives the ids of the tree and of the commit.
fn odd_tree(bench: &Bench, name: &str, entries: &[Line<'_>]) -> (String, String) {
    use git2::ObjectType;
    let repo = git2::Repository::init_bare(bench.served().join(name)).unwrap();
    let odb = repo.odb().unwrap();
    let mut tree = Vec::new();
    for (mode, name, content) in entries {
        let id = match *mode {
            "40000" => content.parse().unwrap(),
            _ => odb.write(ObjectType::Blob, content.as_bytes()).unwrap(),
        };
        tree.extend(format!("{mode} {name}\0").into_bytes());
        tree.extend(id.as_bytes());
    }
    let tree = odb.write(ObjectType::Tree, &tree).unwrap();
    let text = format!("tree {tree}\nauthor n <e> 1 +0000\ncommitter n <e> 1 +0000\n\nodd\n");
    let commit = odb.write(ObjectType::Commit, text.as_bytes()).unwrap();
    repo.reference("refs/heads/main", commit, true, "").unwrap();
    (tree.to_string(), commit.to_string())
}

#[test]
fn hostile_trees() {
    let bench = Bench::new();
    let server = Server::plain(&bench.served());
    let plain = |name: &'static str| ("100644", name, "x");
    let link = |name: &'static str, to: &'static str| ("120000", name, to);
    let cases: Vec<(&str, Vec<Line<'_>>)> = vec![
        ("`..`", vec![plain("..")]),
        ("`.`", vec![plain(".")]),
        ("not a name", vec![plain(".git")]),
        ("not a name", vec![plain(".GIT")]),
        ("not a name", vec![plain(".g\u{200c}it")]),
        ("not a name", vec![plain("git~1")]),
        ("not a name", vec![plain("a/b")]),
        ("not a name", vec![plain("../b")]),
        ("device", vec![plain("nul.txt")]),
        ("character", vec![plain("a\\b")]),
        ("character", vec![plain("a\nb")]),
        ("twice", vec![plain("a"), plain("a")]),
        ("twice", vec![link("a", "b"), plain("a")]),
        ("absolute", vec![link("a", "/etc/passwd")]),
        ("leads out", vec![link("a", "../x")]),
        ("after a name", vec![link("a", "b/../../x")]),
    ];
    for (number, (word, entries)) in cases.iter().enumerate() {
        let ids = odd_tree(&bench, &format!("odd{number}"), entries);
        let error = fails(bench.resolve(&at(&format!("{}/odd{number}", server.url), &ids.1)), &[word]);
        assert!(matches!(error, SourceError::Hostile { .. }), "{entries:?}: {error}");
    }
    // Trees within trees: few objects, more levels or folders than anybody has.
    let mut ids = odd_tree(&bench, "bomb", &[]);
    for _ in 0..20 {
        let inner = ids.0.clone();
        ids = odd_tree(&bench, "bomb", &[("40000", "a", &inner), ("40000", "b", &inner)]);
    }
    fails(bench.resolve(&at(&format!("{}/bomb", server.url), &ids.1)), &["levels or"]);
    for _ in 0..64 {
        let inner = ids.0.clone();
        ids = odd_tree(&bench, "bomb", &[("40000", "a", &inner)]);
    }
    fails(bench.resolve(&at(&format!("{}/bomb", server.url), &ids.1)), &["levels or"]);
    // Links that stay inside are fine.
    let ids = odd_tree(&bench, "good", &[plain("a"), link("b", "a")]);
    bench.both(&at(&format!("{}/good", server.url), &ids.1)).unwrap();
    // A tag or a tree is not a commit.
    fails(bench.resolve(&at(&format!("{}/good", server.url), &ids.0)), &["not a commit"]);
}

#[test]
fn a_damaged_mirror_is_replaced() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let server = Server::plain(&bench.served());
    let want = at(&format!("{}/r", server.url), &first);
    let (pin, _) = bench.both(&want).unwrap();
    let packs = bench.mirrors()[0].join("objects/pack");
    let pack = || fs::read_dir(&packs).unwrap().into_iter().find(|path| path.extension().unwrap() == "pack").unwrap();
    let good = fs::read_bounded(&pack(), 1 << 20).unwrap();
    let damage: [&dyn Fn() -> Vec<u8>; 3] = [
        &|| good[..good.len() / 2].to_vec(),
        &|| {
            let mut bad = good.clone();
            bad[200..260].fill(7);
            bad
        },
        &Vec::new,
    ];
    for bytes in damage {
        fs::set_read_only(&pack(), false).unwrap();
        fs::write_atomic(&pack(), &bytes()).unwrap();
        // Left by a run that was killed.
        fs::write_atomic(&packs.join("pack_git2_x"), b"half").unwrap();
        let asked = server.requests().len();
        let staging = bench.fetch(&want, &pin).unwrap();
        assert!(fs::exists(&staging.join("run.sh")));
        assert!(server.requests().len() > asked && !fs::exists(&packs.join("pack_git2_x")));
    }
    assert!(bench.ears.warnings().iter().any(|text| text.contains("damaged")), "{:?}", bench.ears.warnings());
    fs::write_atomic(&pack(), b"").unwrap();
    let offline = World { offline: true, ..bench.world.clone() };
    fails(GitSource(&want).resolve(&offline, Kind::Engine), &["--offline"]);
}

#[test]
fn two_at_once_fetch_once() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let server = Server::plain(&bench.served());
    let want = at(&format!("{}/r", server.url), &first);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| bench.both(&want).unwrap());
        }
    });
    assert_eq!(server.requests().len(), 2, "one discovery and one pack");
}

/// A project that is a repository with the engine as its submodule, checked out at `commit`.
fn project_with_submodule(bench: &Bench, url: &str, commit: &str) {
    let project = &bench.world.project;
    git(project, &["init", "-q", "."]);
    let served = bench.served().join("engine");
    git(project, &["submodule", "--quiet", "add", served.to_str().unwrap(), "external/engïne"]);
    git(project, &["config", "-f", ".gitmodules", "submodule.external/engïne.url", url]);
    git(&project.join("external/engïne"), &["checkout", "-q", commit]);
    bench.commit(project, "project");
}

#[test]
fn the_projects_submodule_agrees_or_not() {
    let bench = Bench::new();
    let (first, second) = bench.repo("engine");
    let url = "https://forge.invalid/engine.git";
    let want = |rev: &str| GitSpec { submodule: Some("external/engïne".parse().unwrap()), ..at(url, rev) };
    project_with_submodule(&bench, url, &first);
    // The checkout has the commit: the address, which leads nowhere, is not asked.
    let offline = World { offline: true, ..bench.world.clone() };
    let pin = GitSource(&want(&first)).resolve(&offline, Kind::Engine).unwrap();
    bench.fetch(&want(&first), &pin).unwrap();
    // The manifest moved on, the submodule did not.
    let error = fails(bench.resolve(&want(&second)), &["another commit", "submodule: commit", "git add"]);
    assert!(matches!(error, SourceError::Disagreement { .. }));
    let other = Pin { commit: Some(second.clone()), ..pin.clone() };
    fails(bench.fetch(&want(&first), &other), &["lockfile: commit", "manifest: rev", &first, &second, "aitools lock"]);
    // What is staged counts.
    let project = bench.world.project.clone();
    git(&project.join("external/engïne"), &["checkout", "-q", &second]);
    bench.resolve(&want(&first)).unwrap();
    git(&project, &["add", "external/engïne"]);
    fails(bench.resolve(&want(&first)), &["another commit"]);
    bench.resolve(&want(&second)).unwrap();
    let elsewhere = GitSpec { git: "https://forge.invalid/fork".into(), ..want(&second) };
    fails(bench.resolve(&elsewhere), &["another address", ".gitmodules", "set-url"]);
    let unknown = GitSpec { submodule: Some("external/none".parse().unwrap()), ..want(&second) };
    fails(bench.resolve(&unknown), &["none there", "git submodule add"]);
    // A worktree of the project has a file `.git`, and its own index.
    let tree = bench.at("other tree");
    git(&project, &["worktree", "add", "-q", "-b", "other", tree.to_str().unwrap()]);
    let elsewhere = World { project: tree, ..bench.world.clone() };
    let error = GitSource(&want(&second)).resolve(&elsewhere, Kind::Engine);
    fails(error, &["another commit", &first]);
}

#[test]
fn a_project_that_is_no_repository_or_lies_in_another() {
    let bench = Bench::new();
    let (first, _) = bench.repo("engine");
    let want = GitSpec { submodule: Some("external/e".parse().unwrap()), ..at("../served/engine", &first) };
    bench.both(&want).unwrap();
    git(bench.root.path(), &["init", "-q", "."]);
    bench.both(&want).unwrap();
}

#[test]
fn an_empty_submodule_folder_is_filled() {
    let bench = Bench::new();
    let (first, second) = bench.repo("engine");
    let server = Server::plain(&bench.served());
    let url = format!("{}/engine", server.url);
    project_with_submodule(&bench, &url, &first);
    let project = bench.at("clone é");
    let source = bench.world.project.clone();
    git(bench.root.path(), &["clone", "-q", source.to_str().unwrap(), project.to_str().unwrap()]);
    let world = World { project: project.clone(), ..bench.world.clone() };
    let path = "external/engïne";
    let dest = project.join(path);
    let want = GitSpec { submodule: Some(path.parse().unwrap()), ..at(&url, &first) };
    let pin = GitSource(&want).resolve(&world, Kind::Engine).unwrap();
    let populate = |pin: &Pin| populate_submodule(&world, &want, pin, &dest).unwrap();
    assert_eq!(populate(&pin), Populated::CheckedOut);
    assert_eq!(git(&dest, &["rev-parse", "HEAD"]), first);
    assert_eq!(git(&dest, &["remote", "get-url", "origin"]), url);
    assert_eq!(git(&project, &["status", "--porcelain"]), "");
    assert_eq!(populate(&pin), Populated::Unchanged);
    git(&dest, &["fetch", "-q", "origin"]);
    git(&dest, &["checkout", "-q", &second]);
    assert_eq!(populate(&pin), Populated::Kept);
    assert_eq!(git(&dest, &["rev-parse", "HEAD"]), second);
    assert!(bench.ears.warnings().iter().any(|text| text.contains("left as it is")));
}

#[test]
fn without_a_repository_the_files_are_exported() {
    let bench = Bench::new();
    let (first, second) = bench.repo("engine");
    let want = |rev: &str| GitSpec { submodule: Some("external/e".parse().unwrap()), ..at("../served/engine", rev) };
    let dest = bench.world.project.join("external/e");
    let populate = |rev: &str| {
        let pin = bench.resolve(&want(rev)).unwrap();
        populate_submodule(&bench.world, &want(rev), &pin, &dest).unwrap()
    };
    assert_eq!(populate(&first), Populated::Exported);
    assert!(fs::exists(&dest.join("ünï/code file.c")) && !fs::exists(&dest.join("new")));
    assert_eq!(populate(&first), Populated::Unchanged);
    assert_eq!(populate(&second), Populated::Exported);
    assert!(fs::exists(&dest.join("new")));
    fs::write_atomic(&dest.join("mine"), b"1").unwrap();
    assert_eq!(populate(&first), Populated::Kept);
    fs::remove_file(&dest.join(".aitools-export")).unwrap();
    assert_eq!(populate(&first), Populated::Kept);
    assert!(fs::exists(&dest.join("mine")));
    let left: Vec<_> = fs::read_dir(&bench.world.project.join("external")).unwrap();
    assert_eq!(left, [dest], "staging folders are gone");
}

//! The way to a repository: protocols, addresses, proxies, passwords, redirects, and servers that misbehave.

use std::path::Path;

use aitools::base::fs;
use aitools::format::manifest::GitSpec;
use aitools::source::{SourceError, World};

use crate::bench::{Bench, at, fails, resolve, spec, told};
use crate::git_server::{self, Reply, Server, git, git_with, html, proxy, redirect};

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
    assert_eq!(pin.pin.commit.to_string(), first);
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
    assert_eq!(resolve(&at(&address, &first), &offline).unwrap(), pin);
    let error = fails(resolve(&at(&address, &second), &offline), &[&second]);
    assert!(matches!(error, SourceError::Offline { .. }));
    let error = fails(resolve(&spec(&address), &offline), &["HEAD"]);
    assert!(matches!(error, SourceError::Offline { .. }));
    assert_eq!(server.requests().len(), asked);
    // Only objects are kept, and nothing of the repositories that git worked in.
    let kept: Vec<_> = fs::read_dir(&bench.at("scratch é/git")).unwrap();
    assert_eq!(kept.len(), 2, "one cache and its lock: {kept:?}");
    assert_eq!(fs::read_dir(&bench.mirrors()[0]).unwrap(), [bench.mirrors()[0].join("objects")]);
}

#[test]
fn names_lead_to_commits_in_both_versions_of_the_protocol() {
    let bench = Bench::new();
    let (first, second) = bench.repo("r");
    for server in [Server::plain(&bench.served()), old_server(&bench.served(), false, "r")] {
        let address = format!("{}/r", server.url);
        let of = |spec: GitSpec| bench.both(&spec).unwrap().0.pin.commit.to_string();
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
    fails(bench.resolve(&at("../served/none", &first)), &["no readable git repository", "none"]);
    fails(bench.resolve(&at("../served/r.git", &"1".repeat(40))), &["it is not there"]);
    // The manifest's mirrors come first, and are not in the pin.
    let mut world = bench.world.clone();
    world.mirrors = vec![("https://far.invalid/".into(), "https://forge.invalid/".into())];
    let spec = at("https://far.invalid/r.git", &first);
    assert_eq!(resolve(&spec, &world).unwrap(), over_http);
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
    assert_eq!(bench.both(&side).unwrap().0.pin.commit.to_string(), first);
    bench.both(&at(&address, &second)).unwrap();
    fails(bench.resolve(&GitSpec { tag: Some("non".into()), ..spec(&address) }), &["no such branch or tag"]);
    fails(bench.resolve(&at(&address, &"1".repeat(40))), &["no branch or tag of the repository leads to it"]);
    fails(bench.resolve(&spec("me@host.invalid:/none")), &["/none"]);
    bench.world.env.insert("PATH".into(), "/nowhere".into());
    let error = fails(bench.resolve(&spec(&address)), &["install git"]);
    assert!(matches!(error, SourceError::Tool { .. }));
}

#[test]
fn without_the_program_git_only_folders_of_this_machine_can_be_read() {
    let mut bench = Bench::new();
    let (first, _) = bench.repo("r");
    bench.world.env.insert("PATH".into(), "/nowhere".into());
    let server = Server::plain(&bench.served());
    let error = fails(bench.resolve(&at(&format!("{}/r", server.url), &first)), &["install git"]);
    assert!(matches!(error, SourceError::Tool { .. }));
    bench.both(&at("../served/r", &first)).unwrap();
}

#[test]
fn through_a_proxy() {
    let mut bench = Bench::new();
    let (first, _) = bench.repo("r");
    let server = Server::plain(&bench.served());
    let (proxy, seen) = proxy();
    let address = format!("{}/r", server.url);
    bench.world.env.insert("http_proxy".into(), proxy.clone());
    bench.world.env.insert("NO_PROXY".into(), "other,.invalid".into());
    bench.both(&at(&address, &first)).unwrap();
    let asked: Vec<_> = seen.lock().unwrap().iter().map(|request| request.path.clone()).collect();
    assert!(!asked.is_empty() && asked.iter().all(|to| to.starts_with(&format!("{}/r/", server.url))), "{asked:?}");
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
        login()
    }
}

fn login() -> Reply {
    Reply::Say(401, vec![("WWW-Authenticate", "Basic realm=\"x\"".into())], Vec::new())
}

#[test]
fn passwords_come_from_gits_helpers() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    // "mé:p w"
    let server = Server::start(&bench.served(), locked("bcOpOnAgdw=="));
    let address = format!("{}/r", server.url);
    fails(bench.resolve(&at(&address, &first)), &["could not read Username", "git help credential"]);
    let store = bench.at("höme/stored");
    bench.set("credential.helper", &format!("store --file='{}'", store.display()));
    let with = |pair: &str| server.url.replace("http://", &format!("http://{pair}@"));
    fs::write_atomic(&store, with("me:wrong").as_bytes()).unwrap();
    fails(bench.resolve(&at(&address, &first)), &["Authentication failed"]);
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
    let error = fails(other.resolve(&spec(&address)), &["Authentication failed"]);
    assert!(!told(&error).contains("secret"), "{}", told(&error));
}

#[test]
fn the_first_request_may_be_redirected() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    bench.repo("moved");
    let target = Server::plain(&bench.served());
    let to = format!("{}/r/info/refs?service=git-upload-pack", target.url);
    let server = Server::start(&bench.served(), move |request| match request.path.split('/').nth(1).unwrap() {
        "here" => redirect("/r/info/refs?service=git-upload-pack"),
        "there" if request.header("authorization").is_empty() => login(),
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
    let pin = bench.both(&at(&with_user, &first)).unwrap().0;
    assert!(target.requests().len() > 1 && !format!("{pin:?}").contains(&target.url));
    fails(bench.resolve(&at(&address("loop"), &first)), &["redirects"]);
    fails(bench.resolve(&at(&address("page"), &first)), &["not found"]);
    fails(bench.resolve(&at(&address("file"), &first)), &["\"file\""]);
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
    fails(ask("html"), &["dumb http", "login or proxy page"]);
    fails(ask("text"), &["dumb http", "smart protocol"]);
    assert!(matches!(fails(ask("none"), &["not found", "check the address"]), SourceError::Missing { .. }));
    fails(ask("no"), &["403"]);
    fails(ask("down"), &["503"]);
    fails(ask("cut"), &["try again"]);
    assert!(matches!(fails(ask("junk"), &["bad pack header"]), SourceError::Hostile { .. }));
    // Another repository's pack under the same address cannot pass: objects are named by their own bytes.
    let error = fails(ask("swap"), &["necessary objects"]);
    assert!(matches!(error, SourceError::Hostile { .. }));
    let refused = TcpPort::free();
    fails(bench.resolve(&at(&format!("http://127.0.0.1:{}/r", refused.0), &first)), &["connect to", "proxy"]);
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
    assert_eq!(server.requests().len(), 5, "a failed discovery, a broken fetch, and a good one");
}

#[test]
fn an_empty_repository() {
    let bench = Bench::new();
    git(&bench.served(), &["init", "-q", "--bare", "r"]);
    let server = Server::plain(&bench.served());
    fails(bench.resolve(&spec(&format!("{}/r", server.url))), &["is empty"]);
    fails(bench.resolve(&spec("../served/r")), &["is empty"]);
    fails(bench.resolve(&at(&format!("{}/r", server.url), &"1".repeat(40))), &["not our ref"]);
    assert_eq!(server.requests().iter().filter(|request| request.is_discovery()).count(), 3);
}

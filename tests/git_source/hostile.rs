//! Projects, caches and repositories of strangers: they run nothing, and get no password.

use std::path::{Path, PathBuf};

use aitools::base::address::Address;
use aitools::base::fs;
use aitools::format::manifest::GitSpec;
use aitools::source::SourceError;

use crate::bench::{Bench, at, fails, resolve};
use crate::git_server::{Reply, Server, git};

/// A bare repository at `path` whose configuration, hooks and monitors create the file that is returned.
fn trap(bench: &Bench, path: &Path) -> PathBuf {
    let sprung = bench.at("sprung");
    fs::create_dir_all(path).unwrap();
    git(path, &["init", "-q", "--bare", "."]);
    let command = format!("touch '{}'", sprung.display());
    let config = path.join("config");
    let set = |key: &str, value: &str| git(path, &["config", "--file", config.to_str().unwrap(), "--add", key, value]);
    for key in ["credential.helper", "core.fsmonitor", "core.sshCommand", "core.askPass", "core.gitProxy"] {
        let value = if key == "credential.helper" { format!("!{command}") } else { command.clone() };
        set(key, &value);
    }
    set("url.ext::sh -c touch% sprung .insteadOf", "http://");
    set("protocol.ext.allow", "always");
    for hook in ["reference-transaction", "post-checkout", "pre-auto-gc", "fsmonitor-watchman"] {
        let hook = path.join("hooks").join(hook);
        fs::write_atomic(&hook, format!("#!/bin/sh\n{command}\n").as_bytes()).unwrap();
        fs::set_executable(&hook).unwrap();
    }
    sprung
}

fn locked(bench: &Bench) -> Server {
    Server::start(&bench.served(), |_| {
        Reply::Say(401, vec![("WWW-Authenticate", "Basic realm=\"x\"".into())], Vec::new())
    })
}

#[test]
fn h1_a_submodules_address_cannot_ask_for_another_hosts_password() {
    let bench = Bench::new();
    bench.repo("inner");
    let server = locked(&bench);
    let asked = bench.at("asked");
    let helper = format!("!cat >> '{}'; echo username=u; echo password=s3cret; :", asked.display());
    bench.set("credential.helper", &helper);
    let host = server.url.strip_prefix("http://").unwrap();
    let url = format!("http://%0Ahost=github.com%0Aprotocol=https@{host}/inner");

    let outer = bench.served().join("outer");
    bench.repo("outer");
    let inner = bench.served().join("inner");
    git(&outer, &["submodule", "--quiet", "add", inner.to_str().unwrap(), "s"]);
    git(&outer, &["config", "-f", ".gitmodules", "submodule.s.url", &url]);
    let commit = bench.commit(&outer, "with a submodule");
    let want = GitSpec { submodules: vec!["s".parse().unwrap()], ..at("../served/outer", &commit) };
    fails(bench.resolve(&want), &["control character"]);
    // The same address in a lockfile.
    let gitlink = git(&inner, &["rev-parse", "HEAD"]);
    let error = url.parse::<Address>().unwrap_err().to_string();
    assert!(error.contains("control character"), "{error}");
    assert!(!fs::exists(&asked), "a credential helper was asked");
    assert!(server.requests().is_empty());
    // The helper works for what is allowed.
    fails(bench.resolve(&at(&format!("{}/inner", server.url), &gitlink)), &["Authentication failed"]);
    let asked = String::from_utf8(fs::read_bounded(&asked, 9999).unwrap()).unwrap();
    assert!(asked.contains(&format!("host={host}\n")) && !asked.contains("github.com"), "{asked}");
}

#[test]
fn h5a_a_repository_committed_to_the_project_is_not_used() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let project = bench.world.project.clone();
    // The name that a relative GIT_DIR once had, the project itself as a bare repository, and `.git`.
    let sprung = trap(&bench, &project.join("aitools-none"));
    trap(&bench, &project);
    trap(&bench, &project.join(".git"));
    let server = locked(&bench);
    fails(bench.resolve(&at(&format!("{}/r", server.url), &first)), &["could not read Username"]);
    assert!(!server.requests().is_empty(), "the trap's insteadOf was applied");
    let want = GitSpec { submodule: Some("sub".parse().unwrap()), ..at("../served/r", &first) };
    let _ = bench.resolve(&want);
    assert!(!fs::exists(&sprung), "a program named by the project ran");
}

#[test]
fn h6_nothing_in_a_restored_cache_is_executed_or_believed() {
    let bench = Bench::new();
    let (first, second) = bench.repo("r");
    let server = Server::plain(&bench.served());
    let address = format!("{}/r", server.url);
    bench.both(&at(&address, &first)).unwrap();
    let cache = bench.mirrors()[0].clone();
    let sprung = trap(&bench, &cache);
    let elsewhere = bench.at("elsewhere");
    trap(&bench, &elsewhere);
    fs::write_atomic(&cache.join("commondir"), elsewhere.to_str().unwrap().as_bytes()).unwrap();
    let asked = server.requests().len();
    bench.both(&at(&address, &second)).unwrap();
    assert!(server.requests().len() > asked, "the trap's insteadOf was applied");
    // As the project's submodule, whose commit the cache has.
    let project = bench.world.project.clone();
    git(&project, &["init", "-q", "."]);
    git(&project, &["submodule", "--quiet", "add", bench.served().join("r").to_str().unwrap(), "sub"]);
    git(&project, &["config", "-f", ".gitmodules", "submodule.sub.url", &address]);
    bench.commit(&project, "project");
    let clone = bench.at("clone");
    git(bench.root.path(), &["clone", "-q", project.to_str().unwrap(), clone.to_str().unwrap()]);
    let world = aitools::source::World { project: clone.clone(), ..bench.world.clone() };
    let want = GitSpec { submodule: Some("sub".parse().unwrap()), ..at(&address, &second) };
    let pin = resolve(&want, &world).unwrap();
    aitools::source::git::populate_submodule(&world, &want, &pin.pin, &clone.join("sub")).unwrap();
    assert_eq!(git(&clone.join("sub"), &["rev-parse", "HEAD"]), second);
    assert!(!fs::exists(&sprung) && !fs::exists(&clone.join("sprung")), "something in the cache ran");
}

#[test]
fn h6_the_users_own_rewriting_reaches_no_remote_helper() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let sprung = bench.at("sprung");
    bench.set(&format!("url.ext::touch {} .insteadOf", sprung.display()), "http://forge.invalid/");
    let error = fails(bench.resolve(&at("http://forge.invalid/r", &first)), &["remote helpers"]);
    assert!(matches!(error, SourceError::Missing { .. }));
    assert!(!fs::exists(&sprung));
}

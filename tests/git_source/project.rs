//! The project's own submodule.

use aitools::base::fs;
use aitools::format::manifest::GitSpec;
use aitools::source::git::{Populated, populate_submodule};
use aitools::source::{SourceError, World};

use crate::bench::{Bench, Tree, at, fails, resolve};
use crate::git_server::{Server, git};

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
    let pin = resolve(&want(&first), &offline).unwrap();
    bench.fetch(&want(&first), &pin).unwrap();
    // The manifest moved on, the submodule did not.
    let error = fails(bench.resolve(&want(&second)), &["another commit", "submodule: commit", "git add"]);
    assert!(matches!(error, SourceError::Disagreement { .. }));
    let mut other = pin.clone();
    other.pin.commit = second.parse().unwrap();
    fails(bench.fetch(&want(&first), &other), &["lockfile: commit", "manifest: rev", &first, &second, "aitools lock"]);
    // What is staged counts.
    let project = bench.world.project.clone();
    git(&project.join("external/engïne"), &["checkout", "-q", &second]);
    bench.resolve(&want(&first)).unwrap();
    git(&project, &["add", "external/engïne"]);
    fails(bench.resolve(&want(&first)), &["another commit"]);
    bench.resolve(&want(&second)).unwrap();
    let elsewhere = GitSpec { git: "https://forge.invalid/fork".parse().unwrap(), ..want(&second) };
    fails(bench.resolve(&elsewhere), &["another address", ".gitmodules", "set-url"]);
    let unknown = GitSpec { submodule: Some("external/none".parse().unwrap()), ..want(&second) };
    fails(bench.resolve(&unknown), &["none there", "git submodule add"]);
    // A worktree of the project has a file `.git`, and its own index.
    let tree = bench.at("other tree");
    git(&project, &["worktree", "add", "-q", "-b", "other", tree.to_str().unwrap()]);
    let elsewhere = World { project: tree, ..bench.world.clone() };
    let error = resolve(&want(&second), &elsewhere);
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
    let pin = resolve(&want, &world).unwrap();
    let populate = |locked: &Tree| populate_submodule(&world, &want, &locked.pin, &dest).unwrap();
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
        populate_submodule(&bench.world, &want(rev), &pin.pin, &dest).unwrap()
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

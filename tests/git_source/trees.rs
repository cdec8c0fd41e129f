//! What is in a repository: submodules, weights, hostile trees, and mirrors that are damaged.

use aitools::base::fs;
use aitools::format::manifest::GitSpec;
use aitools::source::git::GitSource;
use aitools::source::{Source, SourceError, World};

use crate::bench::{Bench, Tree, at, fails, resolve};
use crate::git_server::{Server, git};

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
    let pinned: Vec<_> =
        pin.pin.submodules.iter().map(|s| (s.path.as_str(), s.git.to_string(), s.commit.to_string())).collect();
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
    forged.pin.submodules[0].commit = top.parse().unwrap();
    want.subdir = None;
    assert!(matches!(fails(bench.fetch(&want, &forged), &[&top]), SourceError::Mismatch { .. }));
    let forged = Tree { tree: aitools::base::digest::Digest::of(b""), ..pin };
    assert!(matches!(fails(bench.fetch(&want, &forged), &["source tree", &top]), SourceError::Mismatch { .. }));
}

#[test]
fn weights_in_a_repository() {
    let bench = Bench::new();
    let (first, _) = bench.repo("r");
    let want = at("../served/r", &first);
    let (pin, mut files) = GitSource(&want).resolve_files(&bench.world).unwrap();
    let names: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.size)).collect();
    assert_eq!(names, [(".gitattributes", 31), ("run.sh", 10), ("ünï/code file.c", 7)]);
    let staging = bench.at("staged");
    fs::create_dir_all(&staging).unwrap();
    GitSource(&want).fetch_files(&bench.world, &pin, &[&files[2]], &staging).unwrap();
    assert_eq!(fs::read_dir(&staging).unwrap(), [staging.join("ünï")]);
    files[2].size += 1;
    fails(GitSource(&want).fetch_files(&bench.world, &pin, &[&files[2]], &staging), &["code file.c"]);
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
        // git refuses some of them when they come, with its own words.
        for (address, words) in
            [(format!("{}/odd{number}", server.url), vec![]), (format!("../served/odd{number}"), vec![*word])]
        {
            let error = fails(bench.resolve(&at(&address, &ids.1)), &words);
            assert!(matches!(error, SourceError::Hostile { .. }), "{entries:?}: {error}");
        }
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

fn cache_name(bench: &Bench) -> String {
    bench.mirrors()[0].file_name().unwrap().to_str().unwrap().to_owned()
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
        let left = fs::parent(&bench.mirrors()[0]).join(format!("{}.new-x", cache_name(&bench)));
        fs::create_dir_all(&left).unwrap();
        let asked = server.requests().len();
        let staging = bench.fetch(&want, &pin).unwrap();
        assert!(fs::exists(&staging.join("run.sh")));
        assert!(server.requests().len() > asked && !fs::exists(&left));
    }
    assert!(bench.ears.warnings().iter().any(|text| text.contains("damaged")), "{:?}", bench.ears.warnings());
    fs::write_atomic(&pack(), b"").unwrap();
    let offline = World { offline: true, ..bench.world.clone() };
    fails(resolve(&want, &offline), &["--offline"]);
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

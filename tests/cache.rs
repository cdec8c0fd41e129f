//! `cache` from outside: what is needed stays, what is not goes, and a kill in between harms nothing.

#[path = "support/world.rs"]
mod world;

use std::path::PathBuf;

use aitools::base::fs;
use serde_json::Value as Json;
use world::World;

fn names(world: &World, folder: &str) -> Vec<PathBuf> {
    fs::read_dir(&world.cache().join(folder)).unwrap_or_default()
}

fn removed(json: &Json) -> Vec<String> {
    let items = json["result"]["items"].as_array().into_iter().flatten();
    items.map(|item| format!("{} {}", item["kind"], item["name"]).replace('"', "")).collect()
}

#[test]
fn what_projects_need_stays_and_the_rest_goes() {
    let world = World::new();
    let listed = world.run(&["cache", "size", "--json"]).expect(0).json();
    assert_eq!(listed["result"]["kinds"], serde_json::json!([]), "there is no cache yet");
    world.run(&["sync"]).expect(0);
    let before = world.snapshot(&world.cache().join("artifacts"));
    let nothing = world.run(&["cache", "prune", "--json"]).expect(0).json();
    assert_eq!(nothing["result"]["count"], 0, "{nothing}");

    // The engine changes: what was built of the former source is not needed any more.
    world.edit("engine source/part1.c", "return 1", "return 1 + 0");
    world.run(&["sync"]).expect(0);
    let list = world.run(&["cache", "list"]).expect(0).stdout;
    assert!(list.contains("no project") && list.contains("default.lock"), "{list}");
    let would = world.run(&["cache", "prune", "--dry-run", "--json"]).expect(0).json();
    assert_eq!(removed(&would), ["tree ", "artifact tiny (cpu)"], "{would}");
    assert_eq!(names(&world, "artifacts").len(), 2, "nothing was removed");
    let young = world.run(&["cache", "prune", "--older-than", "1h", "--json"]).expect(0).json();
    assert_eq!(removed(&young), Vec::<String>::new());
    let small = world.run(&["cache", "prune", "--max-size", "1GB", "--json"]).expect(0).json();
    assert_eq!(removed(&small), Vec::<String>::new());
    let done = world.run(&["cache", "prune"]).expect(0).stderr;
    assert!(done.contains("removed 2 items and freed"), "{done}");
    assert_eq!(names(&world, "artifacts").len(), 1);
    assert_ne!(world.snapshot(&world.cache().join("artifacts")), before);
    world.run(&["verify"]).expect(0);
    let again = world.run(&["sync", "--json"]).expect(0).json();
    assert_eq!(again["result"]["plan"]["steps"], serde_json::json!([]), "nothing was missing");

    // The project is gone.
    fs::rename(&world.project().join("manifests"), &world.project().join("elsewhere")).unwrap();
    let gone = world.run(&["cache", "prune"]).expect(0).stderr;
    assert!(gone.contains("is gone"), "{gone}");
    assert!(gone.contains("stay on the disk: the files have further names"), "the model is placed: {gone}");
    for folder in ["artifacts", "trees", "blobs", "roots", "staging"] {
        assert_eq!(names(&world, folder), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_lockfile_that_cannot_be_read_keeps_everything() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let before = world.snapshot(&world.cache().join("blobs"));
    world.edit("manifests/default.lock", "version = ", "version = 9");
    let refused = world.run(&["cache", "prune"]).expect(2).stderr;
    assert!(refused.contains("nothing was removed, because `") && refused.contains("default.lock"), "{refused}");
    assert_eq!(world.snapshot(&world.cache().join("blobs")), before);
}

#[test]
fn clean_removes_everything_and_sync_brings_it_back() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let cleaned = world.run(&["cache", "clean", "--json"]).expect(0).json();
    assert_eq!(cleaned["result"]["left_bytes"], 0, "{cleaned}");
    assert!(removed(&cleaned).contains(&"artifact tiny (cpu)".to_owned()), "{cleaned}");
    world.run(&["sync"]).expect(0);
    world.run(&["verify"]).expect(0);
}

#[test]
fn words_that_are_wrong_are_refused_and_a_key_changes_with_the_lockfile() {
    let world = World::new();
    let size = world.run(&["cache", "prune", "--max-size", "many"]).expect(2).stderr;
    assert!(size.contains("20GB"), "{size}");
    world.run(&["cache", "prune", "--older-than", "soon"]).expect(2);
    world.run(&["cache", "key"]).expect(1);
    world.run(&["lock"]).expect(0);
    let first = world.run(&["cache", "key"]).expect(0).stdout;
    assert!(first.starts_with("aitools-") && first == world.run(&["cache", "key"]).expect(0).stdout, "{first}");
    world.edit("engine source/part1.c", "return 1", "return 1 + 0");
    world.run(&["lock", "--upgrade"]).expect(0);
    assert_ne!(first, world.run(&["cache", "key"]).expect(0).stdout);
    let dir = world.run(&["cache", "dir"]).expect(0).stdout;
    assert_eq!(dir.trim_end(), world.cache().display().to_string());
}

/// Somebody who locks has things in the cache that belong to nobody yet.
#[cfg(unix)]
#[test]
fn prune_waits_for_those_who_lock_and_sync_waits_for_prune() {
    use std::process::Stdio;

    let world = World::new();
    world.run(&["sync"]).expect(0);
    let lock = fs::open_or_create(&world.cache().join("locks/removal")).unwrap();
    lock.lock_shared().unwrap();
    let mut prune = world.command(&["cache", "prune"]);
    let mut prune = prune.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = std::io::BufReader::new(prune.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    assert!(line.contains("another aitools is locking a project"), "{line}");
    // Those who only look for what they have need not wait.
    world.run(&["sync"]).expect(0);
    drop(lock);
    assert!(prune.wait().unwrap().success());
}

/// Killed in the middle, again and again, it takes nothing that is needed, and the next run finishes.
#[cfg(unix)]
#[test]
fn a_killed_prune_is_finished_by_the_next_one() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let (needed, trees) = (world.snapshot(&world.cache().join("artifacts")), world.cache().join("trees"));
    let kept = names(&world, "trees").len();
    for tree in 0..40 {
        let tree = trees.join(format!("{tree:064x}"));
        for file in 0..40 {
            fs::create_dir_all(&tree.join(format!("folder {file}"))).unwrap();
            fs::create(&tree.join(format!("folder {file}/é"))).unwrap();
        }
    }
    for left in [35, 25, 12, 1] {
        let mut prune = world.command(&["cache", "prune"]).spawn().unwrap();
        // As soon as so many are left; how much of the next one is gone then is different each time.
        while names(&world, "trees").len() > kept + left && prune.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        prune.kill().unwrap();
        prune.wait().unwrap();
        world.run(&["verify"]).expect(0);
    }
    world.run(&["cache", "prune"]).expect(0);
    assert_eq!((names(&world, "trees").len(), names(&world, "staging").len()), (kept, 0));
    assert_eq!(world.snapshot(&world.cache().join("artifacts")), needed);
}

/// A folder that is not ours, or that has become somebody's, loses nothing.
#[test]
fn nothing_of_somebody_else_is_removed() {
    let world = World::new();
    let foreign = ["tools/thesis.txt", "logs/diary.md", "paths/x/precious", "scratch/proj/a", "trees/notes"];
    for file in foreign {
        fs::write_atomic(&world.cache().join(file), b"mine").unwrap();
    }
    for verb in ["prune", "clean"] {
        let refused = world.run(&["cache", verb]).expect(2).stderr;
        assert!(refused.contains("is not a cache of aitools"), "{refused}");
    }
    // Used as a cache it is one, and what was there before stays.
    world.run(&["sync"]).expect(0);
    for verb in ["prune", "clean"] {
        world.run(&["cache", verb]).expect(0);
        for file in foreign {
            assert!(fs::exists(&world.cache().join(file)), "{verb}: {file}");
        }
    }
}

#[cfg(unix)]
#[test]
fn links_in_the_cache_are_not_followed() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let outside = world.project().join("outside");
    let name = "ab".repeat(32);
    fs::write_atomic(&outside.join(&name), b"mine").unwrap();
    fs::write_atomic(&outside.join("pypi/x"), b"mine").unwrap();
    for folder in ["blobs", "scratch", "derived"] {
        fs::remove_dir_all(&world.cache().join(folder)).unwrap();
        fs::symlink(&outside, &world.cache().join(folder)).unwrap();
    }
    world.run(&["cache", "clean"]).expect(0);
    assert_eq!(world.snapshot(&outside).len(), 2);
}

#[test]
fn what_cannot_be_read_is_needed() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let (needed, [root]) = (world.snapshot(&world.cache().join("artifacts")), &names(&world, "roots")[..]) else {
        panic!("one project is registered")
    };
    // What only resembles a tree is no tree, and its removal would take the listing of the real one.
    let tree = names(&world, "trees").into_iter().find(|tree| tree.is_dir()).unwrap();
    fs::write_atomic(&tree.with_extension("tmp"), b"").unwrap();
    world.run(&["cache", "prune"]).expect(0);
    assert!(fs::exists(&tree.with_extension("list")));
    fs::write_atomic(root, b"{").unwrap();
    let refused = world.run(&["cache", "prune", "--json"]).expect(2);
    assert!(
        refused.stdout.contains("nothing was removed") && refused.json()["command"] == "cache prune",
        "{refused:?}"
    );
    assert_eq!(world.snapshot(&world.cache().join("artifacts")), needed);
    world.run(&["sync"]).expect(0);
    world.run(&["cache", "prune"]).expect(0);
    assert_eq!(world.snapshot(&world.cache().join("artifacts")), needed);
}

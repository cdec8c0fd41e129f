//! `sync` when what its plan relied on turns out to be damaged, and with lockfiles of other versions.

use aitools::base::fs;

#[path = "support/world.rs"]
mod world;

use world::World;

#[test]
fn a_source_tree_that_is_damaged_in_the_store_is_fetched_again() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let trees = fs::read_dir(&world.cache().join("trees")).unwrap();
    let source = trees.iter().map(|tree| tree.join("CMakeLists.txt")).find(|file| fs::exists(file)).unwrap();
    let mut bytes = fs::read_bounded(&source, 1 << 20).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&source).unwrap();
    fs::write_atomic(&source, &bytes).unwrap();
    fs::remove_dir_all(&world.cache().join("artifacts")).unwrap();
    let ran = world.run(&["sync", "--json"]).expect(0);
    let json = ran.json();
    let steps = json["result"]["plan"]["steps"].as_array().unwrap();
    let steps: Vec<&str> = steps.iter().filter_map(|step| step["step"].as_str()).collect();
    let again = steps.iter().position(|step| *step == "fetch-source").unwrap();
    assert!(steps[..again].contains(&"build") && steps[again..].contains(&"build"), "{steps:?}");
    world.run(&["verify"]).expect(0);
}

#[test]
fn a_lockfile_of_version_1_is_up_to_date_and_rewritten_by_lock_alone() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let new = world.read("manifests/default.lock");
    let old = new.replace("version = 2\n", "version = 1\n");
    assert_ne!(old, new);
    world.write("manifests/default.lock", &old);
    world.run(&["lock", "--check"]).expect(0);
    world.run(&["sync", "--locked"]).expect(0);
    world.run(&["sync"]).expect(0);
    assert_eq!(world.read("manifests/default.lock"), old);
    world.run(&["lock"]).expect(0);
    assert_eq!(world.read("manifests/default.lock"), new);
    world.write("manifests/default.lock", &new.replace("version = 2\n", "version = 3\n"));
    let refused = world.run(&["sync"]).expect(2);
    assert!(
        refused.stderr.contains("newer version of aitools") && refused.stderr.contains("upgrade"),
        "{}",
        refused.stderr
    );
}

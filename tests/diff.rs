//! `diff` from outside.

#[path = "support/world.rs"]
mod world;

use world::World;

#[test]
fn two_lockfiles_are_told_apart_in_words() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let old = world.read("manifests/default.lock");
    world.write("old.lock", &old);
    let same = world.run(&["diff", "old.lock"]).expect(0);
    assert!(same.stdout.is_empty() && same.stderr.contains("say the same"), "{}", same.stderr);
    world.edit("engine source/part1.c", "return 1", "return 1 + 0");
    world.edit(
        "manifests/default.toml",
        "source = { path = \"engine source\" }",
        "source = { path = \"engine source\" }\nallow = [\"network\"]",
    );
    world.run(&["lock", "--upgrade"]).expect(0);
    let changed = world.run(&["diff", "old.lock"]).expect(0).stdout;
    let expected = "~ engine tiny\n    may use the network: nothing -> `yes`\n    source tree: `sha256:";
    assert!(changed.starts_with(expected), "{changed}");
    assert!(!changed.contains("model"), "{changed}");
    let json = world.run(&["diff", "old.lock", "manifests/default.lock", "--json"]).expect(0).json();
    assert_eq!(json["result"]["changes"][0]["how"], "changed", "{json}");
    world.run(&["diff", "none.lock"]).expect(8);
    world.write("bad.lock", "version = \"x\"");
    world.run(&["diff", "bad.lock"]).expect(2);
}

//! `ci` and `test` from outside: what is skipped, what fails, and with which exit code.

#[path = "support/world.rs"]
mod world;

use world::World;

fn outcomes(json: &serde_json::Value) -> Vec<(String, String)> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let checks = json["result"]["checks"].as_array().into_iter().flatten();
    checks.map(|check| (text(&check["stage"]), text(&check["outcome"]))).collect()
}

fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
    of.iter().map(|(stage, outcome)| ((*stage).to_owned(), (*outcome).to_owned())).collect()
}

#[test]
fn a_stale_lockfile_fails_and_the_rest_is_skipped() {
    let world = World::new();
    let ran = world.run(&["ci", "--json", "--junit", "report.xml"]).expect(1);
    let skipped = ["sync", "check", "verify", "test"].map(|stage| (stage, "skipped"));
    assert_eq!(outcomes(&ran.json()), pairs(&[&[("lock", "failed")][..], &skipped].concat()));
    let report = world.read("report.xml");
    assert!(report.contains("failures=\"1\"") && report.contains("skipped=\"4\""), "{report}");
}

#[test]
fn all_of_it_in_one_command() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let ran = world.run(&["ci", "--json", "--reproduce", "--markdown", "summary.md"]).expect(0);
    let expected = [
        ("lock", "passed"),
        ("sync", "passed"),
        ("check", "passed"),
        ("verify", "passed"),
        ("test", "skipped"),
        ("reproduce", "passed"),
    ];
    assert_eq!(outcomes(&ran.json()), pairs(&expected));
    assert!(world.read("summary.md").contains("| test | p | skipped |"), "{}", world.read("summary.md"));
}

/// The imitation of an engine ends at once: there is no answer.
#[test]
fn a_smoke_without_an_answer_is_the_engines_failure() {
    let world = World::new();
    world.run(&["test"]).expect(1);
    world.edit("configs/models/tiny/p.yaml", "generation:", "smoke: {prompt: hi, expect: hi}\ngeneration:");
    let unsynced = world.run(&["test"]).expect(1).stderr;
    assert!(unsynced.contains("FAILED") && unsynced.contains("run `aitools"), "{unsynced}");
    world.run(&["sync"]).expect(0);
    let tested = world.run(&["test"]).expect(7).stderr;
    assert!(tested.contains("policy p: FAILED") && tested.contains("0 passed, 1 failed"), "{tested}");
    world.run(&["ci"]).expect(7);
    world.run(&["test", "nobody"]).expect(2);
}

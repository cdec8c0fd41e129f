//! PowerInfer's adapter through the command line, on a sealed project: several commits of it, and what it cannot run.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::process::Command;

use aitools::base::fs;

#[path = "support/tiny_powerinfer.rs"]
mod tiny;
#[path = "support/world.rs"]
mod world;

use world::World;

const CMAKE: &str = "cmake_minimum_required(VERSION 3.14)
project(imitation C CXX)
add_executable(server main.c)
";

fn git(folder: &Path, args: &[&str]) -> String {
    let own = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"];
    let output = Command::new("git").args(own).args(args).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Two commits of an engine's repository.
fn commits(folder: &Path) -> [String; 2] {
    fs::write_atomic(&folder.join("CMakeLists.txt"), CMAKE.as_bytes()).unwrap();
    git(folder, &["init", "-q", "."]);
    ["int main(void) { return 0; }\n", "int main(void) { return 1; }\n"].map(|text| {
        fs::write_atomic(&folder.join("main.c"), text.as_bytes()).unwrap();
        git(folder, &["add", "."]);
        git(folder, &["commit", "-q", "-m", "main"]);
        git(folder, &["rev-parse", "HEAD"])
    })
}

#[test]
fn two_commits_are_two_engines() {
    let world = World::new();
    let [main, moe] = commits(&world.project().join("../moteur"));
    let manifest = format!(
        "version = 1\n[engines.powerinfer]\nsource = {{ git = \"../moteur\", rev = \"{main}\" }}\n\
         [engines.powerinfer-moe]\nadapter = \"powerinfer\"\nsource = {{ git = \"../moteur\", rev = \"{moe}\" }}\n\
         [models.m]\nsource = {{ path = \"poids/m.gguf\" }}\n[policies]\ninclude = [\"configs/*.yaml\"]\n"
    );
    world.write("manifests/default.toml", &manifest);
    fs::write_atomic(&world.project().join("poids/m.gguf"), &tiny::Tiny::sparse().to_bytes()).unwrap();
    for (policy, engine) in [("p", "powerinfer"), ("q", "powerinfer-moe")] {
        world.write(&format!("configs/{policy}.yaml"), &format!("engine: {engine}\nmodel: m\n"));
    }
    world.run(&["lock"]).expect(0);
    let lock = world.read("manifests/default.lock");
    for commit in [&main, &moe] {
        assert!(lock.contains(&format!("commit = \"{commit}\"")), "{commit}: {lock}");
    }
    let planned = world.run(&["sync", "--dry-run", "--json"]).expect(0).json();
    let steps = planned["result"]["plan"]["steps"].as_array().unwrap();
    let builds: Vec<_> = steps.iter().filter(|step| step["step"] == "build").collect();
    let engines: Vec<_> = builds.iter().map(|step| step["engine"].as_str().unwrap()).collect();
    assert_eq!(engines, ["powerinfer", "powerinfer-moe"], "{planned}");
    assert_ne!(builds[0]["fingerprint"], builds[1]["fingerprint"]);
    // One of them moves on, and the other stays where it is.
    world.edit("manifests/default.toml", &moe, &main);
    world.run(&["lock"]).expect(0);
    assert!(!world.read("manifests/default.lock").contains(&moe));
}

#[test]
fn the_example_of_a_mixture_of_experts_says_what_is_missing() {
    const POLICY: &str = "configs/models/powerinfer/mixtral-47b.yaml";
    let world = World::new();
    world.write("manifests/default.toml", "version = 1\n[engines.powerinfer]\nsource = { path = \"engine source\" }\n");
    world.write(POLICY, include_str!("../configs/models/powerinfer/mixtral-47b.yaml"));
    let said = world.run(&["check", POLICY]).expect(2).stderr;
    for words in ["the manifest has no model", "mixture of experts", "09d79ec0ac0c1d494cdf535504c6712294c359c1", POLICY]
    {
        assert!(said.contains(words), "{words}: {said}");
    }
}

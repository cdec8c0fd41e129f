//! `lock`, `sync`, `verify` and `status` on a sealed project with a real CMake build: good days and bad ones.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::time::Duration;

use aitools::base::cancel::Cancel;
use aitools::base::{fs, lock};

#[path = "support/world.rs"]
mod world;

use world::{Ran, World};

#[test]
fn from_nothing_to_in_place_and_then_nothing_to_do() {
    let world = World::new();
    world.run(&["sync", "--locked"]).expect(1);
    world.run(&["sync"]).expect(0);
    assert!(world.project().join("models/tiny/m/model.gguf").exists());
    let server = world.project().join("build/tiny/bin").join(aitools::base::platform::executable("llama-server"));
    assert!(std::process::Command::new(server).status().unwrap().success());
    let again = world.run(&["sync", "--json", "--locked"]).expect(0);
    assert_eq!(again.json()["result"]["plan"]["steps"], serde_json::json!([]), "{}", again.stdout);
    assert_eq!(again.stderr, "");
    world.run(&["verify"]).expect(0);
    world.run(&["check"]).expect(0);
    let status = world.run(&["status"]).expect(0).stdout;
    assert!(status.contains("policy    p ready"), "{status}");
}

#[test]
fn the_lockfile_is_the_same_bytes_whoever_writes_it() {
    let (one, two) = (World::new(), World::new());
    one.run(&["lock"]).expect(0);
    two.run(&["lock"]).expect(0);
    assert_eq!(one.read("manifests/default.lock"), two.read("manifests/default.lock"));
    let again = one.run(&["lock", "--upgrade", "--json"]).expect(0);
    assert_eq!(again.json()["result"]["written"], false);
    one.run(&["lock", "--check"]).expect(0);
}

#[test]
fn a_stale_lockfile_says_what_differs_and_only_that_is_resolved() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    world.edit(
        "manifests/default.toml",
        "[models.m]",
        "[models.n]\nsource = { path = \"weights/modèle.gguf\" }\n\n[models.m]",
    );
    for args in [&["lock", "--check"][..], &["sync", "--locked"], &["sync", "--dry-run"]] {
        let ran = world.run(args).expect(1);
        assert!(ran.stderr.contains("model `n` is in the manifest but not in the lockfile"), "{}", ran.stderr);
        assert!(ran.stderr.contains("aitools lock"), "{}", ran.stderr);
    }
    let ci = Ran::of(world.command(&["sync"]).env("CI", "true").output().unwrap());
    ci.expect(1);
    // The engine keeps its pin while its folder does not change, whatever else is new.
    let before = world.read("manifests/default.lock");
    world.run(&["lock"]).expect(0);
    let tree = |text: &str| text.lines().find(|line| line.starts_with("tree = ")).unwrap().to_owned();
    assert_eq!(tree(&before), tree(&world.read("manifests/default.lock")));
    world.write("engine source/new.txt", "new");
    world.run(&["lock", "--upgrade", "tiny"]).expect(0);
    assert_ne!(tree(&before), tree(&world.read("manifests/default.lock")));
    world.run(&["lock", "--upgrade", "tini"]).expect(2);
}

#[test]
fn u20_status_names_what_is_stale_and_shows_the_rest() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let status = |world: &World| world.run(&["status"]).expect(0).stdout;
    let fresh = status(&world);
    assert!(fresh.contains("tiny (cpu) not built") && fresh.contains("model     m missing"), "{fresh}");
    world.run(&["sync"]).expect(0);
    world.edit(
        "manifests/default.toml",
        "[models.m]",
        "[models.n]\nsource = { path = \"weights/modèle.gguf\" }\n\n[models.m]",
    );
    let stale = status(&world);
    for line in
        ["model `n` is in the manifest but not in the lockfile", "tiny (cpu) built", "model     m ready", "p ready"]
    {
        assert!(stale.contains(line), "{line}: {stale}");
    }
    let place = world.project().join("models/tiny/m/model.gguf");
    fs::remove_file(&place).unwrap();
    fs::write_atomic(&place, b"other weights").unwrap();
    let changed = status(&world);
    assert!(changed.contains("model     m changed") && changed.contains("policy    p not ready"), "{changed}");
}

#[test]
fn a_merge_conflict_is_recognised_and_resolved_on_request() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let good = world.read("manifests/default.lock");
    let tree = good.lines().find(|line| line.starts_with("tree = ")).unwrap();
    let other = format!("tree = \"sha256:{}\"", "0".repeat(64));
    let conflict = format!("<<<<<<< ours\n{tree}\n=======\n{other}\n>>>>>>> theirs");
    world.write("manifests/default.lock", &good.replace(tree, &conflict));
    let ran = world.run(&["sync"]).expect(2);
    assert!(ran.stderr.contains("--resolve-conflicts"), "{}", ran.stderr);
    world.run(&["lock", "--resolve-conflicts"]).expect(0);
    assert_eq!(world.read("manifests/default.lock"), good);
}

#[test]
fn every_flipped_digest_is_noticed() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let good = world.read("manifests/default.lock");
    let digests: Vec<usize> = good.match_indices("sha256:").map(|(at, word)| at + word.len()).collect();
    assert_eq!(digests.len(), 2, "{good}");
    for at in digests {
        let digit = if good.as_bytes()[at] == b'0' { "1" } else { "0" };
        world.write("manifests/default.lock", &format!("{}{digit}{}", &good[..at], &good[at + 1..]));
        let check = world.run(&["lock", "--check"]).expect(1).stderr;
        assert!(check.contains("are not those that were locked") && check.contains("lock --upgrade"), "{check}");
        let ran = world.run(&["sync"]).expect(3);
        assert!(ran.stderr.contains("expected") && ran.stderr.contains("actual"), "{}", ran.stderr);
        assert!(ran.stderr.contains("default.lock:"), "the lock's line: {}", ran.stderr);
    }
    world.write("manifests/default.lock", &good);
    world.run(&["sync"]).expect(0);
}

#[test]
fn damaged_weights_and_artifacts_are_found_and_repaired() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let weights = world.project().join("models/tiny/m/model.gguf");
    let server = fs::read_dir(&world.project().join("build/tiny/bin")).unwrap().remove(0);
    for damaged in [&weights, &server] {
        let mut bytes = fs::read_bounded(damaged, 64 << 20).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::remove_file(damaged).unwrap();
        fs::write_atomic(damaged, &bytes).unwrap();
        let ran = world.run(&["verify"]).expect(3);
        assert!(ran.stderr.contains(&damaged.file_name().unwrap().to_string_lossy().into_owned()), "{}", ran.stderr);
        world.run(&["verify", "--repair"]).expect(0);
    }
    world.run(&["verify", "--json"]).expect(0);
}

#[test]
fn h2_an_extra_library_is_found_and_taken_away() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let extra = fs::canonical(&world.project().join("build/tiny/bin")).unwrap().join("libm.so.6");
    fs::write_atomic(&extra, b"evil").unwrap();
    let found = world.run(&["verify"]).expect(3).stderr;
    assert!(found.contains("libm.so.6") && found.contains("no such file"), "{found}");
    let plan = world.run(&["sync", "--dry-run"]).expect(0).stderr;
    assert!(plan.contains("build tiny"), "{plan}");
    world.run(&["verify", "--repair"]).expect(0);
    assert!(!extra.exists());
}

#[test]
fn u3_a_wrong_file_or_source_in_the_store_is_found_and_repaired() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let blobs = fs::read_dir(&world.cache().join("blobs")).unwrap();
    let trees = fs::read_dir(&world.cache().join("trees")).unwrap();
    let tree = trees.iter().find(|path| path.is_dir()).unwrap().join("extra.cmake");
    let changed = |path: &Path| {
        let mut bytes = fs::read_bounded(path, 64 << 20).unwrap();
        bytes[0] ^= 1;
        bytes
    };
    // Another inode than the place, of the same size.
    let wrong = changed(&blobs[0]);
    fs::remove_file(&blobs[0]).unwrap();
    fs::write_atomic(&blobs[0], &wrong).unwrap();
    fs::write_atomic(&tree, b"").unwrap();
    let found = world.run(&["verify"]).expect(3).stderr;
    assert!(found.contains("cached weights file") && found.contains("extra.cmake"), "{found}");
    world.run(&["verify", "--repair"]).expect(0);
    assert!(!tree.exists());
    world.run(&["verify"]).expect(0);
}

#[test]
fn m5_a_file_of_the_users_own_is_kept_and_told() {
    let world = World::new();
    world.write("models/tiny/m/model.gguf", "my own");
    let told = world.run(&["sync"]).expect(0).stderr;
    assert!(told.contains("model.gguf.bak"), "{told}");
    assert_eq!(world.read("models/tiny/m/model.gguf.bak"), "my own");
    world.run(&["verify"]).expect(0);
    // A folder of the user's where the link to the engine belongs.
    fs::remove_file(&world.project().join("build/tiny")).unwrap();
    world.write("build/tiny/notes.txt", "mine");
    let refused = world.run(&["sync"]).expect(8).stderr;
    assert!(refused.contains("is in the way"), "{refused}");
    assert_eq!(world.read("build/tiny/notes.txt"), "mine");
}

#[test]
fn a_cache_from_another_machine_is_not_believed() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    // The same cache under another key: the artifact is built again, the weights are hashed again.
    let elsewhere =
        |args: &[&str]| Ran::of(world.command(args).env("AITOOLS_RECEIPT_KEY", "another machine").output().unwrap());
    let plan = elsewhere(&["sync", "--dry-run"]).expect(0).stderr;
    assert!(plan.contains("build tiny") && plan.contains("hash 1 file of m"), "{plan}");
    elsewhere(&["sync"]).expect(0);
    elsewhere(&["verify"]).expect(0);
}

#[test]
fn a_compile_error_shows_itself_and_leaves_the_old_build() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let before = world.snapshot(&world.project().join("build/tiny/bin"));
    world.write("engine source/part1.c", "int one(void) { return missing_name; }\n");
    world.run(&["lock", "--upgrade", "tiny"]).expect(0);
    let why = world.run(&["status", "--why", "tiny"]).expect(0).stdout;
    assert!(why.contains("source"), "{why}");
    let ran = world.run(&["sync"]).expect(5);
    assert!(ran.stderr.contains("missing_name"), "{}", ran.stderr);
    assert!(ran.stderr.contains(".log"), "{}", ran.stderr);
    assert_eq!(before, world.snapshot(&world.project().join("build/tiny/bin")));
    world.write("engine source/part1.c", "int one(void) { return 1; }\n");
    world.run(&["lock", "--upgrade", "tiny"]).expect(0);
    let plan = world.run(&["sync", "--json"]).expect(0).json();
    assert_eq!(plan["result"]["plan"]["steps"], serde_json::json!([]), "the first build is still there");
}

#[test]
fn four_at_once_build_once_and_all_succeed() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let started: Vec<_> = (0..4)
        .map(|_| {
            let mut command = world.command(&["sync"]);
            command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let ran: Vec<Ran> = started.into_iter().map(|child| Ran::of(child.wait_with_output().unwrap()).expect(0)).collect();
    let builds = ran.iter().filter(|ran| ran.stderr.contains("building tiny")).count();
    assert_eq!(builds, 1, "{ran:#?}");
    world.run(&["verify"]).expect(0);
}

#[test]
fn killed_at_any_moment_the_next_sync_finishes() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let whole = {
        let began = std::time::Instant::now();
        World::new().run(&["sync"]).expect(0);
        began.elapsed()
    };
    for round in 0..36_u32 {
        let mut child = world.command(&["sync"]).stderr(std::process::Stdio::null()).spawn().unwrap();
        // The moments spread over a whole sync and a little beyond.
        let moment = whole * (round * 7 % 36) / 32;
        let deadline = std::time::Instant::now() + moment;
        while std::time::Instant::now() < deadline && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if round % 12 == 5 {
            remove_artifacts(&world);
        }
        // Whatever is visible under its final name is right.
        let weights = world.project().join("models/tiny/m/model.gguf");
        if weights.exists() {
            assert_eq!(fs::read_bounded(&weights, 1 << 20).unwrap(), world::tiny_gguf());
        }
    }
    world.run(&["sync"]).expect(0);
    world.run(&["verify"]).expect(0);
    let left = fs::read_dir(&world.cache().join("staging")).unwrap();
    assert!(left.is_empty(), "leftovers of killed runs: {left:?}");
}

/// So that the next rounds have something to do again.
fn remove_artifacts(world: &World) {
    fs::remove_dir_all(&world.cache().join("artifacts")).unwrap();
    fs::remove_dir_all(&world.project().join("models")).unwrap();
}

/// The tiny engine ends at once: what a run begins with is all that is looked at.
#[test]
fn a_run_takes_away_what_killed_runs_left_and_nothing_in_use() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let staging = world.cache().join("staging");
    let (left, used) = (staging.join("0123456789abcdef"), staging.join("fedcba9876543210"));
    for folder in [&left, &used] {
        fs::write_atomic(&folder.join("llama.log"), b"much").unwrap();
    }
    let held = lock::acquire(&used.with_extension("lock"), &Cancel::default(), || {}).unwrap();
    world.run(&["run", "p", "--prompt", "hi"]).expect(7);
    assert!(!left.exists() && used.exists(), "{:?}", fs::read_dir(&staging));
    drop(held);
    world.run(&["run", "p", "--prompt", "hi"]).expect(7);
    assert_eq!(fs::read_dir(&staging).unwrap(), Vec::<std::path::PathBuf>::new());
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_the_whole_build_and_leaves_nothing_half_installed() {
    let world = World::new();
    // A compiler step that would take long.
    world.edit(
        "engine source/CMakeLists.txt",
        "add_executable",
        "add_custom_target(slow ALL COMMAND sleep 543.21)\nadd_executable",
    );
    world.edit("engine source/CMakeLists.txt", "part2.c)", "part2.c)\nadd_dependencies(llama-server slow)");
    world.run(&["lock"]).expect(0);
    let mut child = world
        .command(&["sync", "--json"])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    let mut lines = lines.map(Result::unwrap);
    assert!(lines.any(|line| line.contains("\"building\"")), "it never builds");
    while !sleeper_runs() {
        std::thread::sleep(Duration::from_millis(10));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!sleeper_runs(), "the build goes on");
    assert!(fs::read_dir(&world.cache().join("artifacts")).unwrap_or_default().is_empty());
    assert!(fs::read_dir(&world.cache().join("staging")).unwrap().is_empty());
}

#[cfg(unix)]
fn sleeper_runs() -> bool {
    let listed = std::process::Command::new("pgrep").args(["-f", "^sleep 543.21"]).output();
    listed.is_ok_and(|output| output.status.success())
}

#[test]
fn u7_an_installed_engine_runs_without_its_compiler() {
    let world = World::new();
    let synced = world.run(&["sync"]).expect(0);
    assert!(synced.stderr.contains("compiling code from the folder `engine source`"), "{}", synced.stderr);
    let tools = world::tools::tools();
    let path = std::env::join_paths([tools.cmake.parent().unwrap(), tools.ninja.parent().unwrap()]).unwrap();
    let without = |args: &[&str]| Ran::of(world.command(args).env("PATH", &path).output().unwrap());
    // The tiny engine ends at once: that it is started is what counts.
    let ran = without(&["run", "p", "--prompt", "hi"]).expect(7);
    assert!(ran.stderr.contains("engine `tiny` is used as it is"), "{}", ran.stderr);
    assert!(ran.stderr.contains("found no C compiler"), "{}", ran.stderr);
    // Another source is another engine, which only a compiler can make.
    world.write("engine source/new.c", "int three(void) { return 3; }\n");
    world.run(&["lock", "--upgrade", "tiny"]).expect(0);
    without(&["run", "p", "--prompt", "hi"]).expect(8);
}

#[test]
fn no_compiler_no_home_no_reader_no_panic() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    let tools = world::tools::tools();
    let without_compiler =
        std::env::join_paths([tools.cmake.parent().unwrap(), tools.ninja.parent().unwrap()]).unwrap();
    let ran = Ran::of(world.command(&["sync"]).env("PATH", without_compiler).output().unwrap()).expect(8);
    assert!(ran.stderr.contains("compiler"), "{}", ran.stderr);
    assert!(ran.stderr.contains("hint:"), "{}", ran.stderr);
    let homeless = Ran::of(world.command(&["status"]).env_remove("HOME").output().unwrap());
    homeless.expect(0);
    let mut child = world.command(&["schema", "manifest"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().code().is_some_and(|code| code == 0));
}

#[test]
fn wrong_words_are_told_with_their_place() {
    let world = World::new();
    world.edit("manifests/default.toml", "adapter = ", "adaptor = ");
    world.edit("configs/models/tiny/p.yaml", "max_tokens: 8", "max_tokens: many");
    let ran = world.run(&["status"]).expect(2);
    assert!(ran.stderr.contains("did you mean `adapter`"), "{}", ran.stderr);
    let world = World::new();
    world.edit("configs/models/tiny/p.yaml", "model: m", "model: mm");
    let ran = world.run(&["check", "--json"]).expect(2).json();
    assert_eq!(ran["error"]["problems"][0]["line"], 2, "{ran}");
    world.run(&["-m", "nothing", "status"]).expect(2);
    world.run(&["sync", "q"]).expect(2);
    world.run(&["frobnicate"]).expect(2);
}

/// A variant is chosen only where its build can be made and used, and refused when nvcc could not make it.
#[test]
#[cfg(unix)]
fn a_compiler_alone_is_no_accelerator_and_an_old_one_is_told() {
    let world = World::new();
    world.edit(
        "manifests/default.toml",
        "[models.m]",
        "[engines.tiny.variant]\ncpu = {}\ncuda = {}\nrocm = {}\n\n[models.m]",
    );
    let program = |name: &str, script: &str| {
        let path = world.project().join(name);
        fs::write_atomic(&path, format!("#!/bin/sh\n{script}\n").as_bytes()).unwrap();
        fs::set_executable(&path).unwrap();
        path
    };
    let nvcc = program("nvcc", "echo compute_80; echo Cuda compilation tools, release 11.5, V11.5.119");
    let hipcc = program("hipcc", "echo HIP version: 6.2");
    let run = |args: &[&str]| {
        let mut command = world.command(args);
        command.env("CUDACXX", &nvcc).env("HIPCXX", &hipcc);
        command.env("CUDA_VISIBLE_DEVICES", "").env("HIP_VISIBLE_DEVICES", "");
        Ran::of(command.output().unwrap())
    };
    run(&["sync"]).expect(0);
    let again = run(&["sync", "--variant", "cpu", "--json"]).expect(0);
    assert_eq!(again.json()["result"]["plan"]["steps"], serde_json::json!([]), "{}", again.stdout);
    let refused = run(&["sync", "--variant", "cuda"]).expect(2).stderr;
    assert!(refused.contains("installed CUDA 11.5 does not compile for the architectures 75, 86, 89, 90"), "{refused}");
    assert!(refused.contains("`CMAKE_CUDA_ARCHITECTURES`"), "{refused}");
}

#[test]
fn offline_nothing_new_is_fetched_and_nothing_old_is_lost() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    world.edit(
        "manifests/default.toml",
        "[models.m]",
        "[models.far]\nsource = { url = \"http://127.0.0.1:9/x.gguf\" }\n\n[models.m]",
    );
    world.run(&["lock", "--offline"]).expect(4);
    world.run(&["sync", "--frozen", "--offline", "p"]).expect(0);
    assert!(Path::new(&world.project().join("models/tiny/m/model.gguf")).exists());
}

/// As cargo's path dependencies: an edit is seen by every command, and old bytes are not used unnoticed.
#[test]
fn u6_an_edited_path_source_is_noticed() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    world.run(&["lock", "--check"]).expect(0);
    world.edit("engine source/part1.c", "return 1", "return 1 + 0");
    let gguf = fs::read_bounded(&world.project().join("weights/modèle.gguf"), 1 << 20).unwrap();
    fs::write_atomic(&world.project().join("weights/modèle.gguf"), &[&gguf[..], b"more"].concat()).unwrap();
    for args in [&["lock", "--check"][..], &["check"], &["run", "p", "-p", "hi"], &["sync", "--locked"]] {
        let said = world.run(args).expect(1).stderr;
        assert!(said.contains("the files at its `path` have changed"), "{args:?}: {said}");
    }
    let status = world.run(&["status"]).expect(0).stdout;
    assert!(status.contains("out of date"), "{status}");
    // Frozen is what it says.
    world.run(&["sync", "--frozen"]).expect(0);
    let synced = world.run(&["sync"]).expect(0).stderr;
    assert!(synced.contains("engine tiny") && synced.contains("model m"), "{synced}");
    world.run(&["lock", "--check"]).expect(0);
    let placed = fs::read_bounded(&world.project().join("models/tiny/m/model.gguf"), 1 << 20).unwrap();
    assert!(placed.ends_with(b"more"));
    // Touched, and not edited.
    let same = world.read("engine source/part2.c");
    world.write("engine source/part2.c", &same);
    world.run(&["sync", "--locked"]).expect(0);
}

/// Times that prove nothing, as those of a file that was written a moment ago, do not make the program forget what it locked.
#[test]
fn u6_an_edit_right_after_locking_is_noticed() {
    let world = World::new();
    let weights = world.project().join("weights/modèle.gguf");
    let write = |end: &[u8]| {
        fs::write_atomic(&weights, &[&world::tiny_gguf()[..], end].concat()).unwrap();
        let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(600);
        fs::open(&weights).unwrap().set_modified(soon).unwrap();
    };
    write(b"one");
    world.run(&["sync"]).expect(0);
    write(b"two");
    assert!(world.run(&["lock", "--check"]).expect(1).stderr.contains("the files at its `path` have changed"));
    world.run(&["sync"]).expect(0);
    let placed = fs::read_bounded(&world.project().join("models/tiny/m/model.gguf"), 1 << 20).unwrap();
    assert!(placed.ends_with(b"two"));
}

/// A `sync` keeps no record of files whose times prove nothing; a `run` after it hashes them itself.
#[test]
fn files_from_a_clock_that_was_ahead_can_be_used() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let soon = std::time::SystemTime::now() + std::time::Duration::from_secs(600);
    fs::open(&world.project().join("models/tiny/m/model.gguf")).unwrap().set_modified(soon).unwrap();
    world.run(&["sync"]).expect(0);
    // The engine of this project ends at once: it was started.
    world.run(&["run", "p", "-p", "hi"]).expect(7);
}

/// What was to be locked is remembered before the lockfile is written.
#[test]
fn u6_a_kill_before_the_lockfile_is_written_hides_no_edit() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let before = world.read("manifests/default.lock");
    fs::write_atomic(&world.project().join("weights/modèle.gguf"), &[&world::tiny_gguf()[..], b"x"].concat()).unwrap();
    world.run(&["lock"]).expect(0);
    let after = world.read("manifests/default.lock");
    // As a kill leaves it.
    world.write("manifests/default.lock", &before);
    world.run(&["sync"]).expect(0);
    assert_eq!(world.read("manifests/default.lock"), after);
}

/// A pin that `lock` kept, although the source never was that, does not become true by it.
#[test]
fn u6_a_source_that_differs_stays_different_after_lock() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    fs::remove_file(&world.cache().join("records.json")).unwrap();
    fs::write_atomic(&world.project().join("weights/modèle.gguf"), &[&world::tiny_gguf()[..], b"x"].concat()).unwrap();
    world.run(&["lock"]).expect(0);
    world.run(&["sync", "--frozen"]).expect(0);
    for args in [&["lock", "--check"][..], &["run", "p", "-p", "hi"], &["sync", "--locked"]] {
        let said = world.run(args).expect(1).stderr;
        assert!(said.contains("are not those that were locked"), "{args:?}: {said}");
    }
    let synced = world.run(&["sync"]).expect(0).stderr;
    assert!(synced.contains("run `aitools lock --upgrade m`"), "{synced}");
    world.run(&["lock", "--upgrade", "m"]).expect(0);
    world.run(&["lock", "--check"]).expect(0);
}

#[test]
fn what_an_engine_is_allowed_is_locked_and_told() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    world.edit("manifests/default.toml", "[engines.tiny]", "[engines.tiny]\nallow = [\"network\"]");
    let stale = world.run(&["sync", "--locked"]).expect(1).stderr;
    assert!(stale.contains(r#"allow: [] -> ["network"]"#), "{stale}");
    let synced = world.run(&["sync"]).expect(0).stderr;
    assert!(synced.contains("with access to the network"), "{synced}");
    assert!(world.read("manifests/default.lock").contains("allow = [\"network\"]"));
    let why = world.run(&["status", "--why", "tiny", "--json"]).expect(0).stdout;
    assert!(why.contains("\"network\":\"allowed\""), "{why}");
    let again = world.run(&["sync", "--json", "--locked"]).expect(0);
    assert_eq!(again.json()["result"]["plan"]["steps"], serde_json::json!([]), "{}", again.stdout);
}

/// On a machine that has nothing yet, commands that only look leave nothing behind.
#[test]
fn check_has_no_side_effects() {
    let world = World::new();
    world.run(&["lock"]).expect(0);
    for folder in ["la cache", "state", "home"] {
        fs::remove_dir_all(&world.project().parent().unwrap().join(folder)).unwrap();
    }
    let before = world.snapshot(world.project().parent().unwrap());
    world.run(&["check"]).expect(0);
    world.run(&["lock", "--check"]).expect(0);
    world.run(&["status"]).expect(0);
    world.run(&["doctor"]);
    world.run(&["sync", "--dry-run", "--locked"]).expect(0);
    let after = world.snapshot(world.project().parent().unwrap());
    let names =
        |files: &[(std::path::PathBuf, Vec<u8>)]| files.iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(names(&before), names(&after));
    assert!(!world.cache().exists());
}

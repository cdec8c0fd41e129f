//! `reproduce`: equal builds, and builds that depend on what they must not.
#![cfg(unix)]

#[path = "support/world.rs"]
mod world;

use world::World;

#[test]
fn a_second_build_elsewhere_has_the_same_bits() {
    let world = World::new();
    world.run(&["reproduce"]).expect(1);
    world.run(&["sync"]).expect(0);
    let same = world.run(&["reproduce", "tiny", "--json"]).expect(0).json();
    let engine = &same["result"]["engines"][0];
    assert_eq!(engine["equal"], true, "{same}");
    assert_eq!(engine["files"]["bin/llama-server"]["verdict"], "equal", "{same}");
    let unknown = world.run(&["reproduce", "tinny"]).expect(2).stderr;
    assert!(unknown.contains("did you mean `tiny`?"), "{unknown}");
    // Nothing of it is kept.
    world.run(&["verify"]).expect(0);
}

/// Beside each policy stands what was proven of it on this machine, and when; what was not proven is not claimed.
#[test]
fn what_was_proven_is_shown() {
    let world = World::new();
    world.run(&["sync"]).expect(0);
    let proven = || world.run(&["status", "--json"]).expect(0).json()["result"]["policies"][0]["proven"].clone();
    let nothing = serde_json::json!({"source": null, "engine": null, "bits": null, "weights": null, "smoke": null});
    assert_eq!(proven(), nothing);
    let verified = world.run(&["verify"]).expect(0).stderr;
    assert!(verified.contains("weights match the lockfile (20"), "{verified}");
    world.run(&["reproduce"]).expect(0);
    for claim in ["source", "engine", "bits", "weights"] {
        assert_eq!(proven()[claim]["holds"], true, "{claim}: {}", proven());
    }
    assert_eq!(proven()["smoke"], serde_json::Value::Null);
    let status = world.run(&["status"]).expect(0).stdout;
    assert!(status.contains("            bits    reproduced (20"), "{status}");

    // The engine changes: nothing is proven of the new one. Its model is the same.
    world.edit("engine source/part1.c", "return 1", "return 1 + 0");
    world.run(&["sync"]).expect(0);
    assert_eq!(proven()["bits"], serde_json::Value::Null);
    assert_eq!(proven()["weights"]["holds"], true);
    let weights = world.project().join("models/tiny/m/model.gguf");
    let mut bytes = aitools::base::fs::read_bounded(&weights, 1 << 20).unwrap();
    bytes[40] ^= 1;
    aitools::base::fs::remove_file(&weights).unwrap();
    aitools::base::fs::write_atomic(&weights, &bytes).unwrap();
    world.run(&["verify"]).expect(3);
    assert_eq!(proven()["weights"]["holds"], false);
    world.run(&["verify", "--repair"]).expect(0);
    assert_eq!(proven()["weights"]["holds"], true);
}

/// What a source does, and what is said about it.
const IMPURE: &[(&str, &str, &str)] = &[
    ("a time", "const char *made = __DATE__ \" \" __TIME__;", "a date or time"),
    ("a random number", "extern const char made[]; const char made[] = \"seed \" SEED;", "became"),
    ("its folder", "extern const char made[]; const char made[] = FOLDER;", "path of its build folder"),
];

#[test]
fn what_differs_is_named() {
    for (what, line, said) in IMPURE {
        let world = World::new();
        world.write("engine source/part1.c", &format!("{line}\nint one(void) {{ return made[0] ? 1 : 0; }}\n"));
        world.edit(
            "engine source/CMakeLists.txt",
            "add_executable",
            "string(RANDOM LENGTH 12 SEED)\nadd_compile_definitions(SEED=\"${SEED}\" FOLDER=\"${CMAKE_BINARY_DIR}\")\nadd_executable",
        );
        world.run(&["sync"]).expect(0);
        let ran = world.run(&["reproduce"]).expect(6);
        assert!(ran.stderr.contains("bits DIFFERENT") && ran.stderr.contains(said), "{what}: {}", ran.stderr);
        assert!(ran.stderr.contains("bin/llama-server: "), "{what}: {}", ran.stderr);
        // Only where it is installed.
        if let Some((_, report)) = ran.stderr.split_once("  see `") {
            let report = report.split_once('`').map(|(path, _)| std::path::PathBuf::from(path)).unwrap_or_default();
            let text = String::from_utf8(aitools::base::fs::read_bounded(&report, 8 << 20).unwrap()).unwrap();
            assert!(text.contains("first") && text.contains("second") && text.contains('@'), "{text}");
        }
    }
}

/// A source that asks for what has spoilt builds elsewhere: the commit of a repository around it, the date to pretend, flags,
/// umask, locale and time zone of the user. `reproduce` sets all of these to something else the second time.
#[test]
fn nothing_of_the_surroundings_reaches_a_build() {
    let world = World::new();
    let asked = "execute_process(COMMAND git log -1 --format=%H OUTPUT_VARIABLE HEAD ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
execute_process(COMMAND sh -c \"umask; date +%Z; locale 2>/dev/null | head -1\" OUTPUT_VARIABLE SEEN OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE \"\\n\" \" \" SEEN \"${SEEN}\")
add_compile_definitions(FOUND=\"${HEAD}|$ENV{SOURCE_DATE_EPOCH}|$ENV{CFLAGS}|$ENV{CPATH}|$ENV{GIT_DIR}|${SEEN}\")
add_executable";
    world.edit("engine source/CMakeLists.txt", "add_executable", asked);
    let part = "extern const char found[]; const char found[] = \"found \" FOUND; int one(void) { return found[0] ? 1 : 0; }\n";
    world.write("engine source/part1.c", part);
    // A repository around cache and project, whose commit a build would find.
    let git = |args: &[&str]| {
        let mut git = std::process::Command::new("git");
        let around = world.cache().parent().unwrap().to_owned();
        let who = ["-c", "user.name=n", "-c", "user.email=e@example.org"];
        assert!(git.arg("-C").arg(around).args(who).args(args).output().unwrap().status.success(), "{args:?}");
    };
    git(&["init", "--quiet"]);
    git(&["commit", "--quiet", "--allow-empty", "--message", "around"]);
    let sync =
        world.command(&["sync"]).env("SOURCE_DATE_EPOCH", "1").env("TZ", "Asia/Tokyo").env("CFLAGS", "-DX").output();
    assert!(sync.unwrap().status.success());
    git(&["commit", "--quiet", "--allow-empty", "--message", "another"]);
    let same = world.run(&["reproduce", "--json"]).expect(0).json();
    assert_eq!(same["result"]["engines"][0]["equal"], true, "{same}");
    let program = world.project().join("build/tiny/bin/llama-server");
    let bytes = aitools::base::fs::read_bounded(&program, 1 << 24).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    let found = text.split("found ").nth(1).and_then(|rest| rest.split('\0').next()).unwrap_or_default();
    assert!(found.starts_with("||||"), "{found}");
}

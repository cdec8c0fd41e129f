//! `export` and `verify --against` from outside: what is written, what it proves, and what is refused.
#![expect(clippy::disallowed_methods, reason = "tests read the environment that cargo gives them")]

#[path = "support/world.rs"]
mod world;

use world::World;

/// Keys for tests alone.
const KEY: &str = "-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgI1ObEaMR3mtFhkys
jXEhWiPwtkh/NCsq/bC7XlF87M2hRANCAAT1egjxmZg6nLG99Y2VMS+fCy5p4G6f
qhXjj72yt0u4xSgJ1MnXDfMKFTSfq0D4CenvEvwNsI6KEGg5Cx8vA+aL
-----END PRIVATE KEY-----
";
const PUBLIC: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE9XoI8ZmYOpyxvfWNlTEvnwsuaeBu
n6oV44+9srdLuMUoCdTJ1w3zChU0n6tA+Anp7xL8DbCOihBoOQsfLwPmiw==
-----END PUBLIC KEY-----
";
const OTHER: &str = "-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAET2NVIeRolTW9FWAi9MylipKexHeJ
FTs+TFjsaFwcpsLpotSfhzJZjdHz/aLmB2VE5cAEWs5+Tgsl7SCCcqhVVw==
-----END PUBLIC KEY-----
";

fn exported() -> World {
    let world = World::new();
    world.write("key.pem", KEY);
    world.write("key.pub.pem", PUBLIC);
    world.write("other.pub.pem", OTHER);
    world.run(&["export"]).expect(1);
    world.run(&["sync"]).expect(0);
    let wrote = world.run(&["export", "--key", "key.pem", "--json"]).expect(0).json();
    assert_eq!(wrote["result"]["files"].as_array().map(Vec::len), Some(3), "{wrote}");
    world
}

const FILES: [&str; 3] = ["evidence/sbom.cdx.json", "evidence/tiny-cpu.intoto.json", "evidence/m.model.sig"];

#[test]
fn what_was_exported_is_what_is_here() {
    let world = exported();
    for file in FILES {
        let signed = !file.ends_with("cdx.json");
        let key: &[&str] = if signed { &["--public-key", "key.pub.pem"] } else { &[] };
        let said = world.run(&[&["verify", "--against", file], key].concat()).expect(0).stderr;
        assert!(said.contains(if signed { "signed by the owner of that key" } else { "not signed" }), "{said}");
        if signed {
            let unsigned = world.run(&["verify", "--against", file]).expect(2).stderr;
            assert!(unsigned.contains("--public-key"), "{unsigned}");
            let other = ["verify", "--against", file, "--public-key", "other.pub.pem"];
            let refused = world.run(&other).expect(2).stderr;
            assert!(refused.contains("no signature is valid"), "{refused}");
        } else {
            world.run(&["verify", "--against", file, "--public-key", "key.pub.pem"]).expect(2);
        }
    }
    world.run(&["export", "--key", "key.pub.pem"]).expect(2);
    world.run(&["verify", "--against", "key.pem"]).expect(2);
    world.run(&["verify", "--against", "none.json"]).expect(8);
    // Without a key the statement is plain.
    world.run(&["export", "--output", "plain"]).expect(0);
    let said = world.run(&["verify", "--against", "plain/tiny-cpu.intoto.json"]).expect(0).stderr;
    assert!(said.contains("not signed: anybody may have written it"), "{said}");
    let bom = world.read("plain/sbom.cdx.json");
    for part in ["machine-learning-model", "engine:tiny:cpu", "\"architectureFamily\": \"llama\"", "configuration"] {
        assert!(bom.contains(part), "{part}: {bom}");
    }
}

#[test]
fn every_changed_byte_of_signed_evidence_is_refused() {
    let world = exported();
    for file in &FILES[1..] {
        let whole = world.read(file);
        let payload = whole.find("\"payload\": \"").unwrap() + 12;
        for at in [payload, payload + 101, payload + 202] {
            let mut changed = whole.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            world.write("changed.json", &String::from_utf8(changed).unwrap());
            world.run(&["verify", "--against", "changed.json", "--public-key", "key.pub.pem"]).expect(2);
        }
    }
}

#[test]
fn another_engine_and_another_model_are_told() {
    let world = exported();
    let part = "extern const char made[]; const char made[] = \"later\"; int one(void) { return made[0] ? 1 : 0; }\n";
    world.write("engine source/part1.c", part);
    world.run(&["sync"]).expect(0);
    let against = ["verify", "--against", FILES[1], "--public-key", "key.pub.pem", "--json"];
    let differs = world.run(&against).expect(3);
    assert!(
        differs.stdout.contains("engine tiny (cpu)") && differs.stdout.contains("bin/llama-server"),
        "{}",
        differs.stdout
    );
    world.run(&["verify", "--against", FILES[2], "--public-key", "key.pub.pem"]).expect(0);
    world.run(&["verify", "--against", FILES[0]]).expect(3);
    // A file that the evidence does not name is as wrong as one that is missing.
    world.write("renamed.json", &world.read(FILES[0]).replace("\"name\": \"model.gguf\"", "\"name\": \"other.gguf\""));
    let renamed = world.run(&["verify", "--against", "renamed.json", "--json"]).expect(3).stdout;
    assert!(renamed.contains("model.gguf") && renamed.contains("other.gguf"), "{renamed}");
}

/// What the named policies do not need was not hashed: evidence about it proves nothing.
#[test]
fn files_that_were_not_hashed_are_not_as_the_evidence_says() {
    let world = exported();
    world.edit(
        "manifests/default.toml",
        "[policies]",
        "[models.n]\nsource = { path = \"weights/n.gguf\" }\nplace = \"models/other/m\"\n\n[policies]",
    );
    let bytes = aitools::base::fs::read_bounded(&world.project().join("weights/modèle.gguf"), 1 << 20);
    let mut bytes = bytes.unwrap_or_default();
    bytes.push(0);
    let place = world.project().join("weights/n.gguf");
    assert!(aitools::base::fs::write_atomic(&place, &bytes).is_ok());
    world.run(&["sync"]).expect(0);
    world.run(&["export", "--key", "key.pem"]).expect(0);
    let key = ["--public-key", "key.pub.pem"];
    // Two models whose folders have one name are told apart by their files.
    for model in ["evidence/m.model.sig", "evidence/n.model.sig"] {
        world.run(&[&["verify", "--against", model][..], &key].concat()).expect(0);
    }
    let only_p = [&["verify", "p", "--against", "evidence/n.model.sig"][..], &key].concat();
    world.run(&only_p).expect(3);
}

/// Others who read these formats: their packages come from the Python package index.
#[test]
#[ignore = "needs AITOOLS_TEST_PYTHON with the referees' packages: see `cargo ci e2e evidence`"]
fn referees_accept_it_and_refuse_one_changed_byte() {
    let world = exported();
    let python = std::env::var_os("AITOOLS_TEST_PYTHON").unwrap();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("ci/clients/evidence.py");
    let project = world.project();
    let arguments = [project.join("evidence"), project.join("models/tiny/m"), project.join("key.pub.pem")];
    let ran = std::process::Command::new(python).arg(script).args(arguments).output().unwrap();
    assert!(ran.status.success(), "{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
}
